"""The machine code of products with quantized weights for chips that are not here; the audit sees what is wrong."""

import pytest
from package.test_audit import run_python

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("family", "case", "verdict"),
    [("quantization", "nf4", "32 kernels, 0 failed"), ("integers", "int4", " kernels, 0 failed")],
)
def test_kernels_keep_their_limits_and_bars(family, case, verdict, chip):
    result = run_python("-m", "benchmarks.audit", family, "--chip", chip, "--only", case)
    assert verdict in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from benchmarks.audit import {family} as audit
from pynlp.kernels.quantization import {launcher}
from pynlp.kernels.quantization.linear_configs import Config
import torch

{launcher}.configs = lambda *_: [Config({config})]
rows = audit.audit("{chip}", 64, torch.bfloat16, "{case}")
print("; ".join(failure for row in rows for failure in row.failures))
"""
FOUR_BIT = dict(family="quantization", launcher="linear", case="nf4")
INTEGERS = dict(family="integers", launcher="integer_linear", case="int8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "chip", "config", "complaint"),
    [
        (FOUR_BIT, "sm_80", "64, 128, 256, 4, 2", "bytes of stack"),
        (FOUR_BIT, "sm_80", "64, 128, 64, 4, 3, opaque=False", "n/w, bar 5.0"),
        (FOUR_BIT, "sm_90", "64, 64, 32, 4, 2", "narrow loads"),
        (INTEGERS, "sm_80", "64, 128, 256, 4, 2", "bytes of stack"),
        (INTEGERS, "sm_90", "64, 64, 32, 4, 2", "n/w, bar"),
    ],
)
def test_a_bad_tile_is_found(of, chip, config, complaint):
    result = run_python("-c", MISUSE.format(**of, chip=chip, config=config))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]
