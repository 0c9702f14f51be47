"""LatentAttention against transformers' DeepSeek with the same weights, against fp64, and cached against whole."""

import copy

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from pynlp.nn import KVCache, LatentAttention, MultiHeadAttention, PagedKVCache

BATCH, SEQLEN, EMBED_DIM = 2, 13, 20
SIZES = dict(heads=4, kv_rank=10, nope_dim=6, rope_dim=4, head_dim_v=5)
VARIANTS = {
    "plain": dict(causal=True),
    "compressed queries": dict(causal=True, q_rank=8, rotary_interleaved=True),
    "equal head sizes, yarn": dict(
        causal=True, head_dim_v=10, softmax_scale=0.5,
        rotary_scaling=dict(scaling="yarn", factor=4.0, original_positions=32),
    ),
}  # fmt: skip


def latent_attention(dtype=torch.float64, **options):
    module = LatentAttention(EMBED_DIM, **{**SIZES, **options}, dtype=dtype)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)  # norms of 1 would hide a missing one
    return module


def tokens(batch=BATCH, seqlen=SEQLEN, dtype=torch.float64, **options):
    return torch.randn(batch, seqlen, EMBED_DIM, dtype=dtype, **options)


def deepseek(version, **options):
    """An attention layer, and its embedding's cosines and sines for SEQLEN positions."""
    sizes = dict(
        hidden_size=EMBED_DIM, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=10, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, attn_implementation="eager",
    )  # fmt: skip
    config = (DeepseekV2Config if version == 2 else DeepseekV3Config)(**{**sizes, **options})
    module = (DeepseekV2Attention if version == 2 else DeepseekV3Attention)(config, layer_idx=0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    embedding = (DeepseekV2RotaryEmbedding if version == 2 else DeepseekV3RotaryEmbedding)(config)
    return module, embedding(torch.zeros(1), torch.arange(SEQLEN)[None])


@pytest.mark.parametrize(
    "version, options",
    [
        (3, dict(q_lora_rank=8)),
        (3, dict(q_lora_rank=None)),
        (3, dict(q_lora_rank=8, rope_interleave=False)),
        (2, dict(q_lora_rank=8)),
        (2, dict(q_lora_rank=None)),
    ],
)
def test_equals_deepseek(version, options):
    """The output, the gradient of x, and those of the weights whose layout is the same."""
    theirs, positions = deepseek(version, **options)
    ours = LatentAttention.from_transformers(theirs)
    x = tokens(dtype=torch.float32, requires_grad=True)
    mask = torch.full((SEQLEN, SEQLEN), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=mask)
    out = ours(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    weights = torch.randn_like(out)
    pairs = [
        (x, x),
        (ours.kv_up_proj.weight, theirs.kv_b_proj.weight),
        (ours.kv_norm.weight, theirs.kv_a_layernorm.weight),
    ]
    pairs += [(ours.out_proj.weight, theirs.o_proj.weight)]
    mine, others = zip(*pairs, strict=True)
    gradients = torch.autograd.grad((out * weights).sum(), mine)
    for ours_, theirs_ in zip(gradients, torch.autograd.grad((expected * weights).sum(), others), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-3, atol=1e-4)


def test_equals_deepseek_with_yarn():
    """The scale of the softmax grows with the context, as the module says."""
    rope = dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
    )  # fmt: skip
    theirs, positions = deepseek(3, q_lora_rank=8, rope_parameters=rope, max_position_embeddings=512)
    with pytest.raises(ValueError, match="rotary_scaling: expected the module's 'yarn' in words of ours, got None"):
        LatentAttention.from_transformers(theirs)
    scaling = dict(scaling="yarn", factor=8.0, original_positions=64, attention_factor=1.0)
    ours = LatentAttention.from_transformers(theirs, rotary_scaling=scaling)
    assert ours.softmax_scale > 1.2 * 10**-0.5
    x = tokens(dtype=torch.float32)
    mask = torch.full((SEQLEN, SEQLEN), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=mask)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_from_transformers_refuses_biases_and_copies():
    theirs, _ = deepseek(3, attention_bias=True)
    with pytest.raises(ValueError, match="module: expected attention_bias=False"):
        LatentAttention.from_transformers(theirs)
    theirs, _ = deepseek(3, attention_dropout=0.2)
    ours = LatentAttention.from_transformers(theirs.double().eval(), max_positions=50)
    assert ours.dropout == 0.2 and not ours.training and ours.rotary.max_positions == 50
    before = ours.kv_up_proj.weight.clone()
    with torch.no_grad():
        theirs.kv_b_proj.weight.zero_()
    assert before.dtype == torch.float64 and torch.equal(ours.kv_up_proj.weight, before)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_finite_differences(name):
    module = latent_attention(**VARIANTS[name])
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    x = tokens(1, 4, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_fp32_output_and_gradients_match_fp64(name):
    module = latent_attention(torch.float32, **VARIANTS[name])
    exact = copy.deepcopy(module).double()
    x = tokens(dtype=torch.float32, requires_grad=True)
    x_exact = x.detach().double().requires_grad_()
    weights = torch.randn_like(x)
    out, expected = module(x), exact(x_exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [("x", x, x_exact)]
    pairs += [(n, p, q) for (n, p), q in zip(module.named_parameters(), exact.parameters(), strict=True)]
    for parameter_name, ours, theirs in pairs:
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, f"gradient of {parameter_name} is off by {error:.2g}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(name, kind, dtype, tolerance):
    """Two prompts of unequal lengths, padded to one; then steps of one and of several tokens."""
    module = latent_attention(dtype, **VARIANTS[name])
    if kind == "paged":
        cache = PagedKVCache(10, 4, **module.cache_shape, dtype=dtype)
        sequences = [cache.allocate(), cache.allocate()]
    else:
        cache = KVCache(BATCH, 17, **module.cache_shape, dtype=dtype)
    cache.k.fill_(torch.nan)

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


@pytest.mark.parametrize("offset", [0, 1900])
@torch.no_grad()
def test_a_row_of_the_cache_is_turned_rope_and_latent(offset):
    """One row a token: its rope channels as complex numbers, times exp(i angle), and the latent as it is."""
    module = latent_attention(rotary_interleaved=True)
    cache, x = KVCache(BATCH, SEQLEN, **module.cache_shape, dtype=torch.float64), tokens()
    assert cache.k.shape == (1, BATCH, SEQLEN, 1, 4 + 10) and cache.v.numel() == 0
    for chunk in x.split(5, dim=1):
        module(chunk, cache=cache.append(chunk.shape[1])[0], rotary_offset=offset)
    rope, latent = (x @ module.kv_down_proj.weight.T).split((4, 10), dim=-1)
    latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.kv_norm.weight
    torch.testing.assert_close(cache.k[0, :, :, 0, 4:], latent, rtol=1e-12, atol=1e-12)
    angles = (torch.arange(SEQLEN) + offset)[:, None] * torch.tensor([1.0, 1e-2], dtype=torch.float64)
    turned = torch.view_as_complex(rope.unflatten(-1, (2, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(cache.k[0, :, :, 0, :4], torch.view_as_real(turned).flatten(-2), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_bf16_loses_no_more_in_the_cache_than_without():
    """Against fp64, with the weights rounded to bf16 in both."""
    module = latent_attention(torch.bfloat16, causal=True, q_rank=8)
    exact, x = copy.deepcopy(module).double(), tokens(seqlen=40, dtype=torch.bfloat16)
    expected = exact(x.double())
    cache = KVCache(BATCH, 40, **module.cache_shape, dtype=torch.bfloat16)
    steps = [module(chunk, cache=cache.append(chunk.shape[1])[0]) for chunk in (x[:, :20], *x[:, 20:].split(1, dim=1))]
    cached_error = (torch.cat(steps, dim=1)[:, 20:].double() - expected[:, 20:]).norm() / expected[:, 20:].norm()
    error = (module(x)[:, 20:].double() - expected[:, 20:]).norm() / expected[:, 20:].norm()
    assert 1e-4 < error < 0.02 and cached_error < 2 * error


@torch.no_grad()
def test_autocast_fills_a_half_precision_cache():
    module, x = latent_attention(torch.float32, causal=True), tokens(dtype=torch.float32)
    cache = KVCache(BATCH, SEQLEN, **module.cache_shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        steps = [module(chunk, cache=cache.append(chunk.shape[1])[0]) for chunk in x.split(6, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1).float(), module(x), rtol=0.05, atol=0.02)


@torch.no_grad()
def test_forks_share_the_latents_of_a_prompt():
    module = latent_attention(causal=True)
    cache = PagedKVCache(6, 4, **module.cache_shape, dtype=torch.float64)
    prompt, ends = tokens(1, 6), tokens(2, 3)
    parent = cache.allocate()
    module(prompt, cache=cache.append([parent], 6)[0])
    both = [parent, cache.fork(parent)]
    out = module(ends, cache=cache.append(both, 3)[0])
    expected = module(torch.cat((prompt.expand(2, -1, -1), ends), dim=1))[:, 6:]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert cache.free_pages == 6 - 5


def test_packed_and_padded_sequences_are_as_each_alone():
    module = latent_attention(causal=True, q_rank=8)
    lengths = [5, 0, 1, 7]
    alone = [tokens(1, length) for length in lengths]
    expected = torch.cat([module(x)[0] for x in alone])
    out = module(torch.cat(alone, dim=1)[0], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    bidirectional, x = latent_attention(), tokens()
    padded = bidirectional(x, key_lengths=torch.tensor([4, 13]))
    torch.testing.assert_close(padded[:1, :4], bidirectional(x[:1, :4]), rtol=1e-12, atol=1e-12)
    assert (padded[0, :4] - bidirectional(x)[0, :4]).abs().max() > 1e-3


def test_a_token_sees_nothing_behind_it():
    module, x = latent_attention(causal=True), tokens()
    changed = x.clone()
    changed[:, 8] += 1
    moved = (module(x) - module(changed)).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [i >= 8 for i in range(SEQLEN)]


def test_dropout_drops_in_training_only():
    module, x = latent_attention(causal=True, dropout=0.5), tokens()
    without = latent_attention(causal=True)
    without.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), without(x))
    module.train()
    starts = torch.tensor([0, SEQLEN])
    for dropped in (lambda: module(x[:1])[0], lambda: module(x[0], cu_seqlens=starts)):
        assert (dropped() - without(x)[0]).abs().max() > 1e-3
        mean = torch.stack([dropped() for _ in range(1000)]).mean(0)
        torch.testing.assert_close(mean, without(x)[0], rtol=0, atol=0.1)
    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected evaluation mode"):
        module(x, cache=KVCache(BATCH, SEQLEN, **module.cache_shape, dtype=torch.float64).append(SEQLEN)[0])


def test_bytes_of_a_cached_token():
    """DeepSeek-V3's sizes: a 57th of multi-head attention with its heads, less than half of 8 groups."""
    sizes = dict(kv_rank=512, nope_dim=128, rope_dim=64, head_dim_v=128, q_rank=1536)
    with torch.device("meta"):
        latent = LatentAttention(7168, 128, **sizes, dtype=torch.bfloat16)
        full, grouped = (
            MultiHeadAttention(128 * 128, 128, kv_heads=n, dtype=torch.bfloat16).cache_bytes_per_token()
            for n in (128, 8)
        )
    assert latent.cache_bytes_per_token() == 576 * 2
    assert latent.cache_bytes_per_token(torch.float32) == 576 * 4
    assert (full, grouped) == (2 * 128 * 128 * 2, 2 * 8 * 128 * 2)
    assert round(full / latent.cache_bytes_per_token()) == 57
    cache = PagedKVCache(3, 16, layers=2, **latent.cache_shape, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 3 * 16 * latent.cache_bytes_per_token()


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    module, x = latent_attention(torch.float32, causal=True, q_rank=8), tokens(dtype=torch.float32)
    expected = module(x)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    out = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kv_rank=0), "kv_rank: expected at least 1, got 0"),
        (dict(q_rank=0), "q_rank: expected at least 1, got 0"),
        (dict(heads=0), "heads: expected at least 1, got 0"),
        (dict(rope_dim=3), "rotary_dim: expected an even number of at least 2, got 3"),
        (dict(dropout=1.0), "dropout: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LatentAttention(EMBED_DIM, **{**SIZES, **options})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=torch.zeros(3, EMBED_DIM)), r"x: expected shape \(batch, seqlen, 20\), got \(3, 20\)"),
        (dict(cu_seqlens=torch.tensor([0, 3])), r"x: expected shape \(total, 20\), got \(1, 3, 20\)"),
        (dict(rotary_offset=6), "x: expected positions from 0 to max_positions - 1 = 7, got 6 to 8"),
        (
            dict(x=torch.zeros(3, EMBED_DIM), cu_seqlens=torch.tensor([0, 3]), key_lengths=torch.tensor([2])),
            "key_lengths: expected None with cu_seqlens or a cache",
        ),
        (dict(cached=3, key_lengths=torch.tensor([2])), "key_lengths: expected None with cu_seqlens or a cache"),
        (
            dict(cached=3, x=torch.zeros(3, EMBED_DIM), cu_seqlens=torch.tensor([0, 3])),
            "cu_seqlens: expected None with a cache",
        ),
        (dict(cached=2), "x: expected the 2 tokens that were appended to the cache, got 3"),
        (dict(cached=3, x=torch.zeros(1, 3, EMBED_DIM, requires_grad=True)), r"cache: .* under torch.no_grad\(\)"),
    ],
)
def test_refuses_bad_inputs(arguments, message):
    module = LatentAttention(EMBED_DIM, **SIZES, max_positions=8).requires_grad_(False)
    arguments = {"x": torch.zeros(1, 3, EMBED_DIM), **arguments}
    if "cached" in arguments:
        arguments["cache"] = KVCache(1, 6, **module.cache_shape).append(arguments.pop("cached"))[0]
    with pytest.raises(ValueError, match=message):
        module(**arguments)
