"""Modules with parameters, as in torch.nn, and the caches that they decode with."""

from pynlp.nn.attention import MultiHeadAttention
from pynlp.nn.cache import KVCache, LayerCache, OutOfPages, PagedKVCache

__all__ = ["KVCache", "LayerCache", "MultiHeadAttention", "OutOfPages", "PagedKVCache"]
