"""Times of calls that take turns, errors against an oracle, peak memory, the machine's peaks, tables and bars."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from pynlp import has_bf16, probes

RESULTS = Path("results")
FP32, BF16 = torch.float32, torch.bfloat16
# What products are measured in: without instructions for bf16 PyTorch's take minutes.
PRODUCT_DTYPES = (FP32, BF16) if has_bf16(torch.device("cpu")) else (FP32,)


def shorter_of_two(function: Callable) -> float:
    """Seconds of the shorter of two calls: the first finds caches and threads as another function left them."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def round_times(
    functions: dict[str, Callable], seconds: float = 1.5, pause: float = 0.0, clock: Callable = shorter_of_two
) -> dict[str, list[float]]:
    """The times of each function in seconds, one a round: the functions take turns, so that noise meets all alike.

    Args:
        seconds: Rounds go on for that long, after a warm-up; there are at least three.
        pause: Seconds of rest before each time, for threads of another runtime that spin for a while after their work.
        clock: Gives the time of a function in seconds.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            time.sleep(pause)
            times[name].append(clock(function))
        rounds += 1
    return times


def best_times(functions: dict[str, Callable], seconds: float = 1.5) -> dict[str, float]:
    """The shortest time of each function in seconds, from rounds in which they take turns."""
    return {name: min(times) for name, times in round_times(functions, seconds).items()}


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of the machine in the dtype's instructions; fp16 is computed in fp32."""
    if dtype == torch.int8:
        return probes.peak_int8_tile(seconds=0.02) or probes.peak_int8_dot(seconds=0.02)
    bf16 = dtype == BF16 and (probes.peak_bf16_tile(seconds=0.02) or probes.peak_bf16_dot(seconds=0.02))
    return bf16 or probes.peak_fma(seconds=0.02)


def largest_error(values: list[Tensor], oracle: list[Tensor]) -> list[float]:
    """The largest absolute error of each tensor."""
    return [(a.double() - b).abs().max().item() if b.numel() else 0.0 for a, b in zip(values, oracle, strict=True)]


def peak_memory(script: str) -> int:
    """Bytes of memory that `measured()`, a function that `script` defines, adds to its process at its peak.

    The process is a fresh one, so that no allocator's cache hides anything. Linux only (/proc/self/clear_refs).
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
    """The machine and the PyTorch that figures were measured with."""
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    result = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if BF16 not in PRODUCT_DTYPES:
        result["bf16 of the CPU"] = "no instructions for it: products not measured"
    return result | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def write_json(name: str, content: object) -> Path:
    """Writes results/NAME.json, to a temporary file first: an interruption leaves the old one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    return path


def bars(
    labels: list[str], values: list[float], notes: list[str], title: str, xlabel: str, *, logarithmic: bool = False
):
    """A figure of horizontal bars, each with its label before it and its note behind the axes, which end with the data.

    Logarithmic ones begin at 1, and their ticks are 1, 2, 5 and so on.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.34 * len(labels) + 1.6), layout="constrained")
    axes = figure.subplots()
    origin = 1 if logarithmic else 0
    axes.barh(labels, [value - origin for value in values], left=origin, color="#3b6fb6")
    for place, note in enumerate(notes):
        axes.text(1.01, place, note, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    if logarithmic:
        axes.set_xlim(0.9 * min(1.0, *values), max(1.0, *values))
        plain_logarithmic(axes.xaxis, (1, 2, 5))
        axes.axvline(1, color="black", lw=0.8)
    else:
        axes.set_xlim(0, max(values))
    axes.set(title=title, xlabel=xlabel)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plain_logarithmic(axis, digits: tuple[int, ...]) -> None:
    """A logarithmic scale with ticks such as 100 and 200, in place of 10^2 and 2 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_picture(figure, path: Path) -> None:
    """Writes a figure with the machine and the date below it, to a temporary file first."""
    there = machine()
    words = f"{there.get('gpu', there['cpu'])}, {there['threads']} threads, PyTorch {there['torch']}, {date.today()}"
    figure.text(0.0, -0.01, words, fontsize=7, va="top")
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(temporary, dpi=150, bbox_inches="tight")
    os.replace(temporary, path)


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
