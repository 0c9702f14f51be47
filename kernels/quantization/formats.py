"""4-bit weights are made and read: launchers and kernels.

Arguments and results of the launchers are those of the functions of the same names in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launch import launch
from .codes import E2M1, FP4, KINDS, NF4, SMALLEST, Weight, load_scales, pair_table, pairs_of

QUANTIZED, READ = 4096, 8192  # values of a program
WARPS = 4


def codes(kind: str) -> list[float]:
    """The values of the 16 codes, rounded to fp32."""
    values = NF4.value if kind == "nf4" else (FP4 if kind == "fp4" else E2M1).value
    return torch.tensor(values if kind == "nf4" else values + tuple(-x for x in values)).tolist()


def order(kind: str) -> tuple[int, ...]:
    """The codes by rising value, -0 before 0."""
    values = codes(kind)
    return tuple(sorted(range(16), key=lambda code: (values[code], code < 8)))


def middles(kind: str) -> tuple[float, ...]:
    """The middles between codes by rising value, to be rounded to fp32."""
    values = [codes(kind)[code] for code in order(kind)]
    return tuple((low + high) / 2 for low, high in zip(values, values[1:], strict=False))


def included(kind: str) -> tuple[bool, ...]:
    """Whether a value in the middle gets the higher code.

    mxfp4: the even one, and 0 has no sign; fp4: the smaller magnitude; nf4: the lower code.
    """
    higher = order(kind)[1:]
    if kind == "mxfp4":
        return tuple(code % 2 == 0 for code in higher)
    return tuple(kind == "fp4" and codes(kind)[code] <= 0 for code in higher)


ORDERS = tl.constexpr(tuple(map(order, KINDS)))
MIDDLES = tl.constexpr(tuple(map(middles, KINDS)))
INCLUDED = tl.constexpr(tuple(map(included, KINDS)))


@triton.jit
def quantize_kernel(
    p_x, p_packed, p_absmax, count, KIND: tl.constexpr, NUMBER: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """absmax = max |x| of each block, of mxfp4 2^(floor(log2 max |x|) - 2); codes of x / absmax.

    WHOLE says that the last block is whole, too.
    """
    i_block = tl.program_id(0).to(tl.int64) * BLOCKS
    b_block = i_block + tl.arange(0, BLOCKS)
    b_place = b_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # (BLOCKS, BLOCKSIZE)
    m_block = b_block * BLOCKSIZE < count
    m_x = m_block[:, None] if WHOLE else b_place < count
    b_x = tl.load(p_x + b_place, mask=m_x, other=0.0).to(tl.float32)
    b_largest = tl.max(tl.abs(b_x), 1)  # (BLOCKS,)
    if KIND == "mxfp4":
        b_exponent = tl.maximum((b_largest.to(tl.int32, bitcast=True) >> 23) - 2, 0)  # + 127; of at most 253
        b_absmax = b_exponent.to(tl.uint8)
        b_scaled = b_x * ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        b_nan = tl.max((b_x != b_x).to(tl.int32), 1)  # a maximum loses NaN
        b_absmax = tl.where(b_nan > 0, float("nan"), b_largest)
        b_divisor = tl.where(b_absmax == 0, 1.0, b_absmax)
        b_inverse = tl.div_rn(1.0, b_divisor)[:, None]
        m_tiny = b_inverse == float("inf")
        b_scaled = b_x * tl.where(m_tiny, 0.0, b_inverse)
        if tl.max(m_tiny.to(tl.int32)) > 0:
            b_ratio = tl.div_rn(b_x, tl.broadcast_to(b_divisor[:, None], b_x.shape))
            b_scaled = tl.where(m_tiny, b_ratio, b_scaled)
    b_code = tl.full(b_x.shape, ORDERS[NUMBER][0], tl.int32)
    for i in tl.static_range(15):
        if INCLUDED[NUMBER][i]:
            m_low = b_scaled < MIDDLES[NUMBER][i]
        else:
            m_low = b_scaled <= MIDDLES[NUMBER][i]
        b_code = tl.where(m_low, b_code, ORDERS[NUMBER][i + 1])  # NaN gets the last one
    b_code = tl.where(m_x, b_code, 7 if KIND == "nf4" else 0)  # behind the end the code of 0
    b_first, b_second = tl.split(tl.reshape(b_code, [BLOCKS, BLOCKSIZE // 2, 2]))
    b_byte = (b_second << 4) | b_first if KIND == "mxfp4" else (b_first << 4) | b_second
    b_half = b_block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(p_packed + b_half, b_byte.to(tl.uint8), mask=m_block[:, None] if WHOLE else b_half * 2 < count)
    tl.store(p_absmax + b_block, b_absmax, mask=m_block)


@triton.jit
def dequantize_kernel(
    weight, p_out, first, count,
    KIND: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """value of code x scale, of `count` codes from number 32 `first` on; WHOLE says that 32 divides it, too."""
    i_group = tl.program_id(0).to(tl.int64) * GROUPS
    i_first = i_group + first
    o_g = tl.arange(0, GROUPS)
    b_left = count - i_group * SMALLEST  # values from the program's first on
    m_g = o_g * SMALLEST < b_left
    o_half = o_g[:, None] * (SMALLEST // 2) + tl.arange(0, SMALLEST // 2)[None, :]  # (GROUPS, 16)
    m_byte = m_g[:, None] if WHOLE else o_half * 2 < b_left
    b_byte = tl.load(weight[0] + i_first * (SMALLEST // 2) + o_half, mask=m_byte, other=0)
    b_block = (i_first + o_g) // (BLOCKSIZE // SMALLEST)
    b_scale = load_scales(weight, 0, b_block, m_g, KIND, NESTED, True)[:, None]
    b_first, b_second = pairs_of(pair_table(KIND, False), b_byte, KIND)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    b_out = tl.join((b_first * b_scale).to(DTYPE), (b_second * b_scale).to(DTYPE))  # (GROUPS, 16, 2)
    b_out = tl.reshape(b_out, [GROUPS, SMALLEST])
    o_out = o_g[:, None] * SMALLEST + tl.arange(0, SMALLEST)[None, :]
    tl.store(p_out + i_group * SMALLEST + o_out, b_out, mask=m_g[:, None] if WHOLE else o_out < b_left)


def quantize_4bit(x: Tensor, blocksize: int, quant_type: int) -> tuple[Tensor, Tensor]:
    """Two codes a byte, (ceil(x.numel() / 2), 1), and the blocks' scales (blocks,)."""
    kind, count = KINDS[quant_type], x.numel()
    blocks = cdiv(count, blocksize)
    packed = torch.empty((cdiv(count, 2), 1), dtype=torch.uint8, device=x.device)
    scales = torch.uint8 if kind == "mxfp4" else torch.float32
    absmax = torch.empty((blocks,), dtype=scales, device=x.device)
    if count:
        of_program = max(1, QUANTIZED // blocksize)
        launch(
            quantize_kernel, (cdiv(blocks, of_program),), x.contiguous(), packed, absmax, count, KIND=kind,
            NUMBER=quant_type, BLOCKSIZE=blocksize, BLOCKS=of_program, WHOLE=count % blocksize == 0, num_warps=WARPS,
        )  # fmt: skip
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    count: int,
    blocksize: int,
    quant_type: int,
    dtype: torch.dtype,
) -> Tensor:
    """The `count` values, (count,)."""
    out = torch.empty((count,), dtype=dtype, device=packed.device)
    weight = Weight(packed, absmax, nested_absmax, nested_offset, nested_code)
    dequantize_into(out, weight, 0, blocksize, quant_type)
    return out


def dequantize_into(out: Tensor, weight: Weight, first: int, blocksize: int, quant_type: int) -> None:
    """Overwrites out, contiguous, by the weight's values from number `first` on, a multiple of 32."""
    count = out.numel()
    if count == 0:
        return
    groups = READ // SMALLEST.value
    # As the reference: the scale's product is rounded before its offset is added.
    launch(
        dequantize_kernel, (cdiv(count, READ),), weight, out, first // SMALLEST.value, count, KIND=KINDS[quant_type],
        NESTED=weight.nested_absmax is not None, BLOCKSIZE=blocksize, GROUPS=groups,
        WHOLE=count % SMALLEST.value == 0, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
