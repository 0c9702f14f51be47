"""Cases of a benchmark: set up once, held against fp64, then timed in turn with what others have for the same."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.attention import peak
from benchmarks.measure import RESULTS, largest_error, machine, round_times, table, write_json
from pynlp import probes


@dataclass
class Case:
    """Calls that give the same, `ours` among them, and what is asked of their times."""

    name: str
    dtype: torch.dtype
    calls: dict[str, Callable[[], list[Tensor]]]
    oracle: Callable[[], list[Tensor]]  # in fp64
    asked: dict[str, float]  # a peer's time / ours, at least; "bandwidth": share of the read bandwidth, at least
    at_most: dict[str, float] = field(default_factory=dict)  # of our own variants: their time / ours
    flop: float = 0.0
    bytes: float = 0.0
    slack: float = 2.0  # errors of ours are at most this times the peer's


def run_cases(
    name: str,
    description: str,
    cases: dict[str, Callable[[], Case]],
    label: str,
    more: dict[str, Callable[[], list[dict]]],
) -> None:
    """A benchmark's command line: a table of the chosen cases; of all of them results/NAME.json and NAME.png, too.

    Args:
        description: Whose first line is the help.
        label: Of the picture's axis.
        more: Further tables by name, made where all cases are run.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write nothing")
    only = parser.parse_args().only
    chosen = [make for key, make in cases.items() if only in key]
    if not chosen:
        parser.error(f"--only: expected a part of one of {', '.join(cases)}, got {only!r}")
    rows = [run_case(make()) for make in tqdm(chosen, desc="cases", leave=False)]
    print(table(rows))
    if only:
        return
    tables = {}
    for key, make in more.items():
        tables[key] = make()
        print(f"\n{table(tables[key])}")
    path = write_json(name, {"machine": machine(), "cases": rows} | tables)
    plot(rows, name, label)
    print(f"\n{machine()}\nwritten: {path}, {RESULTS / f'{name}.png'}")


def run_case(case: Case) -> dict:
    expected = case.oracle()
    checked = case.calls.pop("checked", None)  # a part that the oracle can hold
    error = max(largest_error((checked or case.calls["ours"])(), expected))
    peers = {} if checked else {name: call for name, call in case.calls.items() if name != "ours"}
    theirs = max((max(largest_error(call(), expected)) for call in peers.values()), default=0.0)
    size = max(x.abs().max().item() for x in expected)
    # Without a peer that drops the same weights: the rounding of out and of the weights.
    correct = error <= (case.slack * theirs + 1e-6 if peers else 4 * torch.finfo(case.dtype).eps * size)
    ours, share, ratios = float("inf"), 0.0, {}
    if correct:
        capacity = []  # of the machine, in bytes or operations a second: once before the rounds, twice in each
        measure = (lambda: probes.read_bandwidth(seconds=0.05)) if case.bytes else (lambda: peak(case.dtype))
        times = round_times(case.calls | {"machine": lambda: capacity.append(measure())}, 4.0)
        ours = min(times["ours"])
        work = case.bytes or case.flop
        peaks = [max(two) for two in zip(capacity[1::2], capacity[2::2], strict=True)]
        share = statistics.median(work / time / most for time, most in zip(times["ours"], peaks, strict=True))
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))
            for name in case.calls
            if name != "ours"
        }
    figures = ratios | {"bandwidth": share}
    met = correct and all(figures[name] >= bound for name, bound in case.asked.items())
    met &= correct and all(figures[name] <= bound for name, bound in case.at_most.items())
    asked = [f"{name} >= {bound:.2f}" for name, bound in case.asked.items()]
    asked += [f"{name} <= {bound:.2f}" for name, bound in case.at_most.items()]
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": f"{error:.1e}",
        "ms": f"{ours * 1e3:.2f}" if correct else "wrong",
        "rate": f"{case.bytes / ours / 1e9:.1f} GB/s" if case.bytes else f"{case.flop / ours / 1e9:.0f} GFLOP/s",
        "of peak": f"{share:.0%}",
        "time / ours": ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
        "asked": ", ".join(asked),
        "met": "yes" if met else "NO",
    }


def plot(rows: list[dict], name: str, label: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["ms"] != "wrong"]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.0))
    labels = [f"{row['case']}, {row['dtype']}" for row in rows]
    bars = axes.barh(labels, [float(row["of peak"].rstrip("%")) for row in rows], color="#3b6fb6")
    axes.bar_label(bars, [f"{row['rate']}; time / ours: {row['time / ours']}" for row in rows], padding=4, fontsize=7)
    axes.set(xlim=(0, 220), xlabel=label)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=150)
    plt.close(figure)
