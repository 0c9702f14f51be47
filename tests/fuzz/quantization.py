"""Quantized weights drawn from all formats, sizes and values: the reference's bytes, products near those in fp64."""

import dataclasses
import math

import torch
from fuzz.draws import Machine, dtypes, generator_seeds, lengths, machines
from hypothesis import strategies
from torch import Tensor

from pynlp.functional import (
    dequantize_4bit,
    dequantize_int4,
    dequantize_int8,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    linear_4bit,
    quantize_4bit,
    quantize_int4,
    quantize_int8,
)
from pynlp.ops.quantization.formats import BLOCKSIZES, tensors_of
from pynlp.ops.quantization.integers import GRANULARITIES, SCHEMES
from pynlp.reference.quantization import formats as reference
from pynlp.reference.quantization import integers as integers_reference
from pynlp.reference.quantization.formats import QUANT_TYPES


@dataclasses.dataclass(frozen=True)
class Call:
    """A weight (outputs, columns), and a product of it and of `rows` rows."""

    quant_type: str
    blocksize: int
    double_quant: bool
    rows: int
    outputs: int
    columns: int
    dtype: torch.dtype
    spread: float  # of the magnitudes, in powers of ten
    gap: int  # between rows of x
    bias: bool
    seed: int
    machine: Machine


@strategies.composite
def calls(draw) -> Call:
    quant_type = draw(strategies.sampled_from(QUANT_TYPES))
    is_mx = quant_type == "mxfp4"
    return Call(
        quant_type,
        32 if is_mx else draw(strategies.sampled_from(BLOCKSIZES)),
        False if is_mx else draw(strategies.booleans()),
        draw(strategies.integers(0, 20) | lengths),
        draw(lengths),
        draw(lengths | strategies.sampled_from((512, 520, 1056))),
        draw(dtypes),
        draw(strategies.sampled_from((0.0, 0.0, 1.0, 4.0))),
        draw(strategies.integers(0, 3)),
        draw(strategies.booleans()),
        draw(generator_seeds),
        draw(machines),
    )


def check_four_bit(call: Call) -> None:
    generator = torch.Generator().manual_seed(call.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kind = QUANT_TYPES.index(call.quant_type)
    magnitudes = 10 ** (-call.spread * torch.rand(call.outputs, 1, generator=generator))
    dense = randn(call.outputs, call.columns) * magnitudes
    x = randn(call.rows, call.columns + call.gap)[:, : call.columns].to(call.dtype)
    bias = randn(call.outputs) if call.bias else None
    grad = randn(call.rows, call.outputs).to(call.dtype)
    options = dict(quant_type=call.quant_type, blocksize=call.blocksize)
    with call.machine.used():
        packed, state = quantize_4bit(dense, **options)
        ours_bytes = packed, state.absmax
        packed, state = quantize_4bit(dense, **options, double_quant=call.double_quant)
        values = dequantize_4bit(packed, state)
        leaf = x.detach().requires_grad_()
        y = linear_4bit(leaf, packed, state, bias)
        (grad_x,) = torch.autograd.grad(y, leaf, grad)

    for ours, expected in zip(ours_bytes, reference.quantize_4bit(dense, call.blocksize, kind), strict=True):
        assert torch.equal(ours, expected)
    count = dense.numel()
    expected = reference.dequantize_4bit(*tensors_of(packed, state), count, call.blocksize, kind, torch.float32)
    assert torch.equal(values, expected.view_as(dense))

    weight = dequantize_4bit(packed, state, dtype=torch.float64)
    offset = 0 if bias is None else bias.double()
    assert_near(y, x.double() @ weight.T + offset, x.double().abs() @ weight.abs().T + abs(offset), call.columns)
    assert_near(grad_x, grad.double() @ weight, grad.double().abs() @ weight.abs(), call.outputs)


OF_BITS = {
    8: (quantize_int8, dequantize_int8, int8_linear),
    4: (quantize_int4, dequantize_int4, int4_linear),
}


@dataclasses.dataclass(frozen=True)
class IntegerCall:
    """A weight (outputs, columns) of integers, and products of it and of `rows` rows."""

    bits: int
    scheme: str
    granularity: str
    group_size: int | None
    rows: int
    outputs: int
    columns: int
    dtype: torch.dtype
    gap: int
    seed: int
    machine: Machine


@strategies.composite
def integer_calls(draw) -> IntegerCall:
    granularity = draw(strategies.sampled_from(GRANULARITIES))
    return IntegerCall(
        draw(strategies.sampled_from((8, 4))),
        draw(strategies.sampled_from(SCHEMES)),
        granularity,
        draw(strategies.sampled_from((16, 32, 48, 128))) if granularity == "group" else None,
        draw(strategies.integers(0, 20) | lengths),
        draw(lengths),
        draw(lengths | strategies.sampled_from((512, 520, 1056))),
        draw(dtypes),
        draw(strategies.integers(0, 3)),
        draw(generator_seeds),
        draw(machines),
    )


def check_integers(call: IntegerCall) -> None:
    generator = torch.Generator().manual_seed(call.seed)
    dense = torch.randn(call.outputs, call.columns, generator=generator) + 0.3
    x = torch.randn(call.rows, call.columns + call.gap, generator=generator)[:, : call.columns].to(call.dtype)
    grad = torch.randn(call.rows, call.outputs, generator=generator).to(call.dtype)
    options = dict(scheme=call.scheme, granularity=call.granularity, group_size=call.group_size)
    quantize, dequantize, linear = OF_BITS[call.bits]
    with call.machine.used():
        codes, state = quantize(dense, **options)
        values = dequantize(codes, state)
        leaf = x.detach().requires_grad_()
        y = linear(leaf, codes, state)
        (grad_x,) = torch.autograd.grad(y, leaf, grad)
        of_rounded = linear(x, codes, state, activations="int8")
        in_integers = int8_dynamic_linear(x, codes, state, outlier_threshold=2.5) if call.bits == 8 else None
    group = {"tensor": 0, "channel": max(1, call.columns), "group": call.group_size}[call.granularity]
    expected = integers_reference.quantize_integers(dense, call.bits, call.scheme == "affine", group)
    assert torch.equal(codes, expected[0]) and torch.equal(state.scale, expected[1])
    parts = codes, state.scale, state.zero_point, None, call.columns, state.group_size
    assert torch.equal(values, integers_reference.dequantize_integers(*parts, torch.float32))
    weight = dequantize(codes, state, dtype=torch.float64)
    assert_near(y, x.double() @ weight.T, x.double().abs() @ weight.abs().T, call.columns)
    assert_near(grad_x, grad.double() @ weight, grad.double().abs() @ weight.abs(), call.outputs)
    # In fp64 the reference rounds x to the same codes.
    largest = state.scale.max() if state.scale.numel() else 0.0
    room = x.double().abs() @ (weight.abs() + 16 * largest).T
    for result, x_group, threshold in ((of_rounded, 32, math.inf), (in_integers, 0, 2.5)):
        if result is not None:
            exact = integers_reference.dynamic_integer_linear(
                x.double(), *parts[:4], None, state.group_size, x_group, threshold
            )
            assert_near(result, exact, room, call.columns)


def assert_near(ours: Tensor, exact: Tensor, sizes: Tensor, terms: int) -> None:
    """Each value is off by a few roundings of its terms' sum, or in bf16 of the weights, and by its own."""
    unit = 2**-8 if ours.dtype == torch.bfloat16 else 2**-24 * (4 + 3 * terms**0.5)
    own = exact.abs() * torch.finfo(ours.dtype).eps / 2 + torch.finfo(ours.dtype).smallest_normal
    assert ours.shape == exact.shape and ((ours.double() - exact).abs() <= sizes * unit + own).all()
