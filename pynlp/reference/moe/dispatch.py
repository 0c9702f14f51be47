"""The order of tokens by their experts in PyTorch: the default back end and the oracle of the fused ones."""

import torch
from torch import Tensor


def moe_dispatch(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of each expert, where they end, the slot of each row, and the row of each slot or -1; all int32.

    Slots, (T, K) in their order, are sorted by expert; those without one, numbered other than 0 to E - 1, come last.
    """
    slots = top_k_index.flatten()
    has_expert = (slots >= 0) & (slots < num_experts)
    expert = torch.where(has_expert, slots, num_experts).long()
    permutation = expert.argsort(stable=True)
    counts = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))[:-1]
    places = torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(slots), device=slots.device))
    places = torch.where(has_expert, places, -1).view(top_k_index.shape)
    return counts.int(), counts.cumsum(0).int(), permutation.int(), places.int()
