"""Plans of the Triton launchers, over a driver that is not there: in a process in which kernels are compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MANY = int(os.environ.get("PYNLP_FUZZ_EXAMPLES", "0"))
# Multiples of torch.empty that calls may cost; twice of it here, where other tests run beside.
BARS = {
    "gelu": {"without gradients": 8, "both ways": 35},
    "layer_norm": {"without gradients": 8, "both ways": 35},
    "attention": {"without gradients": 12, "both ways": 60},
    "decode": {"without gradients": 15},
}

pytestmark = pytest.mark.slow


def run(*command: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_plans_start_what_the_launchers_start(tmp_path):
    """Argument by argument, on tensors of odd sizes, strides and alignments; and nothing where Triton is watched."""
    output = run("-m", "cases.standin", str(max(3, MANY // 50)), folder=tmp_path)
    assert "the same launches" in output


def test_a_call_costs_little(tmp_path):
    """The benchmark's ratios, of the thread's own time; a plan is the shorter way."""
    run("-m", "benchmarks.launch", "--rounds", "10", folder=tmp_path)
    rows = {row["call"]: row for row in json.loads((tmp_path / "results/launch.json").read_text())["gpu"]}
    for name, bars in BARS.items():
        for column, bar in bars.items():
            cost, whole = rows[name][column].rstrip(")").split(" (")
            assert float(cost) <= 2 * bar, f"{name}, {column}: {cost} times torch.empty, bar {bar}"
            assert float(cost) <= float(whole) / 1.2, f"{name}, {column}: {cost}, without plans {whole}"
