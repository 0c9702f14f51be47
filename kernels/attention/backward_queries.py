"""Fused attention, backward: the gradient of q and of the biases, a block of queries each (Dao, arXiv 2307.08691)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import head_dropout, kept_weights
from .heads import (
    HeadRotary,
    Heads,
    add_product,
    finite_or_zero,
    has_nonfinite,
    load_head,
    load_pieces,
    nonfinite_rows,
    pieces_product,
    scale_pieces,
    spoil_rows,
    store_head,
    zero_head,
)
from .scores import (
    Biases,
    Block,
    Head,
    Span,
    biased_scores,
    block_ranges,
    capped_scores,
    far_span,
    head_score,
    near_range,
)
from .sequences import Sequences, Statistics, contiguous_rows, head_rows, query_block, sequence_rotary


class NearSums(NamedTuple):
    """Sums of ds by distance, in segments."""

    p: tl.tensor
    first: tl.tensor  # the distance of the first key to the first query in a tile of the first segment
    size: tl.tensor  # all segments' of a program


class QuerySums(NamedTuple):
    """The sums of a block of queries over the keys that a loop has visited so far."""

    b_grad_q: tl.tuple  # pieces (BLOCK_M, channels): ds k
    b_slope: tl.tensor  # (BLOCK_M,): ds |distance|
    b_left: tl.tensor  # (BLOCK_M,): ds of keys far to the left ...
    b_right: tl.tensor  # ... and to the right


class QueryBlock(NamedTuple):
    """A block of queries."""

    b_q: tl.tuple  # pieces (BLOCK_M, channels)
    b_grad: tl.tuple  # pieces (BLOCK_M, BLOCK_D) of the gradient of out
    b_pivot: tl.tensor  # (BLOCK_M,)
    b_delta: tl.tensor


@triton.jit
def _diagonal_sums(b_x, p_sums, SIZE: tl.constexpr):
    """Stores the sums of a square tile by column - row: -SIZE (nothing), 1 - SIZE .. -1, then 0 .. SIZE - 1.

    Row r is turned left by r, which puts a diagonal and the one SIZE below it into the same column.
    """
    o_r = tl.arange(0, SIZE)[:, None]
    o_c = tl.arange(0, SIZE)[None, :]
    b_turned = tl.gather(b_x, (o_r + o_c) & (SIZE - 1), 1)  # (SIZE, SIZE)
    m_upper = o_r + o_c < SIZE
    o_n = tl.arange(0, SIZE)
    tl.store(p_sums + o_n, tl.sum(tl.where(m_upper, 0.0, b_turned), 0))
    tl.store(p_sums + SIZE + o_n, tl.sum(tl.where(m_upper, b_turned, 0.0), 0))


@triton.jit
def _sums_of_tile(sums, distance, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """A pointer to the sums of a tile whose first key has this distance to its first query.

    Tiles overlap in distances, so each has a segment of its own, of twice SIZE. Tiles of packed sequences may differ in
    distance by any number: they start anywhere in the first third of a segment of three times SIZE.
    """
    SEGMENT: tl.constexpr = (3 if PACKED else 2) * SIZE
    steps = distance - sums.first
    return sums.p + steps // SIZE * SEGMENT + steps % SIZE


@triton.jit
def _add_table_sums(
    b_left, b_right, b_ds, sums, base, radius, side, PACKED: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Adds a square tile's ds to the sums far left and far right, which it returns, or to those by distance.

    `base` is the distance of the tile's first key to its first query.
    """
    if KIND == "near":
        _diagonal_sums(b_ds, _sums_of_tile(sums, base, PACKED, SIZE), SIZE)
    elif KIND == "far":
        b_sum = tl.sum(b_ds, 1)  # (SIZE,)
        b_left += tl.where(side < 0, b_sum, 0.0)
        b_right += tl.where(side < 0, 0.0, b_sum)
    else:
        far_left = base + SIZE - 1 <= -radius
        far_right = base - (SIZE - 1) >= radius
        if far_left | far_right:
            b_sum = tl.sum(b_ds, 1)
            b_left += tl.where(far_left, b_sum, 0.0)
            b_right += tl.where(far_left, 0.0, b_sum)
        else:
            _diagonal_sums(b_ds, _sums_of_tile(sums, base, PACKED, SIZE), SIZE)
    return b_left, b_right


@triton.jit
def _visit_keys(
    sums, near_sums, queries, head, block, span, side, constant,
    F: tl.constexpr, TILE: tl.constexpr, NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The sums after the blocks of keys of a span; KIND has the forward kernel's meaning."""
    b_grad_q, b_slope, b_left, b_right = sums
    b_q, b_grad, b_pivot, b_delta = queries
    keys, values, rotary, score, dropout = head
    i_m, first, left, right = block
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    MASKED: tl.constexpr = KIND == "masked" or KIND == "careful"
    ACCURATE: tl.constexpr = b_q[0].dtype == tl.float32
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[None, :] - o_m[:, None]  # (BLOCK_M, BLOCK_N)
    b_row = side * -score.slope * o_n  # (BLOCK_N,)
    b_place = (first + o_m).to(tl.float32)  # (BLOCK_M,)
    b_lower = first + o_m - left  # (BLOCK_M,)
    b_upper = keys.limit - 1 + tl.zeros_like(o_m)  # (BLOCK_M,)
    if F.HAS_RIGHT:
        b_upper = tl.minimum(first + o_m + right, b_upper)
    for i_block in tl.range(
        span.start, span.end, BLOCK_N, num_stages=1 if KIND == "careful" else None,
        disable_licm=MASKED or not TILE.HOIST,
    ):  # fmt: skip
        i_n = i_block
        if MASKED:
            i_n += tl.where(i_block >= span.split, span.gap, 0)
            m_pair = o_n[None, :] <= (b_upper - i_n)[:, None]
            if F.HAS_LEFT:
                m_pair = m_pair & (o_n[None, :] >= (b_lower - i_n)[:, None])
        b_k = load_head(keys, rotary, i_n, F, DESCRIPTOR, BLOCK_N, MASKED, TILE.LONG)
        b_s = pieces_product(b_q, b_k, F)  # (BLOCK_M, BLOCK_N)
        if KIND == "far":
            b_shift = constant
            b_x, b_tanh = capped_scores(b_s, score, F, ACCURATE)
            if F.HAS_SLOPES:
                b_shift += side * -score.slope * (i_n.to(tl.float32) - b_place)  # (BLOCK_M,)
                b_x += b_row[None, :]
            b_p = tl.exp2(b_x - (b_pivot - b_shift)[:, None])
        else:
            b_x, b_tanh = biased_scores(
                b_s, score, i_n - first, o_distance, (i_n + o_n).to(tl.float32)[None, :], b_place[:, None],
                F, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            b_p = tl.exp2(b_x - b_pivot[:, None])
        b_v = load_pieces(values, i_n, 0, F.HEAD_DIM_V, F.BLOCK_D, DESCRIPTOR, BLOCK_N, MASKED, TILE.LONG)
        b_grad_p = pieces_product(b_grad, b_v, F)  # (BLOCK_M, BLOCK_N)
        if F.HAS_DROPOUT:
            b_kept = tl.where(kept_weights(dropout, i_m, i_n, BLOCK_M, BLOCK_N), b_p, 0.0)
            b_ds = b_kept * b_grad_p - b_p * b_delta[:, None]
        else:
            b_ds = b_p * (b_grad_p - b_delta[:, None])
        if MASKED:
            b_ds = tl.where(m_pair, b_ds, 0.0)

        if NEEDS_SLOPES:
            if KIND == "far":
                b_steps = i_n.to(tl.float32) - b_place  # (BLOCK_M,)
                b_slope += side * (tl.sum(b_ds * o_n.to(tl.float32)[None, :], 1) + b_steps * tl.sum(b_ds, 1))
            else:
                b_slope += tl.sum(b_ds * tl.abs((i_n + o_n).to(tl.float32)[None, :] - b_place[:, None]), 1)
        if NEEDS_TABLE:
            b_left, b_right = _add_table_sums(
                b_left, b_right, b_ds, near_sums, i_n - first, score.radius, side, F.PACKED, KIND, BLOCK_N
            )

        if F.HAS_SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        if KIND == "careful":
            b_grad_q = spoil_rows(b_grad_q, m_pair & nonfinite_rows(b_k)[None, :])
            b_k = finite_or_zero(b_k)
        b_grad_q = add_product(b_grad_q, b_ds, b_k, F)  # (BLOCK_M, channels) each
    return QuerySums(b_grad_q, b_slope, b_left, b_right)


@triton.jit
def attention_backward_queries_kernel(
    q, k, v, grad_out, statistics, p_grad_q, p_grad_slope, p_far, near_sums, descriptor_k, descriptor_v,
    sequences, biases, rotary, p_seed, heads, group, left, right, scale, softcap, dropped, grad_scale, kept_share,
    F: tl.constexpr, TILE: tl.constexpr, NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr,
):  # fmt: skip
    """grad_q = scale sum_j ds_j k_j, ds = p (grad_out . v - delta), and partial sums of ds for the bias gradients.

    Slopes: sum ds |distance|. Table: the sums of ds far to the left and far to the right, and by distance in between.
    Each program writes its own partial sums, which are added up in a fixed order afterwards. With dropout ds is
    p (m grad_out . v - share delta) / share, m = 1 where a weight is kept: the statistics hold share delta, and the
    sums are divided in the end.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    MASKED_N: tl.constexpr = TILE.MASKED
    sequences = Sequences(*sequences)
    rows_q = sequences.rows_q
    sequence, i_h, i_m, first, last = query_block(sequences, heads, F, BLOCK_M)
    if F.PACKED:
        if i_m < 0:
            return
    i, i_b, start_q, start_k, start_statistics, seqlen_q, seqlen_k, limit = sequence
    masked, full_start, full_end = block_ranges(
        first, last, limit, left, right, F.HAS_LEFT, F.HAS_RIGHT, True, BLOCK_N, MASKED_N
    )
    query_rows = head_rows(Heads(*q), None, i_b, start_q, i_h, seqlen_q)
    grad_rows = head_rows(Heads(*grad_out), None, i_b, start_q, i_h, seqlen_q)
    keys = head_rows(Heads(*k), descriptor_k, i_b, start_k, i_h // group, limit)
    values = head_rows(Heads(*v), descriptor_v, i_b, start_k, i_h // group, limit)
    rotary = sequence_rotary(HeadRotary(*rotary), sequence, sequences.rows_k, F.HAS_POSITIONS)
    rotary_q = HeadRotary(rotary.p_cos, rotary.p_sin, rotary.p_positions, rotary.start + seqlen_k - seqlen_q)
    biases = Biases(*biases)
    score, constant_left, constant_right = head_score(biases, i, i_h, scale, softcap, F, BLOCK_M + BLOCK_N)
    head = Head(keys, values, rotary, score, head_dropout(p_seed, i * heads + i_h, dropped, F.HAS_DROPOUT))
    block = Block(i_m, first, left, right)
    i_program = tl.program_id(0).to(tl.int64)
    p_near, near_first, near_size = near_sums
    if NEEDS_TABLE:
        p_near += i_program * near_size
    near_sums = NearSums(p_near, near_first, near_size)

    b_q = load_head(query_rows, rotary_q, i_m, F, False, BLOCK_M, True, TILE.LONG)
    b_grad = load_pieces(grad_rows, i_m, 0, F.HEAD_DIM_V, F.BLOCK_D, False, BLOCK_M, True, TILE.LONG)
    p_pivot, p_delta, padded_q = Statistics(*statistics)
    o_row = (i_b * heads + i_h).to(tl.int64) * padded_q + start_statistics + i_m + tl.arange(0, BLOCK_M)
    queries = QueryBlock(b_q, b_grad, tl.load(p_pivot + o_row), tl.load(p_delta + o_row))
    b_zero = tl.zeros([BLOCK_M], tl.float32)
    sums = QuerySums(zero_head(F, BLOCK_M), b_zero, b_zero, b_zero)

    MASKED_DESCRIPTOR: tl.constexpr = TILE.DESCRIPTOR and not F.HAS_LENGTHS and not F.PACKED and MASKED_N == BLOCK_N
    sums = _visit_keys(
        sums, near_sums, queries, head, block, masked, 0.0, 0.0, F, TILE, NEEDS_SLOPES, NEEDS_TABLE,
        MASKED_DESCRIPTOR, MASKED_N, "masked",
    )  # fmt: skip
    if has_nonfinite(sums.b_grad_q):
        NARROW_N: tl.constexpr = min(MASKED_N, 32 if max(F.HEAD_DIM, F.HEAD_DIM_V) <= 64 else 16)  # spares registers
        sums = _visit_keys(
            QuerySums(zero_head(F, BLOCK_M), sums.b_slope, sums.b_left, sums.b_right), near_sums, queries, head, block,
            masked, 0.0, 0.0, F, TILE, False, False, False, NARROW_N, "careful",
        )  # fmt: skip

    HAS_BIAS: tl.constexpr = F.HAS_SLOPES or F.HAS_TABLE
    near_start = full_end
    near_end = full_end
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, biases.radius, BLOCK_N)
    SIDES: tl.constexpr = 2 if HAS_BIAS and not F.CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far, side = far_span(i_side, full_start, near_start, near_end, full_end)
        constant = tl.where(i_side == 0, constant_left, constant_right)
        sums = _visit_keys(
            sums, near_sums, queries, head, block, far, side, constant, F, TILE, NEEDS_SLOPES, NEEDS_TABLE,
            TILE.DESCRIPTOR, BLOCK_N, "far",
        )  # fmt: skip
    if F.HAS_TABLE or (F.HAS_SLOPES and not F.CAUSAL):
        near = Span(near_start, near_end, 0, near_end)
        sums = _visit_keys(
            sums, near_sums, queries, head, block, near, 0.0, 0.0, F, TILE, NEEDS_SLOPES, NEEDS_TABLE,
            TILE.DESCRIPTOR, BLOCK_N, "near",
        )  # fmt: skip

    b_grad_q, b_slope, b_left, b_right = sums
    if NEEDS_SLOPES:
        grad_slope = -tl.sum(b_slope, 0)
        if F.HAS_DROPOUT:
            grad_slope /= kept_share
        tl.store(p_grad_slope + i_program, grad_slope)
    if NEEDS_TABLE:
        tl.store(p_far + i_program * 2, tl.sum(b_left, 0))
        tl.store(p_far + i_program * 2 + 1, tl.sum(b_right, 0))
    b_grad_q = scale_pieces(b_grad_q, grad_scale)
    p_grad_q = contiguous_rows(p_grad_q, i_b, start_q, i_h, rows_q, heads, F.HEAD_DIM)
    store_head(p_grad_q, rotary_q, i_m, heads * F.HEAD_DIM, seqlen_q, b_grad_q, F, BLOCK_M)
