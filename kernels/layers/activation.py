"""Activations with dropout in one pass, forward and backward: launchers and kernels.

Arguments and results of the launchers are those of the functions of the same names in the reference.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv, tile_width
from ..common.launch import launch
from ..common.random import drop, dropped_parts
from ..common.rows import load_block, row_strides, store_block

KINDS = ("gelu", "relu", "swiglu")
ELEMENTS = 2048  # a program's: one or two times 16 bytes a thread
WARPS = 4


class ActivationFeatures(NamedTuple):
    """The features of a call of an activation, and its cut into blocks."""

    D: int  # columns of the result
    KIND: str
    HAS_DROPOUT: bool
    ALIGN: int  # row strides are given in multiples of it
    ROWS: int
    BLOCK_D: int


@triton.jit
def _normal_cdf(b_x):
    return 0.5 + 0.5 * tl.math.erf(b_x * 0.7071067811865476)


@triton.jit
def _block(F: tl.constexpr):
    """A program's rows (ROWS,), int64, its first column, and its columns (BLOCK_D,)."""
    blocks: tl.constexpr = (F.D + F.BLOCK_D - 1) // F.BLOCK_D
    b_row = (tl.program_id(0) // blocks).to(tl.int64) * F.ROWS + tl.arange(0, F.ROWS)
    i_d = tl.program_id(0) % blocks * F.BLOCK_D
    return b_row, i_d, i_d + tl.arange(0, F.BLOCK_D)


@triton.jit
def activation_forward_kernel(
    p_x, p_up, p_seed, p_out, stride_x, stride_up, stride_out, rows, dropped, kept_share, F: tl.constexpr,
):  # fmt: skip
    """dropout(x Phi(x)), dropout(max(x, 0)) or dropout(x sigmoid(x) up).

    Source: Hendrycks and Gimpel, arXiv 1606.08415; Shazeer, 2002.05202.
    """
    b_row, i_d, b_column = _block(F)
    m = (b_row < rows)[:, None] & (b_column < F.D)[None, :]  # (ROWS, BLOCK_D)
    b_x = load_block(p_x, b_row, stride_x, b_column, m, F.ALIGN)
    if F.KIND == "gelu":
        b_out = b_x * _normal_cdf(b_x)
    elif F.KIND == "relu":
        b_out = tl.where(b_x < 0, 0.0, b_x)  # NaN stays
    else:
        b_out = b_x * tl.sigmoid(b_x) * load_block(p_up, b_row, stride_up, b_column, m, F.ALIGN)
    if F.HAS_DROPOUT:
        b_out = drop(b_out, p_seed, b_row, i_d, dropped, kept_share)
    store_block(p_out, b_row, stride_out, b_column, m, b_out, F.ALIGN)


@triton.jit
def activation_backward_kernel(
    p_grad, p_x, p_up, p_seed, p_grad_x, p_grad_up,
    stride_grad, stride_x, stride_up, stride_grad_x, stride_grad_up, rows, dropped, kept_share, F: tl.constexpr,
):  # fmt: skip
    """grad_x = grad (Phi(x) + x phi(x)), grad (x > 0), or with s = sigmoid(x) grad up s (1 + x (1 - s));
    grad_up = grad x s; grad after dropout, phi the normal distribution's density."""
    b_row, i_d, b_column = _block(F)
    m = (b_row < rows)[:, None] & (b_column < F.D)[None, :]  # (ROWS, BLOCK_D)
    b_x = load_block(p_x, b_row, stride_x, b_column, m, F.ALIGN)
    b_grad = load_block(p_grad, b_row, stride_grad, b_column, m, F.ALIGN)
    if F.HAS_DROPOUT:
        b_grad = drop(b_grad, p_seed, b_row, i_d, dropped, kept_share)
    if F.KIND == "gelu":
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
        b_grad_x = b_grad * (_normal_cdf(b_x) + b_x * b_density)
    elif F.KIND == "relu":
        b_grad_x = b_grad * (b_x > 0).to(tl.float32)
    else:
        b_share = tl.sigmoid(b_x)
        b_up = load_block(p_up, b_row, stride_up, b_column, m, F.ALIGN)
        b_grad_x = b_grad * b_up * b_share * (1 + b_x * (1 - b_share))
        store_block(p_grad_up, b_row, stride_grad_up, b_column, m, b_grad * b_x * b_share, F.ALIGN)
    store_block(p_grad_x, b_row, stride_grad_x, b_column, m, b_grad_x, F.ALIGN)


def activation_forward(
    x: Tensor, up: Tensor | None, kind: int, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """The activation of x, (..., columns)."""
    gate, other = _halves(x, up, kind)
    out = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
    _launch(activation_forward_kernel, (gate, other), dropout_seed, (out,), kind, dropout_p)
    return out


def activation_backward(
    grad: Tensor, x: Tensor, up: Tensor | None, kind: int, dropout_p: float, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and up."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_up = torch.empty((0,) if up is None else x.shape, dtype=x.dtype, device=x.device)
    outputs = _halves(grad_x, None if up is None else grad_up, kind)
    _launch(activation_backward_kernel, (grad, *_halves(x, up, kind)), dropout_seed, outputs, kind, dropout_p)
    return grad_x, grad_up


def _halves(x: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor | None]:
    """The gate and up, which may be the halves of x."""
    return x.chunk(2, dim=-1) if KINDS[kind] == "swiglu" and up is None else (x, up)


def _launch(kernel, inputs: tuple, seed: Tensor | None, outputs: tuple, kind: int, dropout_p: float) -> None:
    if outputs[0].numel() == 0:
        return
    columns = outputs[0].shape[-1]
    rows = outputs[0].numel() // columns
    align, strides = row_strides(*inputs, *outputs)
    rows_of_block, block = tile(columns)
    features = ActivationFeatures(columns, KINDS[kind], dropout_p > 0, align, rows_of_block, block)
    dropped = dropped_parts(dropout_p)
    launch(
        kernel, (cdiv(rows, rows_of_block) * cdiv(columns, block),),
        *inputs, seed, *outputs, *strides, rows, dropped, 1 - dropped / 65536, features, num_warps=WARPS,
    )  # fmt: skip


def tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    block = min(tile_width(columns), 1024)
    return ELEMENTS // block, block
