"""Weights as integers of 8 and 4 bits: codes and values of each scheme, and linear layers against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.pairs import every_pair
from torch import Tensor

from benchmarks.measure import peak_memory
from pynlp.functional import (
    QuantStateInt4,
    QuantStateInt8,
    dequantize_int4,
    dequantize_int8,
    int4_linear,
    int8_linear,
    quantize_int4,
    quantize_int8,
)
from pynlp.reference.quantization import integers as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = ["symmetric", "affine"]
GRANULARITIES = [("tensor", 128), ("channel", 128), ("group", 16), ("group", 48), ("group", 128)]
QUANTIZE = {8: quantize_int8, 4: quantize_int4}
DEQUANTIZE = {8: dequantize_int8, 4: dequantize_int4}
LINEAR = {8: int8_linear, 4: int4_linear}
# (N, K): whole vectors and groups, and neither; nothing.
SHAPES = [(1, 1), (7, 33), (50, 64), (33, 96), (70, 1000), (3, 257), (130, 2112), (64, 0), (1, 0), (0, 32), (0, 0)]


def quantized(bits: int, scheme: str, granularity: tuple[str, int], x: Tensor) -> tuple:
    kind, size = granularity
    return QUANTIZE[bits](x, scheme=scheme, granularity=kind, group_size=size if kind == "group" else None)


@pytest.mark.every_isa
@every_pair(shape=SHAPES, bits=[8, 4], scheme=SCHEMES, granularity=GRANULARITIES, dtype=DTYPES)
def test_codes_and_values_are_the_references(shape, bits, scheme, granularity, dtype, isa):
    x = (torch.randn(shape) + 0.5).to(dtype)
    codes, state = quantized(bits, scheme, granularity, x)
    kind, size = granularity
    group = {"tensor": 0, "channel": shape[1] or 1, "group": size}[kind]
    expected, scale, zeros = reference.quantize_integers(x, bits, scheme == "affine", group)
    assert torch.equal(codes, expected) and torch.equal(state.scale, scale)
    assert state.zero_point is None if scheme == "symmetric" else torch.equal(state.zero_point, zeros)
    minimum = torch.randn_like(state.scale)
    for other in (
        state,
        state._replace(zero_point=None, minimum=minimum),
        state._replace(scale=state.scale.half()),
        state._replace(scale=state.scale.half(), zero_point=None, minimum=minimum.half()),
    ):
        values = DEQUANTIZE[bits](codes, other)
        expected = reference.dequantize_integers(codes, *other[-3:], shape[1], other.group_size, dtype)
        assert values.dtype == dtype and torch.equal(values, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_round_trip(granularity, scheme, bits):
    """Half a scale where nothing is clipped, which an affine zero point that was rounded does at one end."""
    x = (torch.randn(40, 200) + 1) * torch.logspace(-3, 3, 40)[:, None]
    codes, state = quantized(bits, scheme, granularity, x)
    scale = state.scale.repeat_interleave(state.group_size, dim=1)[:, :200]
    error = (DEQUANTIZE[bits](codes, state).double() - x).abs() / scale
    plain = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    clipped = torch.zeros_like(plain, dtype=torch.bool)
    if scheme == "affine":
        clipped = (plain == (127 if bits == 8 else 15)) | (plain == (-128 if bits == 8 else 0))
    assert error[~clipped.expand_as(error)].max() <= 0.5 + 1e-4 and error.max() <= 1 + 1e-4
    zero = torch.zeros(3, 32)
    zero[1, 5] = 2.0
    assert (DEQUANTIZE[bits](*QUANTIZE[bits](zero, scheme=scheme))[zero == 0] == 0).all()  # 0 stays 0


def test_known_codes():
    codes, state = quantize_int8(torch.tensor([[127.0, -63.5, 0.5, 1.5]]))
    assert codes.tolist() == [[127, -64, 0, 2]] and state.scale.tolist() == [[1.0]]  # to the even one
    codes, state = quantize_int8(torch.tensor([[0.0, 255.0, 1.0]]), scheme="affine")
    assert codes.tolist() == [[-128, 127, -127]] and state.zero_point.tolist() == [[-128]]
    codes, state = quantize_int8(torch.tensor([[1.0, 2.0], [-4.0, 0.0]]), granularity="tensor")
    assert state.scale.shape == (1, 1) and codes.tolist() == [[32, 64], [-127, 0]]
    codes, state = quantize_int4(torch.tensor([[7.0, -3.0, 0.5, 1.5, -7.0]]), scheme="symmetric")
    assert codes.tolist() == [[0x5F, 0xA8, 0x01]] and state.scale.tolist() == [[1.0]]
    codes, state = quantize_int4(torch.tensor([[-5.0, 10.0, 0.0]]))
    assert codes.tolist() == [[0xF0, 0x05]] and state.zero_point.tolist() == [[5]]
    state = QuantStateInt4(32, 2, torch.float32, torch.tensor([[0.5]]).half(), minimum=torch.tensor([[-3.0]]).half())
    assert dequantize_int4(torch.tensor([[0xF0]]).byte(), state).tolist() == [[-3.0, 4.5]]


@pytest.mark.every_isa
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e38, 1e-40, 1.4e-45])
def test_constant_huge_and_subnormal_values(value, scheme, bits, isa):
    x = torch.full((3, 40), value)
    x[1] *= -1
    codes, state = QUANTIZE[bits](x, scheme=scheme, granularity="channel")
    values = DEQUANTIZE[bits](codes, state)
    assert values.isfinite().all()
    torch.testing.assert_close(values, x, rtol=5e-3, atol=1e-43)
    expected = reference.quantize_integers(x, bits, scheme == "affine", 40)
    assert torch.equal(codes, expected[0]) and torch.equal(state.scale, expected[1])


@pytest.mark.every_isa
@every_pair(
    shape=SHAPES, bits=[8, 4], scheme=[*SCHEMES, "minimum"], granularity=GRANULARITIES, dtype=DTYPES, half=[False, True]
)
def test_linear(shape, bits, scheme, granularity, dtype, half, isa):
    """Output and gradients: 2 and 3 times the error that PyTorch's own product has in this dtype, at most."""
    outputs, columns = shape
    codes, state = quantized(bits, scheme.replace("minimum", "affine"), granularity, torch.randn(shape) + 0.3)
    if scheme == "minimum":
        state = state._replace(zero_point=None, minimum=-state.scale * state.zero_point)
    if half:
        state = state._replace(
            scale=state.scale.half(), minimum=None if state.minimum is None else state.minimum.half()
        )
    weight = DEQUANTIZE[bits](codes, state, dtype=torch.float64)
    bias = torch.randn(outputs)
    for rows in (0, 1, 2, 5, 8, 9, 17, 40):
        x = torch.randn(rows, columns + 3)[:, :columns].to(dtype)
        grad = torch.randn(rows, outputs).to(dtype)
        ours, leaf = x.detach().requires_grad_(), bias.clone().requires_grad_()
        y = LINEAR[bits](ours, codes, state, leaf)
        y.backward(grad)
        near = weight.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).float()
        exact, exact_grad = x.double() @ weight.T + bias.double(), grad.double() @ weight
        theirs, theirs_grad = F.linear(x.float(), near, bias).to(dtype), (grad.float() @ near).to(dtype)
        assert y.dtype == ours.grad.dtype == dtype and y.shape == exact.shape
        if y.numel():
            assert error(y, exact) <= 2 * error(theirs, exact) + 3e-7 * (1 + exact.abs().max())
        if x.numel():
            room = 3e-7 * (1 + exact_grad.abs().max())
            assert error(ours.grad, exact_grad) <= 3 * error(theirs_grad, exact_grad) + room
        torch.testing.assert_close(leaf.grad, grad.float().sum(0), rtol=1e-5, atol=1e-5)


def error(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_runs_and_strides(dtype, bits, isa):
    codes, state = quantized(bits, "affine", ("group", 64), torch.randn(300, 576))
    for rows in (1, 7, 30, 600):
        x, grad = torch.randn(rows, 576).to(dtype), torch.randn(rows, 300).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = x.clone().requires_grad_()
            y = LINEAR[bits](ours, codes, state)
            y.backward(grad)
            results.append((y, ours.grad))
        for y, grad_x in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])
        wide = torch.zeros(rows, 2, 600, dtype=dtype)
        wide[:, 1, :576] = x
        assert torch.equal(LINEAR[bits](wide[:, 1:, :576], codes, state)[:, 0], y)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradcheck_and_opcheck(bits):
    codes, state = quantized(bits, "affine", ("group", 16), torch.randn(7, 20))
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: LINEAR[bits](x, codes, state, bias), (x, bias))
    tensors = codes, state.scale, state.zero_point, None
    x = torch.randn(3, 20, requires_grad=True)
    ops = torch.ops.pynlp
    torch.library.opcheck(ops.integer_linear, (x, *tensors, torch.randn(7), 16))
    torch.library.opcheck(ops.dynamic_integer_linear, (x, *tensors, torch.randn(7), 16, 32, math.inf))
    torch.library.opcheck(ops.integer_linear_backward, (torch.randn(3, 7), *tensors, 20, 16))
    torch.library.opcheck(ops.quantize_integers, (torch.randn(3, 21), bits, True, 0))
    torch.library.opcheck(ops.dequantize_integers, (*tensors, 20, 16, torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_memory(bits):
    """No dense copy of a weight, which has 64 MiB in fp32, is made, forward or backward."""
    script = f"""
import torch
from pynlp.functional import int{bits}_linear as linear, quantize_int{bits} as quantize
torch.set_num_threads(2)
codes, state = quantize(torch.randn(4096, 4096))
x = torch.randn(32, 4096, requires_grad=True)
linear(x[:, :64], *quantize(torch.randn(64, 64))).sum().backward()  # what is allocated once
def measured():
    linear(x, codes, state).sum().backward()
    with torch.no_grad():
        linear(x[:1], codes, state)
"""
    assert peak_memory(script) < 8 * 2**20


CODES, STATE = quantize_int8(torch.randn(8, 64), scheme="affine", granularity="group", group_size=16)
BAD = {
    "x's width": (dict(x=torch.randn(2, 63)), ValueError, r"x: expected shape \(.., 64\), got \(2, 63\)"),
    "x's dtype": (dict(x=torch.ones(2, 64, dtype=torch.int64)), TypeError, "x: expected dtype float32, .*int64"),
    "no state": (dict(state=None), TypeError, "state: expected a QuantStateInt8, .*got NoneType"),
    "codes' dtype": (dict(codes=CODES.int()), TypeError, "codes: expected dtype int8, got torch.int32"),
    "codes' shape": (dict(codes=CODES[0]), ValueError, r"codes: expected shape \(N, K\), got \(64,\)"),
    "scale's shape": (
        dict(state=STATE._replace(scale=STATE.scale[:, :3])), ValueError, r"state.scale: expected shape \(8, 4\) .*8, 3"
    ),
    "scale's dtype": (
        dict(state=STATE._replace(scale=STATE.scale.bfloat16())), TypeError, "state.scale: expected dtype torch.float32"
    ),
    "one zero point": (
        dict(state=STATE._replace(group_size=64, scale=STATE.scale[:, :1], zero_point=STATE.zero_point[:1, :1])),
        ValueError, r"state.zero_point: expected scale's shape \(8, 1\), got \(1, 1\)",
    ),
    "group size": (
        dict(state=STATE._replace(group_size=20)), ValueError, "state.group_size: expected a multiple of 16, got 20"
    ),
    "two offsets": (
        dict(state=STATE._replace(minimum=STATE.scale)), ValueError, "state.minimum: expected None beside a zero_point"
    ),
    "activations": (dict(activations="int4"), ValueError, "activations: expected None or 'int8', got 'int4'"),
    "bias's size": (dict(bias=torch.randn(7)), ValueError, r"bias: expected shape \(8,\), got \(7,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    arguments = dict(x=torch.randn(2, 64), codes=CODES, state=STATE, bias=None) | changes
    with pytest.raises(error, match=message):
        int8_linear(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(scheme="signed"), ValueError, "scheme: expected 'symmetric', 'affine', got 'signed'"),
        (dict(granularity="row"), ValueError, "granularity: expected 'tensor', 'channel', 'group', got 'row'"),
        (dict(granularity="group", group_size=24), ValueError, "group_size: expected a multiple of 16, got 24"),
        (dict(group_size=32), ValueError, "group_size: expected None with granularity='channel', got 32"),
        (dict(x=torch.randn(4)), ValueError, r"x: expected shape \(N, K\), got \(4,\)"),
        (
            dict(x=torch.tensor([[1.0, math.nan]])),
            ValueError,
            "x: expected finite values in fp32, got NaN or an infinity",
        ),
        (dict(x=torch.tensor([[-math.inf, 1]]), scheme="affine"), ValueError, "x: expected finite values"),
        (dict(x=torch.tensor([[1]])), TypeError, "x: expected dtype float32, .*got torch.int64"),
    ],
)
def test_bad_values_to_quantize(options, error, message):
    options = dict(x=torch.randn(4, 32)) | options
    with pytest.raises(error, match=message):
        quantize_int8(options.pop("x"), **options)


def test_bad_arguments_of_4_bits():
    codes, state = quantize_int4(torch.randn(8, 63))
    x = torch.randn(2, 63)
    with pytest.raises(ValueError, match=r"codes: expected shape \(N, 32\) for state.columns 63, got \(8, 31\)"):
        int4_linear(x, codes[:, :31], state)
    with pytest.raises(TypeError, match="codes: expected dtype uint8, got torch.int8"):
        int4_linear(x, codes.char(), state)
    with pytest.raises(TypeError, match="state: expected a QuantStateInt4, .*got QuantStateInt8"):
        int4_linear(x, codes, QuantStateInt8(63, torch.float32, state.scale))
    with pytest.raises(TypeError, match="state.minimum: expected dtype torch.float32, got torch.float16"):
        int4_linear(x, codes, state._replace(zero_point=None, minimum=state.scale.half()))
