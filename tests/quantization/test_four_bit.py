"""Weights in 4 bits: bytes and values of each format, and linear layers against fp64."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases.pairs import every_pair
from torch import Tensor

from benchmarks.measure import peak_memory
from pynlp.functional import QuantState4bit, dequantize_4bit, linear_4bit, quantize_4bit
from pynlp.ops.quantization.formats import tensors_of
from pynlp.reference.quantization import formats as reference
from pynlp.reference.quantization.formats import QUANT_TYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# quant_type, blocksize, double_quant
FORMATS = [
    ("nf4", 64, False), ("nf4", 32, True), ("nf4", 4096, False), ("fp4", 64, True), ("fp4", 128, False),
    ("mxfp4", 32, False),
]  # fmt: skip
formats = pytest.mark.parametrize("form", FORMATS, ids=str)
# (N, K): whole blocks and units of 32; rows that begin inside of a block, of a unit, of a byte; nothing.
SHAPES = [(1, 1), (7, 33), (50, 64), (33, 96), (70, 1000), (3, 257), (130, 2112), (64, 0), (0, 32)]


def quantized(form, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, QuantState4bit]:
    quant_type, blocksize, double_quant = form
    return quantize_4bit(
        torch.randn(shape).to(dtype), quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
    )


@pytest.mark.every_isa
@dtypes
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_values_are_the_references(shape, form, dtype, isa):
    quant_type, blocksize, _ = form
    kind = QUANT_TYPES.index(quant_type)
    x = torch.randn(shape).to(dtype)
    packed, state = quantize_4bit(x, quant_type=quant_type, blocksize=blocksize)
    expected, scales = reference.quantize_4bit(x, blocksize, kind)
    assert torch.equal(packed, expected) and torch.equal(state.absmax, scales)

    packed, state = quantized(form, *shape, dtype=dtype)
    expected = reference.dequantize_4bit(*tensors_of(packed, state), x.numel(), blocksize, kind, dtype)
    values = dequantize_4bit(packed, state)
    assert values.dtype == dtype and torch.equal(values, expected.view(shape))


@pytest.mark.every_isa
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_what_lies_in_the_middle_of_two_codes(quant_type, isa):
    """Every threshold, what is just above and below it, and every code itself."""
    kind = QUANT_TYPES.index(quant_type)
    middles, codes = reference.thresholds(kind), torch.tensor(reference.FORMATS[kind].codes)
    near = [torch.nextafter(middles, torch.tensor(side)) for side in (-math.inf, math.inf)]
    largest = codes.abs().max()
    x = torch.cat((largest[None], middles, *near, codes, torch.tensor([0.0, -0.0])))
    packed, state = quantize_4bit(x, quant_type=quant_type, blocksize=32 if quant_type == "mxfp4" else 4096)
    expected, _ = reference.quantize_4bit(x, state.blocksize, kind)
    assert torch.equal(packed, expected)
    values = dequantize_4bit(packed, state)
    distance = (codes - x[:, None]).abs().min(dim=1).values
    torch.testing.assert_close((values - x).abs(), distance, rtol=0, atol=1e-7)


def test_known_bytes():
    packed, state = quantize_4bit(torch.tensor([-2.0, 2.0, 0.0]), quant_type="nf4")
    assert packed.tolist() == [[0x0F], [0x77]] and state.absmax.tolist() == [2.0]
    packed, state = quantize_4bit(torch.tensor([4.0, -0.5, 6.0]), quant_type="mxfp4")  # the first of two is low
    assert packed.tolist() == [[0x96], [0x07]] and state.absmax.tolist() == [127]
    # Section 5.3.3 of the OCP formats: to the even code.
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9])
    values = dequantize_4bit(*quantize_4bit(x, quant_type="mxfp4"))
    assert values.tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@formats
def test_round_trip(form):
    """A value is off by half of the widest gap of the codes at most; with double_quant by the scale's error, too."""
    quant_type, blocksize, double_quant = form
    x = torch.randn(40, 100) * torch.logspace(-3, 3, 40)[:, None]
    values = dequantize_4bit(*quantize_4bit(x, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant))
    codes = torch.tensor(reference.FORMATS[QUANT_TYPES.index(quant_type)].codes).sort().values
    gap = (codes.diff().max() / codes.abs().max()).item()
    if quant_type == "mxfp4":
        gap = 1.0  # what is between 6 and 8 times the scale is 6
    flat = F.pad(x.view(-1), (0, -x.numel() % blocksize)).view(-1, blocksize)
    allowed = (flat.abs().amax(dim=1) * gap / 2)[:, None].expand_as(flat).reshape(-1)[: x.numel()].view_as(x)
    if double_quant:  # a scale's error is a fiftieth of the largest one at most
        allowed = allowed + flat.abs().max() / 50
    assert ((values - x).abs() <= allowed * (1 + 1e-6)).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e38, 1e-40, 1.4e-45])
def test_constant_huge_and_subnormal_values(value, quant_type, isa):
    x = torch.full((3, 40), value)
    packed, state = quantize_4bit(x, quant_type=quant_type, blocksize=32)
    values = dequantize_4bit(packed, state)
    assert values.isfinite().all()
    if quant_type != "mxfp4":  # whose scales begin at 2^-127
        torch.testing.assert_close(values, x, rtol=1e-7, atol=0)
    assert torch.equal(packed, reference.quantize_4bit(x, 32, QUANT_TYPES.index(quant_type))[0])
    assert linear_4bit(torch.ones(2, 40), packed, state).isfinite().all() or abs(value) > 1


@pytest.mark.every_isa
@every_pair(shape=SHAPES, form=FORMATS, dtype=DTYPES)
def test_linear(shape, form, dtype, isa):
    """Output and gradients: 2 and 3 times the error that PyTorch's own product has in this dtype, at most."""
    outputs, columns = shape
    packed, state = quantized(form, *shape)
    weight = dequantize_4bit(packed, state, dtype=torch.float64)
    bias = torch.randn(outputs)
    for rows in (0, 1, 2, 5, 8, 9, 17, 40):
        x = torch.randn(rows, columns + 3)[:, :columns].to(dtype)
        grad = torch.randn(rows, outputs).to(dtype)
        ours, leaf = x.detach().requires_grad_(), bias.clone().requires_grad_()
        y = linear_4bit(ours, packed, state, leaf)
        y.backward(grad)
        exact = x.double() @ weight.T + bias.double()
        exact_grad = grad.double() @ weight
        theirs = F.linear(x.float(), weight.float(), bias).to(dtype)
        theirs_grad = (grad.float() @ weight.float()).to(dtype)
        if dtype == torch.bfloat16:  # products of bf16 weights, where the CPU has them
            theirs = F.linear(x.float(), weight.bfloat16().float(), bias).to(dtype)
            theirs_grad = (grad.float() @ weight.bfloat16().float()).to(dtype)
        assert y.dtype == ours.grad.dtype == dtype and y.shape == exact.shape
        if y.numel():
            assert error(y, exact) <= 2 * error(theirs, exact) + 3e-7 * (1 + exact.abs().max())
        if x.numel():
            assert error(ours.grad, exact_grad) <= 3 * error(theirs_grad, exact_grad) + 3e-7 * (
                1 + exact_grad.abs().max()
            )
        torch.testing.assert_close(leaf.grad, grad.float().sum(0), rtol=1e-5, atol=1e-5)


def error(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).square().mean().sqrt()


@dtypes
def test_threads_runs_and_strides(dtype, isa):
    packed, state = quantized(("nf4", 64, True), 300, 576)
    for rows in (1, 7, 30, 600):
        x, grad = torch.randn(rows, 576).to(dtype), torch.randn(rows, 300).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = x.clone().requires_grad_()
            y = linear_4bit(ours, packed, state)
            y.backward(grad)
            results.append((y, ours.grad))
        for y, grad_x in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])
        wide = torch.zeros(rows, 2, 600, dtype=dtype)
        wide[:, 1, :576] = x
        assert torch.equal(linear_4bit(wide[:, 1:, :576], packed, state)[:, 0], y)
        columns = x.t().contiguous().t()
        assert torch.equal(linear_4bit(columns, packed, state), y)


def test_gradcheck_and_opcheck():
    packed, state = quantized(("nf4", 32, True), 7, 20)
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: linear_4bit(x, packed, state, bias), (x, bias))
    tensors = tensors_of(packed, state)
    x = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.pynlp.linear_4bit, (x, *tensors, torch.randn(7), 7, 32, 0))
    torch.library.opcheck(torch.ops.pynlp.linear_4bit_backward, (torch.randn(3, 7), *tensors, 20, 32, 0))
    torch.library.opcheck(torch.ops.pynlp.quantize_4bit, (torch.randn(3, 20), 32, 2))
    torch.library.opcheck(torch.ops.pynlp.dequantize_4bit, (*tensors, 140, 32, 0, torch.float16))


def test_double_quantization_is_compiled_and_takes_numpys_integers():
    x = torch.randn(40, 64)
    packed, state = torch.compile(lambda x: quantize_4bit(x, double_quant=True), fullgraph=True, backend="eager")(x)
    expected, other = quantize_4bit(x, double_quant=True, blocksize=numpy.int64(64))
    assert torch.equal(packed, expected) and torch.equal(state.absmax, other.absmax)
    with pytest.raises(TypeError, match="dtype: expected float32, .*got torch.int8"):
        dequantize_4bit(packed, other, dtype=torch.int8)


def test_autocast():
    packed, state = quantized(("nf4", 64, False), 50, 64)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_4bit(x, packed, state, torch.randn(50))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.slow
def test_memory():
    """No dense copy of a weight, which has 64 MiB in fp32, is made, forward or backward."""
    script = """
import torch
from pynlp.functional import linear_4bit, quantize_4bit
torch.set_num_threads(2)
packed, state = quantize_4bit(torch.randn(4096, 4096))
x = torch.randn(32, 4096, requires_grad=True)
linear_4bit(x[:, :64], *quantize_4bit(torch.randn(64, 64))).sum().backward()  # what is allocated once
def measured():
    linear_4bit(x, packed, state).sum().backward()
    with torch.no_grad():
        linear_4bit(x[:1], packed, state)
"""
    assert peak_memory(script) < 8 * 2**20


GOOD = quantize_4bit(torch.randn(8, 64))
BAD = {
    "x's width": (dict(x=torch.randn(2, 63)), ValueError, r"x: expected shape \(.., 64\), got \(2, 63\)"),
    "x's dtype": (dict(x=torch.ones(2, 64, dtype=torch.int64)), TypeError, "x: expected dtype float32, .*int64"),
    "no tensor": (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    "no state": (dict(state=None), TypeError, "state: expected a QuantState4bit, .*got NoneType"),
    "packed's size": (dict(packed=GOOD[0][1:]), ValueError, r"packed: expected 256 bytes for .*\(8, 64\), got 255"),
    "packed's shape": (dict(packed=GOOD[0].view(8, 32)), ValueError, r"packed: expected shape \(n, 1\), .*\(8, 32\)"),
    "packed's dtype": (dict(packed=GOOD[0].int()), TypeError, "packed: expected dtype uint8, got torch.int32"),
    "unknown type": (
        dict(state=GOOD[1]._replace(quant_type="nf5")), ValueError, "quant_type: expected 'nf4', .*got 'nf5'"
    ),
    "absmax's dtype": (
        dict(state=GOOD[1]._replace(absmax=GOOD[1].absmax.half())), TypeError, "state.absmax: expected dtype .*float32"
    ),
    "absmax's size": (
        dict(state=GOOD[1]._replace(absmax=GOOD[1].absmax[1:])), ValueError, "state.absmax: expected 8 values, got 7"
    ),
    "half of a nested state": (
        dict(state=GOOD[1]._replace(absmax=GOOD[1].absmax.byte(), nested_absmax=torch.ones(1))),
        TypeError, "state.nested_offset: expected a tensor, got NoneType",
    ),
    "a cube": (
        dict(state=GOOD[1]._replace(shape=(2, 4, 64))), ValueError, r"state: expected a weight of shape \(N, K\)"
    ),
    "bias's size": (dict(bias=torch.randn(7)), ValueError, r"bias: expected shape \(8,\), got \(7,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    arguments = dict(x=torch.randn(2, 64), packed=GOOD[0], state=GOOD[1], bias=None) | changes
    with pytest.raises(error, match=message):
        linear_4bit(**arguments)


def test_scales_whose_sum_is_infinite():
    packed, state = quantize_4bit(torch.full((8, 64), 1e38), double_quant=True)
    assert torch.equal(dequantize_4bit(packed, state), torch.full((8, 64), 1e38))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(quant_type="int4"), ValueError, "quant_type: expected 'nf4', 'fp4', 'mxfp4', got 'int4'"),
        (dict(blocksize=48), ValueError, "blocksize: expected 32, 64, .*4096 with quant_type='nf4', got 48"),
        (dict(quant_type="mxfp4", blocksize=64), ValueError, "blocksize: expected 32 with quant_type='mxfp4', got 64"),
        (dict(blocksize="64"), TypeError, "blocksize: expected an int, got str"),
        (dict(blocksize=64.0), TypeError, "blocksize: expected an int, got float"),
        (dict(double_quant="yes"), TypeError, "double_quant: expected True or False, got 'yes'"),
        (dict(quant_type="mxfp4", double_quant=True), ValueError, "double_quant: expected False with"),
        (
            dict(x=torch.tensor([1.0, math.nan])),
            ValueError,
            "x: expected finite values in fp32, got NaN or an infinity",
        ),
        (dict(x=torch.tensor([math.inf])), ValueError, "x: expected finite values"),
        (dict(x=torch.tensor([-math.inf, 1]), quant_type="mxfp4"), ValueError, "x: expected finite values"),
        (dict(x=torch.tensor([1])), TypeError, "x: expected dtype float32, .*got torch.int64"),
    ],
)
def test_bad_values_to_quantize(options, error, message):
    options = dict(x=torch.randn(4)) | options
    with pytest.raises(error, match=message):
        quantize_4bit(options.pop("x"), **options)
