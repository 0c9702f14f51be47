"""A comparison with PyTorch: set up once, held against fp64 and, only if that passes, timed in turns."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import pynlp
from benchmarks.measure import RESULTS, bars, largest_error, machine, peak, round_times, save_picture, table, write_json
from pynlp import probes


@dataclass
class Case:
    """Calls that give the same, `ours` among them, and what is asked of their times."""

    name: str
    dtype: torch.dtype
    calls: dict[str, Callable[[], object]]  # timed in turns
    oracle: Callable[[], list[Tensor]]  # in fp64
    asked: dict[str, float] = field(default_factory=dict)  # a peer -> its time / ours, at least
    at_most: dict[str, float] = field(default_factory=dict)  # a variant of ours -> its time / ours, at most
    share: float = 0.0  # of the machine's peak, at least
    flop: float = 0.0
    bytes: float = 0.0
    products: torch.dtype | None = None  # whose products bound it, if not those of `dtype`
    slack: float = 2.0  # the errors of ours are at most this times the peers'
    checked: dict[str, Callable[[], list[Tensor]]] | None = None  # held against the oracle, instead of the calls
    apart: dict[str, Callable[[], Callable]] = field(default_factory=dict)  # each makes a call that is timed alone
    isa: str | None = None
    memory: bool = False  # whether peak memory is shown, too


@dataclass
class Result:
    """The largest errors of ours and of the peers, and the speed, None where the errors of ours are too large."""

    error: float
    peer_error: float
    speed: Any


@dataclass
class Rounds:
    """Seconds of each call by round, and the machine's peak in the same rounds, in FLOP or bytes a second."""

    times: dict[str, list[float]]
    peaks: list[float]

    def ratios(self, case: Case) -> dict[str, float]:
        """The time of each other call / ours, the median of all rounds."""
        pairs = {name: zip(self.times[name], self.times["ours"], strict=True) for name in case.calls if name != "ours"}
        return {name: statistics.median(a / b for a, b in both) for name, both in pairs.items()}

    def share(self, case: Case) -> float:
        """The share of the machine's peak that ours reaches, the median of all rounds."""
        work = case.bytes or case.flop
        return statistics.median(work / t / peak for t, peak in zip(self.times["ours"], self.peaks, strict=True))


def check(case: Case) -> tuple[float, float, bool]:
    """The largest errors of ours and of the peers, and whether each tensor of ours is as close to fp64 as is asked."""
    expected = case.oracle()
    errors = {name: largest_error(call(), expected) for name, call in (case.checked or case.calls).items()}
    ours = [errors.pop(name) for name in ("ours", *case.at_most) if name in errors]
    if errors:
        limits = [case.slack * max(each) + 1e-6 for each in zip(*errors.values(), strict=True)]
    else:  # no peer drops the same weights: the rounding of each value
        limits = [4 * torch.finfo(case.dtype).eps * x.abs().max().item() for x in expected]
    correct = all(a <= b for each in ours for a, b in zip(each, limits, strict=True))
    return max(map(max, ours)), max(map(max, errors.values()), default=0.0), correct


def take_turns(case: Case) -> Rounds:
    """Times of the calls in turns with the machine's peak, which drifts with its clock and other load."""
    peaks = []  # once as a warm-up, then twice a round

    def probe() -> None:
        peaks.append(probes.read_bandwidth(seconds=0.05) if case.bytes else peak(case.products or case.dtype))

    times = round_times(case.calls | {"machine": probe}, 4.0)
    del times["machine"]
    for name, make in case.apart.items():
        times |= round_times({name: make()}, 0.3)
    return Rounds(times, [max(two) for two in zip(peaks[1::2], peaks[2::2], strict=True)])


def run(case: Case, timed: Callable[[Case], Any] = take_turns) -> Result:
    """The errors of a case and, if they pass, what `timed` gives, by default its times in turns on the CPU."""
    in_use = pynlp.get_isa()
    if case.isa:
        pynlp.set_isa(case.isa)
    try:
        error, peer_error, correct = check(case)
        return Result(error, peer_error, timed(case) if correct else None)
    finally:
        pynlp.set_isa(in_use)


def row(case: Case, result: Result) -> dict:
    """A line of the table of a benchmark."""
    asked = [f"{name} >= {bound:.2f}" for name, bound in case.asked.items()]
    asked += [f"{'bandwidth' if case.bytes else 'peak'} >= {case.share:.2f}"] * bool(case.share)
    asked += [f"{name} <= {bound:.2f}" for name, bound in case.at_most.items()]
    line = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "error": f"{result.error:.1e}"}
    if result.speed is None:
        nothing = dict.fromkeys(("rate", "of peak", "time / ours"), "-")
        return line | {"ms": "wrong", **nothing, "asked": ", ".join(asked), "met": "NO"}
    ours, ratios, share = min(result.speed.times["ours"]), result.speed.ratios(case), result.speed.share(case)
    met = all(ratios[name] >= bound for name, bound in case.asked.items()) and share >= case.share
    met &= all(ratios[name] <= bound for name, bound in case.at_most.items())
    return line | {
        "ms": f"{ours * 1e3:.2f}",
        "rate": f"{case.bytes / ours / 1e9:.1f} GB/s" if case.bytes else f"{case.flop / ours / 1e9:.0f} GFLOP/s",
        "of peak": f"{share:.0%}",
        "time / ours": ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
        "asked": ", ".join(asked),
        "met": "yes" if met else "NO",
    }


def run_cases(
    name: str,
    description: str,
    tables: dict[str, tuple[dict[str, Callable[[], Case]], Callable[[Case, Result], dict]]],
    more: dict[str, Callable[[], list[dict]]],
    plots: dict[str, Callable],
) -> None:
    """The command line of a benchmark; it prints tables and writes results/NAME.json and pictures.

    Args:
        description: Its first line is the help.
        tables: Title -> cases by name, and what makes a line of each. `--only` chooses among the cases of all.
        more: Title -> what makes a further table, where all cases are run.
        plots: File -> what makes its picture of the tables, where all cases are run.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write nothing")
    only = parser.parse_args().only
    names = [key for cases, _ in tables.values() for key in cases]
    if not any(only in key for key in names):
        parser.error(f"--only: expected a part of one of {', '.join(names)}, got {only!r}")
    written = {}
    for title, (cases, line) in tables.items():
        chosen = [make for key, make in cases.items() if only in key]
        if chosen:
            made = (make() for make in tqdm(chosen, desc=title, leave=False))
            written[title] = [line(case, run(case)) for case in made]
            print(f"{table(written[title])}\n")
    if only:
        return
    for title, make in more.items():
        written[title] = make()
        print(f"{table(written[title])}\n")
    paths = [write_json(name, {"machine": machine()} | written)]
    for file, plot in plots.items():
        paths.append(RESULTS / f"{file}.png")
        save_picture(plot(written), paths[-1])
    print(f"{machine()}\nwritten: {', '.join(map(str, paths))}")


def plot_shares(rows: list[dict], title: str, xlabel: str):
    """A picture of the shares of the machine's peak, with the rates and the speeds against others behind them."""
    rows = [row for row in rows if row["ms"] != "wrong"]
    return bars(
        [f"{row['case']}, {row['dtype']}" for row in rows],
        [float(row["of peak"].rstrip("%")) for row in rows],
        [f"{row['rate']}; time / ours: {row['time / ours']}" for row in rows],
        title,
        xlabel,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """PyTorch's scaled_dot_product_attention of (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)
