"""The `pynlp` operator library: where an op is declared and its back ends are put in the dispatcher."""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

# Private names of torch, the only ones here; tests/package/test_library.py compares what is built on them with torch's.
from torch._C import _after_autograd_keyset, _any_requires_grad, _AutoDispatchBelowAutograd

from pynlp import backends

LIBRARY = torch.library.Library("pynlp", "DEF")


class Op(NamedTuple):
    """A declared op's back ends.

    Attributes:
        place: Number of the argument whose dtype decides.
        triton: Module in `pynlp.kernels` that has its launcher; None without one.
    """

    place: int
    triton: str | None


OPS: dict[str, Op] = {}


def define(name: str, schema: str, reference: ModuleType, *, triton: str | None, dtype_of: str) -> None:
    """Declare `pynlp::name`; the functions of its back ends have its name, too.

    The native CPU kernel registers itself when `pynlp._C` is loaded. `pynlp::name_reference` always runs the
    reference: back ends hand it what they do not serve.

    Args:
        reference: The module with the default kernel.
        triton: The module in `pynlp.kernels` with the launcher for GPUs; None: the reference serves them.
        dtype_of: The argument whose dtype decides: in fp64 the reference serves the call.
    """
    tags = (torch.Tag.pt2_compliant_tag,)
    arguments = [argument.split()[-1] for argument in schema[1 : schema.index(") ->")].split(", ")]
    op = OPS[name] = Op(arguments.index(dtype_of), triton)
    LIBRARY.define(f"{name}{schema}", tags=(*tags, torch.Tag.needs_fixed_stride_order))
    LIBRARY.define(f"{name}_reference{schema}", tags=tags)
    LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_reference", getattr(reference, name), "CompositeExplicitAutograd")
    if triton is not None:
        LIBRARY.impl(name, _gpu_kernel(name, op, reference), "CUDA")  # ROCm answers to the same key


def _gpu_kernel(name: str, op: Op, reference: ModuleType) -> Callable:
    def kernel(*arguments):
        serves = reference if arguments[op.place].dtype == torch.float64 else _launchers(op.triton) or reference
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
    arguments that takes 90 us, more than the attention of a short sequence.

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

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *arguments):
            output = below_autograd(keyset, *arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

    def kernel(keyset, *arguments):
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return Gradient.apply(keyset, *arguments)
        return below_autograd(keyset, *arguments)

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else kernel(None, *arguments)

    Gradient.__name__ = f"{name}_gradient"
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
        raise NotImplementedError(f"{what} no second derivative: backward with create_graph=True is not served")

    return register_autograd(name, lambda ctx, inputs, output: None, backward)
