"""What a mask of transformers becomes, and what falls back on transformers' own attention."""

import copy
import inspect
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers as hf
from cases.transformers import (
    BATCH,
    ENCODER_DECODERS,
    MODELS,
    PATCHED,
    SEQLEN,
    TARGET_SEQLEN,
    TOKENS,
    TRANSLATION,
    assert_same_gradients,
    assert_same_logits,
    inputs_of,
    pair,
)
from torch import nn
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sliding_window_causal_mask_function

import pynlp.integrations.transformers.attention as interface
from pynlp.integrations.transformers import Mask, patch
from pynlp.integrations.transformers.masks import structured_mask


def own_mask(seqlen):
    """A mask that is neither causal nor padding: bool (BATCH, 1, seqlen, seqlen), and as eager takes it."""
    seen = torch.rand(BATCH, 1, seqlen, seqlen) < 0.6
    seen |= torch.eye(seqlen, dtype=torch.bool)
    return seen, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "gpt2", "bert"])
def test_a_mask_of_ones_own_falls_back(name, form, fallbacks):
    """To sdpa; with a softcap or sinks, which sdpa has not, to the model's eager attention."""
    eager, fused = pair(name)
    inputs, _ = inputs_of(name)
    seen, added = own_mask(SEQLEN)
    masks = {"bool": seen, "float": added}
    if name in ("gemma2", "gpt-oss"):  # one for each kind of layer
        masks = {key: dict.fromkeys(("full_attention", "sliding_attention"), mask) for key, mask in masks.items()}
    expected = eager(**inputs, attention_mask=masks["float"]).logits
    actual = fused(**inputs, attention_mask=masks[form]).logits
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    assert (expected - eager(**inputs).logits).abs().max() > 1e-2
    (message,) = fallbacks()
    assert message.endswith("Attention runs on transformers' own attention: its mask was given as a tensor")


@pytest.mark.parametrize("name", ["mpt", "t5"])
def test_a_patched_model_takes_a_mask_of_ones_own(name, fallbacks):
    eager, fused = pair(name)
    inputs, _ = inputs_of(name)
    if name == "t5":  # its decoder's; the encoder's would be that of the cross-attention too
        _, added = own_mask(TARGET_SEQLEN)
        inputs["decoder_attention_mask"] = added
    else:
        _, added = own_mask(SEQLEN)
        inputs["attention_mask"] = added
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    (message,) = fallbacks()
    assert "its mask was given as a tensor" in message


@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_model_takes_gaps_in_the_padding(name, fallbacks):
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, "left")
    key = "decoder_attention_mask" if name == "t5" else "attention_mask"
    inputs[key][1, 4] = 0
    kept[1, 4] = False
    expected, actual = eager(**inputs).logits[kept], fused(**inputs).logits[kept]
    assert_same_logits(actual, expected)
    assert_same_gradients(fused, eager, actual, expected)
    (message,) = fallbacks()
    assert "there is padding between tokens of a row" in message


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "gemma2", "whisper", *PATCHED])
def test_weights_are_eagers(name, fallbacks):
    eager, fused = pair(name)
    inputs, _ = inputs_of(name)
    expected, actual = (model(**inputs, output_attentions=True) for model in (eager, fused))
    assert_same_logits(actual.logits, expected.logits)
    keys = [key for key in expected if key.endswith("attentions")]
    assert len(keys) == (3 if name in ENCODER_DECODERS else 1)
    for key in keys:
        assert len(actual[key]) == 2
        for ours, theirs in zip(actual[key], expected[key], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    (message,) = fallbacks()
    assert "output_attentions=True asks for the weights" in message


SMALL = TOKENS | dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
)
GPT = TOKENS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
OPT = TOKENS | dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
NOT_TOLD = {  # models that do not hand output_attentions on to their attention
    "gpt2": (hf.GPT2LMHeadModel, GPT),
    "gpt-bigcode": (hf.GPTBigCodeForCausalLM, GPT),
    "opt": (hf.OPTForCausalLM, OPT),
    "stablelm": (hf.StableLmForCausalLM, SMALL),
    "nemotron": (hf.NemotronForCausalLM, SMALL),
    "persimmon": (hf.PersimmonForCausalLM, SMALL),
}


@pytest.mark.parametrize("by", ["keyword", "config"])
@pytest.mark.parametrize("name", NOT_TOLD)
def test_weights_are_eagers_where_attention_is_not_told(name, by, fallbacks):
    cls, config = NOT_TOLD[name]
    eager = cls._from_config(cls.config_class(**config), attn_implementation="eager").eval()
    eager.config.output_attentions = by == "config"
    fused = copy.deepcopy(eager)
    fused.set_attn_implementation("pynlp")
    inputs, kept = inputs_of("llama", "left")
    wish = dict(output_attentions=True) if by == "keyword" else {}
    expected, actual = (model(**inputs, **wish).attentions for model in (eager, fused))
    assert len(actual) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        ours, theirs = (x.transpose(1, 2)[kept] for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    (message,) = fallbacks()
    assert "output_attentions=True asks for the weights" in message
    fused.config.output_attentions = False
    fused(**inputs)  # and no more than asked for
    assert fused(**inputs).attentions is None and fallbacks() == [message]


def test_blooms_own_order_of_sums_falls_back(fallbacks):
    eager, fused = pair("bloom", pretraining_tp=2, slow_but_exact=True)
    nn.init.normal_(eager.transformer.h[0].self_attention.dense.bias)  # which that order leaves out
    fused.load_state_dict(eager.state_dict())
    inputs, kept = inputs_of("bloom", "left")
    assert_same_logits(fused(**inputs).logits[kept], eager(**inputs).logits[kept])
    (message,) = fallbacks()
    assert "slow_but_exact asks for its own order of sums" in message


def test_an_unknown_mask_function_falls_back(fallbacks):
    """Gemma 3's attention to both sides overlays the causal mask with a function of its own."""
    eager, fused = pair("gemma3", use_bidirectional_attention=True)
    inputs, kept = inputs_of("gemma3", "right")
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert_same_logits(actual[kept], expected[kept])
    causal = pair("gemma3")[0]
    causal.load_state_dict(eager.state_dict())
    assert (causal(**inputs).logits - expected)[kept].abs().max() > 1e-2
    (message,) = fallbacks()
    assert "its mask function is none of the causal" in message


def test_gaps_in_the_padding_fall_back(fallbacks):
    eager, fused = pair("mistral")
    inputs, kept = inputs_of("mistral", "left")
    inputs["attention_mask"][1, 7] = 0
    kept[1, 7] = False
    assert_same_logits(fused(**inputs).logits[kept], eager(**inputs).logits[kept])
    (message,) = fallbacks()
    assert "there is padding between tokens of a row" in message


def test_a_fallback_sees_a_static_cache_as_it_was(fallbacks):
    """Whose counter moves on between the making of the mask and its use."""
    eager, fused = pair("llama")
    inputs, kept = inputs_of("llama", "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[1, 7] = 0
    past = hf.StaticCache(fused.config, max_cache_len=SEQLEN + 4)
    fused(ids[:, :9], attention_mask=mask[:, :9], past_key_values=past)
    actual = fused(ids[:, 9:], attention_mask=mask, past_key_values=past).logits
    assert_same_logits(actual, eager(**inputs).logits[:, 9:])
    (message,) = fallbacks()
    assert "there is padding between tokens of a row" in message


def test_a_dense_position_bias_falls_back(fallbacks):
    eager, _ = pair("t5")
    unpatched = copy.deepcopy(eager)
    unpatched.set_attn_implementation("pynlp")
    inputs, kept = inputs_of("t5", "right")
    assert_same_logits(unpatched(**inputs).logits[kept], eager(**inputs).logits[kept])
    (message,) = fallbacks()
    assert "position_bias is dense; pynlp.integrations.transformers.patch(model)" in message


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_a_model_that_adds_its_mask_gets_eagers_and_is_told_of_patch(name, fallbacks):
    eager, _ = pair(name)
    model = copy.deepcopy(eager)
    model.config._attn_implementation = "pynlp"
    inputs, kept = inputs_of(name, "left")
    with pytest.warns(UserWarning, match=r"computes with its mask .*patch\(model\) knows T5, BLOOM, MPT"):
        actual = model(**inputs).logits
    assert torch.equal(actual[kept], eager(**inputs).logits[kept])


@pytest.mark.parametrize("padding", ["no", "right", "left"])
def test_a_router_that_reads_the_mask_sees_eagers(padding, fallbacks):
    """NLLB-MoE's takes the mask's last row for the padding."""
    config = hf.NllbMoeConfig(
        **TRANSLATION, num_experts=2, expert_capacity=8, encoder_sparse_step=2, decoder_sparse_step=2,
        router_ignore_padding_tokens=False, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    eager = hf.NllbMoeForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(eager)
    fused.set_attn_implementation("pynlp")
    inputs, kept = inputs_of("marian", padding)
    expected, actual = eager(**inputs).logits, fused(**inputs).logits
    assert_same_logits(actual[kept], expected[kept])


def seen_by(mask, seqlen_q, seqlen_k):
    """What the kernel does with a mask's structure, by the weights it gives: bool (B, Sq, Sk)."""
    q, k = torch.zeros(len(mask), seqlen_q, 2, 4), torch.zeros(len(mask), seqlen_k, 2, 4)
    v = torch.eye(seqlen_k)[None, :, None].repeat(len(mask), 1, 2, 1)
    out = interface.attend(q, k, v, mask.structure)  # (B, Sq, 2, Sk)
    by_heads = interface.attend(q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)), mask.structure)
    assert torch.equal(out, by_heads)
    return out[:, :, 0] > 0


@pytest.mark.parametrize("padding", ["no", "right", "left", "both"])
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, q_offset, kv_offset, function",
    [
        (6, 6, 0, 0, None),
        (2, 6, 4, 0, None),
        (1, 6, 5, 0, None),
        (3, 9, 2, 0, None),  # a static cache, not full
        (6, 6, 0, 0, sliding_window_causal_mask_function(3)),
        (1, 3, 7, 5, sliding_window_causal_mask_function(3)),  # a full sliding cache
        (4, 6, 7, 5, sliding_window_causal_mask_function(3)),
        (2, 5, 1, 0, sliding_window_causal_mask_function(5)),
        (6, 6, 0, 0, bidirectional_mask_function),
        (3, 7, 0, 0, bidirectional_mask_function),  # another sequence's keys
    ],
)
def test_the_structure_means_the_dense_mask(seqlen_q, seqlen_k, q_offset, kv_offset, function, padding):
    positions = q_offset + seqlen_q if function is not bidirectional_mask_function else seqlen_k
    attention_mask = torch.ones(3, positions, dtype=torch.bool)
    attention_mask[0, -1] = padding not in ("right", "both")
    attention_mask[1, : positions - 2] = padding not in ("left", "both")
    attention_mask[2, :1] = padding not in ("left", "both")
    options = {} if function is None else dict(mask_function=function)
    mask = structured_mask(3, seqlen_q, seqlen_k, q_offset, kv_offset, attention_mask=attention_mask, **options)
    assert mask.reason is None and mask._dense is None
    actual = seen_by(mask, seqlen_q, seqlen_k)
    rows = torch.ones(3, seqlen_q, dtype=torch.bool)
    if function is not bidirectional_mask_function:  # the queries that are tokens
        rows = attention_mask[:, q_offset:]
    assert mask.dense.shape == (3, 1, seqlen_q, seqlen_k)
    assert torch.equal(actual[rows], mask.dense[:, 0][rows])


def test_a_mask_takes_no_memory_of_sq_times_sk():
    """4 million by 4 million booleans, which no machine has."""
    seqlen = 2**22
    attention_mask = torch.ones(2, seqlen, dtype=torch.bool)
    attention_mask[0, :5] = False
    mask = structured_mask(2, seqlen, seqlen, attention_mask=attention_mask)
    assert mask.shape == (2, 1, seqlen, seqlen)
    assert mask.structure.rows.tolist() == [[5, seqlen], [0, seqlen]]


USES = {
    "added": lambda mask, scores: scores + mask,
    "negated booleans": lambda mask, scores: ~mask.bool(),
    "booleans that fill": lambda mask, scores: scores.masked_fill(mask.to(torch.bool), -1.0),
    "compared": lambda mask, scores: torch.where(mask == 0, scores, -1.0),
    "in half precision": lambda mask, scores: mask.half(),
    "in its own dtype": lambda mask, scores: mask.to(mask.dtype, copy=True) * 1,
    "the last row": lambda mask, scores: mask[:, :, -1, :].reshape(-1)[-3:],
    "a part": lambda mask, scores: mask[:, :, 1:],
    "cut to the keys": lambda mask, scores: mask[:, :, :, : scores.shape[-1]],
    "expanded": lambda mask, scores: mask.expand(-1, 2, -1, -1).clone(),
    "counted": lambda mask, scores: (mask >= 0).sum(-1),
    "copied into another": lambda mask, scores: scores.clone().copy_(mask),
    "any": lambda mask, scores: mask.any() & ~mask.all(),
    "of the same kind": lambda mask, scores: torch.ones_like(mask),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.filterwarnings("ignore:attn_implementation='pynlp'. the model computes with its mask")
def test_a_mask_is_eagers_to_whoever_looks(use, dtype):
    attention_mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    arguments = dict(batch_size=2, q_length=4, kv_length=4, attention_mask=attention_mask, dtype=dtype)
    scores = torch.randn(2, 1, 4, 4, dtype=dtype)
    actual, expected = (use(mask, scores) for mask in (structured_mask(**arguments), eager_mask(**arguments)))
    actual = actual.eagers if isinstance(actual, Mask) else actual
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_what_changes_no_number_keeps_the_structure():
    mask = structured_mask(1, 4, 4, attention_mask=torch.tensor([[False, True, True, True]]))
    assert mask.contiguous() is mask and mask.detach() is mask and mask.to(torch.float32) is mask
    assert mask.to(torch.bool).structure.rows is mask.structure.rows and "rows=tensor([[1, 4]])" in repr(mask)
    moved = mask.to("meta")
    assert moved.structure.rows.device.type == "meta" and moved.dense.device.type == "meta"


def test_patch_is_idempotent_and_keeps_the_parameters():
    eager, fused = pair("t5")
    classes = [type(module) for module in fused.modules()]
    assert patch(fused) is fused and [type(module) for module in fused.modules()] == classes
    assert list(fused.state_dict()) == list(eager.state_dict())
    inputs, _ = inputs_of("t5")
    expected = fused(**inputs).logits
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(**inputs).logits, expected)
    fused.set_attn_implementation("eager")
    assert torch.equal(fused(**inputs).logits, eager(**inputs).logits)


def test_patch_refuses_models_that_it_does_not_know():
    model, _ = pair("bert")
    with pytest.raises(
        ValueError,
        match="model: expected .* BloomAttention, FalconAttention, .* T5Attention, got BertForMaskedLM; .*register()",
    ):
        patch(model)


@pytest.mark.parametrize("name", ["gpt-neo", "gptj", "falcon"])
def test_models_with_tables_of_attention_classes_are_made_with_the_kernels(name, fallbacks):
    """And they keep what eager attention gives, by patch() or by name."""
    eager, _ = pair(name)
    cls, config, _ = MODELS[name]
    made = cls._from_config(cls.config_class(**config), attn_implementation="pynlp").eval()
    made.load_state_dict(eager.state_dict())
    inputs, kept = inputs_of(name, "left")
    assert_same_logits(made(**inputs).logits[kept], eager(**inputs).logits[kept])
    assert not fallbacks()


def test_a_falcon_with_alibi_is_refused():
    cls, config, _ = MODELS["falcon"]
    config = cls.config_class(**config | dict(alibi=True))
    with pytest.raises(ValueError, match="attn_implementation: expected a Falcon with rotary embedding .*alibi=True"):
        cls._from_config(config, attn_implementation="pynlp")
    model = cls._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="expected a Falcon with rotary embedding .*alibi=True"):
        patch(model)
    assert model.config._attn_implementation == "eager"


def test_messages_name_the_arguments_of_an_attention_function():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    module = nn.Module()
    names = inspect.signature(interface.attention_forward).parameters.keys() | {"dropout", "scaling", "s_aux"}
    for change in (
        dict(key=k.half()),
        dict(value=k[:, :, :3]),
        dict(key=k[:, :3], value=k[:, :3]),
        dict(dropout=1.5),
        dict(s_aux=torch.ones(3)),
        dict(query=q.to(torch.int64)),
        dict(query=[1.0]),
    ):
        arguments = dict(module=module, query=q, key=k, value=k, attention_mask=structured_mask(2, 5, 5)) | change
        with pytest.raises((ValueError, TypeError)) as raised:
            interface.attention_forward(**arguments)
        message = str(raised.value)
        assert message.split(":")[0] in names, message
        assert not re.search(r"\b(q|k|v|sinks|dropout_p)\b", message), message


def test_import_needs_transformers_only_where_it_says_so():
    script = """
import sys
import pynlp
assert "transformers" not in sys.modules, "import pynlp imports transformers"
sys.modules["transformers"] = None  # as if it were not installed
import pynlp.integrations
try:
    import pynlp.integrations.transformers
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    hint = f"{sys.executable} -m pip install 'transformers>=5.20'"
    assert out.strip() == f"pynlp.integrations.transformers needs transformers: {hint}"
