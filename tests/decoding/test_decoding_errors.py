"""What decoding refuses, and in which words."""

import math

import pytest
import torch
from test_decoding import END, Toy

from pynlp.decoding import beam_search, greedy, sample


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prefix": [[0]]}, TypeError, "prefix: expected a tensor, got list"),
        (
            {"prefix": torch.zeros(2, 1)},
            ValueError,
            r"prefix: expected int64 \(batch, n\) .*, got torch.float32 \(2, 1\)",
        ),
        ({"prefix": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"prefix: .* n of 1 or more, got .* \(2, 0\)"),
        ({"end": 4}, ValueError, "end: expected a token of the vocabulary, less than 4, got 4"),
        ({"end": -1}, ValueError, "end: expected at least 0, got -1"),
        ({"end": None}, TypeError, "end: expected an int, got NoneType"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1, got 0"),
        ({"max_length": 2.0}, TypeError, "max_length: expected an int, got float"),
        ({"max_length": torch.tensor([1])}, ValueError, r"max_length: .* int64 \(2,\), got torch.int64 \(1,\)"),
        ({"max_length": torch.ones(2)}, ValueError, r"max_length: .* int64 \(2,\), got torch.float32 \(2,\)"),
        ({"max_length": torch.tensor([1, -3])}, ValueError, "max_length: expected at least 1, got -3"),
        ({"min_length": -1}, ValueError, "min_length: expected at least 0, got -1"),
        ({"no_repeat_ngram": -1}, ValueError, "no_repeat_ngram: expected at least 0, got -1"),
        ({"no_repeat_ngram": True}, TypeError, "no_repeat_ngram: expected an int, got bool"),
    ],
)
@pytest.mark.parametrize("decode", [greedy, sample, beam_search])
def test_bad_arguments_of_all(decode, options, error, message):
    beams = {"beam_size": 2} if decode is beam_search else {}
    arguments = dict(prefix=torch.zeros(2, 1, dtype=torch.long), end=END, max_length=3)
    with pytest.raises(error, match=message):
        decode(Toy(2), **{**arguments, **beams, **options})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"beam_size": 0}, ValueError, "beam_size: expected at least 1, got 0"),
        ({"n_best": 0}, ValueError, "n_best: expected at least 1, got 0"),
        ({"n_best": 3}, ValueError, "n_best: expected at most beam_size=2, got 3"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty: expected a finite number, got nan"),
        ({"coverage_penalty": -0.1}, ValueError, "coverage_penalty: expected a finite number of 0 or more, got -0.1"),
        ({"early_stopping": "never"}, TypeError, "early_stopping: expected a bool, got 'never'"),
    ],
)
def test_bad_arguments_of_beam_search(options, error, message):
    with pytest.raises(error, match=message):
        beam_search(
            Toy(2), torch.zeros(2, 1, dtype=torch.long), **{**dict(end=END, max_length=3, beam_size=2), **options}
        )


@pytest.mark.parametrize("decode", [greedy, sample, beam_search])
@pytest.mark.parametrize(
    "row, message",
    [
        ([math.nan, 0, 0, -math.inf], "finite logits, beside which some may be -inf, got NaN in row 1"),
        ([math.inf, 0, 0, 0], "finite logits, beside which some may be -inf, got [+]inf in row 1"),
        ([-math.inf] * 4, "finite logits, beside which some may be -inf, got only -inf in row 1"),
        ([0] * 4, r"expected floating logits \(2, V\) of 2 tokens or more, got torch.int64 \(2, 4\)"),
        ([0.0], r"expected floating logits \(2, V\) of 2 tokens or more, got torch.float32 \(2, 1\)"),
    ],
)
def test_bad_logits(decode, row, message):
    """In the second step, of the second row."""
    beams = {"beam_size": 1} if decode is beam_search else {}

    def logits(history):
        if history == (0,):
            return torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
        if history == (2,):
            return torch.tensor([-math.inf, -math.inf, 0.0, -math.inf])
        return torch.tensor(row) if history == (2, 2) else torch.zeros(len(row), dtype=torch.tensor(row).dtype)

    with pytest.raises(ValueError, match="state.step: expected " + message.removeprefix("expected ")):
        decode(Toy(2, logits), torch.tensor([[0], [2]]), end=END, max_length=3, **beams)


@pytest.mark.parametrize("decode", [greedy, sample, beam_search])
def test_rules_that_leave_nothing(decode):
    beams = {"beam_size": 4} if decode is beam_search else {}
    with pytest.raises(ValueError, match="min_length, no_repeat_ngram: expected rules that leave some .*, got none"):
        decode(Toy(1), torch.tensor([[0]]), end=END, max_length=9, min_length=4, no_repeat_ngram=1, **beams)


def test_a_coverage_penalty_needs_attention():
    class Blind(Toy):
        attention = None

    class Wrong(Toy):
        attention = torch.ones(3)

    options = dict(end=END, max_length=3, beam_size=2, coverage_penalty=0.2)
    with pytest.raises(TypeError, match="state: expected one with the attribute `attention`.*, got Blind without"):
        beam_search(Blind(2), torch.zeros(2, 1, dtype=torch.long), **options)
    with pytest.raises(ValueError, match=r"state.attention: expected \(2, source_length\), got \(3,\)"):
        beam_search(Wrong(2), torch.zeros(2, 1, dtype=torch.long), **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number above 0, got nan"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int, got float"),
        ({"top_p": 0.0}, ValueError, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p: expected more than 0 and at most 1, got 1.1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_arguments_of_sample(options, error, message):
    with pytest.raises(error, match=message):
        sample(Toy(2), torch.zeros(2, 1, dtype=torch.long), end=END, max_length=3, **options)
