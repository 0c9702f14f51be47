"""Checks of arguments that layers of dense and of quantized experts share."""

from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import as_fp32, as_matrix, check_tensor, rows_at_one_stride
from pynlp.ops.common.plans import derive
from pynlp.ops.moe.dispatch import check_index, dispatched
from pynlp.reference.moe.mlp import ACTIVATIONS


class Routed(NamedTuple):
    """Tokens and their experts as the ops take them."""

    x: Tensor  # (tokens, H)
    top_k_weights: Tensor  # (tokens, top_k) in fp32
    permutation: Tensor
    places: Tensor
    offsets: Tensor


def check_activation(activation: str) -> int:
    """The number of an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def check_routing(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> None:
    check_index("top_k_index", top_k_index, experts)
    if top_k_index.shape[:-1] != x.shape[:-1]:
        expected = ", ".join(map(str, (*x.shape[:-1], "top_k")))
        raise ValueError(f"top_k_index: expected shape ({expected}), got {tuple(top_k_index.shape)}")
    if top_k_index.device != x.device:
        raise ValueError(f"top_k_index: expected x's device {x.device}, got {top_k_index.device}")
    check_tensor("top_k_weights", top_k_weights, x, [tuple(top_k_index.shape)], of="x")


def routed(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Routed:
    """Checked tokens, dispatched."""
    weights = by_token(as_fp32(top_k_weights, x))
    _, offsets, permutation, places = dispatched(derive(Tensor.contiguous, by_token(top_k_index)), experts)
    return Routed(rows_at_one_stride(by_token(x)), weights, permutation, places, offsets)


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, int], x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    check_tensor(name, bias, x, [shape], of="x")
    return as_fp32(bias, x)


def by_token(x: Tensor) -> Tensor:
    """(.., columns) as (tokens, columns)."""
    return x if x.dim() == 2 else derive(as_matrix, x)


def needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
