"""GELU, ReLU and SwiGLU with dropout: values and gradients at every instruction set, and the contract."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases.layers import assert_as_accurate, outputs_and_gradients
from cases.pairs import every_pair
from pynlp.kernels.layers import activation as kernels
from torch import Tensor

from pynlp.functional import gelu, relu, swiglu
from pynlp.reference.common.random import dropped_parts, keeps
from pynlp.reference.layers.activation import KINDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SEED = -98765432109876543
SHAPES = [(3, 5, 256), (37, 100), (2, 0, 20), (5, 1), (1000, 7), (4, 1000), (130,)]
FUSED = {"gelu": gelu, "relu": relu, "swiglu": swiglu}


def test_every_back_end_numbers_the_kinds_alike():
    header = (Path(__file__).parents[2] / "csrc/layers/layers.h").read_text()
    native = re.search(r"enum class Activation \{ (.*?) \}", header).group(1).split(", ")
    assert list(KINDS) == list(kernels.KINDS) == native


def eager(kind: str, dropout_p: float):
    """PyTorch's operations, one after the other, in the dtype of their input."""

    def function(x, up=None):
        if kind == "swiglu":
            gate, other = x.chunk(2, dim=-1) if up is None else (x, up)
            result = F.silu(gate) * other
        else:
            result = F.gelu(x) if kind == "gelu" else F.relu(x)
        if not dropout_p:
            return result
        kept = keeps(torch.tensor([SEED]), dropout_p, result.numel() // result.shape[-1], result.shape[-1])
        return result * kept.view(result.shape) / (1 - dropped_parts(dropout_p) / 65536)

    return function


def fused(kind: str, dropout_p: float):
    return lambda x, *up: FUSED[kind](x, *up, dropout_p=dropout_p, seed=SEED)


@pytest.mark.every_isa
@every_pair(kind=["gelu", "relu"], shape=SHAPES, dtype=[FP32, BF16, FP16], dropout_p=[0.0, 0.3])
def test_values_and_gradients(kind, shape, dtype, dropout_p, isa):
    x = (torch.randn(shape) * 3).to(dtype)
    assert_as_accurate(fused(kind, dropout_p), eager(kind, dropout_p), {"x": x})


@pytest.mark.every_isa
@every_pair(packed=[True, False], shape=SHAPES, dtype=[FP32, BF16, FP16], dropout_p=[0.0, 0.3])
def test_swiglu(packed, shape, dtype, dropout_p, isa):
    *rows, columns = shape
    gate = (torch.randn(*rows, (2 if packed else 1) * columns) * 3).to(dtype)
    tensors = {"x": gate} if packed else {"x": gate, "up": torch.randn(shape).to(dtype)}

    def function(x, up=None):
        return swiglu(x, up, dropout_p=dropout_p, seed=SEED)

    assert_as_accurate(function, eager("swiglu", dropout_p), tensors)


@pytest.mark.every_isa
def test_every_float_of_a_range(isa):
    """GELU and its slope over 14 standard deviations, to 2 units in the last place of max(1, |x|)."""
    x = torch.linspace(-14, 14, 20001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(gelu(x).sum(), x)
    (expected,) = torch.autograd.grad(F.gelu(exact).sum(), exact)
    size = exact.detach().abs().clamp_min(1)
    assert ((gelu(x) - F.gelu(exact)).abs() / size).max() <= 2 * torch.finfo(FP32).eps
    assert ((ours - expected).abs() / size).max() <= 2 * torch.finfo(FP32).eps


@pytest.mark.every_isa
def test_values_at_the_ends(isa):
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e30, -1e30, infinity, nan])
    torch.testing.assert_close(gelu(x), torch.tensor([0, 0, 40, 0, 1e30, 0, infinity, nan]), equal_nan=True)
    torch.testing.assert_close(relu(x), torch.tensor([0, 0, 40, 0, 1e30, 0, infinity, nan]), equal_nan=True)
    silu = [0, 0, 40, -40 * math.exp(-40), 1e30, 0, infinity, nan]
    torch.testing.assert_close(swiglu(x, torch.ones(8)), torch.tensor(silu), equal_nan=True, rtol=1e-5, atol=0)


def test_halves_and_strided_rows():
    """The halves of a projection, as views or packed, give the same; so do rows of a wider tensor and copies."""
    x = torch.randn(6, 4, 96)
    for dropout_p in (0.0, 0.4):
        packed = outputs_and_gradients(lambda x, p=dropout_p: swiglu(x, dropout_p=p, seed=3), {"x": x})
        halves = outputs_and_gradients(lambda x, p=dropout_p: swiglu(*x.chunk(2, -1), dropout_p=p, seed=3), {"x": x})
        assert all(torch.equal(halves[name], value) for name, value in packed.items())
    for view in (x[..., 32:64], x.transpose(0, 1)[..., :32], x[..., ::3]):
        assert torch.equal(gelu(view), gelu(view.contiguous()))


def test_same_bits_at_any_number_of_threads(isa):
    x = torch.randn(301, 136).bfloat16()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(fused("swiglu", 0.2), {"x": x}))
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


def test_dropout_is_that_of_its_seed(isa):
    expected = keeps(torch.tensor([11]), 0.25, 50, 77) / (1 - dropped_parts(0.25) / 65536)
    torch.testing.assert_close(relu(torch.ones(50, 77), dropout_p=0.25, seed=11), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu"])
def test_gradcheck_opcheck_and_compile(kind):
    x = torch.randn(4, 10, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(fused(kind, 0.4), (x,))
    up = torch.randn(4, 10, requires_grad=True) if kind == "swiglu" else None
    arguments = (torch.randn(4, 10, requires_grad=True), up, list(FUSED).index(kind), 0.3, torch.tensor([5]))
    torch.library.opcheck(torch.ops.pynlp.activation_forward, arguments)
    function = fused(kind, 0.3)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), {"x": x.float()})
    for name, value in outputs_and_gradients(function, {"x": x.float()}).items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (gelu, (torch.tensor(1.0),), ValueError, r"x: expected shape \(.., dim\), got a tensor without dimensions"),
        (relu, (torch.ones(3, dtype=torch.int32),), TypeError, "x: expected dtype float32, .* got torch.int32"),
        (swiglu, (torch.ones(2, 5),), ValueError, r"gate: expected shape \(.., 2 \* dim\) without up, got \(2, 5\)"),
        (swiglu, (torch.ones(2, 5), torch.ones(2, 4)), ValueError, r"up: expected shape \(2, 5\), got \(2, 4\)"),
        (swiglu, (torch.ones(5), torch.ones(5).half()), TypeError, "up: expected gate's dtype torch.float32, got"),
    ],
)
def test_bad_arguments_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_bad_dropout_is_named():
    with pytest.raises(ValueError, match="dropout_p: expected at least 0 and less than 1, got 1.5"):
        gelu(torch.ones(3), dropout_p=1.5)


def test_double_backward_is_refused():
    x: Tensor = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
