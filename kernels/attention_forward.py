"""Fused attention, forward: FlashAttention-2 (Dao, arXiv 2307.08691) with the positional schemes inside."""

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
    LOG2E,
    biased_scores,
    block_ranges,
    capped_scores,
    finite_or_zero,
    has_nonfinite,
    heads_product,
    load_columns,
    load_heads,
    near_range,
    nonfinite_rows,
    spoil,
)


@triton.jit
def _visit_blocks(
    b_m, b_l, b_acc, b_q, start, split, gap, end, side, constant,
    p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
    p_line, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
    first, left, right, scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_TABLE: tl.constexpr, POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The softmax over some blocks of keys: start .. split, then those from split + gap to end + gap.

    MASKED: pairs may be outside the window or the keys. FAR: every key is on one side of every query (side -1: left)
    and at least `radius` away, so that T5's bias is one constant and ALiBi's needs one row of values.
    CAREFUL: a value that is not finite reaches only the queries that see its key.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[None, :] - o_m[:, None]  # (BLOCK_M, BLOCK_N): key - query within the tile
    ACCURATE: tl.constexpr = b_q[0].dtype == tl.float32
    b_row = side * -slope * o_n  # (BLOCK_N,): ALiBi's bias against the block's first key
    b_place = (first + o_m).to(tl.float32)  # (BLOCK_M,)
    # The first and last key each query sees: bounds of rows, so that a pair costs one comparison.
    b_lower = first + o_m - left  # (BLOCK_M,)
    b_upper = limit - 1 + tl.zeros_like(o_m)  # (BLOCK_M,)
    if HAS_RIGHT:
        b_upper = tl.minimum(first + o_m + right, b_upper)
    for i_block in tl.range(start, end, BLOCK_N, num_stages=1 if CAREFUL else None, disable_licm=MASKED or not HOIST):
        i_n = i_block
        if MASKED:
            i_n += tl.where(i_block >= split, gap, 0)
        if MASKED:
            m_pair = o_n[None, :] <= (b_upper - i_n)[:, None]
            if HAS_LEFT:
                m_pair = m_pair & (o_n[None, :] >= (b_lower - i_n)[:, None])
        if CAREFUL:
            b_v = load_columns(p_v, i_n, stride_vs, limit, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, LONG)
            b_acc += spoil(m_pair & nonfinite_rows(b_v)[None, :])[:, None]
        b_k = load_heads(
            p_k, descriptor_k, i_b, i_g, i_n, stride_ks, limit, p_cos, p_sin, p_positions, i_n + rotary_offset,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, DESCRIPTOR, BLOCK_N, MASKED,
            LONG,
        )  # fmt: skip
        b_s = heads_product(b_q, b_k, HALF, BLOCK_REST, PRECISION)  # (BLOCK_M, BLOCK_N)
        b_shift = constant  # what every score of a row still lacks
        if FAR:
            if HAS_SLOPES:
                b_shift += side * -slope * (i_n.to(tl.float32) - b_place)  # (BLOCK_M,)
            if HAS_SLOPES or HAS_SOFTCAP or not POSITIVE_SCALE:
                b_x, _ = capped_scores(b_s, scale, softcap, HAS_SOFTCAP, ACCURATE)
                if HAS_SLOPES:
                    b_x += b_row[None, :]
                b_max = tl.maximum(b_m, tl.max(b_x, 1) + b_shift)  # (BLOCK_M,)
                b_p = tl.exp2(b_x - (b_max - b_shift)[:, None])
            else:
                b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale + b_shift)
                b_p = tl.exp2(b_s * scale - (b_max - b_shift)[:, None])  # one fused multiply-add a score
            b_alpha = tl.exp2(b_m - b_max)
        else:
            b_x, _ = biased_scores(
                b_s, scale, softcap, p_line, i_n - first, o_distance, radius, slope,
                (i_n + o_n).to(tl.float32)[None, :], b_place[:, None],
                HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if MASKED:
                b_x = tl.where(m_pair, b_x, -float("inf"))
            b_max = tl.maximum(b_m, tl.max(b_x, 1))
            # A row that has seen nothing yet keeps a finite pivot: -inf - -inf would be NaN.
            b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max) if MASKED else b_max
            b_p = tl.exp2(b_x - b_pivot[:, None])
            b_alpha = tl.exp2(b_m - b_pivot)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        if CAREFUL:
            b_v = finite_or_zero(load_columns(p_v, i_n, stride_vs, limit, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, LONG))
        elif DESCRIPTOR:
            b_v = tl.reshape(descriptor_v.load([i_b, i_g, i_n, 0]), [BLOCK_N, BLOCK_D])
        else:
            b_v = load_columns(p_v, i_n, stride_vs, limit, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, LONG)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
        b_m = b_max
    return b_m, b_l, b_acc


@triton.jit
def attention_forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, descriptor_k, descriptor_v,
    p_key_lengths, p_slopes, p_line, p_cos, p_sin, p_positions,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_slopes,
    seqlen_q, seqlen_k, heads, group, left, right, radius, rotary_offset, scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_LENGTHS: tl.constexpr, POSITIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, LONG: tl.constexpr, DESCRIPTOR: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(score) v and lse = log sum exp(score), score = softcap(q.k * scale) + biases, by blocks of queries.

    Scores live in log2 units, in which exp2(s * scale - max) is one instruction. The blocks that need a mask (window
    edges, ragged tail) come first, so that a value that is not finite can be caught before the long loop: only the rows
    that see its key may become NaN. Then come the blocks without mask, a far and a near part if there is a bias.
    Source: Dao, arXiv 2307.08691; biases: Press et al., 2108.12409, and Raffel et al., 1910.10683.
    """
    blocks_m = tl.cdiv(seqlen_q, BLOCK_M)
    i_m = (blocks_m - 1 - tl.program_id(0) % blocks_m) * BLOCK_M  # causal: the longest rows start first
    i_bh = tl.program_id(0) // blocks_m
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_g = i_h // group
    o_m = tl.arange(0, BLOCK_M)

    limit = seqlen_k
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(p_key_lengths + i_b), 0), seqlen_k)
    shift = seqlen_k - seqlen_q
    first = i_m + shift  # the key at which the block's first query stands
    last = tl.minimum(i_m + BLOCK_M, seqlen_q) - 1 + shift
    start, full_start, full_end, end = block_ranges(
        first, last, limit, left, right, HAS_LEFT, HAS_RIGHT, True, BLOCK_N, MASKED_N
    )

    p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k += i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_g.to(tl.int64) * stride_vh
    if HAS_POSITIONS:
        p_positions += i_b.to(tl.int64) * seqlen_k
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(p_slopes + i_b * stride_slopes + i_h) * LOG2E
    constant_left = 0.0
    constant_right = 0.0
    REACH: tl.constexpr = BLOCK_M + BLOCK_N
    if HAS_TABLE:
        p_line += i_h * (2 * (radius + REACH) + 1) + radius + REACH  # distance 0
        constant_left = tl.load(p_line - radius)
        constant_right = tl.load(p_line + radius)

    b_q = load_heads(
        p_q, None, i_b, i_h, i_m, stride_qs, seqlen_q, p_cos, p_sin, p_positions, first + rotary_offset,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, False, BLOCK_M, True, LONG,
    )  # fmt: skip
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Keys from key_lengths on may not be read: there the masked blocks do without the descriptor.
    MASKED_DESCRIPTOR: tl.constexpr = DESCRIPTOR and not HAS_LENGTHS and MASKED_N == BLOCK_N
    split = full_start
    masked_end = end - (full_end - full_start)
    b_m, b_l, b_acc = _visit_blocks(
        b_m, b_l, b_acc, b_q, start, split, full_end - full_start, masked_end, 0.0, 0.0,
        p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
        p_line, radius, slope, p_cos, p_sin, p_positions, rotary_offset, first, left, right, scale, softcap,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_SLOPES, HAS_TABLE, POSITIVE_SCALE, PRECISION, LONG, MASKED_DESCRIPTOR, HOIST, BLOCK_M, MASKED_N, True,
        False, False,
    )  # fmt: skip
    if has_nonfinite(b_acc):
        NARROW_N: tl.constexpr = min(MASKED_N, 32 if BLOCK_D < 128 else 16)  # spares registers
        b_m, b_l, b_acc = _visit_blocks(
            tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32), b_q,
            start, split, full_end - full_start, masked_end, 0.0, 0.0,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, radius, slope, p_cos, p_sin, p_positions, rotary_offset, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, POSITIVE_SCALE, PRECISION, LONG, False, HOIST, BLOCK_M, NARROW_N, True, False, True,
        )  # fmt: skip

    HAS_BIAS: tl.constexpr = HAS_SLOPES or HAS_TABLE
    near_start = full_end
    near_end = full_end
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, radius, BLOCK_N)
    # Only keys on one side need one far loop; with both sides it runs twice.
    SIDES: tl.constexpr = 2 if HAS_BIAS and not CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far_start = tl.where(i_side == 0, full_start, near_end)
        far_end = tl.where(i_side == 0, near_start, full_end)
        constant = tl.where(i_side == 0, constant_left, constant_right)
        side = tl.where(i_side == 0, -1.0, 1.0)
        b_m, b_l, b_acc = _visit_blocks(
            b_m, b_l, b_acc, b_q, far_start, far_end, 0, far_end, side, constant,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, radius, slope, p_cos, p_sin, p_positions, rotary_offset, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, POSITIVE_SCALE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N, False, True,
            False,
        )  # fmt: skip
    if HAS_TABLE or (HAS_SLOPES and not CAUSAL):
        b_m, b_l, b_acc = _visit_blocks(
            b_m, b_l, b_acc, b_q, near_start, near_end, 0, near_end, 0.0, 0.0,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, radius, slope, p_cos, p_sin, p_positions, rotary_offset, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, POSITIVE_SCALE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N, False,
            False, False,
        )  # fmt: skip

    b_sum = tl.where(b_l == 0.0, 1.0, b_l)  # rows that saw nothing: out 0, lse -inf
    b_out = b_acc / b_sum[:, None]  # (BLOCK_M, BLOCK_D)
    b_lse = (b_m + tl.log2(b_l)) * LN2  # (BLOCK_M,)
    m_m = o_m < seqlen_q - i_m
    tl.store(p_lse + i_bh.to(tl.int64) * seqlen_q + i_m + o_m, b_lse, mask=m_m)
    o_d = tl.arange(0, BLOCK_D)
    p_out += (i_b.to(tl.int64) * seqlen_q * heads + i_h) * HEAD_DIM
    p_tile = p_out + (i_m + o_m).to(tl.int64)[:, None] * (heads * HEAD_DIM) + o_d[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_d < HEAD_DIM)[None, :])
