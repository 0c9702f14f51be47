"""The order of tokens by their experts: counts, offsets and permutation, and what has no expert."""

import pytest
import torch

from pynlp.functional import moe_dispatch
from pynlp.ops.moe.dispatch import dispatched

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (7, 3), (500, 2), (3, 40, 6), (5, 0)], ids=str)
@pytest.mark.parametrize("experts", [1, 4, 300])
def test_a_stable_order(experts, shape, dtype):
    index = torch.randint(-1, experts + 1, shape, dtype=dtype)
    counts, offsets, permutation = moe_dispatch(index, experts)
    assert counts.dtype == offsets.dtype == permutation.dtype == torch.int32
    slots = index.flatten().tolist()
    keys = [expert if 0 <= expert < experts else experts for expert in slots]
    assert permutation.tolist() == sorted(range(len(keys)), key=keys.__getitem__)
    assert counts.tolist() == [keys.count(expert) for expert in range(experts)]
    assert offsets.tolist() == counts.cumsum(0).tolist()
    *_, places = dispatched(index, experts)
    assert places.shape == index.shape
    for slot, place in enumerate(places.flatten().tolist()):
        assert (place == -1) == (keys[slot] == experts) and (place == -1 or permutation[place] == slot)


def test_no_experts_and_strides():
    counts, offsets, permutation = moe_dispatch(torch.tensor([[0, -1]]), 0)
    assert counts.shape == offsets.shape == (0,) and permutation.tolist() == [0, 1]
    index = torch.randint(4, (6, 10))
    assert all(map(torch.equal, moe_dispatch(index.T, 4), moe_dispatch(index.T.contiguous(), 4)))


def test_the_names_of_the_result_stay():
    for _ in range(4):  # later calls are by a plan
        assert moe_dispatch(torch.tensor([[1, 0]]), 2).counts.tolist() == [1, 1]


def test_opcheck():
    torch.library.opcheck(torch.ops.pynlp.moe_dispatch, (torch.randint(-1, 5, (6, 2)), 4))


def test_errors():
    index = torch.zeros(3, 2, dtype=torch.int64)
    for bad, shown in ((index - 2, "-2 to -2"), (index + 5, "5 to 5")):
        with pytest.raises(ValueError, match=f"top_k_index: expected experts from 0 to 3, or -1 or 4 .*got {shown}"):
            moe_dispatch(bad, 4)
    with pytest.raises(TypeError, match="top_k_index: expected dtype int32 or int64, got torch.float32"):
        moe_dispatch(index.float(), 4)
    with pytest.raises(TypeError, match="top_k_index: expected a tensor, got list"):
        moe_dispatch([0], 4)
    with pytest.raises(ValueError, match="num_experts: expected 0 or more, got -1"):
        moe_dispatch(index, -1)
    with pytest.raises(TypeError, match="num_experts: expected an int, got float"):
        moe_dispatch(index, 4.0)
    with pytest.raises(ValueError, match="top_k_index: .*without dimensions"):
        moe_dispatch(index[0, 0], 4)
