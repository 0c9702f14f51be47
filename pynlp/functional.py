"""All public functions, stateless, as in torch.nn.functional."""

from pynlp.ops.attention import attention, attention_varlen
from pynlp.ops.attention_decode import attention_decode
from pynlp.ops.attention_weights import attention_weights
from pynlp.ops.positions import alibi_slopes, rotary_tables

__all__ = ["alibi_slopes", "attention", "attention_decode", "attention_varlen", "attention_weights", "rotary_tables"]
