"""flash-attn's functions for batches: queries, keys and values apart or packed in one tensor."""

from collections.abc import Sequence

from torch import Tensor

from pynlp.integrations.flash_attn.arguments import options_of, results_of, unpacked
from pynlp.integrations.names import in_own_names
from pynlp.ops.attention.attention import attention


@in_own_names(window="window_size")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T * scale) v, as `pynlp.functional.attention`.

    Args:
        q: Queries `(batch, seqlen_q, heads, head_dim)`.
        k, v: `(batch, seqlen_k, kv_heads, head_dim)`; consecutive query heads share a key/value head.
        dropout_p: Share of the weights that is dropped; which ones, torch's generator decides.
        softmax_scale: `head_dim ** -0.5` by default.
        causal: A query sees no later key; the last query stands at the last key.
        window_size: `(left, right)`, the keys seen on each side of a query's own, both ends included; -1 = no limit.
        softcap: c > 0 turns a score s into `c * tanh(s / c)`.
        alibi_slopes: fp32 `(heads,)` or `(batch, heads)`; adds `-slope * |distance|`.
        deterministic: Taken and ignored: the backward pass always is.
        return_attn_probs: Also return the lse, and an empty tensor in the place of the weights, as there without
            dropout.

    Returns:
        `(batch, seqlen_q, heads, head_dim)`; with return_attn_probs a tuple of it, the log-sum-exp of the scores, fp32
        `(batch, heads, seqlen_q)`, and the empty tensor.

    Raises:
        NotImplementedError: return_attn_probs with dropout.
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_func
        >>> q, k, v = torch.randn(3, 2, 100, 8, 64)  # (batch, seqlen, heads, head_dim)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 100, 8, 64])
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return results_of(attention(q, k, v, **options), return_attn_probs)


@in_own_names(q="qkv", k="qkv", v="qkv")
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of queries, keys and values in one tensor `(batch, seqlen, 3, heads, head_dim)`.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_qkvpacked_func
        >>> qkv = torch.randn(2, 100, 3, 8, 64)
        >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
        torch.Size([2, 100, 8, 64])
    """
    q, k, v = unpacked("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@in_own_names(k="kv", v="kv")
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of keys and values in one tensor `(batch, seqlen_k, 2, kv_heads, head_dim)`.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_kvpacked_func
        >>> q, kv = torch.randn(2, 100, 8, 64), torch.randn(2, 100, 2, 4, 64)
        >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
        torch.Size([2, 100, 8, 64])
    """
    k, v = unpacked("kv", kv, 2, "(batch, seqlen_k, 2, kv_heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
