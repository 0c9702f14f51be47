"""Integers of 8 or 4 bits for weights, and linear layers of them, in PyTorch: the default back end and the oracle.

Values of a group share a scale: all values, those of a row, or `group` values along a row. A value is one of
    (code - zero) * scale,    the zero an integer,
    code * scale + minimum.
Codes of 8 bits are int8 (N, K). Those of 4 bits, 0 to 15, are uint8 (N, ceil(K / 2)), the first of two in the low half
of a byte; with neither a zero nor a minimum, zeros are 8.
"""

import math

import torch
from torch import Tensor

from pynlp.reference.common.dtypes import compute, compute_dtype

SMALLEST = 2.0**-149  # of fp32


def quantize_integers(
    x: Tensor,  # (N, K)
    bits: int,  # 8 or 4
    affine: bool,
    group: int,  # values along a row that share a scale; 0: all of x
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes; scales fp32 and zeros int8, (N, ceil(K / group)) or (1, 1). Zeros are empty if not affine.

    Symmetric codes are -127 to 127, and 1 to 15 around 8; affine ones -128 to 127, and 0 to 15.
    """
    values = x.float() if group else x.float().reshape(1, -1)
    rows, columns = values.shape
    if x.numel() == 0:
        shape = (rows, -(-columns // group)) if group else (1, 1)
        zeros = torch.zeros(shape if affine else 0, dtype=torch.int8, device=x.device)
        return _stored(x.to(torch.int8), bits), values.new_zeros(shape), zeros
    group = group or columns
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(values, (0, groups * group - columns)).view(rows, groups, group)
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    largest = torch.maximum(-low, high)
    least, most = (-128, 127) if bits == 8 else (0, 15)
    steps = most - least
    scale = high / steps - low / steps if affine else largest / (steps // 2)
    scale = torch.where((scale == 0) & (largest > 0), SMALLEST, scale)
    if affine:
        zero = (least - low / scale).nan_to_num(least).clamp(least, most).round()
    else:
        zero = torch.full_like(scale, 0 if bits == 8 else 8)
        least += 1
    codes = (padded / scale[..., None]).nan_to_num(0.0).clamp(-256, 256).round() + zero[..., None]
    codes = codes.clamp(least, most).to(torch.int8).view(rows, -1)[:, :columns].reshape(x.shape)
    zeros = zero.to(torch.int8) if affine else zero.new_empty(0, dtype=torch.int8)
    return _stored(codes, bits), scale, zeros


def dequantize_integers(
    codes: Tensor,
    scale: Tensor,  # fp32 or fp16, (N, ceil(K / group)) or (1, 1)
    zero_point: Tensor | None,  # int8, as scale
    minimum: Tensor | None,  # as scale, in place of a zero point
    columns: int,  # K
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values, (N, K)."""
    target = torch.float64 if dtype == torch.float64 else torch.float32

    def spread(x: Tensor) -> Tensor:
        return x.to(target).repeat_interleave(group, dim=1)[:, :columns]

    values = _unpacked(codes, columns).to(target)
    if zero_point is not None:
        values = values - spread(zero_point)
    elif codes.dtype == torch.uint8 and minimum is None:
        values = values - 8
    values = values * spread(scale)
    return (values if minimum is None else values + spread(minimum)).to(dtype)


def integer_linear(
    x: Tensor,  # (.., K)
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,  # (N,)
    group: int,
) -> Tensor:
    """x weight^T + bias, (.., N)."""
    weight = dequantize_integers(codes, scale, zero_point, minimum, x.shape[-1], group, compute_dtype(x))
    result = compute(x) @ weight.T
    return (result if bias is None else result + bias).to(x.dtype)


def integer_linear_backward(
    grad: Tensor,  # (.., N)
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    columns: int,  # K
    group: int,
) -> Tensor:
    """The gradient of x: grad weight, (.., K)."""
    weight = dequantize_integers(codes, scale, zero_point, minimum, columns, group, compute_dtype(grad))
    return (compute(grad) @ weight).to(grad.dtype)


def dynamic_integer_linear(
    x: Tensor,  # (.., K)
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group: int,
    x_group: int,  # values along a row of x that share a scale; 0: the whole row
    outlier_threshold: float,  # columns with a value of x at least so large are not rounded; infinity: none
) -> Tensor:
    """x weight^T + bias, (.., N), with x rounded to 8 bits: symmetric codes, a scale for each of its groups."""
    rows = compute(x).flatten(0, -2) if x.dim() > 1 else compute(x)[None]
    columns = x.shape[-1]
    outliers = (rows.abs() >= outlier_threshold).any(0) & (outlier_threshold < math.inf)
    x_codes, x_scale, _ = quantize_integers(rows.masked_fill(outliers, 0.0), 8, False, x_group or max(1, columns))
    x_scale = torch.where(x_scale.isfinite(), x_scale, torch.nan)
    near = dequantize_integers(x_codes, x_scale, None, None, columns, x_group or max(1, columns), rows.dtype)
    near = torch.where(outliers, rows, near)
    return (
        integer_linear(near, codes, scale, zero_point, minimum, bias, group)
        .to(x.dtype)
        .view(*x.shape[:-1], codes.shape[0])
    )


def _stored(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 (N, K) as they are stored."""
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpacked(codes: Tensor, columns: int) -> Tensor:
    """Codes (N, K) of stored ones."""
    if codes.dtype == torch.int8:
        return codes
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :columns]
