"""CPU kernels of bitsandbytes' ops, under its names of arguments."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pynlp import functional
from pynlp.functional import QuantState4bit, QuantStateInt8, int8_linear, linear_4bit
from pynlp.integrations.names import in_own_names
from pynlp.ops.quantization.formats import check_blocksize, check_quant_type
from pynlp.reference.quantization.formats import NESTED_BLOCK

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

QUANT_TYPES = ("nf4", "fp4")


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two codes a byte, as one column of quant_storage, and the blocks' scales in fp32."""
    kind = check_quant_type(_known(quant_type))
    packed, absmax = torch.ops.pynlp.quantize_4bit(A.contiguous(), check_blocksize(blocksize, quant_type), kind)
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quant_storage: expected one whose values fill {packed.numel()} bytes, got {quant_storage} of "
            f"{quant_storage.itemsize} bytes"
        )
    return packed.view(-1).view(quant_storage)[:, None], absmax


@in_own_names(packed="A")
def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values, of this shape and dtype."""
    return functional.dequantize_4bit(_bytes(A), _state(absmax, shape, blocksize, quant_type), dtype=dtype)


def dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    """The values, written into `out`."""
    _write(out, dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


@in_own_names(x="A", packed="B")
def gemm_4bit(
    A: Tensor,  # (.., K)
    B: Tensor,
    shapeB: Sequence[int],  # (N, K)
    absmax: Tensor,  # the blocks' scales; with absmax_8bit those of its blocks
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A B^T + bias, (.., N)."""
    state = _state(absmax, shapeB, blocksize, quant_type)
    if absmax_8bit is not None:
        state = state._replace(
            absmax=absmax_8bit, nested_absmax=state.absmax, nested_offset=absmax_offset.float(), nested_code=absmax_code
        )
    return linear_4bit(A, _bytes(B), state, bias)


@in_own_names(x="A", packed="B")
def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """A B^T, (.., N); the code of 1 tells the format, as in bitsandbytes."""
    quant_type = "fp4" if code[1] > 0 else "nf4"
    return linear_4bit(A, _bytes(B), _state(absmax, shapeB, blocksize, quant_type))


def gemv_4bit_beside(theirs: Callable) -> Callable:
    """`gemv_4bit` where bitsandbytes has one, too: of weights in the order that it packs them in.

    Args:
        theirs: Takes the dispatcher's keys and the arguments.
    """

    def kernel(keys, A, B, shapeB, absmax, code, blocksize):
        if absmax.dtype == torch.bfloat16 and absmax.dim() == 2:  # packed, its scales turned
            return theirs(keys, A, B, shapeB, absmax, code, blocksize)
        return gemv_4bit(A, B, shapeB, absmax, code, blocksize)

    return kernel


def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    """A B^T, written into `out`."""
    _write(out, gemv_4bit(A, B, shapeB, absmax, code, blocksize))


@in_own_names(x="A", codes="B")
def int8_scaled_mm(
    A: Tensor,  # int8 (.., K)
    B: Tensor,  # int8 (N, K)
    row_stats: Tensor,  # the largest magnitude of each row of A
    col_stats: Tensor,  # and of B
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A B^T of the values that the codes stand for, + bias, (.., N), in fp16 by default; computed in fp32."""
    if A.dtype != torch.int8:
        raise TypeError(f"A: expected dtype torch.int8, got {A.dtype}")
    x = A.float() * (row_stats.float() / 127).view(*A.shape[:-1], 1)
    state = QuantStateInt8(max(1, B.shape[1]), torch.float32, col_stats.float().view(-1, 1) / 127)
    return int8_linear(x, B, state, bias).to(dtype or torch.float16)


def matmul_4bit(theirs: Callable) -> Callable:
    """`bitsandbytes.matmul_4bit`, whose gradients come without a dense weight, too; what is not ours goes to theirs."""

    def matmul_4bit(
        A: Tensor, B: Tensor, quant_state: "QuantState", out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        if A.device.type != "cpu" or out is not None or not _is_ours(A, quant_state):
            return theirs(A, B, quant_state, out, bias)
        absmax, nested = quant_state.absmax, ()
        if quant_state.nested:
            second = quant_state.state2
            absmax, nested = second.absmax, (absmax, second.code, quant_state.offset)
        return gemm_4bit(A, B, quant_state.shape, absmax, quant_state.blocksize, quant_state.quant_type, bias, *nested)

    return matmul_4bit


def _is_ours(A: Tensor, state: "QuantState | None") -> bool:
    """Whether these are the codes of a weight (N, K), in rows, whose scales are in fp32 or in blocks of 256."""
    if state is None or len(state.shape) != 2 or A.shape[-1] != state.shape[1]:
        return False
    if getattr(state, "packing_format_for_cpu", False):  # by bitsandbytes, before register
        return False
    return not state.nested or state.state2.blocksize == NESTED_BLOCK


def _known(quant_type: str) -> str:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    return quant_type


def _state(absmax: Tensor, shape: Sequence[int], blocksize: int, quant_type: str) -> QuantState4bit:
    return QuantState4bit(_known(quant_type), blocksize, tuple(shape), torch.float32, absmax.float())


def _bytes(packed: Tensor) -> Tensor:
    """Codes, stored in values of whatever dtype, as bytes: of a plain tensor, not of a Params4bit."""
    return packed.reshape(-1).view(torch.uint8)


def _write(out: Tensor, result: Tensor) -> None:
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"out: expected shape {tuple(result.shape)}, dtype {result.dtype}, got {tuple(out.shape)}, {out.dtype}"
        )
    out.copy_(result)
