"""Scales of a layer's inputs that cost nothing: what makes the inputs divides by them, the weight multiplies with them.

W x = (W diag(s)) (diag(1/s) x). Where x is a norm's result, the norm's weight and bias are divided by s; where x grows
with a slice of another layer's results (values of attention, the half of a feed-forward layer that is gated, what goes
through a ReLU), that layer's rows are. Whether this is so is not read off a model's classes, it is tried: powers of two
as scales leave the model's results the same to the last bit if nothing else hangs on what was divided.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pynlp.nn.linear import is_conv1d
from pynlp.quantize.activations import Runs, Unit, same

MOST_SLICES = 4  # of a layer's rows: queries, keys and values in one, or a gate and what it gates


class Source(NamedTuple):
    """What makes a layer's inputs: a norm, or rows of a linear layer."""

    module: nn.Module
    rows: slice

    def divide(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Divides rows of a weight, in a norm's case its own, and of the bias by a scale `(K,)`.

        Returns:
            What the weight was divided by: with a norm's in 16 bits, to its last bit.
        """
        rows = weight[self.rows]
        if rows.dim() == 1:
            before = rows.to(scale.dtype, copy=True)
            rows /= scale
            scale = torch.where(rows == 0, scale, before / rows)
        else:
            rows /= scale[:, None]
        if getattr(self.module, "bias", None) is not None:
            self.module.bias.detach()[self.rows] /= scale
        return scale


def weight_of(layer: nn.Module) -> Tensor:
    """The weight `(N, K)` of a linear layer, as a view."""
    return layer.weight.detach().t() if is_conv1d(layer) else layer.weight.detach()


def source_of(runs: Runs, unit: Unit, group: list[nn.Module], results: list[Tensor]) -> Source | None:
    """What makes the inputs of layers, if scales can be folded into it.

    Args:
        results: What `runs.results(unit)` gives.
    """
    owners = Counter(id(x) for module in runs.model.modules() for x in module._parameters.values())
    parents = Counter(id(x) for module in runs.model.modules() for x in module._modules.values())

    def is_alone(module):
        return (
            parents[id(module)] == 1
            and all(x is None or owners[id(x)] == 1 for x in module._parameters.values())
            and runs.calls[0][module] == 1
            and all(calls[module] <= 1 for calls in runs.calls)
        )

    if not all(map(is_alone, group)):
        return None
    for source in _candidates(runs, unit, group):
        if is_alone(source.module) and _is_unchanged(runs, unit, group, source, results):
            return source
    return None


def _candidates(runs: Runs, unit: Unit, group: list[nn.Module]) -> Iterator[Source]:
    """What may make the inputs: the norm whose result they are, or slices of layers before them, latest first."""
    columns = weight_of(group[0]).shape[1]
    if group[0] in runs.norms:
        if len(runs.norms[group[0]].weight) == columns:
            yield Source(runs.norms[group[0]], slice(None))
        return
    before = [x for other in unit.groups for x in other if runs.order[x] < runs.order[group[0]]]
    for layer in sorted(before, key=runs.order.get, reverse=True):
        rows = weight_of(layer).shape[0]
        if rows % columns == 0 and rows // columns <= MOST_SLICES:
            for start in range(rows - columns, -1, -columns):
                yield Source(layer, slice(start, start + columns))


def _is_unchanged(runs: Runs, unit: Unit, group: list[nn.Module], source: Source, results: list[Tensor]) -> bool:
    """Whether the model gives the same bits with powers of two folded into the source."""
    changed = {layer: layer.weight.detach().clone() for layer in (*group, source.module)}
    bias = getattr(source.module, "bias", None)
    bias_before = None if bias is None else bias.detach().clone()
    columns = weight_of(group[0]).shape[1]
    scale = 16.0 ** (torch.arange(columns, device=group[0].weight.device) % 3 - 1)
    try:
        source.divide(scale, weight_of(source.module))
        for layer in group:
            weight = weight_of(layer)
            weight *= scale
        return same(runs.results(unit), results)
    finally:
        for layer, weight in changed.items():
            layer.weight.detach().copy_(weight)
        if bias is not None:
            bias.detach().copy_(bias_before)
