"""Sampling: frequencies against probabilities that plain Python works out, and what seeds determine."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from test_decoding import END, VOCABULARY, Toy, assert_same, repeats, toy_logits

from pynlp.decoding import sample

PREFIXES = [(first, second) for first, second in product((0, 2, 3), range(VOCABULARY))]


def distribution(history, min_length, temperature, top_k, top_p, no_repeat_ngram):
    """The probability of each token after a history of 2 tokens and those drawn."""
    weights = {
        token: math.exp(logit / temperature)
        for token, logit in enumerate(toy_logits(history).tolist())
        if (token != END or len(history) - 2 >= min_length)
        and (token == END or not repeats((*history, token), no_repeat_ngram))
    }
    likeliest = sorted(weights, key=lambda token: -weights[token])[:top_k]
    total = sum(weights[token] for token in likeliest)
    nucleus, mass = [], 0.0
    for token in likeliest:
        if mass < top_p:
            nucleus.append(token)
            mass += weights[token] / total
    return {token: weights[token] / total / mass for token in nucleus}


def probabilities(prefix, max_length, **options):
    """The probability of each (tokens, ended) that can be drawn."""
    found, unfinished = {}, {(): 1.0}
    for _ in range(max_length):
        longer = {}
        for tokens, probability in unfinished.items():
            for token, share in distribution(prefix + tokens, **options).items():
                if token == END:
                    found[tokens, True] = probability * share
                else:
                    longer[(*tokens, token)] = probability * share
        unfinished = longer
    return found | {(tokens, False): probability for tokens, probability in unfinished.items()}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_k": 9},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"top_k": 3, "top_p": 0.8, "temperature": 1.5},
        {"min_length": 2, "no_repeat_ngram": 2, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies_are_probabilities(changed):
    """Within five standard deviations; what has no probability is never drawn."""
    options = dict(temperature=1.0, top_k=None, top_p=None, min_length=0, no_repeat_ngram=0) | changed
    prefix, draws = (3, 2), 20000
    (found,) = sample(Toy(1), torch.tensor([prefix]), end=END, max_length=3, num_samples=draws, seed=1, **options)
    counts = Counter((tuple(h.tokens), h.ended) for h in found)
    expected = probabilities(prefix, 3, **{**options, "top_p": options["top_p"] or 2.0})
    assert sum(expected.values()) == pytest.approx(1) and counts.keys() <= expected.keys()
    for sequence, probability in expected.items():
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[sequence] - draws * probability) <= 5 * deviation + 1e-6
    for tokens, log_probability, score, ended in {(tuple(h.tokens), *h[1:]) for h in found}:
        history, own = prefix, 0.0
        for token in (*tokens, END) if ended else tokens:
            own += toy_logits(history).log_softmax(0)[token].item()
            history += (token,)
        assert log_probability == score == pytest.approx(own, abs=1e-12)  # the model's own


@pytest.mark.parametrize("spread, least, most", [(2.5, 20, 60), (1.5, 70, 150)])
def test_the_nucleus_of_a_large_vocabulary(spread, least, most):
    """Rows drawn at once give all tokens of the nucleus, and no others."""
    torch.manual_seed(3)
    row = (spread * torch.randn(200)).round(decimals=1)  # with equal ones

    class Wide(Toy):
        def step(self, tokens):
            return row.expand(len(tokens), -1)

    (found,) = sample(Wide(1), torch.tensor([[0]]), end=199, max_length=1, num_samples=30000, top_p=0.9, seed=0)
    shares = row.double().softmax(0).tolist()
    nucleus, mass = set(), 0.0
    for token in sorted(range(200), key=lambda token: -shares[token]):
        if mass < 0.9:
            nucleus.add(token)
            mass += shares[token]
    assert least < len(nucleus) < most
    assert {h.tokens[0] if h.tokens else 199 for h in found} == nucleus


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_least_and_the_greatest_number_draw_possible_tokens(number, monkeypatch):
    """-inf forbids the first and the last two tokens."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, number, dtype=torch.float64))
    logits = torch.randn(200, 50)
    logits[:, [0, -2, -1]] = -math.inf

    class Wide(Toy):
        def step(self, tokens):
            return logits

    drawn = sample(Wide(200), torch.zeros(200, 1, dtype=torch.long), end=0, max_length=1)
    assert {h.tokens[0] for (h,) in drawn} == {1 if number == 0 else 47}


def test_a_seed_gives_a_sentence_the_same_whatever_else_is_in_the_batch():
    limits = torch.arange(12) % 7 + 1
    options = dict(end=END, num_samples=3, temperature=1.5)
    state = Toy(12)
    together = sample(state, torch.tensor(PREFIXES), max_length=limits, seed=10, **options)
    rows = [0] * 7
    for i, prefix in enumerate(PREFIXES):
        alone = Toy(1)
        (expected,) = sample(alone, torch.tensor([prefix]), max_length=limits[i].item(), seed=10 + i, **options)
        assert_same(together[i], expected)
        for step, count in enumerate(alone.rows_stepped):
            rows[step] += count
    assert len({tuple(h.tokens) for hypotheses in together for h in hypotheses}) > 12
    assert state.rows_stepped == [count for count in rows if count] and rows[0] == 12  # finished rows had left
    again = sample(Toy(12), torch.tensor(PREFIXES), max_length=limits, seed=10, **options)
    assert again == together
    assert sample(Toy(12), torch.tensor(PREFIXES), max_length=limits, seed=11, **options) != together


def test_without_a_seed_pytorchs_is_used():
    def draw():
        return sample(Toy(12), torch.tensor(PREFIXES), end=END, max_length=6)

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert draw() == first != second


class Fixed:
    """A state with the same logits at every step."""

    def __init__(self, logits):
        self.logits = logits

    def step(self, tokens):
        return self.logits.expand(len(tokens), -1)

    def select(self, rows):
        pass


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lowest_temperatures_give_the_likeliest_token(dtype, temperature):
    state = Fixed(torch.tensor([1.0, -math.inf, 7.0, 6.999, -3e38, 0.0], dtype=dtype))
    for cut in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.5}):
        options = dict(end=1, max_length=1, num_samples=100, temperature=temperature, seed=0, **cut)
        (found,) = sample(state, torch.tensor([[0]]), **options)
        assert {tuple(h.tokens) for h in found} == {(2,)}, cut


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300, 1.7e308])
@pytest.mark.parametrize(
    ("cut", "expected"),
    [({}, [0, 2, 3, 5]), ({"top_k": 3}, [0, 2, 3]), ({"top_p": 0.5}, [2, 3]), ({"top_k": 3, "top_p": 0.6}, [2, 3])],
)
def test_the_highest_temperatures_give_all_allowed_tokens_alike(temperature, cut, expected):
    state = Fixed(torch.tensor([1.0, -math.inf, 7.0, 6.0, -math.inf, 0.0]))
    options = dict(end=1, max_length=1, num_samples=1000, temperature=temperature, seed=0, **cut)
    (found,) = sample(state, torch.tensor([[0]]), **options)
    counts = Counter(h.tokens[0] for h in found)
    assert sorted(counts) == expected
    share = 1000 / len(expected)
    assert all(abs(count - share) < 5 * math.sqrt(share) for count in counts.values())
