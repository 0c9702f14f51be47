"""Linear layers of 4-bit weights, forward and backward: launchers.

Arguments and results are those of the functions of the same names in the reference.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..common.integers import cdiv
from ..common.launch import chip_of, choose, launch
from ..common.rows import row_strides
from .codes import KINDS, SMALLEST, Weight
from .formats import dequantize_into
from .linear_configs import DENSE_BYTES, DENSE_ROWS, FEW_ROWS, LEAST, PROGRAMS, Config, configs, neighbours
from .linear_kernels import (
    LinearFeatures,
    linear_backward_kernel,
    linear_combine_kernel,
    linear_few_kernel,
    linear_kernel,
)

NARROW = (torch.bfloat16,)  # dtypes whose products take codes of 8 significant bits
COMBINED = 512  # values of a program
KERNELS = {"few": linear_few_kernel, "forward": linear_kernel, "backward": linear_backward_kernel}


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    blocksize: int,
    quant_type: int,
) -> Tensor:
    """x weight^T + bias, (.., outputs)."""
    columns = x.shape[-1]
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if columns == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    weight = Weight(packed, absmax, nested_absmax, nested_offset, nested_code)
    rows = out.numel() // outputs
    if rows >= DENSE_ROWS and x.element_size() == 2:
        # A multiple of 32 values lies before each chunk.
        dense_product(out, x, bias, SMALLEST.value, lambda own, first: dequantize_into(
            own, weight, first * columns, blocksize, quant_type
        ))  # fmt: skip
    else:
        few = rows <= FEW_ROWS and columns % blocksize == 0
        shape = rows, outputs, columns
        _product("few" if few else "forward", out, x, weight, bias, shape, blocksize, quant_type)
    return out


def linear_4bit_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
    columns: int,
    blocksize: int,
    quant_type: int,
) -> Tensor:
    """The gradient of x: grad weight, (.., columns)."""
    outputs = grad.shape[-1]
    out = torch.empty((*grad.shape[:-1], columns), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0 or outputs == 0:
        return out.zero_()
    weight = Weight(packed, absmax, nested_absmax, nested_offset, nested_code)
    shape = out.numel() // columns, outputs, columns
    _product("backward", out, grad, weight, None, shape, blocksize, quant_type)
    return out


def _product(
    kernel: str,
    out: Tensor,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    blocksize: int,
    quant_type: int,
) -> None:
    """Starts a kernel of products with rows, outputs and columns of a shape; backward x is the gradient."""
    rows, _, columns = shape
    unit = SMALLEST.value if columns % blocksize == 0 else 1
    nested = weight.nested_absmax is not None

    def features(config: Config, cut: dict) -> LinearFeatures:
        own = dict(KIND=KINDS[quant_type], BLOCKSIZE=blocksize, NESTED=nested, NARROW=x.dtype in NARROW)
        return LinearFeatures(**own, OPAQUE=config.opaque, **cut)

    def fit(config: Config) -> Config:
        return for_few(config, rows, columns) if kernel == "few" else config

    candidates = configs(kernel, chip_of(x), rows, x.element_size(), unit == 1)
    key = quant_type, blocksize, nested
    name = f"linear_4bit {kernel}"
    start_product(name, KERNELS[kernel], out, x, weight, bias, shape, unit, candidates, key, features, fit)


def dense_product(out: Tensor, x: Tensor, bias: Tensor | None, unit: int, fill: Callable[[Tensor, int], None]) -> None:
    """The product with a weight in x's dtype, of which as many rows exist at once as fit DENSE_BYTES.

    fill: Overwrites a tensor by the weight's rows from a number on, which is a multiple of `unit`.
    """
    outputs, columns = out.shape[-1], x.shape[-1]
    rows, results = x.reshape(-1, columns), out.view(-1, outputs)
    bias = None if bias is None else bias.to(x.dtype)
    size = max(1, DENSE_BYTES // (columns * x.element_size() * unit)) * unit
    chunk = torch.empty((min(size, outputs), columns), dtype=x.dtype, device=x.device)
    for first in range(0, outputs, size):
        own = chunk[: outputs - first]
        fill(own, first)
        result = results[:, first : first + size]
        if bias is None:
            torch.mm(rows, own.T, out=result)
        else:
            torch.addmm(bias[first : first + size], rows, own.T, out=result)


def start_product(
    name: str,
    kernel: Callable,
    out: Tensor,
    x: Tensor,
    weight: tuple,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    unit: int,
    candidates: list[Config],
    key: tuple,
    features: Callable[[Config, dict], NamedTuple],
    fit: Callable[[Config], Config] = lambda config: config,
    more: tuple = (),
) -> None:
    """Starts a product's kernel, and where its sums are cut into parts the one that adds them up.

    Args:
        name: Of the product; it ends with "backward" where x is the gradient and rows of the weight are summed over.
        weight: Its tensors, as the kernel takes them; `more`: those that belong to x.
        shape: Rows, outputs and columns.
        unit: Columns are given in multiples of it.
        key: All that the machine code depends on besides x, the bias and the shape.
        features: The kernel's constants, of a config and of those that all products share.
        fit: What becomes of a config for this shape.
    """
    rows, outputs, columns = shape
    align, (stride,) = row_strides(x)
    is_backward = name.endswith("backward")

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        config = fit(config)
        splits = _splits(is_backward, shape, config, _multiprocessors(x.device))
        cut = dict(
            HAS_BIAS=bias is not None,
            SPLIT=splits > 1,
            UNIT=unit,
            ALIGN=align,
            LONG=config.block_m * stride * align >= 2**31,
            EVEN_N=outputs % config.block_n == 0,
            EVEN_K=columns % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PRECISION=config.precision if x.dtype == torch.float32 else None,
            STAGES=config.num_stages,
        )
        sums = out
        if splits > 1:
            sums = torch.empty((splits, rows, out.shape[-1]), dtype=torch.float32, device=x.device)
        compiled = launch(
            kernel, (_tiles(is_backward, shape, config) * splits,),
            x, *more, weight, bias, sums, stride, rows, outputs, columns // unit, splits, features(config, cut),
            compile_only=compile_only, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if compile_only:
            return compiled
        if splits > 1:
            launch(
                linear_combine_kernel, (cdiv(out.numel(), COMBINED),),
                sums, bias, out, out.numel(), out.shape[-1], splits, HAS_BIAS=bias is not None, BLOCK=COMBINED,
                num_warps=4,
            )  # fmt: skip

    key = (chip_of(x), x.dtype, out.dtype, x.device, *key, bias is not None, unit, align, *_remainders(shape))
    start(choose(name, x.device, candidates, key, shape, start, neighbours))


def for_few(config: Config, rows: int, columns: int) -> Config:
    """The config for all rows at once, and of blocks that columns fill, if these are multiples of 256."""
    block_n, block_k = config.block_n, config.block_k
    while columns % block_k and block_k > 256:
        block_n, block_k = block_n * 2, block_k // 2
    return config._replace(block_m=rows, block_n=block_n, block_k=block_k)


def _remainders(shape: tuple[int, int, int]) -> tuple[int, int]:
    """What the machine code depends on of a weight's shape: up to a tile's size its powers of 2."""
    _, outputs, columns = shape
    return outputs & -outputs & 0xFFF, columns & -columns & 0xFFF


def _tiles(is_backward: bool, shape: tuple[int, int, int], config: Config) -> int:
    """The number of tiles of a result."""
    rows, outputs, columns = shape
    result = cdiv(columns, config.block_k) if is_backward else cdiv(outputs, config.block_n)
    return cdiv(rows, config.block_m) * result


def _splits(is_backward: bool, shape: tuple[int, int, int], config: Config, processors: int) -> int:
    """The number of parts that sums are cut into; none is empty."""
    _, outputs, columns = shape
    products, block = (outputs, config.block_n) if is_backward else (columns, config.block_k)
    blocks, least = cdiv(products, block), cdiv(LEAST, block)
    splits = max(1, min(cdiv(PROGRAMS * processors, _tiles(is_backward, shape, config)), blocks // least))
    return cdiv(blocks, cdiv(blocks, splits))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
