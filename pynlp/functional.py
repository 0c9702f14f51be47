"""All public functions, stateless, as in torch.nn.functional."""

from pynlp.ops.activation import gelu, relu, swiglu
from pynlp.ops.attention import attention, attention_varlen
from pynlp.ops.attention_decode import attention_decode
from pynlp.ops.attention_weights import attention_weights
from pynlp.ops.linear import linear
from pynlp.ops.loss import linear_cross_entropy
from pynlp.ops.norm import layer_norm, rms_norm
from pynlp.ops.positions import alibi_slopes, rotary_tables

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
    "relu",
    "rms_norm",
    "rotary_tables",
    "swiglu",
]
