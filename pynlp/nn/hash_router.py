"""A router without parameters: which experts a token goes to is a table, by its id."""

import heapq

import torch
from torch import Tensor, nn

from pynlp.nn.routers import RouterOutput, check_experts, counts_of
from pynlp.ops.common.checks import check_range

METHODS = ("modulo", "balanced", "random")


class HashRouter(nn.Module):
    """A table of experts by token ids; all of a token's experts weigh the same.

    Args:
        num_experts: Number of experts.
        vocab_size: Ids are 0 to vocab_size - 1.
        top_k: Experts of a token, all different: so many hashes of its id.
        method: "modulo", the id's remainder, then the experts after it; "random"; or "balanced", by which all experts
            get as many tokens of a text with these frequencies, as far as whole ids allow.
        frequencies: `(vocab_size,)`, how often each id occurs, for "balanced"; all alike by default.
        seed: Of the random numbers.
        device: Of the table.

    Attributes:
        table: `(vocab_size, top_k)`, int64.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Roller et al., arXiv 2106.04426.

    Example:
        >>> import torch
        >>> from pynlp.nn import HashRouter
        >>> router = HashRouter(4, vocab_size=100, method="modulo")
        >>> router(torch.tensor([[5, 6, 99]])).top_k_index.tolist()
        [[[1], [2], [3]]]
    """

    def __init__(
        self,
        num_experts: int,
        vocab_size: int,
        *,
        top_k: int = 1,
        method: str = "balanced",
        frequencies: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_experts(num_experts, top_k)
        if vocab_size < 1:
            raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if frequencies is not None and frequencies.shape != (vocab_size,):
            raise ValueError(f"frequencies: expected shape ({vocab_size},), got {tuple(frequencies.shape)}")
        self.num_experts, self.vocab_size, self.top_k, self.method = num_experts, vocab_size, top_k, method
        generator = torch.Generator().manual_seed(seed)
        if method == "modulo":
            table = (torch.arange(vocab_size)[:, None] + torch.arange(top_k)) % num_experts
        elif method == "random":
            table = torch.rand(vocab_size, num_experts, generator=generator).topk(top_k).indices
        else:
            order = torch.randperm(vocab_size, generator=generator)
            often = torch.ones(vocab_size) if frequencies is None else frequencies.cpu()
            table = _balanced(order, often, num_experts, top_k)
        self.register_buffer("table", table.to(device))

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """The experts of tokens.

        Args:
            token_ids: int32 or int64 `(..)`.
            mask: Bool `(..)`: tokens that are False go to no expert. All do by default.
        """
        if token_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"token_ids: expected dtype int32 or int64, got {token_ids.dtype}: a hash is of ids")
        check_range("token_ids", token_ids, 0, self.vocab_size - 1)
        index = self.table[token_ids]
        if mask is not None:
            index = index.where(mask[..., None], -1)
        weights = (index >= 0).float() / self.top_k
        load = counts_of(index, self.num_experts)
        return RouterOutput(None, weights, index, {}, load, load.new_zeros(()))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, vocab_size={self.vocab_size}, top_k={self.top_k}, method={self.method!r}"
        )


def _balanced(order: Tensor, frequencies: Tensor, num_experts: int, top_k: int) -> Tensor:
    """A table by which the most frequent ids come first, and each takes the experts that have least so far."""
    order = order[frequencies[order].argsort(descending=True, stable=True)]
    loads = [(0.0, expert) for expert in range(num_experts)]  # a heap
    table = torch.empty(len(order), top_k, dtype=torch.int64)
    rows, often = [None] * len(order), frequencies.tolist()
    for token in order.tolist():
        least = [heapq.heappop(loads) for _ in range(top_k)]
        rows[token] = [expert for _, expert in least]
        for load, expert in least:
            heapq.heappush(loads, (load + often[token], expert))
    table[:] = torch.tensor(rows)
    return table
