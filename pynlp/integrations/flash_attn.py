"""The functions of the package flash-attn 2.8 on our kernels: on GPUs and CPUs, in fp16, bf16 and fp32, with gradients.

`from pynlp.integrations.flash_attn import flash_attn_func` instead of `from flash_attn import flash_attn_func`, and
`apply_rotary_emb` instead of the one of `flash_attn.layers.rotary`, is the only change. Names, order and defaults of
the arguments are theirs, and so is what comes back; also where our own functions differ: -1 is no limit of a window,
and the lse of a query that sees no key is +inf.

More than there: any head_dim up to 256 and any page size; gradients of the lse and of `alibi_slopes`; softcap together
with dropout; every backward pass is deterministic. The lse is the documented one also for ALiBi with `causal`, where
theirs is shifted by a constant a row. Less: `NotImplementedError` names the argument. Stricter: arguments that there
lead to reads outside of a tensor, or to rows that nobody writes, are a ValueError, on a GPU a device-side assertion.

Source: https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py and layers/rotary.py; FlashAttention-2
(Dao, arXiv 2307.08691).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.ops.attention import checks
from pynlp.ops.attention.attention import attention, attention_varlen
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.common.checks import check, check_range
from pynlp.reference.attention.attention import compute, rotate

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
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _results(attention(q, k, v, **options), return_attn_probs)


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
    """`flash_attn_func` of queries, keys and values in one tensor `(batch, seqlen, 3, heads, head_dim)`."""
    q, k, v = _unpacked("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


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
    """`flash_attn_func` of keys and values in one tensor `(batch, seqlen_k, 2, kv_heads, head_dim)`."""
    k, v = _unpacked("kv", kv, 2, "(batch, seqlen_k, 2, kv_heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


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
    """`flash_attn_func` for sequences of unequal lengths, packed one after the other without padding.

    Args:
        q: Queries `(total_q, heads, head_dim)`.
        k, v: `(total_k, kv_heads, head_dim)`, or with a block table `(pages, page_size, kv_heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: int32 `(batch + 1,)`, where sequences start and end; the last is the total.
        max_seqlen_q, max_seqlen_k: The longest sequence, or more.
        block_table: int32 `(batch, pages)`, the pages of each sequence's keys in order. They are gathered: one copy of
            the keys and values, and on a GPU one wait for `cu_seqlens_k`.
        The others: as in `flash_attn_func`.

    Returns:
        `(total_q, heads, head_dim)`; the lse is `(heads, total_q)`.

    Raises:
        As `flash_attn_func`.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    if block_table is not None:
        k, v = _gather_pages(q, k, v, cu_seqlens_k, max_seqlen_k, block_table)
    results = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **options
    )
    return _results(results, return_attn_probs)


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
    """`flash_attn_varlen_func` of queries, keys and values in one tensor `(total, 3, heads, head_dim)`."""
    q, k, v = _unpacked("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


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
    """`flash_attn_varlen_func` of keys and values in one tensor `(total_k, 2, kv_heads, head_dim)`."""
    k, v = _unpacked("kv", kv, 2, "(total_k, 2, kv_heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over a cache of keys and values, to which theirs are added first, in place. No gradients.

    Args:
        q: Queries `(batch, seqlen_q, heads, head_dim)`.
        k_cache, v_cache: `(cache_batch, capacity, kv_heads, head_dim)`, or with a block table
            `(pages, page_size, kv_heads, head_dim)`.
        k, v: New keys and values `(batch, seqlen_new, kv_heads, head_dim)`, written from `cache_seqlens` on.
        rotary_cos, rotary_sin: `(positions, rotary_dim / 2)`, with `k` only. Turn k at the positions `cache_seqlens`,
            `cache_seqlens + 1`, ... and q at the same ones; without `causal` and window all of q at `cache_seqlens`.
        cache_seqlens: Keys that the cache holds without `k`: an int, int32 `(batch,)`, or None if it is full.
        cache_batch_idx: int32 `(batch,)`, which entry of the cache belongs to which of q; by default the first ones.
        cache_leftpad: int32 `(batch,)`, how many keys at an entry's start are no keys; `cache_seqlens` counts them.
            Every key is looked up by itself then, so it costs speed.
        block_table: int32 `(batch, pages)`, the pages of each entry in order.
        rotary_interleaved: Pairs are channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2). True by default here,
            unlike in `apply_rotary_emb`.
        num_splits: Into how many parts the keys of an entry are cut, to be worked on at once; 0 = chosen.
        return_softmax_lse: Also return the log-sum-exp of the scores, fp32 `(batch, heads, seqlen_q)`.
        The others: as in `flash_attn_func`.

    Returns:
        `(batch, seqlen_q, heads, head_dim)`, and the lse if it is asked for.

    Raises:
        NotImplementedError: block_table with cache_batch_idx or cache_leftpad; cache_leftpad of a cache whose entries
            do not lie one after the other.
        ValueError, TypeError: an argument's shape, dtype, device or range is off, before the cache is touched.
    """
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: expected the number of keys in the cache to go with k, got None")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos: expected rotary_sin with it, and the other way round, got one of them")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos: expected new keys with it, got k=None")
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if block_table is not None and x is not None:
            raise NotImplementedError(f"{name}: not served together with block_table")

    batch, seqlen_q = q.shape[:2]
    window = _window(window_size)
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    checks.check_integers("cache_seqlens", cache_seqlens, (batch,), q)

    rotary = None
    if rotary_cos is not None:
        in_a_row = causal or window != (None, None)  # the positions of the queries
        if cache_leftpad is None and k.shape[1] == seqlen_q and (in_a_row or seqlen_q == 1):
            rotary = (rotary_cos, rotary_sin)
        else:  # positions that attention_decode does not know: turned beforehand
            tables = checks.check_tables((rotary_cos, rotary_sin), q)
            start = cache_seqlens[:, None]  # (B, 1)
            places = torch.arange(max(seqlen_q, k.shape[1]), device=q.device)
            of_q = start + places[:seqlen_q] if in_a_row else start
            q = _turn(q, *_rows(tables, of_q), rotary_interleaved)
            k = _turn(k, *_rows(tables, start + places[: k.shape[1]]), rotary_interleaved)

    cache_lengths = cache_seqlens
    if cache_leftpad is not None:
        appended = 0 if k is None else k.shape[1]
        check_range("cache_seqlens", cache_seqlens, 0, k_cache.shape[1] - appended)
        block_table = _keys_as_pages(q, k_cache, cache_seqlens, cache_batch_idx, cache_leftpad)
        cache_lengths = cache_seqlens - cache_leftpad
        k_cache, v_cache = _one_key_a_page("k_cache", k_cache), _one_key_a_page("v_cache", v_cache)
    elif cache_batch_idx is not None:
        _check_batch_idx(q, k_cache, cache_batch_idx)
        block_table = cache_batch_idx[:, None]  # an entry is a page
    elif block_table is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]

    results = attention_decode(
        q, k_cache, v_cache, cache_lengths, k=k, v=v, block_table=block_table, num_splits=num_splits or None,
        causal=causal, window=window, softmax_scale=softmax_scale, alibi_slopes=alibi_slopes, rotary=rotary,
        rotary_interleaved=rotary_interleaved, softcap=max(softcap, 0.0), return_lse=return_softmax_lse,
    )  # fmt: skip
    if not return_softmax_lse:
        return results
    out, lse = results
    return out, _infinite_where_unseen(lse)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first rotary_dim channels turned by the angles of their positions.

    Args:
        x: `(batch, seqlen, heads, head_dim)`, or with `cu_seqlens` `(total, heads, head_dim)`.
        cos, sin: `(positions, rotary_dim / 2)` with rotary_dim <= head_dim, see `rotary_tables`; they get no gradients.
        interleaved: Pairs are channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        inplace: Write the result to x, which may be a leaf that requires a gradient. Use what is returned: gradients
            flow through that, and not through x.
        seqlen_offsets: Position of each sequence's first token: an int, or int32 `(batch,)`.
        cu_seqlens: int32 `(batch + 1,)`, where packed sequences start and end; the last is the total.
        max_seqlen: The longest packed sequence, or more. Not needed.

    Returns:
        x's shape and dtype, computed in fp32.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it. A position
            beyond the tables is one too; there, tokens at such positions stay as they are.

    Source: Su et al., arXiv 2104.09864.
    """
    layout = "(batch, seqlen, heads, head_dim)" if cu_seqlens is None else "(total, heads, head_dim)"
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"x: expected {layout.count(',') + 1} dimensions {layout}, got {tuple(x.shape)}")
    tables = checks.check_tables((cos.detach(), sin.detach()), x)
    if cu_seqlens is None:
        return _Rotary.apply(x, *_padded_rows(tables, x, seqlen_offsets), interleaved, inplace)
    cos, sin = _packed_rows(tables, x, seqlen_offsets, cu_seqlens, max_seqlen)
    return _Rotary.apply(x[None], cos, sin, interleaved, inplace)[0]


class _Rotary(torch.autograd.Function):
    """x (B, S, H, D) turned by the angles of each token (B or 1, S, rotary_dim / 2); keeps nothing but the angles."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, inplace):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        turned = _turn(x, cos, sin, interleaved)
        # Without mark_dirty, which would refuse leaves and views of them; flash-attn takes both.
        return x.copy_(turned) if inplace else turned

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(compute(x), cos, sin, interleaved).to(x.dtype)


def _padded_rows(tables: tuple[Tensor, Tensor], x: Tensor, offsets: int | Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each token of x (B, S, H, D): (B or 1, S, rotary_dim / 2)."""
    batch, seqlen = x.shape[:2]
    if isinstance(offsets, Tensor):
        checks.check_integers("seqlen_offsets", offsets, (batch,), x)
        return _rows(tables, offsets[:, None] + torch.arange(seqlen, device=x.device))
    cos, sin = tables
    if offsets < 0 or offsets + seqlen > cos.shape[0]:
        raise ValueError(
            f"seqlen_offsets: expected positions within cos, 0 to {cos.shape[0] - 1}, "
            f"got {offsets} to {offsets + seqlen - 1}"
        )
    return cos[None, offsets : offsets + seqlen], sin[None, offsets : offsets + seqlen]


def _packed_rows(
    tables: tuple[Tensor, Tensor], x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token of x (total, H, D): (1, total, rotary_dim / 2)."""
    cu_seqlens = checks.check_cu_seqlens("q", cu_seqlens, x.shape[0], max_seqlen, x)
    sequence, position = _sequence_and_place(cu_seqlens, x.shape[0])
    if isinstance(offsets, Tensor):
        checks.check_integers("seqlen_offsets", offsets, (cu_seqlens.shape[0] - 1,), x)
        offsets = offsets[sequence]
    return _rows(tables, (position + offsets)[None])


def _rows(tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    if positions.numel():
        first, last = torch.aminmax(positions)
        check(
            (first >= 0) & (last < cos.shape[0]),
            "rotary tables: expected positions within cos and sin",
            lambda: f"got {first.item()} to {last.item()} in tables of {cos.shape[0]}",
        )
    return cos[positions], sin[positions]


def _sequence_and_place(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each packed row: its sequence, and its place in that; both (total,)."""
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return sequence, row - cu_seqlens[sequence]


def _gather_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """(pages, page_size, G, D) -> (total_k, G, D)."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape (pages, page_size, kv_heads, head_dim), got {tuple(x.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected k's pages and page_size {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    batch, (pages, page_size) = cu_seqlens_k.shape[0] - 1, k.shape[:2]
    if block_table.dim() != 2:
        raise ValueError(f"block_table: expected shape ({batch}, pages), got {tuple(block_table.shape)}")
    checks.check_integers("block_table", block_table, (batch, block_table.shape[1]), q)
    total = int(cu_seqlens_k[-1])
    cu_seqlens_k = checks.check_cu_seqlens("k", cu_seqlens_k, total, max_seqlen_k, q)
    if total == 0:
        return k.flatten(0, 1)[:0], v.flatten(0, 1)[:0]
    sequence, place = _sequence_and_place(cu_seqlens_k, total)
    check(
        place.max() < block_table.shape[1] * page_size,
        "block_table: expected pages for the longest sequence of cu_seqlens_k",
        lambda: f"got {block_table.shape[1]} pages of {page_size} for {place.max().item() + 1} keys",
    )
    page = block_table[sequence, place // page_size]
    check_range("block_table", page, 0, pages - 1)
    return k[page, place % page_size], v[page, place % page_size]


def _keys_as_pages(
    q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None, cache_leftpad: Tensor
) -> Tensor:
    """The block table (B, capacity) of a cache in which every key is a page and an entry starts behind its padding."""
    batch, capacity = cache_seqlens.shape[0], k_cache.shape[1]
    checks.check_integers("cache_leftpad", cache_leftpad, (batch,), q)
    if batch:
        check(
            ((cache_leftpad >= 0) & (cache_leftpad <= cache_seqlens)).all(),
            "cache_leftpad: expected values of 0 to cache_seqlens",
            lambda: f"got {cache_leftpad.tolist()} and cache_seqlens {cache_seqlens.tolist()}",
        )
    if cache_batch_idx is None:
        entry = torch.arange(batch, device=q.device)
    else:
        _check_batch_idx(q, k_cache, cache_batch_idx)
        entry = cache_batch_idx.long()
    # The table's last columns point beyond the entry: a length never reaches them.
    return (entry * capacity + cache_leftpad)[:, None] + torch.arange(capacity, device=q.device)


def _check_batch_idx(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor) -> None:
    checks.check_integers("cache_batch_idx", cache_batch_idx, (q.shape[0],), q)
    check_range("cache_batch_idx", cache_batch_idx, 0, k_cache.shape[0] - 1)


def _one_key_a_page(name: str, cache: Tensor) -> Tensor:
    """(B, capacity, G, D) -> (B * capacity, 1, G, D), the same memory."""
    entries, capacity, *row = cache.shape
    if entries > 1 and cache.stride(0) != capacity * cache.stride(1):
        raise NotImplementedError(
            f"cache_leftpad: not served for a {name} whose entries do not lie one after the other, "
            f"of shape {tuple(cache.shape)} and strides {cache.stride()}"
        )
    return cache.view(entries * capacity, 1, *row)


def _unpacked(name: str, x: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    """Queries, keys and values of a packed tensor; in backward their gradients are stacked, not added up."""
    dimensions = layout.count(",") + 1
    if x.dim() != dimensions or x.shape[-3] != parts:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
    return x.unbind(-3)


def _window(window_size: Sequence[int]) -> tuple[int | None, int | None]:
    left, right = (None if side < 0 else int(side) for side in window_size)
    return left, right


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs) -> dict:
    """Their arguments under our names."""
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            "return_attn_probs: not served with dropout_p > 0: the weights, which flash-attn returns for tests of its "
            "dropout, are never in memory"
        )
    return dict(
        dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window=_window(window_size),
        softcap=max(softcap, 0.0), alibi_slopes=alibi_slopes, return_lse=return_attn_probs,
    )  # fmt: skip


def _results(results, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if not return_attn_probs:
        return results
    out, lse = results
    return out, _infinite_where_unseen(lse), out.new_empty(0)


def _infinite_where_unseen(lse: Tensor) -> Tensor:
    """flash-attn's lse of a query that sees no key is +inf, so that its own exp(score - lse) is 0."""
    return lse.masked_fill(lse == -math.inf, math.inf)
