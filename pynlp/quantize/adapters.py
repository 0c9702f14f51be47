"""Low-rank adapters of whole models: added and removed."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from pynlp.nn.linear import is_conv1d
from pynlp.nn.lora import LoRALinear
from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize.model import HOOKS, check_names, names_of, reason_to_keep, tied_to


class Adapters(NamedTuple):
    """What `add_adapters` did; a summary when printed.

    Attributes:
        layers: Names of those that have adapters now.
        skipped: Why others that the target fits have none, by name.
        trained: Values that train: those of the adapters.
        total: Values of all parameters and quantized weights.

    Example:
        >>> import torch
        >>> from pynlp.quantize import add_adapters
        >>> print(add_adapters(torch.nn.Sequential(torch.nn.Linear(64, 64)), rank=2))
        1 layer with an adapter: 256 of 4416 values train (5.8 %)
    """

    layers: tuple[str, ...]
    skipped: dict[str, str]
    trained: int
    total: int

    def __str__(self) -> str:
        layers = "1 layer with an adapter" if len(self.layers) == 1 else f"{len(self.layers)} layers with adapters"
        lines = [f"{layers}: {self.trained} of {self.total} values train ({100 * self.trained / self.total:.1f} %)"]
        return "\n".join(lines + [f"{name}  left out: {reason}" for name, reason in self.skipped.items()])


def add_adapters(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target: Sequence[str] = ("*",),
    *,
    dtype: torch.dtype | None = None,
) -> Adapters:
    """Give linear layers of a model, in place, low-rank adapters, and freeze all else.

    Linear layers are those that `quantize_` takes, dense or quantized.

    A layer is left out, and the result says why, where it has a forward or hooks of its own; and, unless a pattern
    other than "*" fits it, where its weight is shared (a head tied to the embedding), or where the module around it
    reads its weight, which then is computed anew at every call and has no dropout. A merge ends the sharing.

    Args:
        rank, alpha, dropout, dtype: As `pynlp.nn.LoRALinear`'s.
        target: Names of layers, or patterns of them: `"*.q_proj"`, `"lm_head"`.

    Returns:
        The layers, and how many values train.

    Raises:
        ValueError, TypeError: an argument is off, a pattern fits no layer, no layer is left, or there are adapters
            already; the message names it, and the model is unchanged.

    Source: Hu et al., arXiv 2106.09685; over quantized weights: Dettmers et al., arXiv 2305.14314.

    Example:
        >>> import torch
        >>> from pynlp.quantize import add_adapters, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        >>> report = quantize_(model, "nf4")
        >>> add_adapters(model, rank=4, target=["2"]).layers
        ('2',)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['2.lora_A', '2.lora_B']
    """
    present = adapters_of(model)
    if present:
        raise ValueError(f"model: expected one without adapters, got some in {first_of(present)}")
    check_names("target", target)
    chosen, skipped = _choose(model, target)
    if not chosen:
        hint = "; a layer by itself: pynlp.nn.LoRALinear" if is_linear(model) else ""
        raise ValueError(f"model: expected linear layers that target fits inside of it, got {skipped or 'none'}{hint}")
    insert(model, dict.fromkeys(chosen.values(), dict(rank=rank, alpha=alpha, dropout=dropout, dtype=dtype)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dense = sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
    quantized = sum(x.out_features * x.in_features for x in model.modules() if isinstance(x, QuantizedLinear))
    return Adapters(tuple(chosen), skipped, trained, dense + quantized)


def remove_adapters(model: nn.Module, merge: bool = False) -> dict[str, float]:
    """Give a model its linear layers back, in place; what trained before trains again.

    Args:
        merge: Put the adapters into the weights, which quantized layers quantize again; else the layers are as they
            were before.

    Returns:
        With merge what it cost each layer, by name, as `pynlp.nn.LoRALinear.merge` says; else nothing.

    Raises:
        ValueError, TypeError: there are no adapters, or a merged weight would not be finite; the message names it, and
            the model is unchanged.

    Example:
        >>> import torch
        >>> from pynlp.quantize import add_adapters, remove_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128))
        >>> adapters = add_adapters(model)
        >>> remove_adapters(model, merge=True)
        {'0': 0.0}
        >>> model
        Sequential(
          (0): Linear(in_features=64, out_features=128, bias=True)
        )
    """
    adapters, errors = some_adapters_of(model), {}
    unmerged = [layer for layer in adapters.values() if not layer.merged]
    for name, layer in adapters.items():
        if not merge:
            layer.unmerge()
            continue
        try:
            errors[name] = layer.merge()
        except ValueError as error:
            for x in unmerged:
                x.unmerge()
            raise ValueError(f"{name}: {error}") from error
    _replace(model, {layer: layer.unload() for layer in adapters.values()})
    trained = model.__dict__.pop("_trained_without_adapters", ())
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in trained:
            p.requires_grad = True
    return errors


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    if not isinstance(model, nn.Module) or isinstance(model, LoRALinear):
        raise TypeError(f"model: expected an nn.Module with linear layers inside of it, got {type(model).__name__}")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def some_adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("model: expected layers with adapters inside of it, got none")
    return adapters


def _choose(model: nn.Module, target: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that get adapters by name, and why others do not."""
    names = names_of(model, is_linear, "target", target)
    chosen, skipped, named = {}, {}, set()
    for module, all_names in names.items():
        fitting = {pattern for pattern in target for x in all_names if fnmatchcase(x, pattern)}
        if not fitting:
            continue
        if fitting != {"*"}:
            named.add(all_names[0])
        if reason := reason_to_skip(model, module, [] if all_names[0] in named else all_names):
            skipped[all_names[0]] = reason
        else:
            chosen[all_names[0]] = module
    for name, owner in tied_to(model, chosen).items():
        if name not in named:
            del chosen[name]
            skipped[name] = f"tied to {owner}"
    return chosen, skipped


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear | nn.Linear) or is_conv1d(module)


def reason_to_skip(model: nn.Module, layer: nn.Module, names: list[str]) -> str | None:
    """Why a linear layer cannot have an adapter; with its names also whether the modules around it read its weight."""
    if isinstance(layer, QuantizedLinear):
        return "it has hooks" if any(getattr(layer, hooks, None) for hooks in HOOKS) else None
    if "weight" not in layer._parameters:
        return "its weight is not a parameter"
    return reason_to_keep(model, layer, names)


def insert(model: nn.Module, layers: dict[nn.Module, dict[str, Any]]) -> None:
    """Put adapters, of these options, into the places of layers, and freeze all else."""
    trained = tuple(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    adapters = {layer: LoRALinear(layer, **options) for layer, options in layers.items()}
    _replace(model, adapters)
    train = {x for adapter in adapters.values() for x in (adapter.lora_A, adapter.lora_B)}
    for p in model.parameters():
        p.requires_grad = p in train
    model._trained_without_adapters = trained


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child, layer in parent._modules.items():
            if layer in new:
                parent._modules[child] = new[layer]


def first_of(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
