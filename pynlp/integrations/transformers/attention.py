"""transformers' AttentionInterface on `pynlp.functional.attention`, and its fallbacks.

Shapes: B batch, Sq queries, Sk keys, H query heads, G key/value heads, D head dimension.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from pynlp.backends import warn_once
from pynlp.integrations.transformers.masks import NAME, Mask, structured_mask
from pynlp.ops.attention.attention import attention, attention_varlen
from pynlp.ops.attention.checks import MAX_HEAD_DIM
from pynlp.ops.attention.decode import attention_decode

WEIGHTS = "output_attentions=True asks for the weights"
GIVEN = "its mask was given as a tensor"


def register() -> None:
    """Make `attn_implementation="pynlp"` known to transformers; a second call does nothing.

    What the kernel cannot serve (a mask of one's own, a mask function other than transformers' causal, sliding-window,
    bidirectional and packed ones, gaps in the padding, `output_attentions=True`, a paged cache, head dimensions above
    256) runs on transformers' own attention, with one warning that names the reason.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, structured_mask)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, Tensor | None]:
    """The attention function that `register` registers.

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
    if attention_mask is None:
        attention_mask = _mask_of(module, query, key, options.get("is_causal"))
    reason = _reason(query, key, value, attention_mask, options)
    if reason is not None:
        if getattr(options.get("position_bias"), "ndim", 4) == 2:
            raise ValueError(f"{type(module).__name__}: expected a call that the kernel can serve, but {reason}")
        return _fall_back(reason, module, query, key, value, attention_mask, options)
    table = options.get("position_bias")  # of a patched module
    out = attend(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attention_mask,
        softmax_scale=options.get("scaling"),
        softcap=options.get("softcap") or 0.0,
        sinks=options.get("s_aux"),
        dropout_p=options.get("dropout", 0.0),
        **({} if table is None else module.bias_options(table)),
    )
    return out, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, dropout_p: float = 0.0, **options) -> Tensor:
    """`pynlp.functional.attention` under a mask's structure, or its counterpart for packed rows or a cache.

    Args:
        q: `(B, Sq, H, D)`.
        k, v: `(B, Sk, G, D)`.
        options: Options of `pynlp.functional.attention`.

    Returns:
        `(B, Sq, H, D)`; 0 for padding in front of a row's tokens.
    """
    structure = mask.structure
    options.update(causal=structure.causal, window=structure.window)
    if structure.cu_seqlens is None and structure.rows is None and _decodes(q, k, v, dropout_p, options):
        return attention_decode(q, k, v, mask.lengths, **options)
    options["dropout_p"] = dropout_p
    if structure.cu_seqlens is not None:
        return _over_tokens(q, k, v, (structure.cu_seqlens, structure.cu_seqlens), options)
    if structure.rows is None:
        k, v = k[:, : structure.keys], v[:, : structure.keys]
        return attention(q, k, v, key_lengths=structure.key_lengths, **options)
    biased = options.get("alibi_slopes") is not None or options.get("relative_bias") is not None
    aligned = biased or structure.window != (None, None)
    # Sinks and T5's table have an entry for every head, so their heads stay together.
    together = options.get("sinks") is not None or options.get("relative_bias") is not None
    if k.stride(1) < k.stride(2) and not together:
        return _over_heads(q, k, v, mask.cu_seqlens(k.shape[2], aligned), options)
    return _over_tokens(q, k, v, mask.cu_seqlens(1, aligned), options)


def _decodes(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, options: dict) -> bool:
    """Whether a call is a decoding step: one query a row, no gradients, keys that can be read in place."""
    tensors = (q, k, v, *(option for option in options.values() if isinstance(option, Tensor)))
    return (
        q.shape[1] == 1
        and dropout_p == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.is_autocast_enabled(q.device.type)
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


def _mask_of(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Mask:
    """The mask that None means to sdpa_attention_forward: all keys, or those up to a query's own from the first on."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    function = causal_mask_function if is_causal and query.shape[2] > 1 else bidirectional_mask_function
    return structured_mask(query.shape[0], query.shape[2], key.shape[2], mask_function=function, device=query.device)


def _reason(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict) -> str | None:
    """The reason why the kernel cannot serve a call; None if it can."""
    if options.get("output_attentions"):
        return WEIGHTS
    if options.get("cache") is not None:
        return "its cache is paged"
    if not isinstance(mask, Mask):
        return GIVEN
    if mask.reason is not None:
        return mask.reason
    if (mask.shape[0], *mask.shape[2:]) != (query.shape[0], query.shape[2], key.shape[2]):
        return "its mask is of another shape than its queries and keys"
    if options.get("position_bias") is not None and options["position_bias"].dim() != 2:
        return "its position_bias is dense; pynlp.integrations.transformers.patch(model) knows T5, BLOOM and MPT"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"its heads have more than {MAX_HEAD_DIM} dimensions"
    return None


def _fall_back(
    reason: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa; where that cannot serve either, the model's own eager function."""
    warn_of_fallback(module, reason)
    mask = mask.dense if isinstance(mask, Mask) else mask
    if options.get("output_attentions") or options.get("softcap") or options.get("s_aux") is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return _eager_function(module)(module, query, key, value, mask, **options)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def warn_of_fallback(module: nn.Module, reason: str) -> None:
    warn_once(f"attn_implementation={NAME!r}: {type(module).__name__} runs on transformers' own attention: {reason}")


def _eager_function(module: nn.Module) -> Callable:
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(
        f"attn_implementation={NAME!r}: expected an eager_attention_forward beside {type(module).__name__} for what "
        "neither pynlp nor sdpa can serve, got none"
    )
