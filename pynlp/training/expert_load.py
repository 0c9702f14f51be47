"""How the experts of a model are loaded over time: a CSV file, curves, and a heat map of experts and layers."""

import csv
import math
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pynlp.nn.moe import MoE, moe_layers

COLUMNS = ("step", "layer", "tokens", "entropy", "max_over_mean", "dropped", "expert", "share")


class ExpertLoad:
    """Counts of each expert's tokens, summed over the passes between two calls of `record`.

    All passes count, those in evaluation and those that checkpointing repeats, too.

    Args:
        model: Its `pynlp.nn.MoE` layers are watched from now on, until `close`.

    Attributes:
        steps: The steps that were recorded.
        counts: For each of these the tokens of each layer's experts, by the layer's name; int64 `(num_experts,)`.
        dropped: Likewise the choices that had no place in their expert.

    Raises:
        ValueError: the model has no mixture of experts.

    Example:
        >>> import torch
        >>> from pynlp.nn import MoE
        >>> from pynlp.training import ExpertLoad
        >>> layer = MoE(8, 16, num_experts=4)
        >>> load = ExpertLoad(layer)
        >>> for step in range(3):
        ...     _ = layer(torch.randn(100, 8))
        ...     load.record(step)
        >>> [row["tokens"] for row in load.rows()], 0.9 < load.rows()[0]["entropy"] <= 1
        ([200, 200, 200], True)
    """

    def __init__(self, model: nn.Module):
        self.layers = {name or type(model).__name__: layer for name, layer in moe_layers(model).items()}
        if not self.layers:
            raise ValueError(f"model: expected mixtures of experts in it, got none in {type(model).__name__}")
        self.steps: list[int] = []
        self.counts: list[dict[str, Tensor]] = []
        self.dropped: list[dict[str, int]] = []
        self._sums: dict[MoE, tuple[Tensor, Tensor]] = {}
        self._hooks = [layer.register_forward_hook(self._count) for layer in self.layers.values()]

    def _count(self, layer: MoE, inputs: tuple, output: Tensor) -> None:
        load, dropped = self._sums.get(layer, (0, 0))
        self._sums[layer] = layer.load + load, layer.dropped + dropped  # on the device: nothing waits for it

    def record(self, step: int) -> None:
        """Sum up the passes since the last record, as those of a step; nothing where there were none."""
        if not self._sums:
            return
        self.steps.append(step)
        sums = {name: self._sums[layer] for name, layer in self.layers.items() if layer in self._sums}
        self.counts.append({name: load.cpu() for name, (load, _) in sums.items()})
        self.dropped.append({name: int(dropped) for name, (_, dropped) in sums.items()})
        self._sums.clear()

    def close(self) -> None:
        """Watch the model no longer."""
        for hook in self._hooks:
            hook.remove()

    def rows(self) -> list[dict]:
        """A row for each step and layer.

        Of step, layer, tokens (choices that found a place), entropy (of the experts' shares, 1 where all are alike),
        max_over_mean (of the experts' loads, 1 at least), and dropped.
        """
        result = []
        for step, counts, dropped in zip(self.steps, self.counts, self.dropped, strict=True):
            for name, load in counts.items():
                row = dict(step=step, layer=name, tokens=int(load.sum()))
                result.append(row | summary(load) | {"dropped": dropped[name]})
        return result

    def write_csv(self, path: Path | str) -> None:
        """Write a line for each step, layer and expert, to a temporary file first.

        Its columns are those of `rows`, which are of the whole layer, and the expert and its share of the tokens.
        """
        path = Path(path)
        temporary = path.with_name(f"{path.stem}.part{path.suffix}")
        loads = (load for counts in self.counts for load in counts.values())
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row, load in zip(self.rows(), loads, strict=True):
                for expert, share in enumerate((load / load.sum().clamp_min(1)).tolist()):
                    writer.writerow(row | {"expert": expert, "share": f"{share:.6g}"})
        os.replace(temporary, path)

    def plot(self, path: Path | str, last: int = 10) -> None:
        """Draw max over mean of each layer over time, and the experts' shares of the last records as a heat map.

        Args:
            path: Of the picture; it is written to a temporary file first.
            last: Records that the heat map sums up.
        """
        path = Path(path)
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        curves, heat = figure.subplots(1, 2)
        for name in self.layers:
            points = [(row["step"], row["max_over_mean"]) for row in self.rows() if row["layer"] == name]
            curves.plot(*zip(*points, strict=True), lw=1, label=name) if points else None
        curves.set(xlabel="step", ylabel="load of the fullest expert / mean", ylim=(1, None))
        curves.legend(fontsize=7)
        draw_shares(heat, self.shares(last))
        temporary = path.with_name(f"{path.stem}.part{path.suffix}")
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)

    def shares(self, last: int = 10) -> dict[str, Tensor]:
        """Each layer's experts' shares of all choices of the last records, one or more."""
        if last < 1:
            raise ValueError(f"last: expected at least 1, got {last}")
        result = {}
        for name in self.layers:
            loads = [counts[name] for counts in self.counts[-last:] if name in counts]
            if loads:
                total = torch.stack(loads).sum(0)
                result[name] = total / total.sum().clamp_min(1)
        return result


def summary(load: Tensor) -> dict[str, float]:
    """The entropy of the shares as a part of the largest possible, and max over mean; 1 and 1 of no tokens."""
    total, experts = load.sum().item(), len(load)
    if total == 0 or experts == 1:
        return {"entropy": 1.0, "max_over_mean": 1.0}
    shares = load.double() / total
    entropy = -torch.xlogy(shares, shares).sum().item() / math.log(experts)
    return {"entropy": round(entropy, 6), "max_over_mean": round((shares.max() * experts).item(), 6)}


def draw_shares(axes, shares: dict[str, Tensor]) -> None:
    """Experts' shares by layer as a heat map; layers with fewer experts end earlier."""
    width = max((len(x) for x in shares.values()), default=1)
    grid = torch.full((max(1, len(shares)), width), math.nan)
    for i, x in enumerate(shares.values()):
        grid[i, : len(x)] = x * len(x)
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=2)
    axes.set(xlabel="expert", ylabel="layer", title="load / mean of the layer")
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axes.figure.colorbar(image, ax=axes)
