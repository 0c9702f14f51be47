"""The likeliest token of each row of logits, and the log-sum-exp that makes them log probabilities."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, refuse_derivatives
from pynlp.reference.layers import argmax_and_lse as reference

define("argmax_and_lse", "(Tensor x) -> (Tensor, Tensor)", reference, triton=None, dtype_of="x")


@torch.library.register_fake("pynlp::argmax_and_lse", lib=LIBRARY)
def _fake(x):
    return x.new_empty(x.shape[:1], dtype=torch.int64), x.new_empty(x.shape[:1])


def argmax_and_lse(x: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each row's largest value, the first of equal ones, and its log-sum-exp; no gradients.

    Args:
        x: `(rows, columns)`, fp32 or fp64, of at least one column. In a row with NaN the place is not defined and the
            log-sum-exp is NaN.

    Returns:
        int64 `(rows,)`, and `(rows,)` in x's dtype.
    """
    refuse_derivatives("argmax_and_lse", x)
    return torch.ops.pynlp.argmax_and_lse(rows_at_one_stride(x))
