"""What `import pynlp` brings, what is loaded on first use, and the hints where a package is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

import pynlp

ROOT = Path(__file__).resolve().parents[2]
INSIDE = {"kernels", "ops", "reference"}  # which nobody imports
FOLDERS = {path.parent.name for path in (ROOT / "pynlp").glob("*/__init__.py")} - INSIDE
FIRST_USE = f"""
import sys
import pynlp

folders = {sorted(FOLDERS)}
assert not any(name.startswith(f"pynlp.{{folder}}") for name in sys.modules for folder in folders), sorted(sys.modules)
assert not sys.modules.keys() & {{"matplotlib", "transformers"}}

sys.modules["tqdm"] = None  # as if it were not installed
hint = "pynlp.training needs tqdm: {sys.executable} -m pip install matplotlib safetensors tqdm"
try:
    import pynlp.training
except ImportError as error:
    assert str(error) == hint
try:
    pynlp.training
except AttributeError as error:
    assert str(error) == hint
help(pynlp)  # and dir() and hasattr(), which look at all names
assert not hasattr(pynlp, "training")
del sys.modules["tqdm"]

for folder in folders:
    assert folder in dir(pynlp)
    assert getattr(pynlp, folder) is sys.modules[f"pynlp.{{folder}}"]
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_folders_are_loaded_on_first_use_and_help_names_them():
    done = run_python(FIRST_USE)
    assert done.returncode == 0, done.stderr
    for name in [*pynlp.__all__[1:], *FOLDERS]:
        assert name in pynlp.__doc__ and name in done.stdout


def test_no_such_name():
    with pytest.raises(AttributeError, match="module 'pynlp' has no attribute 'attension'"):
        pynlp.attension  # noqa: B018
    assert not hasattr(pynlp, "attension")


def test_without_torch():
    done = run_python("import sys; sys.modules['torch'] = None; import pynlp")
    hint = f"pynlp needs torch, which {sys.executable} has not: {sys.executable} -m pip install torch"
    assert done.returncode != 0 and hint in done.stderr.splitlines()[-1]
