"""Times of several implementations in turn, errors against an oracle, peak memory, and how they are shown."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pynlp import has_bf16

RESULTS = Path("results")
FP32, BF16 = torch.float32, torch.bfloat16
# What products are measured in: without instructions for bf16 PyTorch's take minutes.
PRODUCT_DTYPES = (FP32, BF16) if has_bf16(torch.device("cpu")) else (FP32,)


def round_times(functions: dict[str, Callable], seconds: float = 1.5, pause: float = 0.0) -> dict[str, list[float]]:
    """The times of each function in seconds, a round each, called in turn so that noise meets all alike.

    There are at least three rounds after a warm-up, more while `seconds` last. In a round every function runs twice and
    the shorter time counts: the first time it finds the caches and the thread pool as another one left them. Before it
    there is a pause in seconds, for threads of another runtime: they wait for more work in a loop, at the cost of all.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            time.sleep(pause)
            two = []
            for _ in range(2):
                begin = time.perf_counter()
                function()
                two.append(time.perf_counter() - begin)
            times[name].append(min(two))
        rounds += 1
    return times


def best_times(functions: dict[str, Callable], seconds: float = 1.5) -> dict[str, float]:
    """The shortest time of each function in seconds, from rounds in which they are called in turn."""
    return {name: min(times) for name, times in round_times(functions, seconds).items()}


def largest_error(values: list[Tensor], oracle: list[Tensor]) -> list[float]:
    """The largest absolute error of each tensor."""
    return [(a.double() - b).abs().max().item() if b.numel() else 0.0 for a, b in zip(values, oracle, strict=True)]


def peak_memory(script: str) -> int:
    """Bytes that the function `measured()` defined by `script` needs at its peak beyond what was there before it.

    In a fresh process, so that no allocator's cache hides anything. Linux only (/proc/self/clear_refs).
    """
    program = f"""
{script}
from pathlib import Path
def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = resident("VmRSS")
kept = measured()
print(resident("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the memory measurement failed: {run.stderr}")
    return int(run.stdout.split()[-1])


def machine() -> dict:
    """What the figures were measured on."""
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    result = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if BF16 not in PRODUCT_DTYPES:
        result["bf16 of the CPU"] = "no instructions for it: products not measured"
    return result | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def write_json(name: str, content: object) -> Path:
    """Write results/NAME.json: to a temporary file first, so that an interruption leaves the old one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    return path


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table whose columns line up."""
    columns = list(rows[0])
    cells = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
