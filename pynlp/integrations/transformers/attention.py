"""transformers' AttentionInterface on `pynlp.functional.attention`, and its fallbacks.

Shapes: B batch, Sq queries, Sk keys, H query heads, G key/value heads, D head dimension.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.output_capturing import _active_collector

from pynlp.backends import warn_once
from pynlp.integrations.names import in_own_names
from pynlp.integrations.transformers.masks import (
    NAME,
    PATCHED,
    WEIGHTS,
    Mask,
    additive,
    in_one_graph,
    weights_collected,
)
from pynlp.integrations.transformers.structure import BLIND, Structure, structure_of
from pynlp.ops.attention.attention import attention, attention_varlen
from pynlp.ops.attention.checks import MAX_HEAD_DIM
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.common.checks import is_autocast_on

GIVEN = "its mask was given as a tensor"


@in_own_names(
    q="query", k="key", v="value", dropout_p="dropout", softmax_scale="scaling", sinks="s_aux",
    relative_bias="position_bias", key_lengths="attention_mask", cu_seqlens_q="attention_mask",
    cu_seqlens_k="attention_mask", cache_lengths="attention_mask", window="attention_mask",
)  # fmt: skip
def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, Tensor | None]:
    """The attention function of `attn_implementation="pynlp"`.

    Args:
        module: The layer's attention module.
        query: `(B, H, Sq, D)`.
        key, value: `(B, G, Sk, D)`.
        attention_mask: A mask of `structured_mask`, one of the user's own, or None: `is_causal` decides.
        options: transformers': dropout, scaling, softcap, s_aux (sinks), is_causal, position_bias (a dense one, or the
            table of a patched module), output_attentions, cache. The window is in the mask.

    Returns:
        `(B, Sq, H, D)`, and the weights where `output_attentions` asks for them.
    """
    structure = structure_for(module, query, key, attention_mask, options.get("is_causal"))
    reason = _reason(query, key, value, structure, options)
    if reason is not None:
        if getattr(options.get("position_bias"), "ndim", 4) == 2:
            raise ValueError(f"{type(module).__name__}: expected a call that the kernel can serve, but {reason}")
        return _fall_back(reason, module, query, key, value, attention_mask, options)
    table = options.get("position_bias")  # of a patched module
    out = attend(
        *(x.transpose(1, 2) for x in (query, key, value)),
        structure,
        softmax_scale=options.get("scaling"),
        softcap=options.get("softcap") or 0.0,
        sinks=options.get("s_aux"),
        dropout_p=options.get("dropout", 0.0),
        **({} if table is None else module.bias_options(table)),
    )
    return out, None


def attend(q: Tensor, k: Tensor, v: Tensor, structure: Structure, *, dropout_p: float = 0.0, **options) -> Tensor:
    """`pynlp.functional.attention` under a mask's structure, or its counterpart for packed rows or a cache.

    Args:
        q: `(B, Sq, H, D)`.
        k, v: `(B, Sk, G, D)`.
        options: Options of `pynlp.functional.attention`.

    Returns:
        `(B, Sq, H, D)`; 0 for padding in front of a row's tokens.
    """
    options.update(causal=structure.causal, window=structure.window)
    if structure.cu_seqlens is None and structure.rows is None and _decodes(q, k, v, dropout_p, options):
        return attention_decode(q, k, v, structure.lengths(q.device), **options)
    options["dropout_p"] = dropout_p
    if structure.cu_seqlens is not None:
        return _over_tokens(q, k, v, (structure.cu_seqlens, structure.cu_seqlens), options)
    if structure.rows is None:
        k, v = k[:, : structure.keys], v[:, : structure.keys]
        return attention(q, k, v, key_lengths=structure.key_lengths, **options)
    biased = options.get("alibi_slopes") is not None or options.get("relative_bias") is not None
    aligned = biased or structure.window != (None, None)
    if aligned and structure.spans is not None:
        return _row_by_row(q, k, v, structure, options)
    # Sinks and T5's table have an entry for every head, so their heads stay together.
    together = options.get("sinks") is not None or options.get("relative_bias") is not None
    if k.stride(1) < k.stride(2) and not together:
        return _over_heads(q, k, v, structure.starts(k.shape[2], aligned), options)
    return _over_tokens(q, k, v, structure.starts(1, aligned), options)


def _decodes(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, options: dict) -> bool:
    """Whether a call is a decoding step: one query a row, no gradients, keys that can be read in place."""
    tensors = (q, k, v, *(option for option in options.values() if isinstance(option, Tensor)))
    return (
        q.shape[1] == 1
        and dropout_p == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not is_autocast_on(q.device.type)
        and k.stride(-1) == v.stride(-1) == 1
    )


def _over_tokens(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], options: dict) -> Tensor:
    """Attention of rows laid end to end, as they lie in a projection's result (B, S, heads, D), which is not copied."""
    out = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *cu_seqlens, **options)
    return out.unflatten(0, q.shape[:2])


def _over_heads(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], options: dict) -> Tensor:
    """Attention of one key/value head's rows laid end to end, as they lie in a cache (B, G, Sk, D), not copied."""
    kv_heads = k.shape[2]
    slopes = options.get("alibi_slopes")  # (H,)
    if slopes is not None:
        slopes = slopes.view(1, kv_heads, 1, -1).expand(q.shape[0], -1, 5, -1)  # five sequences a row
        options = {**options, "alibi_slopes": slopes.flatten(0, 2)}
    q = q.unflatten(2, (kv_heads, -1)).transpose(1, 2)  # (B, G, Sq, H / G, D)
    k, v = (x.transpose(1, 2).flatten(0, 2)[:, None] for x in (k, v))  # (B G Sk, 1, D)
    out = attention_varlen(q.flatten(0, 2), k, v, *cu_seqlens, **options)
    return out.unflatten(0, q.shape[:3]).transpose(1, 2).flatten(2, 3)


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, structure: Structure, options: dict) -> Tensor:
    """Attention of each row without the padding in front of its tokens.

    Queries behind the tokens see keys too, and stand further from them than those that are tokens, so they are no
    sequence of their own.
    """
    rows = []
    for row, (first, end) in enumerate(structure.spans):
        unseen = min(max(first + q.shape[1] - structure.keys, 0), q.shape[1])  # queries in front of the tokens
        keys = slice(first, structure.keys)
        lengths = structure.rows.new_full((1,), end - first)
        out = attention(
            *(x[row : row + 1] for x in (q[:, unseen:], k[:, keys], v[:, keys])), key_lengths=lengths, **options
        )
        rows.append(torch.nn.functional.pad(out, (0, 0, 0, 0, unseen, 0)))
    return torch.cat(rows)


def structure_for(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Structure | str:
    """The structure of a layer's mask, or the reason why the kernel cannot serve it."""
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return structure_of(batch, seqlen_q, seqlen_k, 0, _function_of_none(module, query, is_causal))
    structure = structure_in(mask)
    if isinstance(structure, Structure) and structure.shape != (batch, seqlen_q, seqlen_k):
        return "its mask is of another shape than its queries and keys"
    return structure


def structure_in(mask: Tensor | None) -> Structure | str:
    """The structure that a mask brings with it, or the reason why the kernel cannot serve it."""
    known = getattr(mask, "structure", None) or getattr(mask, "reason", None)
    return known or (BLIND if torch.compiler.is_compiling() and in_one_graph() else GIVEN)


def _function_of_none(module: nn.Module, query: Tensor, is_causal: bool | None) -> Callable:
    """The mask that None means to sdpa_attention_forward: all keys, or those up to a query's own from the first on."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return causal_mask_function if is_causal and query.shape[2] > 1 else bidirectional_mask_function


def _reason(query: Tensor, key: Tensor, value: Tensor, structure: Structure | str, options: dict) -> str | None:
    """The reason why the kernel cannot serve a call; None if it can."""
    if weights_wanted(options):
        return WEIGHTS
    if options.get("cache") is not None:
        return "its cache is paged"
    if isinstance(structure, str):
        return structure
    if options.get("position_bias") is not None and options["position_bias"].dim() != 2:
        return f"its position_bias is dense; pynlp.integrations.transformers.patch(model) knows {PATCHED}"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"its heads have more than {MAX_HEAD_DIM} dimensions"
    return None


def weights_wanted(options: dict) -> bool:
    """Whether the caller of the model wants the weights, by a keyword or by a config's `output_attentions`.

    Many models hand neither on to their attention: transformers collects the weights by hooks around it.
    """
    if options.get("output_attentions"):
        return True
    # Dynamo cannot read a ContextVar; where it traces the model's forward, transformers has a global in its place.
    return weights_collected(_active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get())


def _fall_back(
    reason: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa; where that cannot serve either, the model's own eager function."""
    warn_of_fallback(module, reason)
    mask = mask.dense if isinstance(mask, Mask) else mask
    if not (weights_wanted(options) or options.get("softcap") or options.get("s_aux") is not None):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None:
        function = _function_of_none(module, query, options.get("is_causal"))
        shape = query.shape[0], query.shape[2], key.shape[2]
        mask = sdpa_mask(*shape, mask_function=function, device=query.device, allow_is_causal_skip=False)
    if mask.dtype == torch.bool:
        mask = additive(mask, query.dtype)
    return _eager_function(module)(module, query, key, value, mask, **options)


def warn_of_fallback(module: nn.Module, reason: str) -> None:
    _tell(f"attn_implementation={NAME!r}: {type(module).__name__} runs on transformers' own attention: {reason}")


@torch.compiler.assume_constant_result  # so that it tells while a graph is traced, which could not hold it
def _tell(message: str) -> None:
    warn_once(message)


def _eager_function(module: nn.Module) -> Callable:
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(
        f"attn_implementation={NAME!r}: expected an eager_attention_forward beside {type(module).__name__} for what "
        "neither pynlp nor sdpa can serve, got none"
    )
