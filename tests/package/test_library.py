"""The gradients of ops, against what torch.library.register_autograd makes of the same functions: a torch that changes
what ours is built on is seen here.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pynlp import backends
from pynlp.ops.common import library
from pynlp.ops.layers import argmax_and_lse  # noqa: F401  it is declared where decoding needs it

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "(Tensor x, Tensor? y, float scale, int[] sizes) -> (Tensor, Tensor)"


def twin(x, y, scale, sizes):
    return x * scale if y is None else x * y * scale, x.detach().sum(-1)


def setup_context(ctx, inputs, output):
    x, y, ctx.scale, _ = inputs
    ctx.save_for_backward(x, y)


def backward(ctx, saved, needs, grad, grad_sum):
    x, y = saved
    grad = grad * ctx.scale
    return grad if y is None else grad * y, None if y is None else (grad * x).sum_to_size(y.shape), None, None


def failing(ctx, saved, needs, *grads):
    raise ArithmeticError("no gradient today")


def too_few(ctx, saved, needs, *grads):
    return grads[:1]


@pytest.fixture
def ours(monkeypatch):
    """Declares an op of `twin` as pynlp's ops are declared; gives what callers in Python call."""
    scratch = torch.library.Library("pynlp", "FRAGMENT")
    monkeypatch.setattr(library, "LIBRARY", scratch)
    monkeypatch.setattr(library, "OPS", {})

    def declare(backward):
        library.define("twin", SCHEMA, SimpleNamespace(twin=twin), triton=None, dtype_of="x")
        torch.library.register_fake("pynlp::twin", twin, lib=scratch)
        return library.register_autograd("twin", setup_context, backward)

    yield declare
    scratch._destroy()


@pytest.fixture
def torchs():
    """The same by torch alone."""
    scratch = torch.library.Library("pynlp_twins", "DEF")

    def declare(backward):
        def whole(ctx, *grads):
            return backward(ctx, ctx.saved_tensors, ctx.needs_input_grad, *grads)

        scratch.define(f"twin{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
        scratch.impl("twin", twin, "CompositeExplicitAutograd")
        torch.library.register_fake("pynlp_twins::twin", twin, lib=scratch)
        torch.library.register_autograd("pynlp_twins::twin", whole, setup_context=setup_context, lib=scratch)
        return torch.ops.pynlp_twins.twin.default

    yield declare
    scratch._destroy()


@pytest.fixture
def both(ours, torchs):
    """Calls to compare: ours from Python, ours from the dispatcher, torch's."""
    return ours(backward), torch.ops.pynlp.twin.default, torchs(backward)


def outcome(call):
    """What a call gives, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(call, both):
    *ours, expected = (outcome(lambda op=op: call(op)) for op in both)
    for other in ours:
        if isinstance(expected, type):
            assert other is expected
        else:
            torch.testing.assert_close(other, expected, rtol=0, atol=0)


def inputs(x_grad=True, y_grad=True):
    torch.manual_seed(0)
    return torch.randn(3, 4, requires_grad=x_grad), torch.randn(4, requires_grad=y_grad)


@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("y_grad", [False, True])
def test_gradients(both, x_grad, y_grad):
    def call(op):
        x, y = inputs(x_grad, y_grad)
        out, sums = op(x, y, 0.5, [1, 2])
        assert out.requires_grad == sums.requires_grad == (x_grad or y_grad)
        if x_grad or y_grad:
            (out.square().sum() + sums.sum()).backward()
        return out.detach(), [t.grad if t.grad is not None else torch.tensor(torch.nan) for t in (x, y)][:x_grad]

    assert_same(call, both)


def test_an_argument_that_is_none_and_one_output_of_two(both):
    def call(op):
        x, _ = inputs()
        return torch.autograd.grad(op(x, None, 2.0, [])[0].sum(), x)

    assert_same(call, both)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(both, mode):
    def call(op):
        with mode():
            results = op(*inputs(), 0.5, [])
        assert not any(result.requires_grad for result in results)
        return [result.clone() for result in results]

    assert_same(call, both)


@pytest.mark.parametrize("wrong", [failing, too_few])
def test_errors_of_a_backward(ours, torchs, wrong):
    def call(op):
        x, y = inputs()
        op(x, y, 0.5, [])[0].sum().backward()

    both = ours(wrong), torch.ops.pynlp.twin.default, torchs(wrong)
    assert isinstance(outcome(lambda: call(both[-1])), type)
    assert_same(call, both)


def test_what_was_saved_and_then_written_to_is_an_error(both):
    def call(op):
        x, y = inputs()
        x = x.clone()
        out, _ = op(x, y, 0.5, [])
        x.mul_(2)
        out.sum().backward()

    assert outcome(lambda: call(both[-1])) is RuntimeError
    assert_same(call, both)


def test_checkpointing_hooks_and_second_gradients(both):
    def checkpointed(op):
        x, y = inputs()
        out = checkpoint(lambda x, y: op(x, y, 0.5, [])[0], x, y, use_reentrant=False)
        return torch.autograd.grad(out.square().sum(), (x, y))

    def hooked(op):
        x, y = inputs()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.clone()) or t, lambda t: t):
            out, _ = op(x, y, 0.5, [])
        return seen, torch.autograd.grad(out.sum(), (x, y))

    def twice(op):
        x, y = inputs()
        grad, _ = torch.autograd.grad(op(x, y, 0.5, [])[0].pow(3).sum(), (x, y), create_graph=True)
        return torch.autograd.grad(grad.sum(), (x, y))

    for call in (checkpointed, hooked, twice):
        assert_same(call, both)


def test_compiled(both):
    def call(op):
        torch._dynamo.reset()
        x, y = inputs()
        compiled = torch.compile(lambda x, y: op(x, y, 0.5, [])[0].square(), fullgraph=True, backend="aot_eager")
        return torch.autograd.grad(compiled(x, y).sum(), (x, y))

    assert_same(call, both)


def over_rows(function):
    return torch.vmap(function, in_dims=(0, None))


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        torch.func.functionalize,
        over_rows,
        lambda function: over_rows(torch.func.grad(function, argnums=(0, 1))),
        lambda function: torch.func.grad(lambda x, y: over_rows(function)(x, y).sum()),
        lambda function: over_rows(torch.vmap(function, in_dims=(0, 0))),
        lambda function: lambda x, y: torch.func.vjp(function, x, y)[1](torch.ones(())),
    ],
)
def test_functional_transforms(ours, transform):
    """From Python; by the dispatcher, torch.func takes no op with a gradient that is written in Python."""
    call, loss = ours(backward), lambda op: lambda x, y: op(x, y, 0.5, [])[0].square().sum()
    expected = transform(loss(twin))(*inputs(False, False))
    torch.testing.assert_close(transform(loss(call))(*inputs(False, False)), expected)
    direct = outcome(lambda: transform(loss(torch.ops.pynlp.twin.default))(*inputs(False, False)))
    if direct is not NotImplementedError:
        torch.testing.assert_close(direct, expected)


def test_no_tangent_is_lost(ours):
    """Forward mode asks for a derivative that ops do not have: an error, where nothing requires a gradient, too."""
    call = ours(backward)
    for op in (call, torch.ops.pynlp.twin.default):
        x, y = inputs(False, False)
        with torch.autograd.forward_ad.dual_level():
            op(x, y, 0.5, [])  # nothing to lose
            with pytest.raises(NotImplementedError, match="pynlp's twin has no forward-mode derivative"):
                op(torch.autograd.forward_ad.make_dual(x, x), y, 0.5, [])
    for transform in (lambda f, *xs: torch.func.jvp(f, xs, xs), lambda f, *xs: torch.func.hessian(f)(*xs)):
        with pytest.raises(NotImplementedError, match="pynlp's twin has no forward-mode derivative"):
            transform(lambda x, y: call(x, y, 0.5, [])[0].sum(), *inputs(False, False))


def test_an_op_without_derivatives_refuses_them():
    x, y = inputs(False, False)

    def refusing(x, y):
        library.refuse_derivatives("twin", None, x, y)
        return (x * y).sum()

    refusing(x, y)
    torch.vmap(refusing, in_dims=(0, None))(x, y)
    torch.func.grad(lambda z: refusing(x, y) * z)(torch.ones(()))  # of something else
    with pytest.raises(NotImplementedError, match="pynlp's twin has no derivative"):
        torch.func.grad(refusing)(x, y)
    with pytest.raises(NotImplementedError, match="pynlp's twin has no derivative"):
        torch.vmap(torch.func.grad(refusing), in_dims=(0, None))(x, y)
    with pytest.raises(NotImplementedError, match="pynlp's twin has no derivative"):
        torch.func.jvp(refusing, (x, y), (x, y))
    with torch.autograd.forward_ad.dual_level():
        refusing(x, y)
        with pytest.raises(NotImplementedError, match="pynlp's twin has no forward-mode derivative"):
            refusing(torch.autograd.forward_ad.make_dual(x, x), y)


def test_opcheck(ours):
    ours(backward)
    results = torch.library.opcheck(torch.ops.pynlp.twin.default, (*inputs(), 0.5, [1]))
    assert set(results.values()) == {"SUCCESS"}


def test_modes_see_the_op(both):
    """A dispatch mode, as profilers and counters of FLOPs are, is shown the op and not what it consists of."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name().split("::")[1])
            return function(*args, **kwargs or {})

    for op in both:
        names, tensors = [], inputs()
        with Seen():
            op(*tensors, 0.5, [])
        assert names == ["twin"]


def test_argument_whose_dtype_decides():
    """Each op names one, and the arguments before it are not always tensors of that dtype."""
    for name, op in library.OPS.items():
        schema = getattr(torch.ops.pynlp, name).default._schema
        assert str(schema.arguments[op.place].type) == "Tensor", name
    assert library.OPS["attention_backward"].place == 2


def test_every_op_has_its_parts():
    """The parameters of references and launchers are the schema's, and so is the place of dtype_of in C++."""
    places = {}
    for path in (ROOT / "csrc/bindings").glob("*.cpp"):
        for name, place in re.findall(r"PYNLP_IMPL\(m, (\w+)(?:, (\d+))?\)", path.read_text()):
            places[name] = int(place or 0)
    assert places == {name: op.place for name, op in library.OPS.items()}
    for name, op in library.OPS.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{name}", "Meta"), f"{name}: no register_fake"
        names = [argument.name for argument in getattr(torch.ops.pynlp, name).default._schema.arguments]
        modules = {"reference": op.reference}
        if op.triton is not None:
            modules["launcher"] = importlib.import_module(f"pynlp.kernels.{op.triton}")
        for kind, module in modules.items():
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            fixed = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
            assert fixed == names[: len(fixed)] and len(fixed) <= len(names), f"{name}: {kind}"
            assert len(fixed) == len(names) or any(p.kind is p.VAR_POSITIONAL for p in parameters), f"{name}: {kind}"


def test_a_schema_by_position_only():
    for schema in ("(Tensor x, float cap=1.0) -> Tensor", "(Tensor x, *, float cap) -> Tensor"):
        with pytest.raises(ValueError, match="twin: expected a schema of arguments by position"):
            library.define("twin", schema, SimpleNamespace(twin=twin), triton=None, dtype_of="x")
    with pytest.raises(ValueError, match="twin: expected dtype_of to be one of x, cap, got 'q'"):
        library.define("twin", "(Tensor x, float cap) -> Tensor", SimpleNamespace(), triton=None, dtype_of="q")


def test_grad_fn_is_called_after_the_op(ours):
    assert ours(backward)(*inputs(), 0.5, [])[0].grad_fn.name() == "twinBackward"


def test_back_end_on_a_gpu(monkeypatch):
    """The launcher serves; the reference does for the named argument in fp64, and, with one warning, without Triton."""
    reference, launchers = (SimpleNamespace(twin=lambda *_, name=name: name) for name in ("reference", "launcher"))
    monkeypatch.setitem(sys.modules, "pynlp.kernels.twins", launchers)
    kernel = library._gpu_kernel("twin", library.Op(1, reference, "twins"))
    single, exact = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert kernel(exact, single) == "launcher" and kernel(single, exact) == "reference"
    library._launchers.cache_clear()
    monkeypatch.setattr(backends, "triton_missing_reason", lambda: "Triton is not installed")
    with pytest.warns(UserWarning, match="pynlp.twins runs on the slow reference: Triton is not installed") as caught:
        assert [kernel(single, single) for _ in range(3)] == ["reference"] * 3
    assert len(caught) == 1
    library._launchers.cache_clear()
