"""The machine code of norms and activations for chips that are not here; the audit sees what is wrong with it."""

import pytest
from test_audit import run_python

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_keep_their_limits_and_bars():
    result = run_python("-m", "benchmarks.audit", "layers", "--chip", "sm_90", "--chip", "gfx942", "--only", "residual")
    assert "36 kernels, 0 failed" in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from benchmarks.audit import layers as audit_layers
from pynlp.kernels.layers import norm
import torch

{change}
rows = audit_layers.audit("sm_90", 4096, torch.bfloat16, "{case}")
print("; ".join(failure for row in rows for failure in row.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "case", "complaint"),
    [
        ("norm.tile = lambda columns, most: (4, 4096, 4)", "layer norm, residual, dropout", "bytes of stack"),
        ("norm.tile = lambda columns, most: (1, 64, 4)", "rms norm", "narrow: LDG"),
        ("audit_layers.BARS['gelu'] = 2.0", "gelu", "of memory's rate, bar 2.0"),
    ],
)
def test_a_bad_choice_is_found(change, case, complaint):
    result = run_python("-c", MISUSE.format(change=change, case=case))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]
