"""Transformers with mixtures of experts: which blocks have them, padding, decoding, training."""

import pytest
import torch
import torch.nn.functional as F

from pynlp.decoding import greedy
from pynlp.models import Decoder, Encoder, EncoderDecoder, TransformerConfig
from pynlp.nn import FeedForward, HashRouter, MoE, TopKRouter, router_loss
from pynlp.nn.moe import moe_layers
from pynlp.training import Batches, ExpertLoad, Trainer, TrainingConfig, WarmupCosine

SIZES = dict(vocab_size=50, embed_dim=16, layers=4, heads=2, ffn_dim=24)


def config(**options) -> TransformerConfig:
    return TransformerConfig(**SIZES, ffn="moe", num_experts=4, **options)


def test_which_blocks_are_sparse():
    kinds = {every: [type(b.feed_forward) for b in Decoder(config(moe_every=every)).blocks] for every in (1, 2, 3)}
    assert kinds == {
        1: [MoE] * 4,
        2: [FeedForward, MoE] * 2,
        3: [FeedForward, FeedForward, MoE, FeedForward],
    }
    layer = Decoder(config(router="hash", top_k=1, shared_ffn_dim=8)).blocks[0].feed_forward
    assert isinstance(layer.router, HashRouter) and layer.shared_expert is not None
    options = dict(router_aux_loss_coef=0.1, router_z_loss_coef=0.2, bias_update_rate=0.3, capacity_factor=1.5)
    router = Decoder(config(**options)).blocks[0].feed_forward.router
    assert isinstance(router, TopKRouter) and {name: getattr(router, name) for name in options} == options
    model = Decoder(config())
    assert abs(model.blocks[0].feed_forward.gate_up_proj.std().item() - 0.02) < 2e-3
    assert model.blocks[0].feed_forward.down_proj.std() < 0.01


@pytest.mark.parametrize("router", ["top_k", "hash"])
def test_padding_goes_to_no_expert_and_changes_nothing(router):
    model = Encoder(config(router=router)).eval()
    tokens = torch.randint(50, (2, 9))
    lengths = torch.tensor([9, 5], dtype=torch.int32)
    features = model(tokens, lengths)
    assert all(layer.load.sum() == 2 * 14 for layer in moe_layers(model).values())
    torch.testing.assert_close(features[1, :5], model(tokens[1:, :5])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["top_k", "hash"])
def test_decoding_gives_what_the_whole_sequence_gives(router):
    model = Decoder(config(router=router)).eval()
    tokens = torch.randint(50, (3, 10))
    logits = model(tokens)
    state = model.decoding_state(batch=3, max_length=12)
    steps = [state.step(tokens[:, :4]), *(state.step(tokens[:, i : i + 1]) for i in range(4, 10))]
    torch.testing.assert_close(torch.stack(steps, 1), logits[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["top_k", "hash"])
def test_encoder_decoder(router):
    model = EncoderDecoder(config(router=router, moe_every=2)).eval()
    source, lengths = torch.randint(50, (2, 7)), torch.tensor([7, 4], dtype=torch.int32)
    target = torch.randint(50, (2, 5))
    logits = model(source, lengths, target)
    alone = model(source[1:, :4], None, target[1:])
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-4)
    first, _ = greedy(
        model.decoding_state(source, lengths, max_length=8), torch.tensor([[1], [1]]), end=2, max_length=7
    )
    assert len(first.tokens) <= 7
    packed, places = model.encode_packed(source, lengths)
    whole = model.encode(source, lengths).flatten(0, 1)[places]
    torch.testing.assert_close(packed, whole, rtol=1e-4, atol=1e-5)


def test_checkpointing_and_compile():
    model = Decoder(config(router_aux_loss_coef=0.1))
    tokens = torch.randint(50, (2, 8))

    def gradients():
        model.zero_grad()
        (model(tokens).square().mean() + router_loss(model)).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.checkpointing = True
    assert all(map(torch.equal, gradients(), expected))
    model.checkpointing = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_trainer_updates_the_biases(tmp_path):
    model = Decoder(config(bias_update_rate=0.01, router_z_loss_coef=0.001))
    texts = torch.randint(50, (40, 9))

    def loss(model, items):
        batch = texts[items]
        logits = model(batch[:, :-1]).flatten(0, 1)
        count = batch[:, 1:].numel()
        return F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum") + router_loss(model) * count, count

    batches = Batches([9] * 40, 72, torch.tensor)
    training = TrainingConfig(steps=3, learning_rate=1e-3, schedule=WarmupCosine(warmup=1, steps=3), batches_per_step=2)
    load = ExpertLoad(model)
    Trainer(model, loss, training, batches, tmp_path).train()
    load.record(3)
    biases = [layer.router.expert_bias for layer in moe_layers(model).values()]
    assert all(0 < bias.abs().max() <= 0.0301 for bias in biases)
    assert all(row["tokens"] > 0 for row in load.rows())


def test_errors():
    for match, options in {
        "ffn: expected one of 'dense', 'moe', got 'sparse'": dict(ffn="sparse"),
        "router: expected one of 'top_k', 'hash', got 'random'": dict(router="random"),
        "moe_every: expected at least 1, got 0": dict(moe_every=0),
        "moe_every: expected at most the 4 layers, got 5": dict(ffn="moe", moe_every=5),
        "capacity_factor: expected none with router='hash'": dict(router="hash", capacity_factor=1.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            TransformerConfig(vocab_size=10, **options)
    with pytest.raises(ValueError, match="top_k: expected 1 to num_experts = 4, got 5"):
        Decoder(config(top_k=5))
