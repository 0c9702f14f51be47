"""Quantizes a model with the help of what its layers read: GPTQ, AWQ and SmoothQuant."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize.activations import Runs, Unit, running
from pynlp.quantize.awq import awq_scale, smoothquant_scale
from pynlp.quantize.folding import Source, source_of, weight_of
from pynlp.quantize.gptq import Hessian, factor_of, quantize_with
from pynlp.quantize.model import Plan, as_linear, bytes_of, linear_of, make_plan, measure
from pynlp.quantize.report import QuantizedLayer, Report

METHODS = {"gptq": {"damping": 0.01, "activation_order": True}, "awq": {}, "smoothquant": {"alpha": 0.5}}


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    how: str,
    *,
    method: str = "gptq",
    skip: Sequence[str] = (),
    **options,
) -> Report:
    """Replace the linear layers of a model, in place, by quantized ones that fit what they read.

    The layers, what stays dense, and what they are replaced by are those of `quantize_`, of the same bytes; only the
    codes are others. Block by block, what a layer reads comes from blocks that are quantized already.

    - "gptq" rounds a weight's columns one after the other, and makes up for what one loses in those that follow.
    - "awq" multiplies columns whose inputs are large with scales, to lose less of them, and divides the inputs.
    - "smoothquant" does so to make inputs easier to round, where a layer rounds these, too.

    AWQ and SmoothQuant divide inputs where that costs nothing: in the norm that makes them, or in the rows of a linear
    layer. Layers whose inputs come from elsewhere are rounded to nearest, as are those that no batch reaches, of which
    a warning tells. Until the model is quantized its dense weights are kept: whatever fails leaves it unchanged.

    Args:
        batches: What the model takes: tensors, or dicts of its arguments; gone through several times, so kept as a
            list. Tokens of padding count as others do: leave them out. For language models 128 rows of 2048 tokens, of
            text as it will read, are usual. AWQ and SmoothQuant run the first batch several times for each layer.
        how: As `quantize_`'s.
        method: "gptq", "awq" or "smoothquant".
        skip: As `quantize_`'s.
        options: Of the quantization, as `quantize_`'s. Of GPTQ `damping`, the share of the mean square of inputs that
            is added to each (0.01), and `activation_order`, whether columns with large inputs are rounded first (True),
            which costs nothing later. Of SmoothQuant `alpha`, the share of the trouble that goes from inputs to weights
            (0.5).

    Returns:
        What each layer lost and saved, of the weight as it was after scales, if any.

    Raises:
        ValueError, TypeError: an argument is off, or what layers read is not finite; the model is unchanged.

    Source: Frantar et al., arXiv 2210.17323; Lin et al., arXiv 2306.00978; Xiao et al., arXiv 2211.10438.

    Example:
        >>> import torch
        >>> from pynlp.models import Decoder, TransformerConfig
        >>> from pynlp.quantize import calibrate
        >>> model = Decoder(TransformerConfig(vocab_size=100, embed_dim=64, layers=2))
        >>> report = calibrate(model, [torch.randint(100, (4, 32))], "nf4", method="gptq")
        >>> report.how, len(report.layers)
        ('nf4 by gptq', 12)
    """
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(map(repr, METHODS))}, got {method!r}")
    own = {name: options.pop(name, default) for name, default in METHODS[method].items()}
    _check_options(own)
    plan = make_plan(model, how, skip, options, more=tuple(METHODS[method]))
    for name, layer in plan.chosen.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name}.weight: expected values, got a weight on the meta device")
    return _Calibration(model, _checked(batches), plan).run(how, method, own)


def _check_options(options: dict[str, Any]) -> None:
    if not isinstance(options.get("activation_order", False), bool):
        raise TypeError(f"activation_order: expected True or False, got {options['activation_order']!r}")
    for name, most in (("damping", math.inf), ("alpha", 1)):
        value = options.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0 <= value <= most or value == math.inf:
            raise ValueError(f"{name}: expected at least 0{' and at most 1' if most == 1 else ''}, got {value}")


def _checked(batches: Iterable) -> list[Tensor | Mapping[str, Any]]:
    if isinstance(batches, Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of tensors or dicts, got {type(batches).__name__}")
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping):
            raise TypeError(f"batches: expected tensors or dicts, got {type(batch).__name__}")
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    return batches


class _Calibration:
    """A model on its way, which can still go back."""

    def __init__(self, model: nn.Module, batches: list, plan: Plan):
        self.model, self.batches, self.plan = model, batches, plan
        self.names = {layer: name for name, layer in plan.chosen.items()}
        self.new: dict[nn.Module, QuantizedLinear] = {}
        self.lines: dict[nn.Module, QuantizedLayer] = {}
        self.before: list[tuple[Tensor, Tensor]] = []  # parameters that scales were folded into, and copies
        self.raised: dict[str, float] = {}  # damping, by layer

    def run(self, how: str, method: str, options: dict[str, Any]) -> Report:
        size = bytes_of(self.model)
        layers = {name: layer for name, layer in self.plan.chosen.items() if layer.weight.numel()}
        with torch.inference_mode(False), torch.no_grad():
            try:
                with running(self.model, self.batches, layers) as runs:
                    for unit in _progress(runs.units, f"{how} by {method}"):
                        if method == "gptq":
                            self._gptq(runs, unit, **options)
                        else:
                            self._scale(runs, unit, method, **options)
                missed = [layer for layer in self.names if layer not in self.new]
                for layer in missed:
                    weight = as_linear(layer).weight
                    self._put(layer, weight)
                    self._note(layer, weight)
            except BaseException:
                self._undo()
                raise
        for layer, new in self.new.items():
            new.train(layer.training)
        if missed:
            names = ", ".join(self.names[layer] for layer in missed)
            warnings.warn(f"calibrate: no batch reaches {names}; rounded to nearest", stacklevel=3)
        if self.raised:
            most = max(self.raised.values())
            warnings.warn(
                f"calibrate: singular Hessians of {', '.join(self.raised)}; damping raised, to {most:g} at most",
                stacklevel=3,
            )
        lines = tuple(self.lines[layer] for layer in self.names)
        return Report(f"{how} by {method}", lines, self.plan.skipped, size, bytes_of(self.model))

    def _gptq(self, runs: Runs, unit: Unit, damping: float, activation_order: bool) -> None:
        for group in unit.groups:
            hessian = Hessian(weight_of(group[0]).shape[1], group[0].weight.device)
            runs.read(unit, group[:1], lambda layer, x, hessian=hessian: hessian.add(x))
            self._check_finite(group[0], hessian.matrix)
            order = torch.arange(len(hessian.matrix), device=hessian.matrix.device)
            if activation_order:
                order = hessian.matrix.diagonal().argsort(descending=True, stable=True)
            factor, took = factor_of(hessian.matrix[order][:, order], damping)
            for layer in group:
                if took > damping:
                    self.raised[self.names[layer]] = took
                weight = as_linear(layer).weight
                new = self._put(layer, weight)
                quantize_with(new, weight, factor, order)
                self._note(layer, weight)

    def _scale(self, runs: Runs, unit: Unit, method: str, alpha: float = 0.0) -> None:
        """AWQ and SmoothQuant: scales of all of a unit's layers, before one of them is quantized."""
        weights = {
            x: weight_of(x).to(torch.promote_types(x.weight.dtype, torch.float32), copy=True)
            for group in unit.groups
            for x in group
        }
        results = runs.results(unit)
        found = {group[0]: (group, source_of(runs, unit, group, results)) for group in unit.groups}
        found = {leader: (group, source) for leader, (group, source) in found.items() if source is not None}
        totals = {x: weights[x].new_zeros(weights[x].shape[1]) for x in found}  # of magnitudes, or the largest
        hessians = {x: Hessian(weights[x].shape[1], x.weight.device) for x in found if method == "awq"}

        def see(layer, x):
            if method == "awq":
                hessians[layer].add(x)
                totals[layer] += x.abs().sum(0, dtype=totals[layer].dtype)
            else:
                totals[layer] = torch.maximum(totals[layer], x.abs().amax(0).to(totals[layer].dtype))

        runs.read(unit, list(found), see)
        for leader, (group, source) in found.items():
            self._check_finite(leader, totals[leader])
            own = [weights[layer] for layer in group]
            if method == "awq":
                magnitude = totals[leader] / hessians[leader].rows
                scale = awq_scale(own, hessians.pop(leader).matrix, magnitude, self._rounded)
            else:
                scale = smoothquant_scale(own, totals[leader], alpha)
            self._fold(source, scale, own, weights)
        for layer, weight in weights.items():
            self._put(layer, weight)
            self._note(layer, weight)

    def _fold(self, source: Source, scale: Tensor, own: list[Tensor], weights: dict[nn.Module, Tensor]) -> None:
        """Divides what makes inputs by scales, and multiplies the weights that read them."""
        module = source.module
        touched = [getattr(module, "bias", None), None if module in weights else module.weight]
        self.before += [(x, x.detach().clone()) for x in touched if x is not None]
        scale = source.divide(scale, weights[module] if module in weights else module.weight.detach())
        for weight in own:
            weight *= scale

    def _rounded(self, weight: Tensor) -> Tensor:
        return self.plan.cls.from_linear(linear_of(weight, None), **self.plan.options).dequantize(torch.float32)

    def _put(self, layer: nn.Module, weight: Tensor) -> QuantizedLinear:
        """Puts a layer of this weight (N, K), rounded to nearest, in the place of a dense one."""
        new = self.plan.cls.from_linear(linear_of(weight, layer.bias), **self.plan.options)
        if weight.dtype != layer.weight.dtype:
            new._set(new.weight, new.state._replace(dtype=layer.weight.dtype))
            new.compute_dtype = layer.weight.dtype
        self.plan.replace(layer, new)
        self.new[layer] = new
        return new

    def _note(self, layer: nn.Module, weight: Tensor) -> None:
        self.lines[layer] = measure(self.names[layer], weight, layer, self.new[layer])

    def _check_finite(self, layer: nn.Module, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(f"batches: expected finite inputs of {self.names[layer]}, got NaN or an infinity")

    def _undo(self) -> None:
        for layer in self.new:
            self.plan.replace(layer, layer)
        for x, before in reversed(self.before):
            x.detach().copy_(before)


def _progress(units: list[Unit], what: str) -> Iterable[Unit]:
    """The units, with a bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return units
    return tqdm(units, what, unit="unit", leave=False, delay=2)
