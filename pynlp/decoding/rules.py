"""Rules for hypotheses: their lengths, and what they must not repeat."""

import math

import torch
from torch import Tensor


class Rules:
    """The arguments that all ways of decoding share.

    Args:
        prefix, end, max_length, min_length, no_repeat_ngram: As in `pynlp.decoding.greedy`.

    Attributes:
        end: The end symbol.
        limits: int64 `(batch,)`, `max_length` of each sentence.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range; the message names it.
    """

    def __init__(self, prefix: Tensor, *, end: int, max_length: int | Tensor, min_length: int, no_repeat_ngram: int):
        if not isinstance(prefix, Tensor):
            raise TypeError(f"prefix: expected a tensor, got {type(prefix).__name__}")
        if prefix.dtype != torch.int64 or prefix.dim() != 2 or prefix.shape[1] < 1:
            raise ValueError(
                f"prefix: expected int64 (batch, n) with n of 1 or more, got {prefix.dtype} {tuple(prefix.shape)}"
            )
        for name, value in (("end", end), ("min_length", min_length), ("no_repeat_ngram", no_repeat_ngram)):
            check_count(name, value, 0)
        self.end = end
        self.limits = _limits(max_length, prefix)
        self._prefix_length = prefix.shape[1]
        self._min_length = min_length
        self._ngram = no_repeat_ngram

    def apply(self, logits: Tensor, history: Tensor) -> Tensor:
        """The logits with -inf for each token that must not follow; the same tensor if none is forbidden.

        Args:
            logits: `(rows, V)`.
            history: int64 `(rows, prefix + drawn tokens)`.

        Raises:
            ValueError: the end symbol is not in the vocabulary.
        """
        if self.end >= logits.shape[1]:
            raise ValueError(f"end: expected a token of the vocabulary, less than {logits.shape[1]}, got {self.end}")
        length = history.shape[1]
        if 0 < self._ngram <= length:
            ngrams = history.unfold(1, self._ngram, 1)  # (rows, places, n)
            last = ngrams[..., -1]
            repeated = (ngrams[..., :-1] == history[:, None, length - self._ngram + 1 :]).all(dim=-1)
            repeated &= last != self.end
            most = torch.where(repeated, -math.inf, math.inf).to(logits.dtype)
            logits = logits.scatter_reduce(1, last, most, "amin")
        if length - self._prefix_length < self._min_length:
            logits = logits.index_fill(1, torch.tensor([self.end], device=logits.device), -math.inf)
        return logits


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _limits(max_length: int | Tensor, prefix: Tensor) -> Tensor:
    batch = prefix.shape[0]
    if not isinstance(max_length, Tensor):
        check_count("max_length", max_length, 1)
        return torch.full((batch,), max_length, device=prefix.device)
    if max_length.dtype != torch.int64 or max_length.shape != (batch,):
        raise ValueError(
            f"max_length: expected an int or int64 ({batch},), got {max_length.dtype} {tuple(max_length.shape)}"
        )
    if (max_length < 1).any():
        raise ValueError(f"max_length: expected at least 1, got {max_length.min().item()}")
    return max_length.to(prefix.device)
