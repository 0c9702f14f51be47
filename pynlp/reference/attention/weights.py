"""Attention weights of chosen queries in plain PyTorch: default back end, and the oracle of the tests."""

from torch import Tensor

from pynlp.reference.attention.attention import (
    Options,
    log_sum_exp,
    masked_scores,
    rotate_queries_and_keys,
    visible_exp,
)


def attention_weights(
    q: Tensor,  # (B, Sq, H, D)
    k: Tensor,  # (B, Sk, G, D)
    rows: Tensor | None,  # (R,) int32: queries; None = all
    lse: Tensor | None,  # (B, H, Sq) as attention gives it; None: computed
    *options,
) -> Tensor:
    """softmax(scores) of those queries, (B, H, R, Sk) fp32 or fp64; with sinks a row adds up to less than 1."""
    options = Options(*options)
    scores, _ = masked_scores(*rotate_queries_and_keys(q, k, options), options)
    if lse is None:
        lse = log_sum_exp(scores, options.sinks)
    if rows is not None:
        scores, lse = scores[:, :, rows.long()], lse[:, :, rows.long()]
    return visible_exp(scores, lse)
