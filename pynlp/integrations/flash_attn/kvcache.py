"""flash-attn's attention over a cache of keys and values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.integrations.flash_attn.arguments import infinite_where_unseen, window_of
from pynlp.integrations.flash_attn.rotary import angles_at, turn
from pynlp.integrations.names import in_own_names
from pynlp.ops.attention import checks
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.common.checks import check, check_dtype, check_range


@in_own_names(
    cache_lengths="cache_seqlens", window="window_size", rotary="rotary_cos", rotary_tables="rotary_cos",
    rotary_cos="rotary_cos", rotary_sin="rotary_sin", cos="rotary_cos", sin="rotary_sin",
    rotary_offset="cache_seqlens",
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

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 3, 128, 2, 64)  # 3 entries with room for 128 tokens
        >>> q, k, v = torch.randn(3, 1, 8, 64), torch.randn(3, 1, 2, 64), torch.randn(3, 1, 2, 64)
        >>> lengths = torch.tensor([10, 0, 57], dtype=torch.int32)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True).shape
        torch.Size([3, 1, 8, 64])
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
    window = window_of(window_size)
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
            _check_new_rows(q, k)
            tables = checks.prepare_tables((rotary_cos, rotary_sin), q)
            start = cache_seqlens[:, None]  # (B, 1)
            places = torch.arange(max(seqlen_q, k.shape[1]), device=q.device)
            of_q = start + places[:seqlen_q] if in_a_row else start
            q = turn(q, *angles_at(tables, of_q), rotary_interleaved)
            k = turn(k, *angles_at(tables, start + places[: k.shape[1]]), rotary_interleaved)

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
    return out, infinite_where_unseen(lse)


def _check_new_rows(q: Tensor, k: Tensor) -> None:
    """Check what is turned before `attention_decode` sees it."""
    layout = "(batch, seqlen, heads, head_dim)"
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions {layout}, got {tuple(x.shape)}")
    check_dtype("q", q)
    checks.check_like_q("k", k, q)
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"k: expected shape ({q.shape[0]}, seqlen_new, kv_heads, {q.shape[3]}), got {tuple(k.shape)}")


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
