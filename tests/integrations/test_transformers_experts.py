"""transformers' mixtures of experts with experts_implementation="pynlp" against its own, forward and backward."""

import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

from pynlp import backends  # noqa: E402
from pynlp.integrations.transformers import register  # noqa: E402

SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=1,
)  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(
        **SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )),
    "qwen3_moe": (Qwen3MoeForCausalLM, lambda: Qwen3MoeConfig(
        **SIZES, intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, head_dim=8,
        decoder_sparse_step=1, mlp_only_layers=[],
    )),
    "olmoe": (OlmoeForCausalLM, lambda: OlmoeConfig(
        **SIZES, intermediate_size=24, num_experts=8, num_experts_per_tok=3
    )),
    "deepseek_v3": (DeepseekV3ForCausalLM, lambda: DeepseekV3Config(
        **SIZES | dict(num_key_value_heads=4), intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=4, v_head_dim=8,
        qk_nope_head_dim=8, n_shared_experts=1,
    )),
    "gpt_oss": (GptOssForCausalLM, lambda: GptOssConfig(
        **SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    )),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    register()
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model = cls._from_config(config(), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.15)
    return model


def outcome(model: nn.Module, experts: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of all parameters."""
    model.set_experts_implementation(experts)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers_own(name):
    model = model_of(name)
    ids = torch.randint(2, 60, (3, 14))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pynlp leaves")
        ours = outcome(model, "pynlp", ids)
    expected = outcome(model, "eager", ids)
    assert len(ours) == len(expected) > 10
    for one, another in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=2e-4, atol=2e-5)
    model.eval()
    tokens = {}
    for experts in ("eager", "pynlp"):
        model.set_experts_implementation(experts)
        tokens[experts] = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens["eager"], tokens["pynlp"]) and tokens["pynlp"].shape == (3, 13)


def test_in_bf16():
    model = model_of("mixtral").bfloat16()
    ids = torch.randint(2, 60, (3, 14))
    for one, another in zip(outcome(model, "pynlp", ids), outcome(model, "eager", ids), strict=True):
        torch.testing.assert_close(one, another, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("change", ["activation", "gate", "limit"])
def test_what_is_left_to_transformers_says_so(change, monkeypatch):
    model = model_of("gpt_oss" if change == "limit" else "mixtral")
    ids = torch.randint(2, 60, (2, 9))
    for module in model.modules():
        if change == "activation" and isinstance(module, MixtralExperts):
            module.act_fn = nn.GELU()
        if change == "limit" and hasattr(module, "limit"):
            module.limit = 3.0
    if change == "gate":
        monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, x: x.chunk(2, -1)[1] * 2)
    backends.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = outcome(model, "pynlp", ids)
    assert any("pynlp leaves experts of class" in str(w.message) for w in seen)
    expected = outcome(model, "grouped_mm", ids)
    for one, another in zip(ours, expected, strict=True):
        assert torch.equal(one, another)
