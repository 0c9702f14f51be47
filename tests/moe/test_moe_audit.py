"""The machine code of the kernels of mixtures of experts for a chip that is not here."""

import pytest
from package.test_audit import run_python

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_keep_their_limits_and_bars():
    result = run_python("-m", "benchmarks.audit", "moe", "--chip", "sm_90", "--only", "gpt-oss")
    assert "17 kernels, 0 failed" in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from benchmarks.audit import moe as audit
from pynlp.kernels.moe import grouped
from pynlp.kernels.moe.configs import Config
import torch

grouped.configs = lambda *_: [Config({config})]
rows = audit.audit("sm_80", torch.bfloat16, "swiglu")
print("; ".join(failure for row in rows for failure in row.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "complaint"),
    [("128, 128, 64, 4, 3", "bytes of stack"), ("128, 128, 128, 8, 4", "bytes of shared memory")],
)
def test_a_bad_tile_is_found(config, complaint):
    result = run_python("-c", MISUSE.format(config=config))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]
