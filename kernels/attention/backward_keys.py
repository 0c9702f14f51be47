"""Fused attention, backward: the gradients of k and v, a block of keys each (Dao, arXiv 2307.08691)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import Dropout, head_dropout, kept_weights_on_end
from .heads import (
    HeadRotary,
    HeadRows,
    Heads,
    add_product,
    finite_or_zero,
    has_nonfinite,
    keep_pieces,
    load_head,
    load_pieces,
    nonfinite_rows,
    pieces_product,
    scale_pieces,
    spoil_rows,
    store_head,
    store_pieces,
    zero_head,
    zero_pieces,
)
from .scores import (
    LOG2E,
    Biases,
    Block,
    HeadScore,
    Span,
    biased_scores,
    block_ranges,
    capped_scores,
    far_span,
    near_range,
)
from .sequences import Sequences, Statistics, contiguous_rows, head_rows, key_block, sequence_rotary


class Group(NamedTuple):
    """The query heads that share a head of k and v; pointers are to the sequence's first head and query."""

    i_b: tl.tensor
    start_q: tl.tensor
    i_h: tl.tensor  # the first head
    heads: tl.tensor
    p_q: tl.tensor
    p_grad_out: tl.tensor
    p_pivot: tl.tensor
    p_delta: tl.tensor
    descriptor_q: tl.tensor
    descriptor_g: tl.tensor
    stride_qs: tl.tensor
    stride_qh: tl.tensor
    stride_gs: tl.tensor
    stride_gh: tl.tensor
    padded_q: tl.tensor
    seqlen_q: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor
    p_slopes: tl.tensor
    p_line: tl.tensor
    line: tl.tensor  # values of a head's line of biases
    radius: tl.tensor
    rotary: HeadRotary  # the queries'
    dropout: Dropout  # the sequence's first head's


class KeySums(NamedTuple):
    """The gradients of a block of keys and values, over the queries that a loop has visited so far."""

    b_grad_k: tl.tuple  # pieces (BLOCK_N, channels)
    b_grad_v: tl.tuple  # pieces (BLOCK_N, BLOCK_D)


class KeyBlock(NamedTuple):
    """A block of keys and values."""

    b_k: tl.tuple  # pieces (BLOCK_N, channels)
    b_v: tl.tuple  # pieces (BLOCK_N, BLOCK_D)


@triton.jit
def _visit_queries(
    sums, own, group, block, span, side,
    F: tl.constexpr, TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, BLOCK_M: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The sums after the blocks of queries of a span, in all heads of a group: p^T grad_out and ds^T q.

    One loop runs through the heads and their blocks, so that the accumulators stay where they are. Tiles stand on
    end, keys in rows, so that their products need no transposition. The block's columns are queries; queries after the
    last one are zeros and have p = 0, so that they need no mask. KIND has the forward kernel's meaning.
    """
    b_grad_k, b_grad_v = sums
    b_k, b_v = own
    i_n, first, left, right = block
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    MASKED: tl.constexpr = KIND == "masked" or KIND == "careful"
    ACCURATE: tl.constexpr = b_k[0].dtype == tl.float32
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[:, None] - o_m[None, :]  # (BLOCK_N, BLOCK_M): key - query
    b_place = (first + o_n).to(tl.float32)  # (BLOCK_N,)
    b_lower = first + o_n - right  # (BLOCK_N,): the first query that sees the key
    b_upper = first + o_n + left
    i_h = group.i_h
    i_block = span.start
    for _ in tl.range(
        0, group.heads * tl.cdiv(span.end - span.start, BLOCK_M), num_stages=1 if KIND == "careful" else None,
        disable_licm=MASKED or not TILE.HOIST,
    ):  # fmt: skip
        i_m = i_block
        if MASKED:
            i_m += tl.where(i_block >= span.split, span.gap, 0)
            m_pair = tl.full([BLOCK_N, BLOCK_M], True, tl.int1)
            if F.HAS_RIGHT:
                m_pair = m_pair & (o_m[None, :] >= (b_lower - i_m)[:, None])
            if F.HAS_LEFT:
                m_pair = m_pair & (o_m[None, :] <= (b_upper - i_m)[:, None])
        queries = HeadRows(
            group.p_q + i_h.to(tl.int64) * group.stride_qh, group.descriptor_q, group.i_b, i_h, group.start_q,
            group.stride_qs, group.seqlen_q,
        )  # fmt: skip
        grads = HeadRows(
            group.p_grad_out + i_h.to(tl.int64) * group.stride_gh, group.descriptor_g, group.i_b, i_h, group.start_q,
            group.stride_gs, group.seqlen_q,
        )  # fmt: skip
        slope = 0.0
        if F.HAS_SLOPES:
            slope = tl.load(group.p_slopes + i_h) * LOG2E
        p_line = group.p_line
        if F.HAS_TABLE:
            p_line += i_h * group.line
        score = HeadScore(group.scale, group.softcap, slope, p_line, group.radius)
        b_q = load_head(queries, group.rotary, i_m, F, DESCRIPTOR, BLOCK_M, True, TILE.LONG)
        b_s = pieces_product(b_k, b_q, F)  # (BLOCK_N, BLOCK_M)
        i_row = i_h.to(tl.int64) * group.padded_q + i_m
        b_pivot = tl.load(group.p_pivot + i_row + o_m)  # (BLOCK_M,)
        if KIND == "far":
            b_x, b_tanh = capped_scores(b_s, score, F, ACCURATE)
            if F.HAS_TABLE:
                b_pivot -= tl.load(p_line + side.to(tl.int32) * group.radius)
            if F.HAS_SLOPES:
                b_x += (side * -slope * o_n)[:, None]
                b_pivot += side * slope * ((first - i_m).to(tl.float32) - o_m.to(tl.float32))
        else:
            b_x, b_tanh = biased_scores(
                b_s, score, first - i_m, o_distance, b_place[:, None], (i_m + o_m).to(tl.float32)[None, :],
                F, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        b_p = tl.exp2(b_x - b_pivot[None, :])
        if MASKED:
            b_p = tl.where(m_pair, b_p, 0.0)
        b_grad = load_pieces(grads, i_m, 0, F.HEAD_DIM_V, F.BLOCK_D, DESCRIPTOR, BLOCK_M, True, TILE.LONG)
        b_grad_p = pieces_product(b_v, b_grad, F)  # (BLOCK_N, BLOCK_M)
        if KIND == "careful":
            b_grad_v = spoil_rows(b_grad_v, m_pair & nonfinite_rows(b_grad)[None, :])
            b_grad = finite_or_zero(b_grad)
        b_kept = b_p
        if F.HAS_DROPOUT:
            dropout = Dropout(group.dropout.seed, group.dropout.i_h + i_h, group.dropout.dropped)
            b_kept = tl.where(kept_weights_on_end(dropout, i_m, i_n, BLOCK_M, BLOCK_N), b_p, 0.0)
        b_grad_v = add_product(b_grad_v, b_kept, b_grad, F)  # (BLOCK_N, BLOCK_D) each
        b_delta = tl.load(group.p_delta + i_row + o_m)  # (BLOCK_M,)
        if F.HAS_DROPOUT:
            b_ds = b_kept * b_grad_p - b_p * b_delta[None, :]
        else:
            b_ds = b_p * (b_grad_p - b_delta[None, :])
        if F.HAS_SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        if MASKED:
            b_ds = tl.where(m_pair, b_ds, 0.0)
        if KIND == "careful":
            b_grad_k = spoil_rows(b_grad_k, m_pair & nonfinite_rows(b_q)[None, :])
            b_q = finite_or_zero(b_q)
        b_grad_k = add_product(b_grad_k, b_ds, b_q, F)  # (BLOCK_N, channels) each
        i_block += BLOCK_M
        i_h += tl.where(i_block >= span.end, 1, 0)
        i_block = tl.where(i_block >= span.end, span.start, i_block)
    return KeySums(b_grad_k, b_grad_v)


@triton.jit
def attention_backward_keys_kernel(
    q, k, v, grad_out, statistics, p_grad_k, p_grad_v, descriptor_q, descriptor_g, sequences, biases, rotary, p_seed,
    heads, group, left, right, scale, softcap, dropped, grad_scale, kept_share,
    F: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grad_v = sum_i p_i grad_out_i and grad_k = scale sum_i ds_i q_i over the queries of all heads of a group.

    Dropout changes ds as in the kernel of q.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    MASKED_M: tl.constexpr = TILE.MASKED
    kv_heads = heads // group
    sequences = Sequences(*sequences)
    rows_k = sequences.rows_k
    sequence, i_g, i_n = key_block(sequences, kv_heads, F, BLOCK_N)
    i, i_b, start_q, start_k, start_statistics, seqlen_q, seqlen_k, limit = sequence
    if F.PACKED:
        if i_n >= seqlen_k:
            return
    shift = seqlen_k - seqlen_q
    first = i_n - shift  # the query that stands at the block's first key
    last = tl.minimum(i_n + BLOCK_N, limit) - 1 - shift
    # TMA must not read the queries of the next sequence: there the last ones take a mask and no descriptor.
    MASK_TAIL: tl.constexpr = F.PACKED and TILE.DESCRIPTOR
    # Seen from a key the window's sides change places.
    masked, full_start, full_end = block_ranges(
        first, last, tl.where(i_n < limit, seqlen_q, 0), right, left, F.HAS_RIGHT, F.HAS_LEFT, MASK_TAIL,
        BLOCK_M, MASKED_M,
    )  # fmt: skip
    keys = head_rows(Heads(*k), None, i_b, start_k, i_g, limit)
    values = head_rows(Heads(*v), None, i_b, start_k, i_g, limit)
    rotary_k = sequence_rotary(HeadRotary(*rotary), sequence, rows_k, F.HAS_POSITIONS)
    rotary_q = HeadRotary(rotary_k.p_cos, rotary_k.p_sin, rotary_k.p_positions, rotary_k.start + shift)
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    p_slopes, stride_slopes, p_line, radius = Biases(*biases)
    if F.HAS_SLOPES:
        p_slopes += i * stride_slopes
    if F.HAS_TABLE:
        p_line += radius + BLOCK_M + BLOCK_N
    p_pivot, p_delta, padded_q = Statistics(*statistics)
    o_row = (i_b * heads).to(tl.int64) * padded_q + start_statistics
    p_q, stride_qb, stride_qs, stride_qh = Heads(*q)
    p_grad_out, stride_gb, stride_gs, stride_gh = Heads(*grad_out)
    p_q += i_b.to(tl.int64) * stride_qb + start_q.to(tl.int64) * stride_qs
    p_grad_out += i_b.to(tl.int64) * stride_gb + start_q.to(tl.int64) * stride_gs
    group_heads = Group(
        i_b, start_q, i_g * group, group, p_q, p_grad_out, p_pivot + o_row, p_delta + o_row,
        descriptor_q, descriptor_g, stride_qs, stride_qh, stride_gs, stride_gh,
        padded_q, seqlen_q, scale, softcap, p_slopes, p_line, 2 * (radius + BLOCK_M + BLOCK_N) + 1, radius, rotary_q,
        head_dropout(p_seed, i * heads, dropped, F.HAS_DROPOUT),
    )  # fmt: skip
    block = Block(i_n, first, left, right)

    b_k = load_head(keys, rotary_k, i_n, F, False, BLOCK_N, True, TILE.LONG)
    b_v = load_pieces(values, i_n, 0, F.HEAD_DIM_V, F.BLOCK_D, False, BLOCK_N, True, TILE.LONG)
    own = KeyBlock(b_k, b_v)
    sums = KeySums(zero_head(F, BLOCK_N), zero_pieces(F.HEAD_DIM_V, F.BLOCK_D, BLOCK_N))

    if F.HAS_LEFT or F.HAS_RIGHT or MASK_TAIL:
        sums = _visit_queries(
            sums, own, group_heads, block, masked, 0.0,
            F, TILE, TILE.DESCRIPTOR and not F.PACKED and MASKED_M == BLOCK_M, MASKED_M, "masked",
        )  # fmt: skip
        if has_nonfinite(sums.b_grad_k) | has_nonfinite(sums.b_grad_v):
            NARROW_M: tl.constexpr = min(MASKED_M, 32 if max(F.HEAD_DIM, F.HEAD_DIM_V) <= 64 else 16)
            sums = KeySums(zero_head(F, BLOCK_N), zero_pieces(F.HEAD_DIM_V, F.BLOCK_D, BLOCK_N))
            sums = _visit_queries(sums, own, group_heads, block, masked, 0.0, F, TILE, False, NARROW_M, "careful")

    HAS_BIAS: tl.constexpr = F.HAS_SLOPES or F.HAS_TABLE
    near_start = full_end
    near_end = full_start
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, radius, BLOCK_M)
    # Queries before the keys have these on their right: only where a window lets them see ahead.
    SIDES: tl.constexpr = 2 if HAS_BIAS and not F.CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far, side = far_span(i_side, near_end, full_end, full_start, near_start)
        sums = _visit_queries(sums, own, group_heads, block, far, side, F, TILE, TILE.DESCRIPTOR, BLOCK_M, "far")
    if F.HAS_TABLE or (F.HAS_SLOPES and not F.CAUSAL):
        near = Span(near_start, near_end, 0, near_end)
        sums = _visit_queries(sums, own, group_heads, block, near, 0.0, F, TILE, TILE.DESCRIPTOR, BLOCK_M, "near")

    # The sums of keys beyond key_lengths are products with zeros: 0 or NaN.
    m_n = (i_n + tl.arange(0, BLOCK_N) < limit)[:, None]
    b_grad_k = keep_pieces(scale_pieces(sums.b_grad_k, grad_scale), m_n)
    b_grad_v = keep_pieces(sums.b_grad_v, m_n)
    if F.HAS_DROPOUT:
        b_grad_v = scale_pieces(b_grad_v, 1.0 / kept_share)
    p_grad_v = contiguous_rows(p_grad_v, i_b, start_k, i_g, rows_k, kv_heads, F.HEAD_DIM_V)
    store_pieces(p_grad_v, i_n, kv_heads * F.HEAD_DIM_V, seqlen_k, b_grad_v, 0, F.HEAD_DIM_V, F.BLOCK_D, BLOCK_N)
    p_grad_k = contiguous_rows(p_grad_k, i_b, start_k, i_g, rows_k, kv_heads, F.HEAD_DIM)
    store_head(p_grad_k, rotary_k, i_n, kv_heads * F.HEAD_DIM, seqlen_k, b_grad_k, F, BLOCK_N)
