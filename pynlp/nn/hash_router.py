"""A router without parameters: which experts a token goes to is a table, by its id."""

import heapq

import torch
from torch import Tensor, nn

from pynlp.nn.routers import RouterOutput, check_experts, counts_of
from pynlp.ops.common.checks import check_is_tensor, check_range

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
        if frequencies is not None:
            check_is_tensor("frequencies", frequencies)
            if method != "balanced":
                raise ValueError(f"frequencies: expected none with method={method!r}, which balances nothing")
            if frequencies.shape != (vocab_size,):
                raise ValueError(f"frequencies: expected shape ({vocab_size},), got {tuple(frequencies.shape)}")
            if not (frequencies.isfinite().all() and (frequencies >= 0).all() and frequencies.sum() > 0):
                raise ValueError("frequencies: expected numbers from 0 on, not all 0, got others")
        self.num_experts, self.vocab_size, self.top_k, self.method = num_experts, vocab_size, top_k, method
        generator = torch.Generator().manual_seed(seed)
        if method == "modulo":
            table = (torch.arange(vocab_size)[:, None] + torch.arange(top_k)) % num_experts
        elif method == "random":
            table = torch.rand(vocab_size, num_experts, generator=generator).topk(top_k).indices
        else:
            often = torch.ones(vocab_size) if frequencies is None else frequencies.cpu()
            table = _balanced(often, num_experts, top_k, generator)
        self.register_buffer("table", table.to(device))

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """The experts of tokens.

        Args:
            token_ids: int32 or int64 `(..)`.
            mask: Bool `(..)`: tokens that are False go to no expert. All do by default.
        """
        if token_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"token_ids: expected dtype int32 or int64, got {token_ids.dtype}: a hash is of ids")
        if mask is not None:
            token_ids = token_ids.where(mask, 0)
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


def _balanced(often: Tensor, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """A table whose hashes each take the ids about from the most frequent on, each to the expert that has least so far.

    Each hash has an order of its own, so that experts do not come in pairs.
    """
    rows: list[list[int]] = [[] for _ in often]
    weights = often.tolist()
    for _ in range(top_k):
        noise = torch.rand(len(often), generator=generator) - 0.5
        order = (often.double().clamp_min(1e-30).log() + noise).argsort(descending=True).tolist()
        loads = [(0.0, expert) for expert in torch.randperm(num_experts, generator=generator).tolist()]
        heapq.heapify(loads)
        for token in order:
            taken = []
            while loads[0][1] in rows[token]:
                taken.append(heapq.heappop(loads))
            load, expert = heapq.heappop(loads)
            rows[token].append(expert)
            for entry in (*taken, (load + weights[token], expert)):
                heapq.heappush(loads, entry)
    return torch.tensor(rows)
