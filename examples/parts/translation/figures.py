"""Figures of the translation example, as PNG files."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from parts.common.attention_maps import heat_map
from parts.common.reports import write
from torch import Tensor

MOST_TOKENS = 40  # of a side in a picture: what an untrained model writes may have hundreds


def attention_map(source: list[str], target: list[str], weights: Tensor, path: Path) -> None:
    """Which source tokens (columns) each target token (rows) attends to; weights `(target tokens, source tokens)`.

    Of longer sides the first `MOST_TOKENS` are shown, and the title says so.
    """
    title = "Cross-attention of the last layer, mean of its heads"
    if max(len(source), len(target)) > MOST_TOKENS:
        title += f"; the first {MOST_TOKENS} tokens"
    source, target, weights = source[:MOST_TOKENS], target[:MOST_TOKENS], weights[:MOST_TOKENS, :MOST_TOKENS]
    figure = Figure(figsize=(3.5 + 0.3 * len(source), 2.2 + 0.22 * len(target)), layout="constrained")
    axes = figure.subplots()
    image = heat_map(axes, weights, target, source)
    axes.set(xlabel="source (keys)", ylabel="translation (queries)")
    figure.suptitle(title, fontsize=9)
    figure.colorbar(image, label="attention weight")
    write(path, lambda part: figure.savefig(part, dpi=150))


def bars(rows: list[dict], path: Path) -> None:
    """BLEU and speed of each kind of positions, a bar for each way to decode."""
    names = list(dict.fromkeys(row["positions"] for row in rows))
    methods = list(dict.fromkeys(row["decoding"] for row in rows))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(2 + 1.5 * len(names), 6), layout="constrained")
    for axes, value, unit, form in zip(
        figure.subplots(2, 1, sharex=True), ("BLEU", "tokens/s"), ("BLEU", "speed (tokens/s)"), ("%.1f", "%.0f"),
        strict=True,
    ):  # fmt: skip
        for i, method in enumerate(methods):
            values = [row[value] for row in rows if row["decoding"] == method]
            label = method if value == "BLEU" else None
            drawn = axes.bar(np.arange(len(names)) + i * width, values, width, color=f"C{i}", label=label)
            axes.bar_label(drawn, fmt=form, fontsize=7)
        axes.set(ylabel=unit)
        axes.margins(y=0.12)  # for the labels
    axes.set_xticks(np.arange(len(names)) + width * (len(methods) - 1) / 2, names)
    axes.set(xlabel="positions of the model")
    figure.suptitle("Translation of the held-out test set")
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False)
    write(path, lambda part: figure.savefig(part, dpi=150))
