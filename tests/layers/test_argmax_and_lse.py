"""The likeliest token of each row and its log-sum-exp: values at every instruction set, and where it ends."""

import math

import pytest
import torch

from pynlp.ops.layers.argmax_and_lse import argmax_and_lse

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.every_isa
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 64, 255, 1000, 8000])
def test_values(columns, isa):
    x = torch.randn(37, columns) * 5
    place, lse = argmax_and_lse(x)
    assert torch.equal(place, x.argmax(dim=1))
    torch.testing.assert_close(lse, x.double().logsumexp(dim=1).float(), rtol=1e-6, atol=1e-6)


def test_large_and_far_apart_values(isa):
    x = torch.cat((torch.randn(5, 100) * 1e4, torch.randn(5, 100) + 1e6, torch.randn(5, 100) - 1e6))
    torch.testing.assert_close(argmax_and_lse(x)[1], x.double().logsumexp(dim=1).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("columns", [5, 300, 1000])
def test_of_equal_values_the_first(columns, isa):
    x = torch.randint(4, (200, columns)).float()
    assert torch.equal(argmax_and_lse(x)[0], (x == x.amax(dim=1, keepdim=True)).int().argmax(dim=1))


@pytest.mark.parametrize("place", [0, 7, 16, 299])
def test_infinities_and_nan(place, isa):
    x = torch.randn(5, 300)
    x[0, place], x[1, place], x[2], x[3, place] = math.inf, math.nan, -math.inf, -math.inf
    x[4, :place], x[4, place + 1 :] = -math.inf, -math.inf
    where, lse = argmax_and_lse(x)
    torch.testing.assert_close(lse, x.logsumexp(dim=1), equal_nan=True)
    assert where[0] == place and where[3] == x[3].argmax() and where[4] == place


def test_strided_rows_and_no_rows(isa):
    x = torch.randn(40, 600)
    for view in (x[::3, 100:400], x.T, x[:0], x.double()):
        place, lse = argmax_and_lse(view)
        assert torch.equal(place, view.argmax(dim=1)) and lse.dtype == view.dtype
        torch.testing.assert_close(lse, view.logsumexp(dim=1))


def test_same_bits_with_any_threads(isa):
    x = torch.randn(33, 1234)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(argmax_and_lse(x)[1])
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_opcheck():
    torch.library.opcheck(torch.ops.pynlp.argmax_and_lse, (torch.randn(4, 50),))
