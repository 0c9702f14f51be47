"""Walks a model and replaces its linear layers by quantized ones."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pynlp.nn.linear import Linear
from pynlp.nn.quantized_linear import Linear4bit, Linear8bit, QuantizedLinear
from pynlp.quantize.report import QuantizedLayer, Report

# How each is made: the layer, and what it is told.
QUANTIZATIONS = {
    "int8": (Linear8bit, {}),
    "nf4": (Linear4bit, {"quant_type": "nf4"}),
    "fp4": (Linear4bit, {"quant_type": "fp4"}),
    "mxfp4": (Linear4bit, {"quant_type": "mxfp4"}),
}


def quantize_(model: nn.Module, how: str, *, skip: Sequence[str] = (), **options) -> Report:
    """Replace the linear layers of a model, in place, by quantized ones, round to nearest.

    Linear layers are nn.Linear, `pynlp.nn.Linear` and the Conv1D of transformers' GPT-2, whose weight is turned.
    A layer stays dense where its weight is shared with a part that is not quantized (a head tied to the embedding),
    where it has a forward of its own, and where another module reads its weight (nn.MultiheadAttention).

    Args:
        how: "int8", "nf4", "fp4" or "mxfp4".
        skip: Names of layers that stay dense, or patterns of them: `"lm_head"`, `"*.mlp.*"`.
        options: More about the quantization: `scheme`, `granularity` and `group_size` of
            `pynlp.functional.quantize_int8`, `blocksize` and `double_quant` of `pynlp.functional.quantize_4bit`.

    Returns:
        What each layer lost and saved.

    Raises:
        ValueError, TypeError: an argument is off, a pattern in skip fits no layer, there is no layer to quantize, or a
            weight has a value that is not finite; the message names it, and the model is unchanged.

    Example:
        >>> import torch
        >>> from pynlp.quantize import quantize_
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 128)
        >>> report = quantize_(model, "nf4", double_quant=True)
        >>> [layer.name for layer in report.layers]
        ['linear1', 'linear2']
        >>> report.skipped
        {'self_attn.out_proj': 'nn.MultiheadAttention reads its weight'}
    """
    if how not in QUANTIZATIONS:
        raise ValueError(f"how: expected {', '.join(map(repr, QUANTIZATIONS))}, got {how!r}")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a sequence of names, got {skip!r}")
    chosen, skipped = _choose(model, skip)
    if not chosen:
        raise ValueError(f"model: expected linear layers to quantize inside of it, got {skipped or 'none'}")
    cls, fixed = QUANTIZATIONS[how]
    cls(16, 1, **fixed, **options)  # refuses options before anything is changed
    for name, layer in chosen.items():
        if not layer.weight.is_meta and not layer.weight.isfinite().all():
            raise ValueError(f"{name}.weight: expected finite values, got NaN or an infinity")
    places = {}
    for parent in model.modules():
        for child, layer in parent._modules.items():
            places.setdefault(layer, []).append((parent, child))
    layers = []
    for name, layer in chosen.items():
        new, line = _quantized(name, layer, cls, fixed | options)
        layers.append(line)
        for parent, child in places[layer]:
            parent._modules[child] = new
    return Report(how, tuple(layers), skipped)


def _choose(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to quantize by name, and why others are not."""
    chosen, skipped, fitting = {}, {}, set()
    for name, module in model.named_modules():
        if not name or isinstance(module, QuantizedLinear) or not (isinstance(module, nn.Linear) or _is_conv(module)):
            continue
        patterns = [pattern for pattern in skip if fnmatchcase(name, pattern)]
        fitting.update(patterns)
        if patterns:
            skipped[name] = "in skip"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            skipped[name] = "nn.MultiheadAttention reads its weight"
        elif not (_is_conv(module) or isinstance(module, Linear) or type(module).forward is nn.Linear.forward):
            skipped[name] = f"a {type(module).__name__}, which has a forward of its own"
        elif not module.weight.is_floating_point():
            skipped[name] = f"its weight is {module.weight.dtype} already"
        else:
            chosen[name] = module
    lost = [pattern for pattern in skip if pattern not in fitting]
    if lost:
        raise ValueError(f"skip: expected names of linear layers, got {', '.join(map(repr, lost))}, which fit none")
    for name, owner in _tied(model, chosen).items():
        del chosen[name]
        skipped[name] = f"tied to {owner}"
    return chosen, skipped


def _is_conv(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers' GPT-2, of a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def _tied(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, str]:
    """The chosen layers whose weight is another module's, too, and its name."""
    tied = {}
    for name, layer in chosen.items():
        for other, module in model.named_modules():
            if module is not layer and any(x is layer.weight for x in module._parameters.values()):
                tied[name] = f"{other}" if other else "the model's own parameter"
    return tied


def _quantized(name: str, layer: nn.Module, cls: type, options: dict) -> tuple[QuantizedLinear, QuantizedLayer]:
    weight = layer.weight.detach()
    dense = layer
    if _is_conv(layer):
        weight = weight.t()
        dense = nn.Linear(*weight.t().shape, device="meta")
        dense.weight, dense.bias = nn.Parameter(weight.contiguous(), requires_grad=False), layer.bias
        dense.train(layer.training)
    new = cls.from_linear(dense, **options)
    error = float("nan")
    if not weight.is_meta:
        error = _relative_error(new.dequantize(torch.float32), weight)
    sqnr = -20 * torch.tensor(error).log10().item()
    after = sum(x.nbytes for x in new.buffers())
    return new, QuantizedLayer(name, tuple(weight.shape), error, sqnr, weight.nbytes, after)


def _relative_error(x: Tensor, exact: Tensor) -> float:
    size = torch.linalg.vector_norm(exact.float())
    return 0.0 if size == 0 else (torch.linalg.vector_norm(x - exact.float()) / size).item()
