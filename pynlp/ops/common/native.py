"""Plans of the native CPU kernels: addresses in, nothing looked up again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pynlp import backends
from pynlp.ops.common.plans import as_list

try:  # private: a tensor in a third of the time that torch.empty takes
    from torch._C._dynamo.guards import _empty_strided_cpu
except ImportError:

    def _empty_strided_cpu(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype)


# Results of more bytes are left to the op, which asks the system for huge pages for them.
MOST_BYTES = 2**24


class NativeProgram:
    """A call of a native kernel, to be made again; see `plans.Program`."""

    def __init__(self, call: Callable[..., bool], optional: Sequence[bool], results: Sequence[Tensor]):
        self.call = call
        self.count = len(results)
        self.made = [(tuple(x.shape), x.stride(), x.dtype) for x in results]
        optional = optional[len(optional) - len(results) :]
        self.needed = [i for i, x in enumerate(results) if x.numel() and not optional[i]]  # by the kernel

    def runner(self, places: Sequence[int], wanted: Sequence[int] | None = None) -> Callable:
        """See `plans.Program`."""
        call, empty = self.call, _empty_strided_cpu
        made = [x if wanted is None or i in wanted or i in self.needed else None for i, x in enumerate(self.made)]

        def run(arguments):
            try:
                results, addresses = [], [arguments[i].data_ptr() for i in places]
            except RuntimeError:  # wrappers of tensors, of older transforms or that outlived theirs, have no memory
                return None
            for x in made:
                if x is None:
                    results.append(None)
                    addresses.append(0)
                else:
                    results.append(empty(*x))
                    addresses.append(results[-1].data_ptr())
            results.append(None)
            return results if call(*addresses) else None

        return run


def recorded(call: Callable, arguments: Sequence) -> tuple[object, NativeProgram | None]:
    """The result of a call of an op on the CPU; what it did, if that was one native kernel on small tensors."""
    if backends.native_missing_reason() is not None:
        return call(*arguments), None
    native = backends.native()
    native.start_plan()
    try:
        result = call(*arguments)
    finally:
        made = native.finish_plan()
    results = as_list(result)
    if made is None or sum(x.nbytes for x in results) > MOST_BYTES:
        return result, None
    if len(made[1]) != len(results) + sum(isinstance(x, Tensor) for x in arguments):  # it takes others than were given
        return result, None
    return result, NativeProgram(*made, results)
