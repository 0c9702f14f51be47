"""The dtypes that quantized values are read back in."""

import torch

from pynlp.ops.common.checks import DTYPES


def check_target(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dequantized values, if it is one of those that ops take."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    return dtype
