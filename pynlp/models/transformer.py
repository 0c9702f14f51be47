"""A decoder-only transformer of pre-norm blocks, each `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

Shapes: B batch, S tokens, E embed_dim, F ffn_dim, V vocab_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pynlp.nn import LayerCache, MultiHeadAttention
from pynlp.ops.attention import attention as fused_attention

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ACTIVATIONS = ("swiglu", "gelu")


@dataclass
class TransformerConfig:
    """What a transformer is made of.

    Attributes:
        positions: "rope", "alibi", "relative" or "none"; see `pynlp.nn.MultiHeadAttention`.
        window: A token sees itself and this many tokens before it; None = all.
        max_positions: Most tokens in a row with "rope".
        ffn_dim: Inner width of the feed-forward layers; by default 4 E, with "swiglu" 8/3 E, which is as many weights.
        norm: "rms" or "layer".
        activation: "swiglu" (Shazeer, arXiv 2002.05202) or "gelu".
        tied_embeddings: Whether the output projection is the embedding.
    """

    vocab_size: int
    embed_dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    ffn_dim: int | None = None
    positions: str = "rope"
    window: int | None = None
    max_positions: int = 2048
    norm: str = "rms"
    activation: str = "swiglu"
    tied_embeddings: bool = True

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {self.activation!r}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")
        for name in ("vocab_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class FeedForward(nn.Module):
    """Two layers with a GELU between, or the second on `silu(gate) * up`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        width = config.ffn_dim or (8 * config.embed_dim // 3 if self.gated else 4 * config.embed_dim)
        self.up_proj = nn.Linear(config.embed_dim, 2 * width if self.gated else width, bias=False)
        self.down_proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)  # (B, S, F) or (B, S, 2 F): gate, up
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(x))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its norm before and a residual around."""

    def __init__(self, config: TransformerConfig, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.embed_dim)
        self.attention = MultiHeadAttention(
            config.embed_dim,
            config.heads,
            kv_heads=config.kv_heads,
            bias=False,
            causal=True,
            window=None if config.window is None else (config.window, 0),
            positions=config.positions,
            max_positions=config.max_positions,
            attention=attention,
        )
        self.feed_forward_norm = NORMS[config.norm](config.embed_dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache=cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """A causal language model.

    Args:
        config: Its sizes and parts.
        attention: What its layers call with q, k, v; anything with the signature of `pynlp.functional.attention`.
    """

    def __init__(self, config: TransformerConfig, *, attention: Callable[..., Tensor] = fused_attention):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = NORMS[config.norm](config.embed_dim)
        self.output = None if config.tied_embeddings else nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        for block in self.blocks:  # one set of rotary tables for all layers
            block.attention.rotary = self.blocks[0].attention.rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's: N(0, 0.02), layers that write to the residual stream smaller by the root of their number."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("out_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.layers) ** 0.5 if writes_residual else 0.02)

    def forward(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: Ids `(B, S)`.
            cache: What `append(S)` of a `KVCache` or `append(sequences, S)` of a `PagedKVCache` gave, made with this
                model's `cache_shape`: the tokens then follow those that are cached. Without gradients.

        Returns:
            `(B, S, V)`.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected shape (batch, seqlen), got {tuple(tokens.shape)}")
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache: expected one of {len(self.blocks)} layers, got {len(cache)}")
        x = self.embedding(tokens)  # (B, S, E)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i])
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.output is None else self.output(x)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def cache_shape(self) -> dict[str, int]:
        """What `KVCache` and `PagedKVCache` are to be made with for this model."""
        return dict(layers=len(self.blocks), **self.blocks[0].attention.cache_shape)
