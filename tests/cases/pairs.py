"""Fewer tests than all combinations: every two values of different parameters still meet."""

import itertools
from collections.abc import Sequence

import pytest


def pairs(*parameters: Sequence) -> list[tuple]:
    """Rows of one value of each parameter, such that any two values of two parameters are in a row together.

    Greedy: a row begins with two values that have not met, and each other parameter adds the value that meets most.
    """
    order = sorted(range(len(parameters)), key=lambda p: -len(parameters[p]))  # the longest first: fewest rows
    values = [(p, i) for p in order for i in range(len(parameters[p]))]
    unmet = {frozenset(two): None for two in itertools.combinations(values, 2) if two[0][0] != two[1][0]}  # in order
    rows = []
    while unmet:
        row = dict(sorted(next(iter(unmet)), key=values.index))
        for p in order:
            if p not in row:
                choices = range(len(parameters[p]))
                row[p] = max(choices, key=lambda i: sum(frozenset(((p, i), other)) in unmet for other in row.items()))
        for two in itertools.combinations(row.items(), 2):
            unmet.pop(frozenset(two), None)
        rows.append(tuple(parameters[p][row[p]] for p in range(len(parameters))))
    return rows


def every_pair(**parameters: Sequence):
    """Like a `pytest.mark.parametrize` for each parameter, but by pairs."""
    return pytest.mark.parametrize(list(parameters), pairs(*parameters.values()), ids=_name)


def _name(value):
    return str(value).removeprefix("torch.")
