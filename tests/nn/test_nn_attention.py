"""MultiHeadAttention against torch.nn.MultiheadAttention and against plain PyTorch in fp64."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from pynlp.functional import alibi_slopes, rotary_tables
from pynlp.nn import MultiHeadAttention

BATCH, SEQLEN, EMBED_DIM, HEADS = 2, 13, 24, 4

VARIANTS = {
    "plain": dict(),
    "causal, grouped heads": dict(causal=True, kv_heads=2),
    "rope": dict(causal=True, positions="rope", kv_heads=1),
    "interleaved partial rope": dict(positions="rope", rotary_dim=4, rotary_interleaved=True),
    "yarn": dict(
        positions="rope", rotary_base=500.0, rotary_scaling=dict(scaling="yarn", factor=4.0, original_positions=64)
    ),
    "alibi": dict(causal=True, positions="alibi"),
    "relative": dict(positions="relative", relative_buckets=8, relative_max_distance=6),
    "causal relative": dict(causal=True, positions="relative", relative_buckets=8, relative_max_distance=6),
    "window, softcap": dict(causal=True, window=(3, 0), softcap=2.0, bias=False),
    "sinks": dict(causal=True, kv_heads=2, sinks=True),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(batch=BATCH, seqlen=SEQLEN, width=EMBED_DIM, **options):
    return torch.randn(batch, seqlen, width, **options)


def eager(module, x, memory=None, key_lengths=None, offset=0):
    """The module's result with plain PyTorch operations in the dtype of x; a dense matrix of scores."""
    memory = x if memory is None else memory
    heads, head_dim, seqlen_q, seqlen_k = module.heads, module.head_dim, x.shape[1], memory.shape[1]

    def project(projection, source, count):
        out = source @ projection.weight.T + (0 if projection.bias is None else projection.bias)
        out = out.view(*source.shape[:2], count, head_dim).transpose(1, 2)  # (B, heads, S, D)
        return out.repeat_interleave(heads // count, dim=1)

    q = project(module.q_proj, x, heads)
    k, v = (project(p, memory, module.kv_heads) for p in (module.k_proj, module.v_proj))
    if module.positions == "rope":
        cos, sin = (t[offset : offset + seqlen_k].to(x.dtype) for t in (module.rotary.cos, module.rotary.sin))
        turn = torch.complex(cos, sin)  # (S, R / 2)
        q, k = (_turned(t, turn, module.rotary_interleaved) for t in (q, k))
    scores = q @ k.transpose(2, 3) / math.sqrt(head_dim)
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None]  # (Sq, Sk)
    if module.positions == "alibi":
        scores = scores - alibi_slopes(heads).to(x.dtype)[:, None, None] * distance.abs()
    if module.positions == "relative":
        buckets = T5Attention._relative_position_bucket(
            distance, not module.causal, module.relative_bias.shape[0], module.relative_max_distance
        )
        scores = scores + module.relative_bias[buckets].permute(2, 0, 1)
    left = math.inf if module.window is None else module.window[0]
    right = 0 if module.causal else math.inf
    visible = (distance >= -left) & (distance <= right)
    if key_lengths is not None:
        visible = visible & (torch.arange(seqlen_k) < key_lengths[:, None, None, None])
    scores = scores.masked_fill(~visible, -math.inf)
    if module.sinks is not None:  # one key more, which has no value
        scores = torch.cat((scores, module.sinks[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    probabilities = scores.softmax(-1)[..., :seqlen_k]
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    return out @ module.out_proj.weight.T + (0 if module.out_proj.bias is None else module.out_proj.bias)


def _turned(x, turn, interleaved):
    """Channel pairs as complex numbers, multiplied by exp(i angle)."""
    rotary_dim = 2 * turn.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, rest), -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["self", "cross", "causal", "padded"])
def test_equals_torch(case, bias):
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, bias=bias, batch_first=True)
    if bias:  # torch's are zero, which would hide a wrong one
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours = MultiHeadAttention.from_torch(theirs, causal=case == "causal")
    x = tokens()
    memory = tokens(seqlen=17) if case == "cross" else None
    source = x if memory is None else memory
    options, key_lengths = {}, None
    if case == "causal":
        options = dict(attn_mask=torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1), is_causal=True)
    if case == "padded":
        key_lengths = torch.tensor([5, SEQLEN], dtype=torch.int32)
        options = dict(key_padding_mask=torch.arange(SEQLEN) >= key_lengths[:, None])
    expected, _ = theirs(x, source, source, need_weights=False, **options)
    torch.testing.assert_close(ours(x, memory, key_lengths=key_lengths), expected, rtol=1e-5, atol=2e-6)


def test_from_torch_with_a_memory_of_its_own_width():
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, kdim=10, vdim=10)  # not batch_first
    nn.init.normal_(theirs.in_proj_bias)
    x, memory = tokens(), tokens(seqlen=17, width=10)
    expected, _ = theirs(x.transpose(0, 1), memory.transpose(0, 1), memory.transpose(0, 1))
    ours = MultiHeadAttention.from_torch(theirs)
    torch.testing.assert_close(ours(x, memory), expected.transpose(0, 1), rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"memory: expected shape \(batch, seqlen, 10\), got None"):
        ours(x)


def test_from_torch_keeps_dtype_and_mode_and_copies():
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, dropout=0.1, dtype=torch.float64)
    assert MultiHeadAttention.from_torch(theirs).training
    ours = MultiHeadAttention.from_torch(theirs.eval())
    assert ours.q_proj.weight.dtype == torch.float64 and not ours.training and ours.dropout == 0.1
    before = ours.q_proj.weight.clone()
    with torch.no_grad():
        theirs.in_proj_weight.zero_()
    assert torch.equal(ours.q_proj.weight, before)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(add_bias_kv=True), "module: expected add_bias_kv=False"),
        (dict(add_zero_attn=True), "module: expected .*add_zero_attn=False"),
        (dict(kdim=8, vdim=12), "module: .* kdim=8 and vdim=12"),
    ],
)
def test_from_torch_refuses_what_has_no_counterpart(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(EMBED_DIM, HEADS, **options))


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_initialisation_is_torchs(kv_heads):
    ours = MultiHeadAttention(256, 8, kv_heads=kv_heads)
    width = 256 if kv_heads is None else 64
    bound = math.sqrt(6 / (256 + 256 + 2 * width))
    if kv_heads is None:
        theirs = nn.MultiheadAttention(256, 8)
        assert theirs.in_proj_weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert theirs.out_proj.weight.std().item() == pytest.approx(ours.out_proj.weight.std().item(), rel=0.02)
    for projection in (ours.q_proj, ours.k_proj, ours.v_proj):
        assert projection.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(p.bias.count_nonzero() == 0 for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj))


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_match_fp64(name):
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[name])
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    exact = copy.deepcopy(module).double()
    x = tokens(requires_grad=True)
    x_exact = x.detach().double().requires_grad_()
    weights = torch.randn(BATCH, SEQLEN, EMBED_DIM)

    out, expected = module(x), eager(exact, x_exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-6)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [("x", x, x_exact)]
    pairs += [(n, p, q) for (n, p), q in zip(module.named_parameters(), exact.parameters(), strict=True)]
    for parameter_name, ours, theirs in pairs:
        if parameter_name == "k_proj.bias" and name not in ("rope", "interleaved partial rope", "yarn", "sinks"):
            # Adds the same to every score of a row, so its true gradient is 0.
            assert theirs.grad.abs().max() < 1e-12 and ours.grad.abs().max() < 1e-4
            continue
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, f"gradient of {parameter_name} is off by {error:.2g}"


def test_gradients_of_cross_attention_reach_the_memory():
    module = MultiHeadAttention(EMBED_DIM, HEADS, memory_dim=10, kv_heads=2)
    x, memory = tokens(requires_grad=True), tokens(seqlen=5, width=10, requires_grad=True)
    key_lengths = torch.tensor([3, 5], dtype=torch.int32)
    module(x, memory, key_lengths=key_lengths).square().sum().backward()
    exact = copy.deepcopy(module).double()
    exact.zero_grad()
    x64, memory64 = (t.detach().double().requires_grad_() for t in (x, memory))
    eager(exact, x64, memory64, key_lengths).square().sum().backward()
    torch.testing.assert_close(memory.grad.double(), memory64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert memory.grad[0, 3:].count_nonzero() == 0 and memory.grad[0, :3].count_nonzero() > 0


@pytest.mark.parametrize("positions", ["none", "rope", "alibi", "relative"])
def test_weights_sum_to_one(positions):
    """Values of all ones come out as ones, whatever the weights are."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions=positions, causal=True)
    with torch.no_grad():
        module.v_proj.weight.zero_()
        module.v_proj.bias.fill_(1)
        expected = module.out_proj(torch.ones(BATCH, SEQLEN, EMBED_DIM))
    torch.testing.assert_close(module(tokens()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("positions", ["none", "rope", "alibi", "relative"])
def test_a_token_sees_nothing_behind_it(positions):
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions=positions, causal=True)
    x = tokens()
    changed = x.clone()
    changed[:, 8] += 1
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after).abs().amax(-1)[:, 8:] > 1e-6).all()


def test_a_window_ends_where_it_says():
    module = MultiHeadAttention(EMBED_DIM, HEADS, causal=True, window=(3, 0))
    x = tokens()
    changed = x.clone()
    changed[:, 2] += 1
    moved = (module(x) != module(changed)).any(-1)[0]
    assert moved.tolist() == [2 <= i <= 5 for i in range(SEQLEN)]


def test_rope_sees_only_distances():
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions="rope")
    x = tokens()
    here = module(x)
    torch.testing.assert_close(module(x, rotary_offset=1500), here, rtol=1e-4, atol=1e-5)
    ids = torch.arange(SEQLEN, dtype=torch.int32).expand(BATCH, -1)
    assert torch.equal(module(x, rotary_offset=ids + 7), module(x, rotary_offset=7))
    # And it does see them: stretching the distances changes the result.
    assert (module(x, rotary_offset=3 * ids) - here).abs().max() > 1e-3


def test_grouped_heads_equal_expanded_weights():
    grouped = MultiHeadAttention(EMBED_DIM, HEADS, kv_heads=2, positions="rope")
    full = MultiHeadAttention(EMBED_DIM, HEADS, positions="rope")
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        per_head = state[name].unflatten(0, (2, EMBED_DIM // HEADS))
        state[name] = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["rope", "alibi", "relative", "sinks"])
def test_state_dict_round_trip(name):
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[name])
    other = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[name])
    state = module.state_dict()
    names = {f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert set(state) == names | {"relative": {"relative_bias"}, "sinks": {"sinks"}}.get(name, set())
    x = tokens()
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(state)
    assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("positions, heads", [("rope", 4), ("alibi", 3)])
def test_tables_stay_exact_in_half_precision_and_after_meta(positions, heads):
    reference = MultiHeadAttention(EMBED_DIM, heads, positions=positions)
    with torch.device("meta"):
        meta = MultiHeadAttention(EMBED_DIM, heads, positions=positions)
    for module in (copy.deepcopy(reference).to(torch.bfloat16), meta.to_empty(device="cpu")):
        for ours, theirs in zip(module.buffers(), reference.buffers(), strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    if positions == "rope":
        assert torch.equal(reference.rotary.cos, rotary_tables(2048, EMBED_DIM // heads)[0])
    x = tokens()
    half = copy.deepcopy(reference).to(torch.bfloat16)(x.to(torch.bfloat16))
    torch.testing.assert_close(half.float(), reference(x), rtol=0.05, atol=0.02)


def test_alibi_slopes_can_be_trained():
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions="alibi")
    module.alibi_slopes = nn.Parameter(module.alibi_slopes)
    module(tokens()).square().sum().backward()
    assert "alibi_slopes" in dict(module.named_parameters()) and (module.alibi_slopes.grad != 0).all()


def test_another_attention_can_be_put_in():
    seen = {}

    def first_value(q, k, v, **options):
        seen.update(options)
        return v[:, :1].expand_as(q)

    module = MultiHeadAttention(EMBED_DIM, HEADS, positions="rope", causal=True, attention=first_value)
    x = tokens()
    expected = module.out_proj(module.v_proj(x[:, :1])).expand(-1, SEQLEN, -1)
    torch.testing.assert_close(module(x), expected)
    assert seen["causal"] and torch.equal(seen["rotary"][0], module.rotary.cos)


@pytest.mark.parametrize("packed", [False, True])
def test_scale_of_the_scores(packed):
    """A scale is the same as queries multiplied by its share of the usual one; in the weights, too."""
    x = tokens(batch=1).double()
    modules = [MultiHeadAttention(EMBED_DIM, HEADS, softmax_scale=scale, causal=True) for scale in (None, 0.7)]
    usual, scaled = (module.double() for module in modules)
    scaled.load_state_dict(usual.state_dict())
    options = dict(cu_seqlens=torch.tensor([0, x.shape[1]], dtype=torch.int32)) if packed else {}
    got, weights = scaled(x[0] if packed else x, **options), scaled.weights(x)
    with torch.no_grad():
        usual.q_proj.weight *= 0.7 * usual.head_dim**0.5
        usual.q_proj.bias *= 0.7 * usual.head_dim**0.5
    torch.testing.assert_close(got, usual(x[0] if packed else x, **options))
    torch.testing.assert_close(weights, usual.weights(x))


def test_sinks_start_as_a_score_of_zero():
    """Values of all ones come out as the share that the sink leaves."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, causal=True, sinks=True)
    with torch.no_grad():
        module.q_proj.weight.zero_()
        module.v_proj.weight.zero_()
        module.v_proj.bias.fill_(1)
        share = torch.arange(1, SEQLEN + 1) / torch.arange(2, SEQLEN + 2)
        expected = module.out_proj(share[:, None].expand(BATCH, -1, EMBED_DIM))
    torch.testing.assert_close(module(tokens()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_drops_weights_in_training_only(packed):
    """Rows of one key, whose value is ones: a head gives 0 where it is dropped, 1 / (1 - p) where it is not."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, dropout=0.25, bias=False)
    with torch.no_grad():
        module.v_proj.weight.fill_(1)
        module.out_proj.weight.copy_(torch.eye(EMBED_DIM))
    x = torch.full((4000, 1, EMBED_DIM), 1 / EMBED_DIM)
    options = {}
    if packed:
        x, options = x[:, 0], dict(cu_seqlens=torch.arange(4001, dtype=torch.int32))
    out = module(x, **options).view(4000, HEADS, -1)
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 4 / 3))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.015)  # 4 sigma
    assert (dropped.all(-1) | ~dropped.any(-1)).all()
    torch.manual_seed(5)
    again = module(x, **options)
    torch.manual_seed(5)
    assert torch.equal(module(x, **options), again)
    torch.testing.assert_close(module.eval()(x, **options), torch.ones_like(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sequences_are_as_each_alone(name):
    """Gradients too; one of the sequences is empty."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[name])
    lengths = [5, 0, 1, 7]
    alone = [tokens(1, length, requires_grad=True) for length in lengths]
    packed = torch.cat([x[0] for x in alone]).detach().requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = torch.cat([module(x)[0] for x in alone])
    out = module(packed, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    expected.square().sum().backward()
    torch.testing.assert_close(packed.grad, torch.cat([x.grad[0] for x in alone]), rtol=1e-4, atol=1e-5)
    for n, p in module.named_parameters():
        torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-5, msg=n)


def test_packed_sequences_with_positions_of_their_own():
    module = MultiHeadAttention(EMBED_DIM, HEADS, positions="rope", causal=True)
    packed, positions = tokens(1, 8)[0], torch.tensor([0, 4, 5, 10, 12, 3, 4, 9], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    out = module(packed, cu_seqlens=cu_seqlens, rotary_offset=positions)
    for part in (slice(0, 5), slice(5, 8)):
        expected = module(packed[None, part], rotary_offset=positions[None, part])[0]
        torch.testing.assert_close(out[part], expected, rtol=1e-5, atol=1e-6)


def test_packed_sequences_with_packed_memories():
    module = MultiHeadAttention(EMBED_DIM, HEADS, memory_dim=10, kv_heads=2)
    xs, memories = [tokens(1, n) for n in (4, 2)], [tokens(1, n, 10) for n in (3, 8)]
    packed, memory = torch.cat(xs, dim=1)[0], torch.cat(memories, dim=1)[0]
    starts = dict(cu_seqlens=torch.tensor([0, 4, 6]), cu_seqlens_memory=torch.tensor([0, 3, 11]))
    expected = torch.cat([module(x, m)[0] for x, m in zip(xs, memories, strict=True)])
    torch.testing.assert_close(module(packed, memory, **starts), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(module(packed, module.keys_values(memory), **starts), module(packed, memory, **starts))


def test_keys_and_values_of_a_memory_can_be_kept():
    module = MultiHeadAttention(EMBED_DIM, HEADS, memory_dim=10, kv_heads=2)
    x, memory = tokens(), tokens(seqlen=5, width=10, requires_grad=True)
    key_lengths = torch.tensor([3, 5], dtype=torch.int32)
    kept = module.keys_values(memory)
    steps = torch.cat([module(x[:, i : i + 1], kept, key_lengths=key_lengths) for i in range(SEQLEN)], dim=1)
    whole = module(x, memory, key_lengths=key_lengths)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(whole)
    (from_steps,) = torch.autograd.grad((steps * weights).sum(), memory)
    (from_whole,) = torch.autograd.grad((whole * weights).sum(), memory)
    torch.testing.assert_close(from_steps, from_whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rope", "alibi", "relative", "sinks"])
def test_compiles_without_a_graph_break(name):
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[name])
    x = tokens()
    expected = module(x)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights(variant):
    """The sums of the values by them, projected, are the module's output."""
    module = MultiHeadAttention(EMBED_DIM, HEADS, **VARIANTS[variant])
    x, rows = tokens(), torch.tensor([SEQLEN - 1, 0, 3])
    key_lengths = torch.tensor([SEQLEN, 5])
    weights = module.weights(x, key_lengths=key_lengths)
    _, v = module.keys_values(x)
    values = v.repeat_interleave(HEADS // v.shape[2], dim=2)
    expected = module.out_proj(torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(-2))
    torch.testing.assert_close(expected, module(x, key_lengths=key_lengths), rtol=1e-5, atol=2e-6)
    assert torch.equal(module.weights(x, key_lengths=key_lengths, rows=rows), weights[:, :, rows])


def test_weights_of_a_memory():
    """The weights are those of torch.nn.MultiheadAttention."""
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True).eval()
    x, memory = tokens(), tokens(seqlen=17)
    _, expected = theirs(x, memory, memory, average_attn_weights=False)
    torch.testing.assert_close(MultiHeadAttention.from_torch(theirs).weights(x, memory), expected, rtol=1e-5, atol=1e-6)
