"""Scales of a layer's inputs that lower the error of its quantized weight: AWQ, and SmoothQuant.

Both multiply columns of the weight with scales s, by which the inputs are divided (`pynlp.quantize.folding`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 20  # exponents that are tried


def awq_scale(
    weights: list[Tensor],  # (N_i, K), fp32, of layers with the same inputs
    hessian: Tensor,  # (K, K), of the inputs
    magnitude: Tensor,  # (K,), mean |x|
    rounded: Callable[[Tensor], Tensor],  # a weight after quantization
) -> Tensor:
    """Scales mean|x|^a `(K,)`, of the a from 0 to below 1 with the least error of the layers' outputs.

    ||(W - rounded(W diag(s)) diag(1/s)) X||^2 is the error's inner product with itself by X X^T. Lin et al.,
    arXiv 2306.00978, equations 4 and 5.
    """
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(STEPS):
        scale = normalised(magnitude ** (step / STEPS), magnitude > 0)
        error = 0.0
        for weight in weights:
            lost = (weight - rounded(weight * scale) / scale).float()
            error += ((lost @ hessian) * lost).sum().item()
        if error < least:
            best, least = scale, error
    return best


def smoothquant_scale(weights: list[Tensor], largest: Tensor, alpha: float) -> Tensor:
    """Scales max|x|^alpha / max|w|^(1 - alpha) `(K,)`. Xiao et al., arXiv 2211.10438, equation 4."""
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return normalised(largest**alpha / of_weights ** (1 - alpha), (largest > 0) & (of_weights > 0))


def normalised(scale: Tensor, live: Tensor) -> Tensor:
    """Scales of geometric mean 1, at most 10^4 apart from it; 1 where a column is not live."""
    logarithm = scale.log()
    logarithm = logarithm - logarithm[live].mean() if live.any() else logarithm
    return torch.where(live, logarithm, 0).exp().clamp(1e-4, 1e4)
