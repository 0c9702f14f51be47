"""The build: a native extension that runs on any CPU, wheels with and without it, and no test skipped in silence."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pynlp
from pynlp import backends

ROOT = Path(__file__).resolve().parents[2]
ISA_OBJECT = re.compile("avx|amx")


def run(*command, cwd=ROOT, check=True, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def test_extension_is_loaded():
    assert backends.native_missing_reason() is None, "build it: make install"
    assert Path(backends.native().__file__).parent == ROOT / "pynlp"


@pytest.fixture(scope="module")
def objects():
    """The compiled files of csrc, without those of an earlier layout."""
    found = {}
    for path in ROOT.glob("build/temp.*/csrc/**/*.o"):
        name = path.relative_to(ROOT)
        if ROOT.joinpath(*name.parts[2:]).with_suffix(".cpp").exists():
            found[str(name)] = path
    assert any(map(ISA_OBJECT.search, found)) and not all(map(ISA_OBJECT.search, found)), "build it: make install"
    return found


def test_code_for_one_isa_stays_apart(objects):
    """Functions that the linker may merge must not be compiled for an ISA, or a lesser CPU runs what it lacks."""
    mergeable = {}
    for name, path in objects.items():
        symbols = run("nm", "--defined-only", path).stdout.splitlines()
        mergeable[name] = {symbol.split()[-1] for symbol in symbols if re.search(" [WVu] (?!DW.ref)", symbol)}
    for name in filter(ISA_OBJECT.search, objects):
        for other in objects:
            assert other == name or not mergeable[name] & mergeable[other], (name, other)


def test_other_code_runs_on_any_cpu(objects):
    for name, path in objects.items():
        wide = re.search("%[yzt]mm", run("objdump", "-d", path).stdout) is not None
        assert wide == bool(ISA_OBJECT.search(name)), name


def test_kernels_folder_is_no_package():
    """The Hugging Face package `kernels` is looked up by that name: ours must not be taken for it."""
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert run(sys.executable, "-c", code).stdout.strip() == "None"


@pytest.fixture
def sources(tmp_path):
    """A copy of what the package is built from, without anything built."""
    copy = tmp_path / "sources"
    for folder in ("pynlp", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / file, copy)
    return copy


def build_wheel(source, target, **environment):
    arguments = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", source, *arguments, cwd=target.parent, **environment)
    (wheel,) = target.glob("*.whl")
    return wheel


def assert_complete(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pynlp").rglob("*.py")}
    expected |= {f"pynlp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected | {"pynlp/py.typed"} <= files
    assert {name.split("/")[0] for name in files} == {"pynlp", f"pynlp_kernels-{pynlp.__version__}.dist-info"}


def use(wheel, tmp_path):
    """What an installation of the wheel prints, far from the checkout."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    code = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
# An editable installation of the checkout would supply what the wheel lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
import torch, pynlp
q = torch.randn(1, 5, 2, 8, requires_grad=True)
pynlp.functional.attention(q, q, q).sum().backward()
print(pynlp.__file__, importlib.util.find_spec("pynlp.kernels.attention.launch").origin, pynlp.get_isa(), sep="\\n")
"""
    path = str(tmp_path / "site")
    package, kernels, isa = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path).stdout.splitlines()
    assert Path(package).parent == tmp_path / "site/pynlp"
    assert Path(kernels).parent == tmp_path / "site/pynlp/kernels/attention"
    return isa


@pytest.mark.slow
def test_wheel_without_compiler(sources, tmp_path):
    wheel = build_wheel(sources, tmp_path / "wheel", PYNLP_BUILD_CPP="0", CXX="no-such-compiler")
    assert wheel.name == f"pynlp_kernels-{pynlp.__version__}-py3-none-any.whl"
    assert_complete(wheel)
    assert use(wheel, tmp_path) == "None"


@pytest.mark.slow
def test_wheel_from_source_distribution(sources, tmp_path):
    """Nothing the extension needs is missing from the source distribution; compiled fast, for it is hardly used."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    wheel = build_wheel(archive, tmp_path / "wheel", CXX=str(compiler))
    assert_complete(wheel)
    assert any(re.fullmatch(r"pynlp/_C\..*\.so", name) for name in zipfile.ZipFile(wheel).namelist())
    assert use(wheel, tmp_path) == pynlp.get_isa()


def test_missing_tools_are_named(sources, tmp_path):
    (sources / "constraints.txt").touch()
    no_venv = tmp_path / "python"
    no_venv.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    no_venv.chmod(0o755)
    done = run("make", "install", f"PYTHON={no_venv}", cwd=sources, check=False)
    assert done.returncode != 0 and re.search("venv module .* is missing: apt-get install .*python3-venv", done.stderr)

    (sources / ".venv/bin").mkdir(parents=True)
    (sources / ".venv/bin/python").symlink_to(sys.executable)
    (sources / ".venv/.installed").touch()
    done = run("make", "install", "CXX=no-such-compiler", cwd=sources, check=False)
    assert done.returncode != 0 and re.search(r"compiler is missing: apt-get install .*g\+\+", done.stderr)


SILENT = {
    "test_empty.py": "",
    "test_skips.py": "import pytest\n@pytest.mark.skip(reason='not today')\ndef test_one(): pass\n",
    "test_module.py": "import pytest\npytest.importorskip('no_such_module')\ndef test_two(): pass\n",
    "test_parameters.py": "import pytest\n@pytest.mark.parametrize('x', [])\ndef test_three(x): pass\n",
}
HONEST = "import pytest\ndef test_four(): pass\n@pytest.mark.skip(reason='needs a GPU')\ndef test_five(): pass\n"


def test_the_rule_against_silence_holds_for_this_run(pytestconfig):
    assert pytestconfig.pluginmanager.hasplugin("cases.silence")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("silent", [None, *SILENT])
def test_no_test_is_skipped_in_silence(silent, processes, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_honest.py").write_text(HONEST)
    if silent:
        (tmp_path / "tests" / silent).write_text(SILENT[silent])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "cases.silence", "-p", "xdist"]
    command += ["-n", processes, "--dist", "worksteal"] if processes > 1 else []
    alone = dict(PYTHONPATH=str(ROOT / "tests"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = run(*command, cwd=tmp_path, check=False, **alone)
    assert done.returncode == (1 if silent else 0), done.stdout
    assert ("did not run, for no known reason" in done.stdout) == bool(silent)
    assert not silent or f"tests/{silent}" in done.stdout.split("no known reason")[1]
