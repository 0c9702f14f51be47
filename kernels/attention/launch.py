"""Launchers of fused attention, forward and backward, and what other launchers of attention share with them.

Arguments and results are those of the functions of the same names in the reference.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.integers import are_multiples, cdiv, tile_width
from ..common.launch import chip_of, choose, launch
from ..common.random import dropped_parts
from .backward_keys import attention_backward_keys_kernel
from .backward_queries import attention_backward_queries_kernel
from .configs import Config, configs, neighbours
from .forward import attention_forward_kernel
from .heads import AttentionFeatures, AttentionTile
from .scores import LOG2E, attention_line_kernel
from .sequences import STATISTICS_ROWS
from .statistics import (
    attention_slopes_gradient_kernel,
    attention_statistics_kernel,
    attention_table_gradient_kernel,
)

STATISTICS_BLOCK = 32
LINE_BLOCK = 256


class Options(NamedTuple):
    """The arguments that follow q, k and v."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    relative_bias: Tensor | None
    relative_buckets: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_positions: Tensor | None
    rotary_offset: int
    rotary_interleaved: bool
    dropout_p: float
    dropout_seed: Tensor | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def dropped(self) -> int:
        return dropped_parts(self.dropout_p)

    @property
    def kept_share(self) -> float:
        return 1 - self.dropped / 65536

    @property
    def sequences(self) -> int:
        """The number of packed sequences, 0 for none."""
        return self.cu_seqlens_q.numel() - 1 if self.packed else 0

    def blocks(self, x: Tensor, rows: int) -> int:
        """The number of blocks of `rows` rows that a head of x takes, wherever packed sequences start."""
        return x.shape[1] // rows + self.sequences if self.packed else cdiv(x.shape[1], rows)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q)."""
    options = Options(*options)
    batch, seqlen_q, heads, _ = q.shape
    group = heads // max(1, k.shape[2])
    out = torch.empty((batch, seqlen_q, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        lse.copy_(-torch.inf if options.sinks is None else options.sinks[:, None])
        return out.zero_(), lse
    left, right, scale = kernel_numbers(options, q.shape[1] + k.shape[1])
    features, tma, long = _features(q, v, options), _tma(q, k, v), needs_long(STATISTICS_ROWS.value, q, k, v)

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        descriptors = _descriptors(config, config.block_n, (k, v), tma[1:])
        line, radius = _tile_line(options, config, compile_only)
        return launch(
            attention_forward_kernel, (options.blocks(q, config.block_m) * batch * heads,),
            heads_of(q), heads_of(k), heads_of(v), out, lse, *descriptors, options.sinks,
            *_bundles(q, k, options, line, radius), options.dropout_seed, heads, group, left, right, scale,
            float(options.softcap), options.dropped, options.kept_share,
            _cut(features, config), _tile(config, config.block_n, descriptors, long),
            compile_only=compile_only, **config.options(),
        )  # fmt: skip

    start(_choose("forward", start, features, tma, long, q, k))
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, slopes, relative bias and sinks.

    The last three arguments say which of the last three gradients are needed; the others are empty.
    """
    *options, needs_slopes, needs_table, needs_sinks = options
    options = Options(*options)
    batch, _, heads, _ = q.shape
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad_slopes = grad_table = grad_sinks = torch.empty(0, dtype=torch.float32, device=q.device)
    pivot, delta = _statistics(out, grad_out, lse, grad_lse, options)
    if needs_sinks:  # a key whose value is 0: its ds is p (0 - delta)
        weight = torch.exp2(options.sinks[:, None] * LOG2E.value - pivot)  # (B, H, padded rows)
        grad_sinks = (weight * delta).sum((0, 2)) / -options.kept_share
    options = options._replace(sinks=None)  # the lse counts them
    if q.numel() == 0 or k.numel() == 0:
        grad_slopes = torch.zeros_like(options.alibi_slopes) if needs_slopes else grad_slopes
        grad_table = torch.zeros_like(options.relative_bias) if needs_table else grad_table
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_slopes, grad_table, grad_sinks

    left, right, scale = kernel_numbers(options, q.shape[1] + k.shape[1])
    features, tma = _features(q, v, options), _tma(q, k, v, grad_out)
    long = needs_long(STATISTICS_ROWS.value, q, k, v, grad_out)
    kv_heads = k.shape[2]
    group = heads // kv_heads
    tensors = (*map(heads_of, (q, k, v, grad_out)), (pivot, delta, pivot.shape[2]))
    grad_scale = options.softmax_scale / options.kept_share

    def start_keys(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        descriptors = _descriptors(config, config.block_m, (q, grad_out), (tma[0], tma[3]))
        line, radius = _tile_line(options, config, compile_only)
        return launch(
            attention_backward_keys_kernel, (options.blocks(k, config.block_n) * batch * kv_heads,),
            *tensors, grad_k, grad_v, *descriptors, *_bundles(q, k, options, line, radius), options.dropout_seed,
            heads, group, left, right, scale, float(options.softcap), options.dropped, grad_scale, options.kept_share,
            _cut(features, config), _tile(config, config.block_m, descriptors, long),
            compile_only=compile_only, **config.options(),
        )  # fmt: skip

    start_keys(_choose("keys", start_keys, features, tma, long, q, k))

    def start_queries(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        nonlocal grad_slopes, grad_table
        descriptors = _descriptors(config, config.block_n, (k, v), tma[1:3])
        line, radius = _tile_line(options, config, compile_only)
        allocate = torch.zeros if options.packed else torch.empty  # programs without queries write nothing
        sums = (batch, heads, options.blocks(q, config.block_m))
        partial_slopes = partial_far = partial_near = None
        if needs_slopes:
            partial_slopes = allocate(sums, dtype=torch.float32, device=q.device)
        near_first, segments, segment = _near_segments(q, k, options, radius, config)
        if needs_table:
            partial_far = allocate((*sums, 2), dtype=torch.float32, device=q.device)
            partial_near = torch.zeros((*sums, segments, segment), dtype=torch.float32, device=q.device)
        compiled = launch(
            attention_backward_queries_kernel, (sums[2] * batch * heads,),
            *tensors, grad_q, partial_slopes, partial_far, (partial_near, near_first, segments * segment), *descriptors,
            *_bundles(q, k, options, line, radius), options.dropout_seed,
            heads, group, left, right, scale, float(options.softcap), options.dropped, grad_scale, options.kept_share,
            _cut(features, config), _tile(config, config.block_n, descriptors, long), needs_slopes, needs_table,
            compile_only=compile_only, **config.options(),
        )  # fmt: skip
        if compile_only:
            return compiled
        if needs_slopes:
            grad_slopes = _slopes_gradient(partial_slopes, options, config)
        if needs_table:
            grad_table = _table_gradient(partial_far, partial_near, near_first, radius, options, config)

    kind = "table" if needs_table else "queries"
    start_queries(_choose(kind, start_queries, features, tma, long, q, k, needs_slopes))
    return grad_q, grad_k, grad_v, grad_slopes, grad_table, grad_sinks


def _statistics(
    out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """The pivot and the delta of each row, padded: (batch, heads, rows)."""
    batch, rows, heads, head_dim = out.shape
    block = STATISTICS_ROWS.value
    blocks = options.blocks(out, block)
    pivot, delta = (
        torch.empty((batch, heads, blocks * block), dtype=torch.float32, device=out.device) for _ in range(2)
    )
    launch(
        attention_statistics_kernel, (blocks * batch * heads, block // STATISTICS_BLOCK),
        heads_of(out), heads_of(grad_out), lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(),
        options.cu_seqlens_q, pivot, delta, options.sequences, rows, pivot.shape[2], heads, options.kept_share,
        HEAD_DIM=head_dim, BLOCK_D=tile_width(head_dim), HAS_GRAD_LSE=grad_lse is not None, PACKED=options.packed,
        LONG=needs_long(STATISTICS_BLOCK, out, grad_out), BLOCK_M=STATISTICS_BLOCK, num_warps=4,
    )  # fmt: skip
    return pivot, delta


def _slopes_gradient(partial: Tensor, options: Options, config: Config) -> Tensor:
    """The sums of partial (batch, heads, blocks) over the blocks that share a slope."""
    slopes = options.alibi_slopes
    if slopes.dim() == 1:
        return partial.sum((0, 2))
    if not options.packed:
        return partial.sum(2)
    grad = torch.empty(slopes.shape, dtype=torch.float32, device=slopes.device)
    launch(
        attention_slopes_gradient_kernel, (grad.numel(),), partial, options.cu_seqlens_q, grad, *partial.shape[2:],
        grad.shape[1], BLOCK_M=config.block_m, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return grad


def _near_segments(q: Tensor, k: Tensor, options: Options, radius: int, config: Config) -> tuple[int, int, int]:
    """The first, the number and the size of the segments that hold the sums by distance.

    A segment is named by the distance of a tile's first key to its first query.
    """
    size = config.block_n
    first, sides = -radius - size, 3
    if not options.packed:  # all tiles have distances that differ by multiples of their size
        shift = k.shape[1] - q.shape[1]
        first, sides = (shift + first) // size * size - shift, 2
    return first, (radius + config.block_m - first) // size + 1, sides * size


def _table_gradient(
    partial_far: Tensor,  # (B, H, blocks, 2)
    partial_near: Tensor,  # (B, H, blocks, segments, segment)
    near_first: int,
    radius: int,
    options: Options,
    config: Config,
) -> Tensor:
    """The partial sums added up by distance, then by bucket, each in a fixed order: (buckets, heads)."""
    buckets = options.relative_buckets
    segments, segment = partial_near.shape[3:]
    start = torch.arange(segments, device=buckets.device)[:, None] * config.block_n + near_first - config.block_n
    distance = (start + torch.arange(segment, device=buckets.device)).flatten().clamp(-radius, radius)
    bucket = torch.cat((buckets[distance + radius], buckets[:1], buckets[-1:]))
    sums = torch.cat((partial_near.sum((0, 2)).flatten(1), partial_far.sum((0, 2))), dim=1)  # (H, entries)
    grad = torch.empty(options.relative_bias.shape, dtype=torch.float32, device=buckets.device)
    launch(
        attention_table_gradient_kernel, (grad.numel(),), sums, bucket, grad, sums.shape[1], grad.shape[1],
        options.kept_share, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return grad


def kernel_numbers(options, reach: int) -> tuple[int, int, float]:
    """The window's sides, at most `reach`, and the scale: in log2 units or, with a softcap, that of its tanh."""
    scale = options.softmax_scale / options.softcap if options.softcap > 0 else options.softmax_scale * LOG2E.value
    return min(options.window_left, reach), min(options.window_right, reach), scale


def heads_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """The Heads of x."""
    return x, *x.stride()[:3]


def slopes_stride(slopes: Tensor | None) -> int:
    """The distance of the slopes of two entries of the batch."""
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def _bundles(q: Tensor, k: Tensor, options: Options, line: Tensor | None, radius: int) -> tuple[tuple, tuple, tuple]:
    """The Sequences, Biases and HeadRotary of a call."""
    return (
        (
            options.key_lengths, options.cu_seqlens_q, options.cu_seqlens_k, options.sequences,
            q.shape[1], k.shape[1],
        ),
        (options.alibi_slopes, slopes_stride(options.alibi_slopes), line, radius),
        (options.rotary_cos, options.rotary_sin, options.rotary_positions, options.rotary_offset),
    )  # fmt: skip


def _features(q: Tensor, v: Tensor, options: Options) -> AttentionFeatures:
    """The features of a call, heads uncut."""
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    half = 0 if options.rotary_cos is None else options.rotary_cos.shape[1]
    return AttentionFeatures(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        HALF=half,
        BLOCK_HALF=tile_width(half),
        BLOCK_REST=tile_width(head_dim - 2 * half),
        BLOCK_D=tile_width(head_dim_v),
        INTERLEAVED=half > 0 and options.rotary_interleaved,
        HAS_POSITIONS=options.rotary_positions is not None,
        HAS_LEFT=options.window_left >= 0,
        HAS_RIGHT=options.window_right >= 0,
        CAUSAL=options.window_right == 0,
        HAS_SOFTCAP=options.softcap > 0,
        HAS_SLOPES=options.alibi_slopes is not None,
        HAS_TABLE=options.relative_bias is not None,
        HAS_LENGTHS=options.key_lengths is not None,
        HAS_SINKS=options.sinks is not None,
        HAS_DROPOUT=options.dropped > 0,
        PACKED=options.packed,
        POSITIVE_SCALE=options.softmax_scale > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else None,
    )


def _cut(features: AttentionFeatures, config: Config) -> AttentionFeatures:
    """The features with heads cut into a config's pieces, and its precision."""
    return features._replace(
        BLOCK_HALF=min(features.BLOCK_HALF, config.piece),
        BLOCK_REST=min(features.BLOCK_REST, config.piece),
        BLOCK_D=min(features.BLOCK_D, config.piece),
        PRECISION=features.PRECISION and config.precision,
    )


def _tile(config: Config, columns: int, descriptors: list, long: bool) -> AttentionTile:
    """The tile of a config; an unmasked block has `columns` columns."""
    return AttentionTile(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        MASKED=min(config.masked or columns, columns),
        HOIST=config.hoist,
        DESCRIPTOR=descriptors[0] is not None,
        LONG=long,
    )


def _choose(
    kernel: str, start: Callable, features: AttentionFeatures, tma: list, long: bool, q: Tensor, k: Tensor,
    needs_slopes: bool = False,
) -> Config:  # fmt: skip
    chip = chip_of(q)
    candidates = configs(kernel, chip, max(features.HEAD_DIM, features.HEAD_DIM_V), q.element_size())
    aligned = None not in tma
    key = (chip, q.dtype, q.device, aligned, long, needs_slopes, *features)
    near = functools.partial(neighbours, square=kernel == "table")
    return choose(kernel, q.device, candidates, key, (q.shape[1], k.shape[1]), start, near)


def needs_long(rows: int, *tensors: Tensor) -> bool:
    """Whether the offsets within a tile of `rows` rows need 64 bits."""
    return any(rows * x.stride(1) + x.shape[3] >= 2**31 for x in tensors)


def _tma(*tensors: Tensor) -> list[list[int] | None]:
    """The strides of batch, heads and rows of each tensor, None where TMA cannot read it.

    The stride of a dimension of size 1 means nothing, and is replaced.
    """
    aligned = 16 // tensors[0].element_size()
    result = []
    for x in tensors:
        batch, seqlen, heads, head_dim = x.shape
        by_batch, by_row, by_head, _ = x.stride()
        strides = [
            by_batch if batch > 1 else aligned,
            by_head if heads > 1 else aligned,
            by_row if seqlen > 1 else aligned,
        ]
        regular = min(strides) > 0 and are_multiples(aligned, strides)
        result.append(strides if regular and x.data_ptr() % 16 == 0 and head_dim >= aligned else None)
    return result


def _descriptors(
    config: Config, rows: int, tensors: Sequence[Tensor], strides: Sequence[list[int] | None]
) -> list[TensorDescriptor | None]:
    """TMA descriptors of tensors seen as (batch, heads, rows, head_dim); all None if TMA cannot read one of them."""
    if not config.descriptors or None in strides or config.piece < max(x.shape[3] for x in tensors):
        return [None] * len(tensors)
    described = []
    for x, (by_batch, by_head, by_row) in zip(tensors, strides, strict=True):
        batch, seqlen, heads, head_dim = x.shape
        shape, block = [batch, heads, seqlen, head_dim], [1, 1, rows, tile_width(head_dim)]
        described.append(TensorDescriptor(x, shape, [by_batch, by_head, by_row, 1], block))
    return described


def table_radius(buckets: Tensor | None) -> int:
    """The largest distance that has a T5 bias of its own."""
    return 0 if buckets is None else buckets.numel() // 2


def _tile_line(options: Options, config: Config, compile_only: bool) -> tuple[Tensor | None, int]:
    """T5's biases by distance in log2 units, as far as a tile may reach (heads, 2 reach + 1); the table's radius."""
    radius = table_radius(options.relative_buckets)
    if options.relative_bias is None:
        return None, radius
    table = options.relative_bias
    heads, reach = table.shape[1], radius + config.block_m + config.block_n
    line = torch.empty((heads, 2 * reach + 1), dtype=torch.float32, device=table.device)
    launch(
        attention_line_kernel, (cdiv(line.shape[1], LINE_BLOCK), heads), table, options.relative_buckets, line,
        radius, reach, BLOCK=LINE_BLOCK, compile_only=compile_only, num_warps=4,
    )  # fmt: skip
    return line, radius
