"""The tiles of attention over a cache on each chip, largest first: a launcher takes the first that fits, unspilled.

Reading the cache is what costs, so a tile has as many rows as there are, up to what registers hold, and its blocks of
keys are large enough, and loaded far enough ahead, to keep memory busy.
"""

from .configs import Config, tiles_of


def configs(chip: str, rows: int, head_dim: int, item_size: int) -> list[Config]:
    """The tiles for `rows` tokens and heads that share a key head, heads of `head_dim` channels (keys' or values')."""
    tiles = tiles_of(FP32 if item_size == 4 else HALF, chip, head_dim)
    enough = min((c.block_m for c in tiles if c.block_m >= rows), default=tiles[0].block_m)
    return [c for c in tiles if c.block_m <= enough]


def _lean(block_m: int, block_n: int, warps: int = 8, stages: int = 1, **more) -> Config:
    """A config for few registers."""
    return Config(block_m, block_n, warps, stages, hoist=False, **more)


def _mfma(block_m: int, block_n: int, stages: int, **more) -> Config:
    return Config(block_m, block_n, 4, stages, precision="ieee", **more)


_SMALL = {
    64: [Config(16, 128, 4, 3), Config(16, 64, 4, 3), Config(16, 32, 4, 2)],
    128: [Config(16, 64, 4, 3), Config(16, 32, 4, 3), Config(16, 16, 4, 2)],
    256: [Config(16, 64, 8, 2), Config(16, 32, 4, 3)],
    576: [Config(16, 32, 8, 3), Config(16, 16, 8, 2)],
    1024: [Config(16, 16, 8, 2), Config(16, 16, 8, 1)],
}
_AMPERE = {
    64: [Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 64, 8, 3), Config(32, 64, 4, 3), *_SMALL[64]],
    128: [Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2), *_SMALL[128]],
    256: [Config(64, 32, 8, 2), Config(32, 32, 8, 2), *_SMALL[256]],
    576: [Config(32, 32, 8, 2), *_SMALL[576]],
    1024: _SMALL[1024],
}
_HOPPER = {
    64: [Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 64, 8, 3), Config(32, 64, 4, 3), *_SMALL[64]],
    128: [
        Config(128, 64, 8, 3),
        Config(64, 64, 4, 3),
        Config(64, 64, 8, 3),
        Config(64, 32, 8, 3),
        Config(32, 64, 8, 3),
        *_SMALL[128],
    ],
    256: [Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2), *_SMALL[256]],
    # The compressed keys of latent attention are read once, and are its values, too.
    576: [Config(64, 64, 8, 2), Config(64, 32, 8, 3), Config(64, 32, 8, 2), Config(32, 32, 8, 2), *_SMALL[576]],
    1024: _SMALL[1024],
}
# bf16 and fp16: chip -> head size up to -> tiles.
HALF = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": {
        64: [
            _mfma(128, 64, 1),
            _mfma(64, 64, 2),
            _mfma(64, 64, 1),
            _mfma(32, 64, 2),
            _mfma(16, 64, 2),
            _mfma(16, 32, 2),
        ],
        128: [_mfma(128, 32, 1), _mfma(64, 32, 1), _mfma(32, 32, 2), _mfma(16, 64, 2), _mfma(16, 32, 2)],
        256: [_mfma(64, 32, 1), _mfma(32, 32, 1), _mfma(16, 32, 2), _mfma(16, 16, 2)],
        576: [_mfma(32, 32, 1), _mfma(16, 32, 1), _mfma(16, 16, 1, piece=128)],
        1024: [_mfma(16, 16, 1)],
    },
}
_FP32_NVIDIA = {
    64: [_lean(64, 32), _lean(32, 32), Config(16, 64, 4, 2), Config(16, 32, 4, 2)],
    128: [_lean(32, 32), Config(16, 32, 4, 2), Config(16, 32, 8, 2), Config(16, 16, 8, 2)],
    256: [_lean(16, 16, piece=64)],
    # Multiply-adds: queries in three parts for tensor cores would fill all registers.
    1024: [_lean(16, 16, piece=32, precision="ieee")],
}
FP32 = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _FP32_NVIDIA),
    "gfx942": {
        128: [_mfma(16, 32, 1, hoist=False), _mfma(16, 16, 1)],
        576: [_mfma(16, 16, 1)],
        1024: [_mfma(16, 16, 1, piece=64, hoist=False)],
    },
}
