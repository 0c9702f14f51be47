"""All public functions, stateless, as in torch.nn.functional.

Example:
    >>> import torch
    >>> from pynlp import functional as F
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64)  # (batch, seqlen, heads, head_dim)
    >>> F.attention(q, k, v, causal=True, alibi_slopes=F.alibi_slopes(8)).shape
    torch.Size([2, 100, 8, 64])
"""

from pynlp.ops.attention.attention import attention, attention_varlen
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.attention.positions import alibi_slopes, relative_position_buckets, rotary_tables
from pynlp.ops.attention.weights import attention_weights
from pynlp.ops.layers.activation import gelu, relu, swiglu
from pynlp.ops.layers.linear import linear
from pynlp.ops.layers.loss import linear_cross_entropy
from pynlp.ops.layers.norm import layer_norm, rms_norm

__all__ = [
    "alibi_slopes",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relative_position_buckets",
    "relu",
    "rms_norm",
    "rotary_tables",
    "swiglu",
]
