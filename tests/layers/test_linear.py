"""Linear layers of few rows: values at every instruction set, and where PyTorch's own product serves."""

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from torch import Tensor, nn

import pynlp
from pynlp.functional import linear
from pynlp.nn import Linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (rows, K, N): of one row, of a whole number of vectors, of neither; tails of each kind; more than one chunk of rows.
SHAPES = [
    (1, 256, 512),
    (3, 999, 101),
    (6, 70, 40),
    (16, 64, 300),
    (32, 256, 256),
    (33, 130, 65),
    (100, 1030, 70),
    (120, 2060, 9),
    (700, 300, 9),
]


def ops_of(call) -> set[str]:
    """Names of all ops in a call, those that native code calls included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def fused_calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of x with which the op has been called."""
    calls, op = [], torch.ops.pynlp.linear

    def counted(x: Tensor, *others):
        calls.append(tuple(x.shape))
        return op(x, *others)

    monkeypatch.setattr("pynlp.ops.layers.linear.torch.ops.pynlp.linear", counted)
    return calls


def most_rows(isa: str) -> int:
    """The rows up to which the native kernel serves."""
    return 128 if isa in ("portable", "avx2") else 2048


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values(shape, bias, isa):
    rows, depth, outputs = shape
    x, weight = torch.randn(rows, depth), torch.randn(outputs, depth)
    offset = torch.randn(outputs) if bias else None
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    ours, peer = torch.ops.pynlp.linear(x, weight, offset), F.linear(x, weight, offset)
    handed_on = "pynlp::linear_reference" in ops_of(lambda: torch.ops.pynlp.linear(x, weight, offset))
    assert handed_on == (rows > most_rows(isa))
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    for error, missed in zip(errors(ours, exact), errors(peer, exact), strict=True):
        assert error <= 2 * missed


@pytest.mark.parametrize("sizes", [(0, 256), (2, 0, 256), (256,), (2, 3, 4, 256)])
def test_any_number_of_dimensions(sizes):
    x, weight = torch.randn(sizes), torch.randn(600, 256)
    exact = F.linear(x.double(), weight.double()).float()
    for y in (linear(x, weight), torch.ops.pynlp.linear(x, weight, None)):
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-4)


def test_nothing_to_give(isa):
    assert torch.ops.pynlp.linear(torch.randn(5, 8), torch.randn(0, 8), None).shape == (5, 0)


def test_strided_rows(fused_calls):
    """Halves of a wider tensor, and what is no row at all, give what copies of them give."""
    x, weight = torch.randn(8, 6, 512), torch.randn(300, 600)
    for view in (x[..., 256:], x.transpose(0, 1)[..., :256], x[..., ::2]):
        assert torch.equal(linear(view, weight[:, 44:300]), linear(view.contiguous(), weight[:, 44:300].contiguous()))
    assert len(fused_calls) == 6


def test_a_row_has_the_same_bits_in_every_batch_and_with_any_threads(isa):
    x, weight, bias = torch.randn(70, 512), torch.randn(333, 512), torch.randn(333)
    together = linear(x, weight, bias)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for some in (x, x[:1], x[31:33], x[5:50]):
            first = int((x == some[0]).all(dim=1).nonzero())
            assert torch.equal(linear(some, weight, bias), together[first : first + len(some)])


def test_special_values_stay_in_their_rows(isa):
    x, weight = torch.randn(20, 100), torch.randn(200, 100)
    x[3, 5], weight[7, 9], x[4, 9] = float("nan"), float("inf"), 0.0
    y = linear(x, weight)
    assert torch.equal(y.isnan(), F.linear(x, weight).isnan()) and y[:, :7].isnan().sum() == 7
    assert torch.equal(y.isinf(), F.linear(x, weight).isinf())


def test_where_pytorch_serves(fused_calls):
    """Gradients, other dtypes, autocast, tiny products and those of many rows are F.linear's, to the bit."""
    layer = Linear(256, 256)
    peer = nn.Linear(256, 256)
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(64, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), peer(x))
    weighted = torch.randn(64, 256)
    ours, theirs = (
        torch.autograd.grad((module(x) * weighted).sum(), list(module.parameters())) for module in (layer, peer)
    )
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        assert torch.equal(layer(x[:1]), peer(x[:1]))
        assert torch.equal(layer.double()(x.double()), peer.double()(x.double()))
        assert not fused_calls
        layer.float()(x)
        assert fused_calls == [(64, 256)]
        many = x.repeat(33, 1)
        assert torch.equal(layer(many), peer.float()(many))


@pytest.mark.every_isa
def test_most_rows(isa):
    """PyTorch's product is the faster one beyond, without AVX-512 from fewer rows on."""
    most, weight = most_rows(isa), torch.randn(256, 256)
    assert "pynlp::linear_reference" not in ops_of(lambda: linear(torch.randn(most, 256), weight))
    x = torch.randn(most + 1, 256)
    assert "pynlp::linear_reference" in ops_of(lambda: linear(x, weight))
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_bad_shape_is_pytorchs_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Linear(256, 256)(torch.randn(64, 255))


def test_opcheck_and_compile():
    x, weight, bias = torch.randn(200, 128), torch.randn(130, 128), torch.randn(130)
    torch.library.opcheck(torch.ops.pynlp.linear, (x, weight, bias))
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        for rows in (x, x[:40]):
            assert torch.equal(compiled(rows, weight, bias), linear(rows, weight, bias))


def test_native_kernel_is_there():
    assert pynlp.info()["back ends"]["linear"]["cpu"].startswith("native")
