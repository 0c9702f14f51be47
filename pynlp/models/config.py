"""The configuration of a transformer, in numbers and names that can be written to a file."""

from dataclasses import dataclass

from pynlp.nn import LayerNorm, RMSNorm
from pynlp.ops.common.checks import check_share

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
ACTIVATIONS = ("swiglu", "gelu", "relu")  # those of FeedForward, the default first
ADDED_POSITIONS = ("sinusoidal", "learned")  # to the embeddings
FFNS = ("dense", "moe")
ROUTERS = ("top_k", "hash")
POSITIONS = ("rope", "relative", "alibi", *ADDED_POSITIONS, "none")  # the others are MultiHeadAttention's


@dataclass
class TransformerConfig:
    """Sizes and parts of an `Encoder`, a `Decoder` or an `EncoderDecoder`; `dataclasses.asdict` gives plain values.

    Attributes:
        vocab_size: Tokens of the vocabulary; an encoder-decoder has one for source and target.
        embed_dim: Width of the embeddings and the residual stream, E; a multiple of `heads`.
        layers: Blocks; an encoder-decoder's decoder has so many.
        encoder_layers: Blocks of an encoder-decoder's encoder; `layers` by default.
        heads, kv_heads: Query heads, and key/value heads, a divisor of them; `heads` by default.
        ffn_dim: Inner width of the feed-forward layers; by default 4 E, or 8/3 E with "swiglu": as many weights.
        positions: "rope", "relative" (T5's table, one a layer) or "alibi" in self-attention, see
            `pynlp.nn.MultiHeadAttention`; "sinusoidal" or "learned" (as GPT-2's), added to the embeddings; or "none".
        window: A token sees itself and this many tokens before it, in an encoder also behind it; None = all.
        max_positions: Most tokens in a row with "rope", "sinusoidal" or "learned".
        norm: "rms" or "layer".
        pre_norm: Whether a norm stands before each layer and behind the last block (Xiong et al., arXiv 2002.04745), or
            one behind each layer and its residual add.
        activation: "swiglu" (Shazeer, arXiv 2002.05202), "gelu" or "relu".
        ffn: "dense", or "moe": mixtures of experts of width `ffn_dim`, see `pynlp.nn.MoE`.
        moe_every: With "moe", so many blocks have one of these, in the last of them; 1 for all blocks.
        num_experts, top_k, shared_ffn_dim: Those of the mixtures.
        router: "top_k", by a gate, or "hash", by a balanced table of token ids, without parameters.
        router_aux_loss_coef, router_z_loss_coef, bias_update_rate, capacity_factor: Those of the gates; their losses
            are `pynlp.nn.router_loss(model)`. The padding of an encoder goes to no expert, that of a decoder does.
        dropout: Share of embeddings, attention weights, activations and what layers add to the residual that is set
            to 0 in training.
        tied_embeddings: Whether the output projection is the embedding, in an encoder-decoder also the source's.
        scale_embeddings: Whether embeddings are multiplied by the root of `embed_dim`, as in arXiv 1706.03762; with
            "sinusoidal" they always are.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        >>> from pynlp.models import TransformerConfig
        >>> config = TransformerConfig(vocab_size=8000, embed_dim=512, heads=8, kv_heads=2, positions="alibi")
        >>> config.layers, config.norm, config.activation
        (4, 'rms', 'swiglu')
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
    dropout: float = 0.0
    pre_norm: bool = True
    encoder_layers: int | None = None
    scale_embeddings: bool = False
    ffn: str = "dense"
    moe_every: int = 1
    num_experts: int = 8
    top_k: int = 2
    shared_ffn_dim: int = 0
    router: str = "top_k"
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self):
        choices = dict(positions=POSITIONS, norm=NORMS, activation=ACTIVATIONS, ffn=FFNS, router=ROUTERS)
        for name, names in choices.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {getattr(self, name)!r}")
        for name in ("vocab_size", "layers", "max_positions", "moe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("encoder_layers", "ffn_dim", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1 or None, got {getattr(self, name)}")
        if self.router == "hash":
            for name in ("router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate", "capacity_factor"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}: expected none with router='hash', which has no gate, got {getattr(self, name)}"
                    )
        if self.ffn == "moe" and self.moe_every > self.layers:
            raise ValueError(f"moe_every: expected at most the {self.layers} layers, got {self.moe_every}")
        check_share("dropout", self.dropout)
        if self.positions == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(f"embed_dim: expected an even number with positions='sinusoidal', got {self.embed_dim}")
