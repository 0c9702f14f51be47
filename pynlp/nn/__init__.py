"""Modules with parameters, as in torch.nn, and the caches that they decode with."""

from pynlp.nn.attention import MultiHeadAttention
from pynlp.nn.cache import KVCache, LayerCache, OutOfPages, PagedKVCache
from pynlp.nn.latent_attention import LatentAttention

__all__ = ["KVCache", "LatentAttention", "LayerCache", "MultiHeadAttention", "OutOfPages", "PagedKVCache"]
