"""The transformers against those of transformers and torch.nn with the same weights, and their contract."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

from pynlp.models import Decoder, Encoder, EncoderDecoder, TransformerConfig, config
from pynlp.nn import KVCache, attention, feed_forward

SIZES = dict(vocab_size=50, embed_dim=32, layers=3, heads=4)


POSITIONS = ["rope", "relative", "alibi", "sinusoidal", "learned", "none"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    torch.set_num_threads(1)


def randomized(kind, **options):
    model = kind(TransformerConfig(**SIZES, **options))
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
    ours = randomized(Decoder, kv_heads=2, ffn_dim=40, window=window, tied_embeddings=tied)
    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=tied,
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


def test_parts_are_those_of_the_modules():
    assert set(config.POSITIONS) == {*attention.POSITIONS, *config.ADDED_POSITIONS} == set(POSITIONS)
    assert set(config.ACTIVATIONS) == set(feed_forward.ACTIVATIONS)


@pytest.mark.parametrize("positions", POSITIONS)
def test_scaled_embeddings(positions):
    """They are those of a model whose embeddings are larger by the root of the width, but for the projection."""
    options = dict(positions=positions, tied_embeddings=False)
    model, scaled = (randomized(EncoderDecoder, **options, scale_embeddings=on).double() for on in (False, True))
    model.load_state_dict(scaled.state_dict())
    source, target = tokens(7), tokens(9)
    if positions != "sinusoidal":
        with torch.no_grad():
            assert not torch.allclose(model(source, None, target), scaled(source, None, target))
            for embedding in (model.embedding, model.source_embedding):
                embedding.weight *= SIZES["embed_dim"] ** 0.5
    torch.testing.assert_close(model(source, None, target), scaled(source, None, target))


def test_equals_gpt_neox():
    """LayerNorm, GELU, RoPE."""
    ours = randomized(Decoder, norm="layer", activation="gelu", tied_embeddings=False)
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


def torch_parameters(block, layer):
    """Each parameter of torch's layer with those of ours that it consists of."""
    norms, attentions = [block.attention_norm, block.feed_forward_norm], [(block.attention, layer.self_attn)]
    if hasattr(layer, "multihead_attn"):
        norms.insert(1, block.cross_attention_norm)
        attentions.append((block.cross_attention, layer.multihead_attn))
    for i, norm in enumerate(norms, 1):
        theirs = getattr(layer, f"norm{i}")
        yield from ((theirs.weight, [norm.weight]), (theirs.bias, [norm.bias]))
    for ours, theirs in attentions:
        yield theirs.in_proj_weight, [ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]
        yield theirs.out_proj.weight, [ours.out_proj.weight]
    yield layer.linear1.weight, [block.feed_forward.up_proj.weight]
    yield layer.linear2.weight, [block.feed_forward.down_proj.weight]


def stack_parameters(ours, theirs):
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        yield from torch_parameters(block, layer)
    if ours.norm is None:
        theirs.norm = None  # torch.nn.Transformer has one with post-norm, too
    else:
        yield from ((theirs.norm.weight, [ours.norm.weight]), (theirs.norm.bias, [ours.norm.bias]))


@torch.no_grad()
def give_weights(theirs, parameters):
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()  # those of projections, which ours have not
    for parameter, ours in parameters:
        parameter.copy_(torch.cat(ours))


def sinusoids(seqlen, dim):
    angles = torch.arange(seqlen)[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def padding(lengths, seqlen):
    return torch.arange(seqlen) >= lengths[:, None]


PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 2e-4)]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_encoder_equals_torchs(pre_norm, activation, dtype, tolerance):
    ours = randomized(Encoder, norm="layer", activation=activation, pre_norm=pre_norm, positions="learned").to(dtype)
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(32), enable_nested_tensor=False).to(dtype)
    parameters = list(stack_parameters(ours, theirs))
    give_weights(theirs, parameters)
    batch, lengths = tokens(), torch.tensor([20, 13], dtype=torch.int32)
    embedded = (ours.embedding(batch) + ours.positions.weight[:20]).detach().requires_grad_()
    expected = theirs(embedded, src_key_padding_mask=padding(lengths, 20))
    features = ours(batch, lengths)

    there = ~padding(lengths, 20)
    torch.testing.assert_close(features[there], expected[there], rtol=tolerance, atol=tolerance)
    weight = torch.randn(2, 20, 32, dtype=dtype) * there[:, :, None]
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    for theirs, ours_of_it in parameters:
        gradient = torch.cat([parameter.grad for parameter in ours_of_it])
        torch.testing.assert_close(gradient, theirs.grad, rtol=tolerance, atol=tolerance * gradient.abs().max().item())
    by_position = embedded.grad.sum(0)
    torch.testing.assert_close(
        ours.positions.weight.grad[:20], by_position, rtol=tolerance, atol=tolerance * by_position.abs().max().item()
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "activation, pre_norm, tied", [("relu", True, True), ("relu", False, False), ("gelu", False, True)]
)
def test_encoder_decoder_equals_torchs(activation, pre_norm, tied, dtype, tolerance):
    ours = randomized(
        EncoderDecoder, norm="layer", activation=activation, pre_norm=pre_norm, positions="sinusoidal",
        encoder_layers=2, tied_embeddings=tied,
    ).to(dtype)  # fmt: skip
    theirs = nn.Transformer(
        32, 4, 2, 3, 128, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    ).to(dtype)
    parameters = [*stack_parameters(ours.encoder, theirs.encoder), *stack_parameters(ours.decoder, theirs.decoder)]
    give_weights(theirs, parameters)
    embedding, source_embedding, output = (
        embedding.weight.detach().clone().requires_grad_()
        for embedding in (ours.embedding, ours.source_embedding or ours.embedding, ours.output or ours.embedding)
    )
    if tied:
        source_embedding = output = embedding
    source, target, lengths = tokens(18), tokens(15), torch.tensor([18, 11], dtype=torch.int32)
    mask = padding(lengths, 18)
    decoded = theirs(
        source_embedding[source] * 32**0.5 + sinusoids(18, 32).to(dtype),
        embedding[target] * 32**0.5 + sinusoids(15, 32).to(dtype),
        tgt_mask=torch.ones(15, 15, dtype=torch.bool).triu(1),
        src_key_padding_mask=mask,
        memory_key_padding_mask=mask,
    )
    expected = decoded @ output.T
    logits = ours(source, lengths, target)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(ours.features(source, lengths, target), decoded, rtol=tolerance, atol=tolerance)

    weight = torch.randn(2, 15, 50, dtype=dtype)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    parameters += [(embedding, [ours.embedding.weight])]
    if not tied:
        parameters += [(source_embedding, [ours.source_embedding.weight]), (output, [ours.output.weight])]
    for theirs, ours_of_it in parameters:
        gradient = torch.cat([parameter.grad for parameter in ours_of_it])
        torch.testing.assert_close(gradient, theirs.grad, rtol=tolerance, atol=tolerance * gradient.abs().max().item())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", [Decoder, EncoderDecoder])
def test_a_token_sees_no_later_one(kind, positions):
    model = randomized(kind, positions=positions)
    source = () if kind is Decoder else (tokens(9), None)
    batch = tokens()
    changed = batch.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    before, after = model(*source, batch), model(*source, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after).abs().amax(-1)[:, 12:] > 0).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_encoders_token_sees_all_of_its_row_but_no_padding(positions):
    model = randomized(Encoder, positions=positions)
    batch, lengths = tokens(), torch.tensor([20, 13])
    features = model(batch, lengths)
    torch.testing.assert_close(features[1:, :13], model(batch[1:, :13]), rtol=1e-4, atol=1e-4)
    for place, seen in ((12, True), (13, False)):
        changed = batch.clone()
        changed[1, place] = (changed[1, place] + 1) % 50
        differs = (model(changed, lengths) != features).any(-1)
        assert not differs[0].any() and (differs[1, :13] == seen).all()


def test_an_encoders_window_reaches_to_both_sides():
    """Two tokens a layer."""
    model = randomized(Encoder, positions="rope", window=2)
    batch = tokens()
    changed = batch.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 50
    differs = (model(batch) != model(changed)).any(-1)[0].tolist()
    assert differs == [abs(i - 10) <= 3 * 2 for i in range(20)]


@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_of_a_source_changes_nothing(positions):
    model = randomized(EncoderDecoder, positions=positions)
    source, target, lengths = tokens(12), tokens(7), torch.tensor([12, 5])
    logits = model(source, lengths, target)
    changed = source.clone()
    changed[1, 5:] = (changed[1, 5:] + 1) % 50
    assert torch.equal(model(changed, lengths, target), logits)
    torch.testing.assert_close(model(source[1:, :5], None, target[1:]), logits[1:], rtol=1e-4, atol=1e-3)
    changed[1, 4] = (changed[1, 4] + 1) % 50
    assert (model(changed, lengths, target) != logits).any(-1).tolist() == [[False] * 7, [True] * 7]


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_scheme_but_none_sees_the_order(positions):
    batch = tokens()
    permuted = batch.clone()
    permuted[:, [1, 5]] = permuted[:, [5, 1]]
    model = Decoder(TransformerConfig(**{**SIZES, "layers": 1}, positions=positions))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    # In one causal layer without positions the last token sees a bag of the ones before.
    difference = (model(batch) - model(permuted)).abs()[:, -1].max()
    assert (difference > 1e-3) == (positions != "none")


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
        (dict(activation="silu"), "activation: expected one of 'swiglu', 'gelu', 'relu', got 'silu'"),
        (dict(positions="rotary"), "positions: expected one of 'rope', .*'none', got 'rotary'"),
        (dict(dropout=1.0), r"dropout: expected at least 0 and less than 1, got 1\.0"),
        (dict(encoder_layers=0), "encoder_layers: expected at least 1 or None, got 0"),
        (dict(embed_dim=33, positions="sinusoidal"), "embed_dim: expected an even number .*, got 33"),
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


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(source=torch.zeros(3).long()), ValueError, r"source: expected shape \(batch, seqlen\), got \(3,\)"),
        (dict(source=torch.zeros(2, 3)), TypeError, "source: expected dtype int64, got torch.float32"),
        (dict(source_lengths=torch.tensor([3])), ValueError, r"source_lengths: expected shape \(2,\), got \(1,\)"),
        (dict(source_lengths=torch.ones(2)), TypeError, "source_lengths: expected dtype int32, got torch.float32"),
        (dict(source_lengths=torch.tensor([3, 4])), ValueError, "source_lengths: expected values of 0 to 3, got 3 to"),
        (dict(target=torch.ones(2, 3)), TypeError, "target: expected dtype int64, got torch.float32"),
        (dict(target=torch.zeros(1, 3).long()), ValueError, r"target: expected 2 rows, one a source, got \(1, 3\)"),
    ],
)
def test_encoder_decoder_refuses_bad_tokens(arguments, error, message):
    model = EncoderDecoder(TransformerConfig(**SIZES))
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(error, match=message):
        model(**{"source": ids, "source_lengths": None, "target": ids, **arguments})
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\), got \(3,\)"):
        Encoder(TransformerConfig(**SIZES))(ids, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("model", [Encoder, Decoder, EncoderDecoder])
def test_made_on_the_meta_device(model, positions):
    """Weights can be given to a model that was made without memory; it then is the model that they are from."""
    config = TransformerConfig(**SIZES, positions=positions, tied_embeddings=False, norm="layer")
    usual = model(config).eval()
    meta = model(config, device="meta", dtype=torch.float64).eval()
    assert all(x.is_meta for x in meta.parameters()) and all(x.is_meta for x in meta.buffers())
    assert {x.dtype for x in meta.parameters()} == {torch.float64}
    weights = {name: x.double() for name, x in usual.state_dict().items()}
    meta.to_empty(device="cpu").load_state_dict(weights)
    tokens = torch.randint(0, config.vocab_size, (2, 5))
    arguments = (tokens, None, tokens) if model is EncoderDecoder else (tokens,)
    assert torch.equal(meta(*arguments), usual.double()(*arguments))
