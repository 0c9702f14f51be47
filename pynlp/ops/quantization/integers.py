"""Weights as integers of 8 or 4 bits: schemas, fakes, autograd and the checks that both share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import as_int, check, check_dtype, check_is_tensor, rows_at_one_stride
from pynlp.ops.common.library import (
    LIBRARY,
    define,
    refuse_derivatives,
    refuse_double_backward,
    register_autograd,
)
from pynlp.ops.quantization.checks import bias_gradient, check_target, prepare_linear
from pynlp.reference.quantization import integers as reference

SCHEMES = ("symmetric", "affine")
GRANULARITIES = ("tensor", "channel", "group")
ACTIVATION_GROUP = 32  # values of x that share a scale
WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? minimum"

define(
    "quantize_integers",
    "(Tensor x, int bits, bool affine, SymInt group) -> (Tensor, Tensor, Tensor)",
    reference,
    triton="quantization.integers",
    dtype_of="x",
)
define(
    "dequantize_integers",
    f"({WEIGHT}, SymInt columns, SymInt group, ScalarType dtype) -> Tensor",
    reference,
    triton="quantization.integers",
    dtype_of="codes",
)
define(
    "integer_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt group) -> Tensor",
    reference,
    triton="quantization.integer_linear",
    dtype_of="x",
)
define(
    "integer_linear_backward",
    f"(Tensor grad, {WEIGHT}, SymInt columns, SymInt group) -> Tensor",
    reference,
    triton="quantization.integer_linear",
    dtype_of="grad",
)
define(
    "dynamic_integer_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt group, SymInt x_group, float outlier_threshold) -> Tensor",
    reference,
    triton="quantization.rounded_linear",
    dtype_of="x",
)


@torch.library.register_fake("pynlp::quantize_integers", lib=LIBRARY)
def _quantize_fake(x, bits, affine, group):
    rows, columns = x.shape
    shape = (rows, (columns + group - 1) // group) if group else (1, 1)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    if bits == 4:
        codes = x.new_empty((rows, (columns + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape if affine else 0, dtype=torch.int8)


@torch.library.register_fake("pynlp::dequantize_integers", lib=LIBRARY)
def _dequantize_fake(codes, scale, zero_point, minimum, columns, group, dtype):
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


@torch.library.register_fake("pynlp::integer_linear", lib=LIBRARY)
def _fake(x, codes, scale, zero_point, minimum, bias, group):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("pynlp::integer_linear_backward", lib=LIBRARY)
def _backward_fake(grad, codes, scale, zero_point, minimum, columns, group):
    return grad.new_empty((*grad.shape[:-1], columns))


@torch.library.register_fake("pynlp::dynamic_integer_linear", lib=LIBRARY)
def _dynamic_fake(x, codes, scale, zero_point, minimum, bias, group, x_group, outlier_threshold):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup_context(ctx, inputs, output):
    x, *weight, _, ctx.group = inputs[:7]
    ctx.columns, ctx.extra = x.shape[-1], len(inputs) - 7
    ctx.save_for_backward(*weight)


def _backward(ctx, saved, needs, grad):
    """The gradients of x and the bias. A rounded x has those of x as it was."""
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = _integer_linear_backward(rows_at_one_stride(grad), *saved, ctx.columns, ctx.group)
    if needs[5]:
        grad_bias = bias_gradient(grad)
    return grad_x, None, None, None, None, grad_bias, None, *(None,) * ctx.extra


_integer_linear = register_autograd("integer_linear", _setup_context, _backward)
_dynamic_integer_linear = register_autograd("dynamic_integer_linear", _setup_context, _backward)
_integer_linear_backward = refuse_double_backward("integer_linear_backward", "a linear layer of integers has")


class Scaled(NamedTuple):
    """A weight (N, columns) as the ops take it: its tensors, contiguous, and the values that share a scale."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None
    columns: int
    group: int


def quantize(
    x: Tensor, bits: int, scheme: str, granularity: str, group_size: int | None
) -> tuple[Tensor, int, Tensor, Tensor | None]:
    """The codes of x (N, K), how many values share a scale, their scales and their zero points."""
    check_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (N, K), got {tuple(x.shape)}")
    for name, value, known in (("scheme", scheme, SCHEMES), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            raise ValueError(f"{name}: expected {', '.join(map(repr, known))}, got {value!r}")
    if granularity != "group" and group_size is not None:
        raise ValueError(f"group_size: expected None with granularity={granularity!r}, got {group_size}")
    group_size = _check_group("group_size", 128 if group_size is None else group_size)
    refuse_derivatives(f"quantize_int{bits}", x)
    columns = x.shape[1]
    whole_row = columns if columns else 1
    x = x.detach()
    codes, scale, zeros = torch.ops.pynlp.quantize_integers(
        (x.float() if x.dtype == torch.float64 else x).contiguous(),
        bits,
        scheme == "affine",
        {"tensor": 0, "channel": whole_row, "group": _within(columns, group_size)}[granularity],
    )
    check(scale.isfinite().all(), "x: expected finite values in fp32", lambda: "got NaN or an infinity")
    return codes, group_size if granularity == "group" else whole_row, scale, zeros if scheme == "affine" else None


def dequantize(weight: Scaled, own: torch.dtype, dtype: torch.dtype | None) -> Tensor:
    """The values of a weight whose own dtype was `own`, in `dtype` or else in that."""
    refuse_derivatives(
        "dequantize_int8" if weight.codes.dtype == torch.int8 else "dequantize_int4", weight.scale, weight.minimum
    )
    dtype = check_target(own if dtype is None else dtype)
    op = torch.ops.pynlp.dequantize_integers
    if dtype == torch.float64:
        op = torch.ops.pynlp.dequantize_integers_reference
    return op(*weight, dtype)


def linear(x: Tensor, weight: Scaled, bias: Tensor | None, activations: str | None) -> Tensor:
    """The product with x as it is, or rounded to 8 bits a group at a time."""
    if check_activations(activations):
        return dynamic_linear(x, weight, bias, ACTIVATION_GROUP)
    x, bias = _prepare(x, weight, bias)
    return _integer_linear(x, *weight[:4], bias, weight.group)


def dynamic_linear(
    x: Tensor, weight: Scaled, bias: Tensor | None, x_group: int, outlier_threshold: float = math.inf
) -> Tensor:
    """The product with x rounded to 8 bits, `x_group` of whose values share a scale; 0: a row's."""
    x, bias = _prepare(x, weight, bias)
    return _dynamic_integer_linear(x, *weight[:4], bias, weight.group, x_group, outlier_threshold)


def _prepare(x: Tensor, weight: Scaled, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_dtype("x", x)
    return prepare_linear(x, bias, (weight.codes.shape[0], weight.columns), "codes", weight.codes)


def check_activations(activations: str | None) -> bool:
    """Whether x is rounded to 8 bits, too."""
    if activations not in (None, "int8"):
        raise ValueError(f"activations: expected None or 'int8', got {activations!r}")
    return activations is not None


def check_weight(codes: Tensor, columns: int, state) -> Scaled:
    """Check that codes, of `columns` values a row, and what they mean fit each other."""
    if state.group_size < columns:
        _check_group("state.group_size", state.group_size)
    rows, groups = codes.shape[0], (columns + state.group_size - 1) // state.group_size
    parts = [("scale", state.scale, (torch.float32, torch.float16))]
    if state.zero_point is not None:
        parts.append(("zero_point", state.zero_point, (torch.int8,)))
    if state.minimum is not None:
        parts.append(("minimum", state.minimum, (state.scale.dtype,)))
    for name, x, dtypes in parts:
        check_is_tensor(f"state.{name}", x)
        if x.dtype not in dtypes:
            raise TypeError(f"state.{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
        if x.dim() != 2 or not (
            (x.shape[0] == rows and x.shape[1] == groups) or (x.shape[0] == x.shape[1] == 1 and groups <= 1)
        ):
            raise ValueError(f"state.{name}: expected shape {(rows, groups)} or (1, 1), got {tuple(x.shape)}")
        if x.device != codes.device:
            raise ValueError(f"state.{name}: expected codes' device {codes.device}, got {x.device}")
        if x.shape != state.scale.shape:
            raise ValueError(f"state.{name}: expected scale's shape {tuple(state.scale.shape)}, got {tuple(x.shape)}")
    if state.zero_point is not None and state.minimum is not None:
        raise ValueError("state.minimum: expected None beside a zero_point")
    tensors = (None if x is None else x.contiguous() for x in (codes, state.scale, state.zero_point, state.minimum))
    return Scaled(*tensors, columns, _within(columns, state.group_size))


def _within(columns: int, group_size: int) -> int:
    """A group's size without what is beyond the row, which can be more than fits into memory."""
    return min(group_size, max(1, columns + -columns % 16))


def _check_group(name: str, group: int) -> int:
    group = as_int(name, group)
    if group < 1 or group % 16:
        raise ValueError(f"{name}: expected a multiple of 16, got {group}")
    return group
