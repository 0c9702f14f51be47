"""Decoding that never takes a token back: greedy, which writes the likeliest one, and sampling, which draws it."""

import math
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pynlp.decoding.hypotheses import Hypothesis
from pynlp.decoding.rules import Rules, check_count
from pynlp.decoding.state import DecodingState, check_state, largest, next_logits
from pynlp.ops.layers.argmax_and_lse import argmax_and_lse


@torch.no_grad()
def greedy(
    state: DecodingState,
    prefix: Tensor,
    *,
    end: int,
    max_length: int | Tensor,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> list[Hypothesis]:
    """The likeliest token at each step, one hypothesis a sentence; of equally likely ones the lowest.

    Rows whose sentence is finished leave the state.

    Args:
        state: One row a sentence, nothing written.
        prefix: int64 `(batch, n)`, n >= 1: what each sentence begins with, e.g. the start symbol.
        end: The end symbol.
        max_length: Most tokens to draw, the end symbol among them, the prefix not: one number, or int64 `(batch,)`.
        min_length: Fewest tokens to draw before the end symbol. Where `max_length` is not more, that one counts.
        no_repeat_ngram: Tokens in a row that must not occur twice, prefix included; 0 = no such rule. It never forbids
            the end symbol.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, the logits have no finite value or NaN
            or +inf, or the rules forbid every token; the message says which.

    Example:
        >>> import torch
        >>> from pynlp.decoding import greedy
        >>> from pynlp.models import Decoder, TransformerConfig
        >>> model = Decoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> state = model.decoding_state(batch=1, max_length=12)
        >>> [hypothesis] = greedy(state, torch.tensor([[1, 5]]), end=2, max_length=10, no_repeat_ngram=3)
        >>> hypothesis.ended or len(hypothesis.tokens) == 10
        True
    """
    check_state(state)
    rules = Rules(prefix, end=end, max_length=max_length, min_length=min_length, no_repeat_ngram=no_repeat_ngram)
    return _write(state, prefix, rules, 1, lambda logits, likeliest, rows, drawn: likeliest[:, None])


@torch.no_grad()
def sample(
    state: DecodingState,
    prefix: Tensor,
    *,
    end: int,
    max_length: int | Tensor,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> list[list[Hypothesis]]:
    """`num_samples` independent hypotheses a sentence, each token drawn by its probability.

    A sentence's result depends on its own logits and random numbers alone, not on the rest of the batch. The numbers of
    sentence i come from a generator seeded with `seed + i`: alone in a batch, with that seed, it gets the same.

    Args:
        state, prefix, end, max_length, min_length, no_repeat_ngram: As in `greedy`.
        temperature: Logits are divided by it; more than 0. A very low one gives the likeliest token, a very high one
            all that are allowed alike.
        top_k: Only the k likeliest tokens; the lower ones of equally likely ones.
        top_p: Only the likeliest tokens that `top_k` leaves, as few as have together at least this probability.
        seed: Without one it is drawn from PyTorch's default generator.

    `log_probability` is the model's own, without temperature, top_k, top_p and rules.

    Raises:
        TypeError, ValueError: as in `greedy`.

    Source: top_p: Holtzman et al., arXiv 1904.09751.

    Example:
        >>> import torch
        >>> from pynlp.decoding import sample
        >>> from pynlp.models import Decoder, TransformerConfig
        >>> model = Decoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> state = model.decoding_state(batch=1, max_length=12)
        >>> [drawn] = sample(state, torch.tensor([[1, 5]]), end=2, max_length=10, num_samples=3, top_p=0.9, seed=0)
        >>> len(drawn)
        3
    """
    check_state(state)
    rules = Rules(prefix, end=end, max_length=max_length, min_length=min_length, no_repeat_ngram=no_repeat_ngram)
    check_count("num_samples", num_samples, 1)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    if seed is None:
        seed = torch.randint(2**62, ()).item()
    check_count("seed", seed, 0)
    uniform = _uniform(seed, rules.limits, num_samples)

    def choose(logits: Tensor, likeliest: Tensor, rows: Tensor, drawn: int) -> Tensor:
        return _draw(logits, uniform[rows, drawn : drawn + 1], temperature, top_k, top_p)

    hypotheses = _write(state, prefix, rules, num_samples, choose)
    return [hypotheses[i : i + num_samples] for i in range(0, len(hypotheses), num_samples)]


def _write(
    state: DecodingState,
    prefix: Tensor,
    rules: Rules,
    copies: int,
    choose: Callable[[Tensor, Tensor, Tensor, int], Tensor],
) -> list[Hypothesis]:
    """Write `copies` hypotheses of each sentence, which are neighbours in the result.

    Args:
        choose: Called with the logits `(rows, V)` of unfinished hypotheses, the likeliest token of each `(rows,)`,
            their numbers among all `(rows,)`, and how many tokens they have; returns the next ones, `(rows, 1)`.
    """
    batch, prefix_length = prefix.shape
    hypotheses: list[Hypothesis] = [None] * (batch * copies)
    if batch == 0:
        return hypotheses
    logits, likeliest, normalizer = next_logits(state, prefix)
    history, limits = prefix, rules.limits
    if copies > 1:
        sentences = torch.arange(batch, device=prefix.device).repeat_interleave(copies)
        state.select(sentences)
        logits, likeliest, normalizer, history, limits = (
            x[sentences] for x in (logits, likeliest, normalizer, history, limits)
        )
    rows = torch.arange(batch * copies, device=prefix.device)  # those unfinished
    log_probabilities = torch.zeros_like(normalizer)

    for drawn in count():
        allowed = rules.apply(logits, history)
        if allowed is not logits:
            likeliest, of_allowed = argmax_and_lse(allowed)
            if (of_allowed == -math.inf).any():
                raise ValueError(
                    f"min_length, no_repeat_ngram: expected rules that leave some token, got none after {drawn} tokens"
                )
        tokens = choose(allowed, likeliest, rows, drawn)
        log_probabilities = log_probabilities + logits.gather(1, tokens).squeeze(1) - normalizer
        history = torch.cat((history, tokens), dim=1)

        ended = tokens.squeeze(1) == rules.end
        finished = ended | (limits == drawn + 1)
        if finished.any():
            written = history[finished, prefix_length:].tolist()
            facts = (x[finished].tolist() for x in (rows, log_probabilities, ended))
            for text, row, log_probability, has_end in zip(written, *facts, strict=True):
                text = text[:-1] if has_end else text
                hypotheses[row] = Hypothesis(text, log_probability, log_probability, has_end)
            going = finished.logical_not().nonzero().squeeze(1)
            if len(going) == 0:
                return hypotheses
            state.select(going)
            rows, limits, tokens, history, log_probabilities = (
                x[going] for x in (rows, limits, tokens, history, log_probabilities)
            )
        logits, likeliest, normalizer = next_logits(state, tokens)


def _uniform(seed: int, limits: Tensor, num_samples: int) -> Tensor:
    """Random numbers in [0, 1) for each token to draw, fp64 `(batch * num_samples, longest limit)`, by sentence.

    They are drawn on the CPU, so that they are the same on every device.
    """
    numbers = [
        torch.rand(limit, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
        for i, limit in enumerate(limits.tolist())
    ]
    if not numbers:
        return torch.empty(0, 0, dtype=torch.float64)
    return pad_sequence(numbers, batch_first=True).transpose(1, 2).flatten(0, 1).to(limits.device)


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """A token of each row: the first whose cumulative probability is above the uniform number; both `(rows, 1)`."""
    tokens = None
    if top_k is not None:
        logits, tokens = largest(logits, min(top_k, logits.shape[1]))
    scaled = _scale(logits, temperature)
    if top_p is not None and top_p < 1:
        scaled, nucleus = _nucleus(logits, scaled, top_p)
        tokens = nucleus if tokens is None else tokens.gather(1, nucleus)
    cumulative = scaled.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    places = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return places if tokens is None else tokens.gather(1, places)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """What the logits have more than each row's largest, which is 0 or less, divided by the temperature.

    So nothing overflows at a low one. One that fp32 cannot hold, or whose inverse it cannot, is brought to its range:
    else 0 / 0 and inf / inf are NaN.
    """
    return (logits - logits.amax(dim=1, keepdim=True)) / min(max(temperature, 2.0**-126), 2.0**126)


def _nucleus(logits: Tensor, scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The scaled logits of each row in the logits' falling order, -inf behind those that have `top_p` together.

    Returns:
        They, as many of them as are needed, and their tokens.
    """
    vocabulary = logits.shape[1]
    normalizer = scaled.logsumexp(dim=1, keepdim=True)
    for size in (64, 1024, vocabulary):  # the nucleus is small as a rule, and to sort a row takes long
        tokens = largest(logits, min(size, vocabulary))[1]
        values = scaled.gather(1, tokens)
        probabilities = (values - normalizer).exp()
        cumulative = probabilities.cumsum(dim=1, dtype=torch.float64)
        if (cumulative[:, -1] >= top_p).all():
            break
    return values.masked_fill(cumulative - probabilities >= top_p, -math.inf), tokens
