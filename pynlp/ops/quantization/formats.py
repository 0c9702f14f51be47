"""4-bit weights: schemas, fakes and the public functions that make them and read them."""

from typing import NamedTuple

import torch
from torch import Tensor

from pynlp.ops.common.checks import as_int, check, check_dtype, check_is_tensor
from pynlp.ops.common.library import LIBRARY, define, refuse_derivatives
from pynlp.ops.quantization.checks import check_target
from pynlp.reference.quantization import formats as reference
from pynlp.reference.quantization.formats import FORMATS, QUANT_TYPES

define(
    "quantize_4bit",
    "(Tensor x, SymInt blocksize, int quant_type) -> (Tensor, Tensor)",
    reference,
    triton="quantization.formats",
    dtype_of="x",
)
define(
    "dequantize_4bit",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? nested_code, SymInt count, "
    "SymInt blocksize, int quant_type, ScalarType dtype) -> Tensor",
    reference,
    triton="quantization.formats",
    dtype_of="packed",
)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.library.register_fake("pynlp::quantize_4bit", lib=LIBRARY)
def _quantize_fake(x, blocksize, quant_type):
    blocks = (x.numel() + blocksize - 1) // blocksize
    dtype = torch.uint8 if FORMATS[quant_type].is_mx else torch.float32
    return x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8), x.new_empty(blocks, dtype=dtype)


@torch.library.register_fake("pynlp::dequantize_4bit", lib=LIBRARY)
def _dequantize_fake(packed, absmax, nested_absmax, nested_offset, nested_code, count, blocksize, quant_type, dtype):
    return packed.new_empty(count, dtype=dtype)


class QuantState4bit(NamedTuple):
    """What a tensor's 4-bit codes mean.

    Attributes:
        quant_type: "nf4", "fp4" or "mxfp4".
        blocksize: Values that share a scale. Blocks follow each other over the tensor's values, row by row.
        shape: The tensor's.
        dtype: The tensor's.
        absmax: The blocks' scales, `(blocks,)`: fp32; of mxfp4 uint8, a power of two's exponent + 127; with
            double_quant uint8, to be looked up in nested_code.
        nested_absmax: With double_quant the scales of 256 scales each, fp32 `(ceil(blocks / 256),)`.
        nested_offset: With double_quant the scales' mean, fp32 `()`: a scale is
            `nested_code[absmax] * nested_absmax + nested_offset`.
        nested_code: With double_quant the 256 values of a scale's code, fp32.

    Example:
        >>> import torch
        >>> from pynlp.functional import QuantState4bit, dequantize_4bit
        >>> packed = torch.tensor([0x10, 0x32], dtype=torch.uint8)  # the first of two codes is in the high half
        >>> state = QuantState4bit("nf4", 64, (4,), torch.float32, absmax=torch.tensor([2.0]))
        >>> dequantize_4bit(packed, state)
        tensor([-1.3924, -2.0000, -0.7898, -1.0501])
    """

    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_code: Tensor | None = None


def quantize_4bit(
    x: Tensor, *, quant_type: str = "nf4", blocksize: int | None = None, double_quant: bool = False
) -> tuple[Tensor, QuantState4bit]:
    """The values of x as 4-bit codes and a scale for every block of them.

    The bytes are those of bitsandbytes ("nf4"; "fp4" but for the sign of 0 and values in the middle of two codes) and
    of the OCP Microscaling Formats ("mxfp4", whose scales are rounded as section 6.3 says). The first of two codes is
    in the high half of a byte, of "mxfp4" in the low one. Scales that are quantized, too, may be rounded to other codes
    than bitsandbytes' are.

    Args:
        x: Any shape; fp32, bf16, fp16 or fp64, finite.
        quant_type: "nf4" (for weights that are distributed normally), "fp4" or "mxfp4".
        blocksize: Values that share a scale: a power of two from 32 to 4096, by default 64; 32 of mxfp4.
        double_quant: Store scales in 8 bits: 0.516 bytes a value instead of 0.5625, with blocks of 64. Not of mxfp4.

    Returns:
        uint8 `(ceil(x.numel() / 2), 1)`, two codes a byte, and what they mean.

    Raises:
        ValueError, TypeError: an argument is off, or x has a value that is not finite; the message names it.

    Source: Dettmers et al., arXiv 2305.14314 (NF4 and double quantization).

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_4bit, quantize_4bit
        >>> weight = torch.randn(256, 512)
        >>> packed, state = quantize_4bit(weight)
        >>> packed.nbytes + state.absmax.nbytes  # instead of 524288
        73728
        >>> (dequantize_4bit(packed, state) - weight).square().mean().item() < 0.01  # of values of variance 1
        True
    """
    check_dtype("x", x)
    kind = check_quant_type(quant_type)
    is_mx = FORMATS[kind].is_mx
    blocksize = (32 if is_mx else 64) if blocksize is None else blocksize
    blocksize = check_blocksize(blocksize, quant_type)
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant: expected True or False, got {double_quant!r}")
    if is_mx and double_quant:
        raise ValueError("double_quant: expected False with quant_type='mxfp4', whose scales have 8 bits already")
    refuse_derivatives("quantize_4bit", x)
    x = x.detach()
    packed, absmax = torch.ops.pynlp.quantize_4bit(
        (x.float() if x.dtype == torch.float64 else x).contiguous(), blocksize, kind
    )
    finite = (x if is_mx else absmax).isfinite().all()
    check(finite, "x: expected finite values in fp32", lambda: "got NaN or an infinity")
    state = QuantState4bit(quant_type, blocksize, tuple(x.shape), x.dtype, absmax)
    if double_quant:
        codes, *nested = reference.nest(absmax)
        state = state._replace(absmax=codes, nested_absmax=nested[0], nested_offset=nested[1], nested_code=nested[2])
    return packed, state


def dequantize_4bit(packed: Tensor, state: QuantState4bit, *, dtype: torch.dtype | None = None) -> Tensor:
    """The values that 4-bit codes stand for: a code's value times its block's scale.

    Args:
        packed, state: As `quantize_4bit` gives them.
        dtype: Of the result; the quantized tensor's by default.

    Returns:
        Of `state.shape`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import dequantize_4bit, quantize_4bit
        >>> packed, state = quantize_4bit(torch.tensor([[2.0, -1.0], [0.0, 1.0]]))
        >>> dequantize_4bit(packed, state)
        tensor([[ 2.0000, -1.0501],
                [ 0.0000,  0.8814]])
    """
    kind = check_state(packed, state)
    refuse_derivatives("dequantize_4bit", state.absmax, state.nested_absmax, state.nested_offset)
    dtype = check_target(state.dtype if dtype is None else dtype)
    count = numel(state.shape)
    op = torch.ops.pynlp.dequantize_4bit
    if dtype == torch.float64:
        op = torch.ops.pynlp.dequantize_4bit_reference
    return op(*tensors_of(packed, state), count, state.blocksize, kind, dtype).view(state.shape)


def check_quant_type(quant_type: str) -> int:
    """The number of a 4-bit format."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected {', '.join(map(repr, QUANT_TYPES))}, got {quant_type!r}")
    return QUANT_TYPES.index(quant_type)


def check_blocksize(blocksize: int, quant_type: str) -> int:
    blocksize = as_int("blocksize", blocksize)
    allowed = (32,) if quant_type == "mxfp4" else BLOCKSIZES
    if blocksize not in allowed:
        raise ValueError(
            f"blocksize: expected {', '.join(map(str, allowed))} with quant_type={quant_type!r}, got {blocksize}"
        )
    return blocksize


def numel(shape: tuple[int, ...]) -> int:
    """The number of values of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def check_state(packed: Tensor, state: QuantState4bit) -> int:
    """Check that codes and what they mean fit each other; the number of their format."""
    check_is_tensor("packed", packed)
    if not isinstance(state, QuantState4bit):
        raise TypeError(f"state: expected a QuantState4bit, as quantize_4bit gives it, got {type(state).__name__}")
    kind = check_quant_type(state.quant_type)
    check_blocksize(state.blocksize, state.quant_type)
    count = numel(state.shape)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected dtype uint8, got {packed.dtype}")
    if packed.dim() > 1 and packed.numel() and max(packed.shape) != packed.numel():
        raise ValueError(f"packed: expected shape (n, 1), as quantize_4bit gives, got {tuple(packed.shape)}")
    if packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"packed: expected {(count + 1) // 2} bytes for state.shape {tuple(state.shape)}, got {packed.numel()}"
        )
    blocks = (count + state.blocksize - 1) // state.blocksize
    is_nested = state.nested_absmax is not None
    byte = is_nested or FORMATS[kind].is_mx
    _check_part("absmax", state.absmax, torch.uint8 if byte else torch.float32, blocks, packed)
    if is_nested:
        if FORMATS[kind].is_mx:
            raise ValueError("state.nested_absmax: expected None with quant_type='mxfp4'")
        outer = (blocks + reference.NESTED_BLOCK - 1) // reference.NESTED_BLOCK
        _check_part("nested_absmax", state.nested_absmax, torch.float32, outer, packed)
        _check_part("nested_offset", state.nested_offset, torch.float32, 1, packed)
        _check_part("nested_code", state.nested_code, torch.float32, 256, packed)
    return kind


def _check_part(name: str, x: Tensor, dtype: torch.dtype, count: int, packed: Tensor) -> None:
    name = f"state.{name}"
    check_is_tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if x.numel() != count:
        raise ValueError(f"{name}: expected {count} values, got {x.numel()}")
    if x.device != packed.device:
        raise ValueError(f"{name}: expected packed's device {packed.device}, got {x.device}")


def tensors_of(
    packed: Tensor, state: QuantState4bit
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of codes and of their state, contiguous, as the ops take them."""
    nested = state.nested_absmax, state.nested_offset, state.nested_code
    return packed.contiguous(), state.absmax.contiguous(), *(None if x is None else x.contiguous() for x in nested)
