"""Blocks of rows of matrices, (ROWS, COLUMNS), as the kernels of norms and activations load and store them."""

import math

import triton
import triton.language as tl
from torch import Tensor


def row_strides(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """A common divisor of 16 and the tensors' row strides, and the strides in multiples of it; 0 for None or nothing.

    Kernels take both, the divisor as a constant, so that the compiler knows what the strides are multiples of. Columns
    must be contiguous, and rows all at one stride.
    """
    for x in tensors:
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"expected contiguous columns, got strides {x.stride()}")
    strides = [0 if x is None or x.numel() == 0 else x.view(-1, x.shape[-1]).stride(0) for x in tensors]
    align = math.gcd(16, *strides)
    return align, [stride // align for stride in strides]


@triton.jit
def load_block(p_x, b_row, stride, o_d, m, ALIGN: tl.constexpr):
    """Rows b_row (ROWS,), int64, and columns o_d (COLUMNS,) in fp32, 0 outside of the mask m (ROWS, COLUMNS)."""
    o_row = b_row[:, None] * stride * ALIGN
    return tl.load(p_x + o_row + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_block(p_x, b_row, stride, o_d, m, b_x, ALIGN: tl.constexpr):
    """Stores b_x (ROWS, COLUMNS) where load_block reads."""
    o_row = b_row[:, None] * stride * ALIGN
    tl.store(p_x + o_row + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m)
