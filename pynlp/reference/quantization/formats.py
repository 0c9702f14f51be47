"""Formats of 4-bit weights in PyTorch: codes, blocks and their scales; the default back end and the oracle.

A tensor is read row by row as one list of values and cut into blocks, which may straddle rows. A block has a scale; a
value is the scale times one of 16 codes. Two codes share a byte.

- nf4: quantiles of a normal distribution; scale fp32, the block's largest magnitude (QLoRA, arXiv 2305.14314).
- fp4: sign, two bits of exponent, one of mantissa, as bitsandbytes has them; scale as nf4's.
- mxfp4: E2M1 codes; scale a power of two, its exponent in E8M0 (OCP Microscaling Formats 1.0, sections 5.3 and 6.3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

NESTED_BLOCK = 256  # scales of a block, where scales are quantized, too


class Format(NamedTuple):
    """A 4-bit format.

    Attributes:
        codes: The value of each code, before the scale.
        order: Codes by rising value.
        first_is_high: Whether the first of two values is in the high half of a byte.
        is_mx: Whether scales are powers of two, of which a byte tells the exponent + 127.
    """

    codes: tuple[float, ...]
    order: tuple[int, ...]
    first_is_high: bool
    is_mx: bool


# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
FP4 = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _with_signs(codes: tuple[float, ...]) -> tuple[float, ...]:
    return codes + tuple(-x for x in codes)


def _rising(codes: tuple[float, ...]) -> tuple[int, ...]:
    """The codes by rising value, -0 before 0."""
    return tuple(sorted(range(16), key=lambda code: (codes[code], code < 8)))


QUANT_TYPES = ("nf4", "fp4", "mxfp4")
FORMATS = (
    Format(NF4, tuple(range(16)), first_is_high=True, is_mx=False),
    Format(_with_signs(FP4), _rising(_with_signs(FP4)), first_is_high=True, is_mx=False),
    Format(_with_signs(E2M1), _rising(_with_signs(E2M1)), first_is_high=False, is_mx=True),
)


def thresholds(quant_type: int) -> Tensor:
    """The 15 fp32 values that a value must exceed to get the next code of the format's order.

    Between two codes it is the middle; where a value in the middle belongs to the higher code, the fp32 value before.
    """
    form = FORMATS[quant_type]
    order = torch.tensor(form.order)
    codes = torch.tensor(form.codes)[order]
    middles = (codes[1:] + codes[:-1]) / 2
    below = torch.nextafter(middles, torch.tensor(-torch.inf))
    if form.is_mx:  # to the even code; what is not negative has no sign
        return torch.where((order[1:] % 2 == 0) | (order[1:] == 0), below, middles)
    if 8 in form.order[:8]:  # fp4, with a sign: to the smaller magnitude
        return torch.where(codes[1:] <= 0, below, middles)
    return middles


def quantize_4bit(
    x: Tensor,  # floating point
    blocksize: int,
    quant_type: int,  # of QUANT_TYPES
) -> tuple[Tensor, Tensor]:
    """Two codes a byte, uint8 (ceil(x.numel() / 2), 1); the blocks' scales (blocks,), fp32, or uint8 of mxfp4."""
    form = FORMATS[quant_type]
    values = x.reshape(-1).float()
    blocks = -(-values.numel() // blocksize)
    values = torch.nn.functional.pad(values, (0, blocks * blocksize - values.numel())).view(blocks, blocksize)
    largest = values.abs().amax(dim=1) if values.numel() else values.new_zeros(blocks)
    if form.is_mx:
        exponent = torch.frexp(largest).exponent - 1  # floor(log2); 6 = 1.5 * 2^2 is the largest code
        absmax = torch.where(largest == 0, 0, exponent - 2 + 127).clamp(0, 254).to(torch.uint8)
        scaled = (values.double() / e8m0_values(absmax)[:, None].double()).float()
    else:
        absmax, inverse = largest, 1 / largest
        scaled = torch.where(inverse.isinf()[:, None], values / largest[:, None], values * inverse[:, None])
        scaled = torch.where(largest[:, None] == 0, 0, scaled)
    order = torch.tensor(form.order, dtype=torch.uint8, device=x.device)
    codes = order[torch.bucketize(scaled, thresholds(quant_type).to(x.device))].view(-1)[: x.numel()]
    if x.numel() % 2:  # the last half of a byte is the code of 0
        codes = torch.cat((codes, codes.new_full((1,), form.codes.index(0.0))))
    first, second = codes[::2], codes[1::2]
    packed = first << 4 | second if form.first_is_high else second << 4 | first
    return packed[:, None], absmax


def e8m0_values(exponents: Tensor) -> Tensor:
    """2^(e - 127) in fp32 of each byte e; NaN of 255."""
    values = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    return torch.where(exponents == 255, torch.nan, values)


def block_scales(
    absmax: Tensor,  # (blocks,)
    nested_absmax: Tensor | None,  # (ceil(blocks / NESTED_BLOCK),)
    nested_offset: Tensor | None,  # one value
    nested_code: Tensor | None,  # (256,)
    quant_type: int,
) -> Tensor:
    """The scale of each block in fp32."""
    if FORMATS[quant_type].is_mx:
        return e8m0_values(absmax)
    if nested_absmax is None:
        return absmax
    outer = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    return nested_code[absmax.int()] * outer + nested_offset


def dequantize_4bit(
    packed: Tensor,  # uint8, ceil(count / 2) bytes
    absmax: Tensor,  # (blocks,): fp32; uint8 of mxfp4 and where scales are quantized
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    count: int,
    blocksize: int,
    quant_type: int,
    dtype: torch.dtype,
) -> Tensor:
    """The `count` values, (count,)."""
    form = FORMATS[quant_type]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    packed = packed.reshape(-1)
    halves = (packed >> 4, packed & 15) if form.first_is_high else (packed & 15, packed >> 4)
    codes = torch.stack(halves, dim=1).view(-1)[:count]
    table = torch.tensor(form.codes, dtype=torch.float32, device=packed.device).to(compute)
    scales = block_scales(absmax, nested_absmax, nested_offset, nested_code, quant_type).to(compute)
    return (table[codes.int()] * scales.repeat_interleave(blocksize)[:count]).to(dtype)


def _dynamic_code() -> tuple[float, ...]:
    """The 256 values, of fp32, between which quantized scales are rounded: more of them the smaller they are.

    A value is 10^-e times the middle of one of 2^(6 - e) equal parts of 0.1 to 1, e from 0 to 6, with either sign; 0
    and 1 beside them. Dettmers et al., arXiv 2110.02861, section 3.2.
    """
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * (ends[:-1] + ends[1:]) / 2
        values += middles.tolist() + (-middles).tolist()
    return tuple(sorted(values))


DYNAMIC_CODE = _dynamic_code()


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales in 8 bits, as block_scales reads them: codes, nested_absmax, nested_offset and nested_code."""
    code = torch.tensor(DYNAMIC_CODE, device=absmax.device)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    offset = torch.where(offset.isfinite(), offset, absmax.double().mean().float())  # where the sum overflows
    blocks = -(-absmax.numel() // NESTED_BLOCK)
    values = torch.nn.functional.pad(absmax - offset, (0, blocks * NESTED_BLOCK - absmax.numel()))
    values = values.view(blocks, NESTED_BLOCK)
    outer = values.abs().amax(dim=1) if blocks else values.new_zeros(0)
    scaled = torch.where(outer[:, None] > 0, values / outer[:, None], 0)
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    # Not a view of the padded codes: files of tensors refuse a part of a storage.
    return codes.view(-1)[: absmax.numel()].clone(), outer, offset, code
