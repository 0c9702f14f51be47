"""Norms as modules, which also add their input to a residual, with dropout, in the same pass."""

import torch
from torch import Tensor, nn

from pynlp.ops.common.checks import check_share
from pynlp.ops.layers.norm import layer_norm, rms_norm


class _Norm(nn.Module):
    def __init__(
        self, dim: int, eps: float, dropout: float, device: torch.device | str | None, dtype: torch.dtype | None
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        check_share("dropout", dropout)
        self.dim, self.eps, self.dropout = dim, eps, dropout
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

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
        dropout: Share of x that is set to 0 in training before it is added to a residual; alone x stays whole.
        device, dtype: Those of the weight and the bias.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Ba et al., arXiv 1607.06450.

    Example:
        >>> import torch
        >>> from pynlp.nn import LayerNorm
        >>> norm = LayerNorm(256, dropout=0.1)
        >>> x, residual = torch.randn(2, 4, 10, 256)
        >>> y = norm(x)
        >>> y, residual = norm(x, residual)  # residual + dropout(x), and its norm
    """

    def __init__(
        self,
        dim: int,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, dropout, device, dtype)
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y `(.., dim)` of x `(.., dim)`; with a residual, in x's dtype or fp32, also residual + dropout(x)."""
        return layer_norm(x, self.weight, self.bias, **self.options(residual))


class RMSNorm(_Norm):
    """Root-mean-square normalisation of x, or of residual + dropout(x). Arguments and errors are those of `LayerNorm`.

    Source: Zhang and Sennrich, arXiv 1910.07467.

    Example:
        >>> import torch
        >>> from pynlp.nn import RMSNorm
        >>> norm = RMSNorm(256)
        >>> x, residual = torch.randn(2, 4, 10, 256)
        >>> y = norm(x)
        >>> y, residual = norm(x, residual)
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, dropout, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The result of `LayerNorm.forward`, of the same arguments."""
        return rms_norm(x, self.weight, **self.options(residual))
