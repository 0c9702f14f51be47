"""Launchers of the fused attention kernels: as pynlp.reference.attention, on a GPU."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_backward_keys import attention_backward_keys_kernel
from .attention_backward_queries import attention_backward_queries_kernel
from .attention_configs import Config, chip_of, configs
from .attention_forward import attention_forward_kernel
from .attention_sums import attention_statistics_kernel, attention_table_gradient_kernel
from .attention_tiles import Features, Tile
from .choice import choose

LOG2E = 1.4426950408889634
STATISTICS_ROWS = 128  # rows of statistics are padded to a multiple of every tile
STATISTICS_BLOCK = 32


class Scores(NamedTuple):
    """How scores are made: the arguments of the ops behind q, k and v."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    key_lengths: Tensor | None
    alibi_slopes: Tensor | None
    relative_bias: Tensor | None
    relative_buckets: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_positions: Tensor | None
    rotary_offset: int
    rotary_interleaved: bool


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *score_arguments) -> tuple[Tensor, Tensor]:
    """(out, lse) as pynlp.reference.attention.attention_forward."""
    scores = Scores(*score_arguments)
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    left, right, scale = _numbers(q, k, scores)

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        descriptors = _descriptors(config, config.block_n, k, v)
        line, radius = _bias_line(scores, config)
        return _start(
            attention_forward_kernel, triton.cdiv(seqlen_q, config.block_m) * batch * heads, config, compile_only,
            q, k, v, out, lse, *descriptors, *_tables(scores, line),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _batch_stride(scores.alibi_slopes),
            seqlen_q, seqlen_k, heads, heads // kv_heads, left, right, radius, scores.rotary_offset, scale,
            float(scores.softcap), _features(q, scores, config), _tile(config, config.block_n, descriptors, q, k, v),
        )  # fmt: skip

    start(_choose("forward", start, scores, q, k, v))
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *score_arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v, grad_slopes, grad_table) as pynlp.reference.attention.attention_backward.

    The last two arguments tell whether the gradients of the slopes and of the table are needed.
    """
    *score_arguments, needs_slopes, needs_table = score_arguments
    scores = Scores(*score_arguments)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    nothing = torch.empty(0, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        grad_slopes = torch.zeros_like(scores.alibi_slopes) if needs_slopes else nothing
        grad_table = torch.zeros_like(scores.relative_bias) if needs_table else nothing
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_slopes, grad_table

    padded_q = triton.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS
    pivot = torch.empty((batch, heads, padded_q), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(pivot)
    attention_statistics_kernel[(padded_q // STATISTICS_BLOCK * batch * heads,)](
        out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), pivot, delta,
        *out.stride()[:3], *grad_out.stride()[:3], seqlen_q, padded_q, heads,
        HEAD_DIM=head_dim, BLOCK_D=_block(head_dim), HAS_GRAD_LSE=grad_lse is not None,
        LONG=_long(STATISTICS_BLOCK, out, grad_out), BLOCK_M=STATISTICS_BLOCK, num_warps=4,
    )  # fmt: skip

    left, right, scale = _numbers(q, k, scores)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    strides = (*strides, _batch_stride(scores.alibi_slopes))
    group = heads // kv_heads

    def start_keys(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        descriptors = _descriptors(config, config.block_m, q, grad_out)
        line, radius = _bias_line(scores, config)
        return _start(
            attention_backward_keys_kernel, triton.cdiv(seqlen_k, config.block_n) * batch * kv_heads, config,
            compile_only,
            q, k, v, grad_out, pivot, delta, grad_k, grad_v, *descriptors, *_tables(scores, line), *strides,
            seqlen_q, seqlen_k, padded_q, heads, group, left, right, radius, scores.rotary_offset, scale,
            float(scores.softcap), scores.softmax_scale,
            _features(q, scores, config), _tile(config, config.block_m, descriptors, q, k, v, grad_out),
        )  # fmt: skip

    start_keys(_choose("keys", start_keys, scores, q, k, v, grad_out))
    grad_slopes = grad_table = nothing

    def start_queries(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        nonlocal grad_slopes, grad_table
        descriptors = _descriptors(config, config.block_n, k, v)
        line, radius = _bias_line(scores, config)
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
        compiled = _start(
            attention_backward_queries_kernel, blocks * batch * heads, config, compile_only,
            q, k, v, grad_out, pivot, delta, grad_q, partial_slopes, partial_far, partial_near, *descriptors,
            *_tables(scores, line), *strides,
            seqlen_q, seqlen_k, padded_q, heads, group, left, right, radius, near_base, segments, scores.rotary_offset,
            scale, float(scores.softcap), scores.softmax_scale,
            _features(q, scores, config), _tile(config, config.block_n, descriptors, q, k, v, grad_out),
            needs_slopes, needs_table,
        )  # fmt: skip
        if compile_only:
            return compiled
        if needs_slopes:
            grad_slopes = partial_slopes.sum(2)  # (B, H)
            grad_slopes = grad_slopes.sum(0) if scores.alibi_slopes.dim() == 1 else grad_slopes
        if needs_table:
            grad_table = _table_gradient(partial_far, partial_near, near_base, radius, scores)

    kind = "table" if needs_table else "queries"
    start_queries(_choose(kind, start_queries, scores, q, k, v, grad_out, needs_slopes=needs_slopes))
    return grad_q, grad_k, grad_v, grad_slopes, grad_table


def _table_gradient(
    partial_far: Tensor,  # (B, H, blocks, 2)
    partial_near: Tensor,  # (B, H, blocks, segments, 2, BLOCK_N)
    near_base: int,
    radius: int,
    scores: Scores,
) -> Tensor:
    """Sums by distance, then by bucket, each in a fixed order."""
    buckets = scores.relative_buckets
    segments, block_n = partial_near.shape[3], partial_near.shape[5]
    start = torch.arange(segments, device=buckets.device)[:, None, None] * block_n + near_base
    side = torch.arange(-1, 1, device=buckets.device)[:, None] * block_n
    distance = (start + side + torch.arange(block_n, device=buckets.device)).flatten().clamp(-radius, radius)
    bucket = torch.cat((buckets[distance + radius], buckets[:1], buckets[-1:]))
    sums = torch.cat((partial_near.sum((0, 2)).flatten(1), partial_far.sum((0, 2))), dim=1)  # (H, entries)
    grad = torch.empty(scores.relative_bias.shape, dtype=torch.float32, device=buckets.device)
    attention_table_gradient_kernel[(grad.numel(),)](
        sums, bucket, grad, sums.shape[1], grad.shape[1], BLOCK=512, num_warps=4
    )
    return grad


def _numbers(q: Tensor, k: Tensor, scores: Scores) -> tuple[int, int, float]:
    """The window's sides and the scale, as the kernels take them."""
    reach = q.shape[1] + k.shape[1]
    scale = scores.softmax_scale / scores.softcap if scores.softcap > 0 else scores.softmax_scale * LOG2E
    return min(scores.window_left, reach), min(scores.window_right, reach), scale


def _tables(scores: Scores, line: Tensor | None) -> tuple[Tensor | None, ...]:
    return (
        scores.key_lengths, scores.alibi_slopes, line, scores.rotary_cos, scores.rotary_sin, scores.rotary_positions,
    )  # fmt: skip


def _features(q: Tensor, scores: Scores, config: Config) -> Features:
    head_dim = q.shape[3]
    half = 0 if scores.rotary_cos is None else scores.rotary_cos.shape[1]
    return Features(
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HALF=min(_block(half), config.piece),
        BLOCK_REST=min(_block(head_dim - 2 * half), config.piece),
        BLOCK_D=min(_block(head_dim), config.piece),
        INTERLEAVED=half > 0 and scores.rotary_interleaved,
        HAS_POSITIONS=scores.rotary_positions is not None,
        HAS_LEFT=scores.window_left >= 0,
        HAS_RIGHT=scores.window_right >= 0,
        CAUSAL=scores.window_right == 0,
        HAS_SOFTCAP=scores.softcap > 0,
        HAS_SLOPES=scores.alibi_slopes is not None,
        HAS_TABLE=scores.relative_bias is not None,
        HAS_LENGTHS=scores.key_lengths is not None,
        POSITIVE_SCALE=scores.softmax_scale > 0,
        PRECISION=config.precision if q.dtype == torch.float32 else None,
    )


def _tile(config: Config, columns: int, descriptors: list, *tensors: Tensor) -> Tile:
    """`columns`: of an unmasked block, queries or keys."""
    return Tile(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        MASKED=min(config.masked or columns, columns),
        HOIST=config.hoist,
        DESCRIPTOR=descriptors[0] is not None,
        LONG=_long(max(config.block_m, config.block_n), *tensors),
    )


def _choose(kernel: str, start: Callable, scores: Scores, *tensors: Tensor, needs_slopes: bool = False) -> Config:
    q, k = tensors[:2]
    chip = chip_of(q)
    candidates = configs(kernel, chip, q.shape[3], q.element_size())
    aligned = all(_strides_of_tma(x) is not None for x in tensors)
    long = _long(STATISTICS_ROWS, *tensors)
    features = _features(q, scores, candidates[0])
    return choose(
        kernel, candidates, (chip, q.dtype, q.device, aligned, long, needs_slopes, *features, q.shape[1], k.shape[1]),
        start,
    )  # fmt: skip


def _start(kernel, blocks: int, config: Config, compile_only: bool, *arguments) -> CompiledKernel | None:
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    if config.registers:
        options["maxnreg"] = config.registers
    if compile_only:
        return kernel.warmup(*arguments, grid=(blocks,), **options)
    kernel[(blocks,)](*arguments, **options)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _batch_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def _long(rows: int, *tensors: Tensor) -> bool:
    """Whether the offsets within a tile of so many rows need 64 bits."""
    return any(rows * x.stride(1) + x.shape[3] >= 2**31 for x in tensors)


def _strides_of_tma(x: Tensor) -> list[int] | None:
    """The strides of batch, heads and seqlen if TMA can read x; that of a dimension of size 1 says nothing."""
    aligned = 16 // x.element_size()
    strides = [x.stride(i) if x.shape[i] > 1 else aligned for i in (0, 2, 1)]
    regular = all(stride > 0 and stride % aligned == 0 for stride in strides)
    return strides if regular and x.data_ptr() % 16 == 0 and x.shape[3] >= aligned else None


def _descriptors(config: Config, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """TMA descriptors of tensors seen as (batch, heads, seqlen, head_dim); None where TMA cannot read one of them."""
    strides = [_strides_of_tma(x) for x in tensors]
    if not config.descriptors or None in strides or config.piece < tensors[0].shape[3]:
        return [None] * len(tensors)
    described = []
    for x, (batch, head, row) in zip(tensors, strides, strict=True):
        shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
        described.append(TensorDescriptor(x, shape, [batch, head, row, 1], [1, 1, rows, _block(x.shape[3])]))
    return described


def _bias_line(scores: Scores, config: Config) -> tuple[Tensor | None, int]:
    """T5's bias by distance, a line for each head in log2 units, continued beyond the largest distance; and that."""
    if scores.relative_bias is None:
        return None, 0
    buckets = scores.relative_buckets
    radius = buckets.numel() // 2
    reach = radius + config.block_m + config.block_n
    distance = torch.arange(-reach, reach + 1, device=buckets.device).clamp_(-radius, radius)
    line = scores.relative_bias.t()[:, buckets[distance + radius].long()]  # (H, 2 reach + 1)
    return (line.float() * LOG2E).contiguous(), radius
