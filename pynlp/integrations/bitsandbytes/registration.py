"""Registration of the kernels with bitsandbytes, and how it is undone."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from pynlp import backends
from pynlp.integrations.bitsandbytes import kernels

VARIABLE = "PYNLP_BITSANDBYTES"

# The schemas that the kernels were written for. torch has no public way to compare schemas, to ask for a kernel or to
# take one out: `_schema`, `parse_schema`, `_dispatch_has_kernel_for_dispatch_key` and `_destroy` are private names.
KERNELS = {
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)": (
        kernels.quantize_4bit
    ),
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) "
    "-> Tensor": kernels.dequantize_4bit,
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor! out) -> ()": kernels.dequantize_4bit_out,
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor": kernels.gemm_4bit,
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor": (
        kernels.gemv_4bit
    ),
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()": (
        kernels.gemv_4bit_out
    ),
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor": kernels.int8_scaled_mm,
}

_undo: list[Callable] = []  # the last first; empty where bitsandbytes is as it was


def register() -> None:
    """Let bitsandbytes compute on pynlp's kernels on CPUs from now on; a second call does nothing.

    Its ops quantize_4bit, dequantize_4bit, gemm_4bit and gemv_4bit run on them, and int8_scaled_mm where the CPU has no
    AVX-512, without which bitsandbytes multiplies in fp32. Two of its names are replaced, for want of another way:
    `bitsandbytes.matmul_4bit`, so that the gradient is fused, too, and `bitsandbytes.nn.modules.has_avx512bf16`, so
    that layers made from now on do not pack their weights anew for bitsandbytes' own kernel.

    Where bitsandbytes' schemas or names are not those that this was written for, all stays as it was, with a warning
    that names the first difference. With PYNLP_BITSANDBYTES=0 in the environment nothing is done.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: PYNLP_BITSANDBYTES is neither 0 nor 1.

    Example:
        >>> import torch
        >>> from pynlp.integrations.bitsandbytes import register
        >>> register()
        >>> from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        >>> packed, state = quantize_4bit(torch.randn(7, 33), quant_type="nf4")
        >>> dequantize_4bit(packed, state).shape
        torch.Size([7, 33])
    """
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"environment variable {VARIABLE}: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return
    import bitsandbytes  # whose import may call this function

    if _undo:
        return
    reason = _difference(bitsandbytes)
    if reason is not None:
        backends.warn_once(f"bitsandbytes keeps its own CPU kernels instead of pynlp's: {reason}")
        return
    _undo.append(_in_dispatcher())
    _undo.append(_replace(bitsandbytes, "matmul_4bit", kernels.matmul_4bit(bitsandbytes.matmul_4bit)))
    _undo.append(_replace(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False))


def unregister() -> None:
    """Let bitsandbytes compute on its own kernels again, in all layers that are made from now on.

    Example:
        >>> from pynlp.integrations.bitsandbytes import register, unregister
        >>> register()
        >>> unregister()
    """
    while _undo:
        _undo.pop()()


def _difference(bitsandbytes: ModuleType) -> str | None:
    """The first difference to the bitsandbytes that this was written for; None without one."""
    for schema in KERNELS:
        name, _, overload = schema[: schema.index("(")].partition(".")
        op = getattr(getattr(torch.ops.bitsandbytes, name, None), overload or "default", None)
        if op is None:
            return f"expected an op {name}, got none"
        if op._schema != torch._C.parse_schema(f"bitsandbytes::{schema}"):
            return f"expected an op {schema}, got {op._schema}"
    names, own = ["A", "B", "quant_state", "out", "bias"], getattr(bitsandbytes, "matmul_4bit", None)
    if own is None or list(inspect.signature(own).parameters) != names:
        got = "no such name" if own is None else inspect.signature(own)
        return f"expected matmul_4bit({', '.join(names)}), got {got}"
    if not hasattr(getattr(bitsandbytes.nn, "modules", None), "has_avx512bf16"):
        return "expected bitsandbytes.nn.modules.has_avx512bf16, got no such name"
    return None


def _in_dispatcher() -> Callable:
    """Put the kernels in the dispatcher; the result takes them out of it."""
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # an override, which is meant
        for schema, kernel in KERNELS.items():
            name = schema[: schema.index("(")]
            if kernel is kernels.int8_scaled_mm and _has_cpu_kernel("int8_linear_matmul"):  # one of integers
                continue
            if kernel is kernels.gemv_4bit and _has_cpu_kernel(name):
                theirs = torch.library.get_kernel(f"bitsandbytes::{name}", "CPU").call_boxed
                library.impl(name, kernels.gemv_4bit_beside(theirs), "CPU", with_keyset=True)
            else:
                library.impl(name, kernel, "CPU")
    return library._destroy


def _has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", "CPU")


def _replace(module: ModuleType, name: str, new: Callable) -> Callable:
    """Give a module's name a new value; the result gives it the old one."""
    undo = functools.partial(setattr, module, name, getattr(module, name))
    setattr(module, name, new)
    return undo
