"""Products with weights of integers, whose codes become numbers in registers: no dense copy of a weight is made.

A scale of a whole row is left to the end; one of as many columns as a block has, or a multiple, to the block's sums.
Others, and all that come with minima, belong to each weight. The parts of cut sums are added as those of 4-bit formats.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .integer_codes import differences, half_differences, load_scales, load_stored, pitch_of
from .linear_kernels import load_rows, part_of, store_rows


class IntegerFeatures(NamedTuple):
    """The features of a call of a product, and its cut into blocks."""

    W: NamedTuple  # integer_codes.Scales
    WIDTH: int  # columns of a block that share a scale
    SCALED: str  # what is multiplied by scales: "rows", sums of "blocks", or "weights"
    PTX: bool
    HAS_BIAS: bool
    SPLIT: bool  # the sums are cut into parts
    UNIT: int  # the weight's columns are given in multiples of it
    ALIGN: int  # x's row stride is given in multiples of it
    LONG: bool  # whether offsets within a tile of x need 64 bits
    EVEN_N: bool  # the weight's rows fill blocks ...
    EVEN_K: bool  # ... and its columns
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PRECISION: str | None  # of products of fp32
    STAGES: int  # of the loop over blocks
    OUTLIERS: bool = False  # some columns of x may not have been rounded


@triton.jit
def rows_of(i_n, outputs, F: tl.constexpr):
    """Rows of the weight from i_n on, (BLOCK_N,); behind the last the last one."""
    o_n = tl.arange(0, F.BLOCK_N)
    if not F.EVEN_N:
        o_n = tl.minimum(o_n, outputs - 1 - i_n)
    return o_n


@triton.jit
def load_tile(weight, i_n, i_k, o_n, pitch, columns, F: tl.constexpr, DTYPE: tl.constexpr):
    """Rows i_n + o_n and columns i_k .. i_k + BLOCK_K: (BLOCK_N, BLOCK_K), and the scales of the rows (BLOCK_N, 1).

    The tile is of codes minus zeros, where the weights themselves are scaled of the values. What is outside is finite.
    """
    PIECES: tl.constexpr = F.BLOCK_K // F.WIDTH
    BYTES: tl.constexpr = F.WIDTH * F.W.BITS // 8
    o_byte = (tl.arange(0, PIECES) * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]  # (PIECES, BYTES)
    b_stored = load_stored(
        weight[0], i_n, i_k, o_n[:, None, None], o_byte[None, :, :], pitch, F.EVEN_K, F.W.BITS
    )  # (BLOCK_N, PIECES, BYTES)
    o_k = tl.arange(0, PIECES) * F.WIDTH
    b_scale, b_zero, b_minimum = load_scales(weight, i_n, i_k, o_n, o_k, columns, F.W)
    b_w = differences(b_stored, b_zero, F.W, DTYPE, F.PTX)  # (BLOCK_N, PIECES, WIDTH)
    if F.SCALED == "weights":
        b_value = b_w.to(tl.float32) * b_scale[:, :, None]
        if F.W.MINIMUM:
            b_value += b_minimum[:, :, None]
        b_w = b_value.to(DTYPE)
    return tl.reshape(b_w, [F.BLOCK_N, F.BLOCK_K]), b_scale


@triton.jit
def integer_linear_kernel(
    p_x, weight, p_bias, p_out, stride_x, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias; a program does a tile (BLOCK_M, BLOCK_N), or a part of its sums."""
    pitch = pitch_of(columns, F.UNIT, F.W.BITS)
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(columns, F.BLOCK_K), splits, F.BLOCK_K, F)
    tiles = tl.cdiv(rows, F.BLOCK_M)
    i_m = i_tile % tiles * F.BLOCK_M
    i_n = i_tile // tiles * F.BLOCK_N
    o_n = rows_of(i_n, outputs, F)
    b_out = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    for i_k in tl.range(start, end, F.BLOCK_K):
        b_x = load_rows(p_x, i_m, i_k, stride_x, rows, columns, F.EVEN_K, F.BLOCK_K, F)
        b_w, b_scale = load_tile(weight, i_n, i_k, o_n, pitch, columns, F, b_x.dtype)
        if F.SCALED == "blocks":
            b_sum = tl.dot(b_x, tl.trans(b_w), input_precision=F.PRECISION)
            b_out += b_sum * tl.reshape(b_scale, [F.BLOCK_N])[None, :]
        else:
            b_out = tl.dot(b_x, tl.trans(b_w), b_out, input_precision=F.PRECISION)
    if F.SCALED == "rows":
        b_scale, _, _ = load_scales(weight, i_n, 0, o_n, tl.arange(0, 1), columns, F.W)
        b_out *= tl.reshape(b_scale, [F.BLOCK_N])[None, :]
    store_rows(p_out, p_bias, b_out, i_m, i_n, i_s, rows, outputs, F.BLOCK_N, F)


@triton.jit
def integer_linear_backward_kernel(
    p_grad, weight, p_bias, p_out, stride_grad, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = grad W; a program does a tile (BLOCK_M, BLOCK_K), or a part of its sums."""
    pitch = pitch_of(columns, F.UNIT, F.W.BITS)
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(outputs, F.BLOCK_N), splits, F.BLOCK_N, F)
    tiles = tl.cdiv(rows, F.BLOCK_M)
    i_m = i_tile % tiles * F.BLOCK_M
    i_k = i_tile // tiles * F.BLOCK_K
    b_out = tl.full([F.BLOCK_M, F.BLOCK_K], 0.0, tl.float32)
    for i_n in tl.range(start, end, F.BLOCK_N):
        b_grad = load_rows(p_grad, i_m, i_n, stride_grad, rows, outputs, F.EVEN_N, F.BLOCK_N, F)
        b_w, _ = load_tile(weight, i_n, i_k, rows_of(i_n, outputs, F), pitch, columns, F, b_grad.dtype)
        b_out = tl.dot(b_grad, b_w, b_out, input_precision=F.PRECISION)
    store_rows(p_out, p_bias, b_out, i_m, i_k, i_s, rows, columns, F.BLOCK_K, F)


@triton.jit
def integer_few_kernel(
    p_x, weight, p_bias, p_out, stride_x, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias for one row of x by multiply-adds; a program does BLOCK_N rows of W, or a part of them.

    Each thread sums its own columns, 16 bytes at a time, to the end. All columns of 16 bytes have one scale.
    """
    pitch = pitch_of(columns, F.UNIT, F.W.BITS)
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(columns, F.BLOCK_K), splits, F.BLOCK_K, F)
    i_n = i_tile * F.BLOCK_N
    PIECES: tl.constexpr = F.BLOCK_K // F.WIDTH
    o_n = rows_of(i_n, outputs, F)
    o_k = tl.arange(0, F.BLOCK_K)
    o_byte = (tl.arange(0, PIECES) * 16)[:, None] + tl.arange(0, 16)[None, :]  # (PIECES, 16)
    b_sums = tl.full([F.BLOCK_N, PIECES], 0.0, tl.float32)
    for i_k in tl.range(start, end, F.BLOCK_K, num_stages=F.STAGES):
        b_stored = load_stored(
            weight[0], i_n, i_k, o_n[:, None, None], o_byte[None, :, :], pitch, F.EVEN_K, F.W.BITS
        )  # (BLOCK_N, PIECES, 16)
        b_scale, b_zero, b_minimum = load_scales(
            weight, i_n, i_k, o_n, tl.arange(0, PIECES) * F.WIDTH, columns, F.W
        )  # (BLOCK_N, PIECES) or (BLOCK_N, 1)
        b_zero = tl.broadcast_to(b_zero, [F.BLOCK_N, PIECES])[:, :, None]
        if F.EVEN_K:
            b_x = tl.load(p_x + i_k + o_k, eviction_policy="evict_last").to(tl.float32)
        else:
            b_x = tl.load(p_x + i_k + o_k, mask=o_k < columns - i_k, other=0.0, eviction_policy="evict_last")
            b_x = b_x.to(tl.float32)
        if F.W.BITS == 8:
            b_x = tl.reshape(b_x, [PIECES, 16])
            b_code = b_stored.to(tl.float32)
            if F.W.ZERO:
                b_code -= b_zero
            b_product = tl.sum(b_code * b_x[None, :, :], 2)  # (BLOCK_N, PIECES)
            b_x = tl.sum(b_x, 1)
        else:
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [PIECES, 16, 2]))
            b_first, b_second = half_differences(b_stored, b_zero, tl.float32, F.PTX)
            b_product = tl.sum(b_first * b_x0[None, :, :], 2)
            b_product += tl.sum(b_second * b_x1[None, :, :], 2)
            b_x = tl.sum(b_x0, 1) + tl.sum(b_x1, 1)
        if F.SCALED == "rows":
            b_sums += b_product
        else:
            b_sums += b_product * b_scale
        if F.W.MINIMUM:
            b_sums += b_x[None, :] * b_minimum
    b_out = tl.sum(b_sums, 1)  # (BLOCK_N,)
    if F.SCALED == "rows":
        b_scale, _, _ = load_scales(weight, i_n, 0, o_n, tl.arange(0, 1), columns, F.W)
        b_out *= tl.reshape(b_scale, [F.BLOCK_N])
    if F.HAS_BIAS and not F.SPLIT:
        b_out += tl.load(p_bias + i_n + o_n)
    p_out += tl.cast(i_s, tl.int64) * outputs + i_n
    o_out = tl.arange(0, F.BLOCK_N)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_out < outputs - i_n)
