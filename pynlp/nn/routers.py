"""Routers: which experts a token goes to, by a gate, by a hash of its id, or by the experts' own choice."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from pynlp.ops.common.checks import (
    as_int,
    as_matrix,
    at_once,
    check_not_negative,
    check_share,
    is_autocast_on,
    untransformed,
)
from pynlp.ops.moe.dispatch import dispatched
from pynlp.reference.common.dtypes import compute

SCORING_FUNCS = ("softmax", "sigmoid")


class RouterOutput(NamedTuple):
    """The experts of tokens `(..)`, as all routers give them.

    Attributes:
        logits: `(.., num_experts)` in fp32; None where there is no gate.
        top_k_weights: `(.., top_k)` in fp32: how much each expert counts.
        top_k_index: `(.., top_k)`, int64: the experts, or -1 for none.
        losses: What training adds to its loss, by name; each has its factor.
        load: `(num_experts,)`, int64: how many tokens each expert gets.
        dropped: One value, int64: choices that had no place left in their expert.

    Example:
        >>> import torch
        >>> from pynlp.nn import HashRouter
        >>> output = HashRouter(4, vocab_size=100, method="modulo")(torch.tensor([5, 6, 9]))
        >>> output.load.tolist(), output.logits
        ([0, 2, 1, 0], None)
    """

    logits: Tensor | None
    top_k_weights: Tensor
    top_k_index: Tensor
    losses: dict[str, Tensor]
    load: Tensor
    dropped: Tensor


class TopKRouter(nn.Module):
    """A gate: each token goes to the experts with its `top_k` highest scores.

    Scores are softmax(x W^T) or sigmoid(x W^T), in fp32 also in autocast. Of equal scores the lower expert is chosen.
    An expert whose logit is -inf comes last and weighs 0; of those with +inf each weighs the same, all others 0. NaN is
    an error on a CPU, and gives NaN on a GPU.

    Args:
        embed_dim: Width of a token, E.
        num_experts: Number of experts.
        top_k: Experts of a token.
        scoring_func: "softmax" or "sigmoid".
        norm_topk_prob: Whether a token's weights are divided by their sum. By default where top_k is more than 1: the
            weight of one expert would always be 1, and the gate would not learn.
        routed_scaling_factor: What weights are multiplied by.
        n_group, topk_group: Experts are in so many groups, and only the best `topk_group` of these may be chosen. A
            group is as good as its two highest scores together, with "softmax" as its highest.
        jitter: In training x is multiplied by random numbers of 1 - jitter to 1 + jitter.
        capacity_factor: In training an expert takes at most this times tokens * top_k / num_experts tokens: all first
            choices before the second ones, and earlier tokens before later ones. It is rounded up. The rest is dropped,
            counted, and has no expert. None drops nothing.
        router_aux_loss_coef: Factor of the balance loss, num_experts * sum over experts of (share of the choices) *
            (mean score): 1 where all experts have as much, as a rule more where not. transformers' is top_k times that.
        router_z_loss_coef: Factor of the mean squared log-sum-exp of the logits.
        bias_update_rate: How far `update_bias` moves the bias that balances experts without a loss: it decides with the
            scores who is chosen, and weighs nothing.
        device, dtype: Those of the weight.

    Attributes:
        weight: `(num_experts, E)`.
        expert_bias: `(num_experts,)`, fp32, where there is a bias_update_rate.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Shazeer et al., arXiv 1701.06538; Fedus et al., 2101.03961 (balance loss, capacity); Zoph et al., 2202.08906
    (z-loss); Wang et al., 2408.15664 (bias); DeepSeek-AI, 2412.19437 (groups).

    Example:
        >>> import torch
        >>> from pynlp.nn import TopKRouter
        >>> router = TopKRouter(64, num_experts=8, top_k=2, router_aux_loss_coef=0.01)
        >>> output = router(torch.randn(4, 10, 64))
        >>> output.top_k_index.shape, int(output.load.sum()), list(output.losses)
        (torch.Size([4, 10, 2]), 80, ['balance'])
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        scoring_func: str = "softmax",
        norm_topk_prob: bool | None = None,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        jitter: float = 0.0,
        capacity_factor: float | None = None,
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        bias_update_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_experts(num_experts, top_k)
        if embed_dim < 1:
            raise ValueError(f"embed_dim: expected at least 1, got {embed_dim}")
        if scoring_func not in SCORING_FUNCS:
            raise ValueError(f"scoring_func: expected 'softmax' or 'sigmoid', got {scoring_func!r}")
        if norm_topk_prob and top_k == 1:
            raise ValueError("norm_topk_prob: expected False with top_k=1, whose weight would always be 1, got True")
        if n_group < 1 or num_experts % n_group:
            raise ValueError(f"n_group: expected a divisor of num_experts = {num_experts}, got {n_group}")
        if not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group: expected 1 to n_group = {n_group}, got {topk_group}")
        if top_k > topk_group * (num_experts // n_group):
            raise ValueError(
                f"top_k: expected at most the {topk_group * (num_experts // n_group)} experts of the chosen groups, "
                f"got {top_k}"
            )
        check_share("jitter", jitter)
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor: expected a positive number or None, got {capacity_factor}")
        coefficients = dict(
            router_aux_loss_coef=router_aux_loss_coef, router_z_loss_coef=router_z_loss_coef,
            bias_update_rate=bias_update_rate,
        )  # fmt: skip
        for name, value in coefficients.items():
            check_not_negative(name, value)
        self.num_experts, self.top_k, self.scoring_func = num_experts, top_k, scoring_func
        self.norm_topk_prob = top_k > 1 if norm_topk_prob is None else norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group, self.topk_group, self.jitter, self.capacity_factor = n_group, topk_group, jitter, capacity_factor
        self.router_aux_loss_coef, self.router_z_loss_coef = router_aux_loss_coef, router_z_loss_coef
        self.bias_update_rate = bias_update_rate
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim, device=device, dtype=dtype))
        bias = load = None
        if bias_update_rate:
            bias = torch.zeros(num_experts, device=device)
            load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("expert_bias", bias)
        self.load_since_update = load  # no buffer: DistributedDataParallel would replace it by that of another process
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def _apply(self, function: Callable, recurse: bool = True) -> "TopKRouter":
        """Move to a device or a dtype; the bias stays in fp32, whose last digits are its steps."""
        super()._apply(function, recurse)
        if self.expert_bias is not None:
            self.expert_bias = self.expert_bias.float()
            moved = function(self.load_since_update)
            self.load_since_update = torch.zeros_like(moved) if self.load_since_update.is_meta else moved
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """The experts of tokens.

        Args:
            x: `(.., E)`.
            mask: Bool `(..)`: tokens that are False go to no expert and count nowhere. All count by default.
        """
        x = without_masked(x, mask)
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = gate_logits(x, self.weight)
        scores = self._scores(logits)
        index = first_of_largest(self._choice(scores.detach()), self.top_k)
        weights = scores.gather(-1, index)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights * self.routed_scaling_factor
        if mask is not None:
            index = index.where(mask[..., None], -1)
        chosen = counts_of(index, self.num_experts)
        losses = self._losses(logits, scores, chosen, mask)
        if self.training and self.load_since_update is not None:
            own = untransformed(chosen).reshape(-1, self.num_experts).sum(0)
            if self.load_since_update.is_meta:  # the weight was loaded since
                self.load_since_update = torch.zeros_like(own)
            # torch.func refuses to change what is there, and wraps what it makes.
            self.load_since_update = untransformed(self.load_since_update + own)
        dropped = chosen.new_zeros(())
        load, drops = chosen, self.training and self.capacity_factor is not None
        if drops:
            index, dropped = self._within_capacity(index)
            load = counts_of(index, self.num_experts)
        weights = weights.where(index >= 0, 0)
        return RouterOutput(logits, weights, index, losses, load, dropped)

    def _scores(self, logits: Tensor) -> Tensor:
        if self.scoring_func == "sigmoid":
            return logits.sigmoid()
        most = torch.finfo(logits.dtype).max / 2  # so that differences are finite
        return logits.clamp(-most, most).softmax(-1)

    def _choice(self, scores: Tensor) -> Tensor:
        """What decides who is chosen."""
        choice = scores if self.expert_bias is None else scores + self.expert_bias.float()
        if self.topk_group == self.n_group:
            return choice
        groups = choice.unflatten(-1, (self.n_group, -1))
        best = 2 if self.scoring_func == "sigmoid" and groups.shape[-1] > 1 else 1
        chosen = first_of_largest(groups.topk(best, -1).values.sum(-1), self.topk_group)
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, chosen, True)
        return groups.masked_fill(~allowed[..., None], -math.inf).flatten(-2)

    def _losses(self, logits: Tensor, scores: Tensor, chosen: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        losses = {}
        if self.router_aux_loss_coef:
            if self.scoring_func == "sigmoid":
                scores = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
            shares = chosen / chosen.sum().clamp_min(1)
            balance = self.num_experts * (shares * mean_of_tokens(scores, mask)).sum()
            losses["balance"] = self.router_aux_loss_coef * balance
        if self.router_z_loss_coef:
            losses["z"] = self.router_z_loss_coef * mean_of_tokens(logits.logsumexp(-1, True).square(), mask).sum()
        return losses

    def _within_capacity(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The experts without those that are full, and how many choices these lose."""
        flat = as_matrix(index)  # (tokens, top_k)
        choices = (flat >= 0).sum()
        capacity = (self.capacity_factor * choices.double() / self.num_experts - 1e-9).ceil()
        counts, offsets, _, places = dispatched(flat.T.contiguous(), self.num_experts)
        rank = places.T - (offsets - counts)[flat.clamp_min(0)]
        full = (flat >= 0) & (rank >= capacity)
        return flat.masked_fill(full, -1).view(index.shape), full.sum()

    @torch.no_grad()
    def update_bias(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Make experts that got more than the mean since the last update less likely, and others more.

        For once an optimizer step, however many forward passes it takes; passes in evaluation do not count.

        Args:
            group: Processes whose loads are summed, all of which must call this; by default all there are.
        """
        if self.load_since_update is None:
            return
        load = self.load_since_update
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load, group=group)
        load = load.double()
        self.expert_bias += self.bias_update_rate * torch.sign(load.mean() - load)
        self.load_since_update.zero_()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, scoring_func={self.scoring_func!r}"


class ExpertChoiceRouter(nn.Module):
    """A gate by which each expert chooses its tokens, those with the highest scores: all experts get as many.

    A token may get several experts or none. Whether it is chosen depends on all tokens of a batch, later ones too: not
    for causal models. On a GPU and compiled, experts take as much memory as if each token had all of them.

    Args:
        embed_dim: Width of a token, E.
        num_experts: Number of experts.
        capacity_factor: Experts of a token, on average: an expert takes this times tokens / num_experts, rounded up.
        device, dtype: Those of the weight.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Zhou et al., arXiv 2202.09368.

    Example:
        >>> import torch
        >>> from pynlp.nn import ExpertChoiceRouter
        >>> router = ExpertChoiceRouter(64, num_experts=8)
        >>> router(torch.randn(40, 64)).load.tolist()
        [10, 10, 10, 10, 10, 10, 10, 10]
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_experts(num_experts, 1)
        if embed_dim < 1:
            raise ValueError(f"embed_dim: expected at least 1, got {embed_dim}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor: expected a positive number, got {capacity_factor}")
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """The experts of tokens, see `TopKRouter.forward`.

        All tokens have as many places for experts as the token that most experts chose has, or on a GPU and compiled as
        there are experts; unused ones are -1.
        """
        logits = gate_logits(without_masked(x, mask), self.weight)
        scores = as_matrix(logits.softmax(-1))  # (tokens, experts)
        counts = scores.new_ones(len(scores), dtype=torch.bool) if mask is None else mask.reshape(-1)
        are_known = at_once(scores) and untransformed(scores) is scores
        tokens = int(counts.sum()) if mask is not None and are_known else len(scores)
        most = min(tokens, math.ceil(self.capacity_factor * tokens / self.num_experts - 1e-9))
        eligible = scores.detach().masked_fill(~counts[:, None], -1.0)
        chosen = first_of_largest(eligible.T, most)  # (experts, most)
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, chosen.T, True) & counts[:, None]
        index = torch.where(is_chosen, torch.arange(self.num_experts, device=x.device), -1)
        if are_known:  # without waiting
            width = max(1, int(is_chosen.sum(1).max())) if len(scores) else 1
            index = index.sort(1, descending=True).values[:, :width]
        weights = scores.gather(1, index.clamp_min(0)).where(index >= 0, 0)
        shape = (*x.shape[:-1], index.shape[1])
        load = is_chosen.sum(0)
        return RouterOutput(logits, weights.view(shape), index.view(shape), {}, load, load.new_zeros(()))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, capacity_factor={self.capacity_factor}"


def check_experts(num_experts: int, top_k: int) -> None:
    as_int("top_k", top_k)
    if as_int("num_experts", num_experts) < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to num_experts = {num_experts}, got {top_k}")


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32, in autocast, too; an error where a CPU sees NaN."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape (.., {weight.shape[1]}), got {tuple(x.shape)}")
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if is_autocast_on(kind) else nullcontext():
        logits = F.linear(compute(x), weight.to(compute(x).dtype))
    if at_once(logits) and untransformed(logits).isnan().any():
        raise ValueError("x: expected values whose logits are numbers, got NaN")
    return logits


def without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (.., E), 0 where the mask is False: what stands there must not come into any sum."""
    if mask is None:
        return x
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: expected bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
    return x.where(mask[..., None], 0)


def first_of_largest(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores of each row, the largest first; of equal ones the first.

    By the order of whole numbers: a score's bits, below them its place from behind.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    places = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = (bits.long() << 32) + places
    return scores.shape[-1] - 1 - (keys.topk(count, -1).values & 0xFFFFFFFF)


def counts_of(index: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen, int64 (num_experts,)."""
    counts = index.new_zeros(num_experts + 1, dtype=torch.int64)
    chosen = torch.where(index < 0, num_experts, index).flatten().long()
    return counts.scatter_add(0, chosen, torch.ones_like(chosen))[:-1]


def mean_of_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over all tokens that count of values (.., columns); 0 of none."""
    x = as_matrix(x)
    if mask is None:
        return x.sum(0) / max(1, len(x))
    mask = mask.reshape(-1, 1)
    return x.where(mask, 0).sum(0) / mask.sum().clamp_min(1)
