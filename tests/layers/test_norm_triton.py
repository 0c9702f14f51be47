"""The norms' kernels against PyTorch in fp64: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from cases.triton import DEVICE, GuardedAllocations, in_a_sea_of_nan
from pynlp.kernels.layers import norm

from pynlp.reference.common.random import dropped_parts, keeps

SEED = 2**40 + 5
EPS = 1e-5
NAMES = ("y", "new", "mean", "rstd", "grad_residual", "grad_x", "grad_weight", "grad_bias")
# Of the residual: none, in x's dtype, in fp32.
RESIDUALS = (None, "same", "wide")
CASES = list(itertools.product([True, False], RESIDUALS, [0.0, 0.3], [True, False], [True, False]))


def make_case(
    columns, rows=(5, 3), centred=True, residual=None, dropout=0.0, has_bias=True, has_grad_new=True,
    dtype=torch.float32, offset=0.0,
):  # fmt: skip
    """(x, residual, weight, bias, grad_y, grad_new), and the options centred, dropout_p and seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    new_dtype = torch.float32 if residual == "wide" else dtype
    tensors = (
        (normal(*rows, columns) + offset).to(dtype),
        normal(*rows, columns).to(new_dtype) if residual else None,
        normal(columns),
        normal(columns) if has_bias else None,
        normal(*rows, columns).to(dtype),
        normal(*rows, columns).to(new_dtype) if has_grad_new else None,
    )
    return tensors, (centred, dropout, torch.tensor([SEED], device=DEVICE) if dropout else None)


def among_nan(x):
    """x (.., columns) with NaN between its rows, which lie at one stride."""
    return None if x is None else in_a_sea_of_nan(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def run_kernels(tensors, options):
    """The launchers on poisoned inputs and guarded outputs, in the order of NAMES."""
    x, residual, weight, bias, grad_y, grad_new = tensors
    x, residual, grad_y, grad_new = map(among_nan, (x, residual, grad_y, grad_new))
    centred, dropout_p, seed = options
    allocations = GuardedAllocations()
    with allocations.active():
        y, new, mean, rstd = norm.norm_forward(x, residual, weight, bias, centred, EPS, dropout_p, seed)
        saved = new if new.shape == x.shape else x
        gradients = norm.norm_backward(
            grad_y, grad_new, saved, weight, mean, rstd, centred, dropout_p, seed, bias is not None
        )
    allocations.check()
    return y, new, mean, rstd, *gradients


def pytorch(tensors, options):
    """The same from PyTorch's operators and autograd, in the tensors' dtypes: None for what they do not give."""
    x, residual, weight, bias, grad_y, grad_new = tensors
    centred, dropout_p, seed = options
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    x, residual, weight, bias = leaves
    branch = x
    if dropout_p:
        kept = keeps(seed, dropout_p, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
        branch = x * kept / (1 - dropped_parts(dropout_p) / 65536)
    new = branch if residual is None else residual + branch
    # As a model in low precision has its parameters.
    scale, shift = weight.to(new.dtype), None if bias is None else bias.to(new.dtype)
    if centred:
        y = F.layer_norm(new, new.shape[-1:], scale, shift, EPS)
    else:
        y = F.rms_norm(new, new.shape[-1:], scale, EPS)
        y = y if bias is None else y + shift
    y = y.to(x.dtype)
    loss = (y.double() * grad_y).sum()
    if grad_new is not None:
        loss = loss + (new.double() * grad_new).sum()
    grads = iter(torch.autograd.grad(loss, [new, *(t for t in leaves if t is not None)]))
    grad_new = next(grads)
    grad_x, _, grad_weight, grad_bias = [None if t is None else next(grads) for t in leaves]
    values = new.detach()
    mean = values.mean(-1) if centred else None
    rstd = (((values - mean[..., None]) if centred else values).square().mean(-1) + EPS).rsqrt()
    return y.detach(), values, mean, rstd, grad_new, grad_x, grad_weight, grad_bias


def check(tensors, options):
    """Errors at most twice (gradients: three times) those of PyTorch, and half a unit in the last place of the result's
    dtype and of fp32, in which ours computes. What is not there is empty."""
    x, residual, _, bias, *_ = tensors
    centred, dropout_p, _ = options
    new_dtype = x.dtype if residual is None else residual.dtype
    changed = residual is not None or dropout_p > 0
    there = dict.fromkeys(NAMES, True) | dict(
        new=changed, mean=centred, grad_x=dropout_p > 0 or new_dtype != x.dtype, grad_bias=bias is not None
    )
    dtypes = dict.fromkeys(NAMES, torch.float32)
    dtypes |= dict(y=x.dtype, new=new_dtype, grad_residual=new_dtype, grad_x=x.dtype)
    ours, theirs = run_kernels(tensors, options), pytorch(tensors, options)
    exact = pytorch([None if t is None else t.double() for t in tensors], options)
    for name, value, e, p in zip(NAMES, ours, exact, theirs, strict=True):
        assert value.dtype == dtypes[name], name
        if not there[name]:
            assert value.shape == (0,), name
            continue
        assert value.shape == e.shape, name
        size, _ = errors(e, torch.zeros_like(e))
        allowed = (3 if name.startswith("grad") else 2) * errors(p, e)[0]
        allowed += (torch.finfo(value.dtype).eps + torch.finfo(torch.float32).eps) / 2 * size
        assert errors(value, e)[0] <= allowed, f"{name}: error {errors(value, e)[0]:.3g}, allowed {allowed:.3g}"
    return ours


def small_blocks(monkeypatch, programs):
    """Blocks of 2 x 32, so that few columns are gone over in several, and few rows by several programs."""
    monkeypatch.setattr(norm, "tile", lambda columns, most: (2, 32, 1))
    monkeypatch.setattr(norm, "ALL_ELEMENTS", 64 * programs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("centred", "residual", "dropout", "has_bias", "has_grad_new"), CASES)
def test_forward_and_gradients_match_pytorch(centred, residual, dropout, has_bias, has_grad_new, dtype):
    if residual == "wide" and dtype == torch.float32:
        residual = "same"
    check(*make_case(100, (7, 3), centred, residual, dropout, has_bias, has_grad_new, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("columns", [1, 20, 256, 768, 1000, 4096, 12000])
def test_numbers_of_columns(columns, centred, dtype):
    check(*make_case(columns, (3,), centred, "same", 0.1, dtype=dtype))


@pytest.mark.parametrize("columns", [33, 64, 70])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("centred", [True, False])
def test_rows_of_several_blocks(centred, residual, columns, monkeypatch):
    small_blocks(monkeypatch, programs=3)
    check(*make_case(columns, (1, 5), centred, residual, 0.3, dtype=torch.float16))
    check(*make_case(columns, (1,), centred, residual, has_bias=False))


@pytest.mark.parametrize("rows", [(1,), (2,), (11,), (5, 1, 8), (1000,)])
def test_numbers_of_rows(rows, monkeypatch):
    """The parameters' gradients are sums over more rows than programs, and over fewer."""
    if rows != (1000,):
        small_blocks(monkeypatch, programs=4)
    check(*make_case(24, rows, residual="same", dropout=0.2))


def test_rows_far_from_zero():
    """The variance is not the difference of two large numbers."""
    check(*make_case(300, offset=1000.0))
    check(*make_case(300, offset=1000.0, residual="same"))


@pytest.mark.parametrize("rows", [(), (0,), (3, 0, 2)])
@pytest.mark.parametrize("centred", [True, False])
def test_one_row_and_none(rows, centred):
    """Also a row without dimensions around it."""
    tensors, options = make_case(24, rows, centred, "same", 0.2)
    x, residual, weight, bias, grad_y, grad_new = tensors
    y, new, mean, rstd = norm.norm_forward(x, residual, weight, bias, centred, EPS, *options[1:])
    gradients = norm.norm_backward(grad_y, grad_new, new, weight, mean, rstd, centred, *options[1:], True)
    assert y.shape == new.shape == x.shape and rstd.shape == x.shape[:-1]
    assert mean.shape == (x.shape[:-1] if centred else (0,))
    exact = pytorch([t.double() for t in tensors], options)
    for value, e in zip((y, new, *gradients), (*exact[:2], *exact[4:]), strict=True):
        torch.testing.assert_close(value.double(), e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [20, 100])
@pytest.mark.parametrize("dropout_p", [0.001, 0.4, 0.99999])
def test_the_values_that_the_reference_drops(columns, dropout_p, monkeypatch):
    """What is left of ones, and of a gradient of ones that arrives at new."""
    x = torch.ones(12, columns, device=DEVICE)
    weight, zero = torch.ones(columns, device=DEVICE), torch.zeros(12, columns, device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    expected = keeps(seed, dropout_p, 12, columns) / (1 - dropped_parts(dropout_p) / 65536)
    for blocks in (False, True):
        if blocks:
            monkeypatch.setattr(norm, "tile", lambda columns, most: (8, 16 if columns == 20 else 64, 1))
        _, new, mean, rstd = norm.norm_forward(x, None, weight, None, True, EPS, dropout_p, seed)
        torch.testing.assert_close(new, expected, atol=0, rtol=1e-6)
        _, grad_x, *_ = norm.norm_backward(zero, x, new, weight, mean, rstd, True, dropout_p, seed, False)
        torch.testing.assert_close(grad_x, expected, atol=0, rtol=1e-6)


def test_every_run_gives_the_same_bits(monkeypatch):
    small_blocks(monkeypatch, programs=3)
    for columns in (24, 70):
        tensors, options = make_case(columns, (15,), residual="same", dropout=0.3)
        first, second = (run_kernels(tensors, options) for _ in range(2))
        for name, x, y in zip(NAMES, first, second, strict=True):
            assert torch.equal(x, y), name


def test_backward_reads_what_forward_normalised():
    """new is rounded before its statistics are taken: those of the fp16 values, to the precision of fp32."""
    tensors, options = make_case(50, (30,), residual="same", dtype=torch.float16)
    _, new, mean, rstd, *_ = run_kernels(tensors, options)
    values = new.double()
    torch.testing.assert_close(mean.double(), values.mean(-1), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(rstd.double(), (values.var(-1, correction=0) + EPS).rsqrt(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("columns", [24, 70])
@pytest.mark.parametrize("centred", [True, False])
def test_rows_whose_squares_overflow(centred, columns, monkeypatch):
    """Statistics and results are those of fp64; the other rows have the bits that they have without these."""
    small_blocks(monkeypatch, programs=4)
    tensors, options = make_case(columns, (9,), centred)
    clean = run_kernels(tensors, options)
    tensors[0][2:5] *= 1e30
    y, _, mean, rstd, *_ = run_kernels(tensors, options)
    exact = pytorch([None if t is None else t.double() for t in tensors], options)
    for value, expected in ((y, exact[0]), (rstd, exact[3]), *([(mean, exact[2])] if centred else [])):
        torch.testing.assert_close(value.double(), expected.view(value.shape), rtol=1e-5, atol=1e-5)
    others = [0, 1, 5, 6, 7, 8]
    assert torch.equal(y[others], clean[0][others]) and torch.equal(rstd[others], clean[3][others])


def test_what_is_not_finite_stays_in_its_row():
    tensors, options = make_case(24, (9,), residual="same")
    clean = run_kernels(tensors, options)
    tensors[0][4, 7] = torch.nan
    spoiled = run_kernels(tensors, options)
    rows = torch.arange(9, device=DEVICE) != 4
    for name, x, y in zip(NAMES[:5], spoiled, clean, strict=False):
        assert torch.equal(x[rows], y[rows]) and x[4].isnan().any(), name
    assert spoiled[6].isnan().all() and torch.equal(spoiled[7], clean[7])
