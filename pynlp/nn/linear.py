"""The linear layer as a module."""

from torch import Tensor, nn

from pynlp.ops.layers.linear import linear


class Linear(nn.Linear):
    """nn.Linear with its arguments, parameters and results, and `pynlp.functional.linear`'s speed when decoding.

    Example:
        >>> import torch
        >>> from pynlp.nn import Linear
        >>> Linear(256, 1000, bias=False)(torch.randn(2, 256)).shape
        torch.Size([2, 1000])
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`."""
        return linear(x, self.weight, self.bias)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the linear layer of transformers' GPT-2, of a weight (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and layer.weight.dim() == 2
