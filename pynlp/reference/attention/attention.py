"""Attention in plain PyTorch: the default back end of every device, and the oracle of the tests.

Dense and readable; memory grows with Sq x Sk. Computes in fp32 (fp64 for fp64 inputs) and rounds once at the end.

Shapes: B batch, H query heads, G key/value heads (H = group * G), Sq queries, Sk keys, D head dimension,
Dv that of the values, R rotary dimension, N buckets, M largest relative distance.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute
from pynlp.reference.common.random import attention_keeps, dropped_parts


class Options(NamedTuple):
    """The arguments of the ops behind q, k and v."""

    softmax_scale: float
    window_left: int  # keys to the left of the diagonal that a query sees, -1 = all
    window_right: int  # keys to the right, -1 = all; 0 is causal
    softcap: float  # 0 = none
    key_lengths: Tensor | None  # (B,) int32
    cu_seqlens_q: Tensor | None  # (B + 1,) int32: where sequences start and end in q (1, total, H, D) ...
    cu_seqlens_k: Tensor | None  # ... and in k and v
    sinks: Tensor | None  # (H,)
    alibi_slopes: Tensor | None  # (H,) or (B, H)
    relative_bias: Tensor | None  # (N, H)
    relative_buckets: Tensor | None  # (2 M + 1,) int32: bucket of key - query distance -M .. M
    rotary_cos: Tensor | None  # (positions, R / 2)
    rotary_sin: Tensor | None  # (positions, R / 2)
    rotary_positions: Tensor | None  # (B, Sk) int32; packed (1, total)
    rotary_offset: int
    rotary_interleaved: bool
    dropout_p: float
    dropout_seed: Tensor | None  # (1,) int64


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and the log-sum-exp of the scores, for `Options`.

    q (B, Sq, H, D), k (B, Sk, G, D), v (B, Sk, G, Dv) -> (B, Sq, H, Dv) in q's dtype, (B, H, Sq) fp32 or fp64. Packed
    sequences lie one after the other in tensors of batch 1.
    """
    options = Options(*options)
    if options.cu_seqlens_q is None:
        return _forward(q, k, v, options, _entries(q))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = compute(q).new_full((1, q.shape[2], q.shape[1]), -math.inf)
    for entry, queries, keys, own in _sequences(q, options):
        out[:, queries], lse[:, :, queries] = _forward(q[:, queries], k[:, keys], v[:, keys], own, entry)
    return out, lse


def attention_backward(
    grad_out: Tensor,  # (B, Sq, H, Dv)
    grad_lse: Tensor | None,  # (B, H, Sq)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, alibi_slopes, relative_bias and sinks.

    The last three arguments say which of the last three gradients are needed; the others are empty.
    """
    *options, needs_slopes, needs_table, needs_sinks = options
    options, needs = Options(*options), (needs_slopes, needs_table, needs_sinks)
    if options.cu_seqlens_q is None:
        return _backward(grad_out, grad_lse, q, k, v, out, lse, options, needs, _entries(q))
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    biases = (options.alibi_slopes, options.relative_bias, options.sinks)
    totals = [
        torch.zeros_like(x) if needed else q.new_empty(0, dtype=torch.float32)
        for x, needed in zip(biases, needs, strict=True)
    ]
    for entry, queries, keys, own in _sequences(q, options):
        grad_q, grad_k, grad_v, *sums = _backward(
            grad_out[:, queries], None if grad_lse is None else grad_lse[:, :, queries],
            q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[:, :, queries], own, needs, entry,
        )  # fmt: skip
        grads[0][:, queries], grads[1][:, keys], grads[2][:, keys] = grad_q, grad_k, grad_v
        for total, part, bias in zip(totals, sums, biases, strict=True):
            if bias is options.alibi_slopes and total.dim() == 2:  # slopes of this sequence alone
                total[entry] = part
            else:
                total += part
    return (*grads, *totals)


def _entries(q: Tensor) -> Tensor:
    return torch.arange(q.shape[0], device=q.device)


def _sequences(q: Tensor, options: Options):
    """The number (1,) of each packed sequence, the slices of its queries and keys, and its own options."""
    starts_q, starts_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    lengths, slopes, positions = options.key_lengths, options.alibi_slopes, options.rotary_positions
    for i in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        own = options._replace(
            key_lengths=None if lengths is None else lengths[i : i + 1],
            alibi_slopes=slopes[i : i + 1] if slopes is not None and slopes.dim() == 2 else slopes,
            rotary_positions=None if positions is None else positions[:, keys],
        )
        yield torch.tensor([i], device=q.device), queries, keys, own


def _forward(q: Tensor, k: Tensor, v: Tensor, o: Options, entry: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a batch; `entry` (B,) are its entries' numbers, by which dropout counts."""
    scores, _ = masked_scores(*rotate_queries_and_keys(q, k, o), o)
    lse = log_sum_exp(scores, o.sinks)  # (B, H, Sq)
    weights, _ = dropped(visible_exp(scores, lse), o, entry)
    return weighted_sum(weights, expand_heads(compute(v), q.shape[2])).to(q.dtype).contiguous(), lse


def _backward(grad_out, grad_lse, q, k, v, out, lse, o: Options, needs: tuple[bool, bool, bool], entry: Tensor):
    q_rotated, k_rotated = rotate_queries_and_keys(q, k, o)
    scores, capped = masked_scores(q_rotated, k_rotated, o)
    probabilities = visible_exp(scores, lse)  # (B, H, Sq, Sk)
    weights, factor = dropped(probabilities, o, entry)
    grad_out = compute(grad_out)
    kv_heads = k.shape[2]

    # out = (P m) v, lse = logsumexp(s):  ds = P * (m (grad_out . v) - sum_j P_j m_j (grad_out . v_j) + grad_lse)
    grad_v = transposed_weighted_sum(weights, grad_out)
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_out, expand_heads(compute(v), q.shape[2])) * factor
    delta = (grad_out * compute(out)).sum(-1).transpose(1, 2)  # (B, H, Sq)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_scores = probabilities * (grad_weights - delta[..., None])
    grad_scores = grad_scores.masked_fill(scores == -math.inf, 0.0)

    distance = relative_distance(q.shape[1], k.shape[1], q.device)  # (Sq, Sk): key - query
    needs_slopes, needs_table, needs_sinks = needs
    grad_slopes, grad_table, grad_sinks = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
    if needs_slopes:
        grad_slopes = -(grad_scores * distance.abs()).sum((2, 3))  # (B, H)
        grad_slopes = grad_slopes.sum(0) if o.alibi_slopes.dim() == 1 else grad_slopes
    if needs_table:
        bucket = bucket_of(distance, o.relative_buckets)  # (Sq, Sk)
        per_pair = grad_scores.sum(0).flatten(1)  # (H, Sq Sk)
        grad_table = per_pair.new_zeros(o.relative_bias.shape).index_add_(0, bucket.flatten(), per_pair.t())
    if needs_sinks:  # a key whose value is 0: its ds is P (0 - delta)
        grad_sinks = -(torch.exp(o.sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2))

    if o.softcap > 0:
        grad_scores = grad_scores * (1 - (capped / o.softcap) ** 2)
    grad_scores = grad_scores * o.softmax_scale
    grad_q = weighted_sum(grad_scores, expand_heads(k_rotated, q.shape[2]))
    grad_k = transposed_weighted_sum(grad_scores, q_rotated)
    # A rotation's gradient is the rotation back: the angle with its sign changed.
    if o.rotary_sin is not None:
        grad_q, grad_k = rotate_queries_and_keys(grad_q, grad_k, o._replace(rotary_sin=-o.rotary_sin))
    grad_k, grad_v = sum_groups(grad_k, kv_heads), sum_groups(grad_v, kv_heads)
    gradients = (grad.to(q.dtype).contiguous() for grad in (grad_q, grad_k, grad_v))
    return (*gradients, grad_slopes, grad_table, grad_sinks)


def masked_scores(q: Tensor, k: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Scores (B, H, Sq, Sk) after softcap, biases and mask, and the capped scores before the biases."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    capped = torch.einsum("bqhd,bkhd->bhqk", q, expand_heads(k, q.shape[2])) * o.softmax_scale
    if o.softcap > 0:
        capped = o.softcap * torch.tanh(capped / o.softcap)
    scores = capped
    distance = relative_distance(seqlen_q, seqlen_k, q.device)  # (Sq, Sk): key - query
    if o.alibi_slopes is not None:
        scores = scores - o.alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if o.relative_bias is not None:
        bucket = bucket_of(distance, o.relative_buckets)
        scores = scores + o.relative_bias.to(scores.dtype)[bucket].permute(2, 0, 1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if o.window_left >= 0:
        visible = visible & (distance >= -o.window_left)
    if o.window_right >= 0:
        visible = visible & (distance <= o.window_right)
    if o.key_lengths is not None:
        key = torch.arange(seqlen_k, device=q.device)
        visible = visible & (key < o.key_lengths[:, None, None, None])
    return scores.masked_fill(~visible, -math.inf), capped


def log_sum_exp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The log-sum-exp (B, H, Sq) of each row of scores, its head's sink as one score more."""
    lse = torch.logsumexp(scores, dim=-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])


def dropped(probabilities: Tensor, o: Options, entry: Tensor) -> tuple[Tensor, Tensor | float]:
    """The probabilities times their factor, and the factor: 0 where dropped, else 1 / (share kept)."""
    if o.dropout_p == 0:
        return probabilities, 1.0
    keeps = attention_keeps(o.dropout_seed, o.dropout_p, entry, *probabilities.shape[1:])
    factor = keeps.to(probabilities.dtype) / (1 - dropped_parts(o.dropout_p) / 65536)
    return probabilities * factor, factor


def relative_distance(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """Key position minus query position (Sq, Sk), the last query standing at the last key."""
    query = torch.arange(seqlen_q, device=device) + (seqlen_k - seqlen_q)
    return torch.arange(seqlen_k, device=device) - query[:, None]


def bucket_of(distance: Tensor, relative_buckets: Tensor) -> Tensor:
    """The bucket of each distance; beyond the table's ends a distance falls in the last one."""
    largest = relative_buckets.numel() // 2
    return relative_buckets.long()[distance.clamp(-largest, largest) + largest]


def rotate_queries_and_keys(q: Tensor, k: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """q and k in the compute dtype, turned by the angles of their positions (RoFormer, arXiv 2104.09864)."""
    q, k = compute(q), compute(k)
    cos, sin = o.rotary_cos, o.rotary_sin
    if cos is None:
        return q, k
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if o.rotary_positions is None:
        key = torch.arange(seqlen_k, device=k.device)[None] + o.rotary_offset
        query = torch.arange(seqlen_q, device=q.device)[None] + (seqlen_k - seqlen_q + o.rotary_offset)
    else:
        key = o.rotary_positions.long()
        query = key[:, seqlen_k - seqlen_q :]
    return rotate(q, cos[query], sin[query], o.rotary_interleaved), rotate(k, cos[key], sin[key], o.rotary_interleaved)


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


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, S, G, D) as (B, S, H, D): consecutive query heads share a key/value head."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """Sums (B, S, G, D) of x (B, S, H, D) over the query heads of each key/value head."""
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
