"""Parts of all transformers here: a block of layers around a residual stream, and a stack of blocks.

Shapes: B batch, S tokens, Sk source tokens, E embed_dim.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pynlp.models.config import ADDED_POSITIONS, NORMS, TransformerConfig
from pynlp.nn import FeedForward, HashRouter, LayerCache, MoE, MultiHeadAttention
from pynlp.nn.attention import RotaryTables
from pynlp.ops.common.checks import check, check_range, extremes


class Memory(Protocol):
    """The other side of a block's cross-attention."""

    def attend(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        """Attention of tokens x `(B, S, E)` to the memory, `(B, S, E)`."""
        ...


class Source(NamedTuple):
    """The encoder's features of the sources `(B, Sk, E)` and their lengths int32 `(B,)`, as memory of all blocks."""

    features: Tensor
    lengths: Tensor | None

    def attend(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        return attention(x, self.features, key_lengths=self.lengths)


class Block(nn.Module):
    """Self-attention, cross-attention where there is a source, and a feed-forward layer, each with a norm.

    With pre-norm a layer's result is not added to the residual at once: the next norm does it, with its dropout, in
    the pass that normalises the sum.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool,
        cross_attention: bool,
        number: int,
        attention: Callable[..., Tensor],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.pre_norm = config.pre_norm
        factory = {"device": device, "dtype": dtype}
        heads = dict(kv_heads=config.kv_heads, bias=False, dropout=config.dropout, attention=attention, **factory)
        self.attention_norm = make_norm(config, **factory)
        self.attention = MultiHeadAttention(
            config.embed_dim,
            config.heads,
            causal=causal,
            window=None if config.window is None else (config.window, 0 if causal else config.window),
            positions="none" if config.positions in ADDED_POSITIONS else config.positions,
            max_positions=config.max_positions,
            **heads,
        )
        if cross_attention:
            self.cross_attention_norm = make_norm(config, **factory)
            self.cross_attention = MultiHeadAttention(config.embed_dim, config.heads, **heads)
        self.feed_forward_norm = make_norm(config, **factory)
        self.feed_forward = make_feed_forward(config, number, **factory)

    def forward(
        self,
        h: Tensor,
        residual: Tensor | None,
        memory: Memory | None,
        layout: dict[str, Tensor | LayerCache | None],
        routing: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """The stream behind the block, in two parts that are yet to be added up.

        Args:
            h: The last layer's result `(B, S, E)`.
            residual: What to add it to; None in the first block, and always with post-norm.
            memory: What the cross-attention looks at; None without one.
            layout: The self-attention's arguments about tokens: key_lengths, cu_seqlens, or a cache.
            routing: A mixture of experts' arguments about them: token_ids and a mask.

        Returns:
            h and residual for the next block or the last norm.
        """
        h, residual = self.with_norm(lambda x: self.attention(x, **layout), self.attention_norm, h, residual)
        if memory is not None:
            h, residual = self.with_norm(
                lambda x: memory.attend(self.cross_attention, x), self.cross_attention_norm, h, residual
            )
        layer = self.feed_forward
        if isinstance(layer, MoE):
            return self.with_norm(lambda x: layer(x, **routing), self.feed_forward_norm, h, residual)
        return self.with_norm(layer, self.feed_forward_norm, h, residual)

    def with_norm(
        self, layer: Callable[[Tensor], Tensor], norm: nn.Module, h: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A layer with its norm, of the same h and residual as `forward`."""
        if not self.pre_norm:
            return norm(layer(h), h)[0], None
        x, residual = (norm(h), h) if residual is None else norm(h, residual)
        return layer(x), residual


class SinusoidalPositions(RotaryTables):
    """Sines and cosines of positions, those of one frequency side by side. Source: arXiv 1706.03762, section 3.5."""

    def forward(self, positions: Tensor) -> Tensor:
        cos, sin = self.on(positions.device)
        return torch.stack((sin[positions], cos[positions]), dim=-1).flatten(-2)


class Stack(nn.Module):
    """Blocks one after the other, with positions, scale and dropout of the embeddings before them and a norm behind.

    Args:
        config: Sizes and parts.
        layers: Blocks.
        causal: Whether a token sees no later one.
        cross_attention: Whether the blocks look at a memory, too.
        attention: What the attention layers call with q, k, v, as in `pynlp.nn.MultiHeadAttention`.
        device, dtype: Those of the parameters.

    Attributes:
        checkpointing: Whether training keeps only the inputs of each block, and backward computes the rest again: same
            gradients, less memory, more time. Chen et al., arXiv 1604.06174.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: int,
        *,
        causal: bool,
        cross_attention: bool = False,
        attention: Callable[..., Tensor],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.checkpointing = False
        scaled = config.scale_embeddings or config.positions == "sinusoidal"
        self.scale = config.embed_dim**0.5 if scaled else 1.0
        self.positions = None
        if config.positions == "sinusoidal":
            self.positions = SinusoidalPositions(config.max_positions, config.embed_dim, device=device)
        elif config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.embed_dim, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config, causal=causal, cross_attention=cross_attention, number=i,
                attention=attention, **factory,
            )
            for i in range(layers)
        )  # fmt: skip
        for block in self.blocks:  # one set of rotary tables for all layers
            block.attention.rotary = self.blocks[0].attention.rotary
        self.norm = make_norm(config, **factory) if config.pre_norm else None

    def reset_parameters(self) -> None:
        """Initialise as GPT-2: N(0, 0.02), divided by the root of their number in layers that write to the stream.

        Source: Radford et al., 2019, section 2.3.
        """
        writers = sum(
            name.endswith(("out_proj", "down_proj")) or isinstance(module, MoE) for name, module in self.named_modules()
        )
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                nn.init.normal_(module.gate_up_proj, std=0.02)
                nn.init.normal_(module.down_proj, std=0.02 / writers**0.5)
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("out_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / writers**0.5 if writes_residual else 0.02)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        memories: Sequence[Memory] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Features of tokens.

        Args:
            x: Their embeddings `(B, S, E)`, or packed without padding `(total, E)`.
            token_ids: `(B, S)` or `(total,)`, by which hash routers choose experts.
            key_lengths: int32 `(B,)`, the tokens of each row without its padding.
            cu_seqlens: int32 `(B + 1,)`, where each sequence of a packed x starts and the last one ends.
            memories: The memory of each block's cross-attention.
            cache: Views of a cache, as in `Decoder.features`.

        Returns:
            x's shape, normalised.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache: expected one of {len(self.blocks)} layers, got {len(cache)}")
        if self.positions is not None:
            positions = self.positions(self.position_ids(x, cu_seqlens, cache)).to(x.dtype)
            x = torch.add(positions, x, alpha=self.scale)
        elif self.scale != 1.0:
            x = self.scale * x
        routing = dict(token_ids=token_ids, mask=None)
        if self.config.ffn == "moe" and key_lengths is not None:  # padding goes to no expert
            routing["mask"] = torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
        h, residual = self.dropout(x), None
        for i, block in enumerate(self.blocks):
            memory = None if memories is None else memories[i]
            layout = dict(key_lengths=key_lengths, cu_seqlens=cu_seqlens, cache=None if cache is None else cache[i])
            if self.checkpointing and torch.is_grad_enabled():
                h, residual = checkpoint(block, h, residual, memory, layout, routing, use_reentrant=False)
            else:
                h, residual = block(h, residual, memory, layout, routing)
        return h if self.norm is None else self.norm(h, residual)[0]

    def position_ids(self, x: Tensor, cu_seqlens: Tensor | None, cache: Sequence[LayerCache] | None) -> Tensor:
        """Positions of x's tokens: `(S,)`; with a cache, whose tokens come first, `(B, S)`; packed `(total,)`."""
        new = torch.arange(x.shape[-2], device=x.device)
        longest = x.shape[-2]
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            longest = 0 if len(lengths) == 0 else extremes(lengths)[1]
            new = new - cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(new))
        elif cache is not None:
            longest = longest + (0 if len(x) == 0 else extremes(cache[0].lengths)[1])
            new = cache[0].lengths[:, None] + new
        check(
            longest <= self.config.max_positions,
            f"tokens: expected at most max_positions = {self.config.max_positions} in a row, cached ones included",
            lambda: f"got {longest}",
        )
        return new

    @property
    def cache_shape(self) -> dict[str, int]:
        """Arguments of `KVCache` and `PagedKVCache` that make them fit these blocks."""
        return dict(layers=len(self.blocks), **self.blocks[0].attention.cache_shape)


def make_norm(config: TransformerConfig, **factory) -> nn.Module:
    return NORMS[config.norm](config.embed_dim, dropout=config.dropout, **factory)


def is_sparse(config: TransformerConfig, number: int) -> bool:
    """Whether the block of this number has a mixture of experts."""
    return config.ffn == "moe" and number % config.moe_every == config.moe_every - 1


def make_feed_forward(config: TransformerConfig, number: int, **factory) -> nn.Module:
    """The feed-forward layer of the block of this number."""
    ffn_dim = config.ffn_dim
    if ffn_dim is None:
        ffn_dim = 8 * config.embed_dim // 3 if config.activation == "swiglu" else 4 * config.embed_dim
    sizes = config.embed_dim, ffn_dim
    if not is_sparse(config, number):
        return FeedForward(*sizes, activation=config.activation, dropout=config.dropout, bias=False, **factory)
    options = dict(activation=config.activation, shared_ffn_dim=config.shared_ffn_dim, **factory)
    if config.router == "hash":
        router = HashRouter(
            config.num_experts, config.vocab_size, top_k=config.top_k, seed=number, device=factory["device"]
        )
        return MoE(*sizes, config.num_experts, router=router, **options)
    names = ("top_k", "router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate", "capacity_factor")
    return MoE(*sizes, config.num_experts, **{name: getattr(config, name) for name in names}, **options)


def check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"{name}: expected shape (batch, seqlen), got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int64, got {tokens.dtype}")


def check_rows(tokens: Tensor, rows: int) -> None:
    """Check tokens `(rows, n)` for a state of that many rows."""
    check_tokens("tokens", tokens)
    if tokens.shape[0] != rows:
        raise ValueError(f"tokens: expected {rows} rows, which the state has, got {tokens.shape[0]}")


def check_lengths(name: str, lengths: Tensor | None, tokens: Tensor) -> None:
    """Check lengths of rows of tokens `(B, S)`."""
    if lengths is None:
        return
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"{name}: expected shape {tuple(tokens.shape[:1])}, got {tuple(lengths.shape)}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32, got {lengths.dtype}")
    check_range(name, lengths, 0, tokens.shape[1])
