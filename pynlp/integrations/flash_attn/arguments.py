"""flash-attn's arguments and results in the terms of `pynlp.functional.attention`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.ops.common.checks import at_once


def options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs) -> dict:
    """Options of `pynlp.functional.attention` for arguments of flash-attn."""
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            "return_attn_probs: not served with dropout_p > 0: the weights, which flash-attn returns for tests of its "
            "dropout, are never in memory"
        )
    return dict(
        dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window=window_of(window_size),
        softcap=max(softcap, 0.0), alibi_slopes=alibi_slopes, return_lse=return_attn_probs,
    )  # fmt: skip


def window_of(window_size: Sequence[int]) -> tuple[int | None, int | None]:
    """The window with None for no limit, where flash-attn has -1."""
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {len(window_size)} values")
    left, right = (None if side < 0 else int(side) for side in window_size)
    return left, right


def results_of(results, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What flash-attn returns: out, or out, the lse and an empty tensor in the place of the weights."""
    if not return_attn_probs:
        return results
    out, lse = results
    return out, infinite_where_unseen(lse), out.new_empty(0)


def infinite_where_unseen(lse: Tensor) -> Tensor:
    """flash-attn's lse of a query that sees no key is +inf, so that its own exp(score - lse) is 0."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def unpacked(name: str, x: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    """Queries, keys and values of a packed tensor; in backward their gradients are stacked, not added up."""
    dimensions = layout.count(",") + 1
    if x.dim() != dimensions or x.shape[-3] != parts:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
    return x.unbind(-3)


def may_have_padding(cu_seqlens: Tensor, total: int) -> bool:
    """Whether rows lie behind the last sequence; True, too, where that is not known without waiting for a device."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype.is_complex:
        return False  # and an error later on
    return not at_once(cu_seqlens) or 0 <= cu_seqlens[-1].item() < total


def sequence_and_place(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed row, and its place in that; both (total,). Rows behind all are in one more."""
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return sequence, row - cu_seqlens[sequence]
