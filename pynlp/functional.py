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
from pynlp.ops.moe.dispatch import moe_dispatch
from pynlp.ops.moe.grouped import grouped_mm
from pynlp.ops.moe.mlp import moe_mlp
from pynlp.ops.quantization.formats import QuantState4bit, dequantize_4bit, quantize_4bit
from pynlp.ops.quantization.int4 import QuantStateInt4, dequantize_int4, int4_linear, quantize_int4
from pynlp.ops.quantization.int8 import (
    QuantStateInt8,
    dequantize_int8,
    int8_dynamic_linear,
    int8_linear,
    quantize_int8,
)
from pynlp.ops.quantization.linear import linear_4bit

__all__ = [
    "QuantState4bit",
    "QuantStateInt4",
    "QuantStateInt8",
    "alibi_slopes",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "dequantize_4bit",
    "dequantize_int4",
    "dequantize_int8",
    "gelu",
    "grouped_mm",
    "int4_linear",
    "int8_dynamic_linear",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_4bit",
    "linear_cross_entropy",
    "moe_dispatch",
    "moe_mlp",
    "quantize_4bit",
    "quantize_int4",
    "quantize_int8",
    "relative_position_buckets",
    "relu",
    "rms_norm",
    "rotary_tables",
    "swiglu",
]
