"""A linear layer; of few rows, as decoding has them, one pass over the weight: schema, fake and the public function."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynlp.backends import get_isa
from pynlp.ops.common.checks import rows_at_one_stride, statistics
from pynlp.ops.common.library import LIBRARY, define

LEAST_PRODUCTS = 2**17  # below, to call the op takes longer than PyTorch's whole product
FEW_ROWS, MOST_ROWS = 128, 2048  # up to which ours is faster: with any instructions, and with AVX-512

define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", F.linear, F.linear)


@torch.library.register_fake("pynlp::linear", lib=LIBRARY)
def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as F.linear, which it is for all but one case.

    That case is a CPU in fp32 without gradients, up to 128 rows, or 2048 with AVX-512, and a product that is not tiny
    (2^17 terms or more): then the weight is read where it lies, each value once for 32 rows, and a row gets the same
    bits whatever the other rows and the number of threads.

    Args:
        x: `(.., K)`.
        weight: `(N, K)`.
        bias: `(N,)`.

    Returns:
        `(.., N)`.
    """
    if _served(x, weight, bias):
        return torch.ops.pynlp.linear(rows_at_one_stride(x), weight, None if bias is None else statistics(bias, x))
    return F.linear(x, weight, bias)


def _served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and LEAST_PRODUCTS <= x.numel() * weight.shape[0] <= MOST_ROWS * weight.numel()
        and (x.numel() <= FEW_ROWS * weight.shape[1] or get_isa() not in ("portable", "avx2"))
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and type(weight) in (Tensor, nn.Parameter)  # not a quantized or a sharded one
        and weight.stride(1) == 1
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias)))
    )
