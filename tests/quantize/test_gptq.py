"""The codes of GPTQ, against the plain algorithm in fp64."""

import copy

import pytest
import torch
from torch import nn

from pynlp.nn import Linear4bit, Linear8bit, LinearInt4
from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize.gptq import Hessian, factor_of, quantize_with
from pynlp.reference.quantization.formats import FORMATS, QUANT_TYPES

FORMATS_OF_LAYERS = [
    (Linear4bit, dict(quant_type="nf4")),
    (Linear4bit, dict(quant_type="nf4", double_quant=True, blocksize=32)),
    (Linear4bit, dict(quant_type="fp4", blocksize=128)),
    (Linear4bit, dict(quant_type="mxfp4")),
    (Linear8bit, dict()),
    (Linear8bit, dict(scheme="affine", granularity="group", group_size=32)),
    (Linear8bit, dict(granularity="tensor")),
    (LinearInt4, dict(group_size=32)),
    (LinearInt4, dict(scheme="symmetric", granularity="channel")),
]


def values_of(layer: QuantizedLinear) -> torch.Tensor:
    """All values that each weight of a layer could have, fp64 (N, K, codes)."""
    rows, columns, state = layer.out_features, layer.in_features, layer.state
    if isinstance(layer, Linear4bit):
        codes = torch.tensor(FORMATS[QUANT_TYPES.index(state.quant_type)].codes).double()
        packed = torch.arange(16).repeat_interleave(rows * columns).view(16, -1)  # every weight has every code
        found = []
        for code in packed.to(torch.uint8):
            other = copy.deepcopy(layer)
            other.weight = (code[0] << 4 | code[0]).expand((rows * columns + 1) // 2)[:, None].clone()
            found.append(other.dequantize(torch.float64))
        assert len(codes) == len(found)
        return torch.stack(found, dim=2)
    low, high = (0, 15) if isinstance(layer, LinearInt4) else (-128, 127)
    zero = state.zero_point
    if zero is None:
        low, zero = low + 1, torch.full_like(state.scale, 8 if isinstance(layer, LinearInt4) else 0)
    scale, zero = (
        x.double().expand(rows, -1).repeat_interleave(state.group_size, dim=1)[:, :columns, None]
        for x in (state.scale, zero)
    )
    return (torch.arange(low, high + 1).double() - zero) * scale


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize(("cls", "options"), FORMATS_OF_LAYERS)
@pytest.mark.parametrize("columns", [96, 135])
def test_gptq_is_optimal_brain_quantization_in_a_fixed_order(cls, options, columns, activation_order):
    """The codes are those of the plain algorithm in fp64: after each column the inverse Hessian without it."""
    dense = nn.Linear(columns, 7, bias=False)
    x = torch.randn(300, columns) @ torch.randn(columns, columns) * (1 + 5 * (torch.rand(columns) > 0.9))
    hessian = Hessian(columns, x.device)
    hessian.add(x[:100])
    hessian.add(x[100:])
    exact = 2 * x.double().T @ x.double() / 300
    torch.testing.assert_close(hessian.matrix.double(), exact, rtol=1e-4, atol=1e-3)
    order = exact.diagonal().argsort(descending=True) if activation_order else torch.arange(columns)
    layer = cls.from_linear(dense, **options)
    nearest = layer.dequantize(torch.float64)
    factor, damping = factor_of(hessian.matrix[order][:, order], 0.01)
    assert damping == 0.01
    quantize_with(layer, dense.weight, factor, order)

    allowed = values_of(layer)
    inverse = (exact + 0.01 * exact.diagonal().mean() * torch.eye(columns)).inverse()
    left, expected = dense.weight.detach().double().clone(), torch.zeros(7, columns).double()
    for column in order:
        distance = (allowed[:, column] - left[:, column, None]).abs()
        expected[:, column] = allowed[:, column].gather(1, distance.argmin(1, keepdim=True))[:, 0]
        error = (left[:, column] - expected[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    found = layer.dequantize(torch.float64)
    share = ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-9).double().mean()
    assert share > 0.99  # a value in the middle of two codes may go either way, and some after it

    def loss(weight):
        lost = weight - dense.weight.detach().double()
        return (lost @ exact * lost).sum()

    assert loss(found) < 0.8 * loss(nearest)


@pytest.mark.parametrize(("cls", "options"), FORMATS_OF_LAYERS)
def test_a_column_that_is_always_zero_and_fewer_rows_than_columns(cls, options):
    """The first is rounded to nearest and has no part in others; the second has a singular Hessian, damped."""
    dense, x = nn.Linear(64, 32), torch.randn(20, 64)
    x[:, [0, 3, 50, 63]] = 0
    hessian = Hessian(64, x.device)
    hessian.add(x)
    layer = cls.from_linear(dense, **options)
    nearest = layer.dequantize()
    factor, damping = factor_of(hessian.matrix, 0.01)
    quantize_with(layer, dense.weight, factor, torch.arange(64))
    assert damping == 0.01 and torch.equal(layer.dequantize()[:, [0, 3, 50, 63]], nearest[:, [0, 3, 50, 63]])
    exact = x @ dense.weight.T
    assert (x @ layer.dequantize().T - exact).norm() < 0.75 * (x @ nearest.T - exact).norm()
    many = Hessian(64, x.device)
    many.add(torch.randn(300, 64) * (x[0] != 0))
    assert factor_of(many.matrix, 0.0)[1] == 0.0  # it is not singular without them
    nothing, _ = factor_of(torch.zeros(64, 64), 0.01)
    quantize_with(layer, dense.weight, nothing, torch.arange(64))
    assert torch.equal(layer.dequantize(), nearest)
