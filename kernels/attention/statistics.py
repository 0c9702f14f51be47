"""Fused attention, backward: the statistics that the other kernels read, and the sums of what they leave."""

import triton
import triton.language as tl

from .heads import load_pieces
from .scores import LOG2E
from .sequences import STATISTICS_ROWS, first_block, head_rows, program_block, sequence_rows, statistics_start


@triton.jit
def attention_statistics_kernel(
    out, grad_out, p_lse, p_grad_lse, p_cu_q, p_pivot, p_delta, packed, rows_q, padded_q, heads, kept_share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PACKED: tl.constexpr,
    LONG: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """pivot = lse in log2 units, delta = share kept (sum_d out grad_out - grad_lse), for padded_q rows of each head.

    A row of the padding, or one that sees no key, gets the pivot inf, so that its probabilities
    exp2(score - pivot) are 0.
    """
    i, i_h, i_block = program_block(p_cu_q, rows_q, packed, heads, PACKED, STATISTICS_ROWS)
    i_b, start, seqlen_q = sequence_rows(p_cu_q, i, rows_q, PACKED)
    i_b = i_b.to(tl.int64)
    i_m = i_block * STATISTICS_ROWS + tl.program_id(1) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q - i_m
    outs = head_rows(out, None, i_b, start, i_h, seqlen_q)
    grads = head_rows(grad_out, None, i_b, start, i_h, seqlen_q)
    (b_out,) = load_pieces(outs, i_m, 0, HEAD_DIM, BLOCK_D, False, BLOCK_M, True, LONG)  # (BLOCK_M, BLOCK_D)
    (b_grad,) = load_pieces(grads, i_m, 0, HEAD_DIM, BLOCK_D, False, BLOCK_M, True, LONG)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)  # (BLOCK_M,)
    o_row = (i_b * heads + i_h) * rows_q + start + i_m + o_m
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_row, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=-float("inf"))
    b_pivot = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    o_row = (i_b * heads + i_h) * padded_q + statistics_start(start, i, PACKED) + i_m + o_m
    tl.store(p_pivot + o_row, b_pivot)
    tl.store(p_delta + o_row, b_delta * kept_share)


@triton.jit
def attention_slopes_gradient_kernel(
    p_partial, p_cu_q, p_grad, blocks, heads, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad_slopes[b, h] = the sum of partial[h, block] over the blocks of BLOCK_M queries of packed sequence b."""
    i = tl.program_id(0) // heads
    i_h = tl.program_id(0) % heads
    end = first_block(p_cu_q, i + 1, BLOCK_M)
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_block in tl.range(first_block(p_cu_q, i, BLOCK_M), end, BLOCK):
        m_block = o_block < end - i_block
        b_sum += tl.load(p_partial + i_h.to(tl.int64) * blocks + i_block + o_block, mask=m_block, other=0.0)
    tl.store(p_grad + tl.program_id(0), tl.sum(b_sum, 0))


@triton.jit
def attention_table_gradient_kernel(p_sums, p_bucket, p_grad, entries, heads, kept_share, BLOCK: tl.constexpr):
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
    tl.store(p_grad + i_n * heads + i_h, tl.sum(b_sum, 0) / kept_share)
