"""The dtypes that ops compute in, and keep biases, tables and statistics in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for x in fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compute(x: Tensor) -> Tensor:
    """x in its compute dtype."""
    return x if x.dtype == torch.float64 else x.float()
