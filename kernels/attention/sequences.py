"""The sequence a program works on, an entry of the batch or one of several packed into tensors, and where its rows lie.

Packed sequences lie one after the other in tensors of batch 1, and only the device knows where each starts. Of blocks
of rows sequence b has those from number cu_seqlens[b] // BLOCK + b on: as many as it needs or one more, because
floor((x + n) / BLOCK) - floor(x / BLOCK) + 1 >= ceil(n / BLOCK). So the host knows that rows // BLOCK + batch blocks
are enough, and a program finds its sequence by bisection.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import Rotary, Rows, or_zero

STATISTICS_ROWS = tl.constexpr(128)  # a sequence's rows of statistics start and end at multiples of every tile's


class Sequence(NamedTuple):
    """The tensors' batch entry and rows that a sequence has."""

    i: tl.tensor  # its number
    i_b: tl.tensor
    start_q: tl.tensor
    start_k: tl.tensor
    start_statistics: tl.tensor
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    limit: tl.tensor  # keys from here on are masked


@triton.jit
def first_block(p_cu, i, BLOCK: tl.constexpr):
    """The number of a packed sequence's first block of rows."""
    return tl.load(p_cu + i) // BLOCK + i


@triton.jit
def program_block(p_cu, rows, batch, heads, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sequence, head, and block of rows in the sequence; a packed one may end before the block."""
    if PACKED:
        blocks = rows // BLOCK + batch
        i_block = tl.program_id(0) % blocks
        i_h = tl.program_id(0) // blocks
        i = tl.zeros_like(i_block)
        end = i + batch
        while end - i > 1:  # the last sequence whose first block is not behind this one
            middle = (i + end) // 2
            behind = first_block(p_cu, middle, BLOCK) > i_block
            end = tl.where(behind, middle, end)
            i = tl.where(behind, i, middle)
        i_block -= first_block(p_cu, i, BLOCK)
    else:
        blocks = tl.cdiv(rows, BLOCK)
        i_block = tl.program_id(0) % blocks
        i_bh = tl.program_id(0) // blocks
        i = i_bh // heads
        i_h = i_bh % heads
    return i, i_h, i_block


@triton.jit
def sequence_rows(p_cu, i, rows, PACKED: tl.constexpr):
    """The tensors' batch entry and row where a sequence starts, and its number of rows."""
    if PACKED:
        i_b = tl.zeros_like(i)
        start = tl.load(p_cu + i)
        seqlen = tl.load(p_cu + i + 1) - start
    else:
        i_b = i
        start = tl.full([], 0, tl.int32)
        seqlen = rows
    return i_b, start, seqlen


@triton.jit
def statistics_start(start, i, PACKED: tl.constexpr):
    """Where the statistics of a sequence's rows start."""
    if PACKED:
        start = (start // STATISTICS_ROWS + i) * STATISTICS_ROWS
    return start


@triton.jit
def sequence_of(p_key_lengths, p_cu_q, p_cu_k, i, rows_q, rows_k, F: tl.constexpr):
    i_b, start_q, seqlen_q = sequence_rows(p_cu_q, i, rows_q, F.PACKED)
    _, start_k, seqlen_k = sequence_rows(p_cu_k, i, rows_k, F.PACKED)
    limit = seqlen_k
    if F.HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(p_key_lengths + i), 0), seqlen_k)
    start_statistics = statistics_start(start_q, i, F.PACKED)
    return Sequence(i, i_b, start_q, start_k, start_statistics, seqlen_q, seqlen_k, limit)


@triton.jit
def query_block(
    p_key_lengths, p_cu_q, p_cu_k, batch, rows_q, rows_k, heads, F: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The program's sequence, head and first query, and the keys at which its first and last query stand.

    The first query of a block that is not there is negative.
    """
    i, i_h, i_block = program_block(p_cu_q, rows_q, batch, heads, F.PACKED, BLOCK_M)
    sequence = sequence_of(p_key_lengths, p_cu_q, p_cu_k, i, rows_q, rows_k, F)
    i_m = (tl.cdiv(sequence.seqlen_q, BLOCK_M) - 1 - i_block) * BLOCK_M  # causal: the longest rows start first
    shift = sequence.seqlen_k - sequence.seqlen_q
    last = tl.minimum(i_m + BLOCK_M, sequence.seqlen_q) - 1 + shift
    return sequence, i_h, i_m, i_m + shift, last


@triton.jit
def key_block(
    p_key_lengths, p_cu_q, p_cu_k, batch, rows_q, rows_k, kv_heads, F: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The program's sequence, head and first key, which lies behind the last one if the block is not there."""
    i, i_g, i_block = program_block(p_cu_k, rows_k, batch, kv_heads, F.PACKED, BLOCK_N)
    return sequence_of(p_key_lengths, p_cu_q, p_cu_k, i, rows_q, rows_k, F), i_g, i_block * BLOCK_N


@triton.jit
def head_rows(p_x, descriptor, i_b, start, i_h, stride_b, stride_s, stride_h, limit):
    """Of a tensor (batch, rows, heads, head_dim) one head of the sequence that starts at row `start`."""
    p_x = p_x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + start.to(tl.int64) * stride_s
    return Rows(p_x, or_zero(descriptor), i_b, i_h, start, stride_s, limit)


@triton.jit
def sequence_rotary(p_cos, p_sin, p_positions, sequence, rows_k, start, HAS_POSITIONS: tl.constexpr):
    """Position ids are a row of the keys' for each batch."""
    if HAS_POSITIONS:
        p_positions += sequence.i_b.to(tl.int64) * rows_k + sequence.start_k
    return Rotary(or_zero(p_cos), or_zero(p_sin), or_zero(p_positions), start)


@triton.jit
def contiguous_rows(p_x, i_b, start, i_h, rows, heads, COLUMNS: tl.constexpr):
    """As head_rows, of a contiguous tensor: the pointer."""
    return p_x + ((i_b.to(tl.int64) * rows + start) * heads + i_h) * COLUMNS
