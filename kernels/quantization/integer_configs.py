"""The tiles of products with weights of integers on each chip, best first; what they are is in linear_configs."""

from .linear_configs import FP32, RAGGED, Config, for_rows
from .linear_configs import HALF as FOUR_BIT

_ROUNDED = [
    Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 128, 4, 3),
    Config(64, 128, 64, 4, 3),
    Config(32, 128, 128, 4, 3),
    Config(16, 128, 128, 4, 3),
    Config(16, 128, 64, 4, 2),
]
_SM_80 = {
    "few": FOUR_BIT["sm_90"]["few"],
    "forward": [
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 128, 64, 8, 3),
        Config(32, 128, 64, 4, 3),
        Config(16, 128, 128, 4, 3),
        Config(16, 128, 64, 4, 3),
    ],
    "backward": FOUR_BIT["sm_80"]["backward"],
    "rounded": _ROUNDED,
}
_SM_90 = {
    "few": FOUR_BIT["sm_90"]["few"],
    "forward": [
        Config(128, 128, 64, 8, 3),
        Config(64, 256, 64, 4, 3),
        Config(64, 128, 128, 4, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 128, 64, 8, 3),
        Config(32, 128, 128, 4, 3),
        Config(32, 128, 64, 4, 3),
        Config(16, 128, 128, 4, 3),
        Config(16, 128, 64, 4, 3),
    ],
    "backward": FOUR_BIT["sm_90"]["backward"],
    "rounded": _ROUNDED,
}


def _with_rounded(tables: dict[str, list[Config]]) -> dict[str, list[Config]]:
    return tables | {"rounded": tables["forward"]}


HALF = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": _SM_90,
    "gfx942": _with_rounded(FOUR_BIT["gfx942"]),
    "interpreter": _with_rounded(FOUR_BIT["interpreter"]),
}


def configs(kernel: str, chip: str, rows: int, item_size: int, ragged: bool) -> list[Config]:
    """The tiles of a kernel, few, forward, backward or rounded, for so many rows: none has many more.

    ragged: The weight's rows of codes do not start at multiples of 16 bytes.
    """
    tables = RAGGED if ragged else FP32 if item_size == 4 else HALF
    return for_rows(tables[chip]["forward" if ragged and kernel == "rounded" else kernel], rows)
