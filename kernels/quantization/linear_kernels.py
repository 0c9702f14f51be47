"""Products with 4-bit weights, which are decoded in registers: no dense copy of a weight is made.

A product whose tiles are too few for the chip is cut along the dimension that is summed over; a second kernel adds the
parts' sums, in fp32 and in one order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .codes import SMALLEST, load_pairs, pair_table, weight_tile


class LinearFeatures(NamedTuple):
    """The features of a call of a product, and its cut into blocks."""

    KIND: str
    BLOCKSIZE: int
    NESTED: bool
    HAS_BIAS: bool
    SPLIT: bool  # the sums are cut into parts
    UNIT: int  # the weight's columns are given in multiples of it; above 1 its rows have whole blocks of scales
    ALIGN: int  # x's row stride is given in multiples of it
    LONG: bool  # whether offsets within a tile of x need 64 bits
    EVEN_N: bool  # the weight's rows fill blocks ...
    EVEN_K: bool  # ... and its columns
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PRECISION: str | None  # of products of fp32
    STAGES: int  # of the loop over blocks
    NARROW: bool  # codes have 8 significant bits
    OPAQUE: bool


@triton.jit
def load_rows(p_x, i_m, i_c, stride, rows, columns, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, F: tl.constexpr):
    """Rows i_m .. i_m + BLOCK_M and columns i_c .. i_c + BLOCK_C; rows behind the last are the last one's."""
    o_m = tl.minimum(tl.arange(0, F.BLOCK_M), rows - 1 - i_m)
    o_c = tl.arange(0, BLOCK_C)
    if F.LONG:
        o_m = o_m.to(tl.int64)
    offsets = (o_m * stride * F.ALIGN)[:, None] + o_c[None, :]
    p_tile = p_x + (tl.cast(i_m, tl.int64) * stride * F.ALIGN + i_c)
    if EVEN:
        return tl.load(p_tile + offsets)
    return tl.load(p_tile + offsets, mask=(o_c < columns - i_c)[None, :], other=0.0)


@triton.jit
def store_rows(p_out, p_bias, b_out, i_m, i_c, i_s, rows, columns, BLOCK_C: tl.constexpr, F: tl.constexpr):
    """Stores a tile of the result or, where sums are cut into parts, of part i_s."""
    b_m = i_m + tl.arange(0, F.BLOCK_M)
    b_c = i_c + tl.arange(0, BLOCK_C)
    m_c = b_c < columns
    if F.HAS_BIAS and not F.SPLIT:
        b_out += tl.load(p_bias + b_c, mask=m_c, other=0.0)[None, :]
    p_out += tl.cast(i_s, tl.int64) * rows * columns
    o_out = b_m.to(tl.int64)[:, None] * columns + b_c[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(b_m < rows)[:, None] & m_c[None, :])


@triton.jit
def part_of(blocks, splits, BLOCK: tl.constexpr, F: tl.constexpr):
    """A program's tile, its part i_s, and the part's start and end, of `blocks` blocks that are summed over."""
    i_tile = tl.program_id(0)
    i_s = tl.zeros_like(i_tile)
    start = tl.zeros_like(i_tile)
    end = blocks * BLOCK
    if F.SPLIT:
        i_s = i_tile % splits
        i_tile = i_tile // splits
        share = tl.cdiv(blocks, splits)
        start = i_s * share * BLOCK
        end = tl.minimum(start + share * BLOCK, end)
    return i_tile, i_s, start, end


@triton.jit
def linear_kernel(
    p_x, weight, p_bias, p_out, stride_x, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias; a program does a tile (BLOCK_M, BLOCK_N), or a part of its sums."""
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(columns, F.BLOCK_K), splits, F.BLOCK_K, F)
    tiles = tl.cdiv(rows, F.BLOCK_M)
    i_m = i_tile % tiles * F.BLOCK_M
    i_n = i_tile // tiles * F.BLOCK_N
    b_table = pair_table(F.KIND, F.NARROW)
    b_out = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    for i_k in tl.range(start, end, F.BLOCK_K):
        b_x = load_rows(p_x, i_m, i_k, stride_x, rows, columns, F.EVEN_K, F.BLOCK_K, F)
        b_w = weight_tile(weight, b_table, i_n, i_k, outputs, columns, F, b_x.dtype)  # (BLOCK_N, BLOCK_K)
        b_out = tl.dot(b_x, tl.trans(b_w), b_out, input_precision=F.PRECISION)
    store_rows(p_out, p_bias, b_out, i_m, i_n, i_s, rows, outputs, F.BLOCK_N, F)


@triton.jit
def linear_backward_kernel(
    p_grad, weight, p_bias, p_out, stride_grad, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = grad W; a program does a tile (BLOCK_M, BLOCK_K), or a part of its sums."""
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(outputs, F.BLOCK_N), splits, F.BLOCK_N, F)
    tiles = tl.cdiv(rows, F.BLOCK_M)
    i_m = i_tile % tiles * F.BLOCK_M
    i_k = i_tile // tiles * F.BLOCK_K
    b_table = pair_table(F.KIND, F.NARROW)
    b_out = tl.full([F.BLOCK_M, F.BLOCK_K], 0.0, tl.float32)
    for i_n in tl.range(start, end, F.BLOCK_N):
        b_grad = load_rows(p_grad, i_m, i_n, stride_grad, rows, outputs, F.EVEN_N, F.BLOCK_N, F)
        b_w = weight_tile(weight, b_table, i_n, i_k, outputs, columns, F, b_grad.dtype)  # (BLOCK_N, BLOCK_K)
        b_out = tl.dot(b_grad, b_w, b_out, input_precision=F.PRECISION)
    store_rows(p_out, p_bias, b_out, i_m, i_k, i_s, rows, columns, F.BLOCK_K, F)


@triton.jit
def linear_few_kernel(
    p_x, weight, p_bias, p_out, stride_x, rows, outputs, columns, splits, F: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias for BLOCK_M rows of x by multiply-adds; a program does BLOCK_N rows of W, or a part of them.

    Rows of W have whole blocks of scales. Each thread sums its own columns, 16 bytes at a time, to the end.
    """
    columns = columns * F.UNIT
    i_tile, i_s, start, end = part_of(tl.cdiv(columns, F.BLOCK_K), splits, F.BLOCK_K, F)
    i_n = i_tile * F.BLOCK_N
    GROUPS: tl.constexpr = F.BLOCK_K // SMALLEST
    ROWS: tl.constexpr = F.BLOCK_M
    o_n = tl.arange(0, F.BLOCK_N)
    o_row = o_n
    if not F.EVEN_N:
        o_row = tl.minimum(o_n, outputs - 1 - i_n)
    o_k = tl.arange(0, F.BLOCK_K)
    b_table = pair_table(F.KIND, F.NARROW)
    b_sums = ()
    for _ in tl.static_range(ROWS):
        b_sums = b_sums + (tl.full([F.BLOCK_N, GROUPS], 0.0, tl.float32),)
    for i_k in tl.range(start, end, F.BLOCK_K, num_stages=F.STAGES):
        b_first, b_second, b_scale = load_pairs(weight, b_table, i_n, i_k, o_row, columns, SMALLEST, F)
        b_new = ()
        for i_m in tl.static_range(ROWS):
            p_row = p_x + tl.full([], i_m, tl.int64) * stride_x * F.ALIGN + i_k
            if F.EVEN_K:
                b_x = tl.load(p_row + o_k, eviction_policy="evict_last")
            else:
                b_x = tl.load(p_row + o_k, mask=o_k < columns - i_k, other=0.0, eviction_policy="evict_last")
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [GROUPS, SMALLEST // 2, 2]))
            b_product = tl.sum(b_first * b_x0.to(tl.float32)[None, :, :], 2)  # (BLOCK_N, GROUPS)
            b_product += tl.sum(b_second * b_x1.to(tl.float32)[None, :, :], 2)
            b_new = b_new + (b_sums[i_m] + b_product * b_scale,)
        b_sums = b_new
    b_bias = tl.full([F.BLOCK_N], 0.0, tl.float32)
    if F.HAS_BIAS and not F.SPLIT:
        b_bias = tl.load(p_bias + i_n + o_row)
    p_out += tl.cast(i_s, tl.int64) * rows * outputs
    for i_m in tl.static_range(ROWS):
        b_out = tl.sum(b_sums[i_m], 1) + b_bias  # (BLOCK_N,)
        p_row = p_out + tl.full([], i_m, tl.int64) * outputs + i_n
        tl.store(p_row + o_n, b_out.to(p_out.dtype.element_ty), mask=o_n < outputs - i_n)


@triton.jit
def linear_combine_kernel(
    p_sums, p_bias, p_out, count, outputs, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum of the parts (splits, count), in their order, + bias."""
    o_out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < count
    b_out = tl.full([BLOCK], 0.0, tl.float32)
    for _ in tl.range(splits):
        b_out += tl.load(p_sums + o_out, mask=m_out, other=0.0)
        p_sums += count
    if HAS_BIAS:
        b_out += tl.load(p_bias + o_out % outputs, mask=m_out, other=0.0)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
