"""The tiles of each attention kernel on each chip, best first: a launcher takes the first that fits without a spill."""

from collections.abc import Iterator
from typing import NamedTuple

LARGEST_BLOCK = 128  # the largest that measurements try


class Config(NamedTuple):
    """The launch of a kernel: its tile (queries x keys), warps, pipeline stages, and whether it may use TMA.

    Masked blocks have `masked` columns (keys; in the kernel of k and v queries) instead: they need more registers.
    Without `hoist` the loops compute their constants anew, for the same reason. Heads are cut into pieces of `piece`
    channels. `precision` is how fp32 is multiplied: tf32x3 in three parts on tensor cores, ieee by multiply-adds, which
    hold whole rows of a piece in registers. With `registers` the compiler of NVIDIA's chips uses up to so many, where
    it would rather spill a little and run more blocks at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    masked: int = 0
    hoist: bool = True
    precision: str = "tf32x3"
    piece: int = 256
    registers: int = 0

    def options(self) -> dict[str, int]:
        """The options that Triton takes at a launch."""
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages)
        return options | dict(maxnreg=self.registers) if self.registers else options


def neighbours(config: Config, square: bool = False) -> Iterator[Config]:
    """The configs that differ in one step of one thing, which a search for the fastest tries next.

    A `square` tile stays so.
    """

    def block(size: int) -> int:
        return max(16, min(size, LARGEST_BLOCK))

    for factor in (0.5, 2):
        m, n = block(int(config.block_m * factor)), block(int(config.block_n * factor))
        shapes = [(m, n)] if square else [(m, config.block_n), (config.block_m, n)]
        for block_m, block_n in shapes:
            masked = min(config.masked, block_m, block_n)
            yield config._replace(block_m=block_m, block_n=block_n, masked=masked)
    yield config._replace(num_warps=12 - config.num_warps)  # 4 or 8
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 4:
            yield config._replace(num_stages=stages)


def tiles_of(tables: dict[str, dict[int, list[Config]]], chip: str, head_dim: int) -> list[Config]:
    """The tiles for the smallest head size that is at least `head_dim`; one small tile in the interpreter.

    `tables`: chip -> head size -> tiles.
    """
    if chip == "interpreter":
        return [Config(16, 16, 1, 1, precision="ieee")]
    sizes = tables[chip]
    return sizes[min(size for size in sizes if size >= head_dim)]


def configs(kernel: str, chip: str, head_dim: int, item_size: int) -> list[Config]:
    """The tiles of a kernel: forward, keys, queries, table (queries with T5's gradient, in square tiles) or weights."""
    return tiles_of((FP32 if item_size == 4 else HALF)[kernel], chip, head_dim)


def _small(block_m: int, block_n: int, warps: int = 8, masked: int = 16, piece: int = 256) -> Config:
    return Config(block_m, block_n, warps, 1, False, masked, False, piece=piece)


def _multiply_adds(block_m: int, block_n: int, masked: int = 16, piece: int = 16, registers: int = 255) -> Config:
    return Config(block_m, block_n, 8, 1, False, masked, False, "ieee", piece, registers)


def _mfma(block_m: int, block_n: int, warps: int = 4, masked: int = 16, piece: int = 256) -> Config:
    return Config(block_m, block_n, warps, 1, False, masked, False, "ieee", piece)


_SQUARE = [_small(32, 32, masked=0), _small(16, 16, 4, masked=0, piece=64), _small(16, 16, masked=0)]
_HOPPER_FORWARD = [
    Config(128, 128, 8, 2, True, 64),
    Config(128, 128, 8, 2, True, 32),
    Config(128, 64, 8, 2, True, 32, False),
    Config(128, 32, 8, 2, True, 32, False),
    Config(128, 32, 8, 1, True, 16, False),
    _small(64, 32),
]
# bf16 and fp16: kernel -> chip -> head size up to -> tiles.
HALF = {
    "forward": {
        "sm_80": {
            64: [
                Config(128, 128, 8, 2, False, 64),
                Config(128, 128, 8, 2, False, 32, False),
                Config(128, 64, 8, 2, False, 32, False),
                Config(128, 64, 8, 1, False, 32, False),
                _small(64, 32),
            ],
            128: [
                Config(128, 64, 8, 2, False, 32),
                Config(128, 64, 8, 1, False, 32, False),
                Config(64, 64, 8, 1, False, 32, False),
                _small(64, 32),
            ],
            256: [
                Config(64, 32, 8, 2, False, 16),
                _small(32, 32)._replace(registers=255),
                _small(16, 32, 4),
            ],
        },
        "sm_90": {128: _HOPPER_FORWARD, 256: [Config(128, 64, 8, 2, True, 32), *_HOPPER_FORWARD[3:]]},
        "sm_100": {128: _HOPPER_FORWARD, 256: [Config(128, 64, 8, 2, True, 32), *_HOPPER_FORWARD[3:]]},
        "gfx942": {
            128: [Config(128, 64, 4, 2, False, 32), Config(128, 64, 4, 1, False, 32), _small(64, 32, 4)],
            256: [_small(64, 32, 4), _small(32, 32, 4)],
        },
    },
    "queries": {
        "sm_80": {
            64: [
                Config(128, 64, 8, 2, False, 32),
                Config(128, 64, 8, 1, False, 32, False),
                _small(128, 64),
                _small(64, 32),
            ],
            128: [Config(64, 64, 8, 2, False, 32, False), _small(64, 32), _small(32, 32), _small(16, 16, 4)],
            256: [_small(64, 32), _small(32, 32, piece=64), _small(16, 16, 4, piece=64)],
        },
        "sm_90": {
            64: [Config(128, 128, 8, 2, True, 64, False), Config(128, 64, 8, 2, True, 32, False), _small(64, 32)],
            128: [
                Config(128, 64, 8, 2, True, 32),
                Config(128, 64, 8, 2, True, 32, False),
                _small(64, 32),
                _small(32, 32),
            ],
            256: [
                Config(128, 32, 8, 2, True, 32, False),
                Config(64, 64, 8, 1, True, 32, False),
                _small(64, 32),
                _small(32, 32, piece=64),
                _small(16, 16, 4, piece=64),
            ],
        },
        "gfx942": {
            64: [Config(128, 64, 4, 1, False, 32), _small(64, 32, 4)],
            128: [Config(64, 32, 4, 1), _small(32, 32, 4)],
            256: [Config(32, 32, 4, 1), _small(16, 16, 4)],
        },
    },
    "table": {
        "sm_80": {128: [_small(64, 64, masked=0), *_SQUARE], 256: _SQUARE},
        "sm_90": {256: [Config(64, 64, 8, 1, True, 0, False), *_SQUARE]},
        "gfx942": {256: [_small(32, 32, 4, masked=0), _small(16, 16, 4, masked=0)]},
    },
    "keys": {
        "sm_80": {
            64: [
                Config(64, 128, 8, 2, False, 32),
                Config(64, 128, 8, 1, False, 32, False),
                Config(64, 64, 8, 1, False, 32, False),
                _small(32, 64, piece=64),
                _small(32, 64, piece=32),
                _small(32, 64, 4),
                _small(32, 16, 4),
            ],
            128: [Config(64, 64, 8, 2, False, 32), _small(64, 64), _small(32, 32), _small(32, 16)],
            256: [_small(32, 32, 4), _small(32, 16), _small(32, 16, piece=64)],
        },
        "sm_90": {
            64: [Config(64, 128, 8, 2, True, 32), Config(32, 128, 8, 1, True, 16, False), _small(32, 64)],
            128: [
                Config(64, 128, 8, 2, True, 16, False),
                Config(32, 128, 8, 1, True, 16, False),
                _small(32, 64),
                _small(32, 16),
            ],
            256: [Config(64, 64, 8, 1, True, 16, False), _small(32, 64, piece=64), _small(32, 16), _small(16, 16)],
        },
        "sm_100": {
            128: [
                Config(64, 128, 8, 2, True, 32),
                Config(64, 128, 8, 2, True, 32, False),
                Config(64, 128, 8, 1, True, 32, False),
                Config(32, 128, 8, 1, True, 16, False),
                _small(32, 16),
            ],
            256: [Config(64, 64, 8, 1, True, 32), _small(32, 64, piece=64), _small(32, 16), _small(16, 16)],
        },
        "gfx942": {
            64: [Config(32, 128, 4, 1), Config(32, 64, 4, 1), _small(32, 32, 4)],
            128: [Config(32, 64, 4, 1), _small(32, 32, 4)],
            256: [Config(32, 32, 4, 1), _small(16, 16, 4)],
        },
    },
}
for _kernel in ("queries", "table"):
    HALF[_kernel]["sm_100"] = HALF[_kernel]["sm_90"]
_WEIGHTS = [Config(64, 64, 8, 1), Config(32, 32, 8, 1, piece=64), Config(16, 16, 4, 1, piece=32)]
HALF["weights"] = dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), {256: _WEIGHTS})

# Left alone, the compiler for sm_100 spills less here than with all registers.
_FEW_REGISTERS = [
    _multiply_adds(32, 32),
    _multiply_adds(32, 32, registers=0),
    _multiply_adds(16, 16, registers=0),
    _multiply_adds(16, 16, piece=32, registers=0),
]
_WIDE = [
    _multiply_adds(16, 16, piece=32),
    _multiply_adds(16, 16, piece=64, registers=0),
    _multiply_adds(16, 16, registers=0),
]
_FP32_NVIDIA = {
    "forward": {
        64: [Config(64, 32, 4, 1, False, 16, False), _multiply_adds(64, 32), _multiply_adds(32, 32)],
        128: [_multiply_adds(64, 32), _multiply_adds(32, 32)],
        256: [_multiply_adds(32, 16, piece=32), *_WIDE],
    },
    "queries": {
        64: [Config(64, 32, 4, 1, False, 16, False), *_FEW_REGISTERS],
        128: _FEW_REGISTERS,
        256: _WIDE,
    },
    "table": {
        128: [config._replace(masked=0) for config in _FEW_REGISTERS],
        256: [config._replace(masked=0) for config in _WIDE],
    },
    "keys": {
        # Four warps: of tf32x3 products of 64 x 16 in eight of them Triton 3.6 makes wrong code, seen on an H100.
        64: [Config(16, 64, 4, 1, False, 16, False), _multiply_adds(32, 16), _multiply_adds(16, 16)],
        128: [_multiply_adds(32, 16), _multiply_adds(16, 16)],
        256: _WIDE,
    },
    "weights": {256: [Config(16, 32, 4, 1, piece=64), Config(16, 16, 4, 1, piece=32)]},
}
_FP32_AMD = {
    "forward": {64: [_mfma(64, 32), _mfma(32, 32)], 256: [_mfma(32, 32), _mfma(16, 32)]},
    "queries": {
        64: [_mfma(64, 32), _mfma(32, 32)],
        128: [_mfma(32, 32), _mfma(16, 16)],
        256: [_mfma(16, 16, piece=64)],
    },
    "table": {128: [_mfma(32, 32, masked=0), _mfma(16, 16, masked=0)], 256: [_mfma(16, 16, masked=0, piece=64)]},
    "keys": {64: [_mfma(32, 64, 8), _mfma(16, 32)], 256: [_mfma(16, 32), _mfma(16, 16)]},
    "weights": {256: [config._replace(precision="ieee") for config in _FP32_NVIDIA["weights"][256]]},
}
FP32 = {
    kernel: {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), sizes), "gfx942": _FP32_AMD[kernel]}
    for kernel, sizes in _FP32_NVIDIA.items()
}
