"""flash-attn's attention over a cache: what it returns and what the cache holds, against dense attention in fp64."""

import math

import pytest
import torch
from cases.flash_attn import assert_as_accurate, dense_attention, turned
from cases.pairs import every_pair

from pynlp.integrations.flash_attn import flash_attn_with_kvcache

CAPACITY, ENTRIES, PAGE = 11, 5, 4
CACHE_SEQLENS = torch.tensor([0, 7, 4], dtype=torch.int32)
CACHES = {
    "entries": {},
    "batch_idx": dict(cache_batch_idx=torch.tensor([4, 0, 3], dtype=torch.int32)),
    "leftpad": dict(cache_leftpad=torch.tensor([0, 3, 4], dtype=torch.int32)),
    "batch_idx and leftpad": dict(
        cache_batch_idx=torch.tensor([1, 4, 2], dtype=torch.int32),
        cache_leftpad=torch.tensor([0, 6, 1], dtype=torch.int32),
    ),
    "block_table": dict(block_table=torch.tensor([[4, 9, 1], [0, 8, 2], [7, 3, 6]], dtype=torch.int32)),
}
STEPS = {  # new queries, new keys, and how rotary pairs channels
    "full": (2, None, None),
    "one": (1, 1, None),
    "one, interleaved": (1, 1, True),
    "one, halves": (1, 1, False),
    "several, interleaved": (3, 3, True),
    "several, halves": (3, 3, False),
    "more queries than keys": (4, 2, True),
    "more keys than queries": (1, 3, False),
}
MASKS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(4, 1), softcap=3.0),
    "causal window, alibi": dict(causal=True, window_size=(5, -1), alibi_slopes=torch.linspace(0.5, 0.1, 4)),
    "alibi of entries": dict(alibi_slopes=torch.linspace(0.9, 0.1, 12).view(3, 4), softmax_scale=0.5),
}


@every_pair(mask=list(MASKS), step=list(STEPS), cache=list(CACHES), dtype=[torch.float32, torch.bfloat16])
def test_flash_attn_with_kvcache(mask, step, cache, dtype):
    mask, cache, (seqlen_q, seqlen_new, interleaved) = MASKS[mask], CACHES[cache], STEPS[step]
    shape = (10, PAGE) if "block_table" in cache else (ENTRIES, CAPACITY)
    k_cache, v_cache = torch.randn(2, *shape, 2, 12, dtype=dtype)
    q = torch.randn(3, seqlen_q, 4, 12, dtype=dtype)
    k, v = (None, None) if seqlen_new is None else torch.randn(2, 3, seqlen_new, 2, 12, dtype=dtype)
    arguments, tables = {}, None
    if interleaved is not None:
        angles = torch.rand(CAPACITY, 4) * 2 * math.pi
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tables = (cos.double(), sin.double())
        arguments = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)

    keys, values = k_cache.clone(), v_cache.clone()  # what the cache should hold afterwards
    written = torch.zeros(shape, dtype=torch.bool)
    exact, peer = [], []
    for b, length in enumerate(CACHE_SEQLENS.tolist()):
        place = torch.arange(CAPACITY)
        if "block_table" in cache:
            where = cache["block_table"][b, place // PAGE].long(), place % PAGE
        else:
            where = torch.full_like(place, cache["cache_batch_idx"][b] if "cache_batch_idx" in cache else b), place
        queries, total = q[b].double(), length + (seqlen_new or 0)
        if seqlen_new is not None:
            new = where[0][length:total], where[1][length:total]
            new_keys = k[b].double()
            if tables is not None:
                in_a_row = mask.get("causal", False) or mask.get("window_size", (-1, -1)) != (-1, -1)
                of_q = length + (torch.arange(seqlen_q) if in_a_row else torch.zeros(seqlen_q, dtype=torch.long))
                of_k = length + torch.arange(seqlen_new)
                queries = turned(queries, *(table[of_q] for table in tables), interleaved)
                new_keys = turned(new_keys, *(table[of_k] for table in tables), interleaved)
            keys[new], values[new], written[new] = new_keys.to(dtype), v[b], True
        first = cache["cache_leftpad"][b] if "cache_leftpad" in cache else 0
        seen = where[0][first:total], where[1][first:total]
        own = dict(mask)
        if "alibi_slopes" in mask and mask["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = mask["alibi_slopes"][b]
        exact.append(dense_attention(queries[None], keys[seen][None].double(), values[seen][None].double(), **own))
        peer.append(dense_attention(queries[None].to(dtype), keys[seen][None], values[seen][None], **own))

    results = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=CACHE_SEQLENS, return_softmax_lse=True, **arguments, **cache, **mask
    )
    for i, name in enumerate(("out", "lse")):
        assert_as_accurate(name, results[i], torch.cat([x[i] for x in exact]), torch.cat([x[i] for x in peer]), 4)
    assert torch.equal(v_cache, values)
    assert torch.equal(k_cache[~written], keys[~written])
    ulp = torch.finfo(dtype).eps  # a turned key may be rounded to the other side
    torch.testing.assert_close(k_cache[written], keys[written], rtol=ulp, atol=ulp)


def test_kvcache_lengths():
    """An int for all; None for a cache that is full; and the default is no lse."""
    q, k_cache, v_cache = torch.randn(2, 3, 4, 8), *torch.randn(2, 2, 9, 2, 8)
    new = torch.randn(2, 2, 3, 2, 8)
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    expected = flash_attn_with_kvcache(q, *caches[0], *new, cache_seqlens=lengths, causal=True)
    assert torch.equal(flash_attn_with_kvcache(q, *caches[1], *new, cache_seqlens=5, causal=True), expected)
    assert torch.equal(torch.stack(caches[0]), torch.stack(caches[1]))
    assert torch.equal(caches[0][0][:, 5:8], new[0])
    full, _ = dense_attention(q, k_cache, v_cache, causal=True)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k_cache, v_cache, causal=True), full, rtol=1e-5, atol=1e-6)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, block_table=table, causal=True)
    torch.testing.assert_close(out, full, rtol=1e-5, atol=1e-6)


def test_kvcache_in_one_tensor_with_padding():
    """Entries of keys and values that alternate in memory: strides, but no copies."""
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 6, 2, 2, 8)
    before, new = cache.clone(), torch.randn(2, 2, 1, 2, 8)
    leftpad = torch.tensor([2, 0], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, cache[:, :, 0], cache[:, :, 1], *new, cache_seqlens=4, cache_leftpad=leftpad)
    before[:, 4] = torch.stack((new[0][:, 0], new[1][:, 0]), dim=1)
    assert torch.equal(cache, before)
    for b, first in enumerate(leftpad.tolist()):
        keys, values = before[b : b + 1, first:5].unbind(2)
        expected, _ = dense_attention(q[b : b + 1], keys, values)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_kvcache_splits(num_splits):
    q, caches = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 300, 2, 8)
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=290, num_splits=num_splits)
    expected, _ = dense_attention(q, *(x[:, :290] for x in caches))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_kvcache_keeps_no_graph():
    q, cache = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 5, 2, 4)
    out, lse = flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=2, return_softmax_lse=True)
    assert not (out.requires_grad or lse.requires_grad or cache.requires_grad)
