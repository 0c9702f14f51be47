"""Figures of the comparison, as PNG files."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from parts.common.figures import plain_logarithmic
from parts.common.reports import write

TOLERANCE = 0.3  # points of accuracy
STYLES = {"fp32": "black", "bf16": "gray", "int8": "C0", "w8a8": "C1", "int4": "C2", "nf4": "C3", "bnb": "C4"}
MARKERS, LINES = "osD^vPX", ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))


def style(rows: list[dict]) -> list[tuple[str, int]]:
    """A colour for each variant's kind, and a number among those of its colour."""
    colours = [STYLES[row["variant"].partition("-")[0]] for row in rows]
    return [(colour, colours[:i].count(colour)) for i, colour in enumerate(colours)]


def accuracy_and_memory(rows: list[dict], path: Path) -> None:
    """Accuracy of each variant over the megabytes of its tensors."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for row, (colour, number) in zip(rows, style(rows), strict=True):
        axes.plot(
            row["MB"], 100 * row["accuracy"], MARKERS[number % len(MARKERS)], color=colour, label=row["variant"],
            markersize=5 + 2 * number, fillstyle="none", markeredgewidth=1.5,
        )  # fmt: skip
    exact = 100 * rows[0]["accuracy"]
    axes.axhline(exact, color="black", linewidth=0.8)
    axes.axhspan(exact - TOLERANCE, exact + TOLERANCE, color="black", alpha=0.08, label=f"fp32 ± {TOLERANCE} points")
    axes.set_xlim(left=0)
    axes.set(xlabel="tensors of the model (MB)", ylabel="test accuracy (%)", title="Accuracy against memory")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    write(path, lambda part: figure.savefig(part, dpi=150))


def layer_errors(rows: list[dict], path: Path) -> None:
    """Error of the features behind each block of each variant."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for row, (colour, number) in zip(rows, style(rows), strict=True):
        if row["variant"] != "fp32":
            errors = row["block errors"]
            axes.plot(
                range(1, len(errors) + 1), errors, linestyle=LINES[number % len(LINES)], color=colour, marker=".",
                label=row["variant"],
            )  # fmt: skip
    plain_logarithmic(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="block", ylabel="relative error of the features behind it", title="Error against fp32, layer by layer"
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    write(path, lambda part: figure.savefig(part, dpi=150))
