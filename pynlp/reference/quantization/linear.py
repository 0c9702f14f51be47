"""Linear layers of 4-bit weights in PyTorch: the default back end and the oracle of the fused ones."""

from torch import Tensor

from pynlp.reference.common.dtypes import compute, compute_dtype
from pynlp.reference.quantization.formats import dequantize_4bit


def linear_4bit(
    x: Tensor,  # (.., K)
    packed: Tensor,  # uint8: N rows of K weights, as formats.quantize_4bit gives them
    absmax: Tensor,  # the blocks' scales; with the three nested ones in 8 bits: formats.block_scales
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    bias: Tensor | None,  # (N,)
    outputs: int,  # N
    blocksize: int,
    quant_type: int,
) -> Tensor:
    """x weight^T + bias, (.., N)."""
    nested = nested_absmax, nested_offset, nested_code
    weight = _dense(x, packed, absmax, nested, (outputs, x.shape[-1]), blocksize, quant_type)
    result = compute(x) @ weight.T
    return (result if bias is None else result + bias).to(x.dtype)


def linear_4bit_backward(
    grad: Tensor,  # (.., N)
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    columns: int,  # K
    blocksize: int,
    quant_type: int,
) -> Tensor:
    """The gradient of x: grad weight, (.., K)."""
    nested = nested_absmax, nested_offset, nested_code
    weight = _dense(grad, packed, absmax, nested, (grad.shape[-1], columns), blocksize, quant_type)
    return (compute(grad) @ weight).to(grad.dtype)


def _dense(x: Tensor, packed: Tensor, absmax: Tensor, nested: tuple, shape: tuple[int, int], *options: int) -> Tensor:
    values = dequantize_4bit(packed, absmax, *nested, shape[0] * shape[1], *options, compute_dtype(x))
    return values.view(shape)
