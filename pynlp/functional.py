"""All public functions, stateless, as in torch.nn.functional."""

from pynlp.ops.attention import attention
from pynlp.ops.positions import alibi_slopes, rotary_tables

__all__ = ["alibi_slopes", "attention", "rotary_tables"]
