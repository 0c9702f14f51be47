"""Cross-entropy of a projection to the vocabulary, chunk by chunk of the rows: launcher and kernel.

Three products, each computed once, are torch's; the kernel between them overwrites a chunk's logits by their gradients.
Source: Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import tile_width
from ..common.launch import launch
from ..common.matmul import add_product

LOGITS = 2**25  # a chunk of few rows has so many: 64 MiB of bf16
BLOCK = 4096


class LossFeatures(NamedTuple):
    """The features of a call of the loss."""

    V: int  # entries of the vocabulary
    BLOCK: int
    HAS_BIAS: bool
    HAS_SOFTCAP: bool
    HAS_SMOOTHING: bool
    NEEDS_GRADIENT: bool


@triton.jit
def _logits(p_logits, p_bias, b_v, softcap, F: tl.constexpr):
    """A block of a row's logits in fp32, -inf behind the last."""
    m_v = b_v < F.V
    b_s = tl.load(p_logits + b_v, mask=m_v, other=0.0).to(tl.float32)  # (BLOCK,)
    if F.HAS_BIAS:
        b_s += tl.load(p_bias + b_v, mask=m_v, other=0.0)
    if F.HAS_SOFTCAP:  # c tanh(s / c)
        b_s = softcap * (2 * tl.sigmoid(2 * b_s / softcap) - 1)
    return tl.where(m_v, b_s, -float("inf"))


@triton.jit
def cross_entropy_kernel(
    p_logits, p_bias, p_target, p_scale, p_losses,
    smoothing, ignore_index, softcap, z_loss, F: tl.constexpr,
):  # fmt: skip
    """loss = (1 - e) (lse - s_target) + e mean_v (lse - s_v) + z lse^2, with the smoothing e; a program does a row.

    The row's logits become scale (softmax(s) (1 + 2 z lse) - e / V - (1 - e) [target]) (1 - (s / c)^2).
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_logits += i_t * F.V
    i_target = tl.load(p_target + i_t)
    counts = i_target != ignore_index

    b_m = tl.full([F.BLOCK], -float("inf"), tl.float32)  # each lane by itself
    b_l = tl.full([F.BLOCK], 0.0, tl.float32)
    b_sum = tl.full([F.BLOCK], 0.0, tl.float32)
    b_hit = tl.full([F.BLOCK], 0.0, tl.float32)
    for i_v in tl.range(0, F.V, F.BLOCK):
        b_v = i_v + tl.arange(0, F.BLOCK)
        b_s = _logits(p_logits, p_bias, b_v, softcap, F)
        # NaN stays: a maximum would lose it.
        b_new = tl.where((b_s > b_m) | (b_s != b_s), b_s, b_m)
        b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_l = b_l * tl.exp(b_m - b_pivot) + tl.exp(b_s - b_pivot)
        b_m = b_new
        b_hit += tl.where(b_v == i_target, b_s, 0.0)
        if F.HAS_SMOOTHING:
            b_sum += tl.where(b_v < F.V, b_s, 0.0)
    top = tl.max(b_m, 0)
    b_l = tl.where(b_m == -float("inf"), 0.0, b_l * tl.exp(b_m - top))
    above = tl.log(tl.sum(b_l, 0))
    lse = top + above
    loss = (1 - smoothing) * (top - tl.sum(b_hit, 0) + above) + z_loss * lse * lse
    if F.HAS_SMOOTHING:
        loss += smoothing * (lse - tl.sum(b_sum, 0) / F.V)
    tl.store(p_losses + i_t, tl.where(counts, loss, 0.0))

    if F.NEEDS_GRADIENT:
        scale = tl.where(counts, tl.load(p_scale + i_t), 0.0)
        factor = scale * (1 + 2 * z_loss * lse)
        for i_v in tl.range(0, F.V, F.BLOCK):
            b_v = i_v + tl.arange(0, F.BLOCK)
            b_s = _logits(p_logits, p_bias, b_v, softcap, F)
            b_g = tl.exp(b_s - top - above) * factor
            if F.HAS_SMOOTHING:
                b_g -= scale * smoothing / F.V
            b_g -= tl.where(b_v == i_target, scale * (1 - smoothing), 0.0)
            if F.HAS_SOFTCAP:
                b_part = b_s / softcap
                b_g *= 1 - b_part * b_part
            tl.store(p_logits + b_v, b_g.to(p_logits.dtype.element_ty), mask=b_v < F.V)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    label_smoothing: float,
    ignore_index: int,
    softcap: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses or, with row_scale, their scaled sum, and its gradients by x, weight and bias, each if needed.

    Arguments are those of the reference.
    """
    rows, targets = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    vocabulary = weight.shape[0]
    factors = weight.to(x.dtype)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    grads = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad_x = x.new_empty(rows.shape if needs_x else (0,), dtype=grads)
    grad_weight = x.new_zeros(weight.shape if needs_weight else (0,), dtype=torch.float32)
    grad_bias = x.new_zeros(vocabulary if needs_bias else 0, dtype=torch.float32)
    needs_gradient = needs_x or needs_weight or needs_bias
    scale, largest = None, None
    if needs_gradient:
        scale = row_scale.reshape(-1)
        if x.dtype == torch.float16 and scale.numel():
            # 1 / (number of targets) is too small for fp16: the gradients are multiplied by it at the end.
            largest = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            scale = scale / largest
    features = LossFeatures(
        V=vocabulary,
        BLOCK=min(BLOCK, tile_width(vocabulary)),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap > 0,
        HAS_SMOOTHING=label_smoothing > 0,
        NEEDS_GRADIENT=needs_gradient,
    )
    size = chunk_rows(rows.shape[0], vocabulary)
    chunk = torch.empty((min(size, rows.shape[0]), vocabulary), dtype=x.dtype, device=x.device)
    for first in range(0, rows.shape[0], size):
        own = slice(first, first + size)
        logits = torch.mm(rows[own], factors.T, out=chunk[: rows.shape[0] - first])
        launch(
            cross_entropy_kernel, (logits.shape[0],),
            logits, bias, targets[own], None if scale is None else scale[own], losses[own],
            label_smoothing, ignore_index, softcap, z_loss, features, num_warps=max(1, min(8, features.BLOCK // 512)),
        )  # fmt: skip
        if needs_x:
            grad_x[own] = logits @ factors
        if needs_weight:
            add_product(grad_weight, logits.T, rows[own])
        if needs_bias:
            grad_bias += logits.sum(0, dtype=torch.float32)
    if largest is not None:
        for grad in (grad_x, grad_weight, grad_bias):
            grad *= largest
    weight_dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    result = losses.view(target.shape) if row_scale is None else (losses * row_scale.reshape(-1)).sum()
    return result, grad_x.view(x.shape) if needs_x else grad_x, grad_weight.to(weight_dtype), grad_bias


def chunk_rows(rows: int, vocabulary: int) -> int:
    """The number of rows whose logits are in memory at once: enough to keep a chip busy, and little memory.

    At least a fourth of all rows: each chunk reads and writes all of the weight's gradient.
    """
    return max(256, LOGITS // vocabulary // 128 * 128, rows // 4 // 128 * 128)
