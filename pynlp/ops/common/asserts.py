"""Checks of integers that lie on a device: assertions there, each by one kernel, in place of errors on the host."""

import importlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

# A private name of torch: whether a tensor is one of torch.func's transforms.
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from pynlp import backends
from pynlp.ops.common import plans


def are_on_device(x: Tensor) -> bool:
    """Whether x is checked on its device: its values are there, and Triton is, and nothing traces."""
    if is_compiling() or not (x.is_cuda or plans.triton_serves_cpu) or type(x) not in (Tensor, nn.Parameter):
        return False
    return not is_functorch_wrapped_tensor(x) and backends.triton_missing_reason() is None


def _planned(name: str) -> Callable:
    """The launcher of this name in kernels/common/checks.py; plans start what it starts."""

    def launch(*arguments):
        return getattr(importlib.import_module("pynlp.kernels.common.checks"), name)(*arguments)

    def record(arguments: Sequence) -> tuple[object, plans.Program | None]:
        recorder = plans.triton_recorder()
        return recorder.run(launch, *arguments), recorder.program

    return plans.planned_op(launch, None, record, range(2))  # at most two tensors, which come first


assert_range = _planned("assert_range")
assert_starts = _planned("assert_starts")
assert_positions = _planned("assert_positions")
