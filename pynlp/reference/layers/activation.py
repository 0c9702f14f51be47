"""Activations with dropout in PyTorch: the default back end and the oracle of the fused ones."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pynlp.reference.common.dtypes import compute
from pynlp.reference.common.random import dropped

KINDS = ("gelu", "relu", "swiglu")


def activation_forward(
    x: Tensor,  # (.., D); "swiglu" without `up`: (.., 2 D), gate and up
    up: Tensor | None,  # (.., D)
    kind: int,  # of KINDS
    dropout_p: float,
    dropout_seed: Tensor | None,  # (1,) int64
) -> Tensor:
    """dropout(gelu(x)), dropout(relu(x)) or dropout(silu(x) * up), (.., D)."""
    gate, up = _halves(x, up, kind)
    if KINDS[kind] == "gelu":
        result = F.gelu(gate)
    elif KINDS[kind] == "relu":
        result = F.relu(gate)
    else:
        result = F.silu(gate) * up
    return dropped(result, dropout_p, dropout_seed).to(x.dtype)


def activation_backward(
    grad: Tensor, x: Tensor, up: Tensor | None, kind: int, dropout_p: float, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of up; the latter is empty where up is None."""
    gate, other = _halves(x, up, kind)
    grad = dropped(compute(grad), dropout_p, dropout_seed)
    nothing = x.new_empty(0)
    if KINDS[kind] == "gelu":  # Phi(x) + x phi(x)
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return (grad * (torch.special.ndtr(gate) + gate * density)).to(x.dtype), nothing
    if KINDS[kind] == "relu":
        return (grad * (gate > 0)).to(x.dtype), nothing
    share = torch.sigmoid(gate)
    grad_gate = grad * other * share * (1 + gate * (1 - share))
    grad_up = grad * gate * share
    if up is None:
        return torch.cat((grad_gate, grad_up), dim=-1).to(x.dtype), nothing
    return grad_gate.to(x.dtype), grad_up.to(x.dtype)


def _halves(x: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor | None]:
    x = compute(x)
    if KINDS[kind] == "swiglu" and up is None:
        return x.chunk(2, dim=-1)
    return x, None if up is None else compute(up)
