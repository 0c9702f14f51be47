"""Low-rank adapters of whole models: which layers get them, that they go again, their files, and training."""

import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import pynlp.nn
from pynlp.decoding import greedy
from pynlp.models import Decoder, TransformerConfig
from pynlp.nn import Linear4bit, Linear8bit, LoRALinear
from pynlp.quantize import add_adapters, load_adapters, quantize_, remove_adapters, save_adapters

TOKENS = torch.arange(10)[None]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(48, 32), nn.GELU(), pynlp.nn.Linear(32, 48, bias=False), nn.LayerNorm(48))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def randomize(model: nn.Module) -> None:
    """Adapters that are not 0."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)


def adapted(make=small, how=None, **options) -> nn.Module:
    model = make()
    if how:
        quantize_(model, how)
    add_adapters(model, **{"rank": 4, "alpha": 6, **options})
    randomize(model)
    return model


def state_of(model: nn.Module) -> dict:
    return {name: x.clone() for name, x in model.state_dict().items()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("how", [None, "nf4", "int8"])
def test_layers_and_what_trains(how):
    model, x = small(), torch.randn(3, 48)
    if how:
        quantize_(model, how)
    expected = model(x)
    adapters = add_adapters(model, rank=4, alpha=6, dropout=0.1)
    assert adapters.layers == ("0", "2") and adapters.skipped == {}
    assert trained(model) == {f"{i}.lora_{x}" for i in "02" for x in "AB"}
    assert adapters.trained == 2 * 4 * (48 + 32) and adapters.total == adapters.trained + 2 * 48 * 32 + 32 + 2 * 48
    assert str(adapters) == "2 layers with adapters: 640 of 3840 values train (16.7 %)"
    assert (model[0].rank, model[0].alpha, model[2].dropout) == (4, 6, 0.1)
    assert torch.equal(model(x), expected)
    assert add_adapters(small().bfloat16(), dtype=torch.float32).trained == 2 * 8 * (48 + 32)


@pytest.mark.parametrize("how", [None, "nf4", "int8"])
def test_removed_adapters_leave_nothing(how):
    model = small()
    model[3].bias.requires_grad_(False)
    if how:
        quantize_(model, how)
    before, trained_before, layers = state_of(model), trained(model), list(model)
    add_adapters(model)
    randomize(model)
    model[0].merge()
    assert remove_adapters(model) == {}
    assert all(a is b for a, b in zip(model, layers, strict=True)) and trained(model) == trained_before
    assert_unchanged(model, before)
    assert vars(model).keys() == vars(small()).keys()


@pytest.mark.parametrize("how", [None, "nf4", "int8"])
@pytest.mark.parametrize("make", [small, gpt2])
def test_merged_adapters(make, how):
    """Whose weights are the sums of the layers' and the products; a layer of GPT-2 has it turned."""
    model = adapted(make, how)
    sums = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            base = layer.base
            weight = base.weight if how is None else base.dequantize()
            weight = weight.T if isinstance(base, Conv1D) else weight
            sums[name] = weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    plain = make()
    trained_before = trained(plain) - (set() if how is None else {f"{name}.weight" for name in sums})
    errors = remove_adapters(model, merge=True)
    assert errors.keys() == sums.keys() and trained(model) == trained_before
    for name, exact in sums.items():
        layer = model.get_submodule(name)
        assert type(layer) is {None: type(plain.get_submodule(name)), "nf4": Linear4bit, "int8": Linear8bit}[how]
        weight = layer.weight if how is None else layer.dequantize()
        weight = weight.T if isinstance(layer, Conv1D) else weight
        error = (weight.double() - exact).norm() / exact.norm()
        assert error < {None: 1e-6, "nf4": 0.2, "int8": 0.02}[how]
        assert errors[name] == pytest.approx(error.item(), rel=1e-2) if how else errors[name] == 0


def test_a_merge_that_fails_changes_nothing():
    model = adapted()
    before = state_of(model)
    model[2].lora_B.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2: base.weight \+ scaling .* got NaN or an infinity"):
        remove_adapters(model, merge=True)
    assert not model[0].merged and isinstance(model[0], LoRALinear)
    model[2].lora_B.data[0, 0] = before["2.lora_B"][0, 0]
    assert_unchanged(model, before)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_layers_that_are_left_out():
    changed, hooked, quantized = nn.Linear(8, 8), nn.Linear(8, 8), Linear8bit(8, 8)
    changed.forward = lambda x: x
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    quantized.register_forward_hook(lambda module, inputs, output: None)
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(32, 2), "own": Own(8, 8), "changed": changed, "hooked": hooked,
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "quantized": quantized,
        "lazy": nn.LazyLinear(3), "plain": nn.Linear(8, 8), "other": nn.Linear(8, 8),
    })  # fmt: skip
    reasons = {
        "attention.out_proj": "MultiheadAttention reads its weight",
        "own": "Own: it has a forward of its own",
        "changed": "Linear: it has a forward of its own",
        "hooked": "it has hooks",
        "normed": "its weight is not a parameter",
        "quantized": "it has hooks",
        "lazy": "its weight is not there yet",
    }
    adapters = add_adapters(model)
    assert adapters.skipped == reasons and adapters.layers == ("plain", "other")
    assert not model["lazy"].weight.requires_grad
    assert "attention.out_proj  left out: MultiheadAttention reads its weight" in str(adapters)
    remove_adapters(model)
    assert add_adapters(model, target=["o*"]).layers == ("other",)  # nothing is said of layers that it does not fit
    remove_adapters(model)
    with pytest.raises(ValueError, match="model: expected linear layers that target fits .* {'own': 'Own: it has"):
        add_adapters(model, target=["own"])


def test_a_named_layer_whose_weight_the_module_around_it_reads():
    """T5 reads its dtype, nn.MultiheadAttention its values: with the adapter's, and gradients to that."""
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    assert len(add_adapters(t5, target=["*.wo"]).layers) == 2
    randomize(t5)
    with torch.no_grad():
        expected = t5(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        remove_adapters(t5, merge=True)
        torch.testing.assert_close(t5(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, expected)
    model, x = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2)}), torch.randn(5, 1, 32)
    add_adapters(model, target=["*out_proj"])
    randomize(model)
    y = model["attention"](x, x, x)[0]
    y.sum().backward()
    assert model["attention"].out_proj.lora_B.grad.abs().sum() > 0
    remove_adapters(model, merge=True)
    torch.testing.assert_close(model["attention"](x, x, x)[0], y)


@pytest.mark.parametrize("target", [["lm_head"], ["*", "*head"]])
def test_a_tied_head_only_by_name(target):
    model = gpt2()
    adapters = add_adapters(model)
    assert adapters.skipped == {"lm_head": "tied to transformer.wte"} and len(adapters.layers) == 8
    remove_adapters(model)
    trained_before, embedding = trained(model), model.transformer.wte.weight.clone()
    assert add_adapters(model, target=target).layers[-1] == "lm_head"
    assert not model.transformer.wte.weight.requires_grad
    randomize(model)
    expected = logits(model)
    remove_adapters(model, merge=True)  # into the head's weight alone
    torch.testing.assert_close(logits(model), expected)
    assert torch.equal(model.transformer.wte.weight, embedding) and model.lm_head.weight.requires_grad
    assert trained(model) == trained_before | {"lm_head.weight"}


def test_a_layer_in_two_places_and_two_layers_of_one_weight():
    first, second, twice = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = nn.Sequential(first, twice, second, twice)
    adapters, x = add_adapters(model), torch.randn(3, 16)
    assert adapters.layers == ("0", "1", "2") and model[1] is model[3]
    randomize(model)
    expected = model(x)
    assert not torch.allclose(model[0].weight, model[2].weight)
    remove_adapters(model, merge=True)
    torch.testing.assert_close(model(x), expected)
    assert model[1] is model[3] and all(p.requires_grad for p in model.parameters())


def test_quantization_below_adapters():
    model, x = adapted(), torch.randn(3, 48)
    expected = model(x)
    report = quantize_(model, "int8")
    assert [layer.name for layer in report.layers] == ["0.base", "2.base"]
    assert 0 < (model(x) - expected).norm() / expected.norm() < 0.05
    remove_adapters(model, merge=True)
    assert isinstance(model[0], Linear8bit)
    assert (model(x) - expected).norm() / expected.norm() < 0.05


def test_a_decoder_of_ours_decodes():
    """Its head has an adapter, too."""
    model = Decoder(TransformerConfig(vocab_size=30, embed_dim=32, layers=2, heads=4, tied_embeddings=False)).eval()
    quantize_(model, "nf4")
    add_adapters(model, target=["*"])
    randomize(model)
    tokens, results = torch.randint(30, (2, 7)), []
    assert model.blocks[0].attention.cache_bytes_per_token() == 2 * 32 * 4
    for merge in (False, True):
        if merge:
            exact = copy.deepcopy(model)
            for parent in model.modules():
                for name, layer in parent._modules.items():
                    if isinstance(layer, LoRALinear):
                        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                        plain.weight.data = layer.weight.detach()
                        if layer.bias is not None:
                            plain.bias.data = layer.bias.data
                        parent._modules[name] = plain
            with torch.no_grad():
                torch.testing.assert_close(model(tokens), exact(tokens), rtol=1e-3, atol=1e-4)
        state = model.decoding_state(len(tokens), max_length=32)
        results.append([x.tokens for x in greedy(state, tokens, end=29, max_length=14)])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["adapters.safetensors", "folder/of folders"])
@pytest.mark.parametrize("how", [None, "nf4"])
def test_save_and_load(name, how, tmp_path):
    """Into a model with adapters, whose parameters stay the same objects, and into one without."""
    model, x = adapted(how=how, dropout=0.25), torch.randn(3, 48)
    model.eval()
    model[0].merge()
    save_adapters(model, tmp_path / name)
    file = tmp_path / name if name.endswith("tensors") else tmp_path / name / "lora_adapters.safetensors"
    assert os.listdir(file.parent) == [file.name]
    assert load_file(file).keys() == {f"{i}.lora_{x}" for i in "02" for x in "AB"}
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["pynlp_lora"])
    assert facts == {i: dict(rank=4, alpha=6, dropout=0.25, rslora=False) for i in "02"}
    model[0].unmerge()
    remove = copy.deepcopy(model)
    remove_adapters(remove)
    fresh, present = remove, copy.deepcopy(remove)
    load_adapters(fresh, tmp_path / name)
    assert torch.equal(fresh(x), model(x)) and trained(fresh) == trained(model)
    assert fresh[0].dropout == 0.25 and not fresh[0].training
    add_adapters(present, rank=4, alpha=99)
    parameters = dict(present.named_parameters())
    load_adapters(present, str(tmp_path / name))
    assert torch.equal(present(x), model(x)) and all(parameters[n] is p for n, p in present.named_parameters())


def test_files_keep_their_dtype_and_options(tmp_path):
    model = nn.Sequential(LoRALinear(nn.Linear(8, 6), 2, 3, rslora=True, dtype=torch.float16))
    nn.init.normal_(model[0].lora_B)
    save_adapters(model, tmp_path)
    other = nn.Sequential(nn.Linear(8, 6))
    load_adapters(other, tmp_path)
    assert other[0].lora_A.dtype == torch.float16 and other[0].scaling == 3 / 2**0.5
    assert torch.equal(other[0].lora_B, model[0].lora_B)


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    model = adapted()
    save_adapters(model, tmp_path)
    before = (tmp_path / "lora_adapters.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for layout in ("pynlp", "peft"):
        with pytest.raises(OSError, match="No space left"):
            save_adapters(adapted(), tmp_path, layout=layout)
    assert os.listdir(tmp_path) == ["lora_adapters.safetensors"]
    assert (tmp_path / "lora_adapters.safetensors").read_bytes() == before


def written(folder, change=lambda tensors, facts: None, metadata=True):
    model = adapted()
    save_adapters(model, folder)
    file = folder / "lora_adapters.safetensors"
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["pynlp_lora"])
    tensors = load_file(file)
    change(tensors, facts)
    save_file(tensors, file, {"pynlp_lora": json.dumps(facts)} if metadata else None)


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.pop("0.lora_B"), "path: .*: expected lora_A and lora_B of 0, got lora_A"),
        (
            lambda t, f: t.update({"0.weight": torch.ones(2, 2)}),
            r"matrices <layer>.lora_A .* got 0.weight, torch.float32",
        ),
        (lambda t, f: t.update({"0.lora_A": torch.ones(4)}), r"got 0.lora_A, torch.float32 \(4,\)"),
        (lambda t, f: t.update({"0.lora_A": torch.ones(4, 48).int()}), r"got 0.lora_A, torch.int32 \(4, 48\)"),
        (lambda t, f: t.clear(), "expected adapters, got none"),
        (lambda t, f: f.pop("0"), "expected rank, alpha, dropout and rslora of 0, got None"),
        (lambda t, f: f.update({"0": 3}), "expected rank, alpha, dropout and rslora of 0, got 3"),
        (lambda t, f: f.update({"7": f["0"]}), "expected tensors of 7, got none"),
        (lambda t, f: f["2"].update(rank=3), "expected rank 3 of 2, got 4 rows of lora_A"),
        (lambda t, f: f["2"].update(alpha="x"), "2: alpha: expected a number, got str"),
        (lambda t, f: f["2"].update(dropout=2), "2: dropout: expected at least 0"),
        (
            lambda t, f: (t.update({"0.lora_A": torch.ones(4, 47)}), t.update({"2.lora_B": torch.ones(49, 4)})),
            r"got 0.lora_A: shape \(4, 48\), not \(4, 47\) as in the file; 2.lora_B: shape \(48, 4\), not \(49, 4\)",
        ),
    ],
)
def test_damaged_files_change_nothing(change, message, has_adapters, tmp_path):
    written(tmp_path, change)
    model = adapted() if has_adapters else small()
    before, trained_before = state_of(model), trained(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert_unchanged(model, before)
    assert trained(model) == trained_before


def test_adapters_of_another_model_change_nothing(tmp_path):
    save_adapters(adapted(gpt2), tmp_path)
    others = {
        "h.0.attn.c_attn: no such layer; transformer.h.0.attn.c_proj: no such layer; .*; and 5 more": small(),
        "c_attn: no such layer; .*; and 7 more": adapted(),
        r"c_attn: a layer without an adapter, where others have one; .*and 1 more": adapted(gpt2, target=["*.c_proj"]),
        r"c_attn.lora_A: shape \(5, 32\), not \(4, 32\)": adapted(gpt2, rank=5),
    }
    for message, model in others.items():
        before = state_of(model)
        with pytest.raises(ValueError, match=f"model: expected the one whose adapters are in .*{message}"):
            load_adapters(model, tmp_path)
        assert_unchanged(model, before)
    save_adapters(adapted(gpt2, target=["*.c_proj"]), tmp_path / "few")
    with pytest.raises(ValueError, match="h.0.attn.c_attn: an adapter that is not in the file"):
        load_adapters(adapted(gpt2), tmp_path / "few")
    save_adapters(adapted(), tmp_path / "small")
    hooked, normed, merged = small(), small(), adapted()
    hooked[0].register_forward_hook(lambda *x: None)
    normed[0] = nn.LayerNorm(48)
    merged[0].merge()
    for message, model in {"0: it has hooks": hooked, "0: LayerNorm, which": normed, "0: .* is merged": merged}.items():
        with pytest.raises(ValueError, match=message):
            load_adapters(model, tmp_path / "small")


def test_bad_paths(tmp_path):
    model = adapted()
    for path in (tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="path: expected .*none.*, got no such file"):
            load_adapters(model, path)
    with pytest.raises(FileNotFoundError, match="lora_adapters.safetensors or adapter_config.json, got neither"):
        load_adapters(model, tmp_path)
    written(tmp_path, metadata=False)
    with pytest.raises(ValueError, match="path: .*: expected adapters that save_adapters wrote, got other tensors"):
        load_adapters(model, tmp_path)
    (tmp_path / "lora_adapters.safetensors").write_bytes(b"12345678 not one")
    with pytest.raises(ValueError, match="path: .*: expected a whole file of safetensors, got"):
        load_adapters(model, tmp_path)
    save_adapters(model, tmp_path, layout="peft")
    with pytest.raises(ValueError, match="got both"):
        load_adapters(model, tmp_path)
    with pytest.raises(ValueError, match="path: expected a folder with layout='peft', got .*x.safetensors"):
        save_adapters(model, tmp_path / "x.safetensors", layout="peft")
    with pytest.raises(ValueError, match="layout: expected 'pynlp', 'peft', got 'hf'"):
        save_adapters(model, tmp_path, layout="hf")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(target="0"), TypeError, "target: expected a sequence of names, got '0'"),
        (dict(target=[0]), TypeError, r"target: expected a sequence of names, got \[0\]"),
        (dict(target=["0", "head"]), ValueError, "target: expected names of linear layers, got 'head', which fit none"),
        (dict(rank=0), ValueError, "rank: expected at least 1, got 0"),
        (dict(dropout=1), ValueError, "dropout: expected at least 0 and less than 1"),
        (dict(dtype=torch.int8), TypeError, "dtype: expected"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = small()
    before, trained_before = state_of(model), trained(model)
    with pytest.raises(error, match=message):
        add_adapters(model, **arguments)
    assert_unchanged(model, before)
    assert trained(model) == trained_before
    for call in (remove_adapters, lambda model: save_adapters(model, "nowhere")):
        with pytest.raises(ValueError, match="model: expected layers with adapters inside of it, got none"):
            call(model)
    add_adapters(model)
    with pytest.raises(ValueError, match="model: expected one without adapters, got some in 0, 2"):
        add_adapters(model)
    with pytest.raises(ValueError, match="got none; a layer by itself: pynlp.nn.LoRALinear"):
        add_adapters(nn.Linear(4, 4), target=[])
    for wrong in (None, model[0]):
        with pytest.raises(TypeError, match="model: expected an nn.Module with linear layers inside of it, got"):
            add_adapters(wrong)


def test_training_over_a_quantized_model(tmp_path):
    """The loss falls, the quantized weights stay; a run from its file goes on with the same bits."""
    dense = gpt2()

    def quantized():
        model = copy.deepcopy(dense)
        quantize_(model, "nf4", double_quant=True)
        return model

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(model(tokens, labels=tokens).loss)
            losses[-1].backward()
            optimizer.step()
        return [loss.item() for loss in losses]

    tokens = torch.arange(48).view(4, 12) % 5
    model = quantized()
    before = state_of(model)
    add_adapters(model, rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0] - 0.3
    save_adapters(model, tmp_path)
    other = quantized()
    load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(other, again, 3) == train(model, optimizer, 3)
    remove_adapters(model)
    assert_unchanged(model, before)
