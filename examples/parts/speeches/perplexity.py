"""Perplexity of documents under a language model that sees a window of them at a time."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from pynlp.functional import linear_cross_entropy
from pynlp.models import Decoder
from pynlp.training import IGNORED

TOKENS_AT_ONCE = 8192


def perplexity(model: Decoder, documents: list[Tensor], length: int, stride: int | None = None) -> float:
    """exp of the mean loss of all tokens but each document's first, each given those before it in its window.

    Args:
        documents: Token ids `(N,)` each.
        length: Most tokens that a window shows.
        stride: Tokens from one window to the next, of each of which only these last ones count, so that they are given
            at least `length - stride` others; with 1 exactly `length`, or all where there are fewer. By default
            `length`: windows that do not overlap.

    Raises:
        ValueError: the stride is not between 1 and `length`, or no document has a second token.
    """
    nats, tokens = negative_log_likelihood(model, documents, length, stride)
    return math.exp(nats / tokens)


@torch.no_grad()
def negative_log_likelihood(
    model: Decoder, documents: list[Tensor], length: int, stride: int | None = None
) -> tuple[float, int]:
    """The sum of the losses in nats, and how many there are; as `perplexity`."""
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride: expected 1 to length={length}, got {stride}")
    nats, count, training, device = 0.0, 0, model.training, model.output_weight.device
    model.eval()
    bar = tqdm(total=sum(map(len, documents)), desc="Perplexity", unit="token", leave=False, delay=2)
    for document in documents:
        if len(document) < 2:
            continue
        inputs, targets = (x.to(device) for x in windows(document, length, stride))
        rows = max(1, TOKENS_AT_ONCE // inputs.shape[1])
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            nats += linear_cross_entropy(model.features(x), model.output_weight, y, reduction="sum").item()
            bar.update(int((y != IGNORED).sum()))
        count += len(document) - 1
    bar.close()
    model.train(training)
    if count == 0:
        raise ValueError("documents: expected one with 2 tokens or more, got none")
    return nats, count


def windows(document: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """What the model reads and what it is to say, `(windows, S)` with S `length` or less; every target is there once.

    Those that an earlier window had are `IGNORED`. The last window begins earlier than a stride would have it.
    """
    last = len(document) - 1
    length = min(length, last)
    ends = torch.tensor([*range(length, last, stride), last])
    places = ends[:, None] - length + torch.arange(length)  # of the inputs
    seen = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1]))[:, None]
    return document[places], document[places + 1].masked_fill(places < seen, IGNORED)
