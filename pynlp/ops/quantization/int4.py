"""Weights in 4 bits that lie at even distances, and linear layers of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import check_is_tensor
from pynlp.ops.quantization import integers
from pynlp.ops.quantization.integers import Scaled


class QuantStateInt4(NamedTuple):
    """What a weight's codes, 0 to 15, mean: a value is `(code - zero_point) * scale`, or `code * scale + minimum`.

    Attributes:
        group_size: Values along a row that share a scale; K where a row, or the whole weight, has one.
        columns: K.
        dtype: The weight's.
        scale: fp32 or fp16 `(N, ceil(K / group_size))`, or `(1, 1)` where all rows share it.
        zero_point: int8, of scale's shape; None: 8.
        minimum: Of scale's dtype and shape, in place of a zero point.

    Example:
        >>> import torch
        >>> from pynlp.functional import QuantStateInt4, dequantize_int4
        >>> codes = torch.tensor([[0x90, 0x0F]], dtype=torch.uint8)  # the first of two is in the low half of a byte
        >>> dequantize_int4(codes, QuantStateInt4(3, 3, torch.float32, scale=torch.tensor([[0.5]])))
        tensor([[-4.0000,  0.5000,  3.5000]])
    """

    group_size: int
    columns: int
    dtype: torch.dtype
    scale: Tensor
    zero_point: Tensor | None = None
    minimum: Tensor | None = None


def quantize_int4(
    x: Tensor, *, scheme: str = "affine", granularity: str = "group", group_size: int | None = None
) -> tuple[Tensor, QuantStateInt4]:
    """The values of x as 4-bit codes, by linear quantization: what is not clipped is off by half a scale at most.

    Args:
        x: `(N, K)`; fp32, bf16, fp16 or fp64, finite.
        scheme: "symmetric" (codes 1 to 15 around 8, no zero point) or "affine" (codes 0 to 15, which span the smallest
            and the largest value; 0 stays 0).
        granularity: What shares a scale: the whole "tensor", a "channel" (a row), or a "group" of `group_size` values
            along a row.
        group_size: With "group": a multiple of 16, by default 128.

    Returns:
        uint8 `(N, ceil(K / 2))`, two codes a byte, and what they mean.

    Raises:
        ValueError, TypeError: an argument is off, or x has a value that is not finite; the message names it.

    Source: Jacob et al., arXiv 1712.05877, section 2.1.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int4, quantize_int4
        >>> weight = torch.randn(256, 512)
        >>> codes, state = quantize_int4(weight, group_size=32)
        >>> ((dequantize_int4(codes, state) - weight).square().mean() < 0.01).item()  # of values of variance 1
        True
    """
    codes, group_size, scale, zero_point = integers.quantize(x, 4, scheme, granularity, group_size)
    return codes, QuantStateInt4(group_size, x.shape[1], x.dtype, scale, zero_point)


def dequantize_int4(codes: Tensor, state: QuantStateInt4, *, dtype: torch.dtype | None = None) -> Tensor:
    """The values that 4-bit codes stand for.

    Args:
        codes, state: As `quantize_int4` gives them.
        dtype: Of the result; the quantized tensor's by default.

    Returns:
        `(N, K)`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int4, quantize_int4
        >>> dequantize_int4(*quantize_int4(torch.tensor([[7.0, -3.2, 0.0]]), scheme="symmetric"))
        tensor([[ 7., -3.,  0.]])
    """
    return integers.dequantize(_checked(codes, state), state.dtype, dtype)


def int4_linear(
    x: Tensor,
    codes: Tensor,
    state: QuantStateInt4,
    bias: Tensor | None = None,
    *,
    activations: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with a weight in 4 bits, of which no dense copy is made, forward or backward.

    The weight is a constant: gradients are those of x and bias.

    Args:
        x: `(.., K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        codes, state: The weight `(N, K)`, as `quantize_int4` gives it.
        bias: `(N,)`.
        activations: None: x is not rounded. "int8": x is rounded to 8 bits, 32 of whose values share a scale: faster
            for a few rows; its gradient is that of x as it was.

    Returns:
        `(.., N)` in x's dtype. The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_int4, int4_linear, quantize_int4
        >>> codes, state = quantize_int4(torch.randn(256, 512))
        >>> x = torch.randn(3, 512, requires_grad=True)
        >>> y = int4_linear(x, codes, state)
        >>> torch.allclose(y, x @ dequantize_int4(codes, state).T, atol=1e-3)
        True
        >>> y.sum().backward()
    """
    return integers.linear(x, _checked(codes, state), bias, activations)


def _checked(codes: Tensor, state: QuantStateInt4) -> Scaled:
    check_is_tensor("codes", codes)
    if not isinstance(state, QuantStateInt4):
        raise TypeError(f"state: expected a QuantStateInt4, as quantize_int4 gives it, got {type(state).__name__}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected dtype uint8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] != (state.columns + 1) // 2:
        raise ValueError(
            f"codes: expected shape (N, {(state.columns + 1) // 2}) for state.columns {state.columns}, "
            f"got {tuple(codes.shape)}"
        )
    return integers.check_weight(codes, state.columns, state)
