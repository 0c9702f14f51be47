"""The `pynlp` operator library: where an op is declared and its back ends are put in the dispatcher."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("pynlp", "DEF")


def define(name: str, schema: str, reference: Callable, triton: Callable) -> None:
    """Declare `pynlp::name` with the reference as its default kernel and a Triton launcher for GPUs.

    `pynlp::name_reference` always runs the reference: native kernels hand it what they do not serve.
    The native CPU kernel registers itself when `pynlp._C` is loaded.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.define(f"{name}_reference{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, triton, "CUDA")  # ROCm answers to the same key


def triton_launcher(x: Tensor, module: str):
    """The module of Triton launchers `pynlp.kernels.<module>`, or None where the reference must serve."""
    from pynlp.backends import triton_missing_reason, warn_once

    if x.dtype == torch.float64:
        return None
    reason = triton_missing_reason()
    if reason is None:
        return importlib.import_module(f"pynlp.kernels.{module}")
    warn_once(f"pynlp.{module} runs on the slow reference: {reason}")
    return None


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> Callable:
    """Give `pynlp::name` a gradient: `setup_context(ctx, inputs, output)` saves for `backward(ctx, *grads)`.

    Does what torch.library.register_autograd does, without its rebuilding of the schema in Python at every call:
    with 16 arguments that took 90 us, more than the attention of a short sequence.

    Returns the op for callers in Python: the same, but unless torch.compile traces it, it does not go through the
    dispatcher to come back to Python, which takes 10 to 20 us.
    """
    op = getattr(torch.ops.pynlp, name).default

    def below_autograd(keyset, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return op(*arguments)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

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
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Gradient.apply(keyset, *arguments)
        return below_autograd(keyset, *arguments)

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else kernel(None, *arguments)

    Gradient.__name__ = f"{name}_gradient"
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return call


def refuse_double_backward(name: str, what: str) -> Callable:
    """Give `pynlp::name`, itself a backward, a gradient that is an error: `what` no second derivative. Returns it."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f"{what} no second derivative: backward with create_graph=True is not served")

    return register_autograd(name, lambda ctx, inputs, output: None, backward)
