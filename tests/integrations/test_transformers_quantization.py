"""Models of transformers quantized by `quantization_config=PynlpConfig(..)`, saved, and loaded as they were."""

import copy
import json
import re

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pynlp.integrations.transformers import PynlpConfig
from pynlp.nn import Linear8bit
from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize import QUANTIZATIONS, add_adapters, quantize_, remove_adapters

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
MODELS = {
    "gpt2": (  # its layers are Conv1D, its head is tied
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=1),
        8,
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES), 15),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**SIZES, num_labels=3), 14),
}
OPTIONS = {
    "int8": dict(scheme="affine", granularity="group", group_size=16),
    "nf4": dict(double_quant=True),
    "fp4": dict(blocksize=32),
}
TOKENS = torch.arange(2, 12)[None]
models = pytest.mark.parametrize("name", MODELS)
hows = pytest.mark.parametrize("how", QUANTIZATIONS)


def saved(name, path, **options):
    cls, config, _ = MODELS[name]
    cls(config).save_pretrained(path, **options)
    return cls


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and torch.equal(actual[name], x), name


@pytest.fixture
def nothing_is_quantized(monkeypatch):
    """Nothing with values: what is loaded must be what was saved."""
    for cls, _ in QUANTIZATIONS.values():

        def on_meta(layer, weight, original=cls._quantize, **options):
            assert weight.is_meta or weight.numel() == 16, "a weight was quantized"  # the 16 are to check options
            return original(layer, weight, **options)

        monkeypatch.setattr(cls, "_quantize", on_meta)


@pytest.fixture
def small(tmp_path):
    """The folder of a quantized Llama, and its tensors."""
    cls = saved("llama", tmp_path / "dense")
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=PynlpConfig("nf4"))
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small", load_file(tmp_path / "small" / "model.safetensors")


@models
@hows
def test_loading_does_what_quantize_does(how, name, tmp_path):
    cls = saved(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config = PynlpConfig(how, **OPTIONS.get(how, {}))
    model = cls.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    expected = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    report = quantize_(expected, how, **OPTIONS.get(how, {}))
    assert_same_state(model, expected)
    assert len(layers_of(model)) == MODELS[name][2] and model.hf_quantizer.report == report
    assert {type(layer) for layer in layers_of(model).values()} == {QUANTIZATIONS[how][0]}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


@models
@hows
def test_saved_and_loaded_bit_for_bit(how, name, tmp_path, request):
    """In many files; then saved and loaded once more."""
    cls = saved(name, tmp_path / "dense")
    config, dtype = PynlpConfig(how, **OPTIONS.get(how, {})), torch.float32 if name == "bert" else torch.bfloat16
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=dtype, device_map="cpu")
    request.getfixturevalue("nothing_is_quantized")
    model.save_pretrained(tmp_path / "1", max_shard_size="10KB")
    assert len(list((tmp_path / "1").glob("model-*.safetensors"))) > 1
    loaded = cls.from_pretrained(tmp_path / "1")
    assert loaded.dtype == dtype and not loaded.training
    loaded.save_pretrained(tmp_path / "2")
    again = cls.from_pretrained(tmp_path / "2", device_map="cpu")
    with torch.no_grad():
        expected = model(TOKENS).logits
        for other in (loaded, again):
            assert_same_state(other, model)
            assert other.hf_quantizer.report is None
            assert not any(x.is_meta for x in (*other.parameters(), *other.buffers()))
            assert torch.equal(other(TOKENS).logits, expected)


def test_the_config_file(tmp_path):
    cls = saved("gpt2", tmp_path / "dense")
    config = PynlpConfig("nf4", skip=["*.c_attn", "lm_head"], blocksize=128)
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(layers_of(model)) == 6 and not any("c_attn" in name for name in layers_of(model))
    assert model.transformer.h[0].mlp.c_fc.blocksize == 128
    model.save_pretrained(tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "pynlp", "how": "nf4", "skip": ["*.c_attn", "lm_head"], "blocksize": 128}
    assert PynlpConfig.from_dict(written).to_dict() == written
    loaded = cls.from_pretrained(tmp_path / "small")
    assert_same_state(loaded, model)
    assert loaded.config.quantization_config.to_dict() == written


def test_loaded_in_another_dtype(small):
    """The codes stay as they are; what is dense, and results, have it."""
    path, tensors = small
    model = hf.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight, tensors[f"{name}.weight"]) and layer.compute_dtype == torch.bfloat16
        assert torch.equal(layer.absmax, tensors[f"{name}.weight.absmax"]) and layer.absmax.dtype == torch.float32
    assert model(TOKENS).logits.dtype == torch.bfloat16


@models
def test_a_model_quantized_in_memory(name, tmp_path, request):
    cls, config, _ = MODELS[name]
    model = cls(copy.deepcopy(config)).eval()
    quantize_(model, "nf4", double_quant=True)
    model.config.quantization_config = PynlpConfig("nf4", double_quant=True)
    model.save_pretrained(tmp_path)
    request.getfixturevalue("nothing_is_quantized")
    assert_same_state(cls.from_pretrained(tmp_path), model)


def test_the_body_of_a_model_with_a_head(tmp_path):
    """Whose names have no prefix."""
    cls = saved("gpt2", tmp_path / "dense")
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=PynlpConfig("int8", skip=["lm_head"]))
    model.save_pretrained(tmp_path / "small")
    body = hf.GPT2Model.from_pretrained(tmp_path / "small")
    assert len(layers_of(body)) == 8
    assert_same_state(body, model.transformer)


def test_gradients_go_through(small):
    model = hf.LlamaForCausalLM.from_pretrained(small[0])
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()


def test_what_could_not_be_loaded_is_not_saved(small, tmp_path):
    model = hf.LlamaForCausalLM.from_pretrained(small[0])
    add_adapters(model, rank=2)
    with pytest.raises(ValueError, match="model: expected no adapters, which save_adapters writes"):
        model.save_pretrained(tmp_path / "other")
    remove_adapters(model)
    model.model.layers[0].mlp.up_proj = Linear8bit(64, 32)
    with pytest.raises(ValueError, match="expected Linear4bits, as .* says, got Linear8bit as model.layers.0.mlp.up"):
        model.save_pretrained(tmp_path / "other")


def test_errors_of_the_config():
    with pytest.raises(ValueError, match="how: expected 'int8', .*, got 'nf5'"):
        PynlpConfig("nf5")
    with pytest.raises(TypeError, match="options: expected blocksize, double_quant with how='nf4', got scheme"):
        PynlpConfig("nf4", scheme="affine")
    with pytest.raises(ValueError, match="blocksize: expected 32, .*, got 48"):
        PynlpConfig("nf4", blocksize=48)
    with pytest.raises(TypeError, match="skip: expected a sequence of names, got 'lm_head'"):
        PynlpConfig("nf4", skip="lm_head")
    with pytest.raises(ValueError, match="quant_method: expected 'pynlp', got 'awq'"):
        PynlpConfig("nf4", quant_method="awq")


def test_errors_of_loading(tmp_path):
    cls = saved("llama", tmp_path)
    with pytest.raises(ValueError, match="skip: expected names of linear layers, got 'head', which fit none"):
        cls.from_pretrained(tmp_path, quantization_config=PynlpConfig("nf4", skip=["head"]))
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map: expected one device, got cpu, disk"):
        cls.from_pretrained(
            tmp_path, quantization_config=PynlpConfig("nf4"), device_map=places, offload_folder=tmp_path / "disk"
        )


LAYER = "model.layers.1.mlp.up_proj"


def without(tensors, pattern):
    return {name: x for name, x in tensors.items() if not re.search(pattern, name)}


DAMAGES = {
    "no scales": (lambda x: without(x, f"{LAYER}.weight.absmax"), f"{LAYER}, .*expected absmax"),
    "no state": (
        lambda x: without(x, f"{LAYER}.weight.quant_state"),
        f"{LAYER}, .*expected a dense weight, or a quant",
    ),
    "no codes": (lambda x: without(x, f"{LAYER}.weight$"), f"{LAYER}, .*Missing key.*weight"),
    "no layer": (lambda x: without(x, LAYER), f"expected quantized weights of {LAYER}, got none"),
    "another layer's": (
        lambda x: x | {name: x[name.replace("up", "down")].clone() for name in x if LAYER in name},
        rf"{LAYER}, .*expected shape \(48, 32\), got \(32, 48\)",
    ),
    "fewer codes": (
        lambda x: x | {f"{LAYER}.weight": x[f"{LAYER}.weight"][:-1].clone()},
        f"{LAYER}, .*packed: expected 768 bytes",
    ),
    "dense beside scales": (
        lambda x: x | {f"{LAYER}.weight": torch.zeros(48, 32)},
        f"expected codes as {LAYER}.weight, got a dense weight",
    ),
    "dense": (
        lambda x: without(x, rf"{LAYER}.weight\.") | {f"{LAYER}.weight": torch.zeros(48, 32)},
        f"expected quantized weights of {LAYER}, got none",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_that_are_not_whole(damage, small):
    path, tensors = small
    change, message = DAMAGES[damage]
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s)checkpoint: .*{message}"):
        hf.LlamaForCausalLM.from_pretrained(path)


def test_a_truncated_file(small):
    path = small[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        hf.LlamaForCausalLM.from_pretrained(small[0])


def test_a_checkpoint_of_another_method(small):
    config = json.loads((small[0] / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (small[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig but you are passing a PynlpConfig"):
        hf.LlamaForCausalLM.from_pretrained(small[0], quantization_config=PynlpConfig("nf4"))
