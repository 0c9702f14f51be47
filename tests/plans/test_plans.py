"""Plans: that they are used, and above all when they are not."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pynlp.functional import attention, gelu, layer_norm, rms_norm
from pynlp.ops.common import plans


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.fixture
def runs():
    """Makes a planned function of a norm; gives it and the list of the calls that ran whole."""

    def whole(x: Tensor, weight: Tensor, residual: Tensor | None = None, **options):
        seen.append((x, weight))
        return rms_norm.__wrapped__(x, weight, residual=residual, **options)

    seen = []
    return plans.planned(whole), seen


def warm(function, *arguments, **options) -> None:
    for _ in range(3):
        function(*arguments, **options)


def test_the_third_call_of_a_kind_is_planned(runs):
    norm, whole = runs
    x, weight = normal(5, 16), normal(16)
    for count in (1, 2, 2, 2):
        torch.testing.assert_close(norm(x, weight), torch.rms_norm(x, (16,), weight, 1e-6))
        assert len(whole) == count


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: ((x[:4], w), {}),
        lambda x, w: ((x.T.contiguous().T, w), {}),
        lambda x, w: ((x.view(5, 4, 4), w[:4]), {}),
        lambda x, w: ((x.bfloat16(), w), {}),
        lambda x, w: ((x.clone().requires_grad_(), w), {}),
        lambda x, w: ((x, w.double()), {}),
        lambda x, w: ((x, w), {"eps": 1e-3}),
        lambda x, w: ((x, w), {"residual": x}),
        lambda x, w: ((x, w), {"dropout_p": 0.5, "seed": 3}),
        lambda x, w: ((x, w), {"residual": x.double()}),
        lambda x, w: ((x, nn.Parameter(w)), {}),
    ],
)
def test_a_call_of_another_kind_runs_whole(other, runs):
    norm, whole = runs
    x, weight = normal(5, 16), normal(16)
    warm(norm, x, weight)
    arguments, options = other(x, weight)
    with contextlib.suppress(TypeError):  # some are refused
        norm(*arguments, **options)
    assert len(whole) == 3


def test_numbers_of_other_types_are_other_kinds():
    """True is 1 and 1.0 to a dictionary."""
    q = normal(1, 6, 2, 8)
    warm(lambda: attention(q, q + 1, q + 2, causal=True, rotary_offset=0))
    with pytest.raises(TypeError, match="rotary_offset"):
        attention(q, q + 1, q + 2, causal=True, rotary_offset=False)
    x = normal(5, 16)
    warm(layer_norm, x, x[0], eps=1)
    with pytest.raises(TypeError, match="eps"):
        layer_norm(x, x[0], eps=True)


def test_tensors_for_numbers_are_read_by_each_call():
    """A flag or a number that is given as a tensor: on its value it depends what a call does."""
    q, k, v = (normal(1, 6, 2, 8) for _ in range(3))
    for value in (True, False) * 4:
        flag, factor = torch.tensor(value), torch.tensor(0.5 + value)
        with plans.off():
            expected = attention(q, k, v, causal=value), attention(q, k, v, softmax_scale=factor.item())
        assert torch.equal(attention(q, k, v, causal=flag), expected[0])
        assert torch.equal(attention(q, k, v, softmax_scale=factor), expected[1])
        assert isinstance(attention(q, k, v, return_lse=flag), tuple) == value


def test_errors_stay_errors():
    x, weight = normal(5, 16), normal(15)
    for _ in range(5):
        with pytest.raises(ValueError, match="weight: expected shape"):
            layer_norm(x, weight)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16), Mode, FunctionMode, torch.autograd.forward_ad.dual_level,
        torch.autograd.profiler.profile, plans.off, lambda: torch.device("cpu"),
    ],
)  # fmt: skip
def test_what_watches_calls_sees_them(context, runs):
    norm, whole = runs
    x, weight = normal(5, 16), normal(16)
    warm(norm, x, weight)
    with context():
        norm(x, weight)
    assert len(whole) == 3
    norm(x, weight)
    assert len(whole) == 3


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.functionalize(f)(x),
        lambda f, x: torch.jit.trace(f, x, check_trace=False)(x),
    ],
)
def test_transforms_see_calls(transform, runs):
    norm, whole = runs
    x, weight = normal(5, 16), normal(16)
    for _ in range(3):  # of the kinds that samples have, too
        norm(x, weight)
        norm(x[0], weight)
    before = len(whole)
    transform(lambda x: norm(x, weight), x)
    assert len(whole) > before


def test_a_trace_holds_the_op_and_not_its_result():
    x, weight = normal(5, 16), normal(16)
    warm(rms_norm, x, weight)
    traced = torch.jit.trace(lambda x: rms_norm(x, weight), x)
    torch.testing.assert_close(traced(2 * x + 1), rms_norm(2 * x + 1, weight))


class Kind(Tensor):
    pass


def test_tensors_of_other_types_run_whole(runs):
    norm, whole = runs
    x, weight = normal(5, 16), normal(16)
    warm(norm, x, weight)
    norm(x.as_subclass(Kind), weight)
    norm(x.to("meta"), weight.to("meta"))
    assert len(whole) == 4


def test_values_that_are_not_in_memory_as_they_are():
    """Parts of conjugated numbers, to be negated; zeros that have no memory."""
    columns = torch.randn(4, 1, dtype=torch.complex64)
    weight = normal(1)
    x = columns.imag
    warm(layer_norm, x, weight, weight, eps=1.0)
    for _ in range(3):
        assert torch.equal(gelu(columns.conj().imag), gelu(-x))
        assert torch.equal(gelu(x), gelu(x.clone()))
    x, weight = normal(5, 16), normal(16)
    warm(rms_norm, x, weight)
    with pytest.raises(RuntimeError, match="x: expected contiguous rows"):  # as without plans
        rms_norm(torch._efficientzerotensor((5, 16)), weight)
    ones = torch.ones(5, 16)
    warm(gelu, ones)
    for _ in range(3):
        assert torch.equal(gelu(torch._neg_view(ones)), gelu(-ones))
        assert torch.equal(gelu(columns.conj().imag.squeeze(1).unsqueeze(-1)), gelu(-columns.imag))


def test_batched_gradients():
    """By the older vmap, whose tensors look as others do and have no memory."""
    x, several = normal(5, 16).requires_grad_(), normal(3, 5, 16)
    for _ in range(5):
        torch.autograd.grad(gelu(x), x, several[0])
    (grads,) = torch.autograd.grad(gelu(x), x, several, is_grads_batched=True)
    for grad, one in zip(grads, several, strict=True):
        assert torch.equal(grad, torch.autograd.grad(gelu(x), x, one)[0])
    with plans.off():
        expected = torch.autograd.functional.jacobian(gelu, x.detach(), vectorize=True)
    assert torch.equal(torch.autograd.functional.jacobian(gelu, x.detach(), vectorize=True), expected)


def test_a_tensor_that_outlived_its_transform():
    leaked = []
    x = normal(5, 16).requires_grad_()
    for _ in range(4):
        gelu(x)
    torch.func.grad(lambda y: (leaked.append(y), y.sum())[1])(x)
    assert torch.equal(gelu(leaked[0]), gelu(x))


@pytest.mark.slow
def test_compiled_autograd():
    x = normal(5, 16).requires_grad_()
    for _ in range(5):
        gelu(x).sum().backward()
    expected, x.grad = x.grad / 5, None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        gelu(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_one_tensor_for_several_arguments():
    """What the recorded call cannot tell apart, later ones do."""
    x, y = normal(5, 16), normal(5, 16)
    weight = normal(16)
    for _ in range(3):
        layer_norm(x, weight, weight, residual=x)
    for a, b, w, z in ((x, x, weight, weight), (x, y, weight, normal(16)), (y, x, normal(16), weight)) * 3:
        new = b + a
        expected = torch.layer_norm(new, (16,), w, z, 1e-5)
        torch.testing.assert_close(layer_norm(a, w, z, residual=b)[0], expected)


def test_each_call_draws_its_own_dropout():
    x = normal(64, 64)
    results = [gelu(x, dropout_p=0.5) for _ in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    torch.manual_seed(7)
    first = [gelu(x, dropout_p=0.5) for _ in range(2)]
    torch.manual_seed(7)
    with plans.off():
        assert all(torch.equal(a, gelu(x, dropout_p=0.5)) for a in first)
    seeded = [gelu(x, dropout_p=0.5, seed=seed) for seed in (1, 2, 1, 2, 1, 2, 1, 2)]
    assert torch.equal(seeded[0], seeded[6]) and torch.equal(seeded[1], seeded[7])
    assert not torch.equal(seeded[6], seeded[7])
    tensors = [gelu(x, dropout_p=0.5, seed=torch.tensor(seed)) for seed in (1, 2, 1, 2, 1, 2)]
    assert torch.equal(tensors[4], seeded[0]) and torch.equal(tensors[5], seeded[1])


def test_values_that_are_checked_are_checked_by_each_call():
    q, k, v = (normal(2, 6, 2, 8) for _ in range(3))
    for _ in range(4):
        attention(q, k, v, key_lengths=torch.tensor([6, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="key_lengths"):
        attention(q, k, v, key_lengths=torch.tensor([6, 7], dtype=torch.int32))


def test_conversions_are_done_again():
    """Weights in bf16, tensors that are copied: from the values that they have by then."""
    x, weight = normal(8, 32)[:, ::2], normal(16).bfloat16()
    for i in range(5):
        torch.testing.assert_close(
            rms_norm(x, weight), torch.rms_norm(x, (16,), weight.float(), 1e-6), msg=lambda text, i=i: f"{i}: {text}"
        )
        x, weight = x + 1, weight + 1
        x = torch.stack((x, x), 2).flatten(1)[:, ::2]
    leaf = weight.requires_grad_()
    for _ in range(4):
        (grad,) = torch.autograd.grad(rms_norm(x, leaf).sum(), leaf)
        assert grad.dtype == torch.bfloat16 and grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_and_offloaded(reentrant):
    x, weight = normal(6, 16), normal(16)

    def run(way):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        return torch.autograd.grad(way(*leaves).square().sum(), leaves) if reentrant else _backward(way, leaves)

    def _backward(way, leaves):
        way(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    def offloaded(*leaves):
        with torch.autograd.graph.save_on_cpu():
            return rms_norm(*leaves)

    def moved(*leaves):  # unpacked at another alignment than was saved
        def unpack(x):
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            return rms_norm(*leaves)

    with plans.off():
        expected = run(rms_norm)
    ways = [rms_norm, offloaded, moved]
    if not reentrant:
        ways.append(lambda *leaves: checkpoint(rms_norm, *leaves, use_reentrant=False))
    for way in ways * 4:
        for a, b in zip(run(way), expected, strict=True):
            assert torch.equal(a, b)


def test_expanded_gradients_and_strided_tensors_have_plans():
    x = normal(6, 16).requires_grad_()
    for y in (lambda: gelu(x).sum(), lambda: gelu(x[:, ::2]).sum()):
        for _ in range(6):
            y().backward()
        with count_recordings() as recordings:
            y().backward()
        assert not recordings


@contextlib.contextmanager
def count_recordings():
    made, init = [], plans.Recording.__init__

    def counted(self, tensors):
        made.append(tensors)
        init(self, tensors)

    plans.Recording.__init__ = counted
    try:
        yield made
    finally:
        plans.Recording.__init__ = init


def test_what_passes_does_not_rule_plans_out_for_good():
    """A second call in autocast, or with one tensor for two arguments."""
    x, weight = normal(6, 16).requires_grad_(), normal(16)
    rms_norm(x, weight).sum().backward()
    y = rms_norm(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    for _ in range(5):
        rms_norm(x, weight).sum().backward()
        layer_norm(x, weight, weight)
    with count_recordings() as recordings:
        rms_norm(x, weight).sum().backward()
        layer_norm(x, weight, weight)
    assert not recordings


def test_results_without_a_gradient_stay_without():
    """Steps that ran under no_grad do so again."""

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            return gelu(plans.derive(torch.neg, x))

    planned, x = plans.planned(function), normal(6, 16).requires_grad_()
    for _ in range(5):
        assert not planned(x).requires_grad


def test_some_gradients_are_asked_for():
    x, weight, bias = normal(6, 16).requires_grad_(), normal(16).requires_grad_(), normal(16).requires_grad_()
    weights = normal(6, 16)
    with plans.off():
        expected = torch.autograd.grad(layer_norm(x, weight, bias), (x, weight, bias), weights)
    for wanted in ((0, 1, 2), (2,), (0,), (1, 0)) * 4:
        leaves = [(x, weight, bias)[i] for i in wanted]
        for i, grad in zip(wanted, torch.autograd.grad(layer_norm(x, weight, bias), leaves, weights), strict=True):
            assert torch.equal(grad, expected[i])


def test_results_that_are_not_used_and_expanded_gradients():
    x, residual, weight = (normal(*shape).requires_grad_() for shape in ((6, 16), (6, 16), (16,)))
    for used in (0, 1, (0, 1)) * 5:
        results = []
        for context in (contextlib.nullcontext, plans.off):
            with context():
                y = layer_norm(x, weight, residual=residual)
                total = y[used].sum() if isinstance(used, int) else y[0].sum() + y[1].square().sum()
                results.append(torch.autograd.grad(total, (x, residual, weight), allow_unused=True))
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_saved_tensors_that_changed_are_refused():
    x, weight = normal(6, 16).requires_grad_(), normal(16)
    for _ in range(4):
        y = rms_norm(x, weight).sum()
        weight += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_second_derivatives_stay_refused():
    x, weight = normal(6, 16).requires_grad_(), normal(16)
    for _ in range(4):
        (grad,) = torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            grad.sum().backward()
        torch.autograd.grad(rms_norm(x, weight).sum(), x)


def test_inference_mode_and_other_threads():
    x, weight = normal(5, 16), normal(16)
    expected = torch.rms_norm(x, (16,), weight, 1e-6)
    results = []

    def run():
        for _ in range(20):
            results.append(rms_norm(x, weight))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        results += [rms_norm(x, weight) for _ in range(4)]
    assert results[-1].is_inference() and len(results) == 84
    for result in results:
        torch.testing.assert_close(result, expected)


def test_a_call_that_fails_while_it_is_recorded():
    def function(x: Tensor):
        if failing:
            raise ArithmeticError
        return gelu(x)

    planned, x, failing = plans.planned(function), normal(5, 16), False
    planned(x)
    failing = True
    with pytest.raises(ArithmeticError):
        planned(x)
    failing = False
    for _ in range(4):
        assert torch.equal(planned(x), gelu(x))


def test_no_tensor_is_kept():
    x, weight, q = normal(5, 16).requires_grad_(), normal(16), normal(1, 5, 2, 8)
    for _ in range(6):
        rms_norm(x, weight).sum().backward()
        attention(q, q + 1, q + 2)
    kept = [weakref.ref(tensor) for tensor in (x, weight, q)]
    del x, weight, q
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 8)
    table = plans.Table()
    for i in range(20):
        table.keep((i,), "a plan")
        table.used((0,))
    assert len(table) == 8 and (0,) in table and (19,) in table and (10,) not in table
