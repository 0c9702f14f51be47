"""Beam search: the best few beginnings of each sentence are kept, and extended together."""

import math
from itertools import count

import torch
from torch import Tensor

from pynlp.decoding.hypotheses import Hypothesis, coverage_term, length_divisor
from pynlp.decoding.rules import Rules, check_count
from pynlp.decoding.state import AttentiveState, DecodingState, attention_weights, check_state, largest, next_logits


@torch.no_grad()
def beam_search(
    state: DecodingState | AttentiveState,
    prefix: Tensor,
    *,
    end: int,
    max_length: int | Tensor,
    beam_size: int,
    n_best: int = 1,
    length_penalty: float = 0.6,
    coverage_penalty: float = 0.0,
    early_stopping: bool = False,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each sentence that a beam search finds, best first; fewer if there are no more.

    At each step all beams of a sentence are extended by all tokens, and the extensions ranked by their probability;
    among equal ones those of the better beam come first, then the lowest token. An end symbol among the best
    `beam_size` finishes a hypothesis. The best `beam_size` others go on; at `max_length` they are cut off, and are
    hypotheses like the others. These are ranked by

        score = log P / ((5 + length) / 6) ** length_penalty + coverage_penalty * sum_i log(min(sum_j p_ij, 1))

    where length counts the tokens drawn, with the end symbol and without the prefix, and p_ij is the attention to
    source token i when the j-th of these tokens was drawn.

    Args:
        state, prefix, end, max_length, min_length, no_repeat_ngram: As in `pynlp.decoding.greedy`. The state needs
            `attention` if there is a coverage penalty.
        beam_size: Beams of a sentence.
        n_best: At most `beam_size`.
        length_penalty: 0 ranks by probability, more is in favour of long hypotheses, less of short ones.
        coverage_penalty: 0 or more.
        early_stopping: Whether a sentence is done when it has `beam_size` finished hypotheses. Otherwise it goes on
            until no unfinished one can become better than its n_best-th finished one, whatever follows.

    Raises:
        TypeError, ValueError: as in `greedy`; the rules forbid every token only if nothing of a sentence is left.

    Source: Wu et al., arXiv 1609.08144, section 7; the length penalty's default: Vaswani et al., arXiv 1706.03762.

    Example:
        >>> import torch
        >>> from pynlp.decoding import beam_search
        >>> from pynlp.models import EncoderDecoder, TransformerConfig
        >>> model = EncoderDecoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> state = model.decoding_state(torch.randint(100, (2, 7)), None, max_length=11)
        >>> starts = torch.tensor([[1], [1]])
        >>> [first, second] = beam_search(state, starts, end=2, max_length=10, beam_size=4, n_best=2)
        >>> first[0].score >= first[1].score
        True
    """
    check_state(state)
    rules = Rules(prefix, end=end, max_length=max_length, min_length=min_length, no_repeat_ngram=no_repeat_ngram)
    check_count("beam_size", beam_size, 1)
    check_count("n_best", n_best, 1)
    if n_best > beam_size:
        raise ValueError(f"n_best: expected at most beam_size={beam_size}, got {n_best}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")
    if not 0 <= coverage_penalty < math.inf:
        raise ValueError(f"coverage_penalty: expected a finite number of 0 or more, got {coverage_penalty}")
    if not isinstance(early_stopping, bool):
        raise TypeError(f"early_stopping: expected a bool, got {early_stopping!r}")
    search = _BeamSearch(state, prefix, rules, beam_size, n_best, length_penalty, coverage_penalty, early_stopping)
    search.run()
    if not all(search.finished):
        raise ValueError(
            f"min_length, no_repeat_ngram: expected rules that leave some hypothesis, got none for sentence "
            f"{search.finished.index([])}"
        )
    return [sorted(found, key=lambda h: -h.score)[:n_best] for found in search.finished]


class _BeamSearch:
    """S unfinished sentences with W beams each, which are rows s * W + w of the state.

    If the rules or the model leave a sentence fewer than W beams, the others have log probability -inf and rows that
    copy the sentence's best one, so that all histories are possible ones.

    Attributes:
        finished: Hypotheses of each sentence.
        sentences, limits: `(S,)`, numbers of the unfinished sentences and their `max_length`.
        thresholds: `(S,)`, the score that an unfinished hypothesis must be able to beat.
        history: `(S * W, prefix + drawn tokens)`.
        log_probabilities: `(S, W)`, falling.
        coverage: `(S * W, source_length)`, the attention's sum over the drawn tokens and the next one.
    """

    def __init__(
        self,
        state: DecodingState | AttentiveState,
        prefix: Tensor,
        rules: Rules,
        beam_size: int,
        n_best: int,
        length_penalty: float,
        coverage_penalty: float,
        early_stopping: bool,
    ):
        self.state, self.rules, self.beam_size, self.n_best = state, rules, beam_size, n_best
        self.length_penalty, self.coverage_penalty = length_penalty, coverage_penalty
        self.early_stopping = early_stopping
        batch, self.prefix_length = prefix.shape
        self.finished: list[list[Hypothesis]] = [[] for _ in range(batch)]
        self.sentences = torch.arange(batch, device=prefix.device)
        self.limits = rules.limits
        self.thresholds = torch.full((batch,), -math.inf, dtype=torch.float64, device=prefix.device)
        self.history = prefix
        self.log_probabilities = torch.zeros(batch, 1, device=prefix.device)
        self.coverage: Tensor | float = 0.0

    def run(self) -> None:
        if not self.finished:
            return
        tokens = self.history
        for length in count(1):
            log_probabilities, rows, tokens, width = self.extend(tokens)
            ends = tokens == self.rules.end
            closing = ends.clone()
            closing[:, self.beam_size :] = False
            self.finish(closing, log_probabilities, rows, tokens, length)

            others = ends.sort(dim=1, stable=True).indices[:, :width]
            log_probabilities, rows, tokens = (x.gather(1, others) for x in (log_probabilities, rows, tokens))
            cut_off = self.limits == length
            self.finish(cut_off[:, None].expand_as(rows), log_probabilities, rows, tokens, length)

            going = ~(cut_off | self.cannot_improve(log_probabilities[:, 0], length))
            if not going.any():
                return
            tokens = self.go_on(going, log_probabilities, rows, tokens)

    def extend(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Step the state and rank the extensions of the beams.

        Returns:
            Log probabilities, extended rows and tokens of the best candidates, each `(S, candidates)`; and a number, at
            most the beam size, of candidates that surely do not end.
        """
        logits, _, normalizer = next_logits(self.state, tokens)
        if self.coverage_penalty:
            self.coverage = self.coverage + attention_weights(self.state, len(tokens))
        allowed = self.rules.apply(logits, self.history)
        sentences, width = self.log_probabilities.shape
        # One beam needs no more candidates than can be kept, and an end.
        each = min(self.beam_size + 1, logits.shape[1])
        values, tokens = largest(allowed, each)  # (S * W, each)
        values = values + (self.log_probabilities.flatten() - normalizer)[:, None]
        values, order = values.reshape(sentences, width * each).sort(dim=1, descending=True, stable=True)
        values, order = values[:, : 2 * self.beam_size], order[:, : 2 * self.beam_size]
        tokens = tokens.reshape(sentences, width * each).gather(1, order)
        first = torch.arange(0, sentences * width, width, device=order.device)[:, None]
        return values, first + order // each, tokens, min(self.beam_size, width * (each - 1))

    def finish(self, chosen: Tensor, log_probabilities: Tensor, rows: Tensor, tokens: Tensor, length: int) -> None:
        """Make hypotheses of the chosen candidates; all tensors are `(S, candidates)`."""
        chosen = chosen & (log_probabilities > -math.inf)
        if not chosen.any():
            return
        log_probabilities, rows, tokens = log_probabilities[chosen], rows[chosen], tokens[chosen]
        scores = log_probabilities / length_divisor(length, self.length_penalty)
        if self.coverage_penalty:
            scores = scores + coverage_term(self.coverage[rows], self.coverage_penalty)
        places = chosen.nonzero()[:, 0]
        written = self.history[rows, self.prefix_length :].tolist()
        facts = (x.tolist() for x in (self.sentences[places], tokens, log_probabilities, scores))
        for text, sentence, token, log_probability, score in zip(written, *facts, strict=True):
            ended = token == self.rules.end
            text = text if ended else [*text, token]
            self.finished[sentence].append(Hypothesis(text, log_probability, score, ended))
        for place in set(places.tolist()):
            self.thresholds[place] = self.threshold(self.finished[self.sentences[place]])

    def threshold(self, found: list[Hypothesis]) -> float:
        if self.early_stopping:
            return math.inf if len(found) >= self.beam_size else -math.inf
        return sorted(h.score for h in found)[-self.n_best] if len(found) >= self.n_best else -math.inf

    def cannot_improve(self, log_probabilities: Tensor, length: int) -> Tensor:
        """Whether each sentence is done, `(S,)`: its best unfinished hypothesis cannot pass the threshold.

        A log probability only falls; its divisor is smallest if the hypothesis ends at once, largest if it ends as late
        as it may; the coverage term is 0 at best.
        """
        best_length = self.limits if self.length_penalty > 0 else length + 1
        return log_probabilities / length_divisor(best_length, self.length_penalty) <= self.thresholds

    def go_on(self, going: Tensor, log_probabilities: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Drop the sentences that are done; returns the tokens to step with, `(S * W, 1)`."""
        if not going.all():
            self.sentences, self.limits, self.thresholds, log_probabilities, rows, tokens = (
                x[going] for x in (self.sentences, self.limits, self.thresholds, log_probabilities, rows, tokens)
            )
        dead = log_probabilities == -math.inf
        if dead.any():
            rows, tokens = (torch.where(dead, x[:, :1], x) for x in (rows, tokens))
        self.log_probabilities = log_probabilities
        rows, tokens = rows.flatten(), tokens.reshape(-1, 1)
        if not torch.equal(rows, torch.arange(len(self.history), device=rows.device)):
            self.state.select(rows)  # which copies a cache
            self.history = self.history[rows]
            if self.coverage_penalty:
                self.coverage = self.coverage[rows]
        self.history = torch.cat((self.history, tokens), dim=1)
        return tokens
