"""The tiles of products with 4-bit weights on each chip, best first: a launcher takes the first that fits unspilled."""

from collections.abc import Iterator
from typing import NamedTuple

# From so many rows on a weight in bf16 or fp16 is made, chunk by chunk, for torch's product. Not measured yet.
DENSE_ROWS = 129
DENSE_BYTES = 2**26  # of a chunk
# Up to so many rows are multiplied without tensor cores: on sm_90 by 4.2 instructions a weight, with them 4.7; two rows
# would take 5.6. Not measured yet.
FEW_ROWS = 1
# A product is cut into parts until so many programs run on a multiprocessor; each sums at least LEAST products.
PROGRAMS, LEAST = 2, 512


class Config(NamedTuple):
    """The launch of a product: its tile, warps and pipeline stages.

    The tile has `block_m` rows of x or of the gradient, and `block_n` rows and `block_k` columns of the weight.
    `precision` is how fp32 is multiplied: tf32x3 in three parts on tensor cores, ieee by multiply-adds. `opaque` hides
    from Triton how the weight's tile came to be: see codes.weight_tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"
    opaque: bool = True


def _mfma(block_m: int, block_n: int, block_k: int, warps: int = 4, stages: int = 2) -> Config:
    return Config(block_m, block_n, block_k, warps, stages, "ieee", False)


_INTERPRETER = {
    "few": [Config(1, 4, 64, 1, 1)],
    "forward": [Config(16, 32, 64, 1, 1, "ieee", False)],
    "backward": [Config(16, 32, 64, 1, 1, "ieee", False)],
}
_FEW = [Config(1, 16, 1024, 4, 3), Config(1, 8, 1024, 4, 2)]
_NVIDIA = {
    "few": _FEW,
    "forward": [
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 128, 64, 8, 3),
        Config(32, 128, 64, 4, 3),
        Config(16, 128, 64, 4, 3),
    ],
    "backward": [
        Config(128, 64, 128, 8, 3),
        Config(64, 64, 128, 4, 3),
        Config(64, 64, 128, 8, 3),
        Config(32, 64, 128, 4, 3),
        Config(16, 64, 128, 4, 3),
    ],
}
_HOPPER = _NVIDIA | {"forward": [_NVIDIA["forward"][0], Config(64, 128, 128, 4, 3), *_NVIDIA["forward"][1:]]}
_AMD = {
    "few": [_mfma(1, 16, 1024)],
    "forward": [_mfma(128, 128, 64), _mfma(64, 128, 64), _mfma(32, 128, 64), _mfma(16, 128, 64)],
    "backward": [_mfma(128, 64, 128), _mfma(64, 64, 128), _mfma(32, 64, 128), _mfma(16, 64, 128)],
}
_NVIDIA_FP32 = {
    "few": _FEW,
    "forward": [Config(64, 128, 32, 4, 2), Config(32, 128, 32, 4, 2), Config(16, 128, 32, 4, 2)],
    "backward": [Config(64, 32, 128, 4, 2), Config(32, 32, 128, 4, 2), Config(16, 32, 128, 4, 2)],
}
_AMD_FP32 = {
    "few": [_mfma(1, 16, 1024)],
    "forward": [_mfma(64, 128, 64), _mfma(32, 128, 64), _mfma(16, 128, 64)],
    "backward": [_mfma(64, 64, 128), _mfma(32, 64, 128), _mfma(16, 64, 128)],
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
# bf16 and fp16: chip -> kernel -> tiles, most rows first.
HALF = {
    "sm_80": _NVIDIA, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _AMD, "interpreter": _INTERPRETER,
}  # fmt: skip
FP32 = {**dict.fromkeys(NVIDIA, _NVIDIA_FP32), "gfx942": _AMD_FP32, "interpreter": _INTERPRETER}


# Rows without whole blocks of scales, where each value has its own address.
_RAGGED = {
    "forward": [Config(64, 64, 64, 8, 1), Config(16, 64, 64, 8, 1)],
    "backward": [Config(64, 64, 64, 8, 1), Config(16, 64, 64, 8, 1)],
}
_AMD_RAGGED = {name: [_mfma(*tile[:3], 8, 1) for tile in tiles] for name, tiles in _RAGGED.items()}
RAGGED = {**dict.fromkeys(NVIDIA, _RAGGED), "gfx942": _AMD_RAGGED, "interpreter": _INTERPRETER}


def configs(kernel: str, chip: str, rows: int, item_size: int, ragged: bool) -> list[Config]:
    """The tiles of a kernel, few, forward or backward, for so many rows: none has many more.

    ragged: The weight's rows have no whole blocks of scales.
    """
    return for_rows((RAGGED if ragged else FP32 if item_size == 4 else HALF)[chip][kernel], rows)


def for_rows(tiles: list[Config], rows: int) -> list[Config]:
    """The tiles of at most as many rows as the smallest that has enough."""
    enough = min((c.block_m for c in tiles if c.block_m >= rows), default=tiles[0].block_m)
    return [c for c in tiles if c.block_m <= enough]


def neighbours(config: Config) -> Iterator[Config]:
    """The configs that differ in one step of one thing, which a search for the fastest tries next."""
    for name, least, most in (("block_n", 16, 256), ("block_k", 64, 2048), ("num_warps", 2, 8)):
        for size in (getattr(config, name) // 2, getattr(config, name) * 2):
            if least <= size <= most:
                yield config._replace(**{name: size})
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield config._replace(num_stages=stages)
