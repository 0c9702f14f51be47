"""Launchers of the fused attention kernels, and which tile each chip gets."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_forward import attention_forward_kernel

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """How a kernel is launched: its tile (queries x keys), warps, pipeline stages, and whether it may use TMA."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def chip_of(x: Tensor) -> str:
    """The chip family the tiles are chosen for; CPU tensors run in Triton's interpreter."""
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    # Consumer Blackwell (12) has neither wgmma nor tcgen05 and as little shared memory as Ada.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def forward_config(chip: str, head_dim: int, item_size: int, biased: bool, rotary: bool) -> Config:
    if chip == "interpreter":
        return Config(16, 16, 1, 1)
    return Config(128, 128, 8, 2, True)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_buckets: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_positions: Tensor | None,
    rotary_offset: int,
    rotary_interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """As pynlp.reference.attention.attention_forward, on a GPU."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    options = _options(
        q, k, v, softmax_scale, window_left, window_right, softcap, key_lengths, alibi_slopes, relative_bias,
        relative_buckets, rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved,
    )  # fmt: skip
    biased = alibi_slopes is not None or relative_bias is not None
    config = forward_config(chip_of(q), head_dim, q.element_size(), biased, rotary_cos is not None)
    descriptor_k = _descriptor(k, config.block_n, config)
    descriptor_v = _descriptor(v, config.block_n, config)
    use_descriptors = descriptor_k is not None and descriptor_v is not None
    line, radius = _bias_line(relative_bias, relative_buckets, config)
    grid = (triton.cdiv(seqlen_q, config.block_m) * batch * heads,)
    attention_forward_kernel[grid](
        q, k, v, out, lse, descriptor_k if use_descriptors else None, descriptor_v if use_descriptors else None,
        key_lengths, alibi_slopes, line, rotary_cos, rotary_sin, rotary_positions,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _batch_stride(alibi_slopes),
        seqlen_q, seqlen_k, heads, heads // kv_heads, options.pop("left"), options.pop("right"), radius, rotary_offset,
        options.pop("scale"), float(softcap),
        **options, LONG=_long(config, q, k, v), DESCRIPTOR=use_descriptors,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def _options(
    q, k, v, softmax_scale, window_left, window_right, softcap, key_lengths, alibi_slopes, relative_bias,
    relative_buckets, rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved,
) -> dict:  # fmt: skip
    """What every kernel is told about the scores."""
    head_dim = q.shape[3]
    reach = q.shape[1] + k.shape[1]
    half = 0 if rotary_cos is None else rotary_cos.shape[1]
    rest = head_dim - 2 * half
    return dict(
        left=min(window_left, reach),
        right=min(window_right, reach),
        scale=softmax_scale / softcap if softcap > 0 else softmax_scale * LOG2E,
        HEAD_DIM=head_dim,
        BLOCK_D=_block(head_dim),
        HALF=half,
        BLOCK_HALF=_block(half),
        BLOCK_REST=_block(rest) if half and rest else 0,
        INTERLEAVED=bool(half) and rotary_interleaved,
        HAS_POSITIONS=rotary_positions is not None,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0,
        CAUSAL=window_right == 0,
        HAS_SOFTCAP=softcap > 0,
        HAS_SLOPES=alibi_slopes is not None,
        HAS_TABLE=relative_bias is not None,
        HAS_LENGTHS=key_lengths is not None,
        POSITIVE_SCALE=softmax_scale > 0,
        PRECISION="tf32x3" if q.dtype == torch.float32 else None,
    )


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _batch_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def _long(config: Config, *tensors: Tensor) -> bool:
    """Whether the offsets within a tile need 64 bits."""
    rows = max(config.block_m, config.block_n)
    return any(rows * x.stride(1) + x.shape[3] >= 2**31 for x in tensors)


def _descriptor(x: Tensor, rows: int, config: Config) -> TensorDescriptor | None:
    """A TMA descriptor of x seen as (batch, heads, seqlen, head_dim), or None where TMA cannot read it."""
    if not config.descriptors:
        return None
    aligned = 16 // x.element_size()
    order = (0, 2, 1)
    strides = [x.stride(i) for i in order]
    shape = [x.shape[i] for i in order]
    # The stride of a dimension of size 1 says nothing.
    strides = [aligned if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    if x.data_ptr() % 16 or any(stride <= 0 or stride % aligned for stride in strides) or x.shape[3] < aligned:
        return None
    return TensorDescriptor(x, [*shape, x.shape[3]], [*strides, 1], [1, 1, rows, _block(x.shape[3])])


def _bias_line(relative_bias: Tensor | None, buckets: Tensor | None, config: Config) -> tuple[Tensor | None, int]:
    """T5's bias by distance, a line for each head in log2 units, continued beyond the largest distance; and that."""
    if relative_bias is None:
        return None, 0
    radius = buckets.numel() // 2
    reach = radius + config.block_m + config.block_n
    distance = torch.arange(-reach, reach + 1, device=buckets.device).clamp_(-radius, radius)
    line = relative_bias.t()[:, buckets[distance + radius].long()]  # (H, 2 reach + 1)
    return (line.float() * LOG2E).contiguous(), radius
