"""Whole models quantized in place: which layers, what they lose, and that nothing else changes."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import pynlp.nn
from pynlp.decoding import greedy
from pynlp.models import Decoder, TransformerConfig
from pynlp.nn import Linear4bit, Linear8bit, Linear8bitDynamic, LinearInt4
from pynlp.quantize import QUANTIZATIONS, quantize_


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), pynlp.nn.Linear(128, 64, bias=False), nn.LayerNorm(64))


def state_of(model: nn.Module) -> dict:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_layers_errors_and_bytes(how):
    model, x = small(), torch.randn(5, 64)
    dense, expected = copy.deepcopy(model), model(x)
    report = quantize_(model, how)
    kind = {"int8": Linear8bit, "int8_dynamic": Linear8bitDynamic, "int4": LinearInt4}.get(how, Linear4bit)
    assert isinstance(model[0], kind) and isinstance(model[2], kind) and model[2].bias is None
    assert [layer.name for layer in report.layers] == ["0", "2"] and report.skipped == {}
    for layer, number in zip(report.layers, (0, 2), strict=True):
        weight = dense[number].weight
        error = ((model[number].dequantize() - weight).norm() / weight.norm()).item()
        assert layer.error == pytest.approx(error, rel=1e-3) and 0 < error < (0.02 if how.startswith("int8") else 0.2)
        assert layer.sqnr == pytest.approx(-20 * torch.tensor(error).log10().item(), rel=1e-3)
        assert layer.shape == tuple(weight.shape) and layer.bytes_before == weight.nbytes
        assert layer.bytes_after == sum(x.nbytes for x in model[number].buffers())
    assert report.bytes_after < report.bytes_before * (0.28 if how.startswith("int8") else 0.16)
    assert (model(x) - expected).norm() / expected.norm() < (0.02 if how.startswith("int8") else 0.2)
    text = str(report)
    assert text.startswith(f"{how}: 2 layers, 0.07 MB before") and "128 x 64" in text


def test_options_reach_the_layers():
    model = small()
    quantize_(model, "nf4", double_quant=True, blocksize=128)
    assert model[0].nested_absmax is not None and model[0].blocksize == 128
    model = small()
    quantize_(model, "int8", scheme="affine", granularity="group", group_size=32)
    assert model[0].zero_point is not None and model[0].scale.shape == (128, 2)


def test_gpt2():
    """Its layers are Conv1D, of which attn.c_proj is square: the weight must be turned there, too; its head is tied."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model, tokens = GPT2LMHeadModel(config).eval(), torch.arange(10)[None]
    turned = copy.deepcopy(model)
    report = quantize_(model, "int8")
    assert len(report.layers) == 8 and report.skipped == {"lm_head": "tied to transformer.wte"}
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    for name, module in turned.named_modules():
        if isinstance(module, Conv1D):
            module.weight.data = model.get_submodule(name).dequantize().T
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, turned(tokens).logits, rtol=1e-4, atol=1e-5)


def decoded(model, tokens):
    state = model.decoding_state(len(tokens), max_length=16)
    return [hypothesis.tokens for hypothesis in greedy(state, tokens, end=29, max_length=14)]


def test_a_decoder_of_ours_decodes():
    """Over its cache, whose dtype the layers tell, and with the products of a head that is not tied."""
    config = TransformerConfig(vocab_size=30, embed_dim=32, layers=2, heads=4, tied_embeddings=False)
    model = Decoder(config).eval()
    report = quantize_(model, "nf4", blocksize=32)
    assert len(report.layers) >= 13
    tokens = torch.randint(30, (2, 7))
    dense = copy.deepcopy(model)
    for parent in dense.modules():
        for name, layer in parent._modules.items():
            if isinstance(layer, Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight.data = layer.dequantize()
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data
                parent._modules[name] = plain
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-3, atol=1e-4)
        assert decoded(model, tokens) == decoded(dense, tokens)
    assert torch.equal(model.output_weight, dense.output_weight)
    block = model.blocks[0].attention
    assert block.cache_bytes_per_token() == 2 * 32 * 4
    model.to(torch.bfloat16)
    assert block.cache_bytes_per_token() == 2 * 32 * 2 and len(decoded(model, tokens)) == 2


def test_skip():
    model = nn.ModuleDict({"body": small(), "head": nn.Linear(64, 10)})
    report = quantize_(model, "nf4", skip=["head", "*.2"])
    assert [layer.name for layer in report.layers] == ["body.0"]
    assert report.skipped == {"body.2": "in skip", "head": "in skip"}
    assert type(model["head"]) is nn.Linear and "body.2  kept: in skip" in str(report)


def test_what_stays_dense():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    changed, hooked = nn.Linear(8, 8), nn.Linear(8, 8)
    changed.forward = lambda x: x
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(32, 2), "own": Own(8, 8), "changed": changed, "hooked": hooked,
        "lazy": nn.LazyLinear(3), "complex": nn.Linear(8, 8, dtype=torch.complex64), "plain": nn.Linear(8, 8),
    })  # fmt: skip
    report = quantize_(model, "int8")
    assert report.skipped == {
        "attention.out_proj": "MultiheadAttention reads its weight",
        "own": "Own: it has a forward of its own",
        "changed": "Linear: it has a forward of its own",
        "hooked": "it has hooks",
        "lazy": "its weight is not there yet",
        "complex": "its weight is torch.complex64",
    }
    assert [layer.name for layer in report.layers] == ["plain"]
    assert report.model_before - report.model_after == report.bytes_before - report.bytes_after
    with pytest.raises(ValueError, match="model: expected linear layers to quantize inside of it, got {'attention.out"):
        quantize_(model, "nf4")  # a quantized layer is not quantized again


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_modules_that_read_their_layers_weights(how):
    """PyTorch's fast path of an encoder, and T5, which casts to the dtype of a weight."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(64, 8)})
    report = quantize_(model, how)
    assert report.skipped["encoder.layers.0.linear1"] == "TransformerEncoderLayer reads its weight"
    with torch.no_grad():
        assert model["encoder"](torch.randn(2, 10, 64)).isfinite().all()
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    report = quantize_(t5, how)
    assert {name.rpartition(".")[2] for name in report.skipped} == {"wo", "lm_head"} and len(report.layers) > 12
    with torch.no_grad():
        tokens = torch.arange(5)[None]
        assert t5(input_ids=tokens, decoder_input_ids=tokens).logits.isfinite().all()


def test_in_inference_mode():
    model = small()
    with torch.inference_mode():
        quantize_(model, "nf4")
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()


def test_layers_of_one_weight_are_quantized_and_any_name_skips_them():
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "same": first, "c": nn.Linear(32, 8)})
    assert quantize_(copy.deepcopy(model), "nf4", skip=["same"]).skipped == {
        "a": "in skip",
        "b": "tied to a",
    }
    assert len(quantize_(model, "nf4").layers) == 3


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert len(quantize_(model, "nf4").layers) == 1
    assert model[0] is model[2] and isinstance(model[0], Linear4bit)


def test_save_and_load(tmp_path):
    model, x = small(), torch.randn(3, 64)
    quantize_(model, "nf4", double_quant=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = small()
    quantize_(other, "nf4", double_quant=True)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(other(x), model(x))
    from_dense, dense = small(), small()
    quantize_(from_dense, "int8")
    from_dense.load_state_dict(dense.state_dict())
    quantize_(dense, "int8")
    assert_unchanged(from_dense, dense.state_dict())


def test_plot(tmp_path):
    quantize_(small(), "nf4").plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(how="nf5"), ValueError, "how: expected 'int8', 'int8_dynamic', 'int4', 'nf4', 'fp4', 'mxfp4', got 'nf5'"),
        (dict(skip="0"), TypeError, "skip: expected a sequence of names, got '0'"),
        (dict(skip=["0", "head"]), ValueError, "skip: expected names of linear layers, got 'head', which fit none"),
        (dict(blocksize=48), ValueError, "blocksize: expected 32"),
        (dict(group_size=32), TypeError, "options: expected blocksize, double_quant with how='nf4', got group_size"),
        (dict(skip=None), TypeError, "skip: expected a sequence of names, got None"),
        (dict(skip=[0]), TypeError, "skip: expected a sequence of names"),
        (dict(how="int8", scheme="signed"), ValueError, "scheme: expected 'symmetric'"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = small()
    before = state_of(model)
    with pytest.raises(error, match=message):
        quantize_(model, **{"how": "nf4", **arguments})
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="inside of it, got none; a layer by itself: from_linear"):
        quantize_(nn.Linear(4, 4), "nf4")
    with pytest.raises(TypeError, match="model: expected an nn.Module, got NoneType"):
        quantize_(None, "nf4")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_bad_weight_is_named_and_nothing_changed(value):
    model = small().double()
    model[2].weight.data[3, 5] = value
    before = {name: x.nan_to_num() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"2\.weight: expected finite values in fp32, got NaN or an infinity"):
        quantize_(model, "nf4")
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(x.nan_to_num(), before[name]) for name, x in model.state_dict().items())
