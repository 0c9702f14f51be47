"""Draws docs/images/speedups.png from the README's table of figures: `python docs/speedups.py`."""

import re
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+|-) \| ([\d.]+|-) \|$", re.MULTILINE)


def draw(readme: str, path: Path) -> None:
    rows = ROW.findall(readme)[::-1]  # what, beside what, the ratios in fp32 and in bf16 or "-"
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    for offset, column, label, color in ((0.2, 2, "fp32", "tab:blue"), (-0.2, 3, "bf16", "tab:orange")):
        bars = [(place + offset, row[column]) for place, row in enumerate(rows) if row[column] != "-"]
        widths = [float(ratio) - 1 for _, ratio in bars]
        axes.barh([place for place, _ in bars], widths, left=1, height=0.38, label=label, color=color)
        for place, ratio in bars:
            axes.text(1.04 * max(1, float(ratio)), place, ratio, va="center", fontsize=8)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0.7, 40)
    axes.set_yticks(range(len(rows)), [f"{what}\nbeside {other}" for what, other, *_ in rows], fontsize=8)
    axes.set_xlabel("the other's time / ours; right of 1 ours is faster")
    axes.set_title("Two cores of an AMD EPYC (Zen 5, AVX-512 BF16), layer norm: Zen 3; torch 2.13.0", fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw((ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "docs" / "images" / "speedups.png")
