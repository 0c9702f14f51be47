"""Small models of transformers, on its eager attention and on pynlp's, and what the tests of the integration ask."""

import copy

import torch
import transformers as hf
from torch import nn

from pynlp.integrations.transformers import patch, register

register()

BATCH, SEQLEN, TARGET_SEQLEN, VOCABULARY, WINDOW = 3, 12, 7, 64, 5

TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DECODER = TOKENS | dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
ENCODER_DECODER = TOKENS | dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip
TRANSLATION = ENCODER_DECODER | dict(max_position_embeddings=64)
WINDOWED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])

# The class, what its config gets, and the calls of the kernel in a forward pass.
MODELS = {
    "llama": (hf.LlamaForCausalLM, DECODER, 2),
    "mistral": (hf.MistralForCausalLM, DECODER | dict(sliding_window=WINDOW), 2),
    "qwen3": (hf.Qwen3ForCausalLM, DECODER | WINDOWED | dict(use_sliding_window=True), 2),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        DECODER | WINDOWED | dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
        2,
    ),
    "gemma3": (hf.Gemma3ForCausalLM, DECODER | WINDOWED | dict(query_pre_attn_scalar=8), 2),
    "gpt-oss": (hf.GptOssForCausalLM, DECODER | WINDOWED | dict(num_local_experts=2, num_experts_per_tok=1), 2),
    "gpt-neo": (
        hf.GPTNeoForCausalLM,
        TOKENS
        | dict(
            hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=WINDOW,
            attention_types=[[["global", "local"], 1]], attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0,
        ),
        2,
    ),
    "gptj": (
        hf.GPTJForCausalLM,
        TOKENS
        | dict(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        2,
    ),
    "falcon": (
        hf.FalconForCausalLM,
        TOKENS | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
        2,
    ),
    "gpt2": (hf.GPT2LMHeadModel, TOKENS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=64), 2),
    # Three heads: what ALiBi's slopes are for a count that is no power of two, BLOOM and MPT see differently.
    "bloom": (hf.BloomForCausalLM, TOKENS | dict(hidden_size=24, n_layer=2, n_head=3), 2),
    "mpt": (
        hf.MptForCausalLM,
        TOKENS
        | dict(d_model=24, n_layers=2, n_heads=3, max_seq_len=64, use_cache=True, attn_config=dict(clip_qkv=1.0)),
        2,
    ),
    "bert": (
        hf.BertForMaskedLM,
        TOKENS | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4),
        2,
    ),
    "bart": (hf.BartForConditionalGeneration, TRANSLATION, 6),
    "marian": (hf.MarianMTModel, TRANSLATION, 6),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        ENCODER_DECODER
        | dict(num_mel_bins=8, max_source_positions=9, max_target_positions=32, begin_suppress_tokens=None),
        6,
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        TOKENS | dict(
            d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=1,
            relative_attention_num_buckets=8, relative_attention_max_distance=6,
        ),
        6,
    ),
}  # fmt: skip
PATCHED = ("bloom", "mpt", "t5", "gpt-neo", "gptj", "falcon")
DECODERS = [
    name for name, (_, config, _) in MODELS.items() if name != "bert" and "decoder_start_token_id" not in config
]
ENCODER_DECODERS = [name for name, (_, config, _) in MODELS.items() if "decoder_start_token_id" in config]


def pair(name, **config):
    """The model on eager attention and its twin on pynlp's, with weights that spread the attention unevenly."""
    cls, options, _ = MODELS[name]
    eager = cls._from_config(cls.config_class(**options | config), attn_implementation="eager").eval()
    for parameter_name, parameter in eager.named_parameters():
        if parameter.dim() > 1 or "sinks" in parameter_name:
            nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.3)
    fused = copy.deepcopy(eager)
    if name in PATCHED:
        assert patch(fused) is fused
    else:
        fused.set_attn_implementation("pynlp")
    return eager, fused


def padding_of(kind, seqlen):
    """int64 (BATCH, seqlen) with 0 for padding, in two of the three rows."""
    mask = torch.ones(BATCH, seqlen, dtype=torch.int64)
    if kind == "right":
        mask[0, seqlen // 2 :] = mask[2, -1:] = 0
    if kind == "left":
        mask[0, : seqlen // 2] = mask[2, :1] = 0
    return mask


def inputs_of(name, padding="no"):
    """What the model's forward takes, and which of its logits are not at padding (BATCH, S)."""
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQLEN))
    mask, target_mask = padding_of(padding, SEQLEN), padding_of(padding, TARGET_SEQLEN)
    inputs = {"input_ids": ids}
    if name == "whisper":
        inputs = {"input_features": torch.randn(BATCH, 8, 18)}
    elif padding != "no":
        inputs["attention_mask"] = mask
    if name not in ENCODER_DECODERS:
        return inputs, mask.bool()
    inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (BATCH, TARGET_SEQLEN))
    if padding != "no":
        inputs["decoder_attention_mask"] = target_mask
    return inputs, target_mask.bool()


def assert_same_logits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5)


def assert_same_gradients(fused, eager, actual, expected):
    """Compares each parameter's gradient of the logits' mean square, by norm."""
    actual.square().mean().backward()
    expected.square().mean().backward()
    theirs = dict(eager.named_parameters())
    total = torch.stack([p.grad.norm() for p in theirs.values() if p.grad is not None]).norm()
    for parameter_name, ours in fused.named_parameters():
        if theirs[parameter_name].grad is None:
            assert ours.grad is None, parameter_name
            continue
        error = (ours.grad - theirs[parameter_name].grad).norm()
        # Some are 0 but for rounding: a key's bias moves all scores of a row alike.
        assert error <= 3e-5 * theirs[parameter_name].grad.norm() + 1e-6 * total, parameter_name
