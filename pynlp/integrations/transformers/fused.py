"""Attention modules of transformers that do not hand all they need to its AttentionInterface, on the kernel.

T5, BLOOM and MPT add a bias to their scores; GPT-Neo, GPT-J and Falcon have attention of their own. Each class leaves
what it cannot serve to the original.
"""

from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.mpt.modeling_mpt import MptAttention, MptBlock
from transformers.models.t5.modeling_t5 import T5Attention

from pynlp.integrations.transformers.attention import (
    attend,
    structure_in,
    warn_of_fallback,
    weights_wanted,
)
from pynlp.integrations.transformers.masks import NAME, WEIGHTS, Mask
from pynlp.integrations.transformers.structure import Structure
from pynlp.ops.attention.positions import alibi_slopes, kept


class FusedT5Attention(T5Attention):
    """T5's attention, whose layers hand on the table of biases to each other instead of the biases."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        fused = self.config._attn_implementation == NAME and isinstance(_structure(mask, kwargs), Structure)
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

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        structure = _causal_structure(attention_mask, kwargs)
        if self.pretraining_tp > 1 and self.slow_but_exact:
            structure = "slow_but_exact asks for its own order of sums"
        if isinstance(structure, str):
            warn_of_fallback(self, structure)
            return super().forward(hidden_states, residual, alibi, _eagers(attention_mask), layer_past, **kwargs)

        q, k, v = self._reshape(self.query_key_value(hidden_states))  # (B, H, S, D)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out = attend(
            *(x.transpose(1, 2) for x in (q, k, v)),
            structure,
            softmax_scale=self.inv_norm_factor,
            alibi_slopes=kept(alibi_slopes, q, self.num_heads),
            dropout_p=self.attention_dropout.p if self.training else 0.0,
        )  # (B, Sq, H, D)
        return dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), None


class FusedMptAttention(MptAttention):
    """MPT's attention: slope * position of the key differs from -slope * distance by the same all over a row."""

    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
        structure = _causal_structure(attention_mask, kwargs)
        if isinstance(structure, str):
            warn_of_fallback(self, structure)
            return super().forward(hidden_states, position_bias, past_key_values, _eagers(attention_mask), **kwargs)

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
            structure,
            softmax_scale=self.softmax_scale,
            alibi_slopes=position_bias[:, 0, -1] - position_bias[:, 0, -2],  # one step of each head's line
            dropout_p=self.attn_dropout_p if self.training else 0.0,
        )  # (B, Sq, H, D)
        return self.out_proj(out.flatten(2)), None


class FusedMptBlock(MptBlock):
    """MPT's block; it hands a wish for weights, which its attention is not given, on in the mask."""

    def forward(self, hidden_states, position_bias, attention_mask, *args, output_attentions=False, **kwargs):
        attention_mask = _without_fusing_for_weights(attention_mask, output_attentions)
        return super().forward(hidden_states, position_bias, attention_mask, *args, **kwargs)


class FusedGPTNeoAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention, whose scores are not scaled and whose local layers have a window."""

    def forward(self, hidden_states, attention_mask=None, layer_past=None, output_attentions=False, **kwargs):
        attention_mask = _without_fusing_for_weights(attention_mask, output_attentions)
        return super().forward(hidden_states, attention_mask, layer_past, output_attentions=output_attentions, **kwargs)

    def _attn(self, query, key, value, attention_mask=None):
        structure = _structure_of_own(self, attention_mask)
        if isinstance(structure, str):
            return super()._attn(query, key, value, _eagers(attention_mask))
        if self.attention_type == "local":
            structure = structure.within(self.config.window_size - 1)
        return _attend_heads(self, query, key, value, structure, softmax_scale=1.0)


class FusedGPTJAttention(GPTJAttention):
    """GPT-J's attention, of queries and keys that are turned."""

    def forward(self, hidden_states, layer_past=None, attention_mask=None, *args, output_attentions=False, **kwargs):
        attention_mask = _without_fusing_for_weights(attention_mask, output_attentions)
        return super().forward(
            hidden_states, layer_past, attention_mask, *args, output_attentions=output_attentions, **kwargs
        )

    def _attn(self, query, key, value, attention_mask=None):
        structure = _structure_of_own(self, attention_mask)
        if isinstance(structure, str):
            return super()._attn(query, key, value, _eagers(attention_mask))
        return _attend_heads(self, query, key, value, structure)


class FusedFalconAttention(FalconAttention):
    """Falcon's attention with rotary embedding; that with ALiBi is not served.

    Raises:
        ValueError: the config has alibi=True.
    """

    def __init__(self, config, layer_idx=None):
        refuse_alibi(config)
        super().__init__(config, layer_idx)

    def forward(
        self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False,
        output_attentions=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        attention_mask = _without_fusing_for_weights(attention_mask, output_attentions)
        structure = _structure_of_own(self, attention_mask)
        if isinstance(structure, str):
            return super().forward(
                hidden_states, alibi, _eagers(attention_mask), position_ids, layer_past, use_cache, output_attentions,
                position_embeddings, **kwargs,
            )  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))  # (B, H, S, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), structure)  # without dropout, as there
        return self.dense(out.flatten(2)), None


def refuse_alibi(config) -> None:
    """Raise ValueError for a Falcon with ALiBi, whose eager and sdpa attention disagree about the bias."""
    if getattr(config, "alibi", False) and config.model_type == "falcon":
        raise ValueError(
            f"attn_implementation: expected a Falcon with rotary embedding for {NAME!r}, got one with alibi=True"
        )


FUSED = {
    T5Attention: FusedT5Attention,
    BloomAttention: FusedBloomAttention,
    MptAttention: FusedMptAttention,
    MptBlock: FusedMptBlock,
    GPTNeoSelfAttention: FusedGPTNeoAttention,
    GPTJAttention: FusedGPTJAttention,
    FalconAttention: FusedFalconAttention,
}


def _structure(mask: Tensor | None, options: dict) -> Structure | str:
    """The structure of a patched module's mask, or the reason why it leaves the call to the original."""
    return WEIGHTS if weights_wanted(options) else structure_in(mask)


def _causal_structure(mask: Tensor | None, options: dict) -> Structure | str:
    structure = _structure(mask, options)
    if isinstance(structure, Structure) and not structure.causal:
        return "its ALiBi is no function of the distance where later keys are seen"
    return structure


def _structure_of_own(module: GPTNeoSelfAttention | GPTJAttention | FalconAttention, mask: Tensor | None):
    """The structure of a mask, or the reason, of which the caller is told, why it is left to the original."""
    if module.config._attn_implementation != NAME:
        return "another attention is asked for"
    structure = structure_in(mask)
    if isinstance(structure, str):
        warn_of_fallback(module, structure)
    return structure


def _without_fusing_for_weights(mask: Tensor | None, output_attentions: bool | None) -> Tensor | None:
    return mask.refused(WEIGHTS) if output_attentions and isinstance(mask, Mask) else mask


def _eagers(mask: Tensor | None) -> Tensor | None:
    return mask.eagers if isinstance(mask, Mask) else mask


def _attend_heads(
    module: GPTNeoSelfAttention | GPTJAttention, q: Tensor, k: Tensor, v: Tensor, structure: Structure, **options
) -> tuple[Tensor, None]:
    """`attend` for (B, H, S, D) in and out, with the module's dropout."""
    dropout_p = module.attn_dropout.p if module.training else 0.0
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), structure, dropout_p=dropout_p, **options)
    return out.transpose(1, 2), None
