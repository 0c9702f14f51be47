"""The decoder against models of transformers with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

from pynlp.models import Decoder, TransformerConfig
from pynlp.nn import KVCache, PagedKVCache

SIZES = dict(vocab_size=50, embed_dim=32, layers=3, heads=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def decoder(**options):
    model = Decoder(TransformerConfig(**SIZES, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # weights large enough that a wrong part shows
            parameter.normal_(std=0.3).add_(1 if parameter.dim() == 1 else 0)
    return model


def tokens(seqlen=20):
    return torch.randint(50, (2, seqlen))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_mistral(window, tied):
    """RMSNorm, SwiGLU, RoPE, grouped heads, a window."""
    ours = decoder(kv_heads=2, ffn_dim=40, window=window, tied_embeddings=tied)
    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=torch.finfo(torch.float32).eps, tie_word_embeddings=tied,
            sliding_window=None if window is None else window + 1,  # theirs counts the token itself
            attn_implementation="eager",
        )
    )  # fmt: skip
    state = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.norm.weight}
    state["lm_head.weight"] = ours.embedding.weight if tied else ours.output.weight
    for i, block in enumerate(ours.blocks):
        gate, up = block.feed_forward.up_proj.weight.chunk(2)
        state |= {
            f"model.layers.{i}.input_layernorm.weight": block.attention_norm.weight,
            f"model.layers.{i}.post_attention_layernorm.weight": block.feed_forward_norm.weight,
            f"model.layers.{i}.mlp.gate_proj.weight": gate,
            f"model.layers.{i}.mlp.up_proj.weight": up,
            f"model.layers.{i}.mlp.down_proj.weight": block.feed_forward.down_proj.weight,
        }
        for theirs_name, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
            weight = getattr(block.attention, f"{name}_proj").weight
            state[f"model.layers.{i}.self_attn.{theirs_name}_proj.weight"] = weight
    theirs.load_state_dict(state)
    batch = tokens()
    torch.testing.assert_close(ours(batch), theirs.eval()(batch).logits, rtol=1e-4, atol=1e-4)


def test_equals_gpt_neox():
    """LayerNorm, GELU, RoPE."""
    ours = decoder(norm="layer", activation="gelu", tied_embeddings=False)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            use_parallel_residual=False, attention_bias=False, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.gpt_neox.embed_in.weight.copy_(ours.embedding.weight)
        theirs.lm_head.weight.copy_(ours.output.weight)
        theirs.gpt_neox.final_layer_norm.load_state_dict(ours.norm.state_dict())
        for layer, block in zip(theirs.gpt_neox.layers, ours.blocks, strict=True):
            layer.input_layernorm.load_state_dict(block.attention_norm.state_dict())
            layer.post_attention_layernorm.load_state_dict(block.feed_forward_norm.state_dict())
            layer.mlp.dense_h_to_4h.weight.copy_(block.feed_forward.up_proj.weight)
            layer.mlp.dense_4h_to_h.weight.copy_(block.feed_forward.down_proj.weight)
            # Theirs is one matrix with q, k and v of a head side by side.
            heads = [getattr(block.attention, f"{name}_proj").weight.unflatten(0, (4, 8)) for name in "qkv"]
            layer.attention.query_key_value.weight.copy_(torch.cat(heads, dim=1).flatten(0, 1))
            layer.attention.dense.weight.copy_(block.attention.out_proj.weight)
            for linear in (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h):
                nn.init.zeros_(linear.bias)
    batch = tokens()
    torch.testing.assert_close(ours(batch), theirs.eval()(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "none"])
def test_a_token_sees_no_later_one(positions):
    model = decoder(positions=positions)
    batch = tokens()
    changed = batch.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    before, after = model(batch), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after).abs().amax(-1)[:, 12:] > 0).all()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "none"])
@torch.no_grad()
def test_greedy_decoding_with_a_cache_gives_the_same_tokens(positions, window):
    """The prompts of both sequences begin alike, which a fork in pages computes once."""
    model = decoder(positions=positions, window=window, kv_heads=2)
    start, ends = tokens(7)[:1], tokens(3)
    whole = torch.cat((start.expand(2, -1), ends), dim=1)
    for _ in range(12):
        whole = torch.cat((whole, model(whole)[:, -1:].argmax(-1)), dim=1)
    assert len(set(whole[:, 10:].flatten().tolist())) > 4  # not one token again and again

    cache = KVCache(2, 21, **model.cache_shape)
    new = whole[:, :10]
    contiguous = [new]
    for _ in range(12):
        new = model(new, cache.append(new.shape[1]))[:, -1:].argmax(-1)
        contiguous.append(new)
    assert torch.equal(torch.cat(contiguous, dim=1), whole)

    pages = PagedKVCache(12, 4, **model.cache_shape)
    first = pages.allocate()
    model(start, pages.append([first], 7))
    both, new = [first, pages.fork(first)], ends
    paged = [start.expand(2, -1), ends]
    for _ in range(12):
        new = model(new, pages.append(both, new.shape[1]))[:, -1:].argmax(-1)
        paged.append(new)
    assert torch.equal(torch.cat(paged, dim=1), whole)
    assert pages.free_pages == 12 - (2 * 6 - 1)  # 21 tokens each; the first page is common


def test_every_scheme_but_none_sees_the_order():
    batch = tokens()
    permuted = batch.clone()
    permuted[:, [1, 5]] = permuted[:, [5, 1]]
    for positions, moved in (("rope", True), ("alibi", True), ("relative", True), ("none", False)):
        model = Decoder(TransformerConfig(**{**SIZES, "layers": 1}, positions=positions))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        # In one causal layer without positions the last token sees a bag of the ones before.
        difference = (model(batch) - model(permuted)).abs()[:, -1].max()
        assert (difference > 1e-3) == moved, (positions, difference)


def test_starts_near_a_uniform_guess_and_learns():
    model = Decoder(TransformerConfig(**SIZES))
    batch = tokens(33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.count_nonzero() > 0 for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)
    assert losses[-1] < 0.1


def test_residual_writers_start_smaller():
    model = Decoder(TransformerConfig(vocab_size=50, embed_dim=256, layers=8))
    block = model.blocks[3]
    for weight in (block.attention.q_proj.weight, block.feed_forward.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (block.attention.out_proj.weight, block.feed_forward.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_layers_share_their_rotary_tables_also_when_cast():
    model = Decoder(TransformerConfig(**SIZES)).to(torch.bfloat16)
    tables = {block.attention.rotary.cos.data_ptr() for block in model.blocks}
    assert len(tables) == 1 and model.blocks[0].attention.rotary.cos.dtype == torch.float32


def test_parameter_count():
    model = Decoder(TransformerConfig(**SIZES, kv_heads=2, ffn_dim=40, tied_embeddings=False))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 40 + 2 * 32
    assert model.parameter_count() == 2 * 50 * 32 + 3 * block + 32


def test_another_attention_is_called_in_every_layer():
    calls = []

    def last_value(q, k, v, **options):
        calls.append(options["window"])
        return v

    model = Decoder(TransformerConfig(**SIZES, window=3), attention=last_value)
    model(tokens())
    assert calls == [(3, 0)] * 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="batch"), "norm: expected one of 'rms', 'layer', got 'batch'"),
        (dict(activation="relu"), "activation: expected one of 'swiglu', 'gelu', got 'relu'"),
        (dict(window=0), "window: expected at least 1 or None, got 0"),
        (dict(layers=0), "layers: expected at least 1, got 0"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SIZES, **options})


def test_refuses_bad_tokens():
    model = Decoder(TransformerConfig(**SIZES, max_positions=8))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(batch, seqlen\), got \(5,\)"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="max_positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="cache: expected one of 3 layers, got 1"):
        model(torch.zeros(1, 3, dtype=torch.long), KVCache(1, 4, 4, 8).append(3))
