"""The `pynlp` operator library: where an op is declared and its back ends are put in the dispatcher."""

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
        return getattr(serves, name)(*arguments)

    return kernel


@cache
def _launchers(module: str) -> ModuleType | None:
    """The Triton launchers in `pynlp.kernels.<module>`; None without Triton, with a warning."""
    reason = backends.triton_missing_reason()
    if reason is None:
        return importlib.import_module(f"pynlp.kernels.{module}")
    backends.warn_once(f"pynlp.{module.split('.')[0]} runs on the slow reference: {reason}")
    return None


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
    """Give `pynlp::name` a gradient: `setup_context(ctx, inputs, output)` saves for `backward(ctx, *grads)`.

    The result is that of torch.library.register_autograd, which rebuilds the schema in Python at every call: with 16
    arguments that takes 90 us, more than the attention of a short sequence. Callers in Python also get torch.func's
    transforms (vmap one sample after the other) and, in forward mode, an error where a tangent would be lost.

    Returns:
        The op for callers in Python. Unless torch.compile traces it, a call comes to Python without a detour through
        the dispatcher, which takes 10 to 20 us.
    """
    op = getattr(torch.ops.pynlp, name).default

    def below_autograd(keyset, *arguments):
        with _AutoDispatchBelowAutograd():
            if keyset is None:
                return op(*arguments)
            return op.redispatch(keyset & _after_autograd_keyset, *arguments)

    def split(arguments_and_keyset):
        *arguments, keyset = arguments_and_keyset
        return arguments, keyset

    class Gradient(torch.autograd.Function):
        """Takes the arguments and, from the dispatcher, the keys that are left; else None."""

        @staticmethod
        def forward(*inputs):
            arguments, keyset = split(inputs)
            return below_autograd(keyset, *arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, split(inputs)[0], output)

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            raise no_forward_mode(name)

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return one_by_one(Gradient.apply, info.batch_size, in_dims, inputs)

    Gradient = type(Gradient)(name, Gradient.__bases__, dict(vars(Gradient)))  # grad_fn is called after the op

    def kernel(keyset, *arguments):
        if (torch.is_grad_enabled() and _any_requires_grad(*arguments)) or is_transformed():
            return Gradient.apply(*arguments, keyset)
        return below_autograd(keyset, *arguments)

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else kernel(None, *arguments)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return call


def refuse_double_backward(name: str, what: str) -> Callable:
    """Refuse second derivatives: a gradient of `pynlp::name`, itself a backward, raises NotImplementedError.

    Args:
        what: How the message begins: "pynlp's norms have".

    Returns:
        The op for callers in Python.
    """

    def backward(ctx, *gradients):
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
