"""What the attention kernels share: block ranges, loads and stores of (rotated) heads, scores, biases.

Vocabulary: i_* program and block indices, o_* offsets inside a block, m_* masks, p_* pointers, b_* block values;
`F` is what a kernel computes and `TILE` how it is cut, both known when it is compiled. A block of heads is a tuple of
channel pieces that products are summed over: with rotary embeddings first and second channels of the turned pairs, then
the channels that are not turned; each cut so that no piece is wider than registers allow.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Features(NamedTuple):
    """What a call computes."""

    HEAD_DIM: int  # of q and k
    HEAD_DIM_V: int  # of v and out
    HALF: int  # pairs of channels that rotary embeddings turn
    BLOCK_HALF: int  # channels of a piece of first, and of second channels of the pairs
    BLOCK_REST: int  # channels of a piece of those that are not turned
    BLOCK_D: int  # channels of a piece of v and out, which nothing turns
    INTERLEAVED: bool
    HAS_POSITIONS: bool
    HAS_LEFT: bool
    HAS_RIGHT: bool
    CAUSAL: bool
    HAS_SOFTCAP: bool
    HAS_SLOPES: bool
    HAS_TABLE: bool
    HAS_LENGTHS: bool
    HAS_SINKS: bool
    HAS_DROPOUT: bool
    PACKED: bool  # sequences of unequal lengths, one after the other in tensors of batch 1
    POSITIVE_SCALE: bool
    PRECISION: str | None  # of products of fp32


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    MASKED: int  # columns (queries in the kernel of k and v, else keys) of a block with a mask
    HOIST: bool  # whether loops may compute their constants before they start
    DESCRIPTOR: bool  # whether TMA reads what the loops go through
    LONG: bool  # whether offsets within a tile need 64 bits


class Rows(NamedTuple):
    """One head of a sequence."""

    p: tl.tensor  # of row 0
    descriptor: tl.tensor | None  # of the whole tensor, and the place of row 0 in it
    i_b: tl.tensor
    i_h: tl.tensor
    start: tl.tensor
    stride: tl.tensor
    limit: tl.tensor  # rows from here on are zeros, and are not read


class Rotary(NamedTuple):
    """Tables of rotary embeddings, and where a tensor's row 0 stands in them."""

    p_cos: tl.tensor
    p_sin: tl.tensor
    p_positions: tl.tensor
    start: tl.tensor


class Score(NamedTuple):
    """What makes a score of a product."""

    scale: tl.tensor  # in log2 units; with a softcap softmax_scale / softcap
    softcap: tl.tensor
    slope: tl.tensor  # of ALiBi in log2 units
    p_line: tl.tensor  # of the head's T5 biases by distance: the value of distance 0
    radius: tl.tensor  # T5's bias is constant from this distance on


class Span(NamedTuple):
    """The blocks of a loop: start .. split, then those from split + gap to end + gap."""

    start: tl.tensor
    split: tl.tensor
    gap: tl.tensor
    end: tl.tensor


@triton.jit
def or_zero(p):
    """p, or 0 where a call does without it: Triton 3.6 has no functions that return None."""
    if p is None:
        p = 0
    return p


@triton.jit
def block_ranges(
    first, last, limit, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_TAIL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns that rows standing at columns first .. last see: the span with masks, and [start, end) without.

    The unmasked columns make whole blocks of BLOCK, what is left on either side blocks of MASKED, a divisor of it.
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
def head_score(p_slopes, p_line, i, i_h, stride_slopes, scale, softcap, radius, F: tl.constexpr, REACH: tl.constexpr):
    """The head's scores, and T5's bias far to the left and far to the right."""
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
    return Score(scale, softcap, slope, or_zero(p_line), radius), left, right


@triton.jit
def load_columns(
    p_x, i_r, stride, limit,
    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BOUND: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows i_r .. i_r + ROWS and the first COLUMNS channels, zeros beyond them; BOUND: rows from `limit` on are zeros.

    A scalar base moves with the block, the offsets inside it stay constant: a loop carries no tensor of pointers.
    """
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    if LONG:
        offsets = o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    else:
        offsets = o_r[:, None] * stride + o_c[None, :]
    p_block = p_x + i_r.to(tl.int64) * stride
    if BOUND:
        m_tile = (o_r < limit - i_r)[:, None]
        if BLOCK_C > COLUMNS:
            m_tile = m_tile & (o_c < COLUMNS)[None, :]
        b_x = tl.load(p_block + offsets, mask=m_tile, other=0.0)
    elif BLOCK_C > COLUMNS:
        b_x = tl.load(p_block + offsets, mask=(o_c < COLUMNS)[None, :], other=0.0)
    else:
        b_x = tl.load(p_block + offsets)
    return b_x  # (ROWS, BLOCK_C)


@triton.jit
def load_pieces(
    rows, i_r, FIRST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, BOUND: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Channels FIRST .. COLUMNS of rows i_r .. i_r + ROWS, in pieces of BLOCK_C."""
    b_x = ()
    if DESCRIPTOR:  # of all channels, which are one piece
        b_x = b_x + (tl.reshape(rows.descriptor.load([rows.i_b, rows.i_h, rows.start + i_r, 0]), [ROWS, BLOCK_C]),)
    else:
        for i_c in tl.static_range(FIRST, COLUMNS, BLOCK_C):
            b_x = b_x + (
                load_columns(rows.p + i_c, i_r, rows.stride, rows.limit, COLUMNS - i_c, BLOCK_C, ROWS, BOUND, LONG),
            )
    return b_x


@triton.jit
def load_angles(
    p_table, rotary, i_c, i_r, limit, HALF: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, BOUND: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Columns i_c .. i_c + BLOCK_C of the cos or sin table for rows i_r .. i_r + ROWS of a tensor."""
    i_position = i_r + rotary.start
    if HAS_POSITIONS:
        o_r = tl.arange(0, ROWS)
        o_c = tl.arange(0, BLOCK_C)
        if BOUND:
            b_position = tl.load(rotary.p_positions + i_position + o_r, mask=o_r < limit - i_r, other=0)  # (ROWS,)
        else:
            b_position = tl.load(rotary.p_positions + i_position + o_r)
        p_tile = p_table + b_position.to(tl.int64)[:, None] * HALF + (i_c + o_c)[None, :]
        # Rows beyond the limit turn zeros by the angle of position 0.
        if BLOCK_C > COLUMNS:
            b_angles = tl.load(p_tile, mask=(o_c < COLUMNS)[None, :], other=0.0)
        else:
            b_angles = tl.load(p_tile)
    else:
        end = limit + rotary.start
        b_angles = load_columns(p_table + i_c, i_position, HALF, end, COLUMNS, BLOCK_C, ROWS, BOUND, False)
    return b_angles


@triton.jit
def load_head(
    rows, rotary, i_r, F: tl.constexpr, DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, BOUND: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Rows i_r .. i_r + ROWS of q or k as channel pieces, turned by their angles (Su et al., arXiv 2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin) for every pair of channels. The order of the channels in q and k does not
    matter to q.k, so the firsts and the seconds of the pairs stay apart, and nothing is shuffled between threads.
    """
    HALF: tl.constexpr = F.HALF
    BLOCK_C: tl.constexpr = F.BLOCK_HALF
    b_x = ()
    for i_c in tl.static_range(0, HALF, BLOCK_C):
        if F.INTERLEAVED:
            b_pairs = load_columns(
                rows.p + 2 * i_c, i_r, rows.stride, rows.limit, 2 * (HALF - i_c), 2 * BLOCK_C, ROWS, BOUND, LONG
            )
            b_a, b_b = tl.split(tl.reshape(b_pairs, [ROWS, BLOCK_C, 2]))
        else:
            b_a = load_columns(rows.p + i_c, i_r, rows.stride, rows.limit, HALF - i_c, BLOCK_C, ROWS, BOUND, LONG)
            b_b = load_columns(
                rows.p + HALF + i_c, i_r, rows.stride, rows.limit, HALF - i_c, BLOCK_C, ROWS, BOUND, LONG
            )
        b_cos = load_angles(
            rotary.p_cos, rotary, i_c, i_r, rows.limit, HALF, HALF - i_c, BLOCK_C, ROWS, BOUND, F.HAS_POSITIONS
        )
        b_sin = load_angles(
            rotary.p_sin, rotary, i_c, i_r, rows.limit, HALF, HALF - i_c, BLOCK_C, ROWS, BOUND, F.HAS_POSITIONS
        )
        # A sum of zeros, which costs nothing: without it the compiler turns k in the layout that mma.sync reads, where
        # every warp holds, and turns, all of it.
        b_cos -= tl.sum(tl.zeros([ROWS, 1], tl.float32), 1)[:, None]
        dtype = b_a.dtype
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
        b_x = b_x + ((b_a * b_cos - b_b * b_sin).to(dtype), (b_b * b_cos + b_a * b_sin).to(dtype))
    if 2 * HALF < F.HEAD_DIM:
        b_x = b_x + load_pieces(
            rows, i_r, 2 * HALF, F.HEAD_DIM, F.BLOCK_REST, DESCRIPTOR and HALF == 0, ROWS, BOUND, LONG
        )
    return b_x


@triton.jit
def store_columns(
    p_x, i_r, stride, limit, b_x, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr
):
    """Columns 0, STEP, 2 STEP, ... of rows i_r .. limit."""
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    p_tile = p_x + (i_r + o_r).to(tl.int64)[:, None] * stride + o_c[None, :] * STEP
    m_tile = (o_r < limit - i_r)[:, None] & (o_c < COLUMNS)[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def store_pieces(
    p_x, i_r, stride, limit, b_x, FIRST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):
    """What load_pieces reads."""
    for i_c in tl.static_range(FIRST, COLUMNS, BLOCK_C):
        store_columns(p_x + i_c, i_r, stride, limit, b_x[(i_c - FIRST) // BLOCK_C], COLUMNS - i_c, BLOCK_C, 1, ROWS)


@triton.jit
def store_head(p_x, rotary, i_r, stride, limit, b_x, F: tl.constexpr, ROWS: tl.constexpr):
    """The gradient of a head, turned back: a rotation's gradient is the rotation by the angle with its sign changed."""
    HALF: tl.constexpr = F.HALF
    BLOCK_C: tl.constexpr = F.BLOCK_HALF
    SECOND: tl.constexpr = 1 if F.INTERLEAVED else HALF
    STEP: tl.constexpr = 2 if F.INTERLEAVED else 1
    for i_c in tl.static_range(0, HALF, BLOCK_C):
        b_cos = load_angles(
            rotary.p_cos, rotary, i_c, i_r, limit, HALF, HALF - i_c, BLOCK_C, ROWS, True, F.HAS_POSITIONS
        )
        b_sin = load_angles(
            rotary.p_sin, rotary, i_c, i_r, limit, HALF, HALF - i_c, BLOCK_C, ROWS, True, F.HAS_POSITIONS
        )
        b_first = b_x[2 * i_c // BLOCK_C] * b_cos + b_x[2 * i_c // BLOCK_C + 1] * b_sin
        b_second = b_x[2 * i_c // BLOCK_C + 1] * b_cos - b_x[2 * i_c // BLOCK_C] * b_sin
        p_first = p_x + i_c * STEP
        store_columns(p_first, i_r, stride, limit, b_first, HALF - i_c, BLOCK_C, STEP, ROWS)
        store_columns(p_first + SECOND, i_r, stride, limit, b_second, HALF - i_c, BLOCK_C, STEP, ROWS)
    TURNED: tl.constexpr = 2 * ((HALF + BLOCK_C - 1) // BLOCK_C)  # pieces
    store_pieces(p_x, i_r, stride, limit, b_x[TURNED:], 2 * HALF, F.HEAD_DIM, F.BLOCK_REST, ROWS)


@triton.jit
def zero_pieces(COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """fp32 accumulators for pieces of load_pieces."""
    b_x = ()
    for _ in tl.static_range(0, COLUMNS, BLOCK_C):
        b_x = b_x + (tl.zeros([ROWS, BLOCK_C], tl.float32),)
    return b_x


@triton.jit
def zero_head(F: tl.constexpr, ROWS: tl.constexpr):
    """fp32 accumulators for the pieces of load_head."""
    b_half = zero_pieces(F.HALF, F.BLOCK_HALF, ROWS)
    return b_half + b_half + zero_pieces(F.HEAD_DIM - 2 * F.HALF, F.BLOCK_REST, ROWS)


@triton.jit
def scale_pieces(b_x, factor):
    """x * factor for every piece; `factor` may be a column, (ROWS, 1)."""
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (b_x[i] * factor,)
    return b_y


@triton.jit
def keep_pieces(b_x, m_x):
    """x where the mask holds, else 0."""
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (tl.where(m_x, b_x[i], 0.0),)
    return b_y


@triton.jit
def pieces_product(b_x, b_y, F: tl.constexpr):
    """x y^T summed over the pieces: (ROWS_X, ROWS_Y) fp32."""
    b_s = tl.dot(b_x[0], tl.trans(b_y[0]), input_precision=F.PRECISION)
    for i in tl.static_range(1, len(b_x)):
        b_s = tl.dot(b_x[i], tl.trans(b_y[i]), b_s, input_precision=F.PRECISION)
    return b_s


@triton.jit
def add_product(b_sum, b_w, b_x, F: tl.constexpr):
    """sum + w x for every piece."""
    b_w = b_w.to(b_x[0].dtype)
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (tl.dot(b_w, b_x[i], b_sum[i], input_precision=F.PRECISION),)
    return b_y


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
    """Scores in log2 units before the biases, and with a softcap its tanh, which the gradient needs."""
    if F.HAS_SOFTCAP:
        b_tanh = tanh(b_s * score.scale, ACCURATE)
        b_x = b_tanh * (score.softcap * LOG2E)
    else:
        b_tanh = b_s
        b_x = b_s * score.scale
    return b_x, b_tanh


@triton.jit
def line_bias(p_line, base, o_distance, radius, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """T5's bias of a tile from the head's line of values by distance, whose value 0 stands at p_line.

    `base` is the distance of the tile's first row and column. The line goes on by ROWS + COLUMNS constant values beyond
    the largest distance `radius`, so that clamping the scalar base replaces clamping every pair.
    """
    base = tl.minimum(tl.maximum(base, -(radius + COLUMNS)), radius + ROWS)
    return tl.load(p_line + base + o_distance)


@triton.jit
def biased_scores(
    b_s, score, base, o_distance, b_key, b_query, F: tl.constexpr, ACCURATE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores of a tile after softcap and biases, in log2 units, and the tanh of the softcap.

    b_key and b_query are the positions as fp32 row and column (or column and row): converting a pair costs more.
    """
    b_x, b_tanh = capped_scores(b_s, score, F, ACCURATE)
    if F.HAS_TABLE:
        b_x += line_bias(score.p_line, base, o_distance, score.radius, QUERIES, KEYS)
    if F.HAS_SLOPES:
        b_x -= score.slope * tl.abs(b_key - b_query)
    return b_x, b_tanh


@triton.jit
def has_nonfinite(b_x):
    """Whether a piece holds a NaN or an infinity; their products with 0 are NaN."""
    bad = tl.sum(b_x[0] * 0.0) != 0.0
    for i in tl.static_range(1, len(b_x)):
        bad = bad | (tl.sum(b_x[i] * 0.0) != 0.0)
    return bad


@triton.jit
def nonfinite_rows(b_x):
    """(ROWS,): the rows that hold a NaN or an infinity."""
    b_bad = tl.sum(b_x[0].to(tl.float32) * 0.0, 1) != 0.0
    for i in tl.static_range(1, len(b_x)):
        b_bad = b_bad | (tl.sum(b_x[i].to(tl.float32) * 0.0, 1) != 0.0)
    return b_bad


@triton.jit
def finite_or_zero(b_x):
    """x with zeros for NaN and infinities."""
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (tl.where(b_x[i].to(tl.float32) * 0.0 == 0.0, b_x[i], 0.0).to(b_x[i].dtype),)
    return b_y


@triton.jit
def spoil_rows(b_x, m_pair):
    """x, with NaN in the rows in which the mask holds somewhere."""
    b_spoil = tl.where(tl.max(m_pair.to(tl.int32), 1) > 0, float("nan"), 0.0)
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (b_x[i] + b_spoil[:, None],)
    return b_y
