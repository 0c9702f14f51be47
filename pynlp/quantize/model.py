"""Walks a model and replaces its linear layers by quantized ones."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pynlp.nn.integer_linear import Linear8bit, Linear8bitDynamic, LinearInt4
from pynlp.nn.linear import Linear, is_conv1d
from pynlp.nn.quantized_linear import Linear4bit, QuantizedLinear, relative_error
from pynlp.ops.common.checks import DTYPES
from pynlp.quantize.report import QuantizedLayer, Report

# How each is made: the layer, and what it is told.
QUANTIZATIONS = {
    "int8": (Linear8bit, {}),
    "int8_dynamic": (Linear8bitDynamic, {}),
    "int4": (LinearInt4, {}),
    "nf4": (Linear4bit, {"quant_type": "nf4"}),
    "fp4": (Linear4bit, {"quant_type": "fp4"}),
    "mxfp4": (Linear4bit, {"quant_type": "mxfp4"}),
}
INTEGERS = ("scheme", "granularity", "group_size")
OPTIONS = {
    Linear8bit: INTEGERS,
    Linear8bitDynamic: (*INTEGERS, "outlier_threshold"),
    LinearInt4: (*INTEGERS, "activations"),
    Linear4bit: ("blocksize", "double_quant"),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def quantize_(model: nn.Module, how: str, *, skip: Sequence[str] = (), **options) -> Report:
    """Replace the linear layers of a model, in place, by quantized ones, round to nearest.

    Linear layers are nn.Linear, `pynlp.nn.Linear` and the Conv1D of transformers' GPT-2, whose weight is turned.

    A layer stays dense, and the report says why, where its weight is shared with a part that is not quantized (a head
    tied to the embedding), where it has a forward or hooks of its own, and where the module around it reads its weight,
    as nn.TransformerEncoderLayer, T5's feed-forward and Mamba do. Weights of other modules, experts among them, stay as
    they are.

    A quantized model is loaded by making the model, quantizing it the same way, and `load_state_dict`.

    Args:
        how: "int8", "int8_dynamic" (inputs are rounded, too), "int4", "nf4", "fp4" or "mxfp4".
        skip: Names of layers that stay dense, or patterns of them: `"lm_head"`, `"*.mlp.*"`.
        options: More about the quantization: `scheme`, `granularity` and `group_size` of
            `pynlp.functional.quantize_int8` and `quantize_int4`, `blocksize` and `double_quant` of `quantize_4bit`,
            `outlier_threshold` of "int8_dynamic", `activations` of "int4".

    Returns:
        What each layer lost and saved.

    Raises:
        ValueError, TypeError: an argument is off, a pattern in skip fits no layer, there is no layer to quantize, or a
            weight has a value that is not finite; the message names it, and the model is unchanged.

    Example:
        >>> import torch
        >>> from pynlp.quantize import quantize_
        >>> model = torch.nn.TransformerDecoderLayer(64, 4, 128)
        >>> report = quantize_(model, "nf4", double_quant=True)
        >>> [layer.name for layer in report.layers]
        ['linear1', 'linear2']
        >>> report.skipped["self_attn.out_proj"]
        'MultiheadAttention reads its weight'
    """
    plan = make_plan(model, how, skip, options)
    with torch.inference_mode(False), torch.no_grad():
        before, layers = bytes_of(model), []
        for name, layer in plan.chosen.items():
            dense = as_linear(layer)
            new = plan.cls.from_linear(dense, **plan.options)
            layers.append(measure(name, dense.weight, layer, new))
            plan.replace(layer, new)
    return Report(how, tuple(layers), plan.skipped, before, bytes_of(model))


class Plan(NamedTuple):
    """What a quantization of a model does.

    Attributes:
        cls: The layer that takes the place of a dense one, by `cls.from_linear(dense, **options)`.
        options: How it quantizes.
        chosen: The layers to quantize, by name.
        skipped: Why others are not, by name.
        places: The parent of a layer and its name there, as often as it is in the model.
    """

    cls: type[QuantizedLinear]
    options: dict[str, Any]
    chosen: dict[str, nn.Module]
    skipped: dict[str, str]
    places: dict[nn.Module, list[tuple[nn.Module, str]]]

    def replace(self, layer: nn.Module, new: nn.Module) -> None:
        for parent, child in self.places[layer]:
            parent._modules[child] = new


def make_plan(model: nn.Module, how: str, skip: Sequence[str], options: dict, more: Sequence[str] = ()) -> Plan:
    """The plan of a quantization, with all of its arguments checked; `more` are options beside those of the layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if how not in QUANTIZATIONS:
        raise ValueError(f"how: expected {', '.join(map(repr, QUANTIZATIONS))}, got {how!r}")
    check_names("skip", skip)
    cls, fixed = QUANTIZATIONS[how]
    for name in options:
        if name not in OPTIONS[cls]:
            raise TypeError(f"options: expected {', '.join((*OPTIONS[cls], *more))} with how={how!r}, got {name}")
    chosen, skipped = choose(model, skip)
    if not chosen:
        hint = "; a layer by itself: from_linear of pynlp.nn's quantized layers" if isinstance(model, nn.Linear) else ""
        raise ValueError(f"model: expected linear layers to quantize inside of it, got {skipped or 'none'}{hint}")
    with torch.inference_mode(False), torch.no_grad():
        cls(16, 1, **fixed, **options)  # refuses options before anything is changed
        for name, layer in chosen.items():
            if not layer.weight.is_meta and not layer.weight.float().isfinite().all():
                raise ValueError(f"{name}.weight: expected finite values in fp32, got NaN or an infinity")
    places = {}
    for parent in model.modules():
        for child, layer in parent._modules.items():
            places.setdefault(layer, []).append((parent, child))
    return Plan(cls, fixed | options, chosen, skipped, places)


def check_names(argument: str, names: Sequence[str]) -> None:
    """Refuse what is no sequence of names or patterns."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(x, str) for x in names):
        raise TypeError(f"{argument}: expected a sequence of names, got {names!r}")


def names_of(
    model: nn.Module, is_wanted: Callable[[nn.Module], bool], argument: str, patterns: Sequence[str]
) -> dict[nn.Module, list[str]]:
    """All names of each layer that is wanted, of which each pattern fits one."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_wanted(module):
            names.setdefault(module, []).append(name)
    lost = [pattern for pattern in patterns if not any(fnmatchcase(x, pattern) for all in names.values() for x in all)]
    if lost:
        got = ", ".join(map(repr, lost))
        raise ValueError(f"{argument}: expected names of linear layers, got {got}, which fit none")
    return names


def choose(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to quantize by name, and why others are not."""
    names = names_of(model, lambda x: isinstance(x, nn.Linear) or is_conv1d(x), "skip", skip)
    chosen, skipped = {}, {}
    for module, all_names in names.items():
        reason = "in skip" if any(fnmatchcase(x, pattern) for x in all_names for pattern in skip) else None
        reason = reason or reason_to_keep(model, module, all_names)
        if reason:
            skipped[all_names[0]] = reason
        else:
            chosen[all_names[0]] = module
    for name, owner in tied_to(model, chosen).items():
        del chosen[name]
        skipped[name] = f"tied to {owner}"
    return chosen, skipped


def reason_to_keep(model: nn.Module, layer: nn.Module, names: list[str]) -> str | None:
    """Why a linear layer cannot be replaced."""
    kind = type(layer)
    is_known = is_conv1d(layer) or isinstance(layer, Linear) or kind.forward is nn.Linear.forward
    if not is_known or "forward" in vars(layer):
        return f"{kind.__name__}: it has a forward of its own"
    if nn.parameter.is_lazy(layer.weight):
        return "its weight is not there yet"
    if any(getattr(layer, hooks, None) for hooks in HOOKS):
        return "it has hooks"
    if layer.weight.dtype not in DTYPES:
        return f"its weight is {layer.weight.dtype}"
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        if child in _read_weights(type(parent)):
            return f"{type(parent).__name__} reads its weight"
    return None


@functools.cache
def _read_weights(cls: type) -> set[str]:
    """Names of layers whose weight a class of modules reads itself, as far as its source tells.

    What initialises weights does so before they are quantized.
    """
    found = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, function in vars(base).items():
            if inspect.isfunction(function) and not re.search("init|reset", name):
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):  # typed into an interpreter
                    continue
                found.update(re.findall(r"self\.(\w+)\.weight\b", source))
    return found


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.nbytes for x in {*model.parameters(), *model.buffers()} if not nn.parameter.is_lazy(x))


def tied_to(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, str]:
    """The chosen layers whose weight is another module's, too, and its name."""
    tied = {}
    for name, layer in chosen.items():
        for other, module in model.named_modules():
            if module not in chosen.values() and any(x is layer.weight for x in module._parameters.values()):
                tied[name] = f"{other}" if other else "the model's own parameter"
    return tied


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer as an nn.Linear: itself, or one of the turned weight and the same bias."""
    if not is_conv1d(layer):
        return layer
    return linear_of(layer.weight.detach().t().contiguous(), layer.bias).train(layer.training)


def linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A dense layer of a weight (N, K), which does not train, and a bias."""
    dense = nn.Linear(1, 1, device="meta")
    dense.out_features, dense.in_features = weight.shape
    dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), bias
    return dense


def measure(name: str, weight: Tensor, layer: nn.Module, new: QuantizedLinear) -> QuantizedLayer:
    """The report's line of a layer whose weight (N, K) was quantized."""
    error = float("nan")
    if not weight.is_meta:
        error = relative_error(new.dequantize(torch.float32), weight.float())
    sqnr = -20 * torch.tensor(error).log10().item()
    after = sum(x.nbytes for x in new.buffers())
    return QuantizedLayer(name, tuple(weight.shape), error, sqnr, layer.weight.nbytes, after)
