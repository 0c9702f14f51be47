"""flash-attn's rotary embedding: values, gradients, and what it does in place."""

import math

import torch
from cases.flash_attn import DTYPES, dense_attention, turned
from cases.pairs import every_pair

from pynlp.integrations.flash_attn import apply_rotary_emb, flash_attn_func


def rotary_tables_and_offsets(offsets, dtype, batch, longest):
    """Random angles for the 9 positions past `longest`, and the offset of each sequence."""
    angles = torch.rand(longest + 9, 3) * 2 * math.pi
    each = {"none": torch.zeros(batch, dtype=torch.int64), "int": torch.full((batch,), 9)}
    each = each.get(offsets, torch.randint(0, 10, (batch,)))
    seqlen_offsets = {"none": 0, "int": 9, "int32": each.int(), "int64": each}[offsets]
    return angles.cos().to(dtype), angles.sin().to(dtype), seqlen_offsets, each


@every_pair(
    inplace=[False, True], interleaved=[False, True], offsets=["none", "int", "int32", "int64"], head_dim=[6, 11],
    dtype=DTYPES,
)  # fmt: skip
def test_apply_rotary_emb(inplace, interleaved, offsets, head_dim, dtype):
    cos, sin, seqlen_offsets, each = rotary_tables_and_offsets(offsets, dtype, 3, 5)
    x = torch.randn(3, 5, 2, head_dim, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    before = x.detach().clone()
    positions = each[:, None] + torch.arange(5)
    expected = turned(exact, cos.double()[positions], sin.double()[positions], interleaved)

    out = apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=inplace, seqlen_offsets=seqlen_offsets)
    assert_rotated(out, expected, x, exact)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x.detach(), out.detach() if inplace else before)


def assert_rotated(out, expected, x, exact):
    """Values and gradients rounded once; fp32 four times, for two products, their sum and the tables."""
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, weights)
    (exact_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    for result, reference in ((out, expected), (gradient, exact_gradient)):
        assert result.dtype == x.dtype
        allowed = torch.finfo(x.dtype).eps * reference.abs().clamp(min=0.1) + 2**-21
        assert ((result.double() - reference).abs() <= allowed).all()


@every_pair(
    inplace=[False, True], interleaved=[False, True], offsets=["none", "int", "int32"], max_seqlen=[None, 6, 7],
    dtype=DTYPES,
)  # fmt: skip
def test_apply_rotary_emb_of_packed_sequences(inplace, interleaved, offsets, max_seqlen, dtype):
    lengths = [4, 0, 6, 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cos, sin, seqlen_offsets, each = rotary_tables_and_offsets(offsets, dtype, 4, 6)
    x = torch.randn(11, 2, 8, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    before = x.detach().clone()
    positions = torch.cat([torch.arange(length) + offset for length, offset in zip(lengths, each, strict=True)])
    expected = turned(exact, cos.double()[positions], sin.double()[positions], interleaved)

    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    assert_rotated(out, expected, x, exact)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x.detach(), out.detach() if inplace else before)


def test_apply_rotary_emb_in_place_of_a_part():
    """Queries in a packed tensor that is not a leaf: the rest stays, and all gradients arrive."""
    angles = torch.rand(5, 4)
    packed = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    qkv = packed * 1
    before = qkv.detach().clone()
    q = apply_rotary_emb(qkv[:, :, 0], angles.cos(), angles.sin(), inplace=True)
    out = flash_attn_func(q, qkv[:, :, 1], qkv[:, :, 2])
    assert torch.equal(qkv[:, :, 1:], before[:, :, 1:])
    exact = packed.detach().double().requires_grad_()
    queries = turned(exact[:, :, 0], angles.double().cos(), angles.double().sin(), False)
    torch.testing.assert_close(qkv[:, :, 0].double(), queries, rtol=1e-5, atol=1e-6)
    expected, _ = dense_attention(queries, exact[:, :, 1], exact[:, :, 2])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(out)
    out.backward(weights)
    expected.backward(weights.double())
    torch.testing.assert_close(packed.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_apply_rotary_emb_gives_tables_no_gradient():
    x, angles = torch.randn(1, 3, 1, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    apply_rotary_emb(x, angles.cos(), angles.sin()).sum().backward()
    assert angles.grad is None and x.grad is not None
