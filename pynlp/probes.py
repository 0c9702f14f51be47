"""This machine's own peaks, measured, to give a kernel's speed as a share of them.

Each takes the best of many short runs over `seconds`, on `threads` threads (by default torch's), with the instruction
sets in use (`pynlp.set_isa`). Other load on the machine lowers the result. All raise RuntimeError without the native
extension, and ValueError for counts below 1.
"""

import torch

from pynlp import backends


def peak_fma(threads: int | None = None, *, seconds: float = 0.2) -> float:
    """fp32 FLOP/s of fused multiply-adds (multiply and add where the ISA has no FMA), operands in registers."""
    return _measure("peak_fma", threads, seconds)


def peak_bf16_dot(threads: int | None = None, *, seconds: float = 0.2) -> float:
    """bf16 FLOP/s of dot products of pairs (vdpbf16ps); 0.0 if the ISA in use lacks them."""
    return _measure("peak_bf16_dot", threads, seconds)


def peak_int8_dot(threads: int | None = None, *, seconds: float = 0.2) -> float:
    """int8 operations/s of dot products of four (vpdpbusd, or vpmaddubsw and vpmaddwd); 0.0 below AVX2."""
    return _measure("peak_int8_dot", threads, seconds)


def peak_bf16_tile(threads: int | None = None, *, seconds: float = 0.2) -> float:
    """bf16 FLOP/s of AMX's products of tiles (tdpbf16ps); 0.0 if the ISA lacks them."""
    return _measure("peak_bf16_tile", threads, seconds)


def peak_int8_tile(threads: int | None = None, *, seconds: float = 0.2) -> float:
    """int8 operations/s of AMX's products of tiles (tdpbusd); 0.0 if the ISA lacks them."""
    return _measure("peak_int8_tile", threads, seconds)


def read_bandwidth(threads: int | None = None, *, seconds: float = 0.3, size: int = 2**28) -> float:
    """Bytes/s of reading a buffer of `size` bytes, in huge pages where the system gives them."""
    return _measure("read_bandwidth", threads, seconds, size)


def copy_bandwidth(threads: int | None = None, *, seconds: float = 0.3, size: int = 2**28) -> float:
    """Bytes/s, read and written together, of copying a buffer of `size` bytes with streaming stores."""
    return _measure("copy_bandwidth", threads, seconds, size)


def _measure(name: str, threads: int | None, seconds: float, *size: int) -> float:
    threads = torch.get_num_threads() if threads is None else threads
    for argument, value in (("threads", threads), *(("size", s) for s in size)):
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    return getattr(backends.native(), name)(threads, seconds, *size)
