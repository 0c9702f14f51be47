"""Training transformers: every part learns, dropout, checkpointing, autocast, and what is shared or saved."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from pynlp.functional import attention
from pynlp.models import Decoder, Encoder, EncoderDecoder, TransformerConfig

SIZES = dict(vocab_size=30, embed_dim=32, layers=2, heads=4)
POSITIONS = ["rope", "relative", "alibi", "sinusoidal", "learned", "none"]
SOURCE_LENGTHS = torch.tensor([9, 6, 9, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    torch.set_num_threads(1)


def batch():
    """Sources, and targets that are their tokens in falling order."""
    source = torch.randint(2, 30, (4, 9))
    return source, source.sort(dim=1, descending=True).values


def loss_of(model):
    """The next token's loss on one fixed batch."""
    torch.manual_seed(1)
    source, target = batch()
    if isinstance(model, EncoderDecoder):
        logits = model(source, SOURCE_LENGTHS, target[:, :-1])
    else:
        logits = model(target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), target[:, 1:].flatten())


@pytest.mark.parametrize(
    "options",
    [dict(positions=positions) for positions in POSITIONS]
    + [
        dict(pre_norm=False, positions="sinusoidal", norm="layer", activation="relu"),
        dict(pre_norm=False, kv_heads=2, window=3, activation="gelu", tied_embeddings=False),
    ],
    ids=str,
)
def test_every_parameter_learns(options):
    model = EncoderDecoder(TransformerConfig(**SIZES, **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.count_nonzero() > 0 for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(30.0).log().item(), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("pre_norm", [True, False])
def test_dropout_is_in_every_place_and_only_in_training(pre_norm):
    """Two passes differ with dropout in any one place alone."""
    model = EncoderDecoder(TransformerConfig(**SIZES, dropout=0.2, pre_norm=pre_norm))
    source, target = batch()

    def differ():
        first, second = (model(source, SOURCE_LENGTHS, target) for _ in range(2))
        return not torch.equal(first, second)

    places = [(module, "dropout") for module in model.modules() if getattr(module, "dropout", None) == 0.2]
    places += [(stack.dropout, "p") for stack in (model.encoder, model.decoder)]
    # An encoder's block has two layers, a decoder's three, each with a norm; before a first pre-norm nothing is added.
    assert len(places) == 2 * (2 * 2 + 2 * 3) + 2 + (2 if pre_norm else 0)
    idle = [stack.blocks[0].attention_norm for stack in (model.encoder, model.decoder)] if pre_norm else []
    for module, name in places:
        setattr(module, name, 0.0)
    assert not differ()
    for module, name in places:
        setattr(module, name, 0.2)
        assert differ() == (module not in idle), module
        setattr(module, name, 0.0)
    for module, name in places:
        setattr(module, name, 0.2)
    model.eval()
    assert not differ()


@pytest.mark.parametrize("kind", [Encoder, Decoder, EncoderDecoder])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_checkpointing_gives_the_same_bits(kind, pre_norm):
    """Dropout included; and each block is computed twice."""
    model = kind(TransformerConfig(**SIZES, dropout=0.2, pre_norm=pre_norm, positions="relative"))
    source, target = batch()
    calls = []
    for module in model.modules():
        if hasattr(module, "blocks"):
            for block in module.blocks:
                block.register_forward_pre_hook(lambda module, inputs: calls.append(module))

    def bits(checkpointing):
        torch.manual_seed(2)
        model.checkpointing = checkpointing
        model.zero_grad()
        inputs = {Encoder: (source, SOURCE_LENGTHS), Decoder: (target,)}.get(kind, (source, SOURCE_LENGTHS, target))
        out = model(*inputs)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    kept = bits(False)
    blocks = len(calls)
    recomputed = bits(True)
    assert model.checkpointing and len(calls) == 3 * blocks
    for ours, expected in zip(recomputed, kept, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_autocast_to_bf16(pre_norm):
    """bf16 may miss fp32 by its rounding; with pre-norm all that is added up is fp32."""
    model = EncoderDecoder(TransformerConfig(**SIZES, dropout=0.1, pre_norm=pre_norm)).eval()
    source, target = batch()

    def logits_and_gradients():
        logits = model(source, SOURCE_LENGTHS, target)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
        return logits, torch.autograd.grad(loss, list(model.parameters()))

    dtypes = []
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        norm.register_forward_hook(
            lambda module, inputs, outputs: dtypes.append([x.dtype for x in (*inputs, *outputs)] if inputs[1:] else [])
        )
    expected, expected_gradients = logits_and_gradients()
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = logits_and_gradients()
        model.train()(source, SOURCE_LENGTHS, target).float().sum().backward()
    assert logits.dtype == torch.bfloat16
    bf16, fp32 = torch.bfloat16, torch.float32
    if pre_norm:
        assert all(seen in ([], [bf16, fp32, bf16, fp32]) for seen in dtypes) and dtypes.count([]) == 2 * 2
    for ours, exact in zip((logits, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == exact.dtype or ours is logits
        assert (ours - exact).norm() < 0.03 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_shared_and_own_matrices(tied):
    """Nothing is saved twice, and what is tied is one matrix."""
    model = EncoderDecoder(TransformerConfig(**SIZES, tied_embeddings=tied))
    state = model.state_dict()
    vocabulary = {name for name, x in state.items() if x.shape == (30, 32)}
    separate = {"embedding.weight", "source_embedding.weight", "output.weight"}
    assert vocabulary == ({"embedding.weight"} if tied else separate)
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    assert model.output_weight is (model.embedding if tied else model.output).weight
    assert model.parameter_count() == sum(x.numel() for x in state.values())
    decoder = Decoder(TransformerConfig(**SIZES, tied_embeddings=tied))
    assert decoder.output_weight is (decoder.embedding if tied else decoder.output).weight


def test_names_of_a_decoders_weights():
    """Saved files have these names."""
    layers = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]
    layers += ["attention_norm", "feed_forward_norm", "feed_forward.up_proj", "feed_forward.down_proj"]
    names = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    model = Decoder(TransformerConfig(**SIZES, tied_embeddings=False))
    assert set(model.state_dict()) == names | {"embedding.weight", "norm.weight", "output.weight"}


@pytest.mark.parametrize("kind", [Encoder, Decoder, EncoderDecoder])
def test_config_survives_json(kind):
    config = TransformerConfig(
        30, 32, 1, 4, kv_heads=2, ffn_dim=48, positions="learned", window=5, max_positions=40, norm="layer",
        activation="relu", tied_embeddings=False, dropout=0.1, pre_norm=False, encoder_layers=3,
    )  # fmt: skip
    again = TransformerConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    model, other = kind(config).eval(), kind(again).eval()
    other.load_state_dict(model.state_dict())
    source, target = batch()
    inputs = (source, SOURCE_LENGTHS, target) if kind is EncoderDecoder else (source,)
    assert torch.equal(model(*inputs), other(*inputs))


@pytest.mark.parametrize(
    "positions, option", [("relative", "relative_bias"), ("alibi", "alibi_slopes"), ("rope", "rotary")]
)
def test_only_self_attention_has_positions(positions, option):
    """Also where source and target are of one length, so that distances between them could be counted."""
    calls = []

    def recorded(q, k, v, **options):
        given = {name for name in ("relative_bias", "alibi_slopes", "rotary") if options[name] is not None}
        calls.append((given, options["causal"], options["window"]))
        return attention(q, k, v, **options)

    model = EncoderDecoder(TransformerConfig(**SIZES, positions=positions, window=3), attention=recorded)
    source, target = batch()
    model(source, SOURCE_LENGTHS, target)
    encoder, decoder, cross = ({option}, False, (3, 3)), ({option}, True, (3, 0)), (set(), False, None)
    assert calls == 2 * [encoder] + 2 * [decoder, cross]
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_bias")}
    assert len(tables) == (4 if positions == "relative" else 0) and not any("cross" in name for name in tables)
