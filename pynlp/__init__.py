"""Fused kernels for NLP models: one call, on a GPU through Triton, on a CPU through native SIMD code, anywhere in PyTorch."""

__version__ = "0.1.0"

from pynlp import functional

__all__ = ["functional"]
