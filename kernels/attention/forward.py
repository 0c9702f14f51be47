"""Fused attention, forward: FlashAttention-2 (Dao, arXiv 2307.08691) with the positional schemes inside."""

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
    store_pieces,
)
from .scores import (
    LN2,
    Biases,
    Block,
    Head,
    Running,
    Span,
    biased_scores,
    block_ranges,
    capped_scores,
    far_span,
    head_score,
    near_range,
    start_of_rows,
)
from .sequences import Sequences, contiguous_rows, head_rows, query_block, sequence_rotary


@triton.jit
def _visit_blocks(
    running, b_q, head, block, span, side, constant,
    F: tl.constexpr, TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The running softmax after the blocks of keys of a span.

    KIND masked: pairs may be outside the window or the keys; careful: masked, and a value that is not finite reaches
    only the queries that see its key; far: every key is on one side of every query (side -1: left) and at least
    `radius` away, so that T5's bias is one constant and ALiBi's needs one row of values; near: all other blocks.
    """
    b_m, b_l, b_acc = running
    keys, values, rotary, score, dropout = head
    i_m, first, left, right = block
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    MASKED: tl.constexpr = KIND == "masked" or KIND == "careful"
    ACCURATE: tl.constexpr = b_q[0].dtype == tl.float32
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[None, :] - o_m[:, None]  # (BLOCK_M, BLOCK_N): key - query within the tile
    b_row = side * -score.slope * o_n  # (BLOCK_N,): ALiBi's bias against the block's first key
    b_place = (first + o_m).to(tl.float32)  # (BLOCK_M,)
    # The first and last key each query sees: bounds of rows, so that a pair costs one comparison.
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
        if KIND == "careful":
            b_v = load_pieces(values, i_n, 0, F.HEAD_DIM_V, F.BLOCK_D, False, BLOCK_N, True, TILE.LONG)
            b_acc = spoil_rows(b_acc, m_pair & nonfinite_rows(b_v)[None, :])
        b_k = load_head(keys, rotary, i_n, F, DESCRIPTOR, BLOCK_N, MASKED, TILE.LONG)
        b_s = pieces_product(b_q, b_k, F)  # (BLOCK_M, BLOCK_N)
        b_shift = constant  # is still to be added to every score of a row
        if KIND == "far":
            if F.HAS_SLOPES:
                b_shift += side * -score.slope * (i_n.to(tl.float32) - b_place)  # (BLOCK_M,)
            if F.HAS_SLOPES or F.HAS_SOFTCAP or not F.POSITIVE_SCALE:
                b_x, _ = capped_scores(b_s, score, F, ACCURATE)
                if F.HAS_SLOPES:
                    b_x += b_row[None, :]
                b_max = tl.maximum(b_m, tl.max(b_x, 1) + b_shift)  # (BLOCK_M,)
                b_p = tl.exp2(b_x - (b_max - b_shift)[:, None])
            else:
                b_max = tl.maximum(b_m, tl.max(b_s, 1) * score.scale + b_shift)
                b_p = tl.exp2(b_s * score.scale - (b_max - b_shift)[:, None])  # one fused multiply-add a score
            b_alpha = tl.exp2(b_m - b_max)
        else:
            b_x, _ = biased_scores(
                b_s, score, i_n - first, o_distance, (i_n + o_n).to(tl.float32)[None, :], b_place[:, None],
                F, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if MASKED:
                b_x = tl.where(m_pair, b_x, -float("inf"))
            b_max = tl.maximum(b_m, tl.max(b_x, 1))
            # A row that has seen nothing yet keeps a finite pivot: -inf - -inf would be NaN.
            b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max) if MASKED else b_max
            b_p = tl.exp2(b_x - b_pivot[:, None])
            b_alpha = tl.exp2(b_m - b_pivot)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = scale_pieces(b_acc, b_alpha[:, None])
        b_v = load_pieces(values, i_n, 0, F.HEAD_DIM_V, F.BLOCK_D, DESCRIPTOR, BLOCK_N, MASKED, TILE.LONG)
        if KIND == "careful":
            b_v = finite_or_zero(b_v)
        if F.HAS_DROPOUT:
            b_p = tl.where(kept_weights(dropout, i_m, i_n, BLOCK_M, BLOCK_N), b_p, 0.0)
        b_acc = add_product(b_acc, b_p, b_v, F)  # (BLOCK_M, BLOCK_D) each
        b_m = b_max
    return Running(b_m, b_l, b_acc)


@triton.jit
def attention_forward_kernel(
    q, k, v, p_out, p_lse, descriptor_k, descriptor_v, p_sinks, sequences, biases, rotary, p_seed,
    heads, group, left, right, scale, softcap, dropped, kept_share, F: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = softmax(score) v and lse = log sum exp(score), score = softcap(q.k * scale) + biases, by blocks of queries.

    Scores live in log2 units, in which exp2(s * scale - max) is one instruction. The blocks that need a mask (window
    edges, ragged tail) come first, so that a value that is not finite can be caught before the long loop: only the rows
    that see its key may become NaN. Then come the blocks without mask, a far and a near part if there is a bias.
    Dropout zeroes weights in the product only; out is divided by the share that is kept.
    Source: Dao, arXiv 2307.08691; biases: Press et al., 2108.12409, and Raffel et al., 1910.10683.
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
    i, i_b, start_q, start_k, _, seqlen_q, seqlen_k, limit = sequence
    masked, full_start, full_end = block_ranges(
        first, last, limit, left, right, F.HAS_LEFT, F.HAS_RIGHT, True, BLOCK_N, MASKED_N
    )
    queries = head_rows(Heads(*q), None, i_b, start_q, i_h, seqlen_q)
    keys = head_rows(Heads(*k), descriptor_k, i_b, start_k, i_h // group, limit)
    values = head_rows(Heads(*v), descriptor_v, i_b, start_k, i_h // group, limit)
    rotary = sequence_rotary(HeadRotary(*rotary), sequence, sequences.rows_k, F.HAS_POSITIONS)
    rotary_q = HeadRotary(rotary.p_cos, rotary.p_sin, rotary.p_positions, rotary.start + seqlen_k - seqlen_q)
    biases = Biases(*biases)
    score, constant_left, constant_right = head_score(biases, i, i_h, scale, softcap, F, BLOCK_M + BLOCK_N)
    head = Head(keys, values, rotary, score, head_dropout(p_seed, i * heads + i_h, dropped, F.HAS_DROPOUT))
    block = Block(i_m, first, left, right)

    b_q = load_head(queries, rotary_q, i_m, F, False, BLOCK_M, True, TILE.LONG)
    running = start_of_rows(p_sinks, i_h, F.HAS_SINKS, F.HEAD_DIM_V, F.BLOCK_D, BLOCK_M)

    # Keys from key_lengths on, and those of the next sequence, may not be read: there the masked blocks do without the
    # descriptor.
    MASKED_DESCRIPTOR: tl.constexpr = TILE.DESCRIPTOR and not F.HAS_LENGTHS and not F.PACKED and MASKED_N == BLOCK_N
    running = _visit_blocks(running, b_q, head, block, masked, 0.0, 0.0, F, TILE, MASKED_DESCRIPTOR, MASKED_N, "masked")
    if has_nonfinite(running.b_acc):
        NARROW_N: tl.constexpr = min(MASKED_N, 32 if max(F.HEAD_DIM, F.HEAD_DIM_V) <= 64 else 16)  # spares registers
        running = start_of_rows(p_sinks, i_h, F.HAS_SINKS, F.HEAD_DIM_V, F.BLOCK_D, BLOCK_M)
        running = _visit_blocks(running, b_q, head, block, masked, 0.0, 0.0, F, TILE, False, NARROW_N, "careful")

    HAS_BIAS: tl.constexpr = F.HAS_SLOPES or F.HAS_TABLE
    near_start = full_end
    near_end = full_end
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, biases.radius, BLOCK_N)
    # Only keys on one side need one far loop; with both sides it runs twice.
    SIDES: tl.constexpr = 2 if HAS_BIAS and not F.CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far, side = far_span(i_side, full_start, near_start, near_end, full_end)
        constant = tl.where(i_side == 0, constant_left, constant_right)
        running = _visit_blocks(
            running, b_q, head, block, far, side, constant, F, TILE, TILE.DESCRIPTOR, BLOCK_N, "far"
        )
    if F.HAS_TABLE or (F.HAS_SLOPES and not F.CAUSAL):
        near = Span(near_start, near_end, 0, near_end)
        running = _visit_blocks(running, b_q, head, block, near, 0.0, 0.0, F, TILE, TILE.DESCRIPTOR, BLOCK_N, "near")

    b_m, b_l, b_acc = running
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)  # rows that saw nothing: out 0, lse -inf
    b_lse = (b_m + tl.log2(b_l)) * LN2  # (BLOCK_M,)
    o_m = tl.arange(0, BLOCK_M)
    p_lse += (i_b * heads + i_h).to(tl.int64) * rows_q + start_q + i_m
    tl.store(p_lse + o_m, b_lse, mask=o_m < seqlen_q - i_m)
    if F.HAS_DROPOUT:
        b_sum *= kept_share
    b_out = scale_pieces(b_acc, (1.0 / b_sum)[:, None])
    p_out = contiguous_rows(p_out, i_b, start_q, i_h, rows_q, heads, F.HEAD_DIM_V)
    store_pieces(p_out, i_m, heads * F.HEAD_DIM_V, seqlen_q, b_out, 0, F.HEAD_DIM_V, F.BLOCK_D, BLOCK_M)
