"""The kernels of mixtures of experts against the reference: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import pytest
import torch
from cases.pairs import every_pair
from cases.triton import DEVICE, guarded, in_a_sea_of_nan, triton
from pynlp.kernels.moe import dispatch, grouped, mlp

from pynlp.reference.moe import dispatch as reference_dispatch
from pynlp.reference.moe import grouped as reference_grouped
from pynlp.reference.moe import mlp as reference_mlp

assert triton
DTYPES = [torch.float32, torch.float16]
NAMES = ("grad_x", "grad_top_k_weights", "grad_gate_up", "grad_gate_up_bias", "grad_down", "grad_down_bias")


def among_nan(x):
    """x with NaN around each row or matrix, in its order of memory."""
    if x is None or x.numel() == 0:
        return x
    return in_a_sea_of_nan(x.mT).mT if x.dim() == 3 and x.stride(2) != 1 else in_a_sea_of_nan(x)


def assert_near(ours, exact, theirs, factor, name="", dtype=None):
    """An error at most `factor` times the reference's, and what rounding costs, here or before in `dtype`."""
    assert ours.shape == exact.shape and ours.dtype == theirs.dtype, name
    if ours.numel() == 0:
        return
    size = exact.abs().max().item()
    eps = torch.finfo(dtype or ours.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    allowed = factor * (theirs.double() - exact).abs().max().item() + eps * size
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [1, 5, 100])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (64, 2), (65, 2), (300, 6)], ids=str)
def test_dispatch(shape, experts, dtype):
    index = torch.randint(-1, experts + 1, shape, dtype=dtype, device=DEVICE)
    index[:1] = -(2**31)  # what is far out of range is no expert, either
    for ours, expected in zip(
        guarded(dispatch.moe_dispatch, index, experts), reference_dispatch.moe_dispatch(index, experts), strict=True
    ):
        assert ours.dtype == torch.int32 and torch.equal(ours, expected)


@every_pair(
    shape=[(5, 2, 8, 4), (70, 3, 33, 50), (90, 5, 64, 64), (33, 1, 16, 7), (3, 9, 20, 40), (0, 2, 4, 4), (9, 2, 0, 5)],
    dtype=DTYPES, by_lines=[False, True], biased=[False, True],
)  # fmt: skip
def test_grouped_mm(shape, dtype, by_lines, biased):
    rows, experts, inputs, outputs = shape
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    weight = torch.randn(experts, outputs, inputs, device=DEVICE).to(dtype)
    weight = weight.mT if by_lines else weight.mT.contiguous()
    bias = torch.randn(experts, outputs, device=DEVICE) if biased else None
    offsets = torch.randint(rows + 1, (experts,), device=DEVICE).sort().values.int()
    grad = torch.randn(rows, outputs, device=DEVICE).to(dtype)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = reference_grouped.grouped_mm(*wide[:2], offsets, wide[2])
    theirs = reference_grouped.grouped_mm(x, weight, offsets, bias)
    given = (among_nan(x), among_nan(weight), offsets, bias)
    assert_near(guarded(grouped.grouped_mm, *given), exact, theirs, 2)

    last = (offsets, by_lines, biased)
    exact = reference_grouped.grouped_mm_weight_backward(grad.double(), wide[0], *last)
    theirs = reference_grouped.grouped_mm_weight_backward(grad, x, *last)
    ours = guarded(grouped.grouped_mm_weight_backward, among_nan(grad), given[0], *last)
    for one, another, third in zip(ours, exact, theirs, strict=True):
        assert_near(one, another, third, 3)


# T, E, K, H, I
SHAPES = [(7, 4, 2, 16, 8), (40, 5, 3, 33, 21), (30, 3, 2, 64, 70), (50, 1, 1, 20, 24), (3, 40, 6, 32, 40),
          (0, 2, 1, 4, 4), (6, 2, 0, 4, 4)]  # fmt: skip


@every_pair(
    shape=SHAPES, dtype=DTYPES, activation=reference_mlp.ACTIVATIONS, by_lines=[True, False], biased=[False, True],
    interleaved=[False, True],
)  # fmt: skip
def test_mlp(shape, dtype, activation, by_lines, biased, interleaved):
    tokens, experts, top_k, hidden, inner = shape
    kind = reference_mlp.ACTIVATIONS.index(activation)
    outputs = 2 * inner if activation in reference_mlp.GATED else inner

    def randn(*shape):
        return torch.randn(shape, device=DEVICE)

    def projection(outputs, inputs):
        weight = (randn(experts, outputs, inputs) / inputs**0.5).to(dtype)
        return weight if by_lines else weight.mT.contiguous().mT

    index = torch.randint(-1, experts + 1, (tokens, top_k), device=DEVICE)
    *_, offsets, permutation, places = reference_dispatch.moe_dispatch(index, experts)
    routing = permutation, places, offsets
    tensors = [
        3 * randn(tokens, hidden).to(dtype), randn(tokens, top_k).sigmoid(), projection(outputs, hidden),
        randn(experts, outputs) if biased else None, projection(hidden, inner),
        randn(experts, hidden) if biased else None,
    ]  # fmt: skip
    wide = [None if t is None else t.double() for t in tensors]
    options = kind, interleaved
    exact = reference_mlp.moe_mlp_forward(*wide, *routing, *options, True)
    theirs = reference_mlp.moe_mlp_forward(*tensors, *routing, *options, True)
    given = [among_nan(t) if i in (0, 2, 4) else t for i, t in enumerate(tensors)]
    ours = guarded(mlp.moe_mlp_forward, *given, *routing, *options, True)
    for one, another, third in zip(ours, exact, theirs, strict=True):
        assert_near(one, another, third, 4)  # the activation is rounded between the products
    alone, nothing = guarded(mlp.moe_mlp_forward, *given, *routing, *options, False)
    assert torch.equal(alone, ours[0]) and nothing.shape == (0,)

    grad = randn(tokens, hidden).to(dtype)
    needs = (True, True, True)
    before = exact[1].to(dtype)
    expected = reference_mlp.moe_mlp_backward(grad.double(), *wide, *routing, before.double(), *options, *needs)
    theirs = reference_mlp.moe_mlp_backward(grad, *tensors, *routing, before, *options, *needs)
    ours = guarded(mlp.moe_mlp_backward, among_nan(grad), *given, *routing, before, *options, *needs)
    for name, one, another, third in zip(NAMES, ours, expected, theirs, strict=True):
        assert_near(one, another, third, 6, name, dtype)
    some = guarded(mlp.moe_mlp_backward, among_nan(grad), *given, *routing, before, *options, False, False, False)
    assert torch.equal(some[1], ours[1]) and all(some[i].shape == (0,) for i in (0, 2, 4))
