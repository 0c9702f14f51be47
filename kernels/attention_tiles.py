"""What the attention kernels share: block ranges, loads and stores of (rotated) heads, scores, biases.

Vocabulary: i_* program and block indices, o_* offsets inside a block, m_* masks, p_* pointers, b_* block values.
A head is held as a tuple of channel pieces that products are summed over: the whole head, or with rotary embeddings the
first and second channels of the turned pairs and, if only a part is turned, the rest.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_ranges(
    first, last, limit, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_TAIL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns that rows standing at columns first .. last see: [start, end), of which [full_start, full_end) unmasked.

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
    return start, full_start, full_end, end


@triton.jit
def near_range(first, last, full_start, full_end, distance, BLOCK: tl.constexpr):
    """The unmasked blocks in which some column stands closer than `distance` to some row, and on both its sides."""
    near_start = tl.maximum(first - distance + 1, 0) // BLOCK * BLOCK
    near_start = tl.minimum(tl.maximum(near_start, full_start), full_end)
    near_end = tl.cdiv(tl.maximum(last + distance, 0), BLOCK) * BLOCK
    near_end = tl.minimum(tl.maximum(near_end, near_start), full_end)
    return near_start, near_end


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
        if BLOCK_C != COLUMNS:
            m_tile = m_tile & (o_c < COLUMNS)[None, :]
        b_x = tl.load(p_block + offsets, mask=m_tile, other=0.0)
    elif BLOCK_C != COLUMNS:
        b_x = tl.load(p_block + offsets, mask=(o_c < COLUMNS)[None, :], other=0.0)
    else:
        b_x = tl.load(p_block + offsets)
    return b_x  # (ROWS, BLOCK_C)


@triton.jit
def load_angles(
    p_table, p_positions, i_position, i_r, limit,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, ROWS: tl.constexpr, BOUND: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Rows of the cos or sin table (ROWS, BLOCK_HALF) for the keys i_position .. i_position + ROWS."""
    if HAS_POSITIONS:
        o_r = tl.arange(0, ROWS)
        o_c = tl.arange(0, BLOCK_HALF)
        if BOUND:
            b_position = tl.load(p_positions + i_position + o_r, mask=o_r < limit - i_r, other=0)  # (ROWS,)
        else:
            b_position = tl.load(p_positions + i_position + o_r)
        p_tile = p_table + b_position.to(tl.int64)[:, None] * HALF + o_c[None, :]
        # Rows beyond the limit turn zeros by the angle of position 0.
        if BLOCK_HALF != HALF:
            b_angles = tl.load(p_tile, mask=(o_c < HALF)[None, :], other=0.0)
        else:
            b_angles = tl.load(p_tile)
    else:
        end = limit - i_r + i_position
        b_angles = load_columns(p_table, i_position, HALF, end, HALF, BLOCK_HALF, ROWS, BOUND, False)
    return b_angles


@triton.jit
def load_heads(
    p_x, descriptor, i_b, i_h, i_r, stride, limit,
    p_cos, p_sin, p_positions, i_position,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr, DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr,
    BOUND: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows i_r .. i_r + ROWS of one head as channel pieces, turned by the angles of keys i_position .. (RoFormer).

    (a, b) -> (a cos - b sin, b cos + a sin) for every pair of channels. The order of the channels in q and k does not
    matter to q.k, so the firsts and the seconds of the pairs stay apart, and nothing is shuffled between threads.
    """
    if HALF == 0:
        if DESCRIPTOR:
            b_x = (tl.reshape(descriptor.load([i_b, i_h, i_r, 0]), [ROWS, BLOCK_D]),)
        else:
            b_x = (load_columns(p_x, i_r, stride, limit, HEAD_DIM, BLOCK_D, ROWS, BOUND, LONG),)
    else:
        if INTERLEAVED:
            b_pairs = load_columns(p_x, i_r, stride, limit, 2 * HALF, 2 * BLOCK_HALF, ROWS, BOUND, LONG)
            b_a, b_b = tl.split(tl.reshape(b_pairs, [ROWS, BLOCK_HALF, 2]))
        else:
            b_a = load_columns(p_x, i_r, stride, limit, HALF, BLOCK_HALF, ROWS, BOUND, LONG)
            b_b = load_columns(p_x + HALF, i_r, stride, limit, HALF, BLOCK_HALF, ROWS, BOUND, LONG)
        b_cos = load_angles(p_cos, p_positions, i_position, i_r, limit, HALF, BLOCK_HALF, ROWS, BOUND, HAS_POSITIONS)
        b_sin = load_angles(p_sin, p_positions, i_position, i_r, limit, HALF, BLOCK_HALF, ROWS, BOUND, HAS_POSITIONS)
        # A sum of zeros, which costs nothing: without it the compiler turns k in the layout that mma.sync reads, where
        # every warp holds, and turns, all of it.
        b_cos -= tl.sum(tl.zeros([ROWS, 1], tl.float32), 1)[:, None]
        dtype = b_a.dtype
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
        b_first = (b_a * b_cos - b_b * b_sin).to(dtype)  # (ROWS, BLOCK_HALF)
        b_second = (b_b * b_cos + b_a * b_sin).to(dtype)  # (ROWS, BLOCK_HALF)
        if BLOCK_REST > 0:
            REST: tl.constexpr = HEAD_DIM - 2 * HALF
            b_rest = load_columns(p_x + 2 * HALF, i_r, stride, limit, REST, BLOCK_REST, ROWS, BOUND, LONG)
            b_x = (b_first, b_second, b_rest)
        else:
            b_x = (b_first, b_second)
    return b_x


@triton.jit
def zero_heads(
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):  # fmt: skip
    """Accumulators for the pieces of load_heads."""
    if HALF == 0:
        b_x = (tl.zeros([ROWS, BLOCK_D], tl.float32),)
    elif BLOCK_REST == 0:
        b_x = (tl.zeros([ROWS, BLOCK_HALF], tl.float32), tl.zeros([ROWS, BLOCK_HALF], tl.float32))
    else:
        b_half = tl.zeros([ROWS, BLOCK_HALF], tl.float32)
        b_x = (b_half, b_half, tl.zeros([ROWS, BLOCK_REST], tl.float32))
    return b_x


@triton.jit
def store_columns(
    p_x, i_r, stride, limit, b_x,
    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Columns 0, STEP, 2 STEP, ... of rows i_r .. limit."""
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    p_tile = p_x + (i_r + o_r).to(tl.int64)[:, None] * stride + o_c[None, :] * STEP
    m_tile = (o_r < limit - i_r)[:, None] & (o_c < COLUMNS)[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def store_heads(
    p_x, i_r, stride, limit, b_x,
    p_cos, p_sin, p_positions, i_position,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of a head, turned back: a rotation's gradient is the rotation by the angle with its sign changed."""
    if HALF == 0:
        store_columns(p_x, i_r, stride, limit, b_x[0], HEAD_DIM, BLOCK_D, 1, ROWS)
    else:
        b_cos = load_angles(p_cos, p_positions, i_position, i_r, limit, HALF, BLOCK_HALF, ROWS, True, HAS_POSITIONS)
        b_sin = load_angles(p_sin, p_positions, i_position, i_r, limit, HALF, BLOCK_HALF, ROWS, True, HAS_POSITIONS)
        SECOND: tl.constexpr = 1 if INTERLEAVED else HALF
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        store_columns(p_x, i_r, stride, limit, b_x[0] * b_cos + b_x[1] * b_sin, HALF, BLOCK_HALF, STEP, ROWS)
        store_columns(p_x + SECOND, i_r, stride, limit, b_x[1] * b_cos - b_x[0] * b_sin, HALF, BLOCK_HALF, STEP, ROWS)
        if BLOCK_REST > 0:
            REST: tl.constexpr = HEAD_DIM - 2 * HALF
            store_columns(p_x + 2 * HALF, i_r, stride, limit, b_x[2], REST, BLOCK_REST, 1, ROWS)


@triton.jit
def heads_product(b_x, b_y, HALF: tl.constexpr, BLOCK_REST: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T summed over the channel pieces: (ROWS_X, ROWS_Y) fp32."""
    b_s = tl.dot(b_x[0], tl.trans(b_y[0]), input_precision=PRECISION)
    if HALF > 0:
        b_s = tl.dot(b_x[1], tl.trans(b_y[1]), b_s, input_precision=PRECISION)
    if BLOCK_REST > 0:
        b_s = tl.dot(b_x[2], tl.trans(b_y[2]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_product(b_sum, b_w, b_x, HALF: tl.constexpr, BLOCK_REST: tl.constexpr, PRECISION: tl.constexpr):
    """sum + w x for every channel piece."""
    b_w = b_w.to(b_x[0].dtype)
    b_first = tl.dot(b_w, b_x[0], b_sum[0], input_precision=PRECISION)
    if HALF == 0:
        b_y = (b_first,)
    else:
        b_second = tl.dot(b_w, b_x[1], b_sum[1], input_precision=PRECISION)
        if BLOCK_REST == 0:
            b_y = (b_first, b_second)
        else:
            b_y = (b_first, b_second, tl.dot(b_w, b_x[2], b_sum[2], input_precision=PRECISION))
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
def capped_scores(b_s, scale, softcap, HAS_SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr):
    """Scores in log2 units before the biases, and with a softcap its tanh, which the gradient needs."""
    if HAS_SOFTCAP:
        b_tanh = tanh(b_s * scale, ACCURATE)  # the launcher's scale is softmax_scale / softcap
        b_x = b_tanh * (softcap * LOG2E)
    else:
        b_tanh = b_s
        b_x = b_s * scale
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
    b_s, scale, softcap, p_line, base, o_distance, radius, slope, b_key, b_query,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_TABLE: tl.constexpr, ACCURATE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores of a tile after softcap and biases, in log2 units, and the tanh of the softcap.

    b_key and b_query are the positions as fp32 row and column (or column and row): converting a pair costs more.
    """
    b_x, b_tanh = capped_scores(b_s, scale, softcap, HAS_SOFTCAP, ACCURATE)
    if HAS_TABLE:
        b_x += line_bias(p_line, base, o_distance, radius, QUERIES, KEYS)
    if HAS_SLOPES:
        b_x -= slope * tl.abs(b_key - b_query)
    return b_x, b_tanh


@triton.jit
def has_nonfinite(b_x):
    """Whether a tile holds a NaN or an infinity; their products with 0 are NaN."""
    return tl.sum(b_x * 0.0) != 0.0


@triton.jit
def nonfinite_rows(b_x):
    """(ROWS, COLUMNS) -> (ROWS,): the rows that hold a NaN or an infinity."""
    return tl.sum(b_x.to(tl.float32) * 0.0, 1) != 0.0


@triton.jit
def nonfinite_head_rows(b_x, HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """nonfinite_rows over all channel pieces."""
    b_bad = nonfinite_rows(b_x[0])
    if HALF > 0:
        b_bad = b_bad | nonfinite_rows(b_x[1])
    if BLOCK_REST > 0:
        b_bad = b_bad | nonfinite_rows(b_x[2])
    return b_bad


@triton.jit
def has_nonfinite_heads(b_x, HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """has_nonfinite over all channel pieces."""
    bad = has_nonfinite(b_x[0])
    if HALF > 0:
        bad = bad | has_nonfinite(b_x[1])
    if BLOCK_REST > 0:
        bad = bad | has_nonfinite(b_x[2])
    return bad


@triton.jit
def finite_or_zero(b_x):
    """x with zeros for NaN and infinities."""
    return tl.where(b_x.to(tl.float32) * 0.0 == 0.0, b_x, 0.0).to(b_x.dtype)


@triton.jit
def finite_or_zero_heads(b_x, HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """finite_or_zero of all channel pieces."""
    if HALF == 0:
        b_y = (finite_or_zero(b_x[0]),)
    elif BLOCK_REST == 0:
        b_y = (finite_or_zero(b_x[0]), finite_or_zero(b_x[1]))
    else:
        b_y = (finite_or_zero(b_x[0]), finite_or_zero(b_x[1]), finite_or_zero(b_x[2]))
    return b_y


@triton.jit
def add_rows(b_x, b_row, HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """x + row[:, None] for every channel piece."""
    if HALF == 0:
        b_y = (b_x[0] + b_row[:, None],)
    elif BLOCK_REST == 0:
        b_y = (b_x[0] + b_row[:, None], b_x[1] + b_row[:, None])
    else:
        b_y = (b_x[0] + b_row[:, None], b_x[1] + b_row[:, None], b_x[2] + b_row[:, None])
    return b_y


@triton.jit
def spoil(m_pair):
    """(ROWS,): NaN for the rows in which the mask holds, else 0."""
    return tl.where(tl.max(m_pair.to(tl.int32), 1) > 0, float("nan"), 0.0)
