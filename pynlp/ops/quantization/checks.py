"""Checks of arguments that the formats of quantized weights share."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import DTYPES, as_fp32, as_matrix, autocast, check_tensor, rows_at_one_stride
from pynlp.reference.common.dtypes import compute_dtype


def check_target(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dequantized values, if it is one of those that ops take."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    return dtype


def prepare_linear(
    x: Tensor, bias: Tensor | None, shape: tuple[int, int], name: str, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """x and bias as the op of a weight (N, K) takes them; its codes are the argument called `name`."""
    outputs, columns = shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x: expected shape (.., {columns}), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {weight.device}")
    (x,) = autocast(x)
    if bias is not None:
        check_tensor("bias", bias, x, [(outputs,)], of="x")
        bias = as_fp32(bias, x)
    return rows_at_one_stride(x), bias


def bias_gradient(grad: Tensor) -> Tensor:
    """The gradient of a bias (N,) of a result's (.., N)."""
    return as_matrix(grad).sum(0, dtype=compute_dtype(grad))
