"""Attention over a cache of keys and values in plain PyTorch: default back end, and the oracle of the tests.

Shapes: B batch, S new tokens, H query heads, G key/value heads, D and Dv head dimensions of keys and values. A cache is
(B, capacity, G, D), or (pages, page_size, G, D) with a block table (B, pages of an entry) that says which pages hold
the keys of an entry, in order.
"""

import math

import torch
from torch import Tensor

from pynlp.reference.attention.attention import (
    Options,
    expand_heads,
    log_sum_exp,
    masked_scores,
    rotate,
    visible_exp,
    weighted_sum,
)
from pynlp.reference.common.dtypes import compute


def attention_append(
    k: Tensor,  # (B, S, G, D)
    v: Tensor,  # (B, S, G, Dv)
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,  # (B,) int32: keys in the cache already
    block_table: Tensor | None,
    rotary_cos: Tensor | None,  # (positions, R / 2)
    rotary_sin: Tensor | None,
    rotary_offset: int,
    rotary_interleaved: bool,
) -> None:
    """Write k, turned by the angles of their positions, and v behind the cached keys and values."""
    entry = torch.arange(k.shape[0], device=k.device)[:, None]
    place = cache_lengths.long()[:, None] + torch.arange(k.shape[1], device=k.device)  # (B, S)
    if rotary_cos is not None:
        position = place + rotary_offset
        k = rotate(compute(k), rotary_cos[position], rotary_sin[position], rotary_interleaved).to(k.dtype)
    if block_table is not None:
        page_size = k_cache.shape[1]
        entry, place = block_table.long()[entry, place // page_size], place % page_size
    k_cache[entry, place] = k
    v_cache[entry, place] = v


def attention_decode(
    q: Tensor,  # (B, S, H, D)
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,  # (B,) int32
    appended: int,  # further keys of each entry, behind its cache_lengths
    block_table: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_buckets: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_offset: int,
    rotary_interleaved: bool,
    num_splits: int,  # matters for speed alone
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v over each entry's keys, its last query standing at its last key; and the log-sum-exp.

    Shapes (B, S, H, Dv) in q's dtype and (B, H, S) fp32 or fp64. The keys in the cache are turned already.
    """
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_zeros(batch, seqlen_q, heads, v_cache.shape[3])
    lse = compute(q).new_full((batch, heads, seqlen_q), -math.inf)
    options = Options(
        softmax_scale, window_left, window_right, softcap, None, None, None, sinks, None, relative_bias,
        relative_buckets, None, None, None, 0, False, 0.0, None,
    )  # fmt: skip
    for b, length in enumerate((cache_lengths + appended).tolist()):
        k, v = (cached_rows(cache, block_table, b, length) for cache in (k_cache, v_cache))
        queries = compute(q[b : b + 1])
        if rotary_cos is not None:
            position = torch.arange(length - seqlen_q, length, device=q.device)[None] + rotary_offset
            queries = rotate(queries, rotary_cos[position], rotary_sin[position], rotary_interleaved)
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        scores, _ = masked_scores(queries, compute(k), options._replace(alibi_slopes=slopes))
        lse[b : b + 1] = log_sum_exp(scores, sinks)
        weights = visible_exp(scores, lse[b : b + 1])
        out[b : b + 1] = weighted_sum(weights, expand_heads(compute(v), heads)).to(q.dtype)
    return out, lse


def cached_rows(cache: Tensor, block_table: Tensor | None, entry: int, length: int) -> Tensor:
    """The first `length` keys or values of an entry: (1, length, G, D)."""
    if block_table is None:
        return cache[entry : entry + 1, :length]
    pages = -(-length // cache.shape[1])
    return cache[block_table[entry, :pages].long()].flatten(0, 1)[None, :length]
