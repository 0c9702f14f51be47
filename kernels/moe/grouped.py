"""Products of groups of rows with matrices of their own: launchers.

Arguments and results are those of the functions of the same names in the reference.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..common.integers import cdiv, next_power_of_2, tile_width
from ..common.launch import chip_of, choose, launch
from ..common.rows import row_strides
from .blocks import GroupedFeatures, Matrices, Rows
from .configs import Config, configs, neighbours
from .grouped_kernels import GradientFeatures, bias_gradient_kernel, grouped_kernel, weight_gradient_kernel

SUMMED = 32, 64  # rows and columns that a program of sums over rows takes at once


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x weight[e] + bias[e] for the rows of each group e, (M, N)."""
    out = torch.empty((x.shape[0], weight.shape[2]), dtype=x.dtype, device=x.device)
    if weight.shape[0] == 0:
        return out.zero_()
    start_product(x, None, 1, weight.mT, offsets, bias, out, tail=True)
    return out


def grouped_mm_weight_backward(
    grad: Tensor, x: Tensor, offsets: Tensor, outputs_are_lines: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and of the bias."""
    weight = weight_gradient(*((grad, x) if outputs_are_lines else (x, grad)), None, (False, False), 1, offsets)
    bias = torch.empty((len(offsets), grad.shape[1]) if needs_bias else (0,), dtype=torch.float32, device=x.device)
    if needs_bias:
        bias_gradient(grad, None, None, 1, offsets, bias)
    return weight, bias


def is_by_lines(weight: Tensor) -> bool:
    """Whether the last dimension of (E, outputs, inputs) is the contiguous one; the same as in the reference."""
    return weight.stride(2) == 1 or weight.shape[2] == 1 or weight.stride(1) != 1


def matrices(weight: Tensor) -> tuple[Matrices, bool, int]:
    """(E, outputs, inputs) for a kernel, whether inputs are contiguous, and what strides are multiples of."""
    by_lines = is_by_lines(weight)
    strides = weight.stride(0), weight.stride(1 if by_lines else 2)
    align = math.gcd(16, *strides)
    return Matrices(weight, *(stride // align for stride in strides)), by_lines, align


def start_product(
    x: Tensor,
    permutation: Tensor | None,
    top_k: int,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tail: bool = False,
) -> None:
    """out (rows, outputs) = x weight[e]^T + bias[e]; x are rows, or tokens of which slots are taken."""
    if out.numel() == 0:
        return
    experts, outputs, inputs = weight.shape

    def start(own: tuple, config: Config, features: GroupedFeatures, **options) -> CompiledKernel | None:
        return launch(
            grouped_kernel, (programs(len(out), experts, outputs, config, tail),),
            *own, bias, out, offsets, len(out), inputs, outputs, experts, features, **options,
        )  # fmt: skip

    start_grouped(
        "product", start, x, permutation, top_k, weight, len(out), outputs, HAS_BIAS=bias is not None, TAIL=tail
    )


def programs(rows: int, experts: int, outputs: int, config: Config, tail: bool = False) -> int:
    """The most programs that blocks of rows and tiles of outputs can need, whatever rows the experts have."""
    blocks = rows // config.block_m + min(experts + tail, rows)
    return cdiv(blocks, config.group_m) * config.group_m * cdiv(outputs, config.block_n)


def start_grouped(
    kind: str,
    start: Callable,
    x: Tensor,
    permutation: Tensor | None,
    top_k: int,
    weight: Tensor,
    rows: int,
    width: int,
    name: str | None = None,
    **constants,
) -> None:
    """Chooses a config and starts a kernel by `start((rows of x, matrices), config, features, ..)`.

    width: Outputs, or units of outputs, that tiles cover.
    name: By which the choice is kept, where a kind has several kernels.
    """
    experts, outputs, inputs = weight.shape
    own, by_lines, align_w = matrices(weight)
    align, (stride,) = row_strides(x)
    features = dict(
        GATHERED=permutation is not None, TOP_K=top_k, BY_LINES=by_lines, ALIGN=align, ALIGN_W=align_w,
        GROUPS=max(2, next_power_of_2(experts + 1)), LONG=x.shape[0] * stride * align >= 2**31,
        LONG_W=(outputs if by_lines else 128) * own.line_stride * align_w >= 2**31,
    )  # fmt: skip
    constants = dict(ACTIVATION="", INTERLEAVED=False, HAS_BIAS=False, KEEPS=False, TAIL=False) | constants

    def begin(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        tile = GroupedFeatures(
            **features, **constants, EVEN_K=inputs % config.block_k == 0,
            EVEN_N=width % config.block_n == 0, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
            PRECISION=config.precision if x.dtype == torch.float32 else None, STAGES=config.num_stages,
        )  # fmt: skip
        return start(
            (Rows(x, stride, permutation), own), config, tile,
            compile_only=compile_only, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    candidates = configs(kind, chip_of(x), max(1, rows // max(1, experts)), x.element_size())
    key = (
        chip_of(x),
        x.dtype,
        x.device,
        *features.values(),
        *constants.values(),
        inputs & -inputs & 0xFF,
        width & -width & 0xFF,
    )
    begin(choose(f"moe {name or kind}", x.device, candidates, key, (rows, outputs, inputs), begin, neighbours))


def weight_gradient(
    lines: Tensor, columns: Tensor, permutation: Tensor | None, gathered: tuple[bool, bool], top_k: int, offsets: Tensor
) -> Tensor:
    """(E, lines, columns): the sums over each group's rows of products of the two; either may be of tokens."""
    out = torch.empty((len(offsets), lines.shape[1], columns.shape[1]), dtype=lines.dtype, device=lines.device)
    if out.numel() == 0:
        return out
    align, strides = row_strides(lines, columns)
    rows = lines.shape[0] if permutation is None else permutation.shape[0]
    is_long = any(x.numel() and x.shape[0] * x.stride(0) >= 2**31 for x in (lines, columns))
    sides = [Rows(x, stride, permutation) for x, stride in zip((lines, columns), strides, strict=True)]

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        features = GradientFeatures(
            *gathered, top_k, align, is_long, out.shape[1] % config.block_m == 0, out.shape[2] % config.block_n == 0,
            config.block_m, config.block_n, config.block_k, config.precision if lines.dtype == torch.float32 else None,
            config.num_stages,
        )  # fmt: skip
        grid = (len(offsets) * cdiv(out.shape[1], config.block_m) * cdiv(out.shape[2], config.block_n),)
        return launch(
            weight_gradient_kernel, grid, *sides, out, offsets, rows, *out.shape[1:], features,
            compile_only=compile_only, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    candidates = configs("gradient", chip_of(lines), 0, lines.element_size())
    even = [size & -size & 0xFF for size in out.shape[1:]]
    key = chip_of(lines), lines.dtype, lines.device, *gathered, top_k, align, is_long, *even
    start(choose("moe gradient", lines.device, candidates, key, tuple(out.shape), start, neighbours))
    return out


def bias_gradient(
    grad: Tensor, permutation: Tensor | None, weights: Tensor | None, top_k: int, offsets: Tensor, out: Tensor
) -> None:
    """out (E, columns) = the sums of each group's rows; with weights those of its slots' tokens, weighted."""
    if out.numel() == 0:
        return
    align, (stride,) = row_strides(grad)
    block, columns = SUMMED[0], min(SUMMED[1], tile_width(out.shape[1]))
    rows = grad.shape[0] if permutation is None else permutation.shape[0]
    launch(
        bias_gradient_kernel, (len(offsets), cdiv(out.shape[1], columns)),
        Rows(grad, stride, permutation), weights, out, offsets, rows, out.shape[1],
        WEIGHTED=weights is not None, TOP_K=top_k, ALIGN=align, BLOCK_M=block, BLOCK_N=columns, num_warps=4,
    )  # fmt: skip
