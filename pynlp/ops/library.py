"""The `pynlp` operator library: where an op is declared and its back ends are put in the dispatcher."""

from collections.abc import Callable

import torch

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
