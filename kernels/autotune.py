"""Launch choices by measurement, on request: PYNLP_AUTOTUNE=1. What was found is kept on disk and used from then on.

The file is tiles.json in $PYNLP_CACHE_DIR, by default ~/.cache/pynlp; deleting it forgets everything.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .attention_configs import Config

LARGEST_BLOCK = 128


def choose(kernel: str, default: Config, work: tuple, launch: Callable[[Config], object]) -> Config:
    """The default or, if tuning was asked for, the fastest configuration found for this kernel, work and device.

    `work` ends with the sequence lengths, which count by their power of two. A launch must be repeatable.
    """
    if os.environ.get("PYNLP_AUTOTUNE", "0") in ("", "0"):
        return default
    *shape, seqlen_q, seqlen_k = work
    key = f"{_device()} | {kernel} | {shape} | {seqlen_q.bit_length()} | {seqlen_k.bit_length()}"
    known = _read(cache_file())
    if key not in known:
        best = _descend(default, launch, square=kernel.endswith("square"))
        known = _read(cache_file())  # another process may have added to it
        known[key] = best
        _write(cache_file(), known)
    return Config(*known[key])


def cache_file() -> Path:
    folder = os.environ.get("PYNLP_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pynlp"
    return Path(folder).expanduser() / "tiles.json"


@functools.cache
def _device() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{name}, Triton {triton.__version__}"


def _descend(config: Config, launch: Callable[[Config], object], square: bool) -> Config:
    """One change at a time, as long as one helps."""
    times = {config: _time(lambda: launch(config))}
    while True:
        for candidate in _neighbours(config, square):
            if candidate not in times:
                try:
                    times[candidate] = _time(functools.partial(launch, candidate))
                except OutOfResources:
                    times[candidate] = float("inf")
        best = min(times, key=times.get)
        if best == config:
            return config
        config = best


def _neighbours(config: Config, square: bool) -> Iterator[Config]:
    def block(size: int) -> int:
        return max(16, min(size, LARGEST_BLOCK))

    for factor in (0.5, 2):
        m, n = block(int(config.block_m * factor)), block(int(config.block_n * factor))
        shapes = [(m, n)] if square else [(m, config.block_n), (config.block_m, n)]
        for block_m, block_n in shapes:
            masked = min(config.masked, block_m, block_n)
            yield config._replace(block_m=block_m, block_n=block_n, masked=masked)
    yield config._replace(num_warps=12 - config.num_warps)  # 4 or 8
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 4:
            yield config._replace(num_stages=stages)


def _time(run: Callable[[], object]) -> float:
    """Milliseconds."""
    return triton.testing.do_bench(run, return_mode="median")


def _read(path: Path) -> dict[str, list]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, known: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(known, file, indent=1)
    os.replace(file.name, path)
