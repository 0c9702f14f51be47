"""Weights in 8 bits and linear layers of them: schemas, checks, fakes, autograd and the public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import (
    as_int,
    check,
    check_dtype,
    check_is_tensor,
    rows_at_one_stride,
)
from pynlp.ops.common.library import (
    LIBRARY,
    define,
    refuse_derivatives,
    refuse_double_backward,
    register_autograd,
)
from pynlp.ops.quantization.checks import bias_gradient, check_target, prepare_linear
from pynlp.reference.quantization import int8 as reference

SCHEMES = ("symmetric", "affine")
GRANULARITIES = ("tensor", "channel", "group")
WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point"

define(
    "quantize_int8",
    "(Tensor x, bool affine, SymInt group) -> (Tensor, Tensor, Tensor)",
    reference,
    triton=None,
    dtype_of="x",
)
define(
    "dequantize_int8",
    f"({WEIGHT}, SymInt group, ScalarType dtype) -> Tensor",
    reference,
    triton=None,
    dtype_of="codes",
)
define(
    "int8_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt group) -> Tensor",
    reference,
    triton=None,
    dtype_of="x",
)
define(
    "int8_linear_backward",
    f"(Tensor grad, {WEIGHT}, SymInt group) -> Tensor",
    reference,
    triton=None,
    dtype_of="grad",
)


@torch.library.register_fake("pynlp::quantize_int8", lib=LIBRARY)
def _quantize_fake(x, affine, group):
    shape = (x.shape[0], (x.shape[1] + group - 1) // group) if group else (1, 1)
    zeros = x.new_empty(shape if affine else 0, dtype=torch.int8)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32), zeros


@torch.library.register_fake("pynlp::dequantize_int8", lib=LIBRARY)
def _dequantize_fake(codes, scale, zero_point, group, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("pynlp::int8_linear", lib=LIBRARY)
def _fake(x, codes, scale, zero_point, bias, group):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("pynlp::int8_linear_backward", lib=LIBRARY)
def _backward_fake(grad, codes, scale, zero_point, group):
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _setup_context(ctx, inputs, output):
    _, codes, scale, zero_point, _, ctx.group = inputs
    ctx.save_for_backward(codes, scale, zero_point)


def _backward(ctx, saved, needs, grad):
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = _int8_linear_backward(rows_at_one_stride(grad), *saved, ctx.group)
    if needs[4]:
        grad_bias = bias_gradient(grad)
    return grad_x, None, None, None, grad_bias, None


_int8_linear = register_autograd("int8_linear", _setup_context, _backward)
_int8_linear_backward = refuse_double_backward("int8_linear_backward", "pynlp's int8_linear has")


class QuantStateInt8(NamedTuple):
    """What a weight's 8-bit codes mean: a value is `(code - zero_point) * scale`.

    Attributes:
        group_size: Values along a row that share a scale; K where a row, or the whole weight, has one.
        dtype: The weight's.
        scale: fp32 `(N, ceil(K / group_size))`, or `(1, 1)` where all rows share it.
        zero_point: int8, as scale; None: 0.

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
    check_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (N, K), got {tuple(x.shape)}")
    for name, value, known in (("scheme", scheme, SCHEMES), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            raise ValueError(f"{name}: expected {', '.join(map(repr, known))}, got {value!r}")
    if granularity != "group" and group_size is not None:
        raise ValueError(f"group_size: expected None with granularity={granularity!r}, got {group_size}")
    group_size = _check_group("group_size", 128 if group_size is None else group_size)
    refuse_derivatives("quantize_int8", x)
    columns = x.shape[1]
    group = {"tensor": 0, "channel": columns if columns else 1, "group": group_size}[granularity]
    x = x.detach()
    codes, scale, zeros = torch.ops.pynlp.quantize_int8(
        (x.float() if x.dtype == torch.float64 else x).contiguous(), scheme == "affine", group
    )
    check(scale.isfinite().all(), "x: expected finite values", lambda: "got NaN or an infinity")
    group = group if granularity == "group" else (columns if columns else 1)
    return codes, QuantStateInt8(group, x.dtype, scale, zeros if scheme == "affine" else None)


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
    check_state_int8(codes, state)
    refuse_derivatives("dequantize_int8", state.scale)
    dtype = check_target(state.dtype if dtype is None else dtype)
    op = torch.ops.pynlp.dequantize_int8
    if dtype == torch.float64:
        op = torch.ops.pynlp.dequantize_int8_reference
    return op(*_tensors_of(codes, state), state.group_size, dtype)


def int8_linear(x: Tensor, codes: Tensor, state: QuantStateInt8, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with a weight in 8 bits, of which no dense copy is made, forward or backward.

    The weight is a constant: gradients are those of x and bias. x is not rounded.

    Args:
        x: `(.., K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        codes, state: The weight `(N, K)`, as `quantize_int8` gives it.
        bias: `(N,)`.

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
    check_dtype("x", x)
    check_state_int8(codes, state)
    x, bias = prepare_linear(x, bias, codes.shape, "codes", codes)
    return _int8_linear(x, *_tensors_of(codes, state), bias, state.group_size)


def _check_group(name: str, group: int) -> int:
    group = as_int(name, group)
    if group < 1 or group % 16:
        raise ValueError(f"{name}: expected a multiple of 16, got {group}")
    return group


def check_state_int8(codes: Tensor, state: QuantStateInt8) -> None:
    """Check that codes and what they mean fit each other."""
    check_is_tensor("codes", codes)
    if not isinstance(state, QuantStateInt8):
        raise TypeError(f"state: expected a QuantStateInt8, as quantize_int8 gives it, got {type(state).__name__}")
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected dtype int8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape (N, K), got {tuple(codes.shape)}")
    rows, columns = codes.shape
    if state.group_size < columns:
        _check_group("state.group_size", state.group_size)
    groups = (columns + state.group_size - 1) // state.group_size
    parts = [("scale", state.scale, torch.float32)]
    if state.zero_point is not None:
        parts.append(("zero_point", state.zero_point, torch.int8))
    for name, x, dtype in parts:
        check_is_tensor(f"state.{name}", x)
        if x.dtype != dtype:
            raise TypeError(f"state.{name}: expected dtype {dtype}, got {x.dtype}")
        if x.dim() != 2 or not (
            (x.shape[0] == rows and x.shape[1] == groups) or (x.shape[0] == x.shape[1] == 1 and groups <= 1)
        ):
            raise ValueError(f"state.{name}: expected shape {(rows, groups)} or (1, 1), got {tuple(x.shape)}")
        if x.device != codes.device:
            raise ValueError(f"state.{name}: expected codes' device {codes.device}, got {x.device}")
    if state.zero_point is not None and state.zero_point.shape != state.scale.shape:
        raise ValueError(
            f"state.zero_point: expected scale's shape {tuple(state.scale.shape)}, got {tuple(state.zero_point.shape)}"
        )


def _tensors_of(codes: Tensor, state: QuantStateInt8) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors of codes and of their state, contiguous, as the ops take them."""
    zeros = None if state.zero_point is None else state.zero_point.contiguous()
    return codes.contiguous(), state.scale.contiguous(), zeros
