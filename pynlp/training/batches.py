"""Batches of items of near lengths, and tensors of token ids."""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # padding of targets: what torch's cross entropy leaves out by default
BUCKET_GROWTH = 1.1  # lengths in a bucket differ by at most this factor


class Batches:
    """Items 0 to N - 1 in batches of at most `max_tokens` tokens, padding included, in another order every epoch.

    The order depends on (seed, epoch) alone, so that training can be resumed at any batch and by any number of
    processes. Items are shuffled, sorted by buckets of near lengths, cut into batches, and the batches shuffled.

    Args:
        lengths: Tokens of each item, or of its source and its target.
        max_tokens: Most tokens of a batch: items * longest, or items * (longest source + longest target).
        collate: Makes the loss's argument of the numbers of a batch's items.

    Attributes:
        lengths: A tuple for each item.
        summary: The facts that decide the order, for checkpoints to compare.

    Raises:
        ValueError: there are no items, or one is empty or longer than `max_tokens`; the message names it.

    Example:
        >>> from pynlp.training import Batches
        >>> texts = [[5, 6], [7], [5, 7, 6, 5], [6, 6, 6]]
        >>> batches = Batches([len(text) for text in texts], 8, lambda items: [texts[item] for item in items])
        >>> sorted(item for batch in batches.epoch(0) for item in batch)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[tuple[int, int]],
        max_tokens: int,
        collate: Callable[[list[int]], Any],
        *,
        seed: int = 0,
    ):
        self.lengths = [
            (int(length),) if isinstance(length, Integral) else tuple(map(int, length)) for length in lengths
        ]
        self.max_tokens, self.collate, self.seed = max_tokens, collate, seed
        if not self.lengths:
            raise ValueError("lengths: expected at least one item, got none")
        for item, length in enumerate(self.lengths):
            if min(length) < 1:
                raise ValueError(f"lengths: expected at least 1 token, got {min(length)} in item {item}")
        longer = [item for item, length in enumerate(self.lengths) if sum(length) > max_tokens]
        if longer:
            raise ValueError(
                f"lengths: expected at most max_tokens={max_tokens} tokens in an item, got "
                f"{sum(self.lengths[longer[0]])} in item {longer[0]} (and {len(longer) - 1} more items are too long)"
            )
        self._buckets = [_bucket(length) for length in self.lengths]
        digest = hashlib.sha256(repr(self.lengths).encode()).hexdigest()[:16]
        self.summary = {"items": len(self.lengths), "max_tokens": max_tokens, "seed": seed, "lengths": digest}

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch in order, each the numbers of its items; every item is in one of them."""
        draw = random.Random(f"{self.seed} {epoch}")
        items = list(range(len(self.lengths)))
        draw.shuffle(items)
        items.sort(key=self._buckets.__getitem__)  # stable: a bucket stays shuffled
        batches: list[list[int]] = []
        widths: tuple[int, ...] = ()
        for item in items:
            length = self.lengths[item]
            wider = tuple(map(max, widths, length))
            if batches and (len(batches[-1]) + 1) * sum(wider) <= self.max_tokens:
                batches[-1].append(item)
                widths = wider
            else:
                batches.append([item])
                widths = length
        draw.shuffle(batches)
        return batches

    def efficiency(self, epoch: int = 0) -> float:
        """The share of an epoch's tokens that are no padding."""
        padded = 0
        for batch in self.epoch(epoch):
            padded += len(batch) * sum(map(max, zip(*(self.lengths[item] for item in batch), strict=True)))
        return sum(map(sum, self.lengths)) / padded


def _bucket(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The key by which items of these lengths are sorted: neighbours are near in all lengths.

    Targets rise from bucket to bucket of the sources in one and fall in the next, as batches span buckets.
    """
    source, *target = (int(math.log(length, BUCKET_GROWTH)) for length in lengths)
    return source, *(bucket if source % 2 == 0 else -bucket for bucket in target)


def pad(sequences: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 `(B, S)`, padded at their ends, and their lengths int64 `(B,)`.

    Example:
        >>> from pynlp.training import pad
        >>> tokens, lengths = pad([[5, 6], [7]], padding=0)
        >>> tokens.tolist(), lengths.tolist()
        ([[5, 6], [7, 0]], [2, 1])
    """
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=padding), torch.tensor([len(row) for row in rows])


def teacher_forcing(
    sequences: Sequence[Sequence[int]], start: int, end: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder's inputs `start y`, its targets `y end`, and their lengths: int64 `(B, S)`, `(B, S)`, `(B,)`.

    Inputs are padded by `padding`, targets by `IGNORED`. S is one more than the longest of the sequences y.

    Example:
        >>> from pynlp.training import teacher_forcing
        >>> inputs, targets, lengths = teacher_forcing([[5, 6], [7]], start=1, end=2, padding=0)
        >>> inputs.tolist()
        [[1, 5, 6], [1, 7, 0]]
        >>> targets.tolist()
        [[5, 6, 2], [7, 2, -100]]
    """
    inputs, lengths = pad([[start, *sequence] for sequence in sequences], padding)
    targets, _ = pad([[*sequence, end] for sequence in sequences], IGNORED)
    return inputs, targets, lengths
