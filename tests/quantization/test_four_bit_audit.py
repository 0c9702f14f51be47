"""The machine code of products with 4-bit weights for chips that are not here; the audit sees what is wrong with it."""

import pytest
from package.test_audit import run_python

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_kernels_keep_their_limits_and_bars(chip):
    result = run_python("-m", "benchmarks.audit", "quantization", "--chip", chip, "--only", "nf4")
    assert "32 kernels, 0 failed" in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from benchmarks.audit import quantization as audit
from pynlp.kernels.quantization import linear
from pynlp.kernels.quantization.linear_configs import Config
import torch

linear.configs = lambda *_: [Config({config})]
rows = audit.audit("{chip}", 64, torch.bfloat16, "nf4")
print("; ".join(failure for row in rows for failure in row.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "config", "complaint"),
    [
        ("sm_80", "64, 128, 256, 4, 2", "bytes of stack"),
        ("sm_80", "64, 128, 64, 4, 3, opaque=False", "n/w, bar 5.0"),
        ("sm_90", "64, 64, 32, 4, 2", "narrow loads"),
    ],
)
def test_a_bad_tile_is_found(chip, config, complaint):
    result = run_python("-c", MISUSE.format(chip=chip, config=config))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]
