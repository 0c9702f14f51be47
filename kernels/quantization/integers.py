"""Weights in integers of 8 or 4 bits are made and read: launchers and kernels.

Arguments and results of the launchers are those of the functions of the same names in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launch import launch
from .integer_codes import IntegerWeight, load_scales, load_stored, scales_of

TILE = 4096  # values of a program
WIDE = 1024  # columns of a program that makes or reads codes
WARPS = 4
SMALLEST = tl.constexpr(2.0**-149)  # of fp32


@triton.jit
def rounded(b_x):
    """The nearest integers, of two the even one, of |x| < 2^22."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def quotients(b_x, b_scale):
    """x / scale as IEEE has it, in [-256, 256], 0 where it is none."""
    b_x = tl.div_rn(b_x, tl.broadcast_to(b_scale, b_x.shape))
    b_x = tl.where(b_x != b_x, 0.0, b_x)
    return tl.minimum(tl.maximum(b_x, -256.0), 256.0)


@triton.jit
def extrema_kernel(
    p_x, p_low, p_high, lines, columns, group, pieces, parts, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The least and the greatest value, and 0, of pieces of at most BLOCK columns: (lines,), a row's one after another.

    A group has `parts` pieces, a row `pieces`. Both are NaN where a value is.
    """
    i_line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    i_row, i_piece = i_line // pieces, (i_line % pieces).to(tl.int32)
    b_group = i_piece // parts
    b_column = b_group * group + i_piece % parts * BLOCK
    b_end = tl.minimum((b_group + 1) * group, columns)
    b_k = b_column[:, None] + tl.arange(0, BLOCK)[None, :]
    m_x = (b_k < b_end[:, None]) & (i_line < lines)[:, None]
    b_x = tl.load(p_x + i_row[:, None] * columns + b_k, mask=m_x, other=0.0).to(tl.float32)
    m_nan = tl.max((b_x != b_x).to(tl.int32), 1) > 0
    tl.store(p_low + i_line, tl.where(m_nan, float("nan"), tl.min(b_x, 1)), mask=i_line < lines)
    tl.store(p_high + i_line, tl.where(m_nan, float("nan"), tl.max(b_x, 1)), mask=i_line < lines)


@triton.jit
def scale_kernel(
    p_low, p_high, p_scale, p_zero, scales, parts,
    BITS: tl.constexpr, AFFINE: tl.constexpr, SCALES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scales, and zeros if affine, of the extrema (scales, parts)."""
    i_scale = tl.program_id(0).to(tl.int64) * SCALES + tl.arange(0, SCALES)
    m_scale = i_scale < scales
    b_low = tl.full([SCALES], 0.0, tl.float32)
    b_high = tl.full([SCALES], 0.0, tl.float32)
    b_nan = tl.full([SCALES], 0, tl.int32)
    for i in tl.range(0, parts, PARTS):
        o_part = i + tl.arange(0, PARTS)
        m = m_scale[:, None] & (o_part < parts)[None, :]
        o = i_scale[:, None] * parts + o_part[None, :]
        b_lows = tl.load(p_low + o, mask=m, other=0.0)
        b_low = tl.minimum(b_low, tl.min(b_lows, 1))
        b_high = tl.maximum(b_high, tl.max(tl.load(p_high + o, mask=m, other=0.0), 1))
        b_nan = tl.maximum(b_nan, tl.max((b_lows != b_lows).to(tl.int32), 1))
    b_low = tl.where(b_nan > 0, float("nan"), b_low)
    b_largest = tl.where(b_nan > 0, float("nan"), tl.maximum(-b_low, b_high))
    LEAST: tl.constexpr = -128 if BITS == 8 else 0
    STEPS: tl.constexpr = 255 if BITS == 8 else 15
    if AFFINE:
        b_steps = tl.full([SCALES], STEPS, tl.float32)
        b_scale = tl.div_rn(b_high, b_steps) - tl.div_rn(b_low, b_steps)
    else:
        b_scale = tl.div_rn(b_largest, tl.full([SCALES], STEPS // 2, tl.float32))
    b_scale = tl.where((b_scale == 0) & (b_largest > 0), SMALLEST, b_scale)
    tl.store(p_scale + i_scale, b_scale, mask=m_scale)
    if AFFINE:
        b_zero = LEAST - tl.div_rn(b_low, b_scale)
        b_zero = tl.where(b_zero != b_zero, LEAST, tl.minimum(tl.maximum(b_zero, LEAST), LEAST + STEPS))
        tl.store(p_zero + i_scale, rounded(b_zero).to(tl.int8), mask=m_scale)


@triton.jit
def codes_kernel(
    p_x, weight, rows, columns, W: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes of x from its scales and zeros; a program does ROWS rows of PIECES times WIDTH columns."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    i_k = tl.program_id(1) * (PIECES * WIDTH)
    o_row = tl.minimum(tl.arange(0, ROWS), rows - 1 - i_row).to(tl.int32)
    m_row = (tl.arange(0, ROWS) < rows - i_row)[:, None]
    o_piece = tl.arange(0, PIECES) * WIDTH
    b_scale, b_zero, _ = load_scales(weight, i_row, i_k, o_row, o_piece, columns, W)
    b_k = i_k + tl.arange(0, PIECES * WIDTH)
    p_line = p_x + (i_row + o_row)[:, None] * columns
    b_x = tl.load(p_line + b_k[None, :], mask=m_row & (b_k < columns)[None, :], other=0.0).to(tl.float32)
    b_x = quotients(tl.reshape(b_x, [ROWS, PIECES, WIDTH]), b_scale[:, :, None])
    b_code = rounded(b_x) + b_zero[:, :, None]
    LEAST: tl.constexpr = (-128 if W.BITS == 8 else 0) + (0 if W.ZERO else 1)
    b_code = tl.minimum(tl.maximum(b_code, LEAST), 127 if W.BITS == 8 else 15)
    if W.BITS == 8:
        b_byte = tl.reshape(b_code, [ROWS, PIECES * WIDTH]).to(tl.int8)
        pitch = columns
        b_at = b_k
    else:
        b_code = tl.where((b_k < columns)[None, :], tl.reshape(b_code, [ROWS, PIECES * WIDTH]).to(tl.int32), 0)
        b_first, b_second = tl.split(tl.reshape(b_code, [ROWS, PIECES * WIDTH // 2, 2]))
        b_byte = (b_first | (b_second << 4)).to(tl.uint8)
        pitch = (columns + 1) // 2
        b_at = i_k // 2 + tl.arange(0, PIECES * WIDTH // 2)
    p_codes = weight[0] + (i_row + o_row)[:, None] * pitch + b_at[None, :]
    tl.store(p_codes, b_byte, mask=m_row & (b_at < pitch)[None, :])


@triton.jit
def integers_kernel(
    weight, p_out, first, rows, columns,
    W: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The values of `rows` rows from number `first` on; a program does ROWS of them and PIECES times WIDTH columns."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    i_k = tl.program_id(1) * (PIECES * WIDTH)
    o_row = tl.minimum(tl.arange(0, ROWS), rows - 1 - i_row).to(tl.int32)
    BYTES: tl.constexpr = WIDTH * W.BITS // 8
    pitch = columns if W.BITS == 8 else (columns + 1) // 2
    o_byte = (tl.arange(0, PIECES) * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]
    b_stored = load_stored(
        weight[0], first + i_row, i_k, o_row[:, None, None], o_byte[None, :, :], pitch, False, W.BITS
    )  # (ROWS, PIECES, BYTES)
    o_piece = tl.arange(0, PIECES) * WIDTH
    b_scale, b_zero, b_minimum = load_scales(weight, first + i_row, i_k, o_row, o_piece, columns, W)
    b_scale, b_zero, b_minimum = b_scale[:, :, None], b_zero[:, :, None], b_minimum[:, :, None]
    if W.BITS == 8:
        b_out = (b_stored.to(tl.float32) - b_zero) * b_scale
        if W.MINIMUM:
            b_out += b_minimum
    else:
        b_first = ((b_stored & 15).to(tl.float32) - b_zero) * b_scale
        b_second = ((b_stored >> 4).to(tl.float32) - b_zero) * b_scale
        if W.MINIMUM:
            b_first += b_minimum
            b_second += b_minimum
        DTYPE: tl.constexpr = p_out.dtype.element_ty
        b_out = tl.join(b_first.to(DTYPE), b_second.to(DTYPE))
    b_out = tl.reshape(b_out.to(p_out.dtype.element_ty), [ROWS, PIECES * WIDTH])
    b_k = i_k + tl.arange(0, PIECES * WIDTH)
    m = (tl.arange(0, ROWS) < rows - i_row)[:, None] & (b_k < columns)[None, :]
    tl.store(p_out + (i_row + o_row)[:, None] * columns + b_k[None, :], b_out, mask=m)


def quantize_integers(x: Tensor, bits: int, affine: bool, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes; scales fp32 and zeros int8, (N, ceil(K / group)) or (1, 1). Zeros are empty if not affine."""
    x = x.contiguous()
    rows, columns = x.shape
    shape = (rows, cdiv(columns, group)) if group else (1, 1)
    stored = (rows, columns) if bits == 8 else (rows, cdiv(columns, 2))
    codes = torch.empty(stored, dtype=torch.int8 if bits == 8 else torch.uint8, device=x.device)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    zero = torch.empty(shape if affine else (0,), dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return codes, scale.zero_(), zero.zero_()
    group = min(group or columns, columns)  # all of x: of its rows' extrema
    block = min(TILE, next_power_of_2(group))
    parts = cdiv(group, block)
    pieces = cdiv(columns, group) * parts
    lines, own = rows * pieces, TILE // block
    low, high = (torch.empty((lines,), dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        extrema_kernel, (cdiv(lines, own),), x, low, high, lines, columns, group, pieces, parts,
        BLOCK=block, LINES=own, num_warps=WARPS,
    )  # fmt: skip
    scales, width = scale.numel(), min(1024, next_power_of_2(lines // scale.numel()))
    launch(
        scale_kernel, (cdiv(scales, 1024 // width),), low, high, scale, zero, scales, lines // scales,
        BITS=bits, AFFINE=affine, SCALES=1024 // width, PARTS=width, num_warps=WARPS,
    )  # fmt: skip
    weight = IntegerWeight(codes, scale, zero if affine else None, None)
    grid, cut = _tile(rows, columns)
    launch(codes_kernel, grid, x, weight, rows, columns, W=scales_of(weight, columns, group), num_warps=WARPS, **cut)
    return codes, scale, zero


def dequantize_integers(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values, (N, K)."""
    out = torch.empty((codes.shape[0], columns), dtype=dtype, device=codes.device)
    dequantize_into(out, IntegerWeight(codes, scale, zero_point, minimum), 0, group)
    return out


def dequantize_into(out: Tensor, weight: IntegerWeight, first: int, group: int) -> None:
    """Overwrites out, contiguous, by the weight's rows from number `first` on."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    grid, cut = _tile(rows, columns)
    # As the reference: the scale's product is rounded before its minimum is added.
    launch(
        integers_kernel, grid, weight, out, first, rows, columns, W=scales_of(weight, columns, group),
        num_warps=WARPS, enable_fp_fusion=False, **cut,
    )  # fmt: skip


def _tile(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the tiles of programs that make or read codes: pieces of 16 columns have one scale."""
    pieces = min(WIDE, max(16, next_power_of_2(columns))) // 16
    own = max(1, TILE // (pieces * 16))
    return (cdiv(rows, own), cdiv(columns, pieces * 16)), dict(ROWS=own, PIECES=pieces, WIDTH=16)
