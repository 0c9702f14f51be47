"""What grouped kernels share: which rows a program has, tiles of rows and of experts' matrices, and their products.

Programs are as many as rows could need, a bound that the host knows; each finds its expert by the groups' ends. The
hot loops are those of plain products: the expert, the gathered rows and the ragged edge are settled before them.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class GroupedFeatures(NamedTuple):
    """The features of a grouped product, and its cut into blocks."""

    GATHERED: bool  # x has the rows of tokens, of which slots take theirs: TOP_K slots one
    TOP_K: int
    BY_LINES: bool  # the inputs of a matrix are contiguous, else its outputs
    ACTIVATION: str  # "" for none
    INTERLEAVED: bool  # gates and what they gate take turns
    HAS_BIAS: bool
    KEEPS: bool  # values before the activation are stored
    TAIL: bool  # rows behind the last group are stored as 0
    GROUPS: int  # a power of 2, more than experts
    ALIGN: int  # row strides of x are given in multiples of it
    ALIGN_W: int  # the strides of the matrices
    LONG: bool  # whether offsets within a tile of x need 64 bits
    LONG_W: bool  # ... within one of a matrix
    EVEN_K: bool  # inputs fill blocks ...
    EVEN_N: bool  # ... and so do outputs
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int  # blocks of rows that share a tile of a matrix while it is in the cache
    PRECISION: str | None  # of products of fp32
    STAGES: int


class Matrices(NamedTuple):
    """The experts' matrices: a tensor, in a kernel its pointer, and strides in multiples of ALIGN_W."""

    data: object
    expert_stride: int
    line_stride: int


class Rows(NamedTuple):
    """Rows of tokens or of slots, their stride in multiples of ALIGN, and the slots in the order of their experts."""

    data: object
    stride: int
    permutation: object


@triton.jit
def block_of_rows(p_offsets, i_block, rows, experts, F: tl.constexpr):
    """The expert of a block, its first row, and the end of that expert's rows.

    Of a block that does not exist the end is at most the first row. Ends that do not fit are cut at `rows`.

    With TAIL the rows behind the last group are those of expert number `experts`.
    """
    o_e = tl.arange(0, F.GROUPS)
    b_end = tl.minimum(tl.load(p_offsets + o_e, mask=o_e < experts, other=0), rows)
    b_start = tl.maximum(tl.load(p_offsets + o_e - 1, mask=(o_e > 0) & (o_e <= experts), other=0), 0)
    if F.TAIL:
        b_end = tl.where(o_e == experts, rows, b_end)
    b_blocks = tl.where(b_end > b_start, (b_end - b_start + F.BLOCK_M - 1) // F.BLOCK_M, 0)
    b_last = tl.cumsum(b_blocks, 0)
    i_expert = tl.sum((b_last <= i_block).to(tl.int32), 0)
    m = o_e == i_expert
    i_first = tl.sum(tl.where(m, b_start + (i_block - b_last + b_blocks) * F.BLOCK_M, 0), 0)
    return i_expert, i_first, tl.sum(tl.where(m, b_end, 0), 0)


@triton.jit
def tile_of_program(tiles, F: tl.constexpr):
    """A program's block of rows and its tile of outputs: GROUP_M blocks take turns with one tile."""
    i_program = tl.program_id(0)
    i_group = i_program // (F.GROUP_M * tiles)
    i_within = i_program % (F.GROUP_M * tiles)
    return i_group * F.GROUP_M + i_within % F.GROUP_M, i_within // F.GROUP_M


@triton.jit
def row_numbers(rows: Rows, b_row, F: tl.constexpr):
    """Where rows (BLOCK_M,) lie: as they are, or those of their slots' tokens."""
    if F.GATHERED:
        return tl.load(rows.permutation + b_row) // F.TOP_K
    return b_row


@triton.jit
def row_offsets(rows: Rows, i_first, i_end, F: tl.constexpr):
    """Offsets of a block's rows (BLOCK_M, 1); those behind the end are the last one's."""
    b_row = row_numbers(rows, tl.minimum(i_first + tl.arange(0, F.BLOCK_M), i_end - 1), F)
    if F.LONG:
        b_row = b_row.to(tl.int64)
    return (b_row * rows.stride * F.ALIGN)[:, None]


@triton.jit
def weight_offsets(weight: Matrices, i_n, outputs, OUTPUTS: tl.constexpr, F: tl.constexpr):
    """Offsets of OUTPUTS outputs from i_n on and of BLOCK_K inputs, as they lie."""
    o_n = i_n + tl.arange(0, OUTPUTS)
    o_k = tl.arange(0, F.BLOCK_K)
    if F.BY_LINES:
        if not F.EVEN_N:
            o_n = tl.minimum(o_n, outputs - 1)
        if F.LONG_W:
            o_n = o_n.to(tl.int64)
        offsets = (o_n * weight.line_stride * F.ALIGN_W)[:, None] + o_k[None, :]  # (OUTPUTS, BLOCK_K)
    else:
        if F.LONG_W:
            o_k = o_k.to(tl.int64)
        offsets = (o_k * weight.line_stride * F.ALIGN_W)[:, None] + o_n[None, :]  # (BLOCK_K, OUTPUTS)
    return offsets


@triton.jit
def weight_tile(p_weight, o_w, i_n, i_k, inputs, outputs, OUTPUTS: tl.constexpr, F: tl.constexpr):
    """A tile of a matrix, (BLOCK_K, OUTPUTS)."""
    m_k = tl.arange(0, F.BLOCK_K) < inputs - i_k
    m_n = tl.arange(0, OUTPUTS) < outputs - i_n  # by lines, outputs behind the last are the last one
    if F.BY_LINES:
        b_w = tl.load(p_weight + o_w) if F.EVEN_K else tl.load(p_weight + o_w, mask=m_k[None, :], other=0.0)
        b_w = tl.trans(b_w)
    elif F.EVEN_K and F.EVEN_N:
        b_w = tl.load(p_weight + o_w)
    elif F.EVEN_N:
        b_w = tl.load(p_weight + o_w, mask=m_k[:, None], other=0.0)
    else:
        b_w = tl.load(p_weight + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
    return b_w


@triton.jit
def row_tile(p_x, o_x, i_k, inputs, F: tl.constexpr):
    """BLOCK_K values of rows, (BLOCK_M, BLOCK_K)."""
    o_k = tl.arange(0, F.BLOCK_K)[None, :]
    if F.EVEN_K:
        return tl.load(p_x + o_x + o_k)
    return tl.load(p_x + o_x + o_k, mask=o_k < inputs - i_k, other=0.0)


@triton.jit
def matrix_of(weight: Matrices, i_expert, F: tl.constexpr):
    """The pointer of an expert's matrix."""
    return weight.data + tl.cast(i_expert, tl.int64) * weight.expert_stride * F.ALIGN_W


@triton.jit
def step_of(weight: Matrices, F: tl.constexpr):
    """From a tile of a matrix to that of the next inputs."""
    if F.BY_LINES:
        return tl.full([], F.BLOCK_K, tl.int64)
    return tl.cast(weight.line_stride, tl.int64) * F.ALIGN_W * F.BLOCK_K


@triton.jit
def product(p_x, o_x, p_weight, o_w, step, i_n, inputs, outputs, OUTPUTS: tl.constexpr, F: tl.constexpr):
    """The product of rows with a tile of outputs, (BLOCK_M, OUTPUTS) in fp32."""
    b_sum = tl.full([F.BLOCK_M, OUTPUTS], 0.0, tl.float32)
    for i_k in tl.range(0, inputs, F.BLOCK_K, num_stages=F.STAGES):
        b_x = row_tile(p_x, o_x, i_k, inputs, F)
        b_w = weight_tile(p_weight, o_w, i_n, i_k, inputs, outputs, OUTPUTS, F)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision=F.PRECISION)
        p_x += F.BLOCK_K
        p_weight += step
    return b_sum


@triton.jit
def two_products(p_x, o_x, p_first, p_second, o_w, step, i_n, inputs, outputs, F: tl.constexpr):
    """The products of rows with two tiles of outputs."""
    b_first = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    b_second = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, tl.float32)
    for i_k in tl.range(0, inputs, F.BLOCK_K, num_stages=F.STAGES):
        b_x = row_tile(p_x, o_x, i_k, inputs, F)
        b_w = weight_tile(p_first, o_w, i_n, i_k, inputs, outputs, F.BLOCK_N, F)
        b_first = tl.dot(b_x, b_w, b_first, input_precision=F.PRECISION)
        b_w = weight_tile(p_second, o_w, i_n, i_k, inputs, outputs, F.BLOCK_N, F)
        b_second = tl.dot(b_x, b_w, b_second, input_precision=F.PRECISION)
        p_x += F.BLOCK_K
        p_first += step
        p_second += step
    return b_first, b_second


@triton.jit
def store_tile(p_out, b_out, b_row, i_end, b_column, columns):
    """Stores b_out (rows, columns) in a contiguous matrix, inside of a block's rows and of the columns."""
    m = (b_row < i_end)[:, None] & (b_column < columns)[None, :]
    offsets = b_row.to(tl.int64)[:, None] * columns + b_column[None, :]
    tl.store(p_out + offsets, b_out.to(p_out.dtype.element_ty), mask=m)
