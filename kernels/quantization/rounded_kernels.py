"""Products in integers: x is rounded to 8 bits row by row, columns of outliers aside, and multiplied by codes.

Sums of products are exact. Outliers, whose codes are 0, are multiplied in floating point, a few columns at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .integer_codes import load_scales, load_stored, pitch_of, plain_codes
from .integer_kernels import rows_of
from .integers import SMALLEST, quotients, rounded
from .linear_kernels import load_rows, part_of, store_rows


class RoundedRows(NamedTuple):
    """What belongs to the codes of rows: tensors of a launch, their pointers in a kernel."""

    scale: torch.Tensor  # fp32 (M,)
    sums: torch.Tensor  # of the codes, int32 (M,)
    x: torch.Tensor  # the rows themselves
    stride: int  # theirs
    places: torch.Tensor | None  # of outliers among the columns, int32 (K,)
    count: torch.Tensor | None  # of outliers, int32 (1,)


@triton.jit
def mark_kernel(
    p_x, p_mark, stride_x, rows, columns, threshold,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """1 for the columns that have a value of x at least as large as the threshold, 0 for others."""
    b_k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_large = tl.full([ROWS, COLUMNS], 0, tl.int32)
    for i_m in tl.range(0, rows, ROWS):
        b_m = (i_m + tl.arange(0, ROWS)).to(tl.int64)
        m_x = (b_m < rows)[:, None] & (b_k < columns)[None, :]
        b_x = tl.load(p_x + b_m[:, None] * stride_x * ALIGN + b_k[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_large |= (tl.abs(b_x) >= threshold).to(tl.int32)
    tl.store(p_mark + b_k, tl.max(b_large, 0).to(tl.uint8), mask=b_k < columns)


@triton.jit
def places_kernel(p_mark, p_places, p_count, columns, BLOCK: tl.constexpr):
    """The places of the columns that are marked, in order, and how many there are; by one program."""
    count = 0
    for i_k in tl.range(0, columns, BLOCK):
        b_k = i_k + tl.arange(0, BLOCK)
        b_mark = tl.load(p_mark + b_k, mask=b_k < columns, other=0).to(tl.int32)
        tl.store(p_places + count + tl.cumsum(b_mark, 0) - 1, b_k, mask=b_mark > 0)
        count += tl.sum(b_mark, 0)
    tl.store(p_count, count)


@triton.jit
def _load_near(p_row, p_mark, b_k, columns, OUTLIERS: tl.constexpr):
    """Values of a row in fp32, and whether they are outliers; outliers, too, are given as they are."""
    b_x = tl.load(p_row + b_k, mask=b_k < columns, other=0.0).to(tl.float32)
    m_far = tl.zeros(b_k.shape, tl.int32) > 0
    if OUTLIERS:
        m_far = tl.load(p_mark + b_k, mask=b_k < columns, other=0) > 0
    return b_x, m_far


@triton.jit
def _row_scale(b_largest, b_nan):
    """The largest magnitude / 127, NaN where a value is."""
    b_scale = tl.div_rn(b_largest, tl.full(b_largest.shape, 127.0, tl.float32))
    b_scale = tl.where((b_scale == 0) & (b_largest > 0), SMALLEST, b_scale)
    return tl.where(b_nan > 0, float("nan"), b_scale)


@triton.jit
def round_kernel(
    p_x, p_mark, p_codes, p_scale, p_sums, p_near, stride_x, columns, pitch,
    GROUP: tl.constexpr, OUTLIERS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of x rounded to codes with one scale, or with GROUP one for as many values.

    With p_near it is written as values in fp32, outliers as they are; else as codes, 0 for outliers, sum and scale.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_row * stride_x * ALIGN
    WIDTH: tl.constexpr = GROUP if GROUP > 0 else BLOCK
    PIECES: tl.constexpr = BLOCK // WIDTH
    b_scale = tl.full([PIECES], 0.0, tl.float32)
    if GROUP == 0:
        b_largest = tl.full([1], 0.0, tl.float32)
        b_nan = tl.full([1], 0, tl.int32)
        for i_k in tl.range(0, columns, BLOCK):
            b_x, m_far = _load_near(p_row, p_mark, i_k + tl.arange(0, BLOCK), columns, OUTLIERS)
            b_x = tl.where(m_far, 0.0, tl.abs(b_x))
            b_largest = tl.maximum(b_largest, tl.max(b_x, 0))
            b_nan = tl.maximum(b_nan, tl.max((b_x != b_x).to(tl.int32), 0))
        b_scale = _row_scale(b_largest, b_nan)
    b_sum = tl.full([1], 0, tl.int32)
    for i_k in tl.range(0, columns, BLOCK):
        b_k = i_k + tl.arange(0, BLOCK)
        b_x, m_far = _load_near(p_row, p_mark, b_k, columns, OUTLIERS)
        b_own = tl.reshape(tl.where(m_far, 0.0, b_x), [PIECES, WIDTH])
        if GROUP > 0:
            b_nan = tl.max((b_own != b_own).to(tl.int32), 1)
            b_scale = _row_scale(tl.max(tl.abs(b_own), 1), b_nan)  # (PIECES,)
        b_code = tl.minimum(tl.maximum(rounded(quotients(b_own, b_scale[:, None])), -127.0), 127.0)
        if p_near is None:
            b_byte = tl.reshape(b_code, [BLOCK]).to(tl.int8)
            b_sum += tl.sum(b_byte.to(tl.int32), 0)
            tl.store(p_codes + i_row * pitch + b_k, b_byte, mask=b_k < columns)
        else:
            b_near = tl.reshape(b_code * b_scale[:, None], [BLOCK])
            tl.store(p_near + i_row * columns + b_k, tl.where(m_far, b_x, b_near), mask=b_k < columns)
    if p_near is None:
        tl.store(p_scale + i_row + tl.arange(0, 1), b_scale)
        tl.store(p_sums + i_row + tl.arange(0, 1), b_sum)


@triton.jit
def rounded_linear_kernel(
    p_x, rounded_rows, weight, p_bias, p_out, stride_x, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias of codes of x; a program does a tile (BLOCK_M, BLOCK_N), or a part of its sums."""
    pitch = pitch_of(columns, F.UNIT, F.W.BITS)
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(columns, F.BLOCK_K), splits, F.BLOCK_K, F)
    tiles = tl.cdiv(rows, F.BLOCK_M)
    i_m = i_tile % tiles * F.BLOCK_M
    i_n = i_tile // tiles * F.BLOCK_N
    o_n = rows_of(i_n, outputs, F)
    b_m = tl.minimum(i_m + tl.arange(0, F.BLOCK_M), rows - 1)
    o_byte = tl.arange(0, F.BLOCK_K * F.W.BITS // 8)
    b_sums = tl.full([F.BLOCK_M, F.BLOCK_N], 0, tl.int32)
    b_out = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    for i_k in tl.range(start, end, F.BLOCK_K):
        b_x = load_rows(p_x, i_m, i_k, stride_x, rows, columns, F.EVEN_K, F.BLOCK_K, F)
        b_stored = load_stored(weight[0], i_n, i_k, o_n[:, None], o_byte[None, :], pitch, F.EVEN_K, F.W.BITS)
        b_w = tl.trans(plain_codes(b_stored, F.W.BITS, F.PTX))  # (BLOCK_K, BLOCK_N)
        if F.SCALED == "rows":
            b_sums = tl.dot(b_x, b_w, b_sums, out_dtype=tl.int32)
        else:
            b_sum = tl.dot(b_x, b_w, out_dtype=tl.int32)
            b_out += _scaled(b_sum, tl.sum(b_x.to(tl.int32), 1), weight, i_n, i_k, o_n, columns, F)
    if F.SCALED == "rows":
        b_total = tl.load(rounded_rows[1] + b_m)
        if F.SPLIT:
            b_total = tl.where(i_s == 0, b_total, 0)
        b_out = _scaled(b_sums, b_total, weight, i_n, 0, o_n, columns, F)
    b_out *= tl.load(rounded_rows[0] + b_m)[:, None]
    if F.OUTLIERS:
        count = tl.load(rounded_rows[5])
        if F.SPLIT:
            count = tl.where(i_s == 0, count, 0)
        b_out = _add_outliers(b_out, rounded_rows, weight, i_n, b_m, o_n, pitch, columns, count, F)
    store_rows(p_out, p_bias, b_out, i_m, i_n, i_s, rows, outputs, F.BLOCK_N, F)


@triton.jit
def _scaled(b_sum, b_total, weight, i_n, i_k, o_n, columns, F: tl.constexpr):
    """Sums of products (BLOCK_M, BLOCK_N) by the weight's scales, given the sums of x's codes alone (BLOCK_M,)."""
    b_scale, b_zero, b_minimum = load_scales(weight, i_n, i_k, o_n, tl.arange(0, 1), columns, F.W)
    b_scale, b_zero = tl.reshape(b_scale, [1, F.BLOCK_N]), tl.reshape(b_zero, [1, F.BLOCK_N])
    if F.W.ZERO or (F.W.BITS == 4 and not F.W.MINIMUM):
        b_sum -= b_zero.to(tl.int32) * b_total[:, None]
    b_out = b_sum.to(tl.float32) * b_scale
    if F.W.MINIMUM:
        b_out += tl.reshape(b_minimum, [1, F.BLOCK_N]) * b_total.to(tl.float32)[:, None]
    return b_out


@triton.jit
def _add_outliers(b_out, rounded_rows, weight, i_n, b_m, o_n, pitch, columns, count, F: tl.constexpr):
    """b_out and the products of `count` columns of x that were not rounded, in fp32."""
    p_x = rounded_rows[2] + b_m.to(tl.int64)[:, None] * rounded_rows[3]
    p_codes = weight[0] + tl.cast(i_n, tl.int64) * pitch
    for i in tl.range(0, count, 16):
        o = i + tl.arange(0, 16)
        b_place = tl.load(rounded_rows[4] + o, mask=o < count, other=0)
        b_x = tl.load(p_x + b_place[None, :], mask=(o < count)[None, :], other=0.0).to(tl.float32)
        b_code = tl.load(p_codes + (o_n[:, None] * pitch + (b_place * F.W.BITS // 8)[None, :])).to(tl.int32)
        if F.W.BITS == 4:
            b_code = (b_code >> (b_place % 2 * 4)[None, :]) & 15
        b_scale, b_zero, b_minimum = load_scales(weight, i_n, 0, o_n, b_place, columns, F.W)
        b_w = (b_code.to(tl.float32) - b_zero) * b_scale + b_minimum  # (BLOCK_N, 16)
        b_out = tl.dot(b_x, tl.trans(b_w), b_out, input_precision=F.PRECISION)
    return b_out
