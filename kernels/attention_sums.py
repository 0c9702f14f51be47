"""Fused attention, backward: the sums before and after the kernels of q and of k and v."""

import triton
import triton.language as tl

from .attention_tiles import LOG2E, load_columns


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
