"""Launchers of the fused attention kernels, and which tile each chip gets."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_statistics_kernel,
    attention_table_gradient_kernel,
)
from .attention_forward import attention_forward_kernel

LOG2E = 1.4426950408889634
STATISTICS_ROWS = 128  # rows of statistics are padded to a multiple of every tile
STATISTICS_BLOCK = 32


class Config(NamedTuple):
    """How a kernel is launched: its tile (queries x keys), warps, pipeline stages, and whether it may use TMA.

    Masked blocks have `masked` columns (keys; in the kernel of k and v queries) instead: they need more registers.
    Without `hoist` the loops compute their constants anew, for the same reason.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    masked: int = 0
    hoist: bool = True


def chip_of(x: Tensor) -> str:
    """The chip family the tiles are chosen for; CPU tensors run in Triton's interpreter."""
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    # Consumer Blackwell (12) has neither wgmma nor tcgen05 and as little shared memory as Ada.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


class Work(NamedTuple):
    """What a tile is chosen by."""

    chip: str
    block_d: int  # head size, rounded up to a power of two
    item_size: int  # bytes of an element
    extras: int  # how many of ALiBi, table and softcap act on the scores
    rotary: bool
    two_sided: bool  # a bias on keys to the left and to the right


def forward_config(work: Work) -> Config:
    chip, block_d, item_size, extras, rotary, two_sided = work
    heavy = extras > 1 or (extras == 1 and rotary)
    if chip == "interpreter":
        return Config(16, 16, 1, 1)
    if item_size == 4:
        if precision(work) == "ieee" and chip != "gfx942":
            return Config(16, 16, 8, 1, False, 16, False)
        if block_d <= 64 or chip in ("sm_80", "gfx942"):
            return Config(64 if block_d <= 64 else 32, 32, 4, 1, False, 16, False)
        return Config(128, 32, 8, 1, False, 16, False)
    if chip == "gfx942":
        return Config(128, 64, 4, 1 if rotary else 2, False, 32) if block_d <= 128 else Config(64, 32, 4, 1, False, 16)
    if chip == "sm_80":
        if block_d <= 64:
            return Config(128, 64, 8, 1, False, 32, False) if heavy else Config(128, 128, 8, 2, False, 64)
        if block_d <= 128:
            if heavy or two_sided:
                return Config(64, 64, 8, 1, False, 32, False)
            return Config(128, 64, 8, 1 if rotary else 2, False, 32, extras == 0 and not rotary)
        return Config(32, 32, 8, 1, False, 16, False) if extras or rotary else Config(64, 32, 8, 2, False, 16)
    if block_d <= 128:
        if heavy:
            return Config(128, 32 if chip == "sm_100" and block_d > 64 else 64, 8, 2, True, 32, False)
        return Config(128, 128, 8, 2, True, 64)
    if heavy:
        return Config(64 if chip == "sm_90" else 128, 32, 8, 1, True, 16, False)
    return Config(128, 32, 8, 2, True, 32, False) if rotary else Config(128, 64, 8, 2, True, 32)


def queries_config(work: Work, table_gradient: bool) -> Config:
    """The backward kernel of q and of the biases; the table's gradient needs a square tile."""
    chip, block_d, item_size, extras, rotary, _ = work
    if chip == "interpreter":
        return Config(16, 16, 1, 1)
    if item_size == 4:
        if precision(work) == "ieee" and chip != "gfx942":
            return Config(16, 16, 8, 1, False, 16, False)
        if table_gradient or block_d > 64:
            return Config(32, 32, 4, 1, False, 0, False)
        return Config(64, 32, 4, 1, False, 16, False)
    if table_gradient:
        if chip in ("sm_90", "sm_100"):
            return Config(64, 64, 8, 1, True, 0, False)
        if chip == "gfx942":
            return Config(32, 32, 4, 1, False, 0, False)
        if block_d > 128:
            return Config(32, 32, 8, 1, False, 0, False)
        return Config(16, 16, 4, 1, False, 0, False) if rotary else Config(64, 64, 8, 1, False, 0, False)
    if chip == "gfx942":
        return Config(128, 64, 4, 1, False, 32) if block_d <= 64 else Config(64 if block_d <= 128 else 32, 32, 4, 1)
    if chip == "sm_80":
        if block_d <= 64:
            plain = extras == 0 and not rotary
            return Config(128, 64, 8, 2 if plain else 1, False, 32, plain)
        if rotary:
            return Config(32, 32, 8, 1, False, 16, False)
        return Config(64, 64, 8, 2, False, 32, False) if block_d <= 128 else Config(64, 32, 8, 1, False, 16, False)
    if block_d <= 64:
        plain = extras <= 1 and not rotary
        return Config(128, 128, 8, 2, True, 64, False) if plain else Config(128, 64, 8, 2, True, 32, False)
    if block_d <= 128:
        return Config(128, 64, 8, 2, True, 32, extras == 0 and not rotary)
    return Config(128, 32, 8, 2, True, 32, False)


def keys_config(work: Work) -> Config:
    """The backward kernel of k and v."""
    chip, block_d, item_size, extras, rotary, two_sided = work
    plain = extras == 0 and not rotary
    if chip == "interpreter":
        return Config(16, 16, 1, 1)
    if item_size == 4:
        if precision(work) == "ieee" and chip != "gfx942":
            return Config(16, 16, 8, 1, False, 16, False)
        return Config(32, 64, 8, 1, False, 16, False) if block_d <= 64 else Config(16, 32, 4, 1, False, 16, False)
    if chip == "gfx942":
        return Config(32, 128 if block_d <= 64 else 64 if block_d <= 128 else 32, 4, 1)
    if chip == "sm_80":
        if block_d <= 64:
            return Config(64, 128, 8, 2, False, 32) if plain else Config(64, 64, 8, 1, False, 32, False)
        if block_d <= 128 and not rotary:
            return Config(64, 64, 8, 2, False, 32) if plain else Config(64, 64, 8, 1, False, 16, False)
        return Config(32, 32, 4, 1, False, 16, False) if plain else Config(32, 32, 8, 1, False, 16, False)
    if block_d > 128:
        if plain:
            return Config(64, 64, 8, 1, True, 32) if chip == "sm_100" else Config(64, 64, 8, 1, True, 16, False)
        return Config(32, 64, 8, 1, True, 16, False)
    if chip == "sm_90" and not plain:
        return Config(32, 128, 8, 1, True, 16, False)
    if chip == "sm_90" and block_d > 64:
        return Config(64, 128, 8, 2, True, 16, False)
    return Config(64, 128, 8, 1 if two_sided and not rotary else 2, True, 32, plain)


def precision(work: Work) -> str | None:
    """How fp32 is multiplied: as exactly as without tensor cores, on them where its three TF32 parts find room."""
    if work.item_size != 4:
        return None
    roomy = work.block_d <= 64 or (work.block_d <= 128 and work.chip != "sm_100")
    return "tf32x3" if roomy and work.chip != "gfx942" else "ieee"


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
    config = forward_config(_work(q, softcap, alibi_slopes, relative_bias, rotary_cos, window_right))
    descriptors = _descriptors(config, config.block_n, k, v)
    line, radius = _bias_line(relative_bias, relative_buckets, config)
    grid = (triton.cdiv(seqlen_q, config.block_m) * batch * heads,)
    attention_forward_kernel[grid](
        q, k, v, out, lse, *descriptors,
        key_lengths, alibi_slopes, line, rotary_cos, rotary_sin, rotary_positions,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _batch_stride(alibi_slopes),
        seqlen_q, seqlen_k, heads, heads // kv_heads, options.pop("left"), options.pop("right"), radius, rotary_offset,
        options.pop("scale"), float(softcap),
        **options, LONG=_long(config, q, k, v), DESCRIPTOR=descriptors[0] is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, MASKED_N=config.masked or config.block_n,
        HOIST=config.hoist, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    needs_slopes: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As pynlp.reference.attention.attention_backward, on a GPU."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    nothing = torch.empty(0, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        grad_slopes = torch.zeros_like(alibi_slopes) if needs_slopes else nothing
        grad_table = torch.zeros_like(relative_bias) if needs_table else nothing
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_slopes, grad_table
    options = _options(
        q, k, v, softmax_scale, window_left, window_right, softcap, key_lengths, alibi_slopes, relative_bias,
        relative_buckets, rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved,
    )  # fmt: skip
    options.pop("POSITIVE_SCALE")
    left, right, scale = options.pop("left"), options.pop("right"), options.pop("scale")
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], _batch_stride(alibi_slopes))
    work = _work(q, softcap, alibi_slopes, relative_bias, rotary_cos, window_right)

    padded_q = triton.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS
    pivot = torch.empty((batch, heads, padded_q), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(pivot)
    rows = Config(STATISTICS_BLOCK, 0, 4, 1)
    attention_statistics_kernel[(padded_q // rows.block_m * batch * heads,)](
        out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), pivot, delta,
        *out.stride()[:3], *grad_out.stride()[:3], seqlen_q, padded_q, heads,
        HEAD_DIM=head_dim, BLOCK_D=_block(head_dim), HAS_GRAD_LSE=grad_lse is not None,
        LONG=_long(rows, out, grad_out), BLOCK_M=rows.block_m, num_warps=rows.num_warps,
    )  # fmt: skip

    config = keys_config(work)
    descriptors = _descriptors(config, config.block_m, q, grad_out)
    line, radius = _bias_line(relative_bias, relative_buckets, config)
    attention_backward_keys_kernel[(triton.cdiv(seqlen_k, config.block_n) * batch * kv_heads,)](
        q, k, v, grad_out, pivot, delta, grad_k, grad_v, *descriptors,
        key_lengths, alibi_slopes, line, rotary_cos, rotary_sin, rotary_positions, *strides,
        seqlen_q, seqlen_k, padded_q, heads, heads // kv_heads, left, right, radius, rotary_offset,
        scale, float(softcap), softmax_scale,
        **options, LONG=_long(config, q, k, v, grad_out), DESCRIPTOR=descriptors[0] is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, MASKED_M=config.masked or config.block_m,
        HOIST=config.hoist, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = queries_config(work, needs_table)
    descriptors = _descriptors(config, config.block_n, k, v)
    line, radius = _bias_line(relative_bias, relative_buckets, config)
    blocks = triton.cdiv(seqlen_q, config.block_m)
    partial_slopes = partial_far = partial_near = None
    if needs_slopes:
        partial_slopes = torch.empty((batch, heads, blocks), dtype=torch.float32, device=q.device)
    near_base = segments = 0
    if needs_table:
        # Distances of the first key to the first query over the tiles that hold pairs nearer than the radius.
        shift = seqlen_k - seqlen_q
        near_base = (shift - radius - config.block_n) // config.block_n * config.block_n - shift
        segments = (radius + config.block_m - near_base) // config.block_n + 1
        partial_far = torch.empty((batch, heads, blocks, 2), dtype=torch.float32, device=q.device)
        shape = (batch, heads, blocks, segments, 2, config.block_n)
        partial_near = torch.zeros(shape, dtype=torch.float32, device=q.device)
    attention_backward_queries_kernel[(blocks * batch * heads,)](
        q, k, v, grad_out, pivot, delta, grad_q, partial_slopes, partial_far, partial_near, *descriptors,
        key_lengths, alibi_slopes, line, rotary_cos, rotary_sin, rotary_positions, *strides,
        seqlen_q, seqlen_k, padded_q, heads, heads // kv_heads, left, right, radius, near_base, segments, rotary_offset,
        scale, float(softcap), softmax_scale,
        **options, NEEDS_SLOPES=needs_slopes, NEEDS_TABLE=needs_table,
        LONG=_long(config, q, k, v, grad_out), DESCRIPTOR=descriptors[0] is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, MASKED_N=config.masked or config.block_n,
        HOIST=config.hoist, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    grad_slopes = grad_table = nothing
    if needs_slopes:
        grad_slopes = partial_slopes.sum(2)  # (B, H)
        grad_slopes = grad_slopes.sum(0) if alibi_slopes.dim() == 1 else grad_slopes
    if needs_table:
        grad_table = _table_gradient(partial_far, partial_near, near_base, radius, relative_bias, relative_buckets)
    return grad_q, grad_k, grad_v, grad_slopes, grad_table


def _table_gradient(
    partial_far: Tensor,  # (B, H, blocks, 2)
    partial_near: Tensor,  # (B, H, blocks, segments, 2, BLOCK_N)
    near_base: int,
    radius: int,
    relative_bias: Tensor,  # (N, H)
    buckets: Tensor,
) -> Tensor:
    """Sums by distance, then by bucket, each in a fixed order."""
    segments, block_n = partial_near.shape[3], partial_near.shape[5]
    start = torch.arange(segments, device=buckets.device)[:, None, None] * block_n + near_base
    side = torch.arange(-1, 1, device=buckets.device)[:, None] * block_n
    distance = (start + side + torch.arange(block_n, device=buckets.device)).flatten().clamp(-radius, radius)
    bucket = torch.cat((buckets[distance + radius], buckets[:1], buckets[-1:]))
    sums = torch.cat((partial_near.sum((0, 2)).flatten(1), partial_far.sum((0, 2))), dim=1)  # (H, entries)
    grad = torch.empty(relative_bias.shape, dtype=torch.float32, device=buckets.device)
    attention_table_gradient_kernel[(grad.numel(),)](
        sums, bucket, grad, sums.shape[1], grad.shape[1], BLOCK=512, num_warps=4
    )
    return grad


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
        PRECISION=precision(_work(q, softcap, alibi_slopes, relative_bias, rotary_cos, window_right)),
    )


def _work(
    q: Tensor, softcap: float, slopes: Tensor | None, table: Tensor | None, cos: Tensor | None, window_right: int
) -> Work:
    extras = (softcap > 0) + (slopes is not None) + (table is not None)
    two_sided = (slopes is not None or table is not None) and window_right != 0
    return Work(chip_of(q), _block(q.shape[3]), q.element_size(), extras, cos is not None, two_sided)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _batch_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def _long(config: Config, *tensors: Tensor) -> bool:
    """Whether the offsets within a tile need 64 bits."""
    rows = max(config.block_m, config.block_n)
    return any(rows * x.stride(1) + x.shape[3] >= 2**31 for x in tensors)


def _descriptors(config: Config, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """TMA descriptors of tensors seen as (batch, heads, seqlen, head_dim); None where TMA cannot read one of them."""
    described = []
    for x in tensors:
        aligned = 16 // x.element_size()
        order = (0, 2, 1)
        # The stride of a dimension of size 1 says nothing.
        strides = [x.stride(i) if x.shape[i] > 1 else aligned for i in order]
        regular = all(stride > 0 and stride % aligned == 0 for stride in strides)
        if not config.descriptors or not regular or x.data_ptr() % 16 or x.shape[3] < aligned:
            return [None] * len(tensors)
        shape = [x.shape[i] for i in order]
        described.append(TensorDescriptor(x, [*shape, x.shape[3]], [*strides, 1], [1, 1, rows, _block(x.shape[3])]))
    return described


def _bias_line(relative_bias: Tensor | None, buckets: Tensor | None, config: Config) -> tuple[Tensor | None, int]:
    """T5's bias by distance, a line for each head in log2 units, continued beyond the largest distance; and that."""
    if relative_bias is None:
        return None, 0
    radius = buckets.numel() // 2
    reach = radius + config.block_m + config.block_n
    distance = torch.arange(-reach, reach + 1, device=buckets.device).clamp_(-radius, radius)
    line = relative_bias.t()[:, buckets[distance + radius].long()]  # (H, 2 reach + 1)
    return (line.float() * LOG2E).contiguous(), radius
