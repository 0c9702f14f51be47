"""The order of tokens by their experts: schema, fake and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import as_int, at_once, check_is_tensor, untransformed
from pynlp.ops.common.library import LIBRARY, define, without_gradient
from pynlp.ops.common.plans import act, derive, planned
from pynlp.reference.moe import dispatch as reference

define(
    "moe_dispatch",
    "(Tensor top_k_index, SymInt num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="moe.dispatch",
    dtype_of="top_k_index",
)


@torch.library.register_fake("pynlp::moe_dispatch", lib=LIBRARY)
def _fake(top_k_index, num_experts):
    def empty(*shape):
        return top_k_index.new_empty(shape, dtype=torch.int32)

    slots = top_k_index.numel()
    return empty(num_experts), empty(num_experts), empty(slots), empty(*top_k_index.shape)


dispatched = without_gradient("moe_dispatch")


class Dispatch(NamedTuple):
    """The order of slots by their experts, all int32 on the device of the indices.

    Attributes:
        counts: `(num_experts,)`, the rows of each expert.
        offsets: `(num_experts,)`, where they end: what `grouped_mm` takes.
        permutation: `(tokens * top_k,)`, the slot of each row: `x[permutation // top_k]` are the rows of tokens x.
    """

    counts: Tensor
    offsets: Tensor
    permutation: Tensor


def moe_dispatch(top_k_index: Tensor, num_experts: int) -> Dispatch:
    """The order of tokens by their experts: a stable counting sort, on a GPU without waiting for it.

    A slot is one choice of a token: choice k of token t is slot `t * top_k + k`. Slots with the numbers -1 and
    num_experts have no expert; they come last.

    Args:
        top_k_index: `(.., top_k)`, int32 or int64: the experts of each token. One may stand there twice.
        num_experts: Number of experts.

    Returns:
        counts, offsets and permutation: see `Dispatch`.

    Raises:
        ValueError: num_experts is negative; on a CPU also where an index is not from -1 to num_experts. On a GPU such a
            slot has no expert.
        TypeError: top_k_index is no integer tensor of these dtypes.

    Example:
        >>> import torch
        >>> from pynlp.functional import moe_dispatch
        >>> counts, offsets, permutation = moe_dispatch(torch.tensor([[2, 0], [0, 1], [2, 0]]), 3)
        >>> counts.tolist(), offsets.tolist(), permutation.tolist()
        ([3, 1, 2], [3, 4, 6], [1, 2, 5, 3, 0, 4])
    """
    return Dispatch(*_moe_dispatch(top_k_index, num_experts))


@planned
def _moe_dispatch(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_index("top_k_index", top_k_index, num_experts)
    return dispatched(derive(Tensor.contiguous, top_k_index), num_experts)[:3]


def check_index(name: str, index: Tensor, num_experts: int) -> None:
    """Check for experts' numbers; on a CPU for their values, too."""
    check_is_tensor(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {index.dtype}")
    if index.dim() == 0:
        raise ValueError(f"{name}: expected shape (.., top_k), got a tensor without dimensions")
    if as_int("num_experts", num_experts) < 0:
        raise ValueError(f"num_experts: expected 0 or more, got {num_experts}")
    if index.numel() and at_once(index):
        act(_check_values, name, index, num_experts)


def _check_values(name: str, index: Tensor, num_experts: int) -> None:
    least, most = (x.item() for x in torch.aminmax(untransformed(index)))
    if least < -1 or most > num_experts:
        raise ValueError(
            f"{name}: expected experts from 0 to {num_experts - 1}, or -1 or {num_experts} for none, "
            f"got {least} to {most}"
        )
