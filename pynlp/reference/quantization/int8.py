"""Weights in 8 bits and linear layers of them in PyTorch: the default back end and the oracle of the fused ones.

A value is (code - zero) * scale, both those of its group: of all values, of a row, or of `group` values along a row.
"""

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute, compute_dtype

SMALLEST = 2.0**-149  # of fp32


def quantize_int8(
    x: Tensor,  # (N, K)
    affine: bool,
    group: int,  # values along a row that share a scale; 0: all of x
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (N, K); scales fp32 and zeros int8, (N, ceil(K / group)) or (1, 1); zeros are empty if not affine."""
    values = x.float() if group else x.float().reshape(1, -1)
    rows, columns = values.shape
    if x.numel() == 0:
        shape = (rows, -(-columns // group)) if group else (1, 1)
        zeros = torch.zeros(shape if affine else 0, dtype=torch.int8, device=x.device)
        return x.to(torch.int8), values.new_zeros(shape), zeros
    group = group or columns
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(values, (0, groups * group - columns)).view(rows, groups, group)
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    largest = torch.maximum(-low, high)
    scale = high / 255 - low / 255 if affine else largest / 127
    scale = torch.where((scale == 0) & (largest > 0), SMALLEST, scale)
    zero = (-128 - low / scale).nan_to_num(0.0).clamp(-128, 127).round() if affine else torch.zeros_like(scale)
    codes = (padded / scale[..., None]).nan_to_num(0.0).clamp(-256, 256).round() + zero[..., None]
    codes = codes.clamp(-128 if affine else -127, 127).to(torch.int8).view(rows, -1)[:, :columns]
    zeros = zero.to(torch.int8) if affine else zero.new_empty(0, dtype=torch.int8)
    return codes.reshape(x.shape), scale, zeros


def dequantize_int8(
    codes: Tensor,  # (N, K)
    scale: Tensor,  # (N, ceil(K / group)) or (1, 1)
    zero_point: Tensor | None,  # as scale
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values, (N, K)."""
    target = torch.float64 if dtype == torch.float64 else torch.float32

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=1)[:, : codes.shape[1]]

    values = codes.to(target)
    if zero_point is not None:
        values = values - spread(zero_point).to(target)
    return (values * spread(scale).to(target)).to(dtype)


def int8_linear(
    x: Tensor,  # (.., K)
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,  # (N,)
    group: int,
) -> Tensor:
    """x weight^T + bias, (.., N)."""
    result = compute(x) @ dequantize_int8(codes, scale, zero_point, group, compute_dtype(x)).T
    return (result if bias is None else result + bias).to(x.dtype)


def int8_linear_backward(
    grad: Tensor,  # (.., N)
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: int,
) -> Tensor:
    """The gradient of x: grad weight, (.., K)."""
    return (compute(grad) @ dequantize_int8(codes, scale, zero_point, group, compute_dtype(grad))).to(grad.dtype)
