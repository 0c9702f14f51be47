"""Fused NLP kernels: one call, on a GPU through Triton, on a CPU through native SIMD code, anywhere in PyTorch."""

from pynlp import functional, probes
from pynlp.backends import get_isa, has_bf16, set_isa
from pynlp.info import info
from pynlp.ops.common.library import load_native_kernels
from pynlp.version import __version__

__all__ = ["__version__", "functional", "get_isa", "has_bf16", "info", "probes", "set_isa"]

load_native_kernels()  # after the ops are declared
del load_native_kernels
