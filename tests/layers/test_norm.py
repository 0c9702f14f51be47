"""Layer norm and RMS norm with residual and dropout: values, gradients at every instruction set, the contract."""

import pytest
import torch
import torch.nn.functional as F
from cases.layers import assert_as_accurate, outputs_and_gradients
from cases.pairs import every_pair
from torch import Tensor

from pynlp.functional import layer_norm, rms_norm
from pynlp.reference.common.random import dropped_parts, keeps

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SEED = 12345678901234567
# Of x and of the residual.
DTYPES = [(FP32, None), (FP32, FP32), (BF16, None), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]
SHAPES = [(3, 5, 256), (37, 100), (2, 0, 20), (5, 1), (1000, 7), (4, 1000), (130,), (2, 2050)]


def eager_dropout(x: Tensor, dropout_p: float) -> Tensor:
    kept = keeps(torch.tensor([SEED]), dropout_p, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
    return x * kept / (1 - dropped_parts(dropout_p) / 65536)


def eager(kind: str, dropout_p: float):
    """PyTorch's operations, one after the other, in x's dtype; the residual's, where that is more precise."""

    def function(x, weight, bias=None, residual=None):
        new = eager_dropout(x, dropout_p) if dropout_p else x
        new = new if residual is None else residual + new
        y = new.to(x.dtype) if new.dtype != x.dtype else new
        shape, weight = x.shape[-1:], weight.to(x.dtype)
        if kind == "layer":
            y = F.layer_norm(y, shape, weight, None if bias is None else bias.to(x.dtype), 1e-5)
        else:
            y = F.rms_norm(y, shape, weight, 1e-6)
        return y if residual is None else (y, new)

    return function


def fused(kind: str, dropout_p: float):
    norm = layer_norm if kind == "layer" else rms_norm
    return lambda **tensors: norm(**tensors, dropout_p=dropout_p, seed=SEED)


def tensors_of(shape, dtype, kind="layer", residual=None, bias=True, mean=0.0) -> dict[str, Tensor]:
    tensors = {"x": (torch.randn(shape) + mean).to(dtype), "weight": torch.rand(shape[-1]) + 0.5}
    if bias and kind == "layer":
        tensors["bias"] = torch.randn(shape[-1])
    if residual is not None:
        tensors["residual"] = torch.randn(shape).to(residual)
    return tensors


@pytest.mark.every_isa
@every_pair(kind=["layer", "rms"], shape=SHAPES, dtypes=DTYPES, dropout_p=[0.0, 0.3])
def test_values_and_gradients(kind, shape, dtypes, dropout_p, isa):
    dtype, residual = dtypes
    assert_as_accurate(fused(kind, dropout_p), eager(kind, dropout_p), tensors_of(shape, dtype, kind, residual))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_without_bias_and_far_from_zero(kind, isa):
    """A mean of 1000 standard deviations: the variance is that of the deviations, not a difference of squares."""
    for shape in ((9, 64), (9, 50)):
        tensors = tensors_of(shape, FP32, kind, bias=False, mean=1000.0)
        assert_as_accurate(fused(kind, 0.0), eager(kind, 0.0), tensors)


def test_first_values_unlike_the_others(isa):
    """The moments are taken about what a row begins with; where that is far from its mean, about that."""
    for shape in ((9, 256), (6, 300)):
        tensors = tensors_of(shape, FP32)
        tensors["x"][::2, :16] += 1000.0
        tensors["x"][1] = 0.1
        assert_as_accurate(fused("layer", 0.0), eager("layer", 0.0), tensors)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("columns", [256, 50])
def test_a_row_alone_has_the_same_bits(kind, columns, isa):
    weights = tensors_of((7, columns), FP32, kind)
    x, grad = weights.pop("x"), torch.randn(7, columns)
    x[2, :16] += 1000.0

    def output_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = fused(kind, 0.0)(x=leaf, **weights)
        return y, torch.autograd.grad(y, leaf, grad)[0]

    together = output_and_gradient(x, grad)
    for i in range(7):
        alone = output_and_gradient(x[i : i + 1], grad[i : i + 1])
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True)), i


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_one_of_two_outputs_used(kind):
    """Gradients where only y, or only the sum, goes on."""
    for used in (0, 1):
        assert_as_accurate(
            lambda used=used, **t: fused(kind, 0.3)(**t)[used] * 1.0 + 0.0 * t["weight"].sum(),
            lambda used=used, **t: eager(kind, 0.3)(**t)[used] * 1.0 + 0.0 * t["weight"].sum().to(t["x"].dtype),
            tensors_of((6, 40), FP32, kind, FP32, bias=False),
        )


def test_strided_rows():
    """Rows of a wider tensor are read in place, and other layouts copied; the values are those of contiguous ones."""
    wide = torch.randn(6, 4, 3 * 64)
    weight = torch.rand(64)
    for x in (wide[..., 64:128], wide[:, 1, :64], wide.transpose(0, 1)[..., :64], wide[::2, :, ::3]):
        expected = outputs_and_gradients(rms_norm_of(weight), {"x": x.contiguous()})
        for name, value in outputs_and_gradients(rms_norm_of(weight), {"x": x}).items():
            assert torch.equal(value, expected[name]), name


def rms_norm_of(weight):
    return lambda x: rms_norm(x, weight, residual=x, dropout_p=0.1, seed=1)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_same_bits_at_any_number_of_threads(kind, isa):
    tensors = tensors_of((301, 136), BF16, kind, FP32)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(fused(kind, 0.2), tensors))
    for run in runs[1:]:
        assert all(torch.equal(run[name], x) for name, x in runs[0].items())


def test_dropout_is_that_of_its_seed(isa):
    """x of ones and no residual: what is left are zeros and the inverse of the share that is kept, as Philox says."""
    x = torch.ones(50, 77)
    _, new = layer_norm(x, torch.ones(77), residual=torch.zeros(50, 77), dropout_p=0.25, seed=-7)
    expected = keeps(torch.tensor([-7]), 0.25, 50, 77) / (1 - dropped_parts(0.25) / 65536)
    torch.testing.assert_close(new, expected.float(), rtol=1e-6, atol=0)


def test_a_drawn_seed_follows_torch():
    x, weight = torch.randn(20, 64), torch.ones(64)
    torch.manual_seed(3)
    first, second = (rms_norm(x, weight, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(rms_norm(x, weight, dropout_p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    rms_norm(x, weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(residual):
    x, r = (torch.randn(4, 9, dtype=FP64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(9, dtype=FP64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias, r):
        return layer_norm(x, weight, bias, residual=r if residual else None, dropout_p=0.4, seed=2)

    assert torch.autograd.gradcheck(function, (x, weight, bias, r if residual else None))


def test_opcheck():
    x, residual, weight, bias = torch.randn(4, 24), torch.randn(4, 24), torch.rand(24), torch.rand(24)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(torch.ops.pynlp.norm_forward, (*leaves, True, 1e-5, 0.3, torch.tensor([5])))
    torch.library.opcheck(torch.ops.pynlp.norm_forward, (x, None, weight, None, False, 1e-5, 0.0, None))


def test_compiles_whole():
    x, residual, weight = torch.randn(4, 24), torch.randn(4, 24), torch.rand(24)

    def function(x, residual, weight):
        return layer_norm(x, weight, residual=residual, dropout_p=0.3, seed=5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(function, {"x": x, "residual": residual, "weight": weight})
    for name, value in outputs_and_gradients(compiled, {"x": x, "residual": residual, "weight": weight}).items():
        assert torch.equal(value, expected[name]), name


def test_checkpointing_drops_the_same():
    x, weight = torch.randn(8, 32, requires_grad=True), torch.rand(32)

    def layer(x):
        return rms_norm(x, weight, dropout_p=0.5)

    gradients = []
    for call in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(call(x).square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_nan_stays_in_its_row():
    x = torch.randn(3, 20)
    x[1, 5] = float("nan")
    y = layer_norm(x, torch.ones(20))
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_whose_squares_overflow(kind, dtype, isa):
    """The result is that of fp64; a row among them that is not huge has the bits that it has alone."""
    for size in (1e20, 1e30, 1e38):
        for columns in (7, 64, 1000):
            tensors = tensors_of((9, columns), FP32, kind)
            tensors["x"] = (tensors["x"].clamp(-1, 1) * size).to(dtype)
            tensors["x"][3] = torch.randn(columns)
            exact = fused(kind, 0.0)(**{name: x.double() for name, x in tensors.items()})
            y = fused(kind, 0.0)(**tensors)
            torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
            assert torch.equal(y[3], fused(kind, 0.0)(**tensors | {"x": tensors["x"][3]}))
            tensors["x"].requires_grad_()
            fused(kind, 0.0)(**tensors).sum().backward()
            assert tensors["x"].grad.isfinite().all()


def test_what_is_not_finite_is_as_in_pytorch(isa):
    for value in (float("inf"), -float("inf"), float("nan")):
        x = torch.randn(3, 20)
        x[1, 5] = value
        torch.testing.assert_close(rms_norm(x, torch.ones(20)), F.rms_norm(x, (20,), eps=1e-6), equal_nan=True)
        torch.testing.assert_close(layer_norm(x, torch.ones(20)), F.layer_norm(x, (20,)), equal_nan=True)


X, WEIGHT = torch.randn(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(.., dim\) with a dim of at least 1, got \(\)"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x: expected dtype float32, .* got torch.int64"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"weight": torch.ones(6, dtype=torch.int32)}, TypeError, "weight: expected a floating-point dtype"),
        ({"weight": torch.ones(6, device="meta")}, ValueError, "weight: expected x's device cpu, got meta"),
        ({"bias": torch.ones(4, 6)}, ValueError, r"bias: expected shape \(6,\), got \(4, 6\)"),
        ({"residual": torch.ones(4, 5)}, ValueError, r"residual: expected shape \(4, 6\), got \(4, 5\)"),
        ({"residual": X.half()}, TypeError, "residual: expected x's dtype torch.float32, got torch.float16"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"weight": [1.0] * 6}, TypeError, "weight: expected a tensor, got list"),
        ({"eps": None}, TypeError, "eps: expected a number, got None"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
        ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "seed: expected an int or one int64 value, got float"),
        ({"eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected at least 0 and less than 1, got 1.0"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "seed: expected an int or one int64 value"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": X, "weight": WEIGHT, **changes})


def test_double_backward_is_refused():
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(x, WEIGHT).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
