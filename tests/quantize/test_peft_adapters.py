"""Files of adapters in PEFT's layout: those that PEFT wrote, and those that it reads."""

import copy
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from pynlp.nn import LoRALinear
from pynlp.quantize import add_adapters, load_adapters, remove_adapters, save_adapters

TOKENS = torch.arange(10)[None]


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()


def randomize(model: nn.Module) -> None:
    """Adapters that are not 0."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)


def state_of(model: nn.Module) -> dict:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def peft_files(folder, tensors, **config):
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    written = {f"base_model.model.{name}.weight": x for name, x in tensors.items()}
    save_file(written, folder / "adapter_model.safetensors", {"format": "pt"})
    defaults = dict(
        alora_invocation_tokens=None, alpha_pattern={}, arrow_config=None, auto_mapping=None,
        base_model_name_or_path="gpt2", bias="none", corda_config=None, ensure_weight_tying=False, eva_config=None,
        exclude_modules=None, fan_in_fan_out=True, inference_mode=True, init_lora_weights=True, layer_replication=None,
        layers_pattern=None, layers_to_transform=None, loftq_config={}, lora_alpha=16, lora_bias=False,
        lora_dropout=0.05, megatron_config=None, megatron_core="megatron.core", modules_to_save=None,
        peft_type="LORA", peft_version="0.21.2", qalora_group_size=16, r=4, rank_pattern={}, revision=None,
        target_modules=["c_attn"], target_parameters=None, task_type="CAUSAL_LM", trainable_token_indices=None,
        use_bdlora=None, use_dora=False, use_qalora=False, use_rslora=False,
    )  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**defaults, **config}))


def peft_tensors(model, ranks) -> dict:
    """Random adapters by layers' names, of these ranks."""
    tensors = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        outputs, inputs = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        tensors[f"{name}.lora_A"] = torch.randn(rank, inputs) * 0.2
        tensors[f"{name}.lora_B"] = torch.randn(outputs, rank) * 0.2
    return tensors


@pytest.mark.parametrize("make", [gpt2, llama])
def test_adapters_that_peft_wrote(make, tmp_path):
    """Patterns fit the end of a name; the first that fits holds; GPT-2's weights are turned, PEFT's never."""
    if make is gpt2:
        first, second, head = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj"
        patterns = dict(
            rank_pattern={"mlp.c_proj": 3}, alpha_pattern={r".*h\.1\.attn\.c_attn": 5, "c_proj": 2, "c_.*": 9}
        )
        config, scaling = patterns, {first: 9 / 4, second: 5 / 4, head: 2 / 3}
    else:
        first, second, head = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"
        patterns = dict(rank_pattern={"^lm_head": 3, "ayers.1.self_attn.q_proj": 9}, alpha_pattern={"layers.1.*": 5})
        config = patterns | dict(use_rslora=True, fan_in_fan_out=False)
        scaling = {first: 16 / 4**0.5, second: 5 / 4**0.5, head: 16 / 3**0.5}
    model = make()
    merged, tensors = copy.deepcopy(model), peft_tensors(model, {first: 4, second: 4, head: 3})
    peft_files(tmp_path, tensors, **config)
    load_adapters(model, tmp_path)
    for name, factor in scaling.items():
        layer = merged.get_submodule(name)
        update = factor * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        layer.weight.data += update.T if isinstance(layer, Conv1D) else update
    assert (logits(merged) - logits(make())).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)
    assert model.get_submodule(first).dropout == 0.05


def test_adapters_that_peft_reads(tmp_path):
    """The keys and the fields of its layout; ranks and weights that differ are patterns of whole names."""
    model = gpt2()
    add_adapters(model, rank=4, alpha=6, dropout=0.1, target=["*.c_attn", "*.1.mlp.c_fc"])
    parent = model.transformer.h[1].mlp
    parent.c_fc = LoRALinear(parent.c_fc.unload(), 2, 5, 0.1)
    randomize(model)
    save_adapters(model, tmp_path, layout="peft")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [f"transformer.h.{x}" for x in ("0.attn.c_attn", "1.attn.c_attn", "1.mlp.c_fc")]
    assert tensors.keys() == {f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
    assert torch.equal(tensors[f"base_model.model.{names[2]}.lora_A.weight"], parent.c_fc.lora_A)
    assert tensors[f"base_model.model.{names[0]}.lora_B.weight"].shape == (96, 4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = dict(peft_type="LORA", r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=False, bias="none")
    assert expected.items() <= config.items() and config["fan_in_fan_out"] is True
    all_names = [name for name, _ in model.named_modules()]
    assert [name for name in all_names if re.fullmatch(config["target_modules"], name)] == names
    exact = r"^transformer\.h\.1\.mlp\.c_fc"
    assert config["rank_pattern"] == {exact: 2} and config["alpha_pattern"] == {exact: 5}
    again = gpt2()
    again.load_state_dict(gpt2_state(model))
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))
    parent.c_fc.dropout = 0.2
    with pytest.raises(ValueError, match=r"expected adapters of one dropout with layout='peft', got \[0.1, 0.2\]"):
        save_adapters(model, tmp_path, layout="peft")


def gpt2_state(model) -> dict:
    model = copy.deepcopy(model)
    remove_adapters(model)
    return model.state_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(use_dora=True), "use_dora: expected none, for it is not supported, got True"),
        (dict(bias="lora_only"), "bias: expected 'none', got 'lora_only'"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save: expected none, .* got \['lm_head'\]"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights: expected True, .* got 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 2]]), "layer_replication: expected none"),
        (dict(target_parameters=["experts"]), "target_parameters: expected none"),
        (dict(field_of_the_future=1), "field_of_the_future: expected none"),
        (dict(peft_type="IA3"), "peft_type: expected 'LORA', got 'IA3'"),
        (dict(r=8), "expected rank 8 of transformer.h.0.attn.c_attn, got 4 rows of lora_A"),
        (dict(rank_pattern={"c_(attn": 4}), "rank_pattern: expected values by regular expressions, got "),
        (dict(alpha_pattern=[1]), "alpha_pattern: expected values by regular expressions, got "),
        (dict(lora_alpha=None), "c_attn: alpha: expected a number, got None"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message, tmp_path):
    model = gpt2()
    before = state_of(model)
    peft_files(tmp_path, peft_tensors(model, {"transformer.h.0.attn.c_attn": 4}), **config)
    with pytest.raises(ValueError, match=f"path: .*adapter_config.json: .*{message}"):
        load_adapters(model, tmp_path)
    assert_unchanged(model, before)


def test_damaged_folders_of_peft(tmp_path):
    model = gpt2()
    peft_files(tmp_path, {"transformer.wte.lora_embedding_A": torch.ones(4, 50)})
    with pytest.raises(
        ValueError, match="expected matrices base_model.model.<layer>.lora_A.weight .* got .*embedding_A"
    ):
        load_adapters(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="path: expected .*adapter_model.safetensors, got no such file"):
        load_adapters(model, tmp_path)
    for text, message in {"{": "Expecting property", "[]": "expected a JSON object, got list"}.items():
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"path: .*adapter_config.json: {message}"):
            load_adapters(model, tmp_path)


def test_the_real_peft(tmp_path):
    """Reads our files and writes what we read; neither changes a result."""
    peft = pytest.importorskip("peft")
    for make, options in [
        (gpt2, dict(target_modules=["c_attn", "c_proj"], rank_pattern={"mlp.c_proj": 3}, alpha_pattern={"c_attn": 5})),
        (llama, dict(target_modules="all-linear", use_rslora=True, rank_pattern={"^model.layers.0.mlp.up_proj": 4})),
    ]:
        base, folder = make(), tmp_path / make.__name__
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(fan_in_fan_out=make is gpt2, **options)
        ).eval()
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        theirs.save_pretrained(folder)
        ours = copy.deepcopy(base)
        load_adapters(ours, folder)
        assert (logits(theirs) - logits(base)).abs().max() > 0.1
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
        save_adapters(ours, folder / "ours", layout="peft")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
        assert torch.equal(logits(again), logits(theirs))
    # Of a head that has an adapter PEFT writes the base, too.
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["lm_head"])).eval()
    theirs.save_pretrained(tmp_path / "head")
    assert any(".base_layer." in name for name in load_file(tmp_path / "head" / "adapter_model.safetensors"))
    ours = llama()
    load_adapters(ours, tmp_path / "head")
    assert isinstance(ours.lm_head, LoRALinear)
