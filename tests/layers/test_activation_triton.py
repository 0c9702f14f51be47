"""The activations' kernels against PyTorch in fp64: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from cases.triton import DEVICE, GuardedAllocations, in_a_sea_of_nan, triton
from pynlp.kernels.common.random import drop
from pynlp.kernels.layers import activation
from triton import language as tl

from pynlp.reference.common.random import MASK, dropped_parts, keeps, philox
from pynlp.reference.layers.activation import KINDS

SEED = -(3**37)
CASES = {
    "gelu": dict(kind="gelu"),
    "gelu_dropout": dict(kind="gelu", dropout=0.3),
    "relu": dict(kind="relu"),
    "relu_dropout": dict(kind="relu", dropout=0.5),
    "swiglu": dict(kind="swiglu", separate=True),
    "swiglu_dropout": dict(kind="swiglu", separate=True, dropout=0.1),
    "swiglu_packed": dict(kind="swiglu"),
    "swiglu_packed_dropout": dict(kind="swiglu", dropout=0.9),
}


def make_case(kind, columns, rows=(5, 3), separate=False, dropout=0.0, dtype=torch.float32):
    """(grad, x, up), and the options kind, dropout_p and seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(size):
        return (2 * torch.randn(*rows, size, generator=generator)).to(dtype).to(DEVICE)

    x = normal(2 * columns if kind == "swiglu" and not separate else columns)
    options = (KINDS.index(kind), dropout, torch.tensor([SEED], device=DEVICE) if dropout else None)
    return (normal(columns), x, normal(columns) if separate else None), options


def among_nan(x):
    """x (.., columns) with NaN between its rows, which lie at one stride."""
    return None if x is None else in_a_sea_of_nan(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def run_kernels(tensors, options):
    """The launchers on poisoned inputs and guarded outputs: out, and the gradients of x and up."""
    grad, x, up = map(among_nan, tensors)
    allocations = GuardedAllocations()
    with allocations.active():
        out = activation.activation_forward(x, up, *options)
        gradients = activation.activation_backward(grad, x, up, *options)
    allocations.check()
    return out, *gradients


def pytorch(tensors, options):
    """The same from PyTorch's operators and autograd, in the tensors' dtype."""
    grad, x, up = (None if t is None else t.detach().requires_grad_() for t in tensors)
    kind, dropout_p, seed = options
    gate, other = x.chunk(2, dim=-1) if KINDS[kind] == "swiglu" and up is None else (x, up)
    out = F.silu(gate) * other if KINDS[kind] == "swiglu" else getattr(F, KINDS[kind])(gate)
    if dropout_p:
        kept = keeps(seed, dropout_p, out.numel() // out.shape[-1], out.shape[-1]).view(out.shape)
        out = out * kept / (1 - dropped_parts(dropout_p) / 65536)
    leaves = [x] if up is None else [x, up]
    grad_x, *grad_up = torch.autograd.grad(out, leaves, grad)
    return out.detach(), grad_x, grad_up[0] if grad_up else torch.empty(0, device=DEVICE)


def check(tensors, options):
    """Errors at most twice (gradients: three times) those of PyTorch, and half a unit in the last place of dtype and of
    fp32, in which ours computes."""
    ours, theirs = run_kernels(tensors, options), pytorch(tensors, options)
    exact = pytorch([None if t is None else t.double() for t in tensors], options)
    dtype = tensors[1].dtype
    for name, x, e, p in zip(("out", "grad_x", "grad_up"), ours, exact, theirs, strict=True):
        assert x.dtype == dtype and x.shape == e.shape, name
        size, _ = errors(e, torch.zeros_like(e))
        allowed = (2 if name == "out" else 3) * errors(p, e)[0]
        allowed += (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps) / 2 * size
        assert errors(x, e)[0] <= allowed, f"{name}: error {errors(x, e)[0]:.3g}, allowed {allowed:.3g}"
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 20, 100, 256, 1000, 2056])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_match_pytorch(name, columns, dtype):
    check(*make_case(**CASES[name], columns=columns, dtype=dtype))


@pytest.mark.parametrize("rows", [(1,), (300,), (7, 1, 43)])
def test_rows_of_any_shape(rows):
    check(*make_case("swiglu", 33, rows, dropout=0.2))


@pytest.mark.parametrize("rows", [(), (1,), (0,), (3, 0, 2)])
def test_one_row_and_none(rows):
    """Also a row without dimensions around it."""
    x = torch.randn(*rows, 24, device=DEVICE)
    for kind, name in enumerate(KINDS[:2]):
        out = activation.activation_forward(x, None, kind, 0.0, None)
        grad_x, _ = activation.activation_backward(x, x, None, kind, 0.0, None)
        leaf = x.double().requires_grad_()
        expected = getattr(F, name)(leaf)
        expected.backward(x.double())
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(grad_x.double(), leaf.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dropout_p", [0.001, 0.4, 0.99999])
@pytest.mark.parametrize("columns", [20, 2056])
def test_the_values_that_the_reference_drops(columns, dropout_p):
    """A ReLU of ones shows them, forward and backward."""
    x = torch.ones(40, columns, device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    expected = keeps(seed, dropout_p, 40, columns) / (1 - dropped_parts(dropout_p) / 65536)
    out = activation.activation_forward(x, None, KINDS.index("relu"), dropout_p, seed)
    grad_x, _ = activation.activation_backward(x, x, None, KINDS.index("relu"), dropout_p, seed)
    torch.testing.assert_close(out, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(grad_x, expected, atol=0, rtol=1e-6)


@triton.jit
def drop_kernel(p_x, p_row, p_seed, dropped, kept_share, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b_row = tl.load(p_row + tl.arange(0, ROWS))
    b_x = drop(tl.full([ROWS, COLUMNS], 1.0, tl.float32), p_seed, b_row, 8, dropped, kept_share)
    tl.store(p_x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], b_x)


def test_rows_and_columns_have_draws_of_their_own():
    """Also rows of which only the upper half of the number differs, more than memory holds."""
    row = torch.tensor([5, 5 + 2**32, 5 + 3 * 2**32, 2**31 + 5], device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    ours = torch.empty(4, 64, device=DEVICE)
    drop_kernel[(1,)](ours, row, seed, 20000, 0.5, ROWS=4, COLUMNS=64)
    draw = torch.arange(1, 9, device=DEVICE)
    counters = (draw, row[:, None] & MASK, row[:, None] >> 32, torch.ones_like(draw))
    words = torch.stack(philox(counters, (seed & MASK, seed >> 32 & MASK)), dim=-1)  # (4, 8, 4)
    kept = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1) >= 20000
    assert torch.equal(ours, 2.0 * kept)


def test_relu_keeps_nan():
    x = torch.tensor([[torch.nan, -1.0, 0.0, 2.0, torch.inf, -torch.inf]], device=DEVICE)
    out = activation.activation_forward(x, None, KINDS.index("relu"), 0.0, None)
    grad_x, _ = activation.activation_backward(torch.ones_like(x), x, None, KINDS.index("relu"), 0.0, None)
    torch.testing.assert_close(out, F.relu(x), equal_nan=True)
    assert grad_x.tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0, 0.0]]
