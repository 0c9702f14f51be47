"""Dropout, residual and normalisation in PyTorch: the default back end and the oracle of the fused ones."""

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute
from pynlp.reference.common.random import dropped


def norm_forward(
    x: Tensor,  # (.., D)
    residual: Tensor | None,  # (.., D) in x's dtype or fp32
    weight: Tensor,  # (D,) fp32, or fp64 for fp64 inputs, as all statistics
    bias: Tensor | None,  # (D,)
    centred: bool,  # layer norm; else rms norm
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,  # (1,) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = norm(new), new = residual + dropout(x), and the mean and 1 / deviation of the rows of new.

    y has x's dtype, new the residual's; new is empty where it is x itself, the mean where it is not used.
    """
    new = dropped(compute(x), dropout_p, dropout_seed)
    if residual is not None:
        new = (new + compute(residual)).to(residual.dtype)
    elif dropout_p > 0:
        new = new.to(x.dtype)
    values = compute(new)  # what is normalised is what backward will read
    mean, rstd = _statistics(values, centred, eps)
    centre = values - mean[..., None] if centred else values
    y = centre * rstd[..., None] * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return y, x.new_empty(0) if residual is None and dropout_p == 0 else new, mean, rstd


def _statistics(values: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor]:
    """The mean, or nothing, and 1 / deviation; rows with huge values are scaled first: their squares overflow."""
    largest = values.abs().amax(-1) if values.numel() else values.new_empty(values.shape[:-1])
    huge = (largest > torch.finfo(values.dtype).max ** 0.5 / values.shape[-1]) & largest.isfinite()
    scale = torch.where(huge, 1 / largest, 1.0)
    values = values * scale[..., None]
    mean = values.mean(-1) if centred else values.new_empty(0)
    centre = values - mean[..., None] if centred else values
    rstd = (centre.square().mean(-1) + eps * scale.square()).rsqrt() * scale
    return mean / scale if centred else mean, rstd


def norm_backward(
    grad_y: Tensor,
    grad_new: Tensor | None,
    new: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    centred: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, weight and bias; x's is empty where it equals the residual's."""
    values, grad = compute(new), compute(grad_y)
    centre = (values - mean[..., None]) if centred else values
    normal = centre * rstd[..., None]
    scaled = grad * weight
    change = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if centred:
        change = change - scaled.mean(-1, keepdim=True)
    grad_residual = change * rstd[..., None]
    if grad_new is not None:
        grad_residual = grad_residual + compute(grad_new)
    grad_x = grad_y.new_empty(0)
    if dropout_p > 0 or new.dtype != grad_y.dtype:
        grad_x = dropped(grad_residual, dropout_p, dropout_seed).to(grad_y.dtype)
    rows = tuple(range(grad.dim() - 1))
    grad_bias = grad.sum(rows) if needs_bias else weight.new_empty(0)
    return grad_residual.to(new.dtype), grad_x, (grad * normal).sum(rows), grad_bias
