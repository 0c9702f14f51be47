"""What the tests of flash-attn's functions share: dense attention, and how near to exact ours must come."""

import math

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dense_attention(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, keep=None
):
    """q (B, Sq, H, D), k and v (B, Sk, G, D) -> out in q's dtype and lse (B, H, Sq), by PyTorch's own operations.

    `keep` (B, H, Sq, Sk): the factors that dropout multiplies the weights with.
    """
    seqlen_q, heads, seqlen_k = q.shape[1], q.shape[2], k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (softmax_scale or q.shape[3] ** -0.5)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    row = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    column = torch.arange(seqlen_k)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * (row - column).abs()
    left, right = window_size
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    if causal:
        right = 0
    if left >= 0:
        hidden = hidden | (column < row - left)
    if right >= 0:
        hidden = hidden | (column > row + right)
    blind = hidden.all(-1, keepdim=True)  # rows of -inf only would have NaN gradients
    scores = scores.masked_fill(hidden & ~blind, -math.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind[:, 0], math.inf)
    if keep is not None:
        weights = weights * keep
    return torch.einsum("bhij,bjhd->bihd", weights.to(q.dtype), v), lse


def outputs_and_gradients(function, tensors):
    """out, lse, and the gradient of each tensor for a fixed random weighting of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, lse = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    of_out, of_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    torch.autograd.backward((out, lse), (of_out, of_lse.masked_fill(lse.detach().isinf(), 0.0)))
    return {"out": out.detach(), "lse": lse.detach()} | {name: x.grad for name, x in leaves.items()}


def largest_error(result, exact):
    """Equal infinities are no error, unequal ones an infinite one, as is NaN."""
    difference = torch.where(result.double() == exact, 0.0, (result.double() - exact).abs())
    return difference.nan_to_num(nan=math.inf).max().item() if exact.numel() else 0.0


def assert_as_accurate(name, result, exact, peer, factor):
    """The error of `result` is at most `factor` times that of `peer`, which PyTorch computed in the same dtype.

    And two units in the last place of the largest value on top, as the few values of a small case may come out exactly.
    """
    assert result.shape == exact.shape and result.dtype == peer.dtype, name
    size = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    room = factor * largest_error(peer, exact) + 2 * torch.finfo(result.dtype).eps * size
    error = largest_error(result, exact)
    assert error <= room, f"{name}: error {error:.3g}, expected at most {room:.3g}"


def assert_agree(function, dense, **tensors):
    """Our error against `dense` in fp64 is at most 4 (gradients: 6) times that of `dense` in the tensors' dtype."""
    ours = outputs_and_gradients(function, tensors)
    exact = outputs_and_gradients(dense, {name: x.double() for name, x in tensors.items()})
    peer = outputs_and_gradients(dense, tensors)
    for name in exact:
        assert_as_accurate(name, ours[name], exact[name], peer[name], 6 if name in tensors else 4)


def turned(x, cos, sin, interleaved):
    """x (..., S, H, D) with pairs of channels as complex numbers times cos + i sin, (..., S, rotary_dim / 2)."""
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[..., None, :]
    pairs = torch.view_as_real(product)
    return torch.cat(((pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), x[..., rotary_dim:]), dim=-1)
