"""The order of slots by their experts: launcher and kernels, a counting sort.

Arguments and results of the launcher are those of the function of the same name in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launch import launch

TILE = 128  # slots of a program, which compares each with each
SCANNED = 8192  # counts that are summed up at once
WARPS = 4


@triton.jit
def _experts_of(p_index, i_tile, slots, experts, TILE: tl.constexpr):
    """A tile's slots, and their experts, `experts` for none."""
    b_slot = i_tile * TILE + tl.arange(0, TILE)
    b_index = tl.load(p_index + b_slot, mask=b_slot < slots, other=-1)
    has_expert = (b_index >= 0) & (b_index < experts)
    return b_slot, tl.where(has_expert, b_index, experts).to(tl.int32)


@triton.jit
def _ranks(b_expert, TILE: tl.constexpr):
    """How many slots of a tile before each have its expert, (TILE,)."""
    o = tl.arange(0, TILE)
    before = (b_expert[:, None] == b_expert[None, :]) & (o[None, :] < o[:, None])
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _store_places(p_permutation, p_places, b_slot, b_expert, b_place, slots, experts):
    m = b_slot < slots
    tl.store(p_places + b_slot, tl.where(b_expert < experts, b_place, -1), mask=m)
    tl.store(p_permutation + b_place, b_slot, mask=m)


@triton.jit
def _store_counts(p_counts, p_offsets, b_counts, b_end, experts, BINS: tl.constexpr):
    o_e = tl.arange(0, BINS)
    tl.store(p_counts + o_e, b_counts, mask=o_e < experts)
    tl.store(p_offsets + o_e, b_end, mask=o_e < experts)


@triton.jit
def dispatch_one_tile_kernel(
    p_index, p_counts, p_offsets, p_permutation, p_places, slots, experts, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """All of a dispatch of at most TILE slots; BINS > experts."""
    b_slot, b_expert = _experts_of(p_index, 0, slots, experts, TILE)
    b_counts = tl.histogram(b_expert, BINS, mask=b_slot < slots)
    b_end = tl.cumsum(b_counts, 0)
    _store_counts(p_counts, p_offsets, b_counts, b_end, experts, BINS)
    below = tl.arange(0, TILE)[None, :] < slots  # slots behind the last count nowhere
    b_place = tl.sum(((b_expert[None, :] < b_expert[:, None]) & below).to(tl.int32), 1) + _ranks(b_expert, TILE)
    _store_places(p_permutation, p_places, b_slot, b_expert, b_place, slots, experts)


@triton.jit
def dispatch_count_kernel(p_index, p_tiles, slots, experts, TILE: tl.constexpr, BINS: tl.constexpr):
    """tiles (tiles, BINS): how many slots of a tile each expert has."""
    i_tile = tl.program_id(0)
    b_slot, b_expert = _experts_of(p_index, i_tile, slots, experts, TILE)
    b_counts = tl.histogram(b_expert, BINS, mask=b_slot < slots)
    tl.store(p_tiles + i_tile * BINS + tl.arange(0, BINS), b_counts)


@triton.jit
def dispatch_scan_kernel(
    p_tiles, p_counts, p_offsets, p_starts, tiles, experts, ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Makes counts of tiles those of all tiles before, and stores the experts' counts, ends and starts."""
    o_e = tl.arange(0, BINS)
    b_total = tl.full([BINS], 0, tl.int32)
    for i_tile in tl.range(0, tiles, ROWS):
        o_tile = i_tile + tl.arange(0, ROWS)
        p_block = p_tiles + o_tile[:, None] * BINS + o_e[None, :]
        m = (o_tile < tiles)[:, None]
        b_tile = tl.load(p_block, mask=m, other=0)  # (ROWS, BINS)
        tl.store(p_block, tl.cumsum(b_tile, 0) - b_tile + b_total[None, :], mask=m)
        b_total += tl.sum(b_tile, 0)
    b_end = tl.cumsum(b_total, 0)
    _store_counts(p_counts, p_offsets, b_total, b_end, experts, BINS)
    tl.store(p_starts + o_e, b_end - b_total)


@triton.jit
def dispatch_place_kernel(
    p_index, p_tiles, p_starts, p_permutation, p_places, slots, experts, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The row of each slot: behind those of lesser experts, of earlier tiles, and of earlier slots."""
    i_tile = tl.program_id(0)
    b_slot, b_expert = _experts_of(p_index, i_tile, slots, experts, TILE)
    b_place = tl.load(p_starts + b_expert) + tl.load(p_tiles + i_tile * BINS + b_expert) + _ranks(b_expert, TILE)
    _store_places(p_permutation, p_places, b_slot, b_expert, b_place, slots, experts)


def moe_dispatch(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, permutation and places."""
    slots, device = top_k_index.numel(), top_k_index.device
    counts, offsets = (torch.empty(num_experts, dtype=torch.int32, device=device) for _ in range(2))
    permutation = torch.empty(slots, dtype=torch.int32, device=device)
    places = torch.empty(top_k_index.shape, dtype=torch.int32, device=device)
    if slots == 0:
        return counts.zero_(), offsets.zero_(), permutation, places
    bins = max(16, next_power_of_2(num_experts + 1))
    results = (permutation, places, slots, num_experts)
    if slots <= TILE:
        launch(
            dispatch_one_tile_kernel, (1,), top_k_index, counts, offsets, *results, TILE=TILE, BINS=bins,
            num_warps=WARPS,
        )  # fmt: skip
        return counts, offsets, permutation, places
    tiles = cdiv(slots, TILE)
    of_tiles = torch.empty((tiles, bins), dtype=torch.int32, device=device)
    starts = torch.empty(bins, dtype=torch.int32, device=device)
    options = dict(TILE=TILE, BINS=bins, num_warps=WARPS)
    launch(dispatch_count_kernel, (tiles,), top_k_index, of_tiles, slots, num_experts, **options)
    launch(
        dispatch_scan_kernel, (1,), of_tiles, counts, offsets, starts, tiles, num_experts,
        ROWS=max(1, SCANNED // bins), BINS=bins, num_warps=8,
    )  # fmt: skip
    launch(dispatch_place_kernel, (tiles,), top_k_index, of_tiles, starts, *results, **options)
    return counts, offsets, permutation, places
