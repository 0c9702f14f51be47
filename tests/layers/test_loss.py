"""Cross-entropy fused with its projection: values and gradients at every instruction set, and the contract."""

import pytest
import torch
import torch.nn.functional as F
from cases.layers import assert_as_accurate, outputs_and_gradients
from cases.pairs import every_pair
from torch import Tensor

from pynlp.functional import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def eager(target: Tensor, *, softcap=0.0, z_loss=0.0, reduction="mean", **options):
    """PyTorch's operations: the projection in x's dtype, the loss of its logits in fp32, as autocast does."""

    def function(x, weight, bias=None):
        logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        logits = logits.double() if x.dtype == FP64 else logits.float()
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        counts = target != options.get("ignore_index", -100)
        losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none", **options)
        losses = losses.view(target.shape) + z_loss * logits.logsumexp(-1).square() * counts
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()

    return function


def tensors_of(rows, dim, vocabulary, dtype, weight_dtype=None, bias=True) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(*rows, dim).to(dtype),
        # Rounded to dtype in any case, as it is for the products.
        "weight": (torch.randn(vocabulary, dim) * dim**-0.5).to(dtype).to(weight_dtype or dtype),
    }
    return tensors | ({"bias": torch.randn(vocabulary)} if bias else {})


def targets_of(rows, vocabulary, ignored=0.2) -> Tensor:
    target = torch.randint(vocabulary, rows)
    return target.masked_fill(torch.rand(rows) < ignored, -100)


DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]  # of x and of the weight
SHAPES = [((7,), 20, 33), ((3, 5), 64, 300), ((300,), 96, 129), ((1, 1), 7, 2), ((260,), 33, 1000)]
OPTIONS = [
    dict(),
    dict(label_smoothing=0.1),
    dict(softcap=2.0, label_smoothing=0.2),
    dict(z_loss=0.01),
    dict(reduction="sum", label_smoothing=0.1, z_loss=0.001, softcap=30.0),
    dict(reduction="none", label_smoothing=0.1),
]


@pytest.mark.every_isa
@every_pair(shape=SHAPES, dtypes=DTYPES, options=OPTIONS)
def test_values_and_gradients(shape, dtypes, options, isa):
    (rows, dim, vocabulary), (dtype, weight_dtype) = shape, dtypes
    tensors = tensors_of(rows, dim, vocabulary, dtype, weight_dtype, bias=dim % 2 == 0)
    target = targets_of(rows, vocabulary, 0.2 if len(rows) < 2 else 0.0)

    def function(x, weight, bias=None):
        return linear_cross_entropy(x, weight, target, bias, **options)

    assert_as_accurate(function, eager(target, **options), tensors)


def test_large_and_far_logits(isa):
    """Logits of hundreds, and a whole block of the vocabulary far below the others."""
    tensors = tensors_of((40,), 32, 400, FP32)
    tensors["x"] *= 100
    tensors["bias"][:200] -= 1e4
    tensors["bias"][300] = -float("inf")
    target = torch.randint(200, 300, (40,))
    function = lambda x, weight, bias: linear_cross_entropy(x, weight, target, bias)  # noqa: E731
    assert_as_accurate(function, eager(target), tensors)


def test_other_ignore_index_and_nothing_that_counts():
    tensors = tensors_of((9,), 8, 5, FP32)
    target = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2])
    ours = outputs_and_gradients(
        lambda x, weight, bias: linear_cross_entropy(x, weight, target, bias, ignore_index=0), tensors
    )
    theirs = outputs_and_gradients(eager(target, ignore_index=0), tensors)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name)
    nothing = outputs_and_gradients(
        lambda x, weight, bias: linear_cross_entropy(x, weight, torch.full((9,), -100), bias), tensors
    )
    assert all((value == 0).all() for value in nothing.values())


def test_no_rows():
    tensors = tensors_of((2, 0), 8, 5, FP32)
    values = outputs_and_gradients(
        lambda x, weight, bias: linear_cross_entropy(x, weight, torch.zeros(2, 0, dtype=torch.int64), bias), tensors
    )
    assert all((value == 0).all() for value in values.values())


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_gradients(needed, reduction):
    tensors = tensors_of((30,), 16, 50, FP32)
    target = targets_of((30,), 50)
    rest = {name: x for name, x in tensors.items() if name != needed}
    gradient = f"gradient of {needed}"
    for dtype in (FP32,):
        ours = outputs_and_gradients(
            lambda **t: linear_cross_entropy(**t, **rest, target=target, reduction=reduction), {needed: tensors[needed]}
        )
        theirs = outputs_and_gradients(eager(target, reduction=reduction), {n: x.to(dtype) for n, x in tensors.items()})
        torch.testing.assert_close(ours[gradient], theirs[gradient])


def test_without_gradients_none_are_computed():
    tensors = tensors_of((30,), 16, 50, FP32)
    with torch.no_grad():
        loss = linear_cross_entropy(**{n: x.requires_grad_() for n, x in tensors.items()}, target=targets_of((30,), 50))
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_at_any_number_of_threads(dtype, isa):
    tensors = tensors_of((300,), 64, 1500, dtype, FP32)
    target = targets_of((300,), 1500)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(lambda **t: linear_cross_entropy(**t, target=target), tensors))
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


def test_strided_rows_and_autocast():
    tensors = tensors_of((30,), 16, 50, FP32)
    target = targets_of((30,), 50)
    wide = torch.randn(30, 48)
    expected = linear_cross_entropy(wide[:, 16:32].contiguous(), tensors["weight"], target)
    assert torch.equal(linear_cross_entropy(wide[:, 16:32], tensors["weight"], target), expected)
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_cross_entropy(**tensors, target=target)
    expected = linear_cross_entropy(tensors["x"].bfloat16(), tensors["weight"], target, tensors["bias"])
    assert torch.equal(loss, expected) and loss.dtype == FP32


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("reduction") != "sum"], ids=str)
def test_gradcheck(options):
    tensors = {n: x.double().requires_grad_() for n, x in tensors_of((6,), 5, 9, FP32).items()}
    target = torch.tensor([0, 8, -100, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(x, weight, target, bias, **options), tuple(tensors.values())
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_permuted_target_is_as_a_contiguous_one(reduction):
    x, weight, target = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8), torch.randint(5, (3, 2)).T
    losses = [linear_cross_entropy(x, weight, t, reduction=reduction) for t in (target, target.contiguous())]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), x)[0] for loss in losses))


@pytest.mark.parametrize("dtypes", [(a, b) for a in (FP32, BF16, FP16) for b in (FP32, BF16, FP16)], ids=str)
def test_autocast_takes_what_f_linear_takes(dtypes):
    x, weight = torch.randn(6, 8).to(dtypes[0]), torch.randn(9, 8).to(dtypes[1])
    target = torch.tensor([0, 8, -100, 3, 3, 1])
    for dtype in (BF16, FP16):
        with torch.autocast("cpu", dtype):
            loss = linear_cross_entropy(x, weight, target)
            expected = F.cross_entropy(F.linear(x, weight).float(), target)
        torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    """A gradient penalty is not dropped in silence beside a term that has a gradient."""
    x, target = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 2, 0])
    loss = linear_cross_entropy(x, torch.randn(5, 8), target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        (gradient.square().sum() + x.sum()).backward()


def test_opcheck_and_compile():
    tensors = {n: x.requires_grad_() for n, x in tensors_of((6,), 8, 9, FP32).items()}
    target = torch.tensor([0, 8, -100, 3, 3, 1])
    options = (0.1, -100, 0.0, 0.0)
    op = torch.ops.pynlp.linear_cross_entropy
    torch.library.opcheck(op, (*tensors.values(), target, None, False, False, False, *options))
    torch.library.opcheck(op, (*tensors.values(), target, torch.full((6,), 0.2), True, True, True, *options))

    def function(x, weight, bias):
        return linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1)

    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    for name, value in outputs_and_gradients(function, tensors).items():
        assert torch.equal(compiled[name], value), name


X, WEIGHT, TARGET = torch.randn(4, 6), torch.randn(9, 6), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(6)}, ValueError, r"x: expected shape \(.., dim\) with a dim of at least 1, got \(6,\)"),
        ({"x": X.long()}, TypeError, "x: expected dtype float32, .* got torch.int64"),
        ({"weight": torch.randn(9, 5)}, ValueError, r"weight: expected shape \(9, 6\), got \(9, 5\)"),
        ({"weight": torch.randn(0, 6)}, ValueError, r"weight: expected shape \(vocabulary, 6\), got \(0, 6\)"),
        (
            {"weight": WEIGHT.half()},
            TypeError,
            "weight: expected x's dtype torch.float32 or float32",
        ),
        ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \(9,\), got \(8,\)"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"target": [0, 1, 2, 3]}, TypeError, "target: expected a tensor, got list"),
        ({"softcap": None}, TypeError, "softcap: expected a number, got None"),
        ({"target": TARGET[:3]}, ValueError, r"target: expected shape \(4,\), got \(3,\)"),
        ({"target": TARGET.int()}, TypeError, "target: expected dtype int64, got torch.int32"),
        ({"target": TARGET + 9}, ValueError, "target: expected values of 0 to 8, got 9 to 9"),
        ({"target": TARGET - 1}, ValueError, "target: expected values of 0 to 8, got -1 to -1"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing: expected at least 0 and less than 1, got 1.0"),
        ({"softcap": -1.0}, ValueError, r"softcap: expected 0 \(none\) or a positive number, got -1.0"),
        ({"z_loss": -1.0}, ValueError, r"z_loss: expected 0 \(none\) or a positive number, got -1.0"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'max'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"x": X, "weight": WEIGHT, "target": TARGET, **changes})
