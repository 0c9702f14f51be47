"""GPTQ: codes of a weight that make up for each other's errors.

The columns of a weight W (N, K) are rounded one after the other. What a column loses is made up for in those that are
not rounded yet, so that ||(W - rounded W) X||^2 stays small over inputs X (K, rows), of which H = 2 X X^T tells all.

Frantar et al., arXiv 2210.17323.
"""

import torch
from torch import Tensor

from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.ops.quantization.formats import QuantState4bit
from pynlp.reference.quantization.formats import FORMATS, QUANT_TYPES, block_scales, thresholds

COLUMNS = 128  # rounded before what they lost reaches all others


class Hessian:
    """2 X X^T / rows of a layer's inputs, of which more rows may come: `matrix` (K, K), fp32."""

    def __init__(self, columns: int, device: torch.device):
        self.matrix = torch.zeros(columns, columns, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs `(rows, K)`."""
        if len(x):
            x = x.float()
            before, self.rows = self.rows, self.rows + len(x)
            self.matrix.addmm_(x.T, x, beta=before / self.rows, alpha=2 / self.rows)


def factor_of(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper U of U^T U = (H + damping * mean(diag H) I)^-1, fp64, and the damping that it took.

    A column that is always 0 has no part in this. H is singular where there are fewer rows than columns; damping that
    does not suffice is raised.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    size = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal[dead] = size
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        turned = (hessian + damping * size * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(turned)  # H = R R^T of an upper R, and U = R^-1
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping
        damping = max(10 * damping, 1e-4)


def quantize_with(layer: QuantizedLinear, weight: Tensor, factor: Tensor, order: Tensor) -> None:
    """Gives a quantized layer the codes that GPTQ chooses. Its scales, those of the dense weight, stay as they are.

    Args:
        layer: Rounded to nearest.
        weight: Its dense weight `(N, K)`.
        factor: Of `factor_of`, `(K, K)`, its columns in the order.
        order: int64 `(K,)`, the columns in the order in which they are rounded.
    """
    grid = (FourBits if isinstance(layer.state, QuantState4bit) else Integers)(layer)
    left = weight.detach().float().T[order]  # (K, N): what each column is to be, by now
    factor = factor.float()
    codes = torch.empty_like(left, dtype=torch.uint8)
    columns = order.tolist()
    for start in range(0, len(columns), COLUMNS):
        end = min(start + COLUMNS, len(columns))
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            codes[columns[i]], values = grid.round(left[i], columns[i])
            error = errors[i - start] = (left[i] - values) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    layer._set(grid.stored(codes.T.contiguous()), layer.state)


class FourBits:
    """Codes of "nf4", "fp4" and "mxfp4" by a layer's scales."""

    def __init__(self, layer: QuantizedLinear):
        state, device = layer.state, layer.weight.device
        rows, columns = state.shape
        kind = QUANT_TYPES.index(state.quant_type)
        self.form = FORMATS[kind]
        self.thresholds = thresholds(kind).to(device)
        self.order = torch.tensor(self.form.order, dtype=torch.uint8, device=device)
        self.values = torch.tensor(self.form.codes, device=device)[self.order.int()]
        nested = state.nested_absmax, state.nested_offset, state.nested_code
        scales = block_scales(state.absmax, *nested, kind)
        self.group, self.scale = state.blocksize, scales
        if columns % state.blocksize:  # blocks straddle rows
            self.group, self.scale = 1, scales.repeat_interleave(state.blocksize)[: rows * columns]
        self.scale = self.scale.view(rows, -1)

    def round(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The codes of a column's values `(N,)`, and what they stand for."""
        scale = self.scale[:, column // self.group]
        places = torch.bucketize(torch.where(scale == 0, 0, values / scale), self.thresholds)
        return self.order[places], self.values[places] * scale

    def stored(self, codes: Tensor) -> Tensor:
        """Codes `(N, K)` as the layer has them."""
        codes = codes.flatten()
        if len(codes) % 2:  # the last half of a byte is the code of 0
            codes = torch.cat((codes, codes.new_full((1,), self.form.codes.index(0.0))))
        first, second = (codes[::2], codes[1::2]) if self.form.first_is_high else (codes[1::2], codes[::2])
        return (first << 4 | second)[:, None]


class Integers:
    """Codes of "int8" and "int4" by a layer's scales and zero points; those of 8 bits are 128 more than they are."""

    def __init__(self, layer: QuantizedLinear):
        state = layer.state
        self.is_packed = layer.weight.dtype == torch.uint8  # two codes of 4 bits a byte
        self.most, middle, first = (15, 8, 0) if self.is_packed else (255, 128, 128)
        self.group = state.group_size
        self.scale = state.scale.float().expand(len(layer.weight), -1)
        self.zero = torch.full_like(self.scale, middle)
        self.least = 1
        if state.zero_point is not None:
            self.zero, self.least = (state.zero_point.float() + first).expand_as(self.scale), 0

    def round(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The codes of a column's values `(N,)`, and what they stand for."""
        scale, zero = self.scale[:, column // self.group], self.zero[:, column // self.group]
        codes = torch.where(scale == 0, 0, values / scale).round().add(zero).clamp(self.least, self.most)
        return codes.to(torch.uint8), (codes - zero) * scale

    def stored(self, codes: Tensor) -> Tensor:
        """Codes `(N, K)` as the layer has them."""
        if not self.is_packed:
            return (codes.short() - 128).to(torch.int8)
        pairs = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(len(codes), -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4
