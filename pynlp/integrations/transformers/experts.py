"""transformers' layers of experts on `pynlp.functional.moe_mlp`."""

from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pynlp.backends import warn_once
from pynlp.ops.moe.mlp import moe_mlp
from pynlp.reference.moe.mlp import OAI_FACTOR, OAI_LIMIT

UNGATED = {nn.ReLU: "relu", nn.GELU: "gelu", GELUActivation: "gelu"}
GATES = ("SiLU", "SiLUActivation", "silu")  # the gates' activation: classes, or a function


class Unserved(Exception):
    """Says why a layer is left to transformers."""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts, a module of transformers, make of tokens.

    Args:
        self: Experts whose class transformers' use_experts_implementation has wrapped.
        hidden_states: `(T, H)`.
        top_k_index: `(T, top_k)`; num_experts stands for none.
        top_k_weights: `(T, top_k)`.

    Returns:
        `(T, H)`.
    """
    try:
        options = _options(self)
    except Unserved as reason:
        warn_once(f"pynlp leaves experts of class {type(self).__name__} to transformers' grouped_mm: {reason}")
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    up, down = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    if self.is_transposed:
        up, down = up.mT, down.mT
    return moe_mlp(hidden_states, top_k_index, top_k_weights, up, down, **options)


def _options(experts: nn.Module) -> dict:
    """Arguments of moe_mlp beside the tensors that all have."""
    options: dict = {"interleaved": not experts.is_concatenated}
    if experts.has_gate:
        options["activation"] = _gate(experts)
    else:
        kind = UNGATED.get(type(experts.act_fn))
        if kind is None or getattr(experts.act_fn, "approximate", "none") != "none":
            raise Unserved(f"their activation is {type(experts.act_fn).__name__}")
        options["activation"] = kind
    if experts.has_post_expert_norm:
        raise Unserved("a norm follows each expert")
    if experts.has_bias:
        name = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
        options |= dict(gate_up_bias=getattr(experts, name), down_bias=experts.down_proj_bias)
    return options


def _gate(experts: nn.Module) -> str:
    if isinstance(experts, GptOssExperts):
        if type(experts)._apply_gate is not GptOssExperts._apply_gate:
            raise Unserved("they have a gate of their own")
        if (experts.alpha, experts.limit) != (OAI_FACTOR, OAI_LIMIT):
            raise Unserved(f"their gate has factor {experts.alpha} and limit {experts.limit}")
        return "swiglu_oai"
    if type(experts)._apply_gate is not _default_apply_gate:
        raise Unserved("they have a gate of their own")
    name = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)
    if name not in GATES:
        raise Unserved(f"their activation is {name}")
    return "swiglu"
