"""The rules by which the house stays as it is hold for it, and each is broken by a small tree that breaks it."""

from pathlib import Path

import pytest
from cases import house

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    broken = list(rule(ROOT))
    assert not broken, "\n".join(broken)


def test_the_checker_sees_the_house():
    """An empty tree would keep every rule."""
    modules = house.modules(ROOT)
    assert {"pynlp", "pynlp.ops.attention.attention", "pynlp.kernels.common.launch", "translation"} <= modules.keys()
    for name, module in [("pynlp.nn", "nn.cache"), ("pynlp.kernels.attention.launch", "kernels.common.launch")]:
        assert f"pynlp.{module}" in [imported for _, imported in house.imports(ROOT, name)]
    assert len(house.sources(ROOT, ".h", ".cpp")) > 30


KEPT = {
    "pynlp/__init__.py": "from pynlp import backends, functional\n",
    "pynlp/backends.py": "import torch\n",
    "pynlp/functional.py": "from pynlp.ops.attention.attention import attention\n",
    "pynlp/ops/__init__.py": "",
    "pynlp/ops/common/library.py": "from pynlp import backends\n",
    "pynlp/ops/attention/attention.py": (
        "from pynlp.ops.common.library import define\nfrom pynlp.reference.attention import attention as reference\n"
    ),
    "pynlp/ops/moe/mlp.py": "from pynlp.ops.quantization.formats import FORMATS\n",
    "pynlp/ops/quantization/formats.py": "FORMATS = {}\n",
    "pynlp/reference/attention/attention.py": '"""The formula."""\nimport torch\n',
    "pynlp/nn/attention.py": "from pynlp.ops.attention.attention import attention\n",
    "pynlp/models/transformer.py": "from pynlp.nn.attention import attention\n",
    "pynlp/training/trainer.py": "import torch\n",
    "kernels/common/__init__.py": "",
    "kernels/common/launch.py": "import triton\n",
    "kernels/attention/__init__.py": "",
    "kernels/attention/forward.py": (
        "import triton\nfrom ..common.launch import choose\n\n@triton.jit\ndef kernel(a, B: tl.constexpr):\n    pass\n"
    ),
    "csrc/common/dtype.h": "#include <cstdint>\n",
    "csrc/simd/vector.h": '#include "../common/dtype.h"\n',
    "csrc/attention/forward.h": '#include "../simd/vector.h"\n',
    "csrc/moe/mlp.h": '#include "../quantization/formats.h"\n',
    "csrc/quantization/formats.h": '#include "../simd/vector.h"\n',
    "csrc/bindings/attention.cpp": '#include <torch/csrc/stable/library.h>\n#include "../attention/forward.h"\n',
    "benchmarks/__init__.py": "",
    "benchmarks/measure.py": "import pynlp\n",
    "benchmarks/decode.py": "from benchmarks.measure import peak\nif __name__ == '__main__':\n    main()\n",
    "examples/translation.py": "from parts.translation.corpora import load\nif __name__ == '__main__':\n    main()\n",
    "examples/parts/translation/corpora.py": "import pynlp\n",
    "tests/test_all.py": "",
}
ARGUMENTS = ", ".join(f"a{i}" for i in range(31))
# A rule, a file that is added or gets other text, and where the rule must find it broken.
BROKEN = [
    ("downward", "pynlp/ops/common/library.py", "def f():\n    from pynlp.nn import attention\n", "library.py:2"),
    ("downward", "pynlp/models/transformer.py", "from pynlp.training import trainer\n", "not below models"),
    ("downward", "pynlp/nn/attention.py", "import benchmarks.measure\n", "outside pynlp"),
    ("downward", "pynlp/backends.py", "def f():\n    import pynlp\n", "backends.py:2"),
    ("downward", "pynlp/reference/attention/attention.py", "from pynlp.kernels.attention import forward\n", ":1"),
    ("downward", "kernels/common/launch.py", "from pynlp import backends\n", "not below kernels"),
    ("downward", "kernels/common/launch.py", "from ...ops.common import library\n", "not below kernels"),
    ("downward", "pynlp/attic.py", "from pynlp import backends\n", "no level is known for attic"),
    ("families_apart", "kernels/common/launch.py", "from ..attention.forward import kernel\n", "of a family"),
    ("families_apart", "pynlp/ops/attention/attention.py", "from pynlp.ops.moe import mlp\n", "of another family"),
    ("families_apart", "pynlp/ops/quantization/formats.py", "from pynlp.ops.moe import mlp\n", "of another family"),
    ("families_apart", "pynlp/ops/moe/mlp.py", "import pynlp.reference.attention.attention\n", "of another family"),
    ("families_apart", "csrc/common/dtype.h", '#include "../attention/forward.h"\n', "of a family"),
    ("families_apart", "csrc/attention/forward.h", '#  include "../moe/mlp.h"\n', "of another family"),
    ("torch_in_bindings_only", "csrc/attention/forward.h", "#include <torch/csrc/stable/tensor.h>\n", "forward.h:1"),
    ("no_circles", "pynlp/backends.py", "def f():\n    from pynlp.ops.common import library\n", "pynlp.backends ->"),
    ("no_circles", "kernels/common/launch.py", "from ..attention import forward\n", "launch -> "),
    ("no_circles", "benchmarks/measure.py", "from . import decode\n", "benchmarks.decode"),
    ("no_circles", "examples/parts/translation/corpora.py", "import translation\n", "translation -> "),
    ("scripts_apart", "benchmarks/measure.py", "from benchmarks import decode\n", "the script benchmarks.decode"),
    ("scripts_apart", "examples/parts/common/reports.py", "from translation import main\n", "the script translation"),
    ("short_files", "tests/test_all.py", "\n" * 501, "test_all.py: 501 lines"),
    ("short_files", "csrc/attention/forward.h", "\n" * 501, "forward.h: 501 lines"),
    ("short_signatures", "kernels/attention/forward.py", f"@triton.jit\ndef f({ARGUMENTS}): pass\n", "has 31"),
    ("short_signatures", "kernels/attention/forward.py", f"@jit(debug=1)\ndef f(*, {ARGUMENTS}): pass\n", "has 31"),
    ("kernels_is_no_package", "kernels/__init__.py", "", "makes a package"),
    ("kernels_is_no_package", "kernels/moe/mlp.py", "", "kernels/moe: has no"),
    ("plain_docstrings", "pynlp/backends.py", '"""Of what is loaded."""\n', "backends.py:1"),
    ("plain_docstrings", "tests/test_all.py", 'def f():\n    """With care."""\n', "test_all.py:2"),
]


@pytest.fixture
def tree(tmp_path):
    for name, text in KEPT.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_tree_that_keeps_the_rules(tree):
    for rule in house.RULES:
        assert not list(rule(tree)), rule.__name__


@pytest.mark.parametrize(("rule", "file", "text", "where"), BROKEN)
def test_what_breaks_a_rule_is_found(rule, file, text, where, tree):
    write(tree / file, text)
    broken = list(getattr(house, rule)(tree))
    assert any(where in line for line in broken), broken


def test_a_full_folder_is_found(tree):
    for i in range(15):
        write(tree / f"kernels/attention/part_{i}.py", "")
    assert list(house.small_folders(tree)) == ["kernels/attention: 16 modules, at most 15"]
