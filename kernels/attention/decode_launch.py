"""Launchers of attention over a cache.

Arguments and results are those of the functions of the same names in the reference.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..common.checks import ASSERTS
from ..common.integers import are_multiples, cdiv, next_power_of_2, tile_width
from ..common.launch import chip_of, choose, launch
from ..common.replay import give_up
from .configs import Config, neighbours
from .decode import (
    DecodeFeatures,
    DecodeTile,
    attention_append_kernel,
    attention_check_kernel,
    attention_combine_kernel,
    attention_decode_kernel,
)
from .decode_configs import configs
from .launch import heads_of, kernel_numbers, needs_long, slopes_stride, table_radius

APPEND_ROWS = 16
CHECKED_PAGES = 128  # at once
COMBINED = 4096  # numbers of a row's parts that are read at once
PROGRAMS = 2  # aimed at for each multiprocessor
# The least keys of a part: starting one, and writing and reading its results, must be worth while.
LEAST_KEYS = 256
LEAST_KEYS_A_ROW = 8


class DecodeOptions(NamedTuple):
    """The arguments that follow cache_lengths."""

    appended: int
    block_table: Tensor | None
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    relative_bias: Tensor | None
    relative_buckets: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_offset: int
    rotary_interleaved: bool
    num_splits: int


def attention_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_offset: int,
    rotary_interleaved: bool,
) -> None:
    """Writes k, turned, and v behind the keys of each entry of the caches.

    A length, a page or a position outside of the caches and tables is a failed assertion of the device.
    """
    batch, seqlen, kv_heads, _ = k.shape
    rows = seqlen * kv_heads
    if batch * rows == 0:
        return
    head_dim, head_dim_v = k.shape[3], v.shape[3]
    launch(
        attention_append_kernel, (cdiv(rows, APPEND_ROWS) * batch,),
        heads_of(k), heads_of(v), heads_of(k_cache), heads_of(v_cache), cache_lengths, block_table,
        _page_stride(block_table), rotary_cos, rotary_sin, seqlen, kv_heads, rotary_offset,
        _limits(k_cache, block_table, rotary_cos, seqlen, seqlen, rotary_offset), HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v, BLOCK_D=_piece(head_dim, 256), BLOCK_V=_piece(head_dim_v, 256),
        PAGE=_page(k_cache, block_table), HALF=0 if rotary_cos is None else rotary_cos.shape[1],
        INTERLEAVED=rotary_interleaved, BLOCK_M=APPEND_ROWS, CHECKED=CHECKED_PAGES, num_warps=4, **ASSERTS,
    )  # fmt: skip


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q).

    What attention_append asserts is asserted here where it was not called, or did not see all positions.
    """
    options = DecodeOptions(*options)
    batch, seqlen_q, heads, _ = q.shape
    kv_heads, head_dim_v = v_cache.shape[2:]
    out = torch.empty((batch, seqlen_q, heads, head_dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    capacity = _capacity(k_cache, options.block_table)
    has_earlier = options.rotary_cos is not None and options.rotary_offset + options.appended < seqlen_q
    if batch > 0 and (options.appended == 0 or has_earlier):
        _check_values(cache_lengths, k_cache, seqlen_q, options)
    if out.numel() == 0 or capacity == 0:
        lse.copy_(-torch.inf if options.sinks is None else options.sinks[:, None])
        return out.zero_(), lse
    group = heads // kv_heads
    left, right, scale = kernel_numbers(options, seqlen_q + capacity)
    radius = table_radius(options.relative_buckets)
    unit = _unit(k_cache, v_cache)

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        splits = _splits(q, kv_heads, capacity, options, config, _multiprocessors(q.device))
        features = _features(q, k_cache, v_cache, options, config, splits)
        results, maxima, sums = out, None, None
        if features.SPLIT:
            results = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
            maxima, sums = (
                torch.empty((splits, batch, seqlen_q, heads), dtype=torch.float32, device=q.device) for _ in range(2)
            )
        arguments = (
            heads_of(q), _heads_in_units(k_cache, unit), _heads_in_units(v_cache, unit), results, lse, maxima, sums,
            cache_lengths, (options.block_table, _page_stride(options.block_table)), options.sinks,
            options.alibi_slopes, slopes_stride(options.alibi_slopes),
            (options.relative_bias, options.relative_buckets), options.rotary_cos, options.rotary_sin,
            seqlen_q, options.appended, heads, group, splits, left, right, radius, options.rotary_offset, scale,
            float(options.softcap), features,
            DecodeTile(
                config.block_m, config.block_n, config.hoist, needs_long(config.block_n, k_cache, v_cache), unit,
            ),
        )  # fmt: skip
        # A page is looked up as many stages before its loads as these come before the products.
        stages = config.num_stages * 2 - 1 if options.block_table is not None else config.num_stages
        compiled = launch(
            attention_decode_kernel, (cdiv(seqlen_q * group, config.block_m) * batch * kv_heads * splits,), *arguments,
            compile_only=compile_only, num_warps=config.num_warps, num_stages=stages,
        )  # fmt: skip
        if compile_only:
            return compiled
        if features.SPLIT:
            launch(
                attention_combine_kernel, (batch * seqlen_q * heads,),
                results, maxima, sums, options.sinks, out, lse, seqlen_q, heads, splits, HEAD_DIM=head_dim_v,
                BLOCK_D=tile_width(head_dim_v), HAS_SINKS=options.sinks is not None,
                BLOCK_S=min(next_power_of_2(splits), COMBINED // tile_width(head_dim_v)), num_warps=4,
            )  # fmt: skip

    chip = chip_of(q)
    candidates = configs(chip, seqlen_q * group, max(q.shape[3], head_dim_v), q.element_size())
    aligned = all(x.data_ptr() % 16 == 0 for x in (k_cache, v_cache))
    features = _features(q, k_cache, v_cache, options, candidates[0], 1)
    key = (chip, q.dtype, q.device, aligned, unit, group, *features)
    start(choose("decode", q.device, candidates, key, (seqlen_q * group, capacity), start, neighbours))
    return out, lse


def _check_values(cache_lengths: Tensor, k_cache: Tensor, seqlen_q: int, options: DecodeOptions) -> None:
    table, appended = options.block_table, options.appended
    launch(
        attention_check_kernel, (cache_lengths.numel(),), cache_lengths, table, _page_stride(table),
        _limits(k_cache, table, options.rotary_cos, seqlen_q, appended, options.rotary_offset), appended,
        PAGE=_page(k_cache, table), HAS_ROTARY=options.rotary_cos is not None, BLOCK=CHECKED_PAGES, num_warps=1,
        **ASSERTS,
    )  # fmt: skip


def _limits(
    k_cache: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None, seqlen_q: int, appended: int, offset: int
) -> tuple[int, int, int, int, int]:
    """The Limits of a call with queries, or only new keys, for the last `seqlen_q` places."""
    positions = 0 if rotary_cos is None else rotary_cos.shape[0]
    first, end = offset + appended - seqlen_q, offset + appended
    return _capacity(k_cache, block_table) - appended, k_cache.shape[0], first, end, positions


def _capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """The number of keys that an entry can have."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _splits(q: Tensor, kv_heads: int, capacity: int, options: DecodeOptions, config: Config, processors: int) -> int:
    """The number of parts that keys are cut into, by what the host knows without waiting for the lengths."""
    batch, seqlen_q, heads, _ = q.shape
    rows, keys = seqlen_q * heads // kv_heads, capacity
    if options.window_left >= 0:
        right = seqlen_q if options.window_right < 0 else options.window_right
        keys = min(keys, options.window_left + right + config.block_m)
    if options.num_splits:
        return min(options.num_splits, cdiv(keys, config.block_n))
    least = max(LEAST_KEYS, LEAST_KEYS_A_ROW * min(rows, config.block_m))
    tiles = cdiv(rows, config.block_m) * batch * kv_heads
    return max(1, min(cdiv(PROGRAMS * processors, tiles), keys // least))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _features(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, options: DecodeOptions, config: Config, splits: int
) -> DecodeFeatures:
    head_dim, head_dim_v = q.shape[3], v_cache.shape[3]
    block_v = _piece(head_dim_v, config.piece)
    inside = _place_in_keys(k_cache, v_cache)
    one_token = q.shape[1] == 1 or q.shape[2] // k_cache.shape[2] % config.block_m == 0  # in each tile
    return DecodeFeatures(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_D=_piece(head_dim if inside < 0 else head_dim - head_dim_v, config.piece),
        BLOCK_V=block_v,
        INSIDE=inside,
        PAGE=_page(k_cache, options.block_table),
        HALF=0 if options.rotary_cos is None else options.rotary_cos.shape[1],
        INTERLEAVED=options.rotary_cos is not None and options.rotary_interleaved,
        HAS_LEFT=options.window_left >= 0,
        HAS_RIGHT=options.window_right >= 0,
        HAS_SOFTCAP=options.softcap > 0,
        HAS_SLOPES=options.alibi_slopes is not None,
        HAS_TABLE=options.relative_bias is not None,
        HAS_SINKS=options.sinks is not None,
        EVEN=one_token or (options.window_left < 0 and options.window_right < 0),
        SPLIT=splits > 1,
        PRECISION=config.precision if q.dtype == torch.float32 else None,
    )


def _place_in_keys(k_cache: Tensor, v_cache: Tensor) -> int:
    """The channel of the keys at which the values start, if they are a part of the keys (latent attention), else -1."""
    if k_cache.stride() != v_cache.stride() or k_cache.untyped_storage()._cdata != v_cache.untyped_storage()._cdata:
        return -1
    place = v_cache.storage_offset() - k_cache.storage_offset()
    if not 0 <= place <= k_cache.shape[3] - v_cache.shape[3]:
        return -1
    give_up()  # other caches of these shapes and strides may lie apart
    return place


def _piece(size: int, most: int) -> int:
    """The channels of a piece, at most `most`: a divisor of the head's, unless all are small."""
    divisor = size & -size
    return min(most, divisor if divisor >= 32 else tile_width(size))


def _page(k_cache: Tensor, block_table: Tensor | None) -> int:
    return 0 if block_table is None else k_cache.shape[1]


def _page_stride(block_table: Tensor | None) -> int:
    return 0 if block_table is None else block_table.stride(0)


def _unit(*caches: Tensor) -> int:
    """16 bytes in elements if all strides are multiples of them, else 1."""
    unit = 16 // caches[0].element_size()
    return unit if all(are_multiples(unit, x.stride()[:3]) for x in caches) else 1


def _heads_in_units(cache: Tensor, unit: int) -> tuple[Tensor, int, int, int]:
    """The Heads of a cache, strides in multiples of `unit`."""
    return cache, *(stride // unit for stride in cache.stride()[:3])
