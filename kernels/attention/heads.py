"""Heads in pieces: how the attention kernels load, turn, multiply and store blocks of rows.

Vocabulary: i_* program and block indices, o_* offsets inside a block, m_* masks, p_* pointers, b_* block values;
`F` is what a kernel computes and `TILE` how it is cut, both known when it is compiled. Launchers hand kernels plain
tuples, which cost no time to pass; kernels name their fields by the tuples below, in the same order.

A block of rows is a tuple of channel pieces that products are summed over: with rotary embeddings first and second
channels of the turned pairs, then the channels that are not turned; each cut so that no piece is wider than registers
allow.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class AttentionFeatures(NamedTuple):
    """The features of a call of attention, forward or backward."""

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


class AttentionTile(NamedTuple):
    """The cut of a call of attention, forward or backward, into blocks."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    MASKED: int  # columns (queries in the kernel of k and v, else keys) of a block with a mask
    HOIST: bool  # whether loops may compute their constants before they start
    DESCRIPTOR: bool  # whether TMA reads the tensors that the loops go through
    LONG: bool  # whether offsets within a tile need 64 bits


class Heads(NamedTuple):
    """A tensor (batch, rows, heads, head_dim) or, for a cache in pages, (pages, rows, heads, head_dim)."""

    p: tl.tensor
    stride_b: tl.tensor
    stride_s: tl.tensor
    stride_h: tl.tensor


class HeadRows(NamedTuple):
    """The rows of one head of a sequence."""

    p: tl.tensor  # row 0
    descriptor: tl.tensor | None  # the whole tensor's; row 0 is its row (i_b, i_h, start)
    i_b: tl.tensor
    i_h: tl.tensor
    start: tl.tensor
    stride: tl.tensor
    limit: tl.tensor  # rows from here on are zeros, and are not read


class HeadRotary(NamedTuple):
    """Tables of rotary embeddings for a head's rows."""

    p_cos: tl.tensor
    p_sin: tl.tensor
    p_positions: tl.tensor  # with position ids: row i turns by position p_positions[i + start], else by i + start
    start: tl.tensor


@triton.jit
def or_zero(p):
    """p, or 0 for None: Triton 3.6 has no functions that return None."""
    if p is None:
        p = 0
    return p


@triton.jit
def load_columns(
    p_x, i_r, stride, limit,
    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BOUND: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows i_r .. i_r + ROWS, their first COLUMNS channels, then zeros; with BOUND rows from `limit` on are zeros.

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
    if DESCRIPTOR:  # all channels are one piece
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
    """Stores the pieces that load_pieces reads."""
    for i_c in tl.static_range(FIRST, COLUMNS, BLOCK_C):
        store_columns(p_x + i_c, i_r, stride, limit, b_x[(i_c - FIRST) // BLOCK_C], COLUMNS - i_c, BLOCK_C, 1, ROWS)


@triton.jit
def store_head(p_x, rotary, i_r, stride, limit, b_x, F: tl.constexpr, ROWS: tl.constexpr):
    """Stores a head's gradient, turned back: a rotation's gradient is the rotation by the negative angle."""
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
    """Zeros in fp32 for each piece of load_pieces."""
    b_x = ()
    for _ in tl.static_range(0, COLUMNS, BLOCK_C):
        b_x = b_x + (tl.zeros([ROWS, BLOCK_C], tl.float32),)
    return b_x


@triton.jit
def zero_head(F: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in fp32 for each piece of load_head."""
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
    """x where the mask holds, else 0, for every piece."""
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (tl.where(m_x, b_x[i], 0.0),)
    return b_y


@triton.jit
def pieces_product(b_x, b_y, F: tl.constexpr):
    """x y^T, the sum over all pieces: (ROWS_X, ROWS_Y) fp32."""
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
def has_nonfinite(b_x):
    """Whether a piece holds a NaN or an infinity; their products with 0 are NaN."""
    bad = tl.sum(b_x[0] * 0.0) != 0.0
    for i in tl.static_range(1, len(b_x)):
        bad = bad | (tl.sum(b_x[i] * 0.0) != 0.0)
    return bad


@triton.jit
def nonfinite_rows(b_x):
    """A mask of the rows that hold a NaN or an infinity: (ROWS,)."""
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
    """x with NaN in the rows that the mask (ROWS, COLUMNS) marks anywhere."""
    b_spoil = tl.where(tl.max(m_pair.to(tl.int32), 1) > 0, float("nan"), 0.0)
    b_y = ()
    for i in tl.static_range(0, len(b_x)):
        b_y = b_y + (b_x[i] + b_spoil[:, None],)
    return b_y
