"""Linear layers of weights in integers by x that is rounded to 8 bits on the fly: the launcher.

Arguments and result are those of the function of the same name in the reference.
"""

import math

import torch
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launch import chip_of, launch
from ..common.rows import row_strides
from . import linear
from .integer_codes import IntegerWeight, scales_of
from .integer_configs import configs
from .integer_kernels import IntegerFeatures
from .integer_linear import BLOCK, multiply
from .linear_configs import FEW_ROWS, NVIDIA, Config
from .rounded_kernels import RoundedRows, mark_kernel, places_kernel, round_kernel, rounded_linear_kernel

EXACT = 2**16  # columns: products of codes by differences of codes and zeros, at most 127 x 255, sum up in 32 bits
MARKED, LISTED, ROUNDED = 32, 1024, 4096  # columns of a program


def dynamic_integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group: int,
    x_group: int,
    outlier_threshold: float,
) -> Tensor:
    """x weight^T + bias, (.., N), with x rounded to 8 bits.

    One row, rows with more scales than one, and weights whose groups fill no block go as values in fp32.
    """
    outputs, columns = codes.shape[0], x.shape[-1]
    weight = IntegerWeight(codes, scale, zero_point, minimum)
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or columns == 0:
        multiply(out, x, weight, bias, group)
        return out
    rows = out.numel() // outputs
    scales = scales_of(weight, columns, group)
    align, (stride,) = row_strides(x)
    mark = places = count = None
    if outlier_threshold < math.inf:
        mark = torch.empty((columns,), dtype=torch.uint8, device=x.device)
        launch(
            mark_kernel, (cdiv(columns, MARKED),), x, mark, stride, rows, columns, outlier_threshold,
            ALIGN=align, ROWS=64, COLUMNS=MARKED, num_warps=4,
        )  # fmt: skip
    as_values = rows <= FEW_ROWS or x_group > 0 or columns > EXACT or scales.GROUP % BLOCK > 0
    near = x_codes = x_scale = x_sums = None
    pitch = cdiv(columns, 16) * 16
    if as_values:
        near = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
    else:
        x_codes = torch.empty((rows, pitch), dtype=torch.int8, device=x.device)
        x_scale = torch.empty((rows,), dtype=torch.float32, device=x.device)
        x_sums = torch.empty((rows,), dtype=torch.int32, device=x.device)
    launch(
        round_kernel, (rows,), x, mark, x_codes, x_scale, x_sums, near, stride, columns, pitch,
        GROUP=x_group, OUTLIERS=mark is not None, ALIGN=align, BLOCK=min(ROUNDED, max(32, next_power_of_2(columns))),
        num_warps=4,
    )  # fmt: skip
    if as_values:
        multiply(out, near, weight, bias, group)
        return out
    if mark is not None:
        places = torch.empty((columns,), dtype=torch.int32, device=x.device)
        count = torch.empty((1,), dtype=torch.int32, device=x.device)
        launch(places_kernel, (1,), mark, places, count, columns, BLOCK=LISTED, num_warps=4)
    rounded = RoundedRows(x_scale, x_sums, x, stride * align, places, count)
    _product(out, x_codes, rounded, weight, bias, (rows, outputs, columns), group)
    return out


def _product(
    out: Tensor,
    x_codes: Tensor,
    rounded: RoundedRows,
    weight: IntegerWeight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    group: int,
) -> None:
    rows, _, columns = shape
    unit = math.gcd(weight.piece, columns)
    scales = scales_of(weight, columns, group)
    chip = chip_of(x_codes)

    def fit(config: Config) -> Config:
        return config._replace(block_k=math.gcd(scales.GROUP, config.block_k))

    def features(config: Config, cut: dict) -> IntegerFeatures:
        return IntegerFeatures(
            W=scales,
            WIDTH=config.block_k,
            SCALED="blocks" if scales.GROUP else "rows",
            PTX=chip in NVIDIA,
            OUTLIERS=rounded.places is not None,
            **cut | dict(PRECISION=config.precision),
        )

    candidates = configs("rounded", chip, rows, 1, unit < weight.piece)
    key = *scales, weight.scale.dtype, rounded.x.dtype, rounded.places is not None
    linear.start_product(
        "rounded_linear", rounded_linear_kernel, out, x_codes, weight, bias, shape, unit, candidates, key, features,
        fit, (rounded,),
    )  # fmt: skip
