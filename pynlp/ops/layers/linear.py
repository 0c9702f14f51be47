"""A linear layer; of few rows, as decoding has them, one pass over the weight: schema, fake and the public function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pynlp.ops.common.checks import as_fp32, is_autocast_on, is_plain, rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, is_transformed
from pynlp.reference.layers import linear as reference

LEAST_PRODUCTS = 2**17  # below, to call the op takes longer than PyTorch's whole product

define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference, triton=None, dtype_of="x")


@torch.library.register_fake("pynlp::linear", lib=LIBRARY)
def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, F.linear's result, gradients and errors.

    Where no gradient is asked for, fp32 on a CPU has a kernel of its own for few rows (up to 128, or 2048 with AVX-512)
    and 2^17 terms or more: it reads the weight where it lies, once for a panel of rows, and a row gets the same bits
    whatever the other rows and the number of threads.

    Args:
        x: `(.., K)`.
        weight: `(N, K)`.
        bias: `(N,)`.

    Returns:
        `(.., N)`.

    Example:
        >>> import torch
        >>> from pynlp.functional import linear
        >>> x, weight = torch.randn(1, 512), torch.randn(1024, 512)
        >>> torch.allclose(linear(x, weight), x @ weight.T, atol=1e-3)
        True
    """
    if _is_fused(x, weight, bias):
        return torch.ops.pynlp.linear(rows_at_one_stride(x), weight, None if bias is None else as_fp32(bias, x))
    return F.linear(x, weight, bias)


def _is_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call is the op's: fp32 on a CPU, without gradients, of arguments that fit, and not tiny.

    Anywhere else the op would be a detour to F.linear, and hide it from autograd, autocast and torch.compile. In an
    exported program, which may get other sizes, there is only F.linear.
    """
    return (
        not torch.compiler.is_exporting()
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and LEAST_PRODUCTS <= x.numel() * weight.shape[0]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and is_plain(weight)
        and weight.stride(1) == 1
        and not is_autocast_on("cpu")
        and not is_transformed()
        and not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias)))
    )
