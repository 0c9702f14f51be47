"""Rows that lie anywhere in memory, and their scores: heads of several tokens, keys in pages, chosen queries.

A block of rows is given by a pointer and the rows' offsets from it, o_row, and loaded as a tuple of channel pieces.
Unlike in heads.py channels keep their order when they are turned, because a cache holds keys that are turned already.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import or_zero
from .scores import LOG2E, capped_scores


class RowRotary(NamedTuple):
    """Tables of rotary embeddings, and the rows' positions in them."""

    p_cos: tl.tensor
    p_sin: tl.tensor
    b_position: tl.tensor  # (ROWS,)


class RowScore(NamedTuple):
    """The factors and biases that make scores of the products of a block of queries, and the queries' window."""

    scale: tl.tensor  # in log2 units; with a softcap softmax_scale / softcap
    softcap: tl.tensor
    b_place: tl.tensor  # (ROWS,): the key at which a query stands
    b_slope: tl.tensor  # (ROWS,): ALiBi's in log2 units
    p_table: tl.tensor  # (ROWS,): T5's biases of the rows' heads, at bucket 0
    p_buckets: tl.tensor  # of each distance, at distance 0
    heads: tl.tensor  # the distance of two buckets' biases
    radius: tl.tensor  # T5's bias is constant from this distance on
    left: tl.tensor
    right: tl.tensor


@triton.jit
def load_rows(
    p_x, o_row, m_row, FIRST: tl.constexpr, END: tl.constexpr, BLOCK_C: tl.constexpr, BOUND: tl.constexpr
):  # fmt: skip
    """Channels FIRST .. END in pieces (ROWS, BLOCK_C), then zeros; with BOUND rows outside of the mask are zeros."""
    o_c = tl.arange(0, BLOCK_C)
    offsets = o_row[:, None] + o_c[None, :]
    b_x = ()
    for i_c in tl.static_range(FIRST, END, BLOCK_C):
        if BOUND:
            m_tile = m_row[:, None]
            if BLOCK_C > END - i_c:
                m_tile = m_tile & (o_c < END - i_c)[None, :]
            b_x = b_x + (tl.load(p_x + i_c + offsets, mask=m_tile, other=0.0),)
        elif BLOCK_C > END - i_c:
            b_x = b_x + (tl.load(p_x + i_c + offsets, mask=(o_c < END - i_c)[None, :], other=0.0),)
        else:
            b_x = b_x + (tl.load(p_x + i_c + offsets),)
    return b_x


@triton.jit
def load_turned_rows(
    p_x, o_row, m_row, rotary, FIRST: tl.constexpr, END: tl.constexpr, BLOCK_C: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The pieces of load_rows, the first 2 HALF channels turned by their angles (Su et al., arXiv 2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin): every channel comes with the other one of its pair.
    """
    o_c = tl.arange(0, BLOCK_C)
    b_x = load_rows(p_x, o_row, m_row, FIRST, END, BLOCK_C, True)
    b_y = ()
    for i_c in tl.static_range(FIRST, END, BLOCK_C):
        b_own = b_x[(i_c - FIRST) // BLOCK_C]
        if i_c < 2 * HALF:
            if INTERLEAVED:
                m_first = (i_c + o_c) % 2 == 0
                o_other = tl.where(m_first, i_c + o_c + 1, i_c + o_c - 1)
                o_pair = (i_c + o_c) // 2
            else:
                m_first = i_c + o_c < HALF
                o_other = tl.where(m_first, i_c + o_c + HALF, i_c + o_c - HALF)
                o_pair = tl.where(m_first, i_c + o_c, i_c + o_c - HALF)
            m_turned = m_row[:, None] & (i_c + o_c < 2 * HALF)[None, :]
            o_angle = rotary.b_position.to(tl.int64)[:, None] * HALF + o_pair[None, :]
            b_cos = tl.load(rotary.p_cos + o_angle, mask=m_turned, other=1.0)  # (ROWS, BLOCK_C)
            b_sin = tl.load(rotary.p_sin + o_angle, mask=m_turned, other=0.0)
            b_sin = tl.where(m_first[None, :], -b_sin, b_sin)
            b_other = tl.load(p_x + o_row[:, None] + o_other[None, :], mask=m_turned, other=0.0)
            b_turned = b_own.to(tl.float32) * b_cos + b_other.to(tl.float32) * b_sin
            b_y = b_y + (tl.where(m_turned, b_turned.to(b_own.dtype), b_own),)
        else:
            b_y = b_y + (b_own,)
    return b_y


@triton.jit
def store_rows(
    p_x, o_row, m_row, b_x, FIRST: tl.constexpr, END: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Stores the pieces that load_rows reads."""
    o_c = tl.arange(0, BLOCK_C)
    for i_c in tl.static_range(FIRST, END, BLOCK_C):
        p_tile = p_x + i_c + o_row[:, None] + o_c[None, :]
        b_piece = b_x[(i_c - FIRST) // BLOCK_C].to(p_x.dtype.element_ty)
        tl.store(p_tile, b_piece, mask=m_row[:, None] & (o_c < END - i_c)[None, :])


@triton.jit
def row_score(
    p_slopes, p_table, p_buckets, b_place, b_h, scale, softcap, heads, radius, left, right, F: tl.constexpr
):  # fmt: skip
    """The scores of rows that stand at keys b_place, in heads b_h."""
    b_slope = 0.0
    if F.HAS_SLOPES:
        b_slope = tl.load(p_slopes + b_h) * LOG2E
    if F.HAS_TABLE:
        p_table += b_h
        p_buckets += radius
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    return RowScore(
        scale, softcap, b_place, b_slope, or_zero(p_table), or_zero(p_buckets), heads, radius, left, right
    )  # fmt: skip


@triton.jit
def row_scores(b_s, score, i_n, F: tl.constexpr, ACCURATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scores of keys i_n .. i_n + BLOCK_N after softcap and biases, in log2 units."""
    b_x, _ = capped_scores(b_s, score, F, ACCURATE)
    b_key = i_n + tl.arange(0, BLOCK_N)
    if F.HAS_TABLE:
        b_distance = b_key[None, :] - score.b_place[:, None]  # (ROWS, BLOCK_N)
        b_distance = tl.minimum(tl.maximum(b_distance, -score.radius), score.radius)
        b_bucket = tl.load(score.p_buckets + b_distance)
        b_x += tl.load(score.p_table[:, None] + b_bucket * score.heads) * LOG2E
    if F.HAS_SLOPES:
        b_distance = b_key.to(tl.float32)[None, :] - score.b_place.to(tl.float32)[:, None]
        b_x -= score.b_slope[:, None] * tl.abs(b_distance)
    return b_x


@triton.jit
def seen_keys(score, i_n, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """A mask of the pairs of rows and keys i_n .. i_n + BLOCK_N in the window: (ROWS, BLOCK_N)."""
    b_distance = (i_n + tl.arange(0, BLOCK_N))[None, :] - score.b_place[:, None]
    m_pair = tl.full([score.b_place.shape[0], BLOCK_N], True, tl.int1)
    if F.HAS_LEFT:
        m_pair = m_pair & (b_distance >= -score.left)
    if F.HAS_RIGHT:
        m_pair = m_pair & (b_distance <= score.right)
    return m_pair
