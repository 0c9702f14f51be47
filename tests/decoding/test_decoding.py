"""Greedy decoding and beam search, against enumeration, a beam search in plain Python, and transformers' generate()."""

import math
from functools import cache
from itertools import product

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from pynlp.decoding import Hypothesis, beam_search, greedy, sample
from pynlp.decoding.state import largest

VOCABULARY, END = 4, 1


@cache
def toy_logits(history):
    """Logits of what follows: random, and others after each other history."""
    generator = torch.Generator().manual_seed(hash(history) % 2**63)
    return 2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)


@cache
def toy_attention(history):
    """Weights of 2 to 4 source tokens, as the prefix's first token says; little, so that some stay uncovered."""
    generator = torch.Generator().manual_seed(hash(history) % 2**63 + 1)
    return torch.randn(2 + history[0] % 3, generator=generator, dtype=torch.float64).softmax(0) / 2


class Toy:
    """A model that remembers whole histories, one a row. It refuses to go on behind an end symbol."""

    def __init__(self, rows, logits=toy_logits):
        self.histories = [()] * rows
        self.logits = logits
        self.rows_stepped = []

    def step(self, tokens):
        assert not torch.is_grad_enabled()
        assert tokens.shape[1] == 1 or not self.rows_stepped
        if self.rows_stepped:
            assert END not in tokens
        self.rows_stepped.append(len(tokens))
        self.histories = [h + tuple(new) for h, new in zip(self.histories, tokens.tolist(), strict=True)]
        return torch.stack([self.logits(h) for h in self.histories])

    def select(self, rows):
        self.histories = [self.histories[row] for row in rows.tolist()]

    @property
    def attention(self):
        rows = [toy_attention(h) for h in self.histories]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1.0)


def score(history, drawn, log_probability, alpha, beta=0.0):
    """GNMT's, of a hypothesis of which `drawn` tokens are not prefix; the last of them is not in its history."""
    total = log_probability / ((5 + drawn) / 6) ** alpha
    if beta:
        places = range(len(history) - drawn + 1, len(history) + 1)
        coverage = torch.stack([toy_attention(history[:place]) for place in places]).sum(0)
        total += beta * sum(math.log(min(c, 1.0)) for c in coverage.tolist())
    return total


def repeats(history, n):
    """Whether the last n tokens occur earlier, too."""
    last = history[len(history) - n :]
    return n > 0 and any(history[i : i + n] == last for i in range(len(history) - n))


def every_hypothesis(prefix, max_length, alpha=0.0, beta=0.0, min_length=0, no_repeat_ngram=0):
    """All there are, best first."""
    found = []

    def extend(tokens, log_probability):
        history = prefix + tokens
        log_probabilities = toy_logits(history).log_softmax(0).tolist()
        for token in range(VOCABULARY):
            total, drawn = log_probability + log_probabilities[token], len(tokens) + 1
            if token == END:
                if len(tokens) >= min_length:
                    found.append(Hypothesis(list(tokens), total, score(history, drawn, total, alpha, beta), True))
            elif not repeats(history + (token,), no_repeat_ngram):
                if drawn == max_length:
                    text = [*tokens, token]
                    found.append(Hypothesis(text, total, score(history, drawn, total, alpha, beta), False))
                else:
                    extend(tokens + (token,), total)

    extend((), 0.0)
    return sorted(found, key=lambda h: -h.score)


def plain_beam_search(prefix, max_length, beam_size, alpha, early_stopping):
    """One sentence, on lists. It never stops before max_length unless `early_stopping`."""
    beams, finished = [((), 0.0)], []
    for drawn in range(1, max_length + 1):
        candidates = []
        for tokens, log_probability in beams:
            after = toy_logits(prefix + tokens).log_softmax(0).tolist()
            candidates += [(tokens + (token,), log_probability + after[token]) for token in range(VOCABULARY)]
        candidates.sort(key=lambda candidate: -candidate[1])
        for tokens, total in candidates[:beam_size]:
            if tokens[-1] == END:
                finished.append(Hypothesis(list(tokens[:-1]), total, score(prefix, drawn, total, alpha), True))
        beams = [candidate for candidate in candidates if candidate[0][-1] != END][:beam_size]
        if drawn == max_length:
            finished += [Hypothesis(list(t), total, score(prefix, drawn, total, alpha), False) for t, total in beams]
        elif early_stopping and len(finished) >= beam_size:
            break
    return sorted(finished, key=lambda h: -h.score)


def assert_same(found, expected):
    assert [(h.tokens, h.ended) for h in found] == [(h.tokens, h.ended) for h in expected]
    numbers = [[(h.log_probability, h.score) for h in hypotheses] for hypotheses in (found, expected)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", [{}, {"min_length": 2}, {"no_repeat_ngram": 1}, {"no_repeat_ngram": 2}])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 2.0])
def test_a_beam_as_wide_as_all_beginnings_finds_every_hypothesis(alpha, beta, rules):
    prefixes = [(2, 0), (0, 3)]
    penalties = dict(length_penalty=alpha, coverage_penalty=beta)
    size = VOCABULARY * (VOCABULARY - 1) ** 3
    found = beam_search(
        Toy(2), torch.tensor(prefixes), end=END, max_length=4, beam_size=2 * size, n_best=2 * size, **penalties, **rules
    )
    for prefix, hypotheses in zip(prefixes, found, strict=True):
        expected = every_hypothesis(prefix, 4, alpha, beta, **rules)
        assert len(hypotheses) == len(expected)
        assert_same(hypotheses, expected)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 3.0])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_narrow_beams_find_what_a_plain_beam_search_finds(beam_size, alpha, early_stopping):
    """Which never stops before it must, so nothing that was given up early would have been better."""
    prefixes = [(first, second) for first in (0, 2, 3) for second in range(VOCABULARY)]
    state = Toy(len(prefixes))
    n_best = (beam_size + 1) // 2
    found = beam_search(
        state, torch.tensor(prefixes), end=END, max_length=8, beam_size=beam_size, n_best=n_best, length_penalty=alpha,
        early_stopping=early_stopping,
    )  # fmt: skip
    for prefix, hypotheses in zip(prefixes, found, strict=True):
        assert_same(hypotheses, plain_beam_search(prefix, 8, beam_size, alpha, early_stopping)[:n_best])
    if alpha <= 0 or early_stopping:
        assert sum(state.rows_stepped) < 0.8 * len(prefixes) * (1 + 7 * beam_size)  # it did stop early


def test_a_search_ends_when_nothing_better_can_come():
    """P(end) is 0.6 at each step, the likeliest other token's 0.2.

    After t steps the best beam has log P = t log 0.2. It may end at once, or as late as step 12, and have that divided
    by the penalty of length t + 1 or 12: the first is better than log 0.6 for no t if alpha <= 0, the second until
    8 log 0.2 / (17 / 6)^3 = -0.57 < log 0.6 = -0.51 if alpha = 3.
    """

    def logits(history):
        return torch.tensor([0.2, 0.6, 0.1, 0.1]).log()

    options = dict(end=END, max_length=12)
    for alpha, steps in ((-1.0, 1), (0.0, 1), (3.0, 8)):
        state = Toy(1, logits)
        ((best,),) = beam_search(state, torch.tensor([[0]]), beam_size=2, length_penalty=alpha, **options)
        assert len(state.rows_stepped) == steps
        assert best.tokens == [] and best.ended and best.log_probability == pytest.approx(math.log(0.6))
    state = Toy(1, logits)
    (found,) = beam_search(state, torch.tensor([[0]]), beam_size=3, n_best=2, length_penalty=0.0, **options)
    assert [h.tokens for h in found] == [[], [0]]  # 0.6, 0.2 * 0.6
    assert len(state.rows_stepped) == 2  # the best beam is at 0.2 * 0.2


@pytest.mark.parametrize("rules", [{}, {"min_length": 3}, {"no_repeat_ngram": 1}, {"no_repeat_ngram": 2}])
def test_greedy_is_a_beam_of_one_and_the_likeliest_sample(rules):
    prefixes = torch.tensor(list(product((0, 2, 3), range(VOCABULARY))))
    limits = dict(end=END, max_length=3 if rules == {"no_repeat_ngram": 1} else 7)
    if rules == {"no_repeat_ngram": 1}:
        prefixes = prefixes[:, :1].expand(-1, 2)  # leaves three other tokens
    hypotheses = greedy(Toy(12), prefixes, **limits, **rules)
    for prefix, hypothesis in zip(prefixes.tolist(), hypotheses, strict=True):
        history, log_probability = tuple(prefix), 0.0
        for token in hypothesis.tokens + [END] * hypothesis.ended:
            log_probabilities = toy_logits(history).log_softmax(0).tolist()
            length = len(history) - len(prefix)
            allowed = [
                t for t in range(VOCABULARY)
                if (t != END or length >= rules.get("min_length", 0))
                and (t == END or not repeats((*history, t), rules.get("no_repeat_ngram", 0)))
            ]  # fmt: skip
            assert token == max(allowed, key=lambda t: log_probabilities[t])
            log_probability += log_probabilities[token]
            history += (token,)
        assert hypothesis.ended or len(hypothesis.tokens) == limits["max_length"]
        assert hypothesis.log_probability == hypothesis.score == pytest.approx(log_probability, abs=1e-12)
    assert_same([best for (best,) in sample(Toy(12), prefixes, top_k=1, seed=5, **limits, **rules)], hypotheses)
    beams = beam_search(Toy(12), prefixes, beam_size=1, length_penalty=0.0, **limits, **rules)
    assert_same([best for (best,) in beams], hypotheses)


def test_a_batch_gives_what_its_sentences_give_alone():
    """And steps no row of a sentence that is done. Lengths, limits and source lengths differ."""
    prefixes = torch.tensor(list(product((0, 2, 3), range(VOCABULARY))))
    limits = torch.arange(12) % 7 + 1
    options = dict(beam_size=3, n_best=2, coverage_penalty=0.2, end=END)
    together, greedy_together = Toy(12), Toy(12)
    beams = beam_search(together, prefixes, max_length=limits, **options)
    hypotheses = greedy(greedy_together, prefixes, end=END, max_length=limits)
    steps, greedy_steps = [0] * 7, [0] * 7
    for i in range(12):
        alone, greedy_alone = Toy(1), Toy(1)
        assert_same(beam_search(alone, prefixes[i : i + 1], max_length=limits[i].item(), **options)[0], beams[i])
        assert_same(greedy(greedy_alone, prefixes[i : i + 1], end=END, max_length=limits[i].item()), [hypotheses[i]])
        for step, rows in enumerate(alone.rows_stepped):
            steps[step] += rows
        assert len(greedy_alone.rows_stepped) == len(hypotheses[i].tokens) + hypotheses[i].ended <= limits[i]
        for step, rows in enumerate(greedy_alone.rows_stepped):
            greedy_steps[step] += rows
    assert together.rows_stepped == [rows for rows in steps if rows] and steps[0] == 12 > steps[6]
    assert greedy_together.rows_stepped == [rows for rows in greedy_steps if rows]


def test_a_sentence_of_which_little_is_possible():
    """Five texts exist; a beam of eight finds these alone, and never asks what follows any other beginning."""
    texts = [(2, 3, END), (2, END), (3, 3, 0, END), (3, 3, 2, END), (0, 0, 0, END)]

    def logits(history):
        after = [text[len(history) - 1] for text in texts if text[: len(history) - 1] == history[1:]]
        assert after
        row = torch.full((VOCABULARY,), -math.inf)
        row[after] = toy_logits(history)[after].float()
        return row

    (found,) = beam_search(Toy(1, logits), torch.tensor([[0]]), end=END, max_length=9, beam_size=8, n_best=8)
    assert sorted((*h.tokens, END) for h in found) == sorted(texts)
    assert sum(math.exp(h.log_probability) for h in found) == pytest.approx(1, abs=1e-6)


def test_equally_likely_tokens_come_in_their_order():
    def logits(history):
        return torch.zeros(VOCABULARY)

    (found,) = beam_search(
        Toy(1, logits), torch.tensor([[0]]), end=END, max_length=2, min_length=1, beam_size=2, n_best=2
    )
    assert [h.tokens for h in found] == [[0], [0, 0]]  # of length 2, both: the end is drawn before the rest is cut off
    assert greedy(Toy(1, logits), torch.tensor([[0]]), end=END, max_length=3)[0].tokens == [0, 0, 0]
    for count in (1, 2, 7, 30, 59, 60):
        values = torch.randint(0, 12, (40, 60)).double()
        values[::4, 3:] = -math.inf
        expected = values.sort(dim=1, descending=True, stable=True)
        values, tokens = largest(values, count)
        assert torch.equal(values, expected.values[:, :count]) and torch.equal(tokens, expected.indices[:, :count])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_log_probabilities_are_of_fp32_at_least(dtype, tolerance):
    """The logits are what the model gave: rounded once."""

    def logits(history):
        return (5 * toy_logits(history)).to(dtype)

    prefix = torch.tensor([[3, 2]])
    (found,) = greedy(Toy(1, logits), prefix, end=END, max_length=4, min_length=4)
    ((beam,),) = beam_search(
        Toy(1, logits), prefix, end=END, max_length=4, min_length=4, beam_size=1, length_penalty=0.0
    )
    (sampled,) = sample(Toy(1, logits), prefix, end=END, max_length=4, min_length=4, top_k=1)
    history, expected = (3, 2), 0.0
    for token in found.tokens:
        expected += logits(history).double().log_softmax(0)[token].item()
        history += (token,)
    for hypothesis in (found, beam, *sampled):
        assert hypothesis.tokens == found.tokens and len(found.tokens) == 4
        assert hypothesis.log_probability == pytest.approx(expected, rel=tolerance)


def test_the_end_symbol_may_be_the_start_symbol_too():
    """And may be drawn nevertheless under no_repeat_ngram=1."""

    def logits(history):
        return torch.tensor([2.0, 3.0, 1.0, 0.0])

    (found,) = greedy(Toy(1, logits), torch.tensor([[END]]), end=END, max_length=9, min_length=2, no_repeat_ngram=1)
    assert found.tokens == [0, 2] and found.ended


def test_an_empty_batch():
    empty = torch.empty(0, 1, dtype=torch.long)
    assert greedy(Toy(0), empty, end=END, max_length=3) == []
    assert sample(Toy(0), empty, end=END, max_length=3) == []
    assert beam_search(Toy(0), empty, end=END, max_length=3, beam_size=2) == []


class Bart:
    """transformers' BART as a state; `attention_mask` marks the source's padding."""

    def __init__(self, model, source, attention_mask):
        self.model, self.attention_mask, self.cache = model, attention_mask, None
        self.encoded = model.get_encoder()(source, attention_mask=attention_mask).last_hidden_state

    def step(self, tokens):
        out = self.model(
            encoder_outputs=(self.encoded,), attention_mask=self.attention_mask, decoder_input_ids=tokens,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def select(self, rows):
        self.cache.reorder_cache(rows)
        self.encoded, self.attention_mask = self.encoded[rows], self.attention_mask[rows]


@pytest.fixture(scope="module")
def bart():
    """A tiny random model in fp64 whose next token depends on source and history, and 16 sources of 3 to 9 tokens."""
    torch.manual_seed(2)
    config = BartConfig(
        vocab_size=24, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.5,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval().double()
    model.final_logits_bias[:, 2] = 2.0  # some end, some do not
    lengths = torch.randint(3, 10, (16, 1))
    attention_mask = (torch.arange(9) < lengths).long()
    source = torch.randint(4, 24, (16, 9)).where(attention_mask.bool(), 1)
    return model, source, attention_mask


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"min_length": 6}, {"min_new_tokens": 6}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram": 1, "min_length": 3}, {"no_repeat_ngram_size": 1, "min_new_tokens": 3}),
        ({"beam_size": 4}, {"num_beams": 4}),
        ({"beam_size": 3, "no_repeat_ngram": 3}, {"num_beams": 3, "no_repeat_ngram_size": 3}),
        ({"beam_size": 5, "min_length": 4}, {"num_beams": 5, "min_new_tokens": 4}),
    ],
    ids=str,
)
@torch.no_grad()
def test_tokens_are_those_of_transformers_generate(bart, ours, theirs):
    """Its length penalty has another formula; without one the scores are the same."""
    model, source, attention_mask = bart
    if "beam_size" in ours:
        theirs = {**theirs, "length_penalty": 0.0, "early_stopping": False}
        best = beam_search(
            Bart(model, source, attention_mask),
            torch.full((16, 1), 3),
            end=2,
            max_length=12,
            length_penalty=0.0,
            **ours,
        )
        found = [hypothesis for (hypothesis,) in best]
    else:
        found = greedy(Bart(model, source, attention_mask), torch.full((16, 1), 3), end=2, max_length=12, **ours)
    expected = model.generate(
        source, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, output_scores=True,
        return_dict_in_generate=True, **theirs,
    )  # fmt: skip
    for hypothesis, row in zip(found, expected.sequences.tolist(), strict=True):
        tokens = [3] + hypothesis.tokens + [2] * hypothesis.ended
        assert tokens == row[: len(tokens)] and all(token == 1 for token in row[len(tokens) :])
    if "beam_size" in ours:
        scores = torch.tensor([hypothesis.score for hypothesis in found])
        torch.testing.assert_close(scores, expected.sequences_scores.float(), rtol=1e-5, atol=1e-5)
    assert len({tuple(hypothesis.tokens) for hypothesis in found}) > 8
    assert 0 < sum(hypothesis.ended for hypothesis in found) < 16
