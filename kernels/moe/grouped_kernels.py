"""Products of groups of rows with matrices of their own, and the gradients of these matrices."""

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import (
    Matrices,
    Rows,
    block_of_rows,
    matrix_of,
    product,
    row_offsets,
    step_of,
    store_tile,
    tile_of_program,
    weight_offsets,
)


class GradientFeatures(NamedTuple):
    """The features of the gradients of matrices, and their cut into blocks."""

    LINES_GATHERED: bool  # see Rows: the values that become lines ...
    COLUMNS_GATHERED: bool  # ... and those that become columns
    TOP_K: int
    ALIGN: int
    LONG: bool  # whether offsets within a tile need 64 bits
    EVEN_M: bool  # lines fill blocks ...
    EVEN_N: bool  # ... and columns
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # rows
    PRECISION: str | None
    STAGES: int


@triton.jit
def grouped_kernel(
    x: Rows, weight: Matrices, p_bias, p_out, p_offsets, rows, inputs, outputs, experts, F: tl.constexpr,
):  # fmt: skip
    """out[rows of e] = x[rows of e] W_e + bias_e; a program does a tile (BLOCK_M, BLOCK_N)."""
    i_block, i_tile = tile_of_program(tl.cdiv(outputs, F.BLOCK_N), F)
    i_n = i_tile * F.BLOCK_N
    i_expert, i_first, i_end = block_of_rows(p_offsets, i_block, rows, experts, F)
    if i_first >= i_end:
        return
    b_row = i_first + tl.arange(0, F.BLOCK_M)
    b_column = i_n + tl.arange(0, F.BLOCK_N)
    if F.TAIL:
        if i_expert >= experts:
            store_tile(p_out, tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32), b_row, i_end, b_column, outputs)
            return
    o_w = weight_offsets(weight, i_n, outputs, F.BLOCK_N, F)
    p_w = matrix_of(weight, i_expert, F)
    o_x = row_offsets(x, i_first, i_end, F)
    b_out = product(x.data, o_x, p_w, o_w, step_of(weight, F), i_n, inputs, outputs, F.BLOCK_N, F)
    if F.HAS_BIAS:
        p_bias += i_expert.to(tl.int64) * outputs
        b_out += tl.load(p_bias + b_column, mask=b_column < outputs, other=0.0)[None, :]
    store_tile(p_out, b_out, b_row, i_end, b_column, outputs)


@triton.jit
def _first_of(x: Rows, i_row, i_c, GATHERED: tl.constexpr, F: tl.constexpr):
    """The pointer of a column of row i_row, or of the rows that slots are looked up for."""
    if GATHERED:
        p_x = x.data + i_c
    else:
        p_x = x.data + i_c + tl.cast(i_row, tl.int64) * x.stride * F.ALIGN
    return p_x


@triton.jit
def _side(
    x: Rows, p_x, i_row, i_end, columns, GATHERED: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    COLUMNS: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Values of rows from i_row on, (BLOCK_K, COLUMNS), of `columns` that are there; with MASKED 0 behind the end."""
    o_row = tl.arange(0, F.BLOCK_K)
    o_c = tl.arange(0, COLUMNS)
    m_row = o_row < i_end - i_row
    if GATHERED:
        if MASKED:
            o_row = tl.load(x.permutation + i_row + o_row, mask=m_row, other=0)
        else:
            o_row = tl.load(x.permutation + i_row + o_row)
        o_row = o_row // F.TOP_K
    if F.LONG:
        o_row = o_row.to(tl.int64)
    p_tile = p_x + ((o_row * x.stride * F.ALIGN)[:, None] + o_c[None, :])
    m_c = (o_c < columns)[None, :]
    if MASKED:
        b_x = tl.load(p_tile, mask=m_row[:, None] & m_c, other=0.0)
    elif EVEN:
        b_x = tl.load(p_tile)
    else:
        b_x = tl.load(p_tile, mask=m_c, other=0.0)
    return b_x


@triton.jit
def weight_gradient_kernel(
    a: Rows, b: Rows, p_out, p_offsets, rows, lines, columns, F: tl.constexpr,
):  # fmt: skip
    """out_e (lines, columns) = sum over rows of e of a b^T; a program does a tile (BLOCK_M, BLOCK_N) of one matrix."""
    tiles_m, tiles_n = tl.cdiv(lines, F.BLOCK_M), tl.cdiv(columns, F.BLOCK_N)
    i_expert = tl.program_id(0) // (tiles_m * tiles_n)
    i_tile = tl.program_id(0) % (tiles_m * tiles_n)
    i_m = i_tile // tiles_n * F.BLOCK_M
    i_n = i_tile % tiles_n * F.BLOCK_N
    i_end = tl.minimum(tl.load(p_offsets + i_expert), rows)
    i_first = tl.maximum(tl.load(p_offsets + i_expert - 1, mask=i_expert > 0, other=0), 0)
    i_last = i_first + tl.maximum(i_end - i_first, 0) // F.BLOCK_K * F.BLOCK_K
    p_a = _first_of(a, i_first, i_m, F.LINES_GATHERED, F)
    p_b = _first_of(b, i_first, i_n, F.COLUMNS_GATHERED, F)
    b_sum = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    for i_row in tl.range(i_first, i_last, F.BLOCK_K, num_stages=F.STAGES):
        b_a = _side(a, p_a, i_row, i_end, lines - i_m, F.LINES_GATHERED, F.EVEN_M, False, F.BLOCK_M, F)
        b_b = _side(b, p_b, i_row, i_end, columns - i_n, F.COLUMNS_GATHERED, F.EVEN_N, False, F.BLOCK_N, F)
        b_sum = tl.dot(tl.trans(b_a), b_b, b_sum, input_precision=F.PRECISION)
        if not F.LINES_GATHERED:
            p_a += tl.cast(a.stride, tl.int64) * F.ALIGN * F.BLOCK_K
        if not F.COLUMNS_GATHERED:
            p_b += tl.cast(b.stride, tl.int64) * F.ALIGN * F.BLOCK_K
    if i_last < i_end:  # the rest, fewer than BLOCK_K rows
        b_a = _side(a, p_a, i_last, i_end, lines - i_m, F.LINES_GATHERED, F.EVEN_M, True, F.BLOCK_M, F)
        b_b = _side(b, p_b, i_last, i_end, columns - i_n, F.COLUMNS_GATHERED, F.EVEN_N, True, F.BLOCK_N, F)
        b_sum = tl.dot(tl.trans(b_a), b_b, b_sum, input_precision=F.PRECISION)
    p_out += i_expert.to(tl.int64) * lines * columns
    store_tile(p_out, b_sum, i_m + tl.arange(0, F.BLOCK_M), lines, i_n + tl.arange(0, F.BLOCK_N), columns)


@triton.jit
def bias_gradient_kernel(
    grad: Rows, p_weights, p_out, p_offsets, rows, columns,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_e = sum over rows of e of grad, or of each slot's weight times its token's grad."""
    i_expert = tl.program_id(0)
    b_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_end = tl.minimum(tl.load(p_offsets + i_expert), rows)
    i_first = tl.maximum(tl.load(p_offsets + i_expert - 1, mask=i_expert > 0, other=0), 0)
    b_sum = tl.full([BLOCK_N], 0.0, tl.float32)
    for i_row in tl.range(i_first, i_end, BLOCK_M):
        b_row = i_row + tl.arange(0, BLOCK_M)
        m = b_row < i_end
        b_place = b_row
        b_weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if WEIGHTED:
            b_slot = tl.load(grad.permutation + b_row, mask=m, other=0)
            b_place = b_slot // TOP_K
            b_weight = tl.load(p_weights + b_slot, mask=m, other=0.0)
        offsets = (b_place.to(tl.int64) * grad.stride * ALIGN)[:, None] + b_column[None, :]
        b_grad = tl.load(grad.data + offsets, mask=m[:, None] & (b_column < columns)[None, :], other=0.0)
        b_sum += tl.sum(b_grad.to(tl.float32) * b_weight[:, None], 0)
    tl.store(p_out + i_expert.to(tl.int64) * columns + b_column, b_sum, mask=b_column < columns)
