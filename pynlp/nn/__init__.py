"""Modules with parameters, as in torch.nn, and the caches that they decode with."""

from pynlp.nn.attention import MultiHeadAttention
from pynlp.nn.cache import KVCache, LayerCache, OutOfPages, PagedKVCache
from pynlp.nn.feed_forward import FeedForward
from pynlp.nn.latent_attention import LatentAttention
from pynlp.nn.linear import Linear
from pynlp.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "FeedForward",
    "KVCache",
    "LatentAttention",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
]
