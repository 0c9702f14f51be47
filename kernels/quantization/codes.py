"""4-bit codes and their scales inside kernels: the formats' constants, a table of bytes, and tiles of a weight.

A byte holds two codes. What two codes stand for is looked up together in a table of 256 pairs of fp32, which each
program makes for itself: the products of codes and scales are those of the reference, and rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

KINDS = ("nf4", "fp4", "mxfp4")
# fmt: off
NF4 = tl.constexpr((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
# fmt: on
# Magnitudes of the codes 0 .. 7; codes from 8 on are those of their negatives.
FP4 = tl.constexpr(tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)))
E2M1 = tl.constexpr((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
NESTED_BLOCK = tl.constexpr(256)  # scales of a block, where scales are quantized, too
SMALLEST = tl.constexpr(32)  # values that share a scale, whatever the blocks: 16 bytes


class Weight(NamedTuple):
    """A weight's codes and scales: the tensors of a launch, their pointers in a kernel."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_code: torch.Tensor | None


@triton.jit
def code_values(b_code, KIND: tl.constexpr):
    """The value of each code in fp32, before the scale."""
    if KIND == "nf4":
        b_value = tl.full(b_code.shape, 1.0, tl.float32)
        for i in tl.static_range(15):
            b_value = tl.where(b_code == i, NF4[i], b_value)
        return b_value
    b_value = tl.full(b_code.shape, 0.0, tl.float32)
    for i in tl.static_range(1, 8):
        b_value = tl.where((b_code & 7) == i, FP4[i] if KIND == "fp4" else E2M1[i], b_value)
    # The sign as a bit: a constant of -0 would lose it.
    return (b_value.to(tl.int32, bitcast=True) | ((b_code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def pair_table(KIND: tl.constexpr, NARROW: tl.constexpr):
    """The two values of each byte, (256,): int64, the first one's bits below the second one's.

    With NARROW int32 and values of 8 significant bits, for products in bf16: random reads of 4 bytes take half as many
    turns of shared memory as those of 8. The second value is the whole word, whose upper half is chosen so that it is
    near with the first one behind it; but mxfp4's values, which 8 bits hold exactly, stay apart.
    """
    b_byte = tl.arange(0, 256)
    b_high = code_values(b_byte >> 4, KIND).to(tl.int32, bitcast=True)
    b_low = code_values(b_byte & 15, KIND).to(tl.int32, bitcast=True)
    b_first = b_low if KIND == "mxfp4" else b_high
    b_second = b_high if KIND == "mxfp4" else b_low
    if NARROW:
        b_below = ((b_first + 0x8000) >> 16) & 0xFFFF
        b_size = b_second & 0x7FFFFFFF
        if KIND != "mxfp4":
            b_size = tl.maximum(b_size - b_below + 0x8000, 0)
        b_pair = (b_second & -0x80000000) | (b_size & 0x7FFF0000) | b_below
    else:
        b_pair = (b_first.to(tl.int64) & 0xFFFFFFFF) | (b_second.to(tl.int64) << 32)
    return b_pair


@triton.jit
def pairs_of(b_table, b_byte, KIND: tl.constexpr):
    """The first and the second values of bytes, two tensors of their shape."""
    b_index = tl.reshape(b_byte, [b_byte.numel]).to(tl.int32)
    b_pair = tl.reshape(tl.gather(b_table, b_index, 0), b_byte.shape)
    if b_table.dtype == tl.int64:
        b_first, b_second = b_pair.to(tl.int32), (b_pair >> 32).to(tl.int32)
    else:
        b_first, b_second = b_pair << 16, b_pair
        if KIND == "mxfp4":
            b_second = b_pair & -0x10000
    return b_first.to(tl.float32, bitcast=True), b_second.to(tl.float32, bitcast=True)


@triton.jit
def load_scales(weight, i_block, o_block, m, KIND: tl.constexpr, NESTED: tl.constexpr, MASKED: tl.constexpr):
    """The scales of blocks i_block + o_block in fp32; with MASKED that of other places than m's is finite."""
    p_absmax = weight[1] + i_block
    if MASKED:
        b_absmax = tl.load(p_absmax + o_block, mask=m, other=0)
    else:
        b_absmax = tl.load(p_absmax + o_block)
    if KIND == "mxfp4":  # 2^(e - 127), of e = 0 subnormal; NaN of 255
        b_bits = b_absmax.to(tl.int32)
        b_bits = tl.where(b_bits == 0, 1 << 22, tl.where(b_bits == 255, 0x7FC00000, b_bits << 23))
        b_scale = b_bits.to(tl.float32, bitcast=True)
    elif NESTED:
        b_outer = (i_block + o_block) // NESTED_BLOCK
        b_code = tl.load(weight[4] + b_absmax.to(tl.int32), eviction_policy="evict_last")
        if MASKED:
            b_largest = tl.load(weight[2] + b_outer, mask=m, other=0.0)
        else:
            b_largest = tl.load(weight[2] + b_outer)
        b_scale = b_code * b_largest + tl.load(weight[3])
    else:
        b_scale = b_absmax
    return b_scale


@triton.jit
def _same(x):
    return x


@triton.jit
def load_pairs(weight, b_table, i_n, i_k, o_n, columns, GROUP: tl.constexpr, F: tl.constexpr):
    """The values of rows i_n + o_n and columns i_k .. i_k + BLOCK_K by pairs, and scales of GROUP values each.

    Rows have whole blocks. Two tensors (BLOCK_N, GROUPS, GROUP / 2) and one (BLOCK_N, GROUPS).
    """
    GROUPS: tl.constexpr = F.BLOCK_K // GROUP
    o_g = tl.arange(0, GROUPS)
    o_half = (o_g * (GROUP // 2))[:, None] + tl.arange(0, GROUP // 2)[None, :]  # (GROUPS, GROUP / 2)
    o_byte = o_n[:, None, None] * (columns // 2) + o_half[None, :, :]
    o_block = o_n[:, None] * (columns // F.BLOCKSIZE) + (o_g * GROUP // F.BLOCKSIZE)[None, :]
    p_tile = weight[0] + (tl.cast(i_n, tl.int64) * (columns // 2) + i_k // 2)
    i_block = tl.cast(i_n, tl.int64) * (columns // F.BLOCKSIZE) + i_k // F.BLOCKSIZE
    m_g = (o_g < (columns - i_k) // GROUP)[None, :]
    if F.EVEN_K:
        b_byte = tl.load(p_tile + o_byte)
    else:
        b_byte = tl.load(p_tile + o_byte, mask=m_g[:, :, None], other=0)
    b_scale = load_scales(weight, i_block, o_block, m_g, F.KIND, F.NESTED, not F.EVEN_K)
    b_first, b_second = pairs_of(b_table, b_byte, F.KIND)
    return b_first, b_second, b_scale


@triton.jit
def weight_tile(weight, b_table, i_n, i_k, rows, columns, F: tl.constexpr, DTYPE: tl.constexpr):
    """Rows i_n .. i_n + BLOCK_N and columns i_k .. i_k + BLOCK_K, (BLOCK_N, BLOCK_K); what is outside is finite."""
    o_n = tl.arange(0, F.BLOCK_N)
    if not F.EVEN_N:
        o_n = tl.minimum(o_n, rows - 1 - i_n)
    if F.UNIT > 1:
        GROUP: tl.constexpr = min(F.BLOCKSIZE, F.BLOCK_K)
        b_first, b_second, b_scale = load_pairs(weight, b_table, i_n, i_k, o_n, columns, GROUP, F)
        b_scale = b_scale[:, :, None]
        b_pair = tl.join((b_first * b_scale).to(DTYPE), (b_second * b_scale).to(DTYPE))
        b_w = tl.reshape(b_pair, [F.BLOCK_N, F.BLOCK_K])
        if F.OPAQUE:
            # Triton takes values that were joined for those of a type half as wide, and reads them for mma.sync in an
            # order that costs four moves a product. It does not look through this.
            b_w = tl.map_elementwise(_same, b_w)
        return b_w
    # A row may start inside of a block, or inside of a byte: each value has its own address.
    o_k = i_k + tl.arange(0, F.BLOCK_K)
    b_place = tl.cast(i_n + o_n, tl.int64)[:, None] * columns + o_k[None, :]  # (BLOCK_N, BLOCK_K)
    m_k = (o_k < columns)[None, :]
    b_first, b_second = pairs_of(b_table, tl.load(weight[0] + b_place // 2, mask=m_k, other=0), F.KIND)
    b_scale = load_scales(weight, 0, b_place // F.BLOCKSIZE, m_k, F.KIND, F.NESTED, True)
    return (tl.where(b_place % 2 == 0, b_first, b_second) * b_scale).to(DTYPE)
