"""Scores: the columns that a block of rows sees, the biases of its scores, and the softmax that runs over them.

Rows are queries and columns keys, but in the kernel of k and v, whose tiles stand on end.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import Dropout
from .heads import HeadRotary, HeadRows, or_zero, zero_pieces

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Biases(NamedTuple):
    """The biases of a call's scores."""

    p_slopes: tl.tensor | None  # ALiBi's, (heads,) or (batch, heads)
    stride_slopes: tl.tensor
    p_line: tl.tensor | None  # T5's biases by distance, a line for each head
    radius: tl.tensor  # the largest distance that has a bias of its own


class HeadScore(NamedTuple):
    """The factors and biases that make scores of a head's products."""

    scale: tl.tensor  # in log2 units; with a softcap softmax_scale / softcap
    softcap: tl.tensor
    slope: tl.tensor  # ALiBi's in log2 units
    p_line: tl.tensor  # T5's biases by distance: the value of distance 0
    radius: tl.tensor  # T5's bias is constant from this distance on


class Head(NamedTuple):
    """A head's keys and values, and the way to the scores of its queries."""

    keys: HeadRows
    values: HeadRows
    rotary: HeadRotary  # the keys'
    score: HeadScore
    dropout: Dropout


class Block(NamedTuple):
    """A program's block of rows, and its window."""

    i_r: tl.tensor  # the first row
    first: tl.tensor  # the column at which the first row stands
    left: tl.tensor
    right: tl.tensor


class Span(NamedTuple):
    """The columns of a loop: start .. split, then split + gap .. end + gap."""

    start: tl.tensor
    split: tl.tensor
    gap: tl.tensor
    end: tl.tensor


class Running(NamedTuple):
    """The softmax of the columns that a loop has visited so far."""

    b_m: tl.tensor  # (ROWS,): the largest score in log2 units
    b_l: tl.tensor  # (ROWS,): sum of exp2(score - m)
    b_acc: tl.tuple  # pieces (ROWS, BLOCK_C): sum of exp2(score - m) value


@triton.jit
def start_of_rows(
    p_sinks, b_h, HAS_SINKS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The softmax of rows of heads b_h, a scalar or (ROWS,), before the first column: of nothing, or of the sinks.

    A sink is a score without a value. The result has COLUMNS channels in pieces of BLOCK_C.
    """
    b_m = tl.full([ROWS], -float("inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        b_m = tl.broadcast_to(tl.load(p_sinks + b_h) * LOG2E, [ROWS])
        b_l += 1.0
    return Running(b_m, b_l, zero_pieces(COLUMNS, BLOCK_C, ROWS))


@triton.jit
def softmax_step(b_m, b_l, b_x):
    """The exponentials of new scores b_x (ROWS, COLUMNS), the new m and l, and the factor of older sums.

    A row that has seen nothing yet keeps a finite pivot: -inf - -inf would be NaN.
    """
    b_max = tl.maximum(b_m, tl.max(b_x, 1))  # (ROWS,)
    b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_p = tl.exp2(b_x - b_pivot[:, None])
    b_alpha = tl.exp2(b_m - b_pivot)
    return b_p, b_max, b_l * b_alpha + tl.sum(b_p, 1), b_alpha


@triton.jit
def block_ranges(
    first, last, limit, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_TAIL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The columns that rows standing at columns first .. last see: a span with masks, and start and end of the others.

    The unmasked columns make whole blocks of BLOCK, the rest on either side blocks of MASKED, a divisor of BLOCK.
    """
    lowest = 0
    highest = limit
    full_lowest = 0
    full_highest = limit
    if HAS_LEFT:
        lowest = tl.maximum(first - left, 0)
        full_lowest = tl.maximum(last - left, 0)
    if HAS_RIGHT:
        highest = tl.minimum(limit, last + right + 1)
        full_highest = tl.minimum(limit, first + right + 1)
    highest = tl.maximum(highest, 0)
    full_highest = tl.maximum(full_highest, 0)
    start = lowest // MASKED * MASKED
    end = tl.where(highest > lowest, tl.cdiv(highest, MASKED) * MASKED, start)
    full_start = tl.minimum(tl.cdiv(full_lowest, BLOCK) * BLOCK, end)
    full_end = full_highest // BLOCK * BLOCK
    if not MASK_TAIL:
        full_end = tl.where(full_highest == limit, tl.cdiv(limit, BLOCK) * BLOCK, full_end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_start)
    gap = full_end - full_start
    return Span(start, full_start, gap, end - gap), full_start, full_end


@triton.jit
def near_range(first, last, full_start, full_end, distance, BLOCK: tl.constexpr):
    """The unmasked blocks in which some column stands closer than `distance` to some row, and on both its sides."""
    near_start = tl.maximum(first - distance + 1, 0) // BLOCK * BLOCK
    near_start = tl.minimum(tl.maximum(near_start, full_start), full_end)
    near_end = tl.cdiv(tl.maximum(last + distance, 0), BLOCK) * BLOCK
    near_end = tl.minimum(tl.maximum(near_end, near_start), full_end)
    return near_start, near_end


@triton.jit
def far_span(i_side, left_start, left_end, right_start, right_end):
    """The unmasked blocks far to the left (side 0) or to the right (side 1), and the side's sign."""
    end = tl.where(i_side == 0, left_end, right_end)
    return Span(tl.where(i_side == 0, left_start, right_start), end, 0, end), tl.where(i_side == 0, -1.0, 1.0)


@triton.jit
def head_score(biases, i, i_h, scale, softcap, F: tl.constexpr, REACH: tl.constexpr):
    """The scores of head i_h of sequence i, and T5's bias far to the left and far to the right.

    T5's lines have REACH constant values beyond the largest distance.
    """
    p_slopes, stride_slopes, p_line, radius = biases
    slope = 0.0
    if F.HAS_SLOPES:
        slope = tl.load(p_slopes + i * stride_slopes + i_h) * LOG2E
    left = 0.0
    right = 0.0
    if F.HAS_TABLE:
        p_line += i_h * (2 * (radius + REACH) + 1) + radius + REACH
        left = tl.load(p_line - radius)
        right = tl.load(p_line + radius)
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    return HeadScore(scale, softcap, slope, or_zero(p_line), radius), left, right


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """1 - 2 / (exp(2 x) + 1); near 0, where that cancels, ACCURATE takes the series."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if ACCURATE:
        square = x * x
        series = -0.008863235529902197  # of x^11: -1382 / 155925
        series = 0.021869488536155203 + square * series
        series = -0.05396825396825397 + square * series
        series = 0.13333333333333333 + square * series
        series = -0.3333333333333333 + square * series
        y = tl.where(square < 0.09, x + x * square * series, y)
    return y


@triton.jit
def capped_scores(b_s, score, F: tl.constexpr, ACCURATE: tl.constexpr):
    """Scores in log2 units before the biases, and the tanh of a softcap, which the gradient needs."""
    if F.HAS_SOFTCAP:
        b_tanh = tanh(b_s * score.scale, ACCURATE)
        b_x = b_tanh * (score.softcap * LOG2E)
    else:
        b_tanh = b_s
        b_x = b_s * score.scale
    return b_x, b_tanh


@triton.jit
def attention_line_kernel(p_table, p_buckets, p_line, radius, reach, BLOCK: tl.constexpr):
    """line[h, reach + distance] = table[bucket of the distance, h] in log2 units, for distances -reach .. reach."""
    i_h = tl.program_id(1)
    o_distance = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) - reach
    m_distance = o_distance <= reach
    o_bucket = tl.minimum(tl.maximum(o_distance, -radius), radius) + radius
    b_bucket = tl.load(p_buckets + o_bucket)
    b_bias = tl.load(p_table + b_bucket * tl.num_programs(1) + i_h)
    tl.store(p_line + i_h * (2 * reach + 1) + reach + o_distance, b_bias * LOG2E, mask=m_distance)


@triton.jit
def line_bias(p_line, base, o_distance, radius, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """T5's bias for each pair of a tile, whose first column has the distance `base` to its first row.

    The head's line has distance 0 at p_line and ROWS + COLUMNS constant values beyond the largest distance `radius`,
    so that clamping the scalar base replaces clamping every pair.
    """
    base = tl.minimum(tl.maximum(base, -(radius + COLUMNS)), radius + ROWS)
    return tl.load(p_line + base + o_distance)


@triton.jit
def biased_scores(
    b_s, score, base, o_distance, b_key, b_query, F: tl.constexpr, ACCURATE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile's scores after softcap and biases, in log2 units, and the tanh of the softcap.

    b_key and b_query are the positions in fp32, one a row and one a column: converting a pair costs more.
    """
    b_x, b_tanh = capped_scores(b_s, score, F, ACCURATE)
    if F.HAS_TABLE:
        b_x += line_bias(score.p_line, base, o_distance, score.radius, QUERIES, KEYS)
    if F.HAS_SLOPES:
        b_x -= score.slope * tl.abs(b_key - b_query)
    return b_x, b_tanh
