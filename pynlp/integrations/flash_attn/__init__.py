"""The functions of the package flash-attn 2.8 on our kernels: on GPUs and CPUs, in fp16, bf16 and fp32, with gradients.

`from pynlp.integrations.flash_attn import flash_attn_func` instead of `from flash_attn import flash_attn_func`, and
`apply_rotary_emb` instead of the one of `flash_attn.layers.rotary`, is the only change. Names, order and defaults of
the arguments are theirs, and so is what comes back; also where our own functions differ: -1 is no limit of a window,
and the lse of a query that sees no key is +inf.

More than there: any head_dim up to 256 and any page size; gradients of the lse and of `alibi_slopes`; softcap together
with dropout; every backward pass is deterministic. The lse is the documented one also for ALiBi with `causal`, where
theirs is shifted by a constant a row. What is not served raises NotImplementedError, which names the argument.
Stricter: arguments that there lead to reads outside of a tensor, or to rows that nobody writes, are a ValueError, on a
GPU a device-side assertion.

Source: https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py and layers/rotary.py; FlashAttention-2
(Dao, arXiv 2307.08691).

Example:
    >>> import torch
    >>> from pynlp.integrations.flash_attn import flash_attn_func
    >>> q, k, v = torch.randn(3, 2, 128, 8, 64, dtype=torch.bfloat16)  # (batch, seqlen, heads, head_dim)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(64, 0)).shape
    torch.Size([2, 128, 8, 64])
"""

from pynlp.integrations.flash_attn.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from pynlp.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from pynlp.integrations.flash_attn.rotary import apply_rotary_emb
from pynlp.integrations.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
