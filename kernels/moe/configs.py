"""The tiles of grouped products on each chip, best first: a launcher takes the first that fits unspilled.

None was measured yet.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Config(NamedTuple):
    """The launch of a grouped product: its tile, warps and pipeline stages.

    `group_m` blocks of rows take turns with a tile of a matrix. `precision` is how fp32 is multiplied: tf32x3 in three
    parts on tensor cores, ieee by multiply-adds.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"
    group_m: int = 8


def _amd(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
    return Config(block_m, block_n, block_k, warps, 2, "ieee")


_INTERPRETER = [Config(16, 32, 16, 1, 1, "ieee", 2)]
_ROWS = [Config(64, 128, 64, 4, 3), Config(32, 128, 64, 4, 3), Config(16, 128, 64, 4, 3)]
_NVIDIA = {
    "product": [Config(128, 128, 64, 8, 3), *_ROWS],
    "gated": [Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(32, 64, 64, 4, 3), Config(16, 64, 64, 4, 3)],
    "gradient": [Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 2), Config(64, 64, 32, 4, 2)],
}
_HOPPER = _NVIDIA | {"gated": [Config(128, 128, 64, 8, 3), *_NVIDIA["gated"]]}
_AMD = {
    "product": [_amd(128, 128, 64, 8), _amd(64, 128, 64, 4), _amd(32, 128, 64, 4), _amd(16, 128, 64, 4)],
    "gated": [_amd(128, 64, 64, 8), _amd(64, 64, 64, 4), _amd(32, 64, 64, 4), _amd(16, 64, 64, 4)],
    "gradient": [_amd(128, 128, 32, 8), _amd(64, 64, 32, 4)],
}
_NVIDIA_FP32 = {
    "product": [Config(64, 64, 32, 4, 2), Config(32, 64, 32, 4, 2), Config(16, 64, 32, 4, 2)],
    "gated": [Config(64, 32, 32, 4, 2), Config(32, 32, 32, 4, 2), Config(16, 32, 32, 4, 2)],
    "gradient": [Config(64, 64, 32, 4, 2), Config(32, 32, 32, 4, 2)],
}
_AMD_FP32 = {
    "product": [_amd(64, 64, 32, 4), _amd(32, 64, 32, 4), _amd(16, 64, 32, 4)],
    "gated": [_amd(64, 32, 32, 4), _amd(32, 32, 32, 4), _amd(16, 32, 32, 4)],
    "gradient": [_amd(64, 64, 32, 4), _amd(32, 32, 32, 4)],
}
_ALL = dict.fromkeys(("product", "gated", "gradient"), _INTERPRETER)
HALF = {"sm_80": _NVIDIA, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _AMD, "interpreter": _ALL}
FP32 = {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), _NVIDIA_FP32), "gfx942": _AMD_FP32, "interpreter": _ALL}


def configs(kind: str, chip: str, rows: int, item_size: int) -> list[Config]:
    """The tiles to try where groups have `rows` rows on average: much taller ones are left out.

    kind: product; gated, whose tiles of outputs are two; gradient, whose tiles are of matrices.
    """
    tiles = (FP32 if item_size == 4 else HALF)[chip][kind]
    if kind == "gradient":
        return tiles
    enough = min((c.block_m for c in tiles if c.block_m >= rows), default=tiles[0].block_m)
    return [c for c in tiles if c.block_m <= enough]


def neighbours(config: Config) -> Iterator[Config]:
    """The configs that differ in one step of one thing, which a search for the fastest tries next."""
    for name, least, most in (("block_m", 16, 256), ("block_n", 16, 256), ("block_k", 16, 128), ("num_warps", 2, 8)):
        for size in (getattr(config, name) // 2, getattr(config, name) * 2):
            if least <= size <= most:
                yield config._replace(**{name: size})
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield config._replace(num_stages=stages)
