"""Products of integers with rows of x that are rounded to 8 bits, against fp64."""

import math

import pytest
import torch
from cases.pairs import every_pair
from torch import Tensor

from pynlp.functional import (
    dequantize_int4,
    dequantize_int8,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    quantize_int4,
    quantize_int8,
)
from pynlp.ops.quantization.int4 import _checked as checked_int4
from pynlp.ops.quantization.int8 import _checked as checked_int8
from pynlp.ops.quantization.integers import dynamic_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["tensor", "channel", 16, 48, 128]
# (N, K): whole units and groups, and neither; nothing.
SHAPES = [(1, 1), (7, 33), (50, 64), (33, 97), (70, 1000), (61, 2080), (64, 0), (0, 32)]
ROWS = (0, 1, 2, 5, 8, 9, 17, 40)


def quantized(bits: int, scheme: str, granularity: str | int, x: Tensor) -> tuple:
    """Codes, their state, and the values in fp64."""
    group = granularity if isinstance(granularity, int) else None
    options = dict(scheme=scheme.replace("minimum", "affine"), group_size=group)
    quantize, dequantize = (quantize_int8, dequantize_int8) if bits == 8 else (quantize_int4, dequantize_int4)
    codes, state = quantize(x, granularity="group" if group else granularity, **options)
    if scheme == "minimum":
        state = state._replace(zero_point=None, minimum=-state.scale * state.zero_point)
    return codes, state, dequantize(codes, state, dtype=torch.float64)


def rounded(x: Tensor, group: int) -> Tensor:
    """x in fp64, groups of whose values are rounded to 8 bits as the formula says."""
    if x.shape[1] == 0:
        return x.double()
    parts = []
    for part in x.float().split(group, dim=1):
        scale = part.abs().amax(1, keepdim=True) / 127
        codes = (part / scale).nan_to_num(0.0).round()
        parts.append(codes.double() * scale.double())
    return torch.cat(parts, dim=1)


def check(y: Tensor, near: Tensor, weight: Tensor, bias: Tensor, tolerance: float = 1e-6) -> None:
    exact, size = near @ weight.T + bias, near.abs() @ weight.abs().T + bias.abs()
    room = tolerance * size + torch.finfo(y.dtype).eps * exact.abs() + 1e-30
    if y.dtype == torch.float16:
        room += 6e-8
    assert ((y.double() - exact).abs() <= room).all()


@pytest.mark.every_isa
@every_pair(
    shape=SHAPES, bits=[8, 4], scheme=["symmetric", "affine", "minimum"], granularity=GRANULARITIES, dtype=DTYPES,
    x_group=[0, 32],
)  # fmt: skip
def test_products(shape, bits, scheme, granularity, dtype, x_group, isa):
    outputs, columns = shape
    codes, state, weight = quantized(bits, scheme, granularity, torch.randn(shape) + 0.3)
    bias = torch.randn(outputs)
    scaled = (checked_int8 if bits == 8 else checked_int4)(codes, state)
    for rows in ROWS:
        x = torch.randn(rows, columns + 3)[:, :columns].to(dtype)
        y = dynamic_linear(x, scaled, bias, x_group)
        assert y.dtype == dtype and y.shape == (rows, outputs)
        check(y, rounded(x, x_group or max(1, columns)), weight, bias.double())


@pytest.mark.every_isa
@pytest.mark.parametrize("rows", [3, 50])
def test_sums_are_exact(rows, isa):
    """Sums of integers that cancel: an error beside the sum itself, not beside its terms, is that of one rounding."""
    x, weight = torch.randn(rows, 3000), torch.randn(40, 3000)
    weight[:, 1::2] = weight[:, ::2].roll(1, 0)
    codes, state, exact = quantized(8, "symmetric", "channel", weight)
    expected = rounded(x, 3000) @ exact.T
    assert ((int8_dynamic_linear(x, codes, state) - expected).abs() <= 4e-7 * expected.abs()).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 1.0])
@pytest.mark.parametrize("columns", [33, 1000, 2080])
def test_pairs_of_large_codes(columns, share, isa):
    """Without VNNI, products of two codes are summed in 16 bits: those of few pairs, or of many, would not fit."""
    _, state = quantize_int8(torch.full((130, columns), 127.0))
    pairs = (torch.rand(130, (columns + 1) // 2) < share).repeat_interleave(2, dim=1)[:, :columns]
    large = torch.tensor([-128, -127, -100, 100, 127])[torch.randint(5, (130, columns))]
    codes = torch.where(pairs, large, torch.randint(-64, 65, (130, columns)))
    for rows in (9, 40):
        x = torch.randint(-127, 128, (rows, columns))
        x[::2] = 127 * x[::2].sign()
        x[:, -1] = 127  # so that a row's scale is 1
        y = int8_dynamic_linear(x.float(), codes.to(torch.int8), state)
        assert torch.equal(y, (x @ codes.T).float())


@pytest.mark.every_isa
@pytest.mark.parametrize("rows", [2, 9])
def test_groups_of_more_columns_than_32_bits_hold_products_of(rows, isa):
    """Each is summed in parts, of which the last group has fewer."""
    x, weight = torch.randn(rows, 65552), torch.randn(3, 65552)
    for group in (32784, 65536):
        codes, state, exact = quantized(8, "affine", group, weight)
        check(int8_dynamic_linear(x, codes, state), rounded(x, 65552), exact, torch.zeros(3).double(), 3e-6)


@pytest.mark.every_isa
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("bits", [8, 4])
def test_largest_codes(bits, rows, isa):
    """No sum of products leaves its integers, also in rows of more columns than 32 bits hold products of."""
    columns = 140_000
    x = torch.full((rows, columns), 2.0)
    x[1] = -1
    for sign in (1, -1):
        weight = torch.full((3, columns), float(sign))
        weight[1, 0] = -sign * 1.01
        codes, state, exact = quantized(bits, "affine", "channel", weight)
        if bits == 8:
            assert codes.max() == 127 or codes.min() == -128
        y = dynamic_linear(x, (checked_int8 if bits == 8 else checked_int4)(codes, state), None, 0)
        check(y, rounded(x, columns), exact, torch.zeros(3).double(), 3e-6)


@pytest.mark.every_isa
@every_pair(
    rows=[1, 5, 8, 9, 40], shape=[(7, 33), (50, 64), (70, 1000)], granularity=["channel", 48], dtype=DTYPES,
    scheme=["symmetric", "affine"],
)  # fmt: skip
@pytest.mark.parametrize("threshold", [6.0, 1.5, 1e-6])
def test_outliers_are_not_rounded(rows, shape, granularity, dtype, scheme, threshold, isa):
    codes, state, weight = quantized(8, scheme, granularity, torch.randn(shape))
    x = torch.randn(rows, shape[1]).to(dtype)
    x[0, 3] = 50
    x[-1, -1] = -7
    y = int8_dynamic_linear(x, codes, state, outlier_threshold=threshold)
    outliers = (x.abs() >= threshold).any(0)
    assert outliers.sum() >= 1
    near = torch.where(outliers, x.double(), rounded(x.masked_fill(outliers, 0), shape[1]))
    check(y, near, weight, torch.zeros(shape[0]).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_strides(dtype, isa):
    codes, state, _ = quantized(8, "affine", 64, torch.randn(300, 576))
    for rows in (1, 7, 30, 600):
        x = torch.randn(rows, 576).to(dtype)
        for options in (dict(), dict(outlier_threshold=3.0)):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(int8_dynamic_linear(x, codes, state, **options))
            assert all(torch.equal(y, results[0]) for y in results)
            wide = torch.zeros(rows, 2, 600, dtype=dtype)
            wide[:, 1, :576] = x
            assert torch.equal(int8_dynamic_linear(wide[:, 1:, :576], codes, state, **options)[:, 0], results[0])


@pytest.mark.every_isa
@pytest.mark.parametrize("rows", [2, 12])
def test_zeros_huge_subnormal_and_not_finite_rows(rows, isa):
    codes, state, weight = quantized(8, "affine", "channel", torch.randn(20, 70))
    x = torch.randn(rows, 70)
    for value in (0.0, 1e-40, 3e38, 1e30):
        x[1] = value
        y = int8_dynamic_linear(x, codes, state)
        assert y[0].isfinite().all()
        if value < 3e38:
            torch.testing.assert_close(y[1].double(), (x.double() @ weight.T)[1], rtol=1e-2, atol=1e-44)
    for value in (math.nan, math.inf, -math.inf):
        x[1] = 1
        x[1, 69] = value
        for dtype in (torch.float32, torch.float64):
            y = int8_dynamic_linear(x.to(dtype), codes, state)
            assert y[0].isfinite().all() and y[1].isnan().all()


def test_gradients_are_those_of_x_as_it_was():
    codes, state, weight = quantized(8, "affine", 16, torch.randn(7, 40))
    grad = torch.randn(2, 3, 7)
    for call in (
        lambda x, bias: int8_dynamic_linear(x, codes, state, bias, outlier_threshold=2.0),
        lambda x, bias: int8_linear(x, codes, state, bias, activations="int8"),
    ):
        x, bias = torch.randn(2, 3, 40, requires_grad=True), torch.randn(7, requires_grad=True)
        call(x, bias).backward(grad)
        torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    x = torch.randn(2, 40, requires_grad=True)
    (grad_x,) = torch.autograd.grad(call(x, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a linear layer of integers has no second derivative"):
        grad_x.sum().backward()


def test_activations_in_8_bits():
    """The public option is the product with groups of 32."""
    x, weight = torch.randn(3, 100), torch.randn(9, 100)
    for bits, linear in ((8, int8_linear), (4, int4_linear)):
        codes, state, exact = quantized(bits, "affine", 32, weight)
        y = linear(x, codes, state, activations="int8")
        check(y, rounded(x, 32), exact, torch.zeros(9).double())
        assert not torch.equal(y, linear(x, codes, state))


@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (0.0, ValueError, "outlier_threshold: expected more than 0, got 0.0"),
        (math.nan, ValueError, "outlier_threshold: expected more than 0, got nan"),
        ("6", TypeError, "outlier_threshold: expected a number or None, got '6'"),
    ],
)
def test_bad_thresholds(threshold, error, message):
    codes, state = quantize_int8(torch.randn(4, 32))
    with pytest.raises(error, match=message):
        int8_dynamic_linear(torch.randn(2, 32), codes, state, outlier_threshold=threshold)
