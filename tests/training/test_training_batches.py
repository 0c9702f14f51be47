"""Batches by tokens, padding and teacher forcing, and schedules."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pynlp.training import IGNORED, Batches, WarmupCosine, WarmupInverseSquareRoot, pad, teacher_forcing

one_length = st.lists(st.integers(1, 30), min_size=1, max_size=60)
two_lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60)


def padded_tokens(batch, lengths):
    """Tokens of a batch's tensors, one for each column of lengths."""
    columns = list(zip(*([lengths[i]] if isinstance(lengths[i], int) else lengths[i] for i in batch), strict=True))
    return sum(len(batch) * max(column) for column in columns)


@given(one_length | two_lengths, st.integers(60, 200), st.integers(0, 5), st.integers(0, 5))
def test_every_item_is_in_one_batch_of_at_most_max_tokens(lengths, max_tokens, seed, epoch):
    data = Batches(lengths, max_tokens, list, seed=seed)
    batches = data.epoch(epoch)
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    assert max(padded_tokens(batch, lengths) for batch in batches) <= max_tokens
    real = sum(length if isinstance(length, int) else sum(length) for length in lengths)
    expected = real / sum(padded_tokens(batch, lengths) for batch in batches)
    assert data.efficiency(epoch) == pytest.approx(expected, rel=1e-12)
    assert Batches(lengths, max_tokens, list, seed=seed).epoch(epoch) == batches


def test_near_lengths_are_together_and_as_many_as_fit():
    batches = Batches([7, 2, 2, 7, 2, 2, 7], 14, list).epoch(0)
    sets = [set(batch) for batch in batches]
    assert {1, 2, 4, 5} in sets and sorted(map(len, sets)) == [1, 2, 4]
    assert Batches([7, 2, 2, 7, 2, 2, 7], 14, list).efficiency() == 1.0
    # A source and a target of 3 and 4 tokens, twice; another such pair would be too many.
    assert sorted(map(len, Batches([(3, 4)] * 5, 14, list).epoch(0))) == [1, 2, 2]
    assert Batches([2, 3], 6, list).efficiency() == 5 / 6


def test_the_order_is_that_of_seed_and_epoch_for_ever():
    """Checkpoints count on it, those of earlier versions too."""
    data = Batches([4] * 8, 8, list, seed=3)
    assert data.epoch(5) == [[0, 3], [5, 6], [7, 1], [2, 4]]
    assert len({str(data.epoch(epoch)) for epoch in range(20)}) == 20
    assert Batches([4] * 8, 8, list, seed=4).epoch(5) != data.epoch(5)
    assert Batches(torch.full((8,), 4).numpy(), 8, list, seed=3).summary == data.summary


def test_batches_have_other_items_and_another_order_every_epoch():
    lengths = [random.Random(item).randint(10, 50) for item in range(2000)]
    first, second = (Batches(lengths, 500, list).epoch(epoch) for epoch in range(2))
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    longest = [max(lengths[item] for item in batch) for batch in first]
    middle = len(longest) // 2
    assert abs(sum(longest[:middle]) / middle - sum(longest[middle:]) / (len(longest) - middle)) < 3


def test_little_is_padding():
    draw = random.Random(0)
    sources = [min(100, 1 + int(draw.lognormvariate(3, 0.6))) for _ in range(20_000)]
    targets = [min(100, max(1, round(source * draw.uniform(0.7, 1.3)))) for source in sources]
    assert Batches(sources, 4096, list).efficiency() > 0.95
    assert Batches(list(zip(sources, targets, strict=True)), 4096, list).efficiency() > 0.95
    one_by_one = sum(sources) / (len(sources) * max(sources))  # a batch of random items pads about this much
    assert one_by_one < 0.3


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([], "lengths: expected at least one item, got none"),
        ([3, 0], "lengths: expected at least 1 token, got 0 in item 1"),
        ([3, 11, 12], r"lengths: expected at most max_tokens=10 tokens in an item, got 11 in item 1 \(and 1 more"),
        ([(3, 4), (5, 6)], r"lengths: expected at most max_tokens=10 tokens in an item, got 11 in item 1 \(and 0 more"),
    ],
)
def test_bad_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        Batches(lengths, 10, list)


def test_padding():
    tokens, lengths = pad([[5, 6, 7], [8], []], 1)
    assert tokens.tolist() == [[5, 6, 7], [8, 1, 1], [1, 1, 1]] and lengths.tolist() == [3, 1, 0]
    assert tokens.dtype == lengths.dtype == torch.int64


def test_teacher_forcing_shifts_by_one():
    inputs, targets, lengths = teacher_forcing([[5, 6, 7], [8]], start=2, end=3, padding=0)
    assert inputs.tolist() == [[2, 5, 6, 7], [2, 8, 0, 0]]
    assert targets.tolist() == [[5, 6, 7, 3], [8, 3, IGNORED, IGNORED]]
    assert lengths.tolist() == [4, 2]
    assert inputs.dtype == targets.dtype == lengths.dtype == torch.int64
    # What is padding does not count: cross entropy of a uniform distribution over 10, summed over 6 tokens.
    loss = torch.nn.functional.cross_entropy(torch.zeros(8, 10), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(6 * math.log(10), rel=1e-6)


def factors(schedule, steps):
    """Learning rates of the steps as torch's own scheduler sets them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup, steps, floor", [(5, 20, 0.1), (1, 7, 0.0), (10, 11, 0.5)])
def test_warmup_and_cosine_are_torchs(warmup, steps, floor):
    def torchs(optimizer):
        rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=max(1, warmup - 1))
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=floor)
        if warmup == 1:
            return falling
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[warmup - 1])

    schedule = WarmupCosine(warmup, steps, floor)
    ours = factors(lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule), steps)
    assert ours == pytest.approx(factors(torchs, steps), abs=1e-12)
    assert schedule(steps - 1) == schedule(steps) == schedule(10 * steps) == floor
    assert schedule(warmup - 1) == 1.0


def test_warmup_and_inverse_square_root_are_the_papers():
    schedule = WarmupInverseSquareRoot(40)
    highest = 512**-0.5 * 40**-0.5
    for number in range(1, 500):
        assert schedule(number - 1) * highest == pytest.approx(512**-0.5 * min(number**-0.5, number * 40**-1.5))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WarmupCosine(0, 5), "warmup: expected at least 1 step, got 0"),
        (lambda: WarmupCosine(5, 5), "steps: expected more than warmup=5, got 5"),
        (lambda: WarmupCosine(1, 5, 1.5), "floor: expected 0 to 1, got 1.5"),
        (lambda: WarmupInverseSquareRoot(0), "warmup: expected at least 1 step, got 0"),
    ],
)
def test_bad_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
