"""Products of groups of rows, each with a matrix of its own, in PyTorch: the default back end and the oracle."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute, compute_dtype


def groups(offsets: Tensor) -> Iterator[slice]:
    """The rows of each group, given where they end."""
    first = 0
    for last in offsets.tolist():
        yield slice(first, last)
        first = last


def grouped_mm(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (E, K, N)
    offsets: Tensor,  # (E,) int32: where each group's rows end
    bias: Tensor | None,  # (E, N)
) -> Tensor:
    """x weight[e] + bias[e] for the rows of each group e, (M, N); 0 for those behind the last group."""
    result = torch.zeros((len(x), weight.shape[2]), dtype=compute_dtype(x), device=x.device)
    for expert, rows in enumerate(groups(offsets)):
        result[rows] = compute(x[rows]) @ compute(weight[expert])
        if bias is not None:
            result[rows] += bias[expert]
    return result.to(x.dtype)


def grouped_mm_weight_backward(
    grad: Tensor,  # (M, N)
    x: Tensor,  # (M, K)
    offsets: Tensor,
    outputs_are_lines: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the weight, (E, N, K) where outputs are lines, else (E, K, N), and of the bias, or nothing."""
    weight = torch.empty((len(offsets), grad.shape[1], x.shape[1]), dtype=compute_dtype(x), device=x.device)
    bias = torch.empty((len(offsets), grad.shape[1]), dtype=compute_dtype(x), device=x.device)
    for expert, rows in enumerate(groups(offsets)):
        weight[expert] = compute(grad[rows]).T @ compute(x[rows])
        bias[expert] = compute(grad[rows]).sum(0)
    weight = weight.to(x.dtype)
    return weight if outputs_are_lines else weight.mT.contiguous(), bias if needs_bias else bias.new_empty(0)
