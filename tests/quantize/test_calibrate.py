"""Quantization by what layers read: the codes of GPTQ, scales that change nothing, and that errors fall."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pynlp.models import Decoder, EncoderDecoder, TransformerConfig
from pynlp.nn import Linear4bit, Linear8bit, LinearInt4
from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize import calibrate, quantize_
from pynlp.quantize.activations import Runs, running
from pynlp.quantize.awq import smoothquant_scale
from pynlp.quantize.folding import Source, source_of, weight_of
from pynlp.quantize.gptq import Hessian, factor_of, quantize_with
from pynlp.quantize.model import make_plan


def gpt2() -> nn.Module:
    """A model of Conv1D layers, queries, keys and values in one, with biases; its head is tied."""
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=80, n_positions=32, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    return uneven(GPT2LMHeadModel(config))


def llama(kv_heads: int = 4) -> nn.Module:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=80
    )  # fmt: skip
    return uneven(LlamaForCausalLM(config))


def ours(**options) -> nn.Module:
    return uneven(Decoder(TransformerConfig(vocab_size=80, embed_dim=64, layers=2, **options)))


def uneven(model: nn.Module) -> nn.Module:
    """A model some of whose channels are much larger than others, as in trained ones."""
    for module in model.modules():
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and weight.dim() == 1:
            weight.data *= 1 + 10 * (torch.rand_like(weight) > 0.95)
        elif weight is not None:
            nn.init.normal_(weight, std=0.05)
        if bias is not None:
            nn.init.normal_(bias, std=0.1)
    return model.eval()


def some_tokens(count: int = 4) -> list[torch.Tensor]:
    return [torch.randint(80, (4, 24)) for _ in range(count)]


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


def state_of(model: nn.Module) -> dict:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())
    for module in model.modules():
        assert not isinstance(module, QuantizedLinear) and "forward" not in vars(module)
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_singular_hessian_is_damped_until_it_works():
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(5, 64)
    with pytest.warns(UserWarning, match="singular Hessians of 0, 2; damping raised, to 0.0001 at most"):
        calibrate(model, [x], "nf4", damping=0)
    assert model(x).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(nn.Sequential(nn.Linear(64, 32)), [x], "nf4")


def test_a_layer_reads_what_quantized_ones_before_it_give():
    model, batches = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32)), list(torch.randn(3, 40, 96))
    dense = copy.deepcopy(model)
    calibrate(model, batches, "nf4", activation_order=False)
    for number, inputs in ((0, batches), (2, [dense[1](model[0](x)) for x in batches])):
        hessian = Hessian(inputs[0].shape[1], inputs[0].device)
        for x in inputs:
            hessian.add(x)
        expected = Linear4bit.from_linear(dense[number])
        factor, _ = factor_of(hessian.matrix, 0.01)
        quantize_with(expected, dense[number].weight, factor, torch.arange(inputs[0].shape[1]))
        assert torch.equal(model[number].weight, expected.weight) and model[number].bias is not dense[number].bias


@pytest.mark.parametrize("make", [gpt2, llama, ours])
@pytest.mark.parametrize(
    ("method", "how", "most"),
    [("gptq", "nf4", 0.8), ("gptq", "int8", 0.9), ("gptq", "int4", 0.8), ("awq", "nf4", 0.95)],
)
def test_models_lose_less_than_rounded_to_nearest(make, method, how, most):
    model, tokens = make(), torch.randint(80, (8, 24))
    exact, errors = logits_of(model, tokens), []
    nearest = copy.deepcopy(model)
    expected = quantize_(nearest, how)
    model.train()
    report = calibrate(model, some_tokens(), how, method=method)
    assert all(module.training for module in model.modules()) and report.how == f"{how} by {method}"
    assert str(report).startswith(f"{how} by {method}: {len(report.layers)} layers")
    assert [x[:2] + x[4:] for x in report.layers] == [x[:2] + x[4:] for x in expected.layers]
    assert report[2:] == expected[2:]
    for x in report.layers:
        kind = {"int8": Linear8bit, "int4": LinearInt4, "nf4": Linear4bit}[how]
        assert type(model.get_submodule(x.name)) is kind
    for other in (model.eval(), nearest):
        errors.append((logits_of(other, tokens) - exact).norm())
    assert errors[0] < most * errors[1]
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("make", [gpt2, llama, ours])
def test_inputs_and_weights_in_8_bits_lose_less_when_smoothed(make):
    model, tokens = make(), torch.randint(80, (8, 24))
    exact, nearest = logits_of(model, tokens), copy.deepcopy(model)
    quantize_(nearest, "int8_dynamic")
    calibrate(model, some_tokens(), "int8_dynamic", method="smoothquant")
    assert not any(module.training for module in model.modules())
    errors = [(logits_of(other, tokens) - exact).norm() for other in (model, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_scale_of_smoothquant():
    weights, largest = [torch.randn(5, 6), torch.randn(3, 6)], torch.rand(6) + 0.1
    weights[0][:, 2] = weights[1][:, 2] = 0
    largest[4] = 0
    scale = smoothquant_scale(weights, largest, 0.75)
    live = torch.tensor([0, 1, 3, 5])
    expected = largest[live] ** 0.75 / torch.cat(weights).abs().amax(0)[live] ** 0.25
    torch.testing.assert_close(scale[live], expected / expected.log().mean().exp())
    assert scale[2] == scale[4] == 1


class Relu(nn.Module):
    """Whose second layer's inputs grow with the first one's; the norm's result is added, too, so it must stay."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.norm(x)
        return x + self.down(self.up(x).relu())


SOURCES = {
    gpt2: {"c_attn": ("ln_1", 0), "attn.c_proj": ("c_attn", 128), "c_fc": ("ln_2", 0), "mlp.c_proj": None},
    llama: {
        "q_proj": ("input_layernorm", 0), "o_proj": ("v_proj", 0), "gate_proj": ("post_attention_layernorm", 0),
        "down_proj": ("up_proj", 0),
    },
    lambda: llama(kv_heads=2): {
        "q_proj": ("input_layernorm", 0), "o_proj": None, "gate_proj": ("post_attention_layernorm", 0),
        "down_proj": ("up_proj", 0),
    },
    ours: {
        "q_proj": ("attention_norm", 0), "out_proj": ("v_proj", 0), "up_proj": ("feed_forward_norm", 0),
        "down_proj": ("up_proj", 170),
    },
    lambda: ours(pre_norm=False, norm="layer", activation="relu"): {
        "q_proj": None, "out_proj": ("v_proj", 0), "up_proj": None, "down_proj": ("up_proj", 0)
    },
    lambda: nn.Sequential(nn.Embedding(80, 64), Relu()): {"up": None, "down": ("up", 0)},
}  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), SOURCES.items())
def test_scales_are_folded_where_the_model_stays_the_same(make, expected):
    """In fp64, with scales that are no powers of two."""
    model, tokens = make().double().eval(), torch.randint(80, (4, 24))
    exact = logits_of(model, tokens)
    plan = make_plan(model, "int8", ["lm_head"] if hasattr(model, "lm_head") else [], {})
    before, found = state_of(model), {}
    with torch.no_grad(), running(model, some_tokens(2), plan.chosen) as runs:
        names = {module: name for name, module in model.named_modules()}
        sources = []
        for unit in runs.units:
            results = runs.results(unit)
            for group in unit.groups:
                source = source_of(runs, unit, group, results)
                found[names[group[0]]] = source and (names[source.module], source.rows.start or 0)
                sources.append((group, source))
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
        for group, source in sources:
            if source is not None:
                scale = torch.rand(weight_of(group[0]).shape[1], dtype=torch.float64) * 3 + 0.1
                divided = source.divide(scale, weight_of(source.module))
                torch.testing.assert_close(divided, scale, rtol=1e-12, atol=0)
                for layer in group:
                    weight = weight_of(layer)
                    weight *= divided
    torch.testing.assert_close(logits_of(model, tokens), exact, rtol=1e-9, atol=1e-9)
    assert len(found) == len(expected) * sum(name.endswith(next(iter(expected))) for name in found)
    for name, (source, start) in ((name, x) for name, x in found.items() if x is not None):
        [wanted] = [x for end, x in expected.items() if name.endswith(end)]
        assert wanted is not None and source.endswith(wanted[0]) and start == wanted[1], (name, source, start)
    assert {end for end, x in expected.items() if x is None} == {
        end for end in expected for name, x in found.items() if name.endswith(end) and x is None
    }


def test_a_norm_that_others_read_stays():
    """A layer in skip reads it and is not scaled."""
    model = ours()
    norms = {name: x.clone() for name, x in model.named_parameters() if "norm" in name}
    calibrate(model, some_tokens(1), "int8", method="smoothquant", skip=["*0.attention.k_proj"])
    after = dict(model.named_parameters())
    changed = {name for name, x in norms.items() if not torch.equal(x, after[name])}
    assert changed == {
        "blocks.0.feed_forward_norm.weight", "blocks.1.attention_norm.weight", "blocks.1.feed_forward_norm.weight"
    }  # fmt: skip


def test_a_norm_in_16_bits_is_rounded_and_what_it_was_divided_by_is_not():
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.data[5] = 0
    weight, bias, scale = norm.weight.detach().float(), norm.bias.detach().float(), torch.rand(64) + 0.5
    divided = Source(norm, slice(None)).divide(scale, norm.weight.detach())
    assert not torch.equal(divided, scale) and divided[5] == scale[5]
    torch.testing.assert_close(divided, scale, rtol=2**-8, atol=0)
    torch.testing.assert_close(norm.weight.float() * divided, weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.bias.float(), (bias / divided).bfloat16().float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_a_model_in_16_bits(method):
    model, tokens = llama().bfloat16(), torch.randint(80, (4, 24))
    wide = copy.deepcopy(model).float()
    exact = logits_of(wide, tokens)
    report = calibrate(model, some_tokens(), "int8", method=method)
    nearest = copy.deepcopy(wide)
    quantize_(nearest, "int8")
    layer = model.model.layers[0].mlp.down_proj
    assert layer.compute_dtype == layer.dtype == torch.bfloat16 and logits_of(model, tokens).dtype == torch.bfloat16
    assert report.bytes_before == 2 * sum(x.shape[0] * x.shape[1] for x in report.layers)
    error = (logits_of(model.float(), tokens) - exact).norm()
    assert error < 1.2 * (logits_of(nearest, tokens) - exact).norm()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    """A list of blocks, whose results are put together in several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.blocks = way, nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x, rounds=1):
        if self.way == "skip":  # as a U-Net
            first = self.blocks[0](x)
            return self.blocks[3](self.blocks[2](self.blocks[1](first)) + first)
        for block in list(self.blocks) * rounds:
            x = block(x)
            if self.way == "in place":
                x += 1
        return x


def batches_of(model: nn.Module) -> list:
    if not isinstance(model, Blocks):
        return some_tokens(2)
    return [dict(x=torch.randn(20, 32), rounds=rounds) for rounds in (1, 2 if model.way == "twice" else 1)]


@pytest.mark.parametrize(
    ("make", "is_replayed"),
    [
        (gpt2, True),
        (lambda: Blocks("in place"), True),
        (lambda: Blocks("skip"), False),
        (lambda: Blocks("twice"), False),
    ],
)
def test_blocks_are_replayed_where_that_changes_nothing(make, is_replayed):
    model = make()
    with torch.no_grad(), running(model, batches_of(model), make_plan(model, "int8", [], {}).chosen) as runs:
        assert runs._is_replaying is is_replayed


@pytest.mark.parametrize("make", [llama, gpt2, ours, *(lambda w=w: Blocks(w) for w in ("twice", "skip", "in place"))])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_replayed_is_what_would_be_computed(make, method, monkeypatch):
    model = make()
    batches = batches_of(model)
    other = copy.deepcopy(model)
    calibrate(model, batches, "nf4", method=method)
    monkeypatch.setattr(Runs, "_replays", lambda self, inputs: False)
    calibrate(other, batches, "nf4", method=method)
    states = model.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())


def test_blocks_are_replayed():
    """Else time grows with the square of their number."""
    model, calls = llama(), []
    model.model.layers[0].register_forward_hook(lambda *_: None)
    for block in model.model.layers:
        block.input_layernorm.register_forward_hook(lambda *_, block=block: calls.append(block))
    calibrate(model, some_tokens(3), "nf4")
    counts = [calls.count(block) for block in model.model.layers]
    # A run that traces, for each batch; one of a batch that tries; four groups, and one whose result is kept.
    assert counts[0] == 3 + 1 + 4 * 3 + 3 and counts[1] <= counts[0] + 1


def test_an_encoder_decoder_and_batches_of_arguments():
    config = TransformerConfig(vocab_size=80, embed_dim=64, layers=2, tied_embeddings=False)
    model = uneven(EncoderDecoder(config))
    batches = [
        dict(source=x[:2], source_lengths=torch.tensor([24, 9], dtype=torch.int32), target=x[2:])
        for x in some_tokens(6)
    ]
    nearest, held_out = copy.deepcopy(model), batches.pop()
    with torch.no_grad():
        exact = model(**held_out)
        calibrate(model, (batch for batch in batches), "nf4")
        quantize_(nearest, "nf4")
        assert (model(**held_out) - exact).norm() < 0.9 * (nearest(**held_out) - exact).norm()


def test_layers_that_no_batch_reaches():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x, number):
            return self.experts[number](x)

    model = Experts()
    dense = copy.deepcopy(model)
    batches = [dict(x=torch.randn(9, 64), number=0), dict(x=torch.randn(9, 64), number=2)]
    with pytest.warns(UserWarning, match=r"no batch reaches experts\.1; rounded to nearest"):
        report = calibrate(model, batches, "nf4")
    assert [x.name for x in report.layers] == ["experts.0", "experts.1", "experts.2"]
    quantize_(dense, "nf4")
    assert torch.equal(model.experts[1].weight, dense.experts[1].weight)
    assert not torch.equal(model.experts[2].weight, dense.experts[2].weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(how="nf5"), ValueError, "how: expected 'int8', .*, got 'nf5'"),
        (dict(method="hqq"), ValueError, "method: expected 'gptq', 'awq', 'smoothquant', got 'hqq'"),
        (dict(skip="0"), TypeError, "skip: expected a sequence of names, got '0'"),
        (dict(blocksize=48), ValueError, "blocksize: expected 32"),
        (dict(damping=-1), ValueError, "damping: expected at least 0, got -1"),
        (dict(damping="1"), TypeError, "damping: expected a number, got '1'"),
        (dict(damping=float("nan")), ValueError, "damping: expected at least 0, got nan"),
        (dict(activation_order=1), TypeError, "activation_order: expected True or False, got 1"),
        (dict(method="smoothquant", alpha=1.5), ValueError, "alpha: expected at least 0 and at most 1, got 1.5"),
        (dict(alpha=0.5), TypeError, "options: expected blocksize, double_quant, damping, activation_order with"),
        (
            dict(method="awq", damping=1),
            TypeError,
            "options: expected blocksize, double_quant with how='nf4', got damp",
        ),
        (dict(batches=[]), ValueError, "batches: expected at least one, got none"),
        (dict(batches=torch.zeros(1, 4)), TypeError, "batches: expected an iterable of tensors or dicts, got Tensor"),
        (dict(batches=None), TypeError, "batches: expected an iterable of tensors or dicts, got NoneType"),
        (dict(batches=[[1, 2]]), TypeError, "batches: expected tensors or dicts, got list"),
        (dict(batches=[dict(words=3)]), TypeError, "unexpected keyword argument 'words'"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = ours()
    before = state_of(model)
    arguments = dict(batches=some_tokens(1), how="nf4") | arguments
    with pytest.raises(error, match=message):
        calibrate(model, **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_whatever_fails_on_the_way_leaves_the_model_unchanged(method, kind, monkeypatch):
    model = gpt2().train()
    before, parameters, puts = state_of(model), dict(model.named_parameters()), []

    def fails(linear, **options):
        puts.append(linear)
        if len(puts) == 120:  # scales of AWQ are tried with layers, too
            raise kind("no")
        return made(linear, **options)

    made = Linear4bit.from_linear
    monkeypatch.setattr(Linear4bit, "from_linear", fails)
    if method != "awq":
        puts += [None] * 113
    with pytest.raises(kind, match="no"):
        calibrate(model, some_tokens(1), "nf4", method=method)
    assert_unchanged(model, before)
    assert all(x is parameters[name] for name, x in model.named_parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_inputs_that_are_not_finite(method):
    model = ours()
    model.embedding.weight.data[7, 3] = torch.inf
    before = state_of(model)
    with pytest.raises(ValueError, match=r"batches: expected finite inputs of blocks\.0\.attention\.q_proj, got NaN"):
        calibrate(model, [torch.arange(10)[None]], "nf4", method=method)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"weight: expected values, got a weight on the meta device"):
        calibrate(ours().to("meta"), [torch.arange(10)[None]], "nf4", method=method)
