"""The `pynlp` operator library: where an op is declared and its back ends are put in the dispatcher."""

import functools
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# Private names of torch, the only ones here; tests/package/test_library.py compares what is built on them with torch's.
from torch._C import (
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
)
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

from pynlp import backends
from pynlp.ops.common import native, plans
from pynlp.ops.common.checks import is_plain

LIBRARY = torch.library.Library("pynlp", "DEF")


class Op(NamedTuple):
    """A declared op's back ends.

    Attributes:
        place: Number of the argument whose dtype decides which back end serves a call.
        reference: Module that has its default kernel.
        triton: Module in `pynlp.kernels` that has its launcher; None without one.
    """

    place: int
    reference: ModuleType
    triton: str | None


OPS: dict[str, Op] = {}


def define(name: str, schema: str, reference: ModuleType, *, triton: str | None, dtype_of: str) -> None:
    """Declare `pynlp::name`; the functions of its back ends have its name, too.

    The native CPU kernel, which every op has, registers itself when `pynlp._C` is loaded, by PYNLP_IMPL in
    csrc/bindings. `pynlp::name_reference` always runs the reference: back ends hand it what they do not serve.

    Args:
        reference: The module with the default kernel.
        triton: The module in `pynlp.kernels` with the launcher for GPUs; None: the reference serves them.
        dtype_of: The argument whose dtype decides: in fp64 the reference serves the call.
    """
    tags = (torch.Tag.pt2_compliant_tag,)
    arguments = [argument.split()[-1] for argument in schema[1 : schema.index(") ->")].split(", ")]
    if "=" in schema or "*" in arguments:
        raise ValueError(f"{name}: expected a schema of arguments by position, without defaults, got {schema}")
    if dtype_of not in arguments:
        raise ValueError(f"{name}: expected dtype_of to be one of {', '.join(arguments)}, got {dtype_of!r}")
    op = OPS[name] = Op(arguments.index(dtype_of), reference, triton)
    LIBRARY.define(f"{name}{schema}", tags=(*tags, torch.Tag.needs_fixed_stride_order))
    LIBRARY.define(f"{name}_reference{schema}", tags=tags)
    LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_reference", getattr(reference, name), "CompositeExplicitAutograd")
    if triton is not None:
        LIBRARY.impl(name, _gpu_kernel(name, op), "CUDA")  # ROCm answers to the same key


def _gpu_kernel(name: str, op: Op) -> Callable:
    def kernel(*arguments):
        serves = op.reference
        if arguments[op.place].dtype != torch.float64:
            serves = _launchers(op.triton) or op.reference
        function, launch = getattr(serves, name), plans.launch_by()
        if launch is not None and serves is not op.reference:
            function = functools.partial(launch, function)
        device = arguments[op.place].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton starts kernels on the current one
                return function(*arguments)
        return function(*arguments)

    return kernel


@cache
def _launchers(module: str) -> ModuleType | None:
    """The Triton launchers in `pynlp.kernels.<module>`; None without Triton, with a warning."""
    reason = backends.triton_missing_reason()
    if reason is None:
        return importlib.import_module(f"pynlp.kernels.{module}")
    backends.warn_once(f"pynlp.{module.split('.')[0]} runs on the slow reference: {reason}")
    return None


def launcher_serves(name: str, x: Tensor) -> bool:
    """Whether the op's Triton launcher serves an eager call with x as the argument that decides."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or not (x.is_cuda or plans.triton_serves_cpu):
        return False
    return is_plain(x) and OPS[name].triton is not None and _launchers(OPS[name].triton) is not None


def load_native_kernels() -> None:
    """Load the CPU kernels of the ops declared so far; if there are none, the reference serves and warns that it does.

    Raises:
        ValueError: as `backends.load_native`.
    """
    backends.load_native()
    if backends.native_missing_reason() is not None:
        for name, op in OPS.items():
            LIBRARY.impl(name, _reference_with_warning(name, op), "CPU")


def _reference_with_warning(name: str, op: Op) -> Callable:
    reference = getattr(torch.ops.pynlp, f"{name}_reference")

    def kernel(*arguments):
        if arguments[op.place].dtype != torch.float64:  # there the reference is the only back end
            reason = backends.native_missing_reason()
            backends.warn_once(f"pynlp runs on the slow PyTorch reference on the CPU: {reason}")
        return reference(*arguments)

    return kernel


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> Callable:
    """Give `pynlp::name` a gradient: `setup_context(ctx, inputs, output)`, `backward(ctx, saved, needs, *grads)`.

    The first saves tensors; the second gets them, and for each argument whether its gradient is needed.

    The result is that of torch.library.register_autograd, which rebuilds the schema in Python at every call: with 16
    arguments that takes 90 us, more than the attention of a short sequence. Callers in Python also get torch.func's
    transforms (vmap one sample after the other) and, in forward mode, an error where a tangent would be lost.

    Returns:
        The op for callers in Python. Unless torch.compile traces it, a call comes to Python without a detour through
        the dispatcher, which takes 10 to 20 us, and goes on by a plan where there is one.
    """
    op = getattr(torch.ops.pynlp, name).default

    def below_autograd(keyset, *arguments):
        with _AutoDispatchBelowAutograd():
            if keyset is None:
                return op(*arguments)
            return op.redispatch(keyset & _after_autograd_keyset, *arguments)

    class Gradient(torch.autograd.Function):
        """Takes the arguments and, from the dispatcher, the keys that are left; else None."""

        @staticmethod
        def forward(*inputs):
            *arguments, keyset = inputs
            return below_autograd(keyset, *arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, ctx.saved_tensors, ctx.needs_input_grad, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            raise no_forward_mode(name)

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return one_by_one(Gradient.apply, info.batch_size, in_dims, inputs)

    Gradient = _renamed(Gradient, name)

    def kernel(keyset, *arguments):
        if (torch.is_grad_enabled() and _any_requires_grad(*arguments)) or is_transformed():
            return Gradient.apply(*arguments, keyset)
        return below_autograd(keyset, *arguments)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    slow = functools.partial(kernel, None)
    record = functools.partial(_recorded, OPS[name], slow)
    planned = plans.planned_op(slow, _planned_gradient(name, setup_context, backward), record, _of_tensors(op))

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else planned(*arguments)

    return call


def _of_tensors(op: torch._ops.OpOverload) -> list[int]:
    """The places of an op's arguments that are tensors, or None."""
    return [i for i, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]


def _planned_gradient(name: str, setup_context: Callable, backward: Callable) -> Callable:
    """What `register_autograd` makes, for calls that have a plan, of which backward is then a part."""
    table = plans.Table()

    class Gradient(torch.autograd.Function):
        """Takes the tensors and a plans.Served; gives the results that callers want, None for others and behind all."""

        @staticmethod
        def forward(ctx, *inputs):
            ctx.served = served = inputs[-1]
            results = served.runner(inputs)
            if results is None:
                raise plans.Stale
            setup_context(ctx, served.arguments_of(inputs), results[0] if served.is_single else results[:-1])
            return tuple(results) if served.pick is None else served.pick(results)

        @staticmethod
        def backward(ctx, *grads):
            saved = ctx.saved_tensors  # which can be asked for once
            grads = grads[:-1]
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or plans.is_backward_watched():
                return whole_backward(ctx, saved, *grads)
            kind, tensors = [False, ctx.served, *ctx.needs_input_grad], []
            try:
                plans.describe((*grads, *saved), kind, tensors)
            except (plans.Stale, RuntimeError):
                return whole_backward(ctx, saved, *grads)
            return plans.serve(table, tuple(kind), tensors, whole_backward, (ctx, saved, *grads))

    def whole_backward(ctx, saved, *grads):
        needs = [False] * ctx.served.argument_count
        for place, needed in zip(ctx.served.places, ctx.needs_input_grad, strict=False):
            needs[place] = needed
        gradients = backward(ctx, saved, needs, *grads)
        return *[gradients[place] for place in ctx.served.places], None

    # Function.apply looks for defaults in the signature of forward first, which takes longer than all else.
    return super(torch.autograd.Function, _renamed(Gradient, name)).apply


def _renamed(Gradient: type, name: str) -> type:
    """The autograd.Function with an op's name, after which its grad_fn is called."""
    return type(Gradient)(name, Gradient.__bases__, dict(vars(Gradient)))


def _recorded(op: Op, call: Callable, arguments: Sequence) -> tuple[object, plans.Program | None]:
    """The result of a call, and what a back end did for it, where that can be told."""
    if arguments[op.place].is_cpu and not plans.triton_serves_cpu:
        return native.recorded(call, arguments)
    if op.triton is None or backends.triton_missing_reason() is not None:
        return call(*arguments), None
    recorder = plans.triton_recorder()
    with plans.launching_by(recorder.run):
        result = call(*arguments)
    return result, recorder.program


def without_gradient(name: str) -> Callable:
    """`pynlp::name`, which has no gradient, for callers in Python; see `register_autograd`."""
    op = getattr(torch.ops.pynlp, name).default
    planned = plans.planned_op(op, None, functools.partial(_recorded, OPS[name], op), _of_tensors(op))

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else planned(*arguments)

    return call


def refuse_double_backward(name: str, what: str) -> Callable:
    """Refuse second derivatives: a gradient of `pynlp::name`, itself a backward, raises NotImplementedError.

    Args:
        what: How the message begins: "pynlp's norms have".

    Returns:
        The op for callers in Python.
    """

    def backward(ctx, saved, needs, *gradients):
        raise no_second_derivative(what)

    return register_autograd(name, lambda ctx, inputs, output: None, backward)


def no_second_derivative(what: str) -> NotImplementedError:
    return NotImplementedError(f"{what} no second derivative: backward with create_graph=True is not served")


class Last(torch.autograd.Function):
    """x, which cannot be differentiated, as if it came from another tensor: backward says that it has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, source, what):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.what = inputs

    @staticmethod
    def backward(ctx, grad):
        raise no_second_derivative(ctx.what)


def refuse_further(what: str, x: Tensor, source: Tensor) -> Tensor:
    """x, a derivative of which nothing is known; where `source` requires a gradient, a second one is refused."""
    return Last.apply(x, source, what)


def is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func is on, which plain autograd does not know of."""
    if forward_ad._current_level >= 0:
        return True
    return _are_functorch_transforms_active() and peek_interpreter_stack().key() != TransformType.Functionalize


def refuse_derivatives(name: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a transform asks for a derivative of an op that has none; else it would be 0."""
    if not is_transformed():
        return
    for x in tensors:
        while x is not None and is_functorch_wrapped_tensor(x):
            if is_gradtrackingtensor(x):
                raise NotImplementedError(f"pynlp's {name} has no derivative: torch.func cannot differentiate it")
            x = get_unwrapped(x)
        if x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise no_forward_mode(name)


def no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(f"pynlp's {name} has no forward-mode derivative")


def one_by_one(function: Callable, count: int, dims: Sequence[int | None], inputs: Sequence) -> tuple:
    """The results of a function for each sample of the batched inputs, stacked; a vmap rule."""
    samples = []
    for i in range(count):
        sample = [x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, dims, strict=True)]
        samples.append(function(*sample))
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])
