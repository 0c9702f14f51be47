"""MultiHeadAttention over a cache, against its own forward of the whole sequence."""

import pytest
import torch
from test_nn_attention import BATCH, EMBED_DIM, HEADS, SEQLEN, VARIANTS, tokens
from torch import nn

from pynlp.nn import KVCache, MultiHeadAttention, PagedKVCache


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(name, kind, dtype, tolerance):
    """Two prompts of unequal lengths, padded to one; then steps of one and of several tokens."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, **{**VARIANTS[name], "causal": True}, dtype=dtype)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    if kind == "paged":
        cache = PagedKVCache(10, 4, **module.cache_shape, dtype=dtype)
        sequences = [cache.allocate(), cache.allocate()]
    else:
        cache = KVCache(BATCH, 17, **module.cache_shape, dtype=dtype)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)

    prompts, x = [6, 9], tokens(seqlen=9 + 5, dtype=dtype)
    outs, at = [[], []], [0, 0]
    for count in (9, 1, 1, 3):
        chunk = torch.stack([x[b, at[b] : at[b] + count] for b in range(BATCH)])
        (layer,) = cache.append(sequences, count) if kind == "paged" else cache.append(count)
        out = module(chunk, cache=layer)
        new = prompts if count == 9 else [count, count]
        for b in range(BATCH):
            outs[b].append(out[b, : new[b]])
            at[b] += new[b]
        if kind == "paged":
            cache.truncate(sequences[0], at[0])
        else:
            cache.truncate(at)
    for b in range(BATCH):
        expected = module(x[b : b + 1, : at[b]])[0]
        torch.testing.assert_close(torch.cat(outs[b]), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_cache_that_starts_at_a_later_position():
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions="rope", causal=True, max_positions=120)
    cache, x = KVCache(BATCH, SEQLEN, **module.cache_shape), tokens()
    steps = [
        module(x[:, new], cache=cache.append(n)[0], rotary_offset=107) for n, new in ((9, slice(9)), (4, slice(9, 13)))
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), module(x, rotary_offset=107), rtol=1e-5, atol=1e-6)
    cached = cache.k[0]  # turned by the angles of 107 and on, not of 0 and on
    fresh = KVCache(BATCH, SEQLEN, **module.cache_shape)
    module(x, cache=fresh.append(SEQLEN)[0])
    assert (cached - fresh.k[0]).abs().amax(-1).min() > 1e-3


def test_bytes_of_a_cached_token():
    module = MultiHeadAttention(EMBED_DIM, HEADS, kv_heads=2)
    assert module.cache_bytes_per_token() == 2 * 2 * 6 * 4
    assert (
        module.cache_bytes_per_token(torch.bfloat16) == KVCache(1, 1, **module.cache_shape, dtype=torch.bfloat16).nbytes
    )


@torch.no_grad()
def test_decoding_compiles_without_a_graph_break():
    """Only the first of the steps of one token is compiled."""
    torch._dynamo.reset()
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS["rope"])
    compiled = torch.compile(module, fullgraph=True)
    cache, x = KVCache(BATCH, 16, **module.cache_shape), tokens()
    outs = [compiled(x[:, :8], cache=cache.append(8)[0])]
    outs += [compiled(x[:, 8:9], cache=cache.append(1)[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        outs += [compiled(x[:, i : i + 1], cache=cache.append(1)[0]) for i in range(9, SEQLEN)]
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(memory=torch.zeros(1, 3, 24)), "memory: expected None with a cache"),
        (dict(key_lengths=torch.tensor([2])), "key_lengths: expected None with a cache"),
        (dict(x=torch.zeros(3, 24), cu_seqlens=torch.tensor([0, 3])), "cu_seqlens: expected None with a cache"),
        (dict(x=torch.zeros(1, 3, 24, requires_grad=True)), r"cache: expected a call under torch.no_grad\(\)"),
        (dict(x=torch.zeros(2, 3, 24)), "x: expected 1 rows, the entries of the cache, got 2"),
        (dict(x=torch.zeros(1, 4, 24)), "x: expected the 3 tokens that were appended to the cache, got 4"),
    ],
)
def test_refuses_bad_calls_with_a_cache(arguments, message):
    module = MultiHeadAttention(24, 4).requires_grad_(False)
    cache = KVCache(1, 6, **module.cache_shape)
    cache.append(3)
    with pytest.raises(ValueError, match=message):
        module(**{"x": torch.zeros(1, 3, 24), "cache": cache.append(3)[0], **arguments})


@torch.no_grad()
def test_refuses_to_decode_with_dropout():
    module = MultiHeadAttention(24, 4, dropout=0.1)
    (layer,) = KVCache(1, 6, **module.cache_shape).append(3)
    with pytest.raises(ValueError, match="cache: expected evaluation mode, as decoding drops nothing, got dropout=0.1"):
        module(torch.zeros(1, 3, 24), cache=layer)
    assert module.eval()(torch.zeros(1, 3, 24), cache=layer).isfinite().all()
