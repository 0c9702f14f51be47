"""The layers of experts: the first product with its activation, the sum of a token's rows, and their backward."""

import triton
import triton.language as tl

from .blocks import (
    Matrices,
    Rows,
    block_of_rows,
    matrix_of,
    product,
    row_offsets,
    step_of,
    store_tile,
    tile_of_program,
    two_products,
    weight_offsets,
)

OAI_FACTOR = tl.constexpr(1.702)
OAI_LIMIT = tl.constexpr(7.0)


@triton.jit
def activated(b_gate, b_up, ACTIVATION: tl.constexpr):
    """The activation of a gate and what it gates, or of a value."""
    if ACTIVATION == "gelu":
        return b_gate * (0.5 + 0.5 * tl.math.erf(b_gate * 0.7071067811865476))
    if ACTIVATION == "relu":
        return tl.where(b_gate < 0, 0.0, b_gate)  # NaN stays
    if ACTIVATION == "swiglu":
        return b_gate * tl.sigmoid(b_gate) * b_up
    b_gate = tl.where(b_gate > OAI_LIMIT, OAI_LIMIT, b_gate)
    b_up = tl.where(b_up > OAI_LIMIT, OAI_LIMIT, tl.where(b_up < -OAI_LIMIT, -OAI_LIMIT, b_up))
    return b_gate * tl.sigmoid(b_gate * OAI_FACTOR) * (b_up + 1)


@triton.jit
def slopes(b_gate, b_up, ACTIVATION: tl.constexpr):
    """The activation's derivatives with respect to the gate, or the value, and to what it gates."""
    if ACTIVATION == "gelu":
        b_share = 0.5 + 0.5 * tl.math.erf(b_gate * 0.7071067811865476)
        return b_share + b_gate * 0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate), b_up
    if ACTIVATION == "relu":
        return (b_gate > 0).to(tl.float32), b_up
    if ACTIVATION == "swiglu":
        b_share = tl.sigmoid(b_gate)
        return b_up * b_share * (1 + b_gate * (1 - b_share)), b_gate * b_share
    b_low = tl.where(b_gate > OAI_LIMIT, OAI_LIMIT, b_gate)
    b_more = tl.where(b_up > OAI_LIMIT, OAI_LIMIT, tl.where(b_up < -OAI_LIMIT, -OAI_LIMIT, b_up)) + 1
    b_share = tl.sigmoid(b_low * OAI_FACTOR)
    b_slope = b_more * b_share * (1 + OAI_FACTOR * b_low * (1 - b_share))
    is_inside = (b_up <= OAI_LIMIT) & (b_up >= -OAI_LIMIT)
    return tl.where(b_gate > OAI_LIMIT, 0.0, b_slope), tl.where(is_inside, b_low * b_share, 0.0)


@triton.jit
def gate_up_kernel(
    x: Rows, weight: Matrices, p_bias, p_before, p_out, p_offsets, rows, inputs, inner, experts, F: tl.constexpr,
):  # fmt: skip
    """out = activation(x W_e + bias_e), (rows, inner), and before, what is in the brackets."""
    GATED: tl.constexpr = F.ACTIVATION == "swiglu" or F.ACTIVATION == "swiglu_oai"
    outputs = inner * 2 if GATED else inner
    i_block, i_tile = tile_of_program(tl.cdiv(inner, F.BLOCK_N), F)
    i_n = i_tile * F.BLOCK_N
    i_expert, i_first, i_end = block_of_rows(p_offsets, i_block, rows, experts, F)
    if i_first >= i_end:
        return
    b_row = i_first + tl.arange(0, F.BLOCK_M)
    b_column = i_n + tl.arange(0, F.BLOCK_N)
    m = (b_row < i_end)[:, None] & (b_column < inner)[None, :]
    STRIDE: tl.constexpr = 2 if F.INTERLEAVED else 1
    apart = 1 if F.INTERLEAVED else inner
    o_before = b_row.to(tl.int64)[:, None] * outputs + (b_column * STRIDE)[None, :]
    if F.TAIL:
        if i_expert >= experts:
            b_nothing = tl.full([F.BLOCK_M, F.BLOCK_N], 0.0, p_before.dtype.element_ty)
            tl.store(p_before + o_before, b_nothing, mask=m)
            if GATED:
                tl.store(p_before + o_before + apart, b_nothing, mask=m)
            return
    p_w = matrix_of(weight, i_expert, F)
    step = step_of(weight, F)
    o_x = row_offsets(x, i_first, i_end, F)
    if GATED and F.INTERLEAVED:
        o_w = weight_offsets(weight, i_n * 2, outputs, F.BLOCK_N * 2, F)
        b_both = product(x.data, o_x, p_w, o_w, step, i_n * 2, inputs, outputs, F.BLOCK_N * 2, F)
        b_gate, b_up = tl.split(tl.reshape(b_both, [F.BLOCK_M, F.BLOCK_N, 2]))
    elif GATED:
        o_w = weight_offsets(weight, i_n, inner, F.BLOCK_N, F)
        p_up = p_w + tl.cast(apart, tl.int64) * (weight.line_stride * F.ALIGN_W if F.BY_LINES else 1)
        b_gate, b_up = two_products(x.data, o_x, p_w, p_up, o_w, step, i_n, inputs, inner, F)
    else:
        o_w = weight_offsets(weight, i_n, outputs, F.BLOCK_N, F)
        b_gate = product(x.data, o_x, p_w, o_w, step, i_n, inputs, outputs, F.BLOCK_N, F)
        b_up = b_gate
    if F.HAS_BIAS:
        p_bias += i_expert.to(tl.int64) * outputs
        m_column = b_column < inner
        b_gate += tl.load(p_bias + b_column * STRIDE, mask=m_column, other=0.0)[None, :]
        if GATED:
            b_up += tl.load(p_bias + b_column * STRIDE + apart, mask=m_column, other=0.0)[None, :]
    if F.KEEPS:
        tl.store(p_before + o_before, b_gate.to(p_before.dtype.element_ty), mask=m)
        if GATED:
            tl.store(p_before + o_before + apart, b_up.to(p_before.dtype.element_ty), mask=m)
    store_tile(p_out, activated(b_gate, b_up, F.ACTIVATION), b_row, i_end, b_column, inner)


@triton.jit
def down_backward_kernel(
    grad: Rows, weight: Matrices, p_weights, p_before, p_grad_before, p_out, p_shares, p_offsets,
    rows, inputs, inner, experts, shares, F: tl.constexpr,
):  # fmt: skip
    """grad_before = w g activation' and out = w activation, g = grad W_e of a slot's token and w the slot's weight.

    shares[row, tile] is that tile's part of g . activation.
    """
    GATED: tl.constexpr = F.ACTIVATION == "swiglu" or F.ACTIVATION == "swiglu_oai"
    STRIDE: tl.constexpr = 2 if F.INTERLEAVED else 1
    outputs = inner * 2 if GATED else inner
    apart = 1 if F.INTERLEAVED else inner
    i_block, i_tile = tile_of_program(tl.cdiv(inner, F.BLOCK_N), F)
    i_n = i_tile * F.BLOCK_N
    i_expert, i_first, i_end = block_of_rows(p_offsets, i_block, rows, experts, F)
    if i_first >= i_end:
        return
    o_w = weight_offsets(weight, i_n, inner, F.BLOCK_N, F)
    o_x = row_offsets(grad, i_first, i_end, F)
    p_w = matrix_of(weight, i_expert, F)
    b_grad = product(grad.data, o_x, p_w, o_w, step_of(weight, F), i_n, inputs, inner, F.BLOCK_N, F)
    b_row = i_first + tl.arange(0, F.BLOCK_M)
    b_column = i_n + tl.arange(0, F.BLOCK_N)
    m = (b_row < i_end)[:, None] & (b_column < inner)[None, :]
    o_before = b_row.to(tl.int64)[:, None] * outputs + (b_column * STRIDE)[None, :]
    b_gate = tl.load(p_before + o_before, mask=m, other=0.0).to(tl.float32)
    b_up = b_gate
    if GATED:
        b_up = tl.load(p_before + o_before + apart, mask=m, other=0.0).to(tl.float32)
    b_slot = tl.load(grad.permutation + b_row, mask=b_row < i_end, other=0)
    b_weight = tl.load(p_weights + b_slot, mask=b_row < i_end, other=0.0)[:, None]
    b_value = activated(b_gate, b_up, F.ACTIVATION)
    b_share = tl.sum(tl.where(m, b_grad * b_value, 0.0), 1)
    tl.store(p_shares + b_row.to(tl.int64) * shares + i_tile, b_share, mask=b_row < i_end)
    b_of_gate, b_of_up = slopes(b_gate, b_up, F.ACTIVATION)
    b_grad *= b_weight
    tl.store(p_grad_before + o_before, (b_grad * b_of_gate).to(p_grad_before.dtype.element_ty), mask=m)
    if GATED:
        tl.store(p_grad_before + o_before + apart, (b_grad * b_of_up).to(p_grad_before.dtype.element_ty), mask=m)
    tl.store(
        p_out + b_row.to(tl.int64)[:, None] * inner + b_column[None, :],
        (b_weight * b_value).to(p_out.dtype.element_ty), mask=m,
    )  # fmt: skip


@triton.jit
def bias_share_kernel(
    grad: Rows, p_bias, p_shares, p_offsets, rows, columns, experts, shares, F: tl.constexpr,
):  # fmt: skip
    """shares[row, last] = grad . bias_e of a slot's token."""
    i_expert, i_first, i_end = block_of_rows(p_offsets, tl.program_id(0), rows, experts, F)
    if i_first >= i_end:
        return
    o_x = row_offsets(grad, i_first, i_end, F)
    p_bias += i_expert.to(tl.int64) * columns
    b_sum = tl.full([F.BLOCK_M], 0.0, tl.float32)
    for i_k in tl.range(0, columns, F.BLOCK_K):
        b_k = i_k + tl.arange(0, F.BLOCK_K)
        m_k = b_k < columns
        b_grad = tl.load(grad.data + o_x + b_k[None, :], mask=m_k[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_grad * tl.load(p_bias + b_k, mask=m_k, other=0.0)[None, :], 1)
    b_row = i_first + tl.arange(0, F.BLOCK_M)
    tl.store(p_shares + b_row.to(tl.int64) * shares + shares - 1, b_sum, mask=b_row < i_end)


@triton.jit
def combine_kernel(
    p_rows, p_weights, p_places, p_out, tokens, columns, top_k,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] rows[places[t, k]], in the order of k; of places below 0 nothing."""
    blocks = tl.cdiv(columns, BLOCK_N)
    b_token = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_token = b_token < tokens
    m_column = (b_column < columns)[None, :]
    b_sum = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for i_k in tl.range(top_k):
        b_slot = b_token * top_k + i_k
        b_place = tl.load(p_places + b_slot, mask=m_token, other=-1)
        m = (b_place >= 0)[:, None] & m_column
        b_row = tl.load(p_rows + b_place.to(tl.int64)[:, None] * columns + b_column[None, :], mask=m, other=0.0)
        b_row = b_row.to(tl.float32)
        if WEIGHTED:
            b_row *= tl.load(p_weights + b_slot, mask=b_place >= 0, other=0.0)[:, None]
        b_sum += b_row
    offsets = b_token[:, None] * columns + b_column[None, :]
    tl.store(p_out + offsets, b_sum.to(p_out.dtype.element_ty), mask=m_token[:, None] & m_column)


@triton.jit
def weights_gradient_kernel(p_shares, p_places, p_out, slots, shares, BLOCK: tl.constexpr):
    """out[slot] = the sum of the shares of its row; 0 without one."""
    b_slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_place = tl.load(p_places + b_slot, mask=b_slot < slots, other=-1)
    b_sum = tl.full([BLOCK], 0.0, tl.float32)
    for i in tl.range(shares):
        b_sum += tl.load(p_shares + b_place.to(tl.int64) * shares + i, mask=b_place >= 0, other=0.0)
    tl.store(p_out + b_slot, b_sum, mask=b_slot < slots)
