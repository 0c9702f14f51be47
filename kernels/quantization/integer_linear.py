"""Linear layers of weights in integers of 8 or 4 bits, forward and backward: launchers.

Arguments and results are those of the functions of the same names in the reference.
"""

import math

import torch
from torch import Tensor

from ..common.launch import chip_of
from . import linear
from .integer_codes import IntegerWeight, scales_of
from .integer_configs import configs
from .integer_kernels import (
    IntegerFeatures,
    integer_few_kernel,
    integer_linear_backward_kernel,
    integer_linear_kernel,
)
from .integers import dequantize_into
from .linear_configs import FEW_ROWS, NVIDIA, Config

BLOCK = 64  # the fewest columns of a tile whose sums get a scale
KERNELS = {
    "few": integer_few_kernel, "forward": integer_linear_kernel, "backward": integer_linear_backward_kernel,
}  # fmt: skip


def integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """x weight^T + bias, (.., N)."""
    out = torch.empty((*x.shape[:-1], codes.shape[0]), dtype=x.dtype, device=x.device)
    multiply(out, x, IntegerWeight(codes, scale, zero_point, minimum), bias, group)
    return out


def integer_linear_backward(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    columns: int,
    group: int,
) -> Tensor:
    """The gradient of x: grad weight, (.., K)."""
    outputs = grad.shape[-1]
    out = torch.empty((*grad.shape[:-1], columns), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0 or outputs == 0:
        return out.zero_()
    shape = out.numel() // columns, outputs, columns
    _product("backward", out, grad, IntegerWeight(codes, scale, zero_point, minimum), None, shape, group)
    return out


def multiply(out: Tensor, x: Tensor, weight: IntegerWeight, bias: Tensor | None, group: int) -> None:
    """Overwrites out (.., N), whose dtype may be another than x's, by x weight^T + bias."""
    outputs, columns = out.shape[-1], x.shape[-1]
    if out.numel() == 0:
        return
    if columns == 0:
        out.zero_() if bias is None else out.copy_(bias)
        return
    rows = out.numel() // outputs
    if rows >= linear.DENSE_ROWS and x.element_size() == 2:
        linear.dense_product(out, x, bias, 1, lambda own, first: dequantize_into(own, weight, first, group))
        return
    in_pieces = columns % weight.piece == 0 and (group >= columns or group % weight.piece == 0)
    kernel = "few" if rows <= FEW_ROWS and in_pieces else "forward"
    _product(kernel, out, x, weight, bias, (rows, outputs, columns), group)


def _product(
    kernel: str,
    out: Tensor,
    x: Tensor,
    weight: IntegerWeight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    group: int,
) -> None:
    """Starts a kernel of products with rows, outputs and columns of a shape; backward x is the gradient."""
    rows, _, columns = shape
    unit = math.gcd(weight.piece, columns)
    scales = scales_of(weight, columns, group)
    chip = chip_of(x)

    def fit(config: Config) -> Config:
        if kernel == "few":
            return linear.for_few(config, rows, columns)
        block = math.gcd(scales.GROUP, config.block_k)
        return config._replace(block_k=block) if kernel == "forward" and block >= BLOCK else config

    def features(config: Config, cut: dict) -> IntegerFeatures:
        width = weight.piece if kernel == "few" else math.gcd(scales.GROUP, config.block_k)
        scaled = "rows" if scales.GROUP == 0 else "blocks" if width == config.block_k else "weights"
        if kernel == "backward" or scales.MINIMUM:
            scaled = "weights"
        return IntegerFeatures(W=scales, WIDTH=width, SCALED=scaled, PTX=chip in NVIDIA, **cut)

    candidates = configs(kernel, chip, rows, x.element_size(), unit < weight.piece)
    key = *scales, weight.scale.dtype
    name = f"integer_linear {kernel}"
    linear.start_product(name, KERNELS[kernel], out, x, weight, bias, shape, unit, candidates, key, features, fit)
