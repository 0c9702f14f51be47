"""Products of groups of rows, each with a matrix of its own: schema, fake, autograd and the public function."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import (
    as_fp32,
    at_once,
    autocast,
    check_dtype,
    check_is_tensor,
    check_tensor,
    rows_at_one_stride,
    untransformed,
)
from pynlp.ops.common.library import LIBRARY, define, register_autograd
from pynlp.ops.common.plans import act, derive, planned
from pynlp.reference.common.dtypes import compute_dtype
from pynlp.reference.moe import grouped as reference
from pynlp.reference.moe.mlp import is_by_lines

define(
    "grouped_mm",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor",
    reference,
    triton="moe.grouped",
    dtype_of="x",
)
define(
    "grouped_mm_weight_backward",
    "(Tensor grad, Tensor x, Tensor offsets, bool outputs_are_lines, bool needs_bias) -> (Tensor, Tensor)",
    reference,
    triton="moe.grouped",
    dtype_of="x",
)


@torch.library.register_fake("pynlp::grouped_mm", lib=LIBRARY)
def _fake(x, weight, offsets, bias):
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.register_fake("pynlp::grouped_mm_weight_backward", lib=LIBRARY)
def _backward_fake(grad, x, offsets, outputs_are_lines, needs_bias):
    experts, outputs, inputs = offsets.shape[0], grad.shape[1], x.shape[1]
    return (
        x.new_empty((experts, outputs, inputs) if outputs_are_lines else (experts, inputs, outputs)),
        x.new_empty((experts, outputs) if needs_bias else (0,), dtype=compute_dtype(x)),
    )


def _setup_context(ctx, inputs, output):
    x, weight, offsets, _ = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward(ctx, saved, needs, grad):
    x, weight, offsets = saved
    grad = rows_at_one_stride(grad)
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _grouped_mm(grad, weight.mT, offsets, None)
    if needs[1] or needs[3]:
        by_lines = is_by_lines(weight.mT)
        grad_weight, grad_bias = _grouped_mm_weight_backward(grad, x, offsets, by_lines, needs[3])
        grad_weight = (grad_weight.mT if by_lines else grad_weight) if needs[1] else None
    return grad_x, grad_weight, None, grad_bias if needs[3] else None


def _setup_second_context(ctx, inputs, output):
    grad, x, offsets, ctx.outputs_are_lines, ctx.needs_bias = inputs
    ctx.save_for_backward(grad, x, offsets)


def _second_backward(ctx, saved, needs, of_weight, of_bias):
    """The weight's gradient is a product of grad and x, so that its gradients are such products again."""
    grad, x, offsets = saved
    weight = matrices_in_place(of_weight.mT if ctx.outputs_are_lines else of_weight)  # (E, K, N)
    of_grad = of_x = None
    if needs[0]:
        of_grad = _grouped_mm(x, weight, offsets, of_bias if ctx.needs_bias else None)
    if needs[1]:
        of_x = _grouped_mm(grad, weight.mT, offsets, None)
    return of_grad, of_x, None, None, None


_grouped_mm = register_autograd("grouped_mm", _setup_context, _backward)
_grouped_mm_weight_backward = register_autograd("grouped_mm_weight_backward", _setup_second_context, _second_backward)


@planned
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x[rows] @ weight[e] + bias[e]` for the rows of each group e, as torch.nn.functional.grouped_mm.

    Rows `offsets[e - 1]` to `offsets[e] - 1` are those of group e. Rows behind the last group give 0, and have no part
    in any gradient; a group without rows gets gradients of 0.

    Args:
        x: `(M, K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        weight: `(E, K, N)` in x's dtype, copied unless K or N is contiguous: of a weight `(E, N, K)`, as linear layers
            have it, `.mT`.
        offsets: `(E,)`, int32 or int64: where the rows of each group end, as `moe_dispatch` gives them.
        bias: `(E, N)`.

    Returns:
        `(M, N)` in x's dtype. The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off, or on a CPU offsets fall or exceed M; the
            message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import grouped_mm
        >>> x, weight = torch.randn(5, 8), torch.randn(2, 8, 4)
        >>> y = grouped_mm(x, weight, torch.tensor([2, 5]))
        >>> torch.allclose(y[2:], x[2:] @ weight[1], atol=1e-5)
        True
    """
    check_dtype("x", x)
    check_is_tensor("weight", weight)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (M, K), got {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape (E, {x.shape[1]}, N), got {tuple(weight.shape)}")
    check_tensor("weight", weight, x, [tuple(weight.shape)], of="x")
    x, weight = autocast(x, weight)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    offsets = _checked_offsets(offsets, x, weight)
    if bias is not None:
        check_tensor("bias", bias, x, [(weight.shape[0], weight.shape[2])], of="x")
        bias = as_fp32(bias, x)
    return _grouped_mm(rows_at_one_stride(x), matrices_in_place(weight), offsets, bias)


def _checked_offsets(offsets: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    check_is_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: expected dtype int32 or int64, got {offsets.dtype}")
    if offsets.shape != weight.shape[:1]:
        raise ValueError(f"offsets: expected shape ({weight.shape[0]},), got {tuple(offsets.shape)}")
    if offsets.device != x.device:
        raise ValueError(f"offsets: expected x's device {x.device}, got {offsets.device}")
    if at_once(offsets):
        act(_check_values, offsets, x.shape[0])
    return derive(_as_int32, offsets)


def _check_values(offsets: Tensor, rows: int) -> None:
    ends = untransformed(offsets).tolist()
    if any(a > b for a, b in zip([0, *ends], [*ends, rows], strict=True)):
        raise ValueError(f"offsets: expected numbers from 0 to {rows} that never fall, got {ends}")


def _as_int32(offsets: Tensor) -> Tensor:
    return offsets.int().contiguous()


def matrices_in_place(weight: Tensor) -> Tensor:
    """(E, rows, columns), copied unless rows or columns are contiguous."""
    if weight.stride(2) == 1 or weight.stride(1) == 1:
        return weight
    return derive(Tensor.contiguous, weight)
