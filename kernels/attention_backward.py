"""Fused attention, backward: FlashAttention-2 (Dao, arXiv 2307.08691) without atomics: the same bits every run.

Three kernels: the row statistics; the gradient of q and of the biases, a block of queries each; the gradients of k and
v, a block of keys each, which adds up the query heads of its group itself.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    add_product,
    add_rows,
    biased_scores,
    block_ranges,
    capped_scores,
    finite_or_zero,
    finite_or_zero_heads,
    has_nonfinite,
    has_nonfinite_heads,
    heads_product,
    load_columns,
    load_heads,
    near_range,
    nonfinite_head_rows,
    nonfinite_rows,
    spoil,
    store_columns,
    store_heads,
    zero_heads,
)


@triton.jit
def attention_statistics_kernel(
    p_out, p_grad_out, p_lse, p_grad_lse, p_pivot, p_delta,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, seqlen_q, padded_q, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """pivot = lse in log2 units, delta = sum_d out grad_out - grad_lse, for padded_q rows of each head.

    A row that is not there or sees no key gets the pivot inf, so that its probabilities exp2(score - pivot) are 0.
    """
    blocks_m = padded_q // BLOCK_M
    i_m = tl.program_id(0) % blocks_m * BLOCK_M
    i_bh = (tl.program_id(0) // blocks_m).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    p_out += i_b * stride_ob + i_h * stride_oh
    p_grad_out += i_b * stride_gb + i_h * stride_gh
    b_out = load_columns(p_out, i_m, stride_os, seqlen_q, HEAD_DIM, BLOCK_D, BLOCK_M, True, LONG)  # (BLOCK_M, BLOCK_D)
    b_grad = load_columns(p_grad_out, i_m, stride_gs, seqlen_q, HEAD_DIM, BLOCK_D, BLOCK_M, True, LONG)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)  # (BLOCK_M,)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + i_bh * seqlen_q + o_m, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + i_bh * seqlen_q + o_m, mask=m_m, other=-float("inf"))
    b_pivot = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    tl.store(p_pivot + i_bh * padded_q + o_m, b_pivot)
    tl.store(p_delta + i_bh * padded_q + o_m, b_delta)


@triton.jit
def _diagonal_sums(b_x, p_sums, SIZE: tl.constexpr):
    """Sums of a square tile by column - row: SIZE - 1 negative ones after an unused first, then SIZE from 0 on.

    Row r is turned left by r, which puts a diagonal into a column and the one SIZE below it into the same.
    """
    o_r = tl.arange(0, SIZE)[:, None]
    o_c = tl.arange(0, SIZE)[None, :]
    b_turned = tl.gather(b_x, (o_r + o_c) & (SIZE - 1), 1)  # (SIZE, SIZE)
    m_upper = o_r + o_c < SIZE
    o_n = tl.arange(0, SIZE)
    tl.store(p_sums + o_n, tl.sum(tl.where(m_upper, 0.0, b_turned), 0))
    tl.store(p_sums + SIZE + o_n, tl.sum(tl.where(m_upper, b_turned, 0.0), 0))


@triton.jit
def _visit_keys(
    b_grad_q, b_slope, b_left, b_right, b_q, b_grad, b_pivot, b_delta, start, split, gap, end, side, constant,
    p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
    p_line, p_near, near_base, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
    first, left, right, scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_TABLE: tl.constexpr, NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr, DESCRIPTOR: tl.constexpr, HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """grad_q += ds k over some blocks of keys, and what ds adds to the gradients of the biases."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[None, :] - o_m[:, None]  # (BLOCK_M, BLOCK_N)
    ACCURATE: tl.constexpr = b_q[0].dtype == tl.float32
    b_row = side * -slope * o_n  # (BLOCK_N,)
    b_place = (first + o_m).to(tl.float32)  # (BLOCK_M,)
    b_lower = first + o_m - left  # (BLOCK_M,)
    b_upper = limit - 1 + tl.zeros_like(o_m)  # (BLOCK_M,)
    if HAS_RIGHT:
        b_upper = tl.minimum(first + o_m + right, b_upper)
    for i_block in tl.range(start, end, BLOCK_N, num_stages=1 if CAREFUL else None, disable_licm=MASKED or not HOIST):
        i_n = i_block
        if MASKED:
            i_n += tl.where(i_block >= split, gap, 0)
            m_pair = o_n[None, :] <= (b_upper - i_n)[:, None]
            if HAS_LEFT:
                m_pair = m_pair & (o_n[None, :] >= (b_lower - i_n)[:, None])
        b_k = load_heads(
            p_k, descriptor_k, i_b, i_g, i_n, stride_ks, limit, p_cos, p_sin, p_positions, i_n + rotary_offset,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, DESCRIPTOR, BLOCK_N, MASKED,
            LONG,
        )  # fmt: skip
        b_s = heads_product(b_q, b_k, HALF, BLOCK_REST, PRECISION)  # (BLOCK_M, BLOCK_N)
        if FAR:
            b_shift = constant
            b_x, b_tanh = capped_scores(b_s, scale, softcap, HAS_SOFTCAP, ACCURATE)
            if HAS_SLOPES:
                b_shift += side * -slope * (i_n.to(tl.float32) - b_place)  # (BLOCK_M,)
                b_x += b_row[None, :]
            b_p = tl.exp2(b_x - (b_pivot - b_shift)[:, None])
        else:
            b_x, b_tanh = biased_scores(
                b_s, scale, softcap, p_line, i_n - first, o_distance, radius, slope,
                (i_n + o_n).to(tl.float32)[None, :], b_place[:, None],
                HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            b_p = tl.exp2(b_x - b_pivot[:, None])
        if DESCRIPTOR:
            b_v = tl.reshape(descriptor_v.load([i_b, i_g, i_n, 0]), [BLOCK_N, BLOCK_D])
        else:
            b_v = load_columns(p_v, i_n, stride_vs, limit, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, LONG)
        b_grad_p = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_ds = b_p * (b_grad_p - b_delta[:, None])
        if MASKED:
            b_ds = tl.where(m_pair, b_ds, 0.0)

        if NEEDS_SLOPES:
            if FAR:
                b_steps = i_n.to(tl.float32) - b_place  # (BLOCK_M,)
                b_slope += side * (tl.sum(b_ds * o_n.to(tl.float32)[None, :], 1) + b_steps * tl.sum(b_ds, 1))
            else:
                b_slope += tl.sum(b_ds * tl.abs((i_n + o_n).to(tl.float32)[None, :] - b_place[:, None]), 1)
        if NEEDS_TABLE:
            if FAR:
                b_sum = tl.sum(b_ds, 1)  # (BLOCK_M,)
                b_left += tl.where(side < 0, b_sum, 0.0)
                b_right += tl.where(side < 0, 0.0, b_sum)
            elif MASKED:
                base = i_n - first
                far_left = base + BLOCK_N - 1 <= -radius
                far_right = base - (BLOCK_M - 1) >= radius
                if far_left | far_right:
                    b_sum = tl.sum(b_ds, 1)
                    b_left += tl.where(far_left, b_sum, 0.0)
                    b_right += tl.where(far_left, 0.0, b_sum)
                else:
                    _diagonal_sums(b_ds, p_near + (base - near_base) * 2, BLOCK_N)
            else:
                _diagonal_sums(b_ds, p_near + (i_n - first - near_base) * 2, BLOCK_N)

        if HAS_SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        if CAREFUL:
            b_spoil = spoil(m_pair & nonfinite_head_rows(b_k, HALF, BLOCK_REST)[None, :])
            b_grad_q = add_rows(b_grad_q, b_spoil, HALF, BLOCK_REST)
            b_k = finite_or_zero_heads(b_k, HALF, BLOCK_REST)
        b_grad_q = add_product(b_grad_q, b_ds, b_k, HALF, BLOCK_REST, PRECISION)  # (BLOCK_M, BLOCK_D)
    return b_grad_q, b_slope, b_left, b_right


@triton.jit
def attention_backward_queries_kernel(
    p_q, p_k, p_v, p_grad_out, p_pivot, p_delta, p_grad_q, p_grad_slope, p_far, p_near, descriptor_k, descriptor_v,
    p_key_lengths, p_slopes, p_line, p_cos, p_sin, p_positions,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_slopes,
    seqlen_q, seqlen_k, padded_q, heads, group, left, right, radius, near_base, segments, rotary_offset, scale, softcap,
    grad_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr,
):  # fmt: skip
    """grad_q = scale sum_j ds_j k_j, ds = p (grad_out . v - delta), and partial sums of ds for the bias gradients.

    Slopes: sum ds |distance|. Table: the sums of ds far to the left and far to the right, and by distance in between.
    Each program writes its own partial sums, which are added up in a fixed order afterwards.
    """
    blocks_m = tl.cdiv(seqlen_q, BLOCK_M)
    i_program = tl.program_id(0).to(tl.int64)
    i_m = (blocks_m - 1 - tl.program_id(0) % blocks_m) * BLOCK_M
    i_bh = tl.program_id(0) // blocks_m
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_g = i_h // group
    o_m = tl.arange(0, BLOCK_M)

    limit = seqlen_k
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(p_key_lengths + i_b), 0), seqlen_k)
    shift = seqlen_k - seqlen_q
    first = i_m + shift
    last = tl.minimum(i_m + BLOCK_M, seqlen_q) - 1 + shift
    start, full_start, full_end, end = block_ranges(
        first, last, limit, left, right, HAS_LEFT, HAS_RIGHT, True, BLOCK_N, MASKED_N
    )

    p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k += i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_g.to(tl.int64) * stride_vh
    p_grad_out += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    if HAS_POSITIONS:
        p_positions += i_b.to(tl.int64) * seqlen_k
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    grad_scale = tl.full([], grad_scale, tl.float32)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(p_slopes + i_b * stride_slopes + i_h) * LOG2E
    constant_left = 0.0
    constant_right = 0.0
    REACH: tl.constexpr = BLOCK_M + BLOCK_N
    if HAS_TABLE:
        p_line += i_h * (2 * (radius + REACH) + 1) + radius + REACH
        constant_left = tl.load(p_line - radius)
        constant_right = tl.load(p_line + radius)
    if NEEDS_TABLE:
        p_near += i_program * segments * (2 * BLOCK_N)

    b_q = load_heads(
        p_q, None, i_b, i_h, i_m, stride_qs, seqlen_q, p_cos, p_sin, p_positions, first + rotary_offset,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, False, BLOCK_M, True, LONG,
    )  # fmt: skip
    b_grad = load_columns(p_grad_out, i_m, stride_gs, seqlen_q, HEAD_DIM, BLOCK_D, BLOCK_M, True, LONG)
    b_pivot = tl.load(p_pivot + i_bh.to(tl.int64) * padded_q + i_m + o_m)  # (BLOCK_M,)
    b_delta = tl.load(p_delta + i_bh.to(tl.int64) * padded_q + i_m + o_m)  # (BLOCK_M,)
    b_grad_q = zero_heads(BLOCK_M, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST)
    b_slope = tl.zeros([BLOCK_M], tl.float32)
    b_left = tl.zeros([BLOCK_M], tl.float32)
    b_right = tl.zeros([BLOCK_M], tl.float32)

    MASKED_DESCRIPTOR: tl.constexpr = DESCRIPTOR and not HAS_LENGTHS and MASKED_N == BLOCK_N
    masked_end = end - (full_end - full_start)
    b_grad_q, b_slope, b_left, b_right = _visit_keys(
        b_grad_q, b_slope, b_left, b_right, b_q, b_grad, b_pivot, b_delta,
        start, full_start, full_end - full_start, masked_end, 0.0, 0.0,
        p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
        p_line, p_near, near_base, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
        first, left, right, scale, softcap,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_SLOPES, HAS_TABLE, NEEDS_SLOPES, NEEDS_TABLE, PRECISION, LONG, MASKED_DESCRIPTOR, HOIST, BLOCK_M, MASKED_N,
        True, False, False,
    )  # fmt: skip
    if has_nonfinite_heads(b_grad_q, HALF, BLOCK_REST):
        NARROW_N: tl.constexpr = min(MASKED_N, 32 if BLOCK_D < 128 else 16)  # spares registers
        b_grad_q, _, _, _ = _visit_keys(
            zero_heads(BLOCK_M, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST), b_slope, b_left, b_right,
            b_q, b_grad, b_pivot, b_delta, start, full_start, full_end - full_start, masked_end, 0.0, 0.0,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, p_near, near_base, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
            first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, False, False, PRECISION, LONG, False, HOIST, BLOCK_M, NARROW_N,
            True, False, True,
        )  # fmt: skip

    HAS_BIAS: tl.constexpr = HAS_SLOPES or HAS_TABLE
    near_start = full_end
    near_end = full_end
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, radius, BLOCK_N)
    SIDES: tl.constexpr = 2 if HAS_BIAS and not CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far_start = tl.where(i_side == 0, full_start, near_end)
        far_end = tl.where(i_side == 0, near_start, full_end)
        constant = tl.where(i_side == 0, constant_left, constant_right)
        side = tl.where(i_side == 0, -1.0, 1.0)
        b_grad_q, b_slope, b_left, b_right = _visit_keys(
            b_grad_q, b_slope, b_left, b_right, b_q, b_grad, b_pivot, b_delta,
            far_start, far_end, 0, far_end, side, constant,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, p_near, near_base, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
            first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, NEEDS_SLOPES, NEEDS_TABLE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N,
            False, True, False,
        )  # fmt: skip
    if HAS_TABLE or (HAS_SLOPES and not CAUSAL):
        b_grad_q, b_slope, b_left, b_right = _visit_keys(
            b_grad_q, b_slope, b_left, b_right, b_q, b_grad, b_pivot, b_delta,
            near_start, near_end, 0, near_end, 0.0, 0.0,
            p_k, p_v, descriptor_k, descriptor_v, i_b, i_g, stride_ks, stride_vs, limit,
            p_line, p_near, near_base, radius, slope, p_cos, p_sin, p_positions, rotary_offset,
            first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES, HAS_TABLE, NEEDS_SLOPES, NEEDS_TABLE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N,
            False, False, False,
        )  # fmt: skip

    if NEEDS_SLOPES:
        tl.store(p_grad_slope + i_program, -tl.sum(b_slope, 0))
    if NEEDS_TABLE:
        tl.store(p_far + i_program * 2, tl.sum(b_left, 0))
        tl.store(p_far + i_program * 2 + 1, tl.sum(b_right, 0))
    if HALF == 0:
        b_grad_q = (b_grad_q[0] * grad_scale,)
    elif BLOCK_REST == 0:
        b_grad_q = (b_grad_q[0] * grad_scale, b_grad_q[1] * grad_scale)
    else:
        b_grad_q = (b_grad_q[0] * grad_scale, b_grad_q[1] * grad_scale, b_grad_q[2] * grad_scale)
    p_grad_q += (i_b.to(tl.int64) * seqlen_q * heads + i_h) * HEAD_DIM
    store_heads(
        p_grad_q, i_m, heads * HEAD_DIM, seqlen_q, b_grad_q, p_cos, p_sin, p_positions, first + rotary_offset,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _visit_queries(
    b_grad_k, b_grad_v, b_k, b_v, start, split, gap, end, side,
    p_q, p_grad_out, p_pivot, p_delta, descriptor_q, descriptor_g, i_b, i_h, group,
    stride_qs, stride_qh, stride_gs, stride_gh, padded_q, seqlen_q,
    p_slopes, p_line, line, radius, p_cos, p_sin, p_positions, i_position,
    first, left, right, scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr, DESCRIPTOR: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """grad_v += p^T grad_out and grad_k += ds^T q over some blocks of queries of the heads i_h .. i_h + group.

    One loop runs through the heads and their blocks, so that the accumulators stay where they are. Tiles stand on
    end, keys in rows, so that their products need no transposition. `first` is the query at which the
    block's first key stands; queries after the last one are zeros and have p = 0, so that they need no mask.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_distance = o_n[:, None] - o_m[None, :]  # (BLOCK_N, BLOCK_M): key - query
    ACCURATE: tl.constexpr = b_k[0].dtype == tl.float32
    b_place = (first + o_n).to(tl.float32)  # (BLOCK_N,)
    b_lower = first + o_n - right  # (BLOCK_N,): the first query that sees the key
    b_upper = first + o_n + left
    i_block = start
    for _ in tl.range(
        0, group * tl.cdiv(end - start, BLOCK_M), num_stages=1 if CAREFUL else None, disable_licm=MASKED or not HOIST
    ):
        i_m = i_block
        p_head = p_q + i_h.to(tl.int64) * stride_qh
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(p_slopes + i_h) * LOG2E
        if MASKED:
            i_m += tl.where(i_block >= split, gap, 0)
            m_pair = tl.full([BLOCK_N, BLOCK_M], True, tl.int1)
            if HAS_RIGHT:
                m_pair = m_pair & (o_m[None, :] >= (b_lower - i_m)[:, None])
            if HAS_LEFT:
                m_pair = m_pair & (o_m[None, :] <= (b_upper - i_m)[:, None])
        b_q = load_heads(
            p_head, descriptor_q, i_b, i_h, i_m, stride_qs, seqlen_q, p_cos, p_sin, p_positions, i_m + i_position,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, DESCRIPTOR, BLOCK_M, True,
            LONG,
        )  # fmt: skip
        b_s = heads_product(b_k, b_q, HALF, BLOCK_REST, PRECISION)  # (BLOCK_N, BLOCK_M)
        i_row = i_h.to(tl.int64) * padded_q + i_m
        b_pivot = tl.load(p_pivot + i_row + o_m)  # (BLOCK_M,)
        if FAR:
            b_x, b_tanh = capped_scores(b_s, scale, softcap, HAS_SOFTCAP, ACCURATE)
            if HAS_TABLE:
                b_pivot -= tl.load(p_line + i_h * line + side.to(tl.int32) * radius)
            if HAS_SLOPES:
                b_x += (side * -slope * o_n)[:, None]
                b_pivot += side * slope * ((first - i_m).to(tl.float32) - o_m.to(tl.float32))
        else:
            p_head_line = p_line
            if HAS_TABLE:
                p_head_line += i_h * line
            b_x, b_tanh = biased_scores(
                b_s, scale, softcap, p_head_line, first - i_m, o_distance, radius, slope,
                b_place[:, None], (i_m + o_m).to(tl.float32)[None, :],
                HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, ACCURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        b_p = tl.exp2(b_x - b_pivot[None, :])
        if MASKED:
            b_p = tl.where(m_pair, b_p, 0.0)
        if DESCRIPTOR:
            b_grad = tl.reshape(descriptor_g.load([i_b, i_h, i_m, 0]), [BLOCK_M, BLOCK_D])
        else:
            b_grad = load_columns(
                p_grad_out + i_h.to(tl.int64) * stride_gh, i_m, stride_gs, seqlen_q, HEAD_DIM, BLOCK_D, BLOCK_M,
                True, LONG
            )  # fmt: skip
        b_grad_p = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        if CAREFUL:
            b_grad_v += spoil(m_pair & nonfinite_rows(b_grad)[None, :])[:, None]
            b_grad = finite_or_zero(b_grad)
        b_grad_v = tl.dot(b_p.to(b_grad.dtype), b_grad, b_grad_v, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
        b_delta = tl.load(p_delta + i_row + o_m)  # (BLOCK_M,)
        b_ds = b_p * (b_grad_p - b_delta[None, :])
        if HAS_SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        if MASKED:
            b_ds = tl.where(m_pair, b_ds, 0.0)
        if CAREFUL:
            b_spoil = spoil(m_pair & nonfinite_head_rows(b_q, HALF, BLOCK_REST)[None, :])
            b_grad_k = add_rows(b_grad_k, b_spoil, HALF, BLOCK_REST)
            b_q = finite_or_zero_heads(b_q, HALF, BLOCK_REST)
        b_grad_k = add_product(b_grad_k, b_ds, b_q, HALF, BLOCK_REST, PRECISION)  # (BLOCK_N, BLOCK_D)
        i_block += BLOCK_M
        i_h += tl.where(i_block >= end, 1, 0)
        i_block = tl.where(i_block >= end, start, i_block)
    return b_grad_k, b_grad_v


@triton.jit
def attention_backward_keys_kernel(
    p_q, p_k, p_v, p_grad_out, p_pivot, p_delta, p_grad_k, p_grad_v, descriptor_q, descriptor_g,
    p_key_lengths, p_slopes, p_line, p_cos, p_sin, p_positions,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_slopes,
    seqlen_q, seqlen_k, padded_q, heads, group, left, right, radius, rotary_offset, scale, softcap, grad_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr, DESCRIPTOR: tl.constexpr, HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_M: tl.constexpr,
):  # fmt: skip
    """grad_v = sum_i p_i grad_out_i and grad_k = scale sum_i ds_i q_i over the queries of all heads of a group."""
    kv_heads = heads // group
    blocks_n = tl.cdiv(seqlen_k, BLOCK_N)
    i_n = tl.program_id(0) % blocks_n * BLOCK_N
    i_bg = tl.program_id(0) // blocks_n
    i_b = i_bg // kv_heads
    i_g = i_bg % kv_heads

    limit = seqlen_k
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(p_key_lengths + i_b), 0), seqlen_k)
    shift = seqlen_k - seqlen_q
    first = i_n - shift  # the query that stands at the block's first key
    last = tl.minimum(i_n + BLOCK_N, limit) - 1 - shift
    queries = tl.where(i_n < limit, seqlen_q, 0)
    # Seen from a key the window's sides change places.
    start, full_start, full_end, end = block_ranges(
        first, last, queries, right, left, HAS_RIGHT, HAS_LEFT, False, BLOCK_M, MASKED_M
    )

    p_k += i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_g.to(tl.int64) * stride_vh
    if HAS_POSITIONS:
        p_positions += i_b.to(tl.int64) * seqlen_k
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    grad_scale = tl.full([], grad_scale, tl.float32)
    i_position = shift + rotary_offset  # of query 0

    b_k = load_heads(
        p_k, None, i_b, i_g, i_n, stride_ks, limit, p_cos, p_sin, p_positions, i_n + rotary_offset,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, False, BLOCK_N, True, LONG,
    )  # fmt: skip
    b_v = load_columns(p_v, i_n, stride_vs, limit, HEAD_DIM, BLOCK_D, BLOCK_N, True, LONG)
    b_grad_k = zero_heads(BLOCK_N, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST)
    b_grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    p_q += i_b.to(tl.int64) * stride_qb
    p_grad_out += i_b.to(tl.int64) * stride_gb
    p_pivot += (i_b * heads).to(tl.int64) * padded_q
    p_delta += (i_b * heads).to(tl.int64) * padded_q
    if HAS_SLOPES:
        p_slopes += i_b * stride_slopes
    i_h = i_g * group
    REACH: tl.constexpr = BLOCK_M + BLOCK_N
    line = 2 * (radius + REACH) + 1
    HAS_BIAS: tl.constexpr = HAS_SLOPES or HAS_TABLE
    if HAS_TABLE:
        p_line += radius + REACH

    if HAS_LEFT or HAS_RIGHT:
        MASKED_DESCRIPTOR: tl.constexpr = DESCRIPTOR and MASKED_M == BLOCK_M
        masked_end = end - (full_end - full_start)
        b_grad_k, b_grad_v = _visit_queries(
            b_grad_k, b_grad_v, b_k, b_v, start, full_start, full_end - full_start, masked_end, 0.0,
            p_q, p_grad_out, p_pivot, p_delta, descriptor_q, descriptor_g, i_b, i_h, group,
            stride_qs, stride_qh, stride_gs, stride_gh, padded_q, seqlen_q,
            p_slopes, p_line, line, radius, p_cos, p_sin, p_positions, i_position, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, PRECISION, LONG, MASKED_DESCRIPTOR, HOIST, MASKED_M, BLOCK_N, True,
            False, False,
        )  # fmt: skip
        if has_nonfinite_heads(b_grad_k, HALF, BLOCK_REST) | has_nonfinite(b_grad_v):
            NARROW_M: tl.constexpr = min(MASKED_M, 32 if BLOCK_D < 128 else 16)
            b_grad_k, b_grad_v = _visit_queries(
                zero_heads(BLOCK_N, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST), tl.zeros([BLOCK_N, BLOCK_D], tl.float32),
                b_k, b_v, start, full_start, full_end - full_start, masked_end, 0.0,
                p_q, p_grad_out, p_pivot, p_delta, descriptor_q, descriptor_g, i_b, i_h, group,
                stride_qs, stride_qh, stride_gs, stride_gh, padded_q, seqlen_q,
                p_slopes, p_line, line, radius, p_cos, p_sin, p_positions, i_position, first, left, right, scale,
                softcap,
                HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
                HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, PRECISION, LONG, False, HOIST, NARROW_M, BLOCK_N, True, False, True,
            )  # fmt: skip

    near_start = full_end
    near_end = full_start
    if HAS_BIAS:
        near_start, near_end = near_range(first, last, full_start, full_end, radius, BLOCK_M)
    # Queries before the keys have these on their right: only where a window lets them see ahead.
    SIDES: tl.constexpr = 2 if HAS_BIAS and not CAUSAL else 1
    for i_side in tl.range(0, SIDES):
        far_start = tl.where(i_side == 0, near_end, full_start)
        far_end = tl.where(i_side == 0, full_end, near_start)
        side = tl.where(i_side == 0, -1.0, 1.0)
        b_grad_k, b_grad_v = _visit_queries(
            b_grad_k, b_grad_v, b_k, b_v, far_start, far_end, 0, far_end, side,
            p_q, p_grad_out, p_pivot, p_delta, descriptor_q, descriptor_g, i_b, i_h, group,
            stride_qs, stride_qh, stride_gs, stride_gh, padded_q, seqlen_q,
            p_slopes, p_line, line, radius, p_cos, p_sin, p_positions, i_position, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N, False, True,
            False,
        )  # fmt: skip
    if HAS_TABLE or (HAS_SLOPES and not CAUSAL):
        b_grad_k, b_grad_v = _visit_queries(
            b_grad_k, b_grad_v, b_k, b_v, near_start, near_end, 0, near_end, 0.0,
            p_q, p_grad_out, p_pivot, p_delta, descriptor_q, descriptor_g, i_b, i_h, group,
            stride_qs, stride_qh, stride_gs, stride_gh, padded_q, seqlen_q,
            p_slopes, p_line, line, radius, p_cos, p_sin, p_positions, i_position, first, left, right, scale, softcap,
            HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP, HAS_SLOPES, HAS_TABLE, PRECISION, LONG, DESCRIPTOR, HOIST, BLOCK_M, BLOCK_N, False, False,
            False,
        )  # fmt: skip

    # Keys beyond key_lengths got a product with zeros: nothing, or NaN.
    m_n = (i_n + tl.arange(0, BLOCK_N) < limit)[:, None]
    if HALF == 0:
        b_grad_k = (tl.where(m_n, b_grad_k[0] * grad_scale, 0.0),)
    elif BLOCK_REST == 0:
        b_grad_k = (tl.where(m_n, b_grad_k[0] * grad_scale, 0.0), tl.where(m_n, b_grad_k[1] * grad_scale, 0.0))
    else:
        b_grad_k = (
            tl.where(m_n, b_grad_k[0] * grad_scale, 0.0),
            tl.where(m_n, b_grad_k[1] * grad_scale, 0.0),
            tl.where(m_n, b_grad_k[2] * grad_scale, 0.0),
        )
    o_block = (i_b.to(tl.int64) * seqlen_k * kv_heads + i_g) * HEAD_DIM
    store_columns(
        p_grad_v + o_block, i_n, kv_heads * HEAD_DIM, seqlen_k, tl.where(m_n, b_grad_v, 0.0),
        HEAD_DIM, BLOCK_D, 1, BLOCK_N,
    )  # fmt: skip
    store_heads(
        p_grad_k + o_block, i_n, kv_heads * HEAD_DIM, seqlen_k, b_grad_k, p_cos, p_sin, p_positions,
        i_n + rotary_offset,
        HEAD_DIM, BLOCK_D, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_POSITIONS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attention_table_gradient_kernel(p_sums, p_bucket, p_grad, entries, heads, BLOCK: tl.constexpr):
    """grad_table[n, h] = the sum of the head's entries whose bucket is n, in a fixed order."""
    i_n = tl.program_id(0) // heads
    i_h = tl.program_id(0) % heads
    o_entry = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_entry in tl.range(0, entries, BLOCK):
        m_entry = o_entry < entries - i_entry
        b_bucket = tl.load(p_bucket + i_entry + o_entry, mask=m_entry, other=-1)
        b_x = tl.load(p_sums + i_h.to(tl.int64) * entries + i_entry + o_entry, mask=m_entry, other=0.0)
        b_sum += tl.where(b_bucket == i_n, b_x, 0.0)
    tl.store(p_grad + i_n * heads + i_h, tl.sum(b_sum, 0))
