"""Weights in 8 bits and linear layers of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import check_is_tensor
from pynlp.ops.quantization import integers
from pynlp.ops.quantization.integers import Scaled


class QuantStateInt8(NamedTuple):
    """What a weight's 8-bit codes mean: a value is `(code - zero_point) * scale`, or `code * scale + minimum`.

    Attributes:
        group_size: Values along a row that share a scale; K where a row, or the whole weight, has one.
        dtype: The weight's.
        scale: fp32 or fp16 `(N, ceil(K / group_size))`, or `(1, 1)` where all rows share it.
        zero_point: int8, of scale's shape; None: 0.
        minimum: Of scale's dtype and shape, in place of a zero point.

    Example:
        >>> import torch
        >>> from pynlp.functional import QuantStateInt8, dequantize_int8
        >>> codes = torch.tensor([[0, 127, -127]], dtype=torch.int8)
        >>> dequantize_int8(codes, QuantStateInt8(3, torch.float32, scale=torch.tensor([[0.5]])))
        tensor([[  0.0000,  63.5000, -63.5000]])
    """

    group_size: int
    dtype: torch.dtype
    scale: Tensor
    zero_point: Tensor | None = None
    minimum: Tensor | None = None


def quantize_int8(
    x: Tensor, *, scheme: str = "symmetric", granularity: str = "channel", group_size: int | None = None
) -> tuple[Tensor, QuantStateInt8]:
    """The values of x as 8-bit codes, by linear quantization: what is not clipped is off by half a scale at most.

    Args:
        x: `(N, K)`; fp32, bf16, fp16 or fp64, finite.
        scheme: "symmetric" (codes -127 to 127, no zero point) or "affine" (codes -128 to 127, which span the smallest
            and the largest value; 0 stays 0).
        granularity: What shares a scale: the whole "tensor", a "channel" (a row), or a "group" of `group_size` values
            along a row.
        group_size: With "group": a multiple of 16, by default 128.

    Returns:
        int8 `(N, K)`, and what they mean.

    Raises:
        ValueError, TypeError: an argument is off, or x has a value that is not finite; the message names it.

    Source: Jacob et al., arXiv 1712.05877, section 2.1.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int8, quantize_int8
        >>> weight = torch.randn(256, 512)
        >>> codes, state = quantize_int8(weight)
        >>> ((dequantize_int8(codes, state) - weight).abs() <= state.scale * 0.5001).all().item()
        True
    """
    codes, group_size, scale, zero_point = integers.quantize(x, 8, scheme, granularity, group_size)
    return codes, QuantStateInt8(group_size, x.dtype, scale, zero_point)


def dequantize_int8(codes: Tensor, state: QuantStateInt8, *, dtype: torch.dtype | None = None) -> Tensor:
    """The values that 8-bit codes stand for.

    Args:
        codes, state: As `quantize_int8` gives them.
        dtype: Of the result; the quantized tensor's by default.

    Returns:
        `(N, K)`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int8, quantize_int8
        >>> dequantize_int8(*quantize_int8(torch.tensor([[127.0, -3.2, 0.0]])))
        tensor([[127.,  -3.,   0.]])
    """
    return integers.dequantize(_checked(codes, state), state.dtype, dtype)


def int8_linear(
    x: Tensor,
    codes: Tensor,
    state: QuantStateInt8,
    bias: Tensor | None = None,
    *,
    activations: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with a weight in 8 bits, of which no dense copy is made, forward or backward.

    The weight is a constant: gradients are those of x and bias.

    Args:
        x: `(.., K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        codes, state: The weight `(N, K)`, as `quantize_int8` gives it.
        bias: `(N,)`.
        activations: None: x is not rounded. "int8": x, too, is rounded to 8 bits, 32 of whose values share a scale:
            faster for a few rows; its gradient is that of x as it was.

    Returns:
        `(.., N)` in x's dtype. The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int8, int8_linear, quantize_int8
        >>> codes, state = quantize_int8(torch.randn(256, 512), scheme="affine", granularity="group", group_size=64)
        >>> x = torch.randn(3, 512, requires_grad=True)
        >>> y = int8_linear(x, codes, state)
        >>> torch.allclose(y, x @ dequantize_int8(codes, state).T, atol=1e-3)
        True
        >>> y.sum().backward()
    """
    return integers.linear(x, _checked(codes, state), bias, activations)


def int8_dynamic_linear(
    x: Tensor,
    codes: Tensor,
    state: QuantStateInt8,
    bias: Tensor | None = None,
    *,
    outlier_threshold: float | None = None,
) -> Tensor:
    """`x @ weight.T + bias` in integers: a weight in 8 bits by rows of x that are rounded to 8 bits on the fly.

    A row of x has one scale, its largest magnitude / 127. Sums of products are exact, in 32 bits. Gradients are those
    of x as it was, and of bias.

    Args:
        x: `(.., K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        codes, state: The weight `(N, K)`, as `quantize_int8` gives it.
        bias: `(N,)`.
        outlier_threshold: Columns of x with a magnitude of at least so much, in any row, are not rounded: their
            products are computed in floating point. None: all columns are rounded. LLM.int8() takes 6.0.

    Returns:
        `(.., N)` in x's dtype; NaN where a row that is rounded has a value that is not finite. The same bits for every
        run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Source: Dettmers et al., arXiv 2208.07339 (LLM.int8()).

    Example:
        >>> import torch
        >>> from pynlp.functional import int8_dynamic_linear, quantize_int8
        >>> weight, x = torch.randn(256, 512), torch.randn(3, 512)
        >>> x[:, 7] = 100
        >>> exact, codes = x @ weight.T, quantize_int8(weight)
        >>> rounded = int8_dynamic_linear(x, *codes)
        >>> with_outliers = int8_dynamic_linear(x, *codes, outlier_threshold=6.0)
        >>> ((with_outliers - exact).norm() < 0.3 * (rounded - exact).norm()).item()
        True
    """
    return integers.dynamic_linear(x, _checked(codes, state), bias, 0, check_threshold(outlier_threshold))


def check_threshold(outlier_threshold: float | None) -> float:
    """The magnitude that makes an outlier, infinity for None."""
    if outlier_threshold is None:
        return math.inf
    if not isinstance(outlier_threshold, int | float) or isinstance(outlier_threshold, bool):
        raise TypeError(f"outlier_threshold: expected a number or None, got {outlier_threshold!r}")
    if not outlier_threshold > 0:
        raise ValueError(f"outlier_threshold: expected more than 0, got {outlier_threshold}")
    return float(outlier_threshold)


def _checked(codes: Tensor, state: QuantStateInt8) -> Scaled:
    check_is_tensor("codes", codes)
    if not isinstance(state, QuantStateInt8):
        raise TypeError(f"state: expected a QuantStateInt8, as quantize_int8 gives it, got {type(state).__name__}")
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected dtype int8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape (N, K), got {tuple(codes.shape)}")
    return integers.check_weight(codes, codes.shape[1], state)
