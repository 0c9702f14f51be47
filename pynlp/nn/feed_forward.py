"""The feed-forward layer as a module: two projections around `pynlp.functional.gelu`, `relu` or `swiglu`."""

import torch
from torch import Tensor, nn

from pynlp.nn.linear import Linear
from pynlp.ops.common.checks import check_share
from pynlp.ops.layers.activation import gelu, relu, swiglu

ACTIVATIONS = {"gelu": gelu, "relu": relu, "swiglu": swiglu}


class FeedForward(nn.Module):
    """down_proj(dropout(activation(up_proj(x)))), each token by itself.

    Args:
        embed_dim: Width of the input and the output, E.
        ffn_dim: Inner width, F.
        activation: "gelu", "relu" or "swiglu", for which `up_proj` has 2 F rows: those of the gate, then the others.
        dropout: Share of the activations that is set to 0 in training.
        bias: Whether both projections have one.
        device, dtype: Those of the weights and biases.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Vaswani et al., arXiv 1706.03762, section 3.3; gated: Shazeer, arXiv 2002.05202.

    Example:
        >>> import torch
        >>> from pynlp.nn import FeedForward
        >>> layer = FeedForward(256, 1024, activation="swiglu", dropout=0.1)
        >>> layer(torch.randn(2, 10, 256)).shape
        torch.Size([2, 10, 256])
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("ffn_dim", ffn_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        check_share("dropout", dropout)
        self.activation, self.dropout = activation, dropout
        self.up_proj = Linear(embed_dim, 2 * ffn_dim if activation == "swiglu" else ffn_dim, bias, device, dtype)
        self.down_proj = Linear(ffn_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(.., E)` of x `(.., E)`."""
        activation = ACTIVATIONS[self.activation]
        return self.down_proj(activation(self.up_proj(x), dropout_p=self.dropout if self.training else 0.0))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
