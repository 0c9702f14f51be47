"""Figures of the translation example, as PNG files."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from parts.common.attention_maps import heat_map
from parts.common.reports import write
from torch import Tensor


def attention_map(source: list[str], target: list[str], weights: Tensor, path: Path) -> None:
    """Which source tokens (columns) each target token (rows) looks at; weights `(target tokens, source tokens)`."""
    figure = Figure(figsize=(2.5 + 0.3 * len(source), 1.8 + 0.26 * len(target)), layout="constrained")
    axes = figure.subplots()
    image = heat_map(axes, weights, target, source)
    axes.set(xlabel="source", ylabel="translation")
    figure.colorbar(image, label="attention")
    write(path, lambda part: figure.savefig(part, dpi=150))


def bars(rows: list[dict], path: Path) -> None:
    """BLEU of each kind of positions, a bar for each way to decode."""
    names = list(dict.fromkeys(row["positions"] for row in rows))
    methods = list(dict.fromkeys(row["decoding"] for row in rows))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(2 + 1.5 * len(names), 4), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        scores = [row["BLEU"] for row in rows if row["decoding"] == method]
        axes.bar_label(axes.bar(np.arange(len(names)) + i * width, scores, width, label=method), fmt="%.1f", fontsize=8)
    axes.set_xticks(np.arange(len(names)) + width * (len(methods) - 1) / 2, names)
    axes.set(ylabel="BLEU")
    figure.legend(loc="outside upper center", ncols=len(methods), frameon=False)
    write(path, lambda part: figure.savefig(part, dpi=150))
