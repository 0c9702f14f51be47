"""Modules with parameters, as in torch.nn."""

from pynlp.nn.attention import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
