"""Norms as modules: what they normalise may be a residual and what a layer adds to it, with dropout, in one pass."""

import torch
from torch import Tensor, nn

from pynlp.ops.layers.norm import layer_norm, rms_norm


class _Norm(nn.Module):
    def __init__(self, dim: int, eps: float, dropout: float):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
        self.dim, self.eps, self.dropout = dim, eps, dropout
        self.weight = nn.Parameter(torch.ones(dim))

    def options(self, residual: Tensor | None) -> dict:
        dropped = self.dropout if self.training and residual is not None else 0.0
        return dict(residual=residual, dropout_p=dropped, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, dropout={self.dropout}"


class LayerNorm(_Norm):
    """Layer normalisation of x, or of residual + dropout(x).

    Args:
        dim: Width of x.
        bias: Whether a learned bias is added.
        eps: Added to the variance.
        dropout: Share of x that is set to 0 in training before it is added to a residual; without one nothing is.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Ba et al., arXiv 1607.06450.
    """

    def __init__(self, dim: int, *, bias: bool = True, eps: float = 1e-5, dropout: float = 0.0):
        super().__init__(dim, eps, dropout)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y `(.., dim)` of x `(.., dim)`; with a residual, in x's dtype or fp32, also residual + dropout(x)."""
        return layer_norm(x, self.weight, self.bias, **self.options(residual))


class RMSNorm(_Norm):
    """Root-mean-square normalisation of x, or of residual + dropout(x). Arguments and errors are those of `LayerNorm`.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, dropout: float = 0.0):
        super().__init__(dim, eps, dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As `LayerNorm.forward`."""
        return rms_norm(x, self.weight, **self.options(residual))
