"""Modules with parameters, as in torch.nn, and the caches that they decode with.

Example:
    >>> import torch
    >>> from pynlp import nn
    >>> block = torch.nn.Sequential(nn.RMSNorm(256), nn.MultiHeadAttention(256, heads=8, positions="rope", causal=True))
    >>> block(torch.randn(2, 10, 256)).shape
    torch.Size([2, 10, 256])
"""

from pynlp.nn.attention import MultiHeadAttention
from pynlp.nn.cache import KVCache, LayerCache, OutOfPages, PagedKVCache
from pynlp.nn.feed_forward import FeedForward
from pynlp.nn.hash_router import HashRouter
from pynlp.nn.integer_linear import Linear8bit, Linear8bitDynamic, LinearInt4
from pynlp.nn.latent_attention import LatentAttention
from pynlp.nn.linear import Linear
from pynlp.nn.lora import LoRALinear
from pynlp.nn.moe import MoE, router_loss, shard_experts_, update_router_biases
from pynlp.nn.norm import LayerNorm, RMSNorm
from pynlp.nn.quantized_linear import Linear4bit
from pynlp.nn.routers import ExpertChoiceRouter, RouterOutput, TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "FeedForward",
    "HashRouter",
    "KVCache",
    "LatentAttention",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "Linear4bit",
    "Linear8bit",
    "Linear8bitDynamic",
    "LinearInt4",
    "LoRALinear",
    "MoE",
    "MultiHeadAttention",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
    "RouterOutput",
    "TopKRouter",
    "router_loss",
    "shard_experts_",
    "update_router_biases",
]
