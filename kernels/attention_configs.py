"""Which tile each kernel of attention gets on each chip; `python -m benchmarks.audit` judges them."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def piece(work: Work) -> int:
    """Channels of a piece of a head at most: products of fp32 hold whole rows of a piece in registers."""
    return 256 if work.item_size != 4 else 64
