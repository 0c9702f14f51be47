"""Fused NLP kernels: one call, on a GPU through Triton, on a CPU through native SIMD code, anywhere in PyTorch."""

__version__ = "0.1.0"

from pynlp import functional, probes
from pynlp.backends import get_isa, has_bf16, info, load_native, set_isa

__all__ = ["functional", "get_isa", "has_bf16", "info", "probes", "set_isa"]

load_native()  # after the ops are defined
del load_native
