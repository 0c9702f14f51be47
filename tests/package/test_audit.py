"""The machine code of the attention kernels for chips that are not here; the audit sees what is wrong with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in another process: the kernels of this one may belong to Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "attention", "decode"), [("sm_80", 11, 12), ("sm_90", 26, 12), ("sm_100", 17, 10), ("gfx942", 11, 10)]
)
def test_kernels_keep_their_limits_and_bars(chip, attention, decode):
    result = run_python("-m", "benchmarks.audit", "attention", "decode", "--chip", chip)
    for family, kernels in (("attention", attention), ("decode", decode)):
        part = result.stdout.split(f"## {family}\n")[1].split("\n## ")[0]
        assert f"{kernels} kernels, 0 failed" in part, result.stdout + result.stderr[-2000:]
    assert result.returncode == 0


MISUSE = """
from pynlp.kernels.attention import launch as attention
from benchmarks.audit import attention as audit
import torch

attention.configs = lambda *_: [attention.Config({config})]
(row,) = audit.audit("{chip}", {head_dim}, torch.{dtype}, False, "causal")
print("; ".join(row.failures))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "config", "head_dim", "dtype", "complaint"),
    [
        ("sm_80", "128, 64, 4, 2", 128, "bfloat16", "bytes of stack"),
        ("sm_80", "128, 128, 8, 3", 128, "bfloat16", "bytes of shared memory"),
        ("sm_90", "64, 64, 2, 1", 64, "bfloat16", "products miss HGMMA"),
        ("sm_90", "64, 32, 4, 2, True", 64, "bfloat16", "n/s, bar 7.2"),
    ],
)
def test_a_bad_tile_is_found(chip, config, head_dim, dtype, complaint):
    result = run_python("-c", MISUSE.format(chip=chip, config=config, head_dim=head_dim, dtype=dtype))
    assert complaint in result.stdout, result.stdout + result.stderr[-2000:]


def test_a_marker_that_the_sources_lack_is_refused():
    from benchmarks.audit.report import Markers

    Markers({"attention/forward.py": ("m_pair",)})
    with pytest.raises(ValueError, match="expected 'm_renamed' in kernels/attention/forward.py"):
        Markers({"attention/forward.py": ("m_pair", "m_renamed")})
    with pytest.raises(ValueError, match="expected 'm_pair' in kernels/attention/moved.py"):
        Markers({"attention/moved.py": ("m_pair",)})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["other"], "family: expected some of attention, decode, integers, layers, moe, quantization, got other"),
        (["layers", "--only", "no such case"], "--only: expected a part of a case's name, got 'no such case'"),
    ],
)
def test_what_is_not_there_is_refused(arguments, complaint):
    result = run_python("-m", "benchmarks.audit", *arguments)
    assert result.returncode == 2
    assert complaint in " ".join(result.stderr.split())
