"""Launch choices: the first tile that fits the chip or, on request, the fastest.

With PYNLP_AUTOTUNE=1 tiles are measured, and what was found is kept on disk and used from then on. The file is
tiles.json in $PYNLP_CACHE_DIR, by default ~/.cache/pynlp; deleting it forgets everything.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from ..attention.configs import Config

LARGEST_BLOCK = 128
_fitting: dict[tuple, Config] = {}
_tuned: dict[str, Config] = {}


def choose(kernel: str, candidates: list[Config], work: tuple, start: Callable) -> Config:
    """The first candidate that neither spills nor needs more memory than the chip has, the last one if all do.

    `start(config)` launches and may be repeated, `start(config, compile_only=True)` gives the compiled kernel. `work`
    is all that the machine code depends on, and then the two sequence lengths, which count for measurements only, by
    their power of two.
    """
    *shape, seqlen_q, seqlen_k = work
    fitting = candidates[0] if len(candidates) == 1 else _first_that_fits((kernel, *shape), candidates, start)
    if os.environ.get("PYNLP_AUTOTUNE", "0") in ("", "0"):
        return fitting
    key = f"{_device()} | {kernel} | {shape} | {seqlen_q.bit_length()} | {seqlen_k.bit_length()}"
    if key not in _tuned:
        kept = _read(cache_file()).get(key)
        _tuned[key] = Config(*kept) if kept else _descend(fitting, start, square=kernel == "table")
        if not kept:  # the file is read again: another process may have added to it
            _write(cache_file(), _read(cache_file()) | {key: _tuned[key]})
    return _tuned[key]


def _first_that_fits(key: tuple, candidates: list[Config], start: Callable) -> Config:
    key = (*key, *candidates)
    if key not in _fitting:
        fit = (c for c in candidates[:-1] if fits(start(c, compile_only=True)))
        _fitting[key] = next(fit, candidates[-1])
    return _fitting[key]


def fits(compiled: CompiledKernel) -> bool:
    try:
        _ = compiled.run  # loads it
    except OutOfResources:
        return False
    return compiled.n_spills == 0  # None: it could not be loaded the first time either


def cache_file() -> Path:
    folder = os.environ.get("PYNLP_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pynlp"
    return Path(folder).expanduser() / "tiles.json"


@functools.cache
def _device() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{name}, Triton {triton.__version__}"


def _descend(config: Config, start: Callable, square: bool) -> Config:
    """One change at a time, as long as one helps."""
    times = {config: _time(functools.partial(start, config))}
    while True:
        for candidate in _neighbours(config, square):
            if candidate not in times:
                try:
                    times[candidate] = _time(functools.partial(start, candidate))
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
