"""Integer codes of weights inside kernels: tiles of a weight in the dtype of its product.

A value is (code - zero) * scale, or code * scale + minimum. Differences of codes and zeros have at most 8 significant
bits: bf16 and fp16 hold them exactly. Codes of 4 bits are two a byte, the first in its low half.

With PTX the differences are made two at a time: a code in the low bits of 128 or of 1024 is a number already.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.integers import cdiv


class IntegerWeight(NamedTuple):
    """A weight's tensors: those of a launch, their pointers in a kernel."""

    codes: torch.Tensor  # int8 (N, K), or uint8 (N, ceil(K / 2))
    scale: torch.Tensor  # fp32 or fp16, (N, groups) or (1, 1)
    zero_point: torch.Tensor | None  # int8, of the shape of scale
    minimum: torch.Tensor | None  # as scale, in place of a zero point

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def piece(self) -> int:
        """The columns whose codes fill 16 bytes."""
        return 16 * 8 // self.bits


class Scales(NamedTuple):
    """What a kernel knows of a weight besides its tensors."""

    BITS: int
    ZERO: bool  # it has zero points ...
    MINIMUM: bool  # ... or minima
    SHARED: bool  # one scale for all
    GROUP: int  # columns that share a scale; 0: those of a row


def scales_of(weight: IntegerWeight, columns: int, group: int) -> Scales:
    return Scales(
        weight.bits,
        weight.zero_point is not None,
        weight.minimum is not None,
        weight.scale.numel() == 1,
        group if cdiv(columns, group) > 1 else 0,
    )


# Two bf16 of two bytes of a 32-bit register: (128 + low bits) - (128 or 256), by the sign, - zero.
_SPLIT = """.reg .b32 a, b, c, d, minus;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 c, a, 0x00800080, 0x43004300, 0xEA;
lop3.b32 d, b, 0x00800080, 0x43004300, 0xEA;
lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA;
lop3.b32 b, b, 0x007f007f, 0x43004300, 0xEA;
mov.b32 minus, 0xBF80BF80;
"""
_BYTES_BF16 = tl.constexpr(
    "{\n"
    + _SPLIT
    + """fma.rn.bf16x2 $0, c, minus, a;
fma.rn.bf16x2 $1, d, minus, b;
}"""
)
_BYTES_ZERO_BF16 = tl.constexpr(
    "{\n"
    + _SPLIT
    + """fma.rn.bf16x2 a, c, minus, a;
fma.rn.bf16x2 b, d, minus, b;
fma.rn.bf16x2 $0, $3, minus, a;
fma.rn.bf16x2 $1, $4, minus, b;
}"""
)
# Two fp16: (1024 + (code + 128)) - (1024 + 128 + zero).
_BYTES_FP16 = tl.constexpr("""{
.reg .b32 a, b;
xor.b32 a, $2, 0x80808080;
prmt.b32 b, a, 0x64646464, 0x4342;
prmt.b32 a, a, 0x64646464, 0x4140;
sub.f16x2 $0, a, $3;
sub.f16x2 $1, b, $4;
}""")
# The two codes of each of four bytes: (128 + code) - (128 + zero), or 1024 in place of 128.
_HALVES = """{{
.reg .b32 a, b, c, d, high, minus;
shr.u32 high, $4, 4;
prmt.b32 a, $4, high, 0x0400;
prmt.b32 b, $4, high, 0x0501;
prmt.b32 c, $4, high, 0x0602;
prmt.b32 d, $4, high, 0x0703;
lop3.b32 a, a, 0x000f000f, {magic}, 0xEA;
lop3.b32 b, b, 0x000f000f, {magic}, 0xEA;
lop3.b32 c, c, 0x000f000f, {magic}, 0xEA;
lop3.b32 d, d, 0x000f000f, {magic}, 0xEA;
mov.b32 minus, {minus};
fma.rn.{dtype} $0, $5, minus, a;
fma.rn.{dtype} $1, $6, minus, b;
fma.rn.{dtype} $2, $7, minus, c;
fma.rn.{dtype} $3, $8, minus, d;
}}"""
_HALVES_BF16 = tl.constexpr(_HALVES.format(magic="0x43004300", minus="0xBF80BF80", dtype="bf16x2"))
_HALVES_FP16 = tl.constexpr(_HALVES.format(magic="0x64006400", minus="0xBC00BC00", dtype="f16x2"))
# The two codes of each of four bytes as bytes.
_HALVES_INT8 = tl.constexpr("""{
.reg .b32 low, high;
shr.u32 high, $2, 4;
and.b32 low, $2, 0x0f0f0f0f;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
}""")


@triton.jit
def _same(x):
    return x


@triton.jit
def opaque(b_w):
    """b_w. Triton takes values that were made of bytes for those of a type as narrow, and reads them for mma.sync in an
    order that costs moves; it does not look through this."""
    return tl.map_elementwise(_same, b_w)


@triton.jit
def _byte_differences(b_code, b_zero, W: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes minus zeros of the shape of b_code."""
    if not PTX or DTYPE == tl.float32:
        return (b_code.to(tl.float32) - b_zero).to(DTYPE)
    elif DTYPE == tl.float16:
        b_zero = (b_zero + 1152.0).to(tl.float16)
        return opaque(tl.inline_asm_elementwise(_BYTES_FP16, "=r,=r,r,r,r", [b_code, b_zero], tl.float16, True, 4))
    elif W.ZERO:
        b_zero = b_zero.to(tl.bfloat16)
        b_w = tl.inline_asm_elementwise(_BYTES_ZERO_BF16, "=r,=r,r,r,r", [b_code, b_zero], tl.bfloat16, True, 4)
        return opaque(b_w)
    else:
        return opaque(tl.inline_asm_elementwise(_BYTES_BF16, "=r,=r,r", [b_code], tl.bfloat16, True, 4))


@triton.jit
def half_pairs(b_byte, b_zero, DTYPE: tl.constexpr):
    """The two codes of bytes minus zeros (of any shape that broadcasts) as two bf16 or fp16 in an int32; by PTX."""
    MAGIC: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
    b_bits = (b_zero + MAGIC).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    b_bits = tl.broadcast_to(b_bits | (b_bits << 16), b_byte.shape)
    ASM: tl.constexpr = _HALVES_FP16 if DTYPE == tl.float16 else _HALVES_BF16
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r,r,r,r", [b_byte, b_bits], tl.int32, True, 4)


@triton.jit
def half_differences(b_byte, b_zero, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The first and the second codes of bytes minus zeros, two tensors of the shape of b_byte."""
    if not PTX:
        b_first = ((b_byte & 15).to(tl.float32) - b_zero).to(DTYPE)
        b_second = ((b_byte >> 4).to(tl.float32) - b_zero).to(DTYPE)
    elif DTYPE == tl.float32:
        b_pair = half_pairs(b_byte, b_zero, tl.bfloat16)
        b_first = (b_pair << 16).to(tl.float32, bitcast=True)
        b_second = (b_pair & -0x10000).to(tl.float32, bitcast=True)
    else:
        b_pair = half_pairs(b_byte, b_zero, DTYPE)
        b_first = b_pair.to(tl.int16).to(DTYPE, bitcast=True)
        b_second = (b_pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return b_first, b_second


@triton.jit
def differences(b_stored, b_zero, W: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes minus zeros of stored codes (A, B, C) and fp32 zeros (A, B), exact: (A, B, C), of 4 bits (A, B, 2 C)."""
    b_zero = b_zero[:, :, None]
    if W.BITS == 8:
        b_zero = tl.broadcast_to(b_zero, b_stored.shape)
        b_w = _byte_differences(b_stored, b_zero, W, DTYPE, PTX)
    else:
        b_first, b_second = half_differences(b_stored, b_zero, DTYPE, PTX)
        b_w = tl.join(b_first, b_second)
        b_w = tl.reshape(b_w, [b_stored.shape[0], b_stored.shape[1], 2 * b_stored.shape[2]])
        if PTX:
            b_w = opaque(b_w)
    return b_w


@triton.jit
def plain_codes(b_stored, BITS: tl.constexpr, PTX: tl.constexpr):
    """The codes of stored ones (A, C) as int8, (A, C) or (A, 2 C)."""
    b_codes = b_stored
    if BITS == 4:
        if PTX:
            b_pair = tl.inline_asm_elementwise(_HALVES_INT8, "=r,=r,r", [b_stored], tl.int16, True, 4)
            b_first, b_second = b_pair.to(tl.int8), (b_pair >> 8).to(tl.int8)
        else:
            b_first, b_second = (b_stored & 15).to(tl.int8), (b_stored >> 4).to(tl.int8)
        b_codes = tl.reshape(tl.join(b_first, b_second), [b_stored.shape[0], 2 * b_stored.shape[1]])
    return b_codes


@triton.jit
def pitch_of(columns, UNIT: tl.constexpr, BITS: tl.constexpr):
    """The bytes of a row of codes, whose columns are given in multiples of UNIT."""
    if BITS == 8:
        return columns * UNIT
    if UNIT % 2 == 0:
        return columns * (UNIT // 2)
    return (columns * UNIT + 1) // 2


@triton.jit
def load_stored(p_codes, i_n, i_k, o_n, o_byte, pitch, EVEN: tl.constexpr, BITS: tl.constexpr):
    """Stored codes of rows i_n + o_n and of the bytes o_byte from column i_k on, shapes that broadcast; 0 behind."""
    i_byte = i_k if BITS == 8 else i_k // 2
    p_tile = p_codes + (tl.cast(i_n, tl.int64) * pitch + i_byte)
    if EVEN:
        return tl.load(p_tile + (o_n * pitch + o_byte))
    return tl.load(p_tile + (o_n * pitch + o_byte), mask=o_byte < pitch - i_byte, other=0)


@triton.jit
def load_scales(weight, i_n, i_k, o_n, o_k, columns, W: tl.constexpr):
    """Scales, zeros and minima in fp32 of rows i_n + o_n (A) and columns i_k + o_k (B), (A, B); (A, 1) without groups.

    Where there are none, zeros are 0, but of 4 bits without minima 8, and minima 0.
    """
    if W.SHARED:
        o_scale = o_n[:, None] * 0
        p_scale, p_zero, p_minimum = weight[1], weight[2], weight[3]
    else:
        groups = 1
        o_group = tl.zeros([1], tl.int32)
        if W.GROUP > 0:
            groups = tl.cdiv(columns, W.GROUP)
            o_group = tl.minimum((i_k + o_k) // W.GROUP, groups - 1)
        o_scale = o_n[:, None] * groups + o_group[None, :]
        i_scale = tl.cast(i_n, tl.int64) * groups
        p_scale, p_zero, p_minimum = weight[1] + i_scale, weight[2], weight[3]
        if W.ZERO:
            p_zero += i_scale
        if W.MINIMUM:
            p_minimum += i_scale
    b_scale = tl.load(p_scale + o_scale).to(tl.float32)
    b_zero = tl.full(b_scale.shape, 8.0 if W.BITS == 4 and not W.MINIMUM else 0.0, tl.float32)
    b_minimum = tl.full(b_scale.shape, 0.0, tl.float32)
    if W.ZERO:
        b_zero = tl.load(p_zero + o_scale).to(tl.float32)
    if W.MINIMUM:
        b_minimum = tl.load(p_minimum + o_scale).to(tl.float32)
    return b_scale, b_zero, b_minimum
