"""The sequence that a program works on, an entry of the batch or one of several packed ones, and its rows.

Packed sequences lie one after the other in tensors of batch 1, and only the device knows where each starts. The blocks
of rows of sequence b are those from number cu_seqlens[b] // BLOCK + b on: as many as it needs or one more, because
floor((x + n) / BLOCK) - floor(x / BLOCK) + 1 >= ceil(n / BLOCK). So the host knows that rows // BLOCK + batch blocks
are enough, and a program finds its sequence by bisection.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import HeadRotary, HeadRows, or_zero

STATISTICS_ROWS = tl.constexpr(128)  # a sequence's rows of statistics start and end at multiples of every tile's


class Sequences(NamedTuple):
    """The sequences of a call: the entries of the batch, or packed ones."""

    p_key_lengths: tl.tensor | None
    p_cu_q: tl.tensor | None
    p_cu_k: tl.tensor | None
    packed: tl.tensor  # the number of packed ones; 0: entries of the batch
    rows_q: tl.tensor  # of the tensors
    rows_k: tl.tensor


class Statistics(NamedTuple):
    """The pivot and the delta of each row, (batch, heads, padded_q)."""

    p_pivot: tl.tensor
    p_delta: tl.tensor
    padded_q: tl.tensor


class Sequence(NamedTuple):
    """A sequence's place in the tensors."""

    i: tl.tensor  # the sequence's number
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
def program_block(p_cu, rows, packed, heads, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sequence, head, and block of rows in the sequence; a packed one may end before the block."""
    if PACKED:
        blocks = rows // BLOCK + packed
        i_block = tl.program_id(0) % blocks
        i_h = tl.program_id(0) // blocks
        i = tl.zeros_like(i_block)
        end = i + packed
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
    """The batch entry and the row where sequence i starts, and its number of rows."""
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
    """The place of the statistics of a sequence's first row, which is row `start` of the tensors."""
    if PACKED:
        start = (start // STATISTICS_ROWS + i) * STATISTICS_ROWS
    return start


@triton.jit
def sequence_of(sequences, i, F: tl.constexpr):
    i_b, start_q, seqlen_q = sequence_rows(sequences.p_cu_q, i, sequences.rows_q, F.PACKED)
    _, start_k, seqlen_k = sequence_rows(sequences.p_cu_k, i, sequences.rows_k, F.PACKED)
    limit = seqlen_k
    if F.HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(sequences.p_key_lengths + i), 0), seqlen_k)
    start_statistics = statistics_start(start_q, i, F.PACKED)
    return Sequence(i, i_b, start_q, start_k, start_statistics, seqlen_q, seqlen_k, limit)


@triton.jit
def query_block(sequences, heads, F: tl.constexpr, BLOCK_M: tl.constexpr):
    """The program's sequence, head and first query, and the keys at which its first and last query stand.

    A program without queries gets a negative first one.
    """
    i, i_h, i_block = program_block(sequences.p_cu_q, sequences.rows_q, sequences.packed, heads, F.PACKED, BLOCK_M)
    sequence = sequence_of(sequences, i, F)
    i_m = (tl.cdiv(sequence.seqlen_q, BLOCK_M) - 1 - i_block) * BLOCK_M  # causal: the longest rows start first
    shift = sequence.seqlen_k - sequence.seqlen_q
    last = tl.minimum(i_m + BLOCK_M, sequence.seqlen_q) - 1 + shift
    return sequence, i_h, i_m, i_m + shift, last


@triton.jit
def key_block(sequences, kv_heads, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's sequence, head and first key, which lies behind the last one for a program without keys."""
    i, i_g, i_block = program_block(sequences.p_cu_k, sequences.rows_k, sequences.packed, kv_heads, F.PACKED, BLOCK_N)
    return sequence_of(sequences, i, F), i_g, i_block * BLOCK_N


@triton.jit
def head_rows(heads, descriptor, i_b, start, i_h, limit):
    """Head i_h of the sequence that starts at row `start` of batch entry i_b; `heads` is a tensor's Heads."""
    p_x, stride_b, stride_s, stride_h = heads
    p_x = p_x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + start.to(tl.int64) * stride_s
    return HeadRows(p_x, or_zero(descriptor), i_b, i_h, start, stride_s, limit)


@triton.jit
def sequence_rotary(rotary, sequence, rows_k, HAS_POSITIONS: tl.constexpr):
    """The tables for a sequence's keys; `rotary` is the call's, with position ids (batch, rows_k)."""
    p_cos, p_sin, p_positions, start = rotary
    if HAS_POSITIONS:
        p_positions += sequence.i_b.to(tl.int64) * rows_k + sequence.start_k
    return HeadRotary(or_zero(p_cos), or_zero(p_sin), or_zero(p_positions), start)


@triton.jit
def contiguous_rows(p_x, i_b, start, i_h, rows, heads, COLUMNS: tl.constexpr):
    """A pointer to head i_h of row `start` of batch entry i_b in a contiguous (batch, rows, heads, COLUMNS)."""
    return p_x + ((i_b.to(tl.int64) * rows + start) * heads + i_h) * COLUMNS
