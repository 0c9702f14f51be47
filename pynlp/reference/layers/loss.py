"""Cross-entropy of a projection to the vocabulary in PyTorch: the default back end and the oracle of the fused one."""

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute


def linear_cross_entropy(
    x: Tensor,  # (.., D)
    weight: Tensor,  # (V, D) in x's dtype or fp32
    bias: Tensor | None,  # (V,) fp32, or fp64 for fp64 inputs
    target: Tensor,  # (..) int64, 0 to V - 1 or ignore_index
    row_scale: Tensor | None,  # (..) as bias
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    label_smoothing: float,
    ignore_index: int,
    softcap: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses (..); or their sum weighted by `row_scale`, and the gradients of that sum that are needed.

    Gradients of x and weight come in their dtypes, those of fp16 in fp32, as a gradient scaler will multiply them.
    loss = (1 - smoothing) (lse - s_target) + smoothing mean_v (lse - s_v) + z_loss lse^2, s the logits, 0 if ignored.
    """
    rows, scores_of = compute(x), compute(weight.to(x.dtype))
    logits = rows @ scores_of.T  # (.., V)
    if bias is not None:
        logits = logits + bias
    scores = softcap * torch.tanh(logits / softcap) if softcap > 0 else logits
    lse = scores.logsumexp(-1)
    counts = target != ignore_index
    place = target.where(counts, 0)[..., None]
    hit = scores.gather(-1, place)[..., 0]
    losses = lse - (1 - label_smoothing) * hit - label_smoothing * scores.mean(-1) + z_loss * lse.square()
    losses = losses.where(counts, 0.0)
    nothing = [
        x.new_empty(0, dtype=gradient_dtype(x)),
        weight.new_empty(0, dtype=gradient_dtype(weight)),
        lse.new_empty(0),
    ]
    if row_scale is None:
        return losses, *nothing
    scale = row_scale.where(counts, 0.0)[..., None]
    grad = (scores - lse[..., None]).exp() * (1 + 2 * z_loss * lse[..., None]) - label_smoothing / weight.shape[0]
    grad = grad.scatter_add(-1, place, grad.new_full(place.shape, label_smoothing - 1)) * scale
    if softcap > 0:
        grad = grad * (1 - (scores / softcap).square())
    flat = grad.flatten(0, -2)
    gradients = [
        (grad @ scores_of).to(gradient_dtype(x)) if needs_x else nothing[0],
        (flat.T @ rows.flatten(0, -2)).to(gradient_dtype(weight)) if needs_weight else nothing[1],
        flat.sum(0) if needs_bias else nothing[2],
    ]
    return (losses * row_scale).sum(), *gradients


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x's gradient is returned in."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype
