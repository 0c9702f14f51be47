"""Linear layers of 4-bit weights: schema, fake, autograd and the public function."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import check_dtype, rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.quantization.checks import bias_gradient, prepare_linear
from pynlp.ops.quantization.formats import QuantState4bit, check_state, tensors_of
from pynlp.reference.quantization import linear as reference

WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? nested_code"

define(
    "linear_4bit",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt outputs, SymInt blocksize, int quant_type) -> Tensor",
    reference,
    triton="quantization.linear",
    dtype_of="x",
)
define(
    "linear_4bit_backward",
    f"(Tensor grad, {WEIGHT}, SymInt columns, SymInt blocksize, int quant_type) -> Tensor",
    reference,
    triton="quantization.linear",
    dtype_of="grad",
)


@torch.library.register_fake("pynlp::linear_4bit", lib=LIBRARY)
def _fake(x, packed, absmax, nested_absmax, nested_offset, nested_code, bias, outputs, blocksize, quant_type):
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("pynlp::linear_4bit_backward", lib=LIBRARY)
def _backward_fake(grad, packed, absmax, nested_absmax, nested_offset, nested_code, columns, blocksize, quant_type):
    return grad.new_empty((*grad.shape[:-1], columns))


def _setup_context(ctx, inputs, output):
    x, *weight, bias, outputs, blocksize, quant_type = inputs
    ctx.options = x.shape[-1], blocksize, quant_type
    ctx.save_for_backward(*weight)


def _backward(ctx, saved, needs, grad):
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = _linear_4bit_backward(rows_at_one_stride(grad), *saved, *ctx.options)
    if needs[6]:
        grad_bias = bias_gradient(grad)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


_linear_4bit = register_autograd("linear_4bit", _setup_context, _backward)
_linear_4bit_backward = refuse_double_backward("linear_4bit_backward", "pynlp's linear_4bit has")


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState4bit, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with a weight in 4 bits, of which no dense copy is made, forward or backward.

    The weight is a constant: gradients are those of x and bias.

    Args:
        x: `(.., K)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        packed, state: The weight `(N, K)`, as `quantize_4bit` gives it.
        bias: `(N,)`.

    Returns:
        `(.., N)` in x's dtype. The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Source: Dettmers et al., arXiv 2305.14314, equation 5.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_4bit, linear_4bit, quantize_4bit
        >>> packed, state = quantize_4bit(torch.randn(256, 512))
        >>> x = torch.randn(3, 512, requires_grad=True)
        >>> y = linear_4bit(x, packed, state)
        >>> torch.allclose(y, x @ dequantize_4bit(packed, state).T, atol=1e-4)
        True
        >>> y.sum().backward()
    """
    check_dtype("x", x)
    kind = check_state(packed, state)
    if len(state.shape) != 2:
        raise ValueError(f"state: expected a weight of shape (N, K), got shape {tuple(state.shape)}")
    x, bias = prepare_linear(x, bias, state.shape, "packed", packed)
    return _linear_4bit(x, *tensors_of(packed, state), bias, state.shape[0], state.blocksize, kind)
