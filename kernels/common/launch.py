"""Launches: the chip a tensor lies on, the first tile that fits it or, on request, the fastest, and the start.

With PYNLP_AUTOTUNE=1 tiles are measured, and what was found is kept on disk and used from then on. The file is
tiles.json in $PYNLP_CACHE_DIR, by default ~/.cache/pynlp; deleting it forgets everything.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from . import replay

Config = TypeVar("Config", bound=tuple)  # a family's NamedTuple: how a kernel is cut and launched
_fitting: dict[tuple, tuple] = {}
_tuned: dict[str, tuple] = {}
chip_of_cpu = "interpreter"  # CPU tensors run in Triton's interpreter, or over a stand-in for the driver


class Launch(NamedTuple):
    """A launch that a pretence compiled instead of starting it."""

    kernel: str
    arguments: dict[str, object]  # by name, Triton's own options (num_warps, ...) included
    compiled: CompiledKernel


@dataclass
class Pretence:
    """A chip that launchers believe in, and what they did meanwhile."""

    chip: str
    fits: Callable[[CompiledKernel], bool]
    launches: list[Launch] = field(default_factory=list)
    rejected: list[tuple[tuple, CompiledKernel]] = field(default_factory=list)  # candidates that did not fit
    fitting: dict[tuple, tuple] = field(default_factory=dict)


_pretence: Pretence | None = None


@contextmanager
def pretend(chip: str, fits: Callable[[CompiledKernel], bool]) -> Iterator[Pretence]:
    """Lets tensors of any device lie on `chip`, compiles kernels for Triton's active driver, and starts none.

    `fits` says whether the chip can run a compiled kernel. Choices are forgotten at the end, and none is measured.
    """
    global _pretence
    previous, _pretence = _pretence, Pretence(chip, fits)
    try:
        yield _pretence
    finally:
        _pretence = previous


def chip_of(x: Tensor) -> str:
    """The chip family that x lies on."""
    if _pretence is not None:
        return _pretence.chip
    if x.device.type != "cuda":
        return chip_of_cpu
    return "gfx942" if torch.version.hip else _nvidia_chip(x.device)


@functools.cache
def _nvidia_chip(device: torch.device) -> str:
    major = torch.cuda.get_device_capability(device)[0]
    # Consumer Blackwell (12) has neither wgmma nor tcgen05 and as little shared memory as Ada.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def launch(kernel, grid: tuple[int, ...], *arguments, compile_only: bool = False, **options) -> CompiledKernel | None:
    """Starts a kernel; with `compile_only`, or for a pretended chip, only compiles it and returns the result.

    `options` are constants by name and Triton's own: num_warps, num_stages, maxnreg.
    """
    if compile_only or _pretence is not None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if not compile_only:
            replay.give_up()
            names = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            _pretence.launches.append(Launch(kernel.__name__, names, compiled))
        return compiled
    compiled = kernel[grid](*arguments, **options)
    tape = replay.tape()
    if tape is not None:
        tape.launched(kernel, compiled, grid, arguments, options)


def choose(
    kernel: str, device: torch.device, candidates: list[Config], key: tuple, sizes: tuple[int, ...], start: Callable,
    neighbours: Callable[[Config], Iterable[Config]],
) -> Config:  # fmt: skip
    """The first candidate that neither spills nor needs more memory than the chip has, the last one if all do.

    `start(config)` launches and may be repeated, `start(config, compile_only=True)` gives the compiled kernel. `key`
    is all that the machine code depends on. `sizes` matter only where tiles are measured, and only by their power of
    two. Measuring starts at the tile that fits and moves to the fastest of its `neighbours` while one is faster.
    """
    fitting = candidates[0] if len(candidates) == 1 else _first_that_fits((kernel, *key), candidates, start)
    if _pretence is not None or os.environ.get("PYNLP_AUTOTUNE", "0") in ("", "0"):
        return fitting
    tuned = " | ".join([_name(device), kernel, str(list(key)), *(str(size.bit_length()) for size in sizes)])
    if tuned not in _tuned:
        kept = _read(cache_file()).get(tuned)
        _tuned[tuned] = type(fitting)(*kept) if kept else _descend(fitting, start, neighbours)
        if not kept:  # the file is read again: another process may have added to it
            _write(cache_file(), _read(cache_file()) | {tuned: _tuned[tuned]})
    return _tuned[tuned]


def _first_that_fits(key: tuple, candidates: list[Config], start: Callable) -> Config:
    known = _fitting if _pretence is None else _pretence.fitting
    key = (*key, *candidates)
    if key not in known:
        fit = (config for config in candidates[:-1] if _fits(config, start(config, compile_only=True)))
        known[key] = next(fit, candidates[-1])
    return known[key]


def _fits(config: Config, compiled: CompiledKernel) -> bool:
    if _pretence is None:
        return fits(compiled)
    if _pretence.fits(compiled):
        return True
    _pretence.rejected.append((config, compiled))
    return False


def fits(compiled: CompiledKernel) -> bool:
    """Whether the current device runs a kernel, and without spills."""
    try:
        _ = compiled.run  # loads it
    except OutOfResources:
        return False
    return compiled.n_spills == 0  # None: it could not be loaded the first time either


def cache_file() -> Path:
    folder = os.environ.get("PYNLP_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pynlp"
    return Path(folder).expanduser() / "tiles.json"


@functools.cache
def _name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, Triton {triton.__version__}"


def _descend(config: Config, start: Callable, neighbours: Callable[[Config], Iterable[Config]]) -> Config:
    """The config that no neighbour is faster than, by one change at a time."""
    replay.give_up()  # what is measured would be repeated
    times = {config: _time(functools.partial(start, config))}
    while True:
        for candidate in neighbours(config):
            if candidate not in times:
                try:
                    times[candidate] = _time(functools.partial(start, candidate))
                except OutOfResources:
                    times[candidate] = float("inf")
        best = min(times, key=times.get)
        if best == config:
            return config
        config = best


def _time(run: Callable[[], object]) -> float:
    """The milliseconds that a run takes."""
    return triton.testing.do_bench(run, return_mode="median")


def _read(path: Path) -> dict[str, list]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, known: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(known, file, indent=1)
    os.replace(file.name, path)
