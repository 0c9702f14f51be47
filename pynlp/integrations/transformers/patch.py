"""Models that add a bias to their scores, T5, BLOOM and MPT, with the bias inside the kernel.

A patched module keeps its parameters and its place in the model; its class becomes a subclass from here, which leaves
what it cannot serve to the original.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomPreTrainedModel, dropout_add
from transformers.models.mpt.modeling_mpt import MptAttention, MptBlock, MptPreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention, T5PreTrainedModel

from pynlp.integrations.transformers.attention import GIVEN, WEIGHTS, attend, register, warn_of_fallback
from pynlp.integrations.transformers.masks import NAME, Mask
from pynlp.ops.attention.positions import alibi_slopes


class FusedT5Attention(T5Attention):
    """T5's attention, whose layers hand on the table of biases to each other instead of the biases."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        fused = self.config._attn_implementation == NAME and _why_not(mask, kwargs.get("output_attentions")) is None
        if fused and position_bias is None:
            if self.has_relative_attention_bias:
                # A copy, as autograd makes what a checkpointed layer returns a node of its own.
                position_bias = self.relative_attention_bias.weight.clone()  # (num_buckets, H)
            else:  # cross-attention
                position_bias = hidden_states.new_empty(0, self.n_heads)
        return super().forward(hidden_states, mask, key_value_states, position_bias, **kwargs)

    def bias_options(self, table: Tensor) -> dict:
        """Options of `pynlp.functional.attention` for a table `(num_buckets, H)`; one without buckets is no bias."""
        if len(table) == 0:
            return {}
        return {
            "relative_bias": table,
            "relative_max_distance": self.relative_attention_max_distance,
            "relative_bidirectional": not self.is_decoder,
        }


class FusedBloomAttention(BloomAttention):
    """BLOOM's attention: slope * position of the key differs from -slope * distance by the same all over a row."""

    def forward(
        self, hidden_states, residual, alibi, attention_mask, layer_past=None, output_attentions=False, **kwargs
    ):
        reason = _why_not(attention_mask, output_attentions, causal=True)
        if self.pretraining_tp > 1 and self.slow_but_exact:
            reason = "slow_but_exact asks for its own order of sums"
        if reason is not None:
            warn_of_fallback(self, reason)
            if isinstance(attention_mask, Mask):  # to what is added to the scores
                hidden = attention_mask.dense.logical_not()
                attention_mask = torch.zeros_like(hidden, dtype=alibi.dtype)
                attention_mask.masked_fill_(hidden, torch.finfo(alibi.dtype).min)
            return super().forward(hidden_states, residual, alibi, attention_mask, layer_past, **kwargs)

        q, k, v = self._reshape(self.query_key_value(hidden_states))  # (B, H, S, D)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out = attend(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attention_mask,
            softmax_scale=self.inv_norm_factor,
            alibi_slopes=_bloom_slopes(self.num_heads, q.device),
            dropout_p=self.attention_dropout.p if self.training else 0.0,
        )  # (B, Sq, H, D)
        return dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), None


class FusedMptAttention(MptAttention):
    """MPT's attention: slope * position of the key differs from -slope * distance by the same all over a row."""

    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
        reason = _why_not(attention_mask, causal=True)
        if reason is not None:
            warn_of_fallback(self, reason)
            if isinstance(attention_mask, Mask):  # to one that is True where nothing is seen
                attention_mask = attention_mask.dense.logical_not()
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask, **kwargs)

        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)  # (B, S, H, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = attend(
            q,
            k,
            v,
            attention_mask,
            softmax_scale=self.softmax_scale,
            alibi_slopes=position_bias[:, 0, -1] - position_bias[:, 0, -2],  # one step of each head's line
            dropout_p=self.attn_dropout_p if self.training else 0.0,
        )  # (B, Sq, H, D)
        return self.out_proj(out.flatten(2)), None


class FusedMptBlock(MptBlock):
    """MPT's block; it hands a wish for weights, which its attention is not given, on in the mask."""

    def forward(self, hidden_states, position_bias, attention_mask, *args, output_attentions=False, **kwargs):
        if output_attentions and isinstance(attention_mask, Mask):
            attention_mask = attention_mask.refused(WEIGHTS)
        return super().forward(hidden_states, position_bias, attention_mask, *args, **kwargs)


FUSED = {
    T5Attention: FusedT5Attention,
    BloomAttention: FusedBloomAttention,
    MptAttention: FusedMptAttention,
    MptBlock: FusedMptBlock,
}


def patch(model: nn.Module) -> nn.Module:
    """Let the kernel compute T5's relative bias, BLOOM's and MPT's ALiBi and their gradients from now on.

    The model itself is changed; a second call does nothing. What the kernel cannot serve (see `register`) runs on the
    original modules, with one warning that names the reason.

    Args:
        model: A T5, BLOOM or MPT of transformers, whichever its head, or a model that has one in it.

    Returns:
        The model.

    Raises:
        ValueError: no module of the model is the attention of one of the three.
    """
    modules = [module for module in model.modules() if type(module) in FUSED or type(module) in FUSED.values()]
    if not modules:
        names = ", ".join(sorted(cls.__name__ for cls in FUSED if cls is not MptBlock))
        raise ValueError(
            f"model: expected one with a module of class {names}, got {type(model).__name__}; models that go through "
            f"transformers' AttentionInterface need register() and attn_implementation={NAME!r} instead"
        )
    register()
    for module in modules:
        module.__class__ = FUSED.get(type(module), type(module))
    for module in model.modules():
        if isinstance(module, (T5PreTrainedModel, BloomPreTrainedModel, MptPreTrainedModel)):
            module.config._attn_implementation = NAME
    return model


def _why_not(mask: Tensor | None, output_attentions: bool | None = False, causal: bool = False) -> str | None:
    """The reason why a patched module leaves a call to the original; None if it does not."""
    if output_attentions:
        return WEIGHTS
    if not isinstance(mask, Mask):
        return GIVEN
    if mask.reason is None and causal and not mask.structure.causal:
        return "its ALiBi is no function of the distance where later keys are seen"
    return mask.reason


@lru_cache(maxsize=16)
def _bloom_slopes(heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return alibi_slopes(heads, device=device)
