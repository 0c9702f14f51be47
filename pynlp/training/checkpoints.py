"""Checkpoints: folders that are whole or absent, whatever happens while one is written.

step-00001000/
    model.safetensors       weights
    ema.safetensors         their moving average, if there is one
    optimizer.safetensors   its state
    state.json              all else
"""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
PARTIAL = ".partial"  # at the end of a folder's name: not finished, or about to be deleted


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def all_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of checkpoints; a damaged one is left out with a warning.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pynlp.training import latest
        >>> from pynlp.training.checkpoints import save  # which Trainer calls
        >>> model, folder = torch.nn.Linear(2, 2), Path("results")
        >>> for step in (100, 200):
        ...     state = {"progress": {"best_step": 100}}
        ...     path = save(folder, step, state, model, torch.optim.AdamW(model.parameters()))

        >>> latest(folder).name
        'step-00000200'
    """
    for path in reversed(all_checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path}: left out, for it is damaged: {damage}", stacklevel=2)
    return None


def best(folder: Path) -> Path | None:
    """The checkpoint with the best score so far; None where nothing was validated yet.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pynlp.training import best
        >>> from pynlp.training.checkpoints import save  # which Trainer calls
        >>> model, folder = torch.nn.Linear(2, 2), Path("results")
        >>> for step in (100, 200):
        ...     state = {"progress": {"best_step": 100}}
        ...     path = save(folder, step, state, model, torch.optim.AdamW(model.parameters()))

        >>> best(folder).name
        'step-00000100'
    """
    path = latest(folder)
    step = None if path is None else read_state(path)["progress"]["best_step"]
    return None if step is None else path_of(folder, step)


def load_weights(path: Path, model: nn.Module) -> None:
    """Give a model the weights of a checkpoint: their moving average if it has one.

    Raises:
        ValueError: they are another model's; the message names what differs.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pynlp.training import latest, load_weights
        >>> from pynlp.training.checkpoints import save  # which Trainer calls
        >>> model, folder = torch.nn.Linear(2, 2), Path("results")
        >>> for step in (100, 200):
        ...     state = {"progress": {"best_step": 100}}
        ...     path = save(folder, step, state, model, torch.optim.AdamW(model.parameters()))

        >>> load_weights(latest(folder), model)
    """
    _load_module(path / (EMA if (path / EMA).exists() else MODEL), model)


def average_weights(paths: Sequence[Path], model: nn.Module) -> None:
    """Give a model the mean of the weights of several checkpoints; integer buffers are the last one's.

    Source: Vaswani et al., arXiv 1706.03762, section 6.1.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pynlp.training import average_weights
        >>> from pynlp.training.checkpoints import save  # which Trainer calls
        >>> model, folder = torch.nn.Linear(2, 2), Path("results")
        >>> for step in (100, 200):
        ...     state = {"progress": {"best_step": 100}}
        ...     path = save(folder, step, state, model, torch.optim.AdamW(model.parameters()))

        >>> average_weights(sorted(folder.glob("step-*"))[-2:], model)
    """
    if not paths:
        raise ValueError("paths: expected at least one checkpoint, got none")
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        _load_module(path / MODEL, model)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
    means = {name: total / len(paths) for name, total in sums.items()}
    model.load_state_dict({**model.state_dict(), **means})


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None = None,
) -> Path:
    """Write a checkpoint beside the others, and clear away what a killed process left half done.

    Raises:
        OSError: it could not be written; the earlier ones are as they were.
    """
    path = path_of(folder, step)
    if path.exists() and _damage(path) is None:
        return path  # a step has but one state
    for remains in folder.glob("*" + PARTIAL):
        shutil.rmtree(remains)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.mkdir(parents=True)
        save_model(model, str(partial / MODEL))
        save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER)
        if ema is not None:
            save_model(ema, str(partial / EMA))
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        (partial / STATE).write_text(json.dumps({"files": sizes, **state}))
        for written in (*partial.iterdir(), partial):
            _flush(written)
        if path.exists():
            _delete(path)
        partial.rename(path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        message = f"{path} could not be written, earlier checkpoints are intact: {error}"
        raise (OSError(error.errno, message) if isinstance(error, OSError) else OSError(message)) from error
    return path


def keep_only(folder: Path, step: int, last: int, best_step: int | None) -> None:
    """Delete all checkpoints up to a step but the last few and the best."""
    paths = [path for path in all_checkpoints(folder) if path <= path_of(folder, step)]
    for path in paths[:-last]:
        if best_step is None or path != path_of(folder, best_step):
            _delete(path)


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None) -> None:
    """Put model, optimizer and moving average back into the state of a checkpoint.

    Raises:
        ValueError: it is of another model; the message names what differs.
    """
    _load_module(path / MODEL, model)
    if ema is not None:
        _load_module(path / EMA, ema)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / OPTIMIZER).items():
        number, name = name.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, state in states.items() for name, tensor in state.items()}


def _load_module(path: Path, module: nn.Module) -> None:
    try:
        load_model(module, path)
    except RuntimeError as error:  # torch's message lists all names and shapes that do not fit
        raise ValueError(f"model: expected the one whose weights are in {path}, got another: {error}") from error


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint in words; None if it is whole."""
    try:
        sizes = read_state(path)["files"]
        for name, size in sizes.items():
            there = (path / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes instead of {size}"
    except (OSError, ValueError, KeyError) as error:
        return repr(error)
    return None


def _delete(path: Path) -> None:
    """Delete a checkpoint, renamed first, so that a folder with a checkpoint's name is always whole."""
    doomed = path.with_name(f"{path.name}.deleted{PARTIAL}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Write a file or folder to the disk, so that it is whole even after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
