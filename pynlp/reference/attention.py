"""Attention in plain PyTorch: the default back end of every device, and the oracle of the tests.

Dense and readable; memory grows with Sq x Sk. Computes in fp32 (fp64 for fp64 inputs) and rounds once at the end.

Shapes: B batch, H query heads, G key/value heads (H = group * G), Sq queries, Sk keys, D head dimension,
R rotary dimension, N buckets, M largest relative distance.
"""

import math

import torch
from torch import Tensor


def attention_forward(
    q: Tensor,  # (B, Sq, H, D)
    k: Tensor,  # (B, Sk, G, D)
    v: Tensor,  # (B, Sk, G, D)
    softmax_scale: float,
    window_left: int,  # keys to the left of the diagonal that a query sees, -1 = all
    window_right: int,  # keys to the right, -1 = all; 0 is causal
    softcap: float,  # 0 = none
    key_lengths: Tensor | None,  # (B,) int32
    alibi_slopes: Tensor | None,  # (H,) or (B, H)
    relative_bias: Tensor | None,  # (N, H)
    relative_buckets: Tensor | None,  # (2 M + 1,) int32: bucket of key - query distance -M .. M
    rotary_cos: Tensor | None,  # (positions, R / 2)
    rotary_sin: Tensor | None,  # (positions, R / 2)
    rotary_positions: Tensor | None,  # (B, Sk) int32
    rotary_offset: int,
    rotary_interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and the log-sum-exp of the scores: ((B, Sq, H, D) in q's dtype, (B, H, Sq) fp32 or fp64)."""
    rotary = (rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved)
    q_rotated, k_rotated = rotate_queries_and_keys(q, k, *rotary)
    scores, _ = masked_scores(
        q_rotated, k_rotated, softmax_scale, window_left, window_right, softcap,
        key_lengths, alibi_slopes, relative_bias, relative_buckets,
    )  # fmt: skip
    lse = torch.logsumexp(scores, dim=-1)  # (B, H, Sq)
    probabilities = visible_exp(scores, lse)
    values = expand_heads(compute(v), q.shape[2])
    return weighted_sum(probabilities, values).to(q.dtype).contiguous(), lse


def attention_backward(
    grad_out: Tensor,  # (B, Sq, H, D)
    grad_lse: Tensor | None,  # (B, H, Sq)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_buckets: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_positions: Tensor | None,
    rotary_offset: int,
    rotary_interleaved: bool,
    needs_slopes: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, alibi_slopes and relative_bias; the last two are empty unless asked for."""
    rotary = (rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved)
    q_rotated, k_rotated = rotate_queries_and_keys(q, k, *rotary)
    scores, capped = masked_scores(
        q_rotated, k_rotated, softmax_scale, window_left, window_right, softcap,
        key_lengths, alibi_slopes, relative_bias, relative_buckets,
    )  # fmt: skip
    probabilities = visible_exp(scores, lse)  # (B, H, Sq, Sk)
    grad_out = compute(grad_out)
    kv_heads = k.shape[2]

    # out = P v, lse = logsumexp(s):  ds = P * (grad_out . v - sum_j P_j (grad_out . v_j) + grad_lse)
    grad_v = transposed_weighted_sum(probabilities, grad_out)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad_out, expand_heads(compute(v), q.shape[2]))
    delta = (grad_out * compute(out)).sum(-1).transpose(1, 2)  # (B, H, Sq)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_scores = probabilities * (grad_probabilities - delta[..., None])
    grad_scores = grad_scores.masked_fill(scores == -math.inf, 0.0)

    distance = relative_distance(q.shape[1], k.shape[1], q.device)  # (Sq, Sk): key - query
    grad_slopes = q.new_empty(0, dtype=torch.float32)
    if needs_slopes:
        grad_slopes = -(grad_scores * distance.abs()).sum((2, 3))  # (B, H)
        grad_slopes = grad_slopes.sum(0) if alibi_slopes.dim() == 1 else grad_slopes
    grad_table = q.new_empty(0, dtype=torch.float32)
    if needs_table:
        bucket = bucket_of(distance, relative_buckets)  # (Sq, Sk)
        per_pair = grad_scores.sum(0).flatten(1)  # (H, Sq Sk)
        grad_table = per_pair.new_zeros(relative_bias.shape).index_add_(0, bucket.flatten(), per_pair.t())

    if softcap > 0:
        grad_scores = grad_scores * (1 - (capped / softcap) ** 2)
    grad_scores = grad_scores * softmax_scale
    grad_q = weighted_sum(grad_scores, expand_heads(k_rotated, q.shape[2]))
    grad_k = transposed_weighted_sum(grad_scores, q_rotated)
    # A rotation's gradient is the rotation back: the angle with its sign changed.
    if rotary_sin is not None:
        rotary = (rotary_cos, -rotary_sin, rotary_positions, rotary_offset, rotary_interleaved)
        grad_q, grad_k = rotate_queries_and_keys(grad_q, grad_k, *rotary)
    grad_k, grad_v = sum_groups(grad_k, kv_heads), sum_groups(grad_v, kv_heads)
    gradients = (grad.to(q.dtype).contiguous() for grad in (grad_q, grad_k, grad_v))
    return (*gradients, grad_slopes, grad_table)


def masked_scores(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_buckets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, Sq, Sk) after softcap, biases and mask, and the capped scores before the biases."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    capped = torch.einsum("bqhd,bkhd->bhqk", q, expand_heads(k, q.shape[2])) * softmax_scale
    if softcap > 0:
        capped = softcap * torch.tanh(capped / softcap)
    scores = capped
    distance = relative_distance(seqlen_q, seqlen_k, q.device)  # (Sq, Sk): key - query
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if relative_bias is not None:
        bucket = bucket_of(distance, relative_buckets)
        scores = scores + relative_bias.to(scores.dtype)[bucket].permute(2, 0, 1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if window_left >= 0:
        visible = visible & (distance >= -window_left)
    if window_right >= 0:
        visible = visible & (distance <= window_right)
    if key_lengths is not None:
        key = torch.arange(seqlen_k, device=q.device)
        visible = visible & (key < key_lengths[:, None, None, None])
    return scores.masked_fill(~visible, -math.inf), capped


def relative_distance(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """Key position minus query position (Sq, Sk), the last query standing at the last key."""
    query = torch.arange(seqlen_q, device=device) + (seqlen_k - seqlen_q)
    return torch.arange(seqlen_k, device=device) - query[:, None]


def bucket_of(distance: Tensor, relative_buckets: Tensor) -> Tensor:
    """The bucket of each distance; beyond the table's ends a distance falls in the last one."""
    largest = relative_buckets.numel() // 2
    return relative_buckets.long()[distance.clamp(-largest, largest) + largest]


def rotate_queries_and_keys(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q and k in the compute dtype, turned by the angles of their positions (RoFormer, arXiv 2104.09864)."""
    q, k = compute(q), compute(k)
    if cos is None:
        return q, k
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if positions is None:
        key = torch.arange(seqlen_k, device=k.device)[None] + offset
        query = torch.arange(seqlen_q, device=q.device)[None] + (seqlen_k - seqlen_q + offset)
    else:
        key = positions.long()
        query = key[:, seqlen_k - seqlen_q :]
    return rotate(q, cos[query], sin[query], interleaved), rotate(k, cos[key], sin[key], interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, heads, D) with its first R channels turned by cos, sin (B, S, R / 2)."""
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, G, D) -> (B, S, H, D): consecutive query heads share a key/value head."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """(B, S, H, D) -> (B, S, G, D)."""
    return x if x.shape[2] == kv_heads else x.unflatten(2, (kv_heads, -1)).sum(3)


def visible_exp(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 where masked, also in rows that see nothing (lse = -inf)."""
    return torch.exp(scores - lse[..., None]).masked_fill(scores == -math.inf, 0.0)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_k weights[b, h, q, k] values[b, k, h, :]; a weight of 0 ignores its value, NaN or not."""
    return _finite_matmul(weights, values.transpose(1, 2)).transpose(1, 2)


def transposed_weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_q weights[b, h, q, k] values[b, q, h, :]."""
    return _finite_matmul(weights.transpose(2, 3), values.transpose(1, 2)).transpose(1, 2)


def _finite_matmul(weights: Tensor, values: Tensor) -> Tensor:
    """weights (..., m, n) @ values (..., n, d), where a masked pair (weight 0) never spreads a NaN or an infinity."""
    finite = values.isfinite()
    if finite.all():
        return weights @ values
    spoiled = (~finite).any(-1, keepdim=True).to(values.dtype)  # (..., n, 1)
    sees_spoiled = (weights != 0).to(values.dtype) @ spoiled > 0  # (..., m, 1)
    return torch.where(sees_spoiled, weights @ values, weights @ values.masked_fill(~finite, 0.0))
