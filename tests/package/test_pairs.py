"""The combinations that stand for all: every two values meet, in few rows, the same ones every time."""

import itertools

import pytest
import torch
from cases.pairs import every_pair, pairs

SIZES = [
    (2, 2),
    (8, 8, 2),
    (5, 8, 5, 2),
    (2, 8, 7, 2),
    (2, 3, 2, 2, 2, 2),
    (1, 4),
    (3, 3, 3, 3),
    (12, 2, 3, 3),
    (1, 1, 1),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_two_values_meet(sizes):
    parameters = [[f"{p}.{i}" for i in range(size)] for p, size in enumerate(sizes)]
    rows = pairs(*parameters)
    for (p, first), (q, second) in itertools.combinations(enumerate(parameters), 2):
        assert {(row[p], row[q]) for row in rows} == set(itertools.product(first, second))
    assert len(set(rows)) == len(rows)
    smaller, larger = sorted(sizes)[-2:]
    assert smaller * larger <= len(rows) <= 1.4 * smaller * larger
    assert rows == pairs(*parameters)


def test_values_may_be_equal_and_of_any_type():
    assert sorted(pairs([[], {}], [1, 1]), key=str) == [([], 1), ([], 1), ({}, 1), ({}, 1)]


def test_as_a_decorator():
    mark = every_pair(letter="ab", number=[1, 2, 3], dtype=[torch.float32]).mark
    assert mark.name == "parametrize" and mark.args[0] == ["letter", "number", "dtype"]
    assert set(mark.args[1]) == set(itertools.product("ab", (1, 2, 3), [torch.float32]))
    assert mark.kwargs["ids"](torch.float32) == "float32"
