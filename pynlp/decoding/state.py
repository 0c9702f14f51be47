"""The interface between decoding and a model, and the checks of a model's answers."""

import math
from typing import Protocol

import torch
from torch import Tensor

from pynlp.ops.layers.argmax_and_lse import argmax_and_lse


class DecodingState(Protocol):
    """Sequences that a model is writing, one a row, with its memory of them (a cache, the encoded source).

    It starts with one row a sentence and nothing written.

    Example:
        >>> import torch
        >>> from pynlp.decoding import greedy
        >>> class Counting:
        ...     def step(self, tokens):  # the token after n is n + 1
        ...         return 10 * torch.nn.functional.one_hot(tokens[:, -1] + 1, 10).float()
        ...
        ...     def select(self, rows):  # it remembers nothing
        ...         pass
        >>> [hypothesis] = greedy(Counting(), torch.tensor([[0]]), end=5, max_length=9)
        >>> hypothesis.tokens, hypothesis.ended
        ([1, 2, 3, 4], True)
    """

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens to the rows' histories; returns the logits of the next token.

        Args:
            tokens: int64 `(rows, n)`: n = 1, but in the first call each row's whole prefix.

        Returns:
            `(rows, V)`, any floating dtype. -inf forbids a token. They are read only.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Make row i a continuation of old row `rows[i]`.

        Args:
            rows: int64 `(new_rows,)`. A row may be named several times (beams share a beginning) or not at all (its
                sentence is finished: it needs no more work and no more memory).
        """
        ...


class AttentiveState(DecodingState, Protocol):
    """A `DecodingState` whose model attends to a source, as a coverage penalty needs.

    Example:
        >>> import torch
        >>> from pynlp.models import EncoderDecoder, TransformerConfig
        >>> model = EncoderDecoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> state = model.decoding_state(torch.randint(100, (2, 7)), None, max_length=20)
        >>> logits = state.step(torch.tensor([[1], [1]]))
        >>> state.attention.shape
        torch.Size([2, 7])
    """

    @property
    def attention(self) -> Tensor:
        """Weights `(rows, source_length)` of the last step's last token, mean over the heads.

        1 at padding, which needs no covering.
        """
        ...


def check_state(state: object) -> None:
    for name in ("step", "select"):
        if not callable(getattr(state, name, None)):
            raise TypeError(
                f"state: expected a DecodingState, with step and select, such as a model's decoding_state(..), "
                f"got {type(state).__name__}"
            )


def next_logits(state: DecodingState, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step the state by tokens.

    Returns:
        Logits `(rows, V)`, at least fp32; the likeliest token of each row, int64 `(rows,)`, of equal ones the lowest;
        and each row's log-sum-exp `(rows,)`: logits minus it are log probabilities.

    Raises:
        ValueError: the state's answer has another shape or dtype, or no token of a row is possible.
    """
    logits = state.step(tokens)
    rows = tokens.shape[0]
    if logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"state.step: expected floating logits ({rows}, V) of 2 tokens or more, "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    likeliest, normalizer = argmax_and_lse(logits)
    if not math.isfinite(normalizer.sum()):
        row = normalizer.isfinite().logical_not().nonzero()[0].item()
        came = {math.inf: "+inf", -math.inf: "only -inf"}.get(normalizer[row].item(), "NaN")
        raise ValueError(f"state.step: expected finite logits, beside which some may be -inf, got {came} in row {row}")
    return logits, likeliest, normalizer


def attention_weights(state: AttentiveState, rows: int) -> Tensor:
    """`state.attention` after a step of that many rows, at least fp32.

    Raises:
        TypeError: the state has none.
        ValueError: it has another shape.
    """
    weights = getattr(state, "attention", None)
    if weights is None:
        raise TypeError(
            f"state: expected one with the attribute `attention`, which coverage_penalty needs, "
            f"got {type(state).__name__} without"
        )
    if weights.dim() != 2 or weights.shape[0] != rows:
        raise ValueError(f"state.attention: expected ({rows}, source_length), got {tuple(weights.shape)}")
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, and their tokens; of equal ones the lowest token first."""
    if count == logits.shape[1]:
        return logits.sort(dim=1, descending=True, stable=True)
    values, tokens = logits.topk(count + 1)
    if (values[:, 1:] == values[:, :-1]).any():
        # topk leaves open how equal values are ordered, and which of them it takes. The values taken are put in order
        # here; rows where others could have been taken are sorted as a whole.
        tokens, order = tokens.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
        rows = (values[:, count - 1] == values[:, count]).nonzero().squeeze(1)
        all_values, all_tokens = logits[rows].sort(dim=1, descending=True, stable=True)
        values[rows], tokens[rows] = all_values[:, : count + 1], all_tokens[:, : count + 1]
    return values[:, :count], tokens[:, :count]
