"""Low-rank adapters on the disk: files of our own and in PEFT's layout."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pynlp.nn.linear import is_conv1d
from pynlp.nn.lora import LoRALinear, shape_of
from pynlp.ops.common.checks import DTYPES
from pynlp.quantize.adapters import adapters_of, first_of, insert, is_linear, reason_to_skip, some_adapters_of

FILE, FACTS = "lora_adapters.safetensors", "pynlp_lora"
PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
LAYOUTS = ("pynlp", "peft")
# What a PEFT configuration may say without a change to the maths; whatever else it says is refused.
PEFT_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
PEFT_CHECKED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
PEFT_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip


class _Saved(NamedTuple):
    """An adapter in a file."""

    a: Tensor
    b: Tensor
    options: dict[str, Any]


def save_adapters(model: nn.Module, path: str | Path, *, layout: str = "pynlp") -> None:
    """Write a model's adapters, merged or not, to the disk; needs safetensors. A file is whole or absent.

    Args:
        path: A folder, for `lora_adapters.safetensors`, or a file whose name ends in .safetensors; folders are made.
        layout: "pynlp", or "peft": `adapter_model.safetensors` and `adapter_config.json` in a folder, which PEFT loads.

    Raises:
        ValueError, TypeError: an argument is off, there are no adapters, or they differ where PEFT has one value.
        OSError: it could not be written; each earlier file is as it was, or whole and new.

    Example:
        >>> import torch
        >>> from pynlp.quantize import add_adapters, load_adapters, save_adapters
        >>> model, other = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> adapters = add_adapters(model, rank=4)
        >>> save_adapters(model, "trained")
        >>> load_adapters(other, "trained")
        >>> other[0].rank
        4
    """
    from safetensors.torch import save

    adapters, path = some_adapters_of(model), Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    is_file = path.suffix == ".safetensors"
    if layout == "peft" and is_file:
        raise ValueError(f"path: expected a folder with layout='peft', got {path}")
    tensors = {
        f"{name}.lora_{key}": x.detach().cpu().contiguous()
        for name, layer in adapters.items()
        for key, x in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    if layout == "peft":
        tensors = {f"{PEFT_PREFIX}{name}.weight": x for name, x in tensors.items()}
        config = json.dumps(_peft_config(model, adapters), indent=2)
        contents = {path / PEFT_FILE: save(tensors, {"format": "pt"}), path / PEFT_CONFIG: config.encode()}
    else:
        facts = {
            name: dict(rank=layer.rank, alpha=layer.alpha, dropout=layer.dropout, rslora=layer.rslora)
            for name, layer in adapters.items()
        }
        contents = {path if is_file else path / FILE: save(tensors, {FACTS: json.dumps(facts)})}
    _write(contents)


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read adapters from the disk into a model, in place, which gets them as from `add_adapters` if it has none.

    Nothing is unpickled; needs safetensors. Adapters that are there keep their dtype and dropout.

    Args:
        path: What `save_adapters` wrote, a folder or a file, or a folder that PEFT wrote.

    Raises:
        ValueError, TypeError: the adapters are another model's, the message names the first layers that differ; or the
            file is damaged, or says what is not supported here. The model is unchanged.
        OSError: there is no such file.

    Example:
        >>> import torch
        >>> from pynlp.quantize import add_adapters, load_adapters, save_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> adapters = add_adapters(model, rank=4)
        >>> save_adapters(model, "trained", layout="peft")
        >>> load_adapters(model, "trained")
    """
    present, path = adapters_of(model), Path(path)
    saved = _read(path)
    layers: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    layers.pop("")
    misfits = [x for name in saved if (x := _misfit(model, name, layers.get(name), saved[name], bool(present)))]
    found = {layers.get(name) for name in saved}
    misfits += [f"{name}: an adapter that is not in the file" for name, x in present.items() if x not in found]
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(f"model: expected the one whose adapters are in {path}, got {'; '.join(misfits[:3])}{more}")
    if not present:
        insert(model, {layers[name]: dict(x.options, dtype=x.a.dtype) for name, x in saved.items()})
    with torch.no_grad():
        for name, x in saved.items():
            layer = model.get_submodule(name)
            layer.lora_A.copy_(x.a)
            layer.lora_B.copy_(x.b)
            layer.alpha, layer.rslora = x.options["alpha"], x.options["rslora"]


def _misfit(model: nn.Module, name: str, layer: nn.Module | None, saved: _Saved, has_adapters: bool) -> str | None:
    """What is wrong with an adapter of a file for the layer of its name."""
    if layer is None:
        return f"{name}: no such layer"
    if not isinstance(layer, LoRALinear):
        if has_adapters:
            return f"{name}: a layer without an adapter, where others have one"
        if not is_linear(layer):
            return f"{name}: {type(layer).__name__}, which is not a linear layer"
        if reason := reason_to_skip(model, layer, []):
            return f"{name}: {reason}"
    elif layer.merged:
        return f"{name}: a layer that is merged"
    rank = layer.rank if isinstance(layer, LoRALinear) else saved.a.shape[0]
    outputs, inputs = shape_of(layer.base if isinstance(layer, LoRALinear) else layer)
    for key, x, shape in (("lora_A", saved.a, (rank, inputs)), ("lora_B", saved.b, (outputs, rank))):
        if tuple(x.shape) != shape:
            return f"{name}.{key}: shape {shape}, not {tuple(x.shape)} as in the file"
    return None


def _read(path: Path) -> dict[str, _Saved]:
    """The adapters in a file or folder, by the names of their layers."""
    if path.is_dir():
        found = [path / name for name in (FILE, PEFT_CONFIG) if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"path: expected {FILE} or {PEFT_CONFIG}, got neither in {path}")
        if len(found) > 1:
            raise ValueError(f"path: expected {FILE} or {PEFT_CONFIG}, got both in {path}")
        path = found[0]
    try:
        if path.name == PEFT_CONFIG:
            options_of = _peft_options(_json(path.read_text(encoding="utf-8")))
            tensors, _ = _read_tensors(path.with_name(PEFT_FILE))
            # Of a layer that is tied, or may be, PEFT writes the base, too.
            tensors = {key: x for key, x in tensors.items() if ".base_layer." not in key}
            return _gather(tensors, PEFT_PREFIX, ".weight", options_of)
        tensors, metadata = _read_tensors(path)
        if FACTS not in metadata:
            raise ValueError("expected adapters that save_adapters wrote, got other tensors")
        facts = _json(metadata[FACTS])
        saved = _gather(tensors, "", "", facts.get)
        if saved.keys() != facts.keys():
            raise ValueError(f"expected tensors of {first_of(facts.keys() - saved.keys())}, got none")
        return saved
    except ValueError as error:
        raise ValueError(f"path: {path}: {error}") from error


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"path: expected {file}, got no such file")
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"expected a whole file of safetensors, got {error}") from error


def _gather(
    tensors: dict[str, Tensor], prefix: str, suffix: str, options_of: Callable[[str], dict[str, Any] | None]
) -> dict[str, _Saved]:
    """Tensors by the names of their layers, with their options, both checked against each other."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        match = re.fullmatch(rf"{re.escape(prefix)}(.+)\.lora_([AB]){re.escape(suffix)}", key)
        if not match or x.dim() != 2 or x.dtype not in DTYPES:
            expected = f"matrices {prefix}<layer>.lora_A{suffix} and lora_B{suffix} of floating point"
            raise ValueError(f"expected {expected}, got {key}, {x.dtype} {tuple(x.shape)}")
        pairs.setdefault(match[1], {})[match[2]] = x
    saved = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"expected lora_A and lora_B of {name}, got lora_{next(iter(pair))}")
        options, rank = options_of(name), pair["A"].shape[0]
        if not isinstance(options, dict) or options.keys() != {"rank", "alpha", "dropout", "rslora"}:
            raise ValueError(f"expected rank, alpha, dropout and rslora of {name}, got {options!r}")
        if options["rank"] != rank:
            raise ValueError(f"expected rank {options['rank']!r} of {name}, got {rank} rows of lora_A")
        try:
            LoRALinear(nn.Linear(1, 1, device="meta"), **options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        saved[name] = _Saved(pair["A"], pair["B"], options)
    if not saved:
        raise ValueError("expected adapters, got none")
    return saved


def _peft_options(config: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """A function from a layer's name to the options that a PEFT configuration gives it."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {config.get('peft_type')!r}")
    for name, value in config.items():
        allowed = PEFT_CHECKED.get(name)
        if allowed is not None and not any(value is x or (isinstance(x, str) and value == x) for x in allowed):
            raise ValueError(f"{name}: expected {', '.join(map(repr, allowed))}, got {value!r}")
        if allowed is None and value and name not in PEFT_READ | PEFT_IGNORED:
            raise ValueError(f"{name}: expected none, for it is not supported, got {value!r}")

    def matched(patterns: str, name: str, default: str, fallback: int) -> Any:
        """The value of the first pattern that fits a name or its end."""
        try:
            fitting = (x for key, x in (config.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name))
            return next(fitting, config.get(default, fallback))
        except (AttributeError, re.error) as error:
            raise ValueError(f"{patterns}: expected values by regular expressions, got {error}") from error

    return lambda name: dict(
        rank=matched("rank_pattern", name, "r", 8),
        alpha=matched("alpha_pattern", name, "lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
    )


def _peft_config(model: nn.Module, adapters: dict[str, LoRALinear]) -> dict[str, Any]:
    for option in ("dropout", "rslora"):
        values = {getattr(layer, option) for layer in adapters.values()}
        if len(values) > 1:
            raise ValueError(f"model: expected adapters of one {option} with layout='peft', got {sorted(values)}")
    layer = next(iter(adapters.values()))
    rank, alpha = (mode(getattr(x, option) for x in adapters.values()) for option in ("rank", "alpha"))
    exact = {name: f"^{re.escape(name)}" for name in adapters}  # ^: else it would fit longer names with this end, too
    return dict(
        peft_type="LORA",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        bias="none",
        fan_in_fan_out=any(is_conv1d(x.base) for x in adapters.values()),
        inference_mode=True,
        init_lora_weights=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=layer.dropout,
        use_rslora=layer.rslora,
        rank_pattern={exact[name]: x.rank for name, x in adapters.items() if x.rank != rank},
        alpha_pattern={exact[name]: x.alpha for name, x in adapters.items() if x.alpha != alpha},
        target_modules="|".join(map(re.escape, adapters)),  # a string: an expression, which has to fit a whole name
        task_type=None,
    )


def _json(text: str) -> dict[str, Any]:
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError(f"expected a JSON object, got {type(facts).__name__}")
    return facts


def _write(contents: dict[Path, bytes]) -> None:
    """Write files beside their places, and move them there when all are on the disk."""
    partial = {path: path.with_name(f"{path.name}.partial") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            partial[path].replace(path)
    except BaseException:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
