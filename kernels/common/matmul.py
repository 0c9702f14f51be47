"""Products of matrices with sums in fp32."""

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32; with CUDA, of bf16 and fp16, too, by one product that reads and writes the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
