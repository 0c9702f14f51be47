"""Experts that several processes share: tokens travel to the process of their expert, and results back."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pynlp.nn.routers import RouterOutput
from pynlp.ops.common.checks import as_matrix
from pynlp.ops.moe.dispatch import dispatched


class _Exchange(torch.autograd.Function):
    """Rows x (sum of `sent`, ..) to the processes of a group, `sent[r]` of them to process r, and rows from them."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        result = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def own_experts_of(num_experts: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """The first expert of this process, and the first of the next one."""
    share = num_experts // dist.get_world_size(group)
    first = dist.get_rank(group) * share
    return first, first + share


def experts_of_all_processes(
    own_experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_experts: int,
    group: dist.ProcessGroup,
    x: Tensor,
    routing: RouterOutput,
) -> Tensor:
    """The weighted sum of what each token's experts make of it, wherever they are.

    How many rows travel where is read by the host: it waits for the router.

    Args:
        own_experts: What this process's experts, counted from 0, make of rows (R, E), their experts (R, 1) and weights.
        x: `(.., E)`.
        routing: Its experts, of all processes.

    Returns:
        `(.., E)`.
    """
    tokens = as_matrix(x)
    index = as_matrix(routing.top_k_index)
    counts, _, permutation, places = dispatched(index.contiguous(), num_experts)
    rows = tokens[(permutation // max(1, index.shape[1])).long()[: int(counts.sum())]]
    # Rows are in the order of their experts, and so of the processes that have these.
    first, last = own_experts_of(num_experts, group)
    world, share = dist.get_world_size(group), last - first
    incoming = torch.empty_like(counts)  # of each process the rows of each expert here
    dist.all_to_all_single(incoming, counts, group=group)
    sent = counts.view(world, share).sum(1).tolist()
    received = incoming.view(world, share).sum(1).tolist()
    expert = torch.arange(share, device=x.device).repeat(world).repeat_interleave(incoming)
    there = _Exchange.apply(rows, sent, received, group)
    results = own_experts(there, expert[:, None], there.new_ones(len(there), 1, dtype=torch.float32))
    back = _Exchange.apply(results, received, sent, group)
    back = torch.cat((back, back.new_zeros(1, back.shape[1])))  # the row of choices without an expert
    weights = as_matrix(routing.top_k_weights)
    chosen = back[places.long()] * weights[..., None]  # (tokens, top_k, E)
    return chosen.sum(1).to(x.dtype).view(x.shape)
