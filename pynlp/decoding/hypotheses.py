"""Hypotheses, the results of decoding, and their scores."""

from typing import NamedTuple

from torch import Tensor


class Hypothesis(NamedTuple):
    """One sequence that decoding wrote.

    Attributes:
        tokens: The sequence without the prefix and the end symbol.
        log_probability: Natural logarithm of the model's probability of the tokens and, if it ended, the end symbol.
        score: `log_probability` with the penalties of the beam search; elsewhere the same.
        ended: Whether the end symbol was drawn; otherwise it was cut off at `max_length`.

    Example:
        >>> from pynlp.decoding import Hypothesis
        >>> hypothesis = Hypothesis(tokens=[7, 3], log_probability=-1.5, score=-1.5, ended=True)
        >>> hypothesis.tokens
        [7, 3]
    """

    tokens: list[int]
    log_probability: float
    score: float
    ended: bool


def length_divisor(length: int | Tensor, alpha: float) -> float | Tensor:
    """The divisor of a log probability, ((5 + length) / 6) ** alpha.

    Source: Wu et al., arXiv 1609.08144, equation 14.
    """
    return ((5 + length) / 6) ** alpha


def coverage_term(coverage: Tensor, beta: float) -> Tensor:
    """The summand of a score, beta * sum_i log(min(coverage_i, 1)): `(rows, source_length)` -> `(rows,)`.

    Source: Wu et al., arXiv 1609.08144, equation 14.
    """
    return beta * coverage.clamp(max=1).log().sum(dim=1)
