"""A mixture of experts as a module: a router, experts around `pynlp.functional.moe_mlp`, and shared experts."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pynlp.nn.expert_parallel import experts_of_all_processes, own_experts_of
from pynlp.nn.feed_forward import FeedForward
from pynlp.nn.hash_router import HashRouter
from pynlp.nn.routers import RouterOutput, TopKRouter
from pynlp.ops.common.checks import untransformed
from pynlp.ops.moe.mlp import moe_mlp
from pynlp.reference.moe.mlp import ACTIVATIONS, GATED


class MoE(nn.Module):
    """A feed-forward layer of many experts, of which a router chooses some for each token: sum of w * expert(x).

    No token is dropped unless the router has a capacity.

    Args:
        embed_dim: Width of the input and the output, E.
        ffn_dim: Inner width of an expert, F.
        num_experts: Number of experts.
        top_k: Experts of a token, by default 2.
        activation: Of the experts: "swiglu", "gelu", "relu" or "swiglu_oai", that of GPT-OSS.
        bias: Whether the experts have biases.
        shared_ffn_dim: Inner width of an expert that all tokens go to; 0 for none.
        router: A `TopKRouter`, `HashRouter`, `ExpertChoiceRouter`, or a module like these for so many experts; by
            default a `TopKRouter` with the arguments that are left.
        routing: Arguments of the default router, as `router_aux_loss_coef`.
        device, dtype: Those of weights and biases.

    Attributes:
        gate_up_proj: `(num_experts, 2 F, E)`, gates first; `(num_experts, F, E)` of activations without a gate.
        down_proj: `(num_experts, E, F)`.
        gate_up_bias, down_bias: `(num_experts, 2 F or F)` and `(num_experts, E)`, or None.
        losses: What the last forward adds to a training's loss, by name; see `router_loss`.
        group: The process group that shares the experts, see `shard_experts_`; None: all are here.
        load, dropped: The last forward's tokens of each expert, `(num_experts,)`, and choices without a place.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Shazeer et al., arXiv 1701.06538; shared experts: Dai et al., 2401.06066.

    Example:
        >>> import torch
        >>> from pynlp.nn import MoE, router_loss
        >>> layer = MoE(64, 128, num_experts=8, top_k=2, router_aux_loss_coef=0.01)
        >>> y = layer(torch.randn(4, 10, 64))
        >>> (y.square().mean() + router_loss(layer)).backward()
        >>> y.shape, int(layer.load.sum())
        (torch.Size([4, 10, 64]), 80)
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        shared_ffn_dim: int = 0,
        router: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing: Any,
    ):
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("ffn_dim", ffn_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        if shared_ffn_dim < 0:
            raise ValueError(f"shared_ffn_dim: expected 0 (none) or more, got {shared_ffn_dim}")
        factory = {"device": device, "dtype": dtype}
        routing |= {} if top_k is None else {"top_k": top_k}
        if router is None:
            router = TopKRouter(embed_dim, num_experts, **routing, **factory)
        elif routing:
            raise ValueError(f"{next(iter(routing))}: expected no arguments of the default router with a router")
        elif not isinstance(router, nn.Module):
            raise TypeError(f"router: expected a module, as TopKRouter, got {type(router).__name__}")
        if getattr(router, "num_experts", num_experts) != num_experts:
            raise ValueError(f"router: expected one of {num_experts} experts, got {router.num_experts}")
        self.num_experts, self.activation = num_experts, activation
        self.router = router
        outputs = 2 * ffn_dim if activation in GATED else ffn_dim
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, outputs, embed_dim, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, embed_dim, ffn_dim, **factory))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, outputs, **factory)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, embed_dim, **factory)) if bias else None
        self.shared_expert = None
        if shared_ffn_dim:
            shared = "swiglu" if activation in GATED else activation
            self.shared_expert = FeedForward(embed_dim, shared_ffn_dim, activation=shared, bias=bias, **factory)
        self.group = None
        self.losses: dict[str, Tensor] = {}
        self.load = self.dropped = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert as torch.nn.Linear does."""
        for weight, bias in ((self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def from_feed_forward(cls, layer: FeedForward, num_experts: int, **options: Any) -> "MoE":
        """Experts that all begin as copies of a dense layer, whose result the mixture then has.

        That holds where a token's weights sum to 1, as they do by default with 2 experts a token or more, and without a
        shared expert.

        Args:
            layer: Its activation, biases, device and dtype become the experts'; its dropout is left out.
            num_experts, options: Those of `MoE`.

        Source: Komatsuzaki et al., arXiv 2212.05055.
        """
        up, down = layer.up_proj, layer.down_proj
        moe = cls(
            up.in_features, down.in_features, num_experts, activation=layer.activation, bias=up.bias is not None,
            device=up.weight.device, dtype=up.weight.dtype, **options,
        )  # fmt: skip
        with torch.no_grad():
            moe.gate_up_proj.copy_(up.weight)
            moe.down_proj.copy_(down.weight)
            if up.bias is not None:
                moe.gate_up_bias.copy_(up.bias)
                moe.down_bias.copy_(down.bias)
        return moe

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(.., E)` of x.

        Args:
            x: `(.., E)`.
            token_ids: `(..)`, for a `HashRouter`.
            mask: Bool `(..)`: tokens that are False go to no expert but shared ones. All go by default.
        """
        routing = self.route(x, token_ids, mask)
        if self.group is None:
            y = self.own_experts(x, routing.top_k_index, routing.top_k_weights)
        else:
            y = experts_of_all_processes(self.own_experts, self.num_experts, self.group, x, routing)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def own_experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`pynlp.functional.moe_mlp` of this process's experts, which are counted from 0."""
        return moe_mlp(
            x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj,
            activation=self.activation, gate_up_bias=self.gate_up_bias, down_bias=self.down_bias,
        )  # fmt: skip

    def route(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> RouterOutput:
        """The experts of each token; keeps the losses and the load."""
        if isinstance(self.router, HashRouter):
            if token_ids is None:
                raise ValueError("token_ids: expected the ids of x's tokens, by which a HashRouter chooses, got None")
            if token_ids.shape != x.shape[:-1]:
                raise ValueError(f"token_ids: expected shape {tuple(x.shape[:-1])}, got {tuple(token_ids.shape)}")
            routing = self.router(token_ids, mask)
        else:
            if token_ids is not None and token_ids.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"token_ids: expected dtype int32 or int64, got {token_ids.dtype}: a mask is mask=")
            routing = self.router(x, mask)
        self.losses, self.load, self.dropped = routing.losses, routing.load, routing.dropped
        if not torch.compiler.is_compiling() and untransformed(self.load) is not self.load:
            # Inside of torch.func's transforms; what is kept would outlive them.
            self.losses, self.load, self.dropped = {}, untransformed(self.load), untransformed(self.dropped)
        return routing

    def __getstate__(self) -> dict:
        """A copy has no losses: they belong to a graph of their own."""
        return {**self.__dict__, "losses": {}}

    def extra_repr(self) -> str:
        own, embed_dim, ffn_dim = self.down_proj.shape
        here = "" if own == self.num_experts else f" ({own} of them here)"
        return f"{embed_dim}, {ffn_dim}, num_experts={self.num_experts}{here}, activation={self.activation!r}"


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The mixtures of experts in a model, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def router_loss(model: nn.Module) -> Tensor:
    """The sum of what the routers of a model add to its loss, of its last forward pass; 0 without any.

    Where the loss is a sum over items, as `pynlp.training.Trainer`'s is, add this times their number. Under reentrant
    checkpoints, whose forward pass is without gradients, it has none.

    Example:
        >>> import torch
        >>> from pynlp.nn import MoE, router_loss
        >>> layer = MoE(8, 16, num_experts=4, router_aux_loss_coef=0.01, router_z_loss_coef=0.001)
        >>> _ = layer(torch.randn(10, 8))
        >>> sorted(layer.losses), bool(router_loss(layer) > 0)
        (['balance', 'z'], True)
    """
    losses = [loss for layer in moe_layers(model).values() for loss in layer.losses.values()]
    return sum(losses, start=torch.zeros((), device=losses[0].device if losses else None))


def shard_experts_(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Keep in each process only its share of the experts of a model; tokens then travel to their experts and back.

    Process r of n keeps the experts r * num_experts / n up to those of the next one. All processes must have the same
    model before, and call forward and backward alike, each with tokens of its own, as few as none. The gradients of
    experts are then sums over the tokens of all processes; those of all other parameters are this process's alone, and
    to be summed over processes, too. DistributedDataParallel, around this very model, leaves experts alone. It takes
    the mean of the others, so divide experts' gradients by the number of processes. Make optimizers afterwards: the
    parameters are new ones.

    Args:
        model: Its `MoE` layers are changed in place.
        group: The processes, by default all.

    Returns:
        The model.

    Raises:
        ValueError: the number of experts of a layer is no multiple of the processes, or they are shared already.

    Source: Lepikhin et al., arXiv 2006.16668 (GShard).

    Example:
        >>> import torch.distributed as dist
        >>> from pynlp.nn import MoE, shard_experts_
        >>> layer = MoE(8, 16, num_experts=4)
        >>> if dist.is_initialized():  # under torchrun
        ...     layer = shard_experts_(layer)
    """
    group = dist.group.WORLD if group is None else group
    layers = moe_layers(model)
    for name, layer in layers.items():
        if layer.group is not None:
            raise ValueError(f"model: expected layers with all experts here, got {name or 'one'}, which is shared")
        if layer.num_experts % dist.get_world_size(group):
            raise ValueError(
                f"model: expected experts in multiples of {dist.get_world_size(group)} processes, got "
                f"{layer.num_experts} in {name or 'it'}"
            )
    for layer in layers.values():
        first, last = own_experts_of(layer.num_experts, group)
        for key in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            parameter = getattr(layer, key)
            if parameter is not None:
                own = parameter.detach()[first:last].clone()
                setattr(layer, key, nn.Parameter(own, requires_grad=parameter.requires_grad))
        layer.group = group
    own = [
        f"{name}.{key}".lstrip(".")
        for name, layer in layers.items()
        for key, _ in layer.named_parameters(recurse=False)
    ]
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *own])
    return model


def update_router_biases(model: nn.Module) -> None:
    """`TopKRouter.update_bias` of all routers of a model; for once behind each optimizer step.

    Example:
        >>> import torch
        >>> from pynlp.nn import MoE, update_router_biases
        >>> layer = MoE(8, 16, num_experts=4, bias_update_rate=0.001)
        >>> _ = layer(torch.randn(100, 8))
        >>> update_router_biases(layer)
        >>> bool((layer.router.expert_bias != 0).any())
        True
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.update_bias()
