"""The layers of experts in PyTorch: the default back end and the oracle of the fused ones."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pynlp.reference.common.dtypes import compute
from pynlp.reference.moe.grouped import grouped_mm, grouped_mm_weight_backward

ACTIVATIONS = ("gelu", "relu", "swiglu", "swiglu_oai")
GATED = ("swiglu", "swiglu_oai")
OAI_FACTOR, OAI_LIMIT = 1.702, 7.0  # of GPT-OSS


def moe_mlp_forward(
    x: Tensor,  # (T, H)
    top_k_weights: Tensor,  # (T, K) in the compute dtype
    gate_up_proj: Tensor,  # (E, I, H), gated (E, 2 I, H)
    gate_up_bias: Tensor | None,  # (E, I), gated (E, 2 I)
    down_proj: Tensor,  # (E, H, I)
    down_bias: Tensor | None,  # (E, H)
    permutation: Tensor,  # as dispatch.moe_dispatch gives it
    places: Tensor,
    offsets: Tensor,
    activation: int,  # of ACTIVATIONS
    interleaved: bool,  # gates and what they gate take turns; else all gates come first
    keeps: bool,  # the second result is wanted
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token's experts, (T, H), and each row's values before the activation, or nothing."""
    rows = compute(x)[permutation.long() // top_k_weights.shape[1]]
    before = grouped_mm(rows, compute(gate_up_proj).mT, offsets, gate_up_bias)
    results = grouped_mm(activated(before, activation, interleaved), compute(down_proj).mT, offsets, down_bias)
    out = combined(results * _by_row(top_k_weights, permutation), places)
    return out.to(x.dtype), before.to(x.dtype) if keeps else x.new_empty(0)


def moe_mlp_backward(
    grad: Tensor,  # (T, H)
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    before: Tensor,  # forward's second result
    activation: int,
    interleaved: bool,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six arguments of forward; nothing for what is not there or not needed.

    Those of the projections are contiguous in the order of memory of these: with the last two dimensions exchanged
    where a projection's last dimension is not its contiguous one.
    """
    token = permutation.long() // top_k_weights.shape[1]
    own_weights = _by_row(top_k_weights, permutation)
    own_grad = compute(grad)[token]
    before = compute(before)
    grad_activated = grouped_mm(own_grad, compute(down_proj), offsets, None)  # without the weight
    value = activated(before, activation, interleaved)
    share = (grad_activated * value).sum(1)
    if down_bias is not None:
        share = share + (own_grad * _of_rows(down_bias, offsets, len(token))).sum(1)
    grad_before = activation_gradient(grad_activated * own_weights, before, activation, interleaved)

    nothing = x.new_empty(0)
    grad_x = grad_gate_up = grad_down = nothing
    grad_gate_up_bias = grad_down_bias = own_weights.new_empty(0)
    if needs_x:
        grad_x = combined(grouped_mm(grad_before, compute(gate_up_proj), offsets, None), places).to(x.dtype)
    if needs_gate_up or gate_up_bias is not None:
        lines, bias = grouped_mm_weight_backward(
            grad_before, compute(x)[token], offsets, is_by_lines(gate_up_proj), True
        )
        grad_gate_up = lines.to(gate_up_proj.dtype) if needs_gate_up else nothing
        grad_gate_up_bias = bias if gate_up_bias is not None else grad_gate_up_bias
    if needs_down or down_bias is not None:
        lines, bias = grouped_mm_weight_backward(own_grad * own_weights, value, offsets, is_by_lines(down_proj), True)
        grad_down = lines.to(down_proj.dtype) if needs_down else nothing
        grad_down_bias = bias if down_bias is not None else grad_down_bias
    grad_weights = (
        torch.where(places < 0, 0, share[places.clamp_min(0).long()])
        if share.numel()
        else (torch.zeros_like(top_k_weights))
    )
    return grad_x, grad_weights, grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias


def is_by_lines(weight: Tensor) -> bool:
    """Whether the last dimension of (E, N, K) is the contiguous one, else the one before it."""
    return weight.stride(2) == 1 or weight.shape[2] == 1 or weight.stride(1) != 1


def combined(rows: Tensor, places: Tensor) -> Tensor:
    """The sum of each token's rows, (T, columns); `places` (T, K) are their numbers, or -1 for no row."""
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    result = rows.new_zeros(places.shape[0], rows.shape[1])
    for place in places.long().unbind(1):
        result = result + padded[place]
    return result


def activated(before: Tensor, activation: int, interleaved: bool) -> Tensor:
    """The activation of (rows, I), or gated of (rows, 2 I)."""
    name = ACTIVATIONS[activation]
    if name == "gelu":
        return F.gelu(before)
    if name == "relu":
        return F.relu(before)
    gate, up = halves(before, interleaved)
    if name == "swiglu":
        return F.silu(gate) * up
    gate = gate.clamp(max=OAI_LIMIT)
    return gate * torch.sigmoid(OAI_FACTOR * gate) * (up.clamp(-OAI_LIMIT, OAI_LIMIT) + 1)


def activation_gradient(grad: Tensor, before: Tensor, activation: int, interleaved: bool) -> Tensor:
    """The gradient of `before`, given that of `activated`."""
    name = ACTIVATIONS[activation]
    if name == "gelu":  # Phi(x) + x phi(x)
        density = torch.exp(-0.5 * before.square()) / math.sqrt(2 * math.pi)
        return grad * (torch.special.ndtr(before) + before * density)
    if name == "relu":
        return grad * (before > 0)
    gate, up = halves(before, interleaved)
    if name == "swiglu":
        share = torch.sigmoid(gate)
        grad_gate, grad_up = grad * up * share * (1 + gate * (1 - share)), grad * gate * share
    else:
        low, more = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT) + 1
        share = torch.sigmoid(OAI_FACTOR * low)
        slope = share * (1 + OAI_FACTOR * low * (1 - share))
        grad_gate = grad * more * slope * ~(gate > OAI_LIMIT)
        grad_up = grad * low * share * ~(up.abs() > OAI_LIMIT)
    if interleaved:
        return torch.stack((grad_gate, grad_up), dim=-1).flatten(-2)
    return torch.cat((grad_gate, grad_up), dim=-1)


def halves(before: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gates, and what they gate."""
    if interleaved:
        return before[..., ::2], before[..., 1::2]
    return before.chunk(2, dim=-1)


def _by_row(top_k_weights: Tensor, permutation: Tensor) -> Tensor:
    """The weight of each row's slot, (rows, 1)."""
    return top_k_weights.flatten()[permutation.long()][:, None]


def _of_rows(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Each row's bias, of its expert; those behind the last group have any."""
    expert = torch.searchsorted(offsets, torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True)
    return bias[expert.clamp_max(len(offsets) - 1)]
