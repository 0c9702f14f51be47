"""flash-attn's functions for sequences of unequal lengths, one after the other or with their keys in pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.integrations.flash_attn.arguments import (
    may_have_padding,
    options_of,
    results_of,
    sequence_and_place,
    unpacked,
)
from pynlp.integrations.names import in_own_names
from pynlp.ops.attention import checks
from pynlp.ops.attention.attention import attention_varlen
from pynlp.ops.common.checks import check, check_range, check_tensor


@in_own_names(window="window_size")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` for sequences of unequal lengths, packed one after the other.

    Rows behind the last sequence are padding: they give 0, and their gradients are 0.

    Args:
        q: Queries `(total_q, heads, head_dim)`.
        k, v: `(total_k, kv_heads, head_dim)`, or with a block table `(pages, page_size, kv_heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: int32 `(batch + 1,)`, where sequences start and end; the last is the total or less.
        max_seqlen_q, max_seqlen_k: The longest sequence, or more.
        block_table: int32 `(batch, pages)`, the pages of each sequence's keys in order. They are gathered: one copy of
            the keys and values, and on a GPU one wait for `cu_seqlens_k`.
        The others: as in `flash_attn_func`.

    Returns:
        `(total_q, heads, head_dim)`; the lse is `(heads, total_q)`.

    Raises:
        As `flash_attn_func`.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_varlen_func
        >>> cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)  # 5 tokens of one sequence, then 7 of another
        >>> q, k, v = torch.randn(3, 12, 8, 64)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, causal=True).shape
        torch.Size([12, 8, 64])
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    if block_table is not None:
        k, v = _gather_pages(q, k, v, cu_seqlens_k, max_seqlen_k, block_table)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if may_have_padding(cu_seqlens_q, q.shape[0]) or may_have_padding(cu_seqlens_k, k.shape[0]):
        lengths, options["alibi_slopes"] = _padding_as_sequences(q, k, *lengths, alibi_slopes)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    results = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **options
    )
    return results_of(results, return_attn_probs)


def _padding_as_sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    alibi_slopes: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, None, None], Tensor | None]:  # fmt: skip
    """Lengths and slopes with two sequences more: the padding's queries without keys, and its keys without queries.

    They cost no work, and what the others give stays the same to the bit, dropout too, which counts by a sequence's
    number. The longest sequence is looked at here, as padding may be longer.
    """
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q, q, padded=True)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k, q, padded=True)
    checks.check_as_many_sequences(cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    end_q, end_k = cu_seqlens_q.new_full((2,), q.shape[0]), cu_seqlens_k.new_full((1,), k.shape[0])
    cu_seqlens = torch.cat((cu_seqlens_q, end_q)), torch.cat((cu_seqlens_k, cu_seqlens_k[-1:], end_k))
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        check_tensor("alibi_slopes", alibi_slopes, q, [(q.shape[1],), (batch, q.shape[1])])
        alibi_slopes = torch.cat((alibi_slopes, alibi_slopes.new_zeros(2, q.shape[1])))
    return (*cu_seqlens, None, None), alibi_slopes


@in_own_names(
    q="qkv", k="qkv", v="qkv", cu_seqlens_q="cu_seqlens", cu_seqlens_k="cu_seqlens", max_seqlen_q="max_seqlen",
    max_seqlen_k="max_seqlen",
)  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor `(total, 3, heads, head_dim)`.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_varlen_qkvpacked_func
        >>> cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)  # 5 tokens of one sequence, then 7 of another
        >>> qkv = torch.randn(12, 3, 8, 64)
        >>> flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 7, causal=True).shape
        torch.Size([12, 8, 64])
    """
    q, k, v = unpacked("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@in_own_names(k="kv", v="kv")
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of keys and values in one tensor `(total_k, 2, kv_heads, head_dim)`.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_varlen_kvpacked_func
        >>> cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)  # 5 tokens of one sequence, then 7 of another
        >>> q, kv = torch.randn(12, 8, 64), torch.randn(12, 2, 4, 64)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 7, 7).shape
        torch.Size([12, 8, 64])
    """
    k, v = unpacked("kv", kv, 2, "(total_k, 2, kv_heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _gather_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """(pages, page_size, G, D) -> (total_k, G, D)."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape (pages, page_size, kv_heads, head_dim), got {tuple(x.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected k's pages and page_size {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    checks.check_starts("cu_seqlens_k", cu_seqlens_k, q)
    batch, (pages, page_size) = cu_seqlens_k.shape[0] - 1, k.shape[:2]
    if block_table.dim() != 2:
        raise ValueError(f"block_table: expected shape ({batch}, pages), got {tuple(block_table.shape)}")
    checks.check_integers("block_table", block_table, (batch, block_table.shape[1]), q)
    total = int(cu_seqlens_k[-1])
    cu_seqlens_k = checks.prepare_cu_seqlens("k", cu_seqlens_k, total, max_seqlen_k, q)
    if total == 0:
        return k.flatten(0, 1)[:0], v.flatten(0, 1)[:0]
    sequence, place = sequence_and_place(cu_seqlens_k, total)
    check(
        place.max() < block_table.shape[1] * page_size,
        "block_table: expected pages for the longest sequence of cu_seqlens_k",
        lambda: f"got {block_table.shape[1]} pages of {page_size} for {place.max().item() + 1} keys",
    )
    page = block_table[sequence, place // page_size]
    check_range("block_table", page, 0, pages - 1)
    return k[page, place % page_size], v[page, place % page_size]
