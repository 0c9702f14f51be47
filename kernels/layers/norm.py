"""Dropout, residual and normalisation in one pass, forward and backward: launchers and kernels.

A program takes blocks of ROWS rows. Rows that fit a block are read once; longer rows are read block by block, once for
each sum that waits for another, and a third kernel sums the gradients of their parameters. Arguments and results of the
launchers are those of the functions of the same names in the reference.
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

ELEMENTS = 2048  # a block has at least so many; 16 a thread
# Elements that all programs of the backward pass sum side by side: enough for any chip, and no more partial sums.
ALL_ELEMENTS = 2**21
SUM_ROWS, SUM_COLUMNS = 64, 32  # a block of the parts of the weight's gradient
FORWARD_COLUMNS, BACKWARD_COLUMNS = 16384, 8192  # the most that a block has, for a multiprocessor's registers


class NormFeatures(NamedTuple):
    """The features of a call of a norm, and its cut into blocks."""

    D: int
    CENTRED: bool
    HAS_BIAS: bool
    HAS_RESIDUAL: bool  # backward: the residual's gradient is not that of x
    HAS_DROPOUT: bool
    HAS_GRAD_NEW: bool
    ALIGN: int  # row strides are given in multiples of it
    ROWS: int
    BLOCK_D: int


@triton.jit
def _load_columns(p_x, o_d, F: tl.constexpr):
    """Columns o_d of a vector that every program reads: (1, BLOCK_D)."""
    return tl.load(p_x + o_d, mask=o_d < F.D, other=0.0, eviction_policy="evict_last")[None, :]


class Sources(NamedTuple):
    """The operands of new."""

    p_x: tl.tensor
    p_residual: tl.tensor | None
    p_seed: tl.tensor | None
    p_new: tl.tensor
    stride_x: tl.tensor
    stride_residual: tl.tensor
    dropped: tl.tensor
    kept_share: tl.tensor


@triton.jit
def _new_block(sources, b_row, m_row, i_d, F: tl.constexpr):
    """new = residual + dropout(x) from column i_d on, rounded, 0 outside of the mask; its columns, and the mask."""
    o_d = i_d + tl.arange(0, F.BLOCK_D)
    m = m_row[:, None] & (o_d < F.D)[None, :]  # (ROWS, BLOCK_D)
    b_new = load_block(sources.p_x, b_row, sources.stride_x, o_d, m, F.ALIGN)
    if F.HAS_DROPOUT:
        b_new = drop(b_new, sources.p_seed, b_row, i_d, sources.dropped, sources.kept_share)
    if F.HAS_RESIDUAL:
        b_new += load_block(sources.p_residual, b_row, sources.stride_residual, o_d, m, F.ALIGN)
    return b_new.to(sources.p_new.dtype.element_ty).to(tl.float32), o_d, m


@triton.jit
def _centred(b_new, b_mean, m, F: tl.constexpr):
    if F.CENTRED:
        return tl.where(m, b_new - b_mean[:, None], 0.0)
    return b_new


@triton.jit
def _statistics_of_huge_rows(sources, b_row, m_row, eps, F: tl.constexpr):
    """mean and rstd by way of the rows divided by their largest value: of the rows themselves the squares overflow."""
    ROWS: tl.constexpr = F.ROWS
    BLOCK_D: tl.constexpr = F.BLOCK_D
    b_largest = tl.zeros([ROWS], tl.float32)
    for i_d in tl.range(0, F.D, BLOCK_D):
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(_new_block(sources, b_row, m_row, i_d, F)[0]), 1))
    b_scale = 1 / tl.where(b_largest > 0, b_largest, 1.0)
    b_mean = tl.zeros([ROWS], tl.float32)
    if F.CENTRED:
        for i_d in tl.range(0, F.D, BLOCK_D):
            b_new, _, _ = _new_block(sources, b_row, m_row, i_d, F)
            b_mean += tl.sum(b_new * b_scale[:, None], 1) / F.D
    b_variance = tl.zeros([ROWS], tl.float32)
    for i_d in tl.range(0, F.D, BLOCK_D):
        b_new, _, m = _new_block(sources, b_row, m_row, i_d, F)
        b_centre = _centred(b_new * b_scale[:, None], b_mean, m, F)
        b_variance += tl.sum(b_centre * b_centre, 1) / F.D
    return b_mean / b_scale, b_scale * tl.rsqrt(b_variance + eps * b_scale * b_scale)


@triton.jit
def _store_block(sources, p_weight, p_bias, p_y, b_new, b_mean, b_rstd, b_row, o_d, m, F: tl.constexpr):
    if F.HAS_RESIDUAL or F.HAS_DROPOUT:
        store_block(sources.p_new, b_row, F.D, o_d, m, b_new, 1)
    b_y = _centred(b_new, b_mean, m, F) * b_rstd[:, None] * _load_columns(p_weight, o_d, F)
    if F.HAS_BIAS:
        b_y += _load_columns(p_bias, o_d, F)
    store_block(p_y, b_row, F.D, o_d, m, b_y, 1)


@triton.jit
def norm_forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_seed, p_y, p_new, p_mean, p_rstd,
    stride_x, stride_residual, rows, eps, dropped, kept_share, F: tl.constexpr,
):  # fmt: skip
    """new = residual + dropout(x), rstd = (mean((new - mean(new))^2) + eps)^-1/2, y = (new - mean) rstd weight + bias.

    Without CENTRED the mean is 0. Source: Ba et al., arXiv 1607.06450; Zhang and Sennrich, 1910.07467.
    """
    ROWS: tl.constexpr = F.ROWS
    BLOCK_D: tl.constexpr = F.BLOCK_D
    b_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = b_row < rows
    sources = Sources(p_x, p_residual, p_seed, p_new, stride_x, stride_residual, dropped, kept_share)
    b_mean = tl.zeros([ROWS], tl.float32)
    if F.D <= BLOCK_D:
        b_new, o_d, m = _new_block(sources, b_row, m_row, 0, F)
        if F.CENTRED:
            b_mean = tl.sum(b_new, 1) / F.D
        b_centre = _centred(b_new, b_mean, m, F)
        b_squares = tl.sum(b_centre * b_centre, 1)
    else:
        if F.CENTRED:
            b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for i_d in tl.range(0, F.D, BLOCK_D):
                b_sum += _new_block(sources, b_row, m_row, i_d, F)[0]
            b_mean = tl.sum(b_sum, 1) / F.D
        b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for i_d in tl.range(0, F.D, BLOCK_D):
            b_new, _, m = _new_block(sources, b_row, m_row, i_d, F)
            b_centre = _centred(b_new, b_mean, m, F)
            b_sum += b_centre * b_centre
        b_squares = tl.sum(b_sum, 1)
    b_rstd = tl.rsqrt(b_squares / F.D + tl.full([], eps, tl.float32))
    b_overflows = (b_squares < float("inf")) == 0
    if tl.max(b_overflows.to(tl.int32), 0) > 0:
        b_scaled_mean, b_scaled_rstd = _statistics_of_huge_rows(sources, b_row, m_row, eps, F)
        b_mean = tl.where(b_overflows, b_scaled_mean, b_mean)
        b_rstd = tl.where(b_overflows, b_scaled_rstd, b_rstd)
    if F.CENTRED:
        tl.store(p_mean + b_row, b_mean, mask=m_row)
    tl.store(p_rstd + b_row, b_rstd, mask=m_row)
    if F.D <= BLOCK_D:
        _store_block(sources, p_weight, p_bias, p_y, b_new, b_mean, b_rstd, b_row, o_d, m, F)
    else:
        for i_d in tl.range(0, F.D, BLOCK_D):
            b_new, o_d, m = _new_block(sources, b_row, m_row, i_d, F)
            _store_block(sources, p_weight, p_bias, p_y, b_new, b_mean, b_rstd, b_row, o_d, m, F)


class Saved(NamedTuple):
    """A block of rows that backward reads."""

    p_grad_y: tl.tensor
    p_new: tl.tensor
    stride_y: tl.tensor
    stride_new: tl.tensor
    b_row: tl.tensor
    m_row: tl.tensor
    b_mean: tl.tensor
    b_rstd: tl.tensor


@triton.jit
def _saved(p_grad_y, p_new, p_mean, p_rstd, stride_y, stride_new, i_row, end, F: tl.constexpr):
    ROWS: tl.constexpr = F.ROWS
    b_row = i_row + tl.arange(0, ROWS)
    m_row = b_row < end
    b_mean = tl.zeros([ROWS], tl.float32)
    if F.CENTRED:
        b_mean = tl.load(p_mean + b_row, mask=m_row, other=0.0)
    b_rstd = tl.load(p_rstd + b_row, mask=m_row, other=0.0)
    return Saved(p_grad_y, p_new, stride_y, stride_new, b_row, m_row, b_mean, b_rstd)


@triton.jit
def _saved_block(saved, i_d, F: tl.constexpr):
    """The gradient of y and (new - mean) rstd from column i_d on; their columns, and their mask."""
    o_d = i_d + tl.arange(0, F.BLOCK_D)
    m = saved.m_row[:, None] & (o_d < F.D)[None, :]  # (ROWS, BLOCK_D)
    b_grad = load_block(saved.p_grad_y, saved.b_row, saved.stride_y, o_d, m, F.ALIGN)
    b_new = load_block(saved.p_new, saved.b_row, saved.stride_new, o_d, m, F.ALIGN)
    if F.CENTRED:
        b_new -= saved.b_mean[:, None]
    return b_grad, b_new * saved.b_rstd[:, None], o_d, m


class Gradients(NamedTuple):
    """The operands of the inputs' gradients, and where these are stored."""

    p_grad_new: tl.tensor | None
    p_seed: tl.tensor | None
    p_grad_residual: tl.tensor
    p_grad_x: tl.tensor
    stride_grad_new: tl.tensor
    dropped: tl.tensor
    kept_share: tl.tensor


@triton.jit
def _store_gradients(
    gradients, saved, b_scaled, b_normal, b_along, b_average, i_d, o_d, m, F: tl.constexpr
):  # fmt: skip
    b_grad = b_scaled - b_normal * b_along[:, None]
    if F.CENTRED:
        b_grad -= b_average[:, None]
    b_grad *= saved.b_rstd[:, None]
    if F.HAS_GRAD_NEW:
        b_grad += load_block(gradients.p_grad_new, saved.b_row, gradients.stride_grad_new, o_d, m, F.ALIGN)
    store_block(gradients.p_grad_residual, saved.b_row, F.D, o_d, m, b_grad, 1)
    if F.HAS_RESIDUAL:
        if F.HAS_DROPOUT:
            b_grad = drop(b_grad, gradients.p_seed, saved.b_row, i_d, gradients.dropped, gradients.kept_share)
        store_block(gradients.p_grad_x, saved.b_row, F.D, o_d, m, b_grad, 1)


@triton.jit
def norm_backward_kernel(
    p_grad_y, p_grad_new, p_new, p_weight, p_mean, p_rstd, p_seed,
    p_grad_residual, p_grad_x, p_weight_sums, p_bias_sums,
    stride_y, stride_grad_new, stride_new, rows, rows_of_program, dropped, kept_share, F: tl.constexpr,
):  # fmt: skip
    """grad_new += rstd (scaled - normal mean(scaled normal) - mean(scaled)) and grad_x = dropout(grad_new).

    normal = (new - mean) rstd, scaled = weight grad_y; the last mean is of a CENTRED norm only. A program goes through
    its rows and sums grad_y normal for the weight's gradient, grad_y for the bias's.
    """
    ROWS: tl.constexpr = F.ROWS
    BLOCK_D: tl.constexpr = F.BLOCK_D
    start = tl.program_id(0).to(tl.int64) * rows_of_program
    end = tl.minimum(start + rows_of_program, rows)
    gradients = Gradients(p_grad_new, p_seed, p_grad_residual, p_grad_x, stride_grad_new, dropped, kept_share)
    b_weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_row in tl.range(start, end, ROWS):
        saved = _saved(p_grad_y, p_new, p_mean, p_rstd, stride_y, stride_new, i_row, end, F)
        if F.D <= BLOCK_D:
            b_grad, b_normal, o_d, m = _saved_block(saved, 0, F)
            b_scaled = b_grad * _load_columns(p_weight, o_d, F)
            b_along = tl.sum(b_scaled * b_normal, 1) / F.D  # (ROWS,)
            b_average = tl.sum(b_scaled, 1) / F.D
            _store_gradients(gradients, saved, b_scaled, b_normal, b_along, b_average, 0, o_d, m, F)
            b_weight_sum += b_grad * b_normal
            b_bias_sum += b_grad
        else:
            b_products = tl.zeros([ROWS, BLOCK_D], tl.float32)
            b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for i_d in tl.range(0, F.D, BLOCK_D):
                b_grad, b_normal, o_d, _ = _saved_block(saved, i_d, F)
                b_scaled = b_grad * _load_columns(p_weight, o_d, F)
                b_products += b_scaled * b_normal
                b_sum += b_scaled
            b_along = tl.sum(b_products, 1) / F.D
            b_average = tl.sum(b_sum, 1) / F.D
            for i_d in tl.range(0, F.D, BLOCK_D):
                b_grad, b_normal, o_d, m = _saved_block(saved, i_d, F)
                b_scaled = b_grad * _load_columns(p_weight, o_d, F)
                _store_gradients(gradients, saved, b_scaled, b_normal, b_along, b_average, i_d, o_d, m, F)
    if F.D <= BLOCK_D:
        _store_sums(p_weight_sums, p_bias_sums, b_weight_sum, b_bias_sum, tl.program_id(0), 0, F)


@triton.jit
def _store_sums(p_weight_sums, p_bias_sums, b_weight_sum, b_bias_sum, i_program, i_d, F: tl.constexpr):
    """Stores a program's sums over its rows, which the launcher adds up."""
    o_d = i_d + tl.arange(0, F.BLOCK_D)
    o_sum = i_program.to(tl.int64) * F.D + o_d
    tl.store(p_weight_sums + o_sum, tl.sum(b_weight_sum, 0), mask=o_d < F.D)
    if F.HAS_BIAS:
        tl.store(p_bias_sums + o_sum, tl.sum(b_bias_sum, 0), mask=o_d < F.D)


@triton.jit
def norm_parameters_kernel(
    p_grad_y, p_new, p_mean, p_rstd, p_weight_sums, p_bias_sums, stride_y, stride_new, rows, rows_of_program,
    F: tl.constexpr,
):  # fmt: skip
    """The sums of norm_backward_kernel for rows of several blocks; a program does one block of columns."""
    ROWS: tl.constexpr = F.ROWS
    BLOCK_D: tl.constexpr = F.BLOCK_D
    blocks: tl.constexpr = (F.D + BLOCK_D - 1) // BLOCK_D
    i_program = tl.program_id(0) // blocks
    i_d = tl.program_id(0) % blocks * BLOCK_D
    start = i_program.to(tl.int64) * rows_of_program
    end = tl.minimum(start + rows_of_program, rows)
    b_weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_row in tl.range(start, end, ROWS):
        saved = _saved(p_grad_y, p_new, p_mean, p_rstd, stride_y, stride_new, i_row, end, F)
        b_grad, b_normal, _, _ = _saved_block(saved, i_d, F)
        b_weight_sum += b_grad * b_normal
        b_bias_sum += b_grad
    _store_sums(p_weight_sums, p_bias_sums, b_weight_sum, b_bias_sum, i_program, i_d, F)


@triton.jit
def norm_sums_kernel(p_weight_sums, p_bias_sums, p_grad_weight, p_grad_bias, programs, F: tl.constexpr):
    """The sums of the parts (programs, D) that the kernels above leave, in a fixed order."""
    ROWS: tl.constexpr = F.ROWS
    BLOCK_D: tl.constexpr = F.BLOCK_D
    D: tl.constexpr = F.D
    HAS_BIAS: tl.constexpr = F.HAS_BIAS
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_row in tl.range(0, programs, ROWS):
        b_row = i_row + tl.arange(0, ROWS)
        m = (b_row < programs)[:, None] & (o_d < D)[None, :]  # (ROWS, BLOCK_D)
        o_sum = b_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_weight_sum += tl.load(p_weight_sums + o_sum, mask=m, other=0.0)
        if HAS_BIAS:
            b_bias_sum += tl.load(p_bias_sums + o_sum, mask=m, other=0.0)
    tl.store(p_grad_weight + o_d, tl.sum(b_weight_sum, 0), mask=o_d < D)
    if HAS_BIAS:
        tl.store(p_grad_bias + o_d, tl.sum(b_bias_sum, 0), mask=o_d < D)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centred: bool, eps: float,
    dropout_p: float, dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, new, mean and rstd; new and mean are empty where they are x and 0."""
    rows, columns = x.shape[:-1], x.shape[-1]
    changed = residual is not None or dropout_p > 0
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(x.shape if changed else (0,), dtype=(x if residual is None else residual).dtype, device=x.device)
    mean = torch.empty(rows if centred else (0,), dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, new, mean, rstd
    align, strides = row_strides(x, residual)
    rows_of_block, block, warps = tile(columns, FORWARD_COLUMNS)
    features = NormFeatures(
        D=columns, CENTRED=centred, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_DROPOUT=dropout_p > 0, HAS_GRAD_NEW=False, ALIGN=align, ROWS=rows_of_block, BLOCK_D=block,
    )  # fmt: skip
    dropped = dropped_parts(dropout_p)
    launch(
        norm_forward_kernel, (cdiv(rstd.numel(), rows_of_block),),
        x, residual, weight, bias, dropout_seed, y, new, mean, rstd, *strides, rstd.numel(), eps,
        dropped, 1 - dropped / 65536, features, num_warps=warps,
    )  # fmt: skip
    return y, new, mean, rstd


def norm_backward(
    grad_y: Tensor, grad_new: Tensor | None, new: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, centred: bool,
    dropout_p: float, dropout_seed: Tensor | None, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the residual, x, weight and bias; that of x is empty where it is the residual's."""
    rows, columns = rstd.numel(), new.shape[-1]
    separate = dropout_p > 0 or new.dtype != grad_y.dtype
    grad_residual = torch.empty(new.shape, dtype=new.dtype, device=new.device)
    grad_x = torch.empty(new.shape if separate else (0,), dtype=grad_y.dtype, device=new.device)
    rows_of_block, block, warps = tile(columns, BACKWARD_COLUMNS)
    most = ALL_ELEMENTS // (rows_of_block * block)
    rows_of_program = max(1, cdiv(cdiv(rows, rows_of_block), most)) * rows_of_block
    programs = cdiv(rows, rows_of_program)
    grad_weight = torch.empty(columns, dtype=torch.float32, device=new.device)
    grad_bias = torch.empty(columns if needs_bias else 0, dtype=torch.float32, device=new.device)
    if rows == 0:
        return grad_residual, grad_x, grad_weight.zero_(), grad_bias.zero_()
    weight_sums = torch.empty((programs, columns), dtype=torch.float32, device=new.device)
    bias_sums = torch.empty((programs, columns if needs_bias else 0), dtype=torch.float32, device=new.device)
    align, strides = row_strides(grad_y, grad_new, new)
    features = NormFeatures(
        D=columns, CENTRED=centred, HAS_BIAS=needs_bias, HAS_RESIDUAL=separate, HAS_DROPOUT=dropout_p > 0,
        HAS_GRAD_NEW=grad_new is not None, ALIGN=align, ROWS=rows_of_block, BLOCK_D=block,
    )  # fmt: skip
    dropped = dropped_parts(dropout_p)
    launch(
        norm_backward_kernel, (programs,),
        grad_y, grad_new, new, weight, mean, rstd, dropout_seed, grad_residual, grad_x, weight_sums, bias_sums,
        *strides, rows, rows_of_program, dropped, 1 - dropped / 65536, features, num_warps=warps,
    )  # fmt: skip
    if columns > block:
        launch(
            norm_parameters_kernel, (programs * cdiv(columns, block),),
            grad_y, new, mean, rstd, weight_sums, bias_sums, strides[0], strides[2], rows, rows_of_program,
            features, num_warps=warps,
        )  # fmt: skip
    launch(
        norm_sums_kernel, (cdiv(columns, SUM_COLUMNS),), weight_sums, bias_sums, grad_weight, grad_bias, programs,
        features._replace(ROWS=SUM_ROWS, BLOCK_D=SUM_COLUMNS), num_warps=4,
    )  # fmt: skip
    return grad_residual, grad_x, grad_weight, grad_bias


def tile(columns: int, most: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and a program's warps."""
    block = tile_width(columns)
    if block > most:
        block = 2 * ELEMENTS
    rows = max(1, ELEMENTS // block)
    return rows, block, rows * block // 512 if block < 16384 else 16
