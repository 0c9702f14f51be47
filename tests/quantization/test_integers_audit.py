"""The machine code of products with weights in integers for chips that are not here; the audit sees what is wrong."""

import pytest
from package.test_audit import run_python

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_kernels_keep_their_limits_and_bars(chip):
    result = run_python("-m", "benchmarks.audit", "integers", "--chip", chip, "--only", "int4")
    assert " kernels, 0 failed" in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from benchmarks.audit import integers as audit
from pynlp.kernels.quantization import integer_linear
from pynlp.kernels.quantization.linear_configs import Config
import torch

integer_linear.configs = lambda *_: [Config({config})]
rows = audit.audit("{chip}", 64, torch.bfloat16, "int8")
print("; ".join(failure for row in rows for failure in row.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "config", "complaint"),
    [
        ("sm_80", "64, 128, 256, 4, 2", "bytes of stack"),
        ("sm_90", "64, 64, 32, 4, 2", "n/w, bar"),
    ],
)
def test_a_bad_tile_is_found(chip, config, complaint):
    result = run_python("-c", MISUSE.format(chip=chip, config=config))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]
