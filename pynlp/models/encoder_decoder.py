"""A transformer that reads one sequence, the source, and writes another one, the target.

Shapes: B batch, S source tokens, T target tokens, E embed_dim, V vocab_size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynlp.models.blocks import Memory, Source, Stack, check_lengths, check_rows, check_tokens
from pynlp.models.config import TransformerConfig
from pynlp.nn import KVCache, LayerCache, Linear, MultiHeadAttention
from pynlp.nn.quantized_linear import dense_weight
from pynlp.ops.attention.attention import attention as fused_attention
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.attention.weights import attention_weights
from pynlp.ops.layers.linear import linear


class EncoderDecoder(nn.Module):
    """An encoder of sources, and a causal decoder that looks at its features in each block.

    Both have the positions and the window of the config in their self-attention; cross-attention has none. With tied
    embeddings one matrix embeds source and target and gives the logits, else there are three.

    Args:
        config: Its sizes and parts.
        attention: What its layers call with q, k, v; anything with the signature of `pynlp.functional.attention`.
        device, dtype: Those of the parameters.

    Source: Vaswani et al., arXiv 1706.03762.

    Example:
        >>> import torch
        >>> from pynlp.decoding import beam_search
        >>> from pynlp.models import EncoderDecoder, TransformerConfig
        >>> model = EncoderDecoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> source, lengths = torch.randint(100, (2, 7)), torch.tensor([7, 4], dtype=torch.int32)
        >>> model(source, lengths, torch.randint(100, (2, 5))).shape  # logits of the targets' next tokens
        torch.Size([2, 5, 100])
        >>> state = model.decoding_state(source, lengths, max_length=20)
        >>> found = beam_search(state, torch.tensor([[1], [1]]), end=2, max_length=19, beam_size=4)
        >>> len(found)  # of each source its best hypotheses
        2
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Callable[..., Tensor] = fused_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, **factory)
        self.source_embedding = self.output = None
        if not config.tied_embeddings:
            self.source_embedding = nn.Embedding(config.vocab_size, config.embed_dim, **factory)
            self.output = Linear(config.embed_dim, config.vocab_size, bias=False, **factory)
        encoder_layers = config.layers if config.encoder_layers is None else config.encoder_layers
        self.encoder = Stack(config, encoder_layers, causal=False, attention=attention, **factory)
        self.decoder = Stack(config, config.layers, causal=True, cross_attention=True, attention=attention, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as GPT-2, like `Decoder`."""
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()
        for module in (self.embedding, self.source_embedding, self.output):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, source: Tensor, source_lengths: Tensor | None, target: Tensor) -> Tensor:
        """Logits of the target's next token, `(B, T, V)`; see `features` for the arguments."""
        return self.logits(self.features(source, source_lengths, target))

    def features(self, source: Tensor, source_lengths: Tensor | None, target: Tensor) -> Tensor:
        """The decoder's features, of which the logits are a projection.

        Args:
            source: Ids `(B, S)`.
            source_lengths: int32 `(B,)`, the tokens of each source; the rest is padding, which no token sees. None:
                all are tokens.
            target: Ids `(B, T)`; no token sees a later one, so padding at the end needs no lengths.

        Returns:
            `(B, T, E)`.
        """
        memory = Source(self.encode(source, source_lengths), source_lengths)
        if target.shape[:1] != source.shape[:1]:
            raise ValueError(f"target: expected {source.shape[0]} rows, one a source, got {tuple(target.shape)}")
        return self.decode(target, [memory] * len(self.decoder.blocks))

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """The encoder's features `(B, S, E)`; those of padding mean nothing."""
        embedding = self.embedding_of(source, source_lengths)
        return self.encoder(embedding(source), token_ids=source, key_lengths=source_lengths)

    def encode_packed(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's features of the sources' tokens alone: padding costs no time.

        Returns:
            `(total, E)`, and the place of each token in `source.flatten()`, int64 `(total,)`.
        """
        embedding = self.embedding_of(source, source_lengths)
        real = torch.arange(source.shape[1], device=source.device) < source_lengths[:, None]
        places = real.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(source_lengths.cumsum(0), (1, 0)).to(torch.int32)
        tokens = source.flatten()[places]
        return self.encoder(embedding(tokens), token_ids=tokens, cu_seqlens=cu_seqlens), places

    def embedding_of(self, source: Tensor, source_lengths: Tensor | None) -> nn.Embedding:
        """The embedding of sources, after a check of these."""
        check_tokens("source", source)
        check_lengths("source_lengths", source_lengths, source)
        return self.embedding if self.source_embedding is None else self.source_embedding

    def decode(self, target: Tensor, memories: Sequence[Memory], cache: Sequence[LayerCache] | None = None) -> Tensor:
        """The decoder's features `(B, T, E)`.

        Args:
            target: Ids `(B, T)`.
            memories: The memory of each block's cross-attention.
            cache: Views of a cache, as in `Decoder.features`, made with `decoder.cache_shape`.
        """
        check_tokens("target", target)
        return self.decoder(self.embedding(target), token_ids=target, memories=memories, cache=cache)

    def logits(self, features: Tensor) -> Tensor:
        """Logits `(.., V)` of features `(.., E)`."""
        return linear(features, self.embedding.weight) if self.output is None else self.output(features)

    @property
    def output_weight(self) -> Tensor:
        """The projection of features to logits, `(V, E)`; where it is quantized, a dense copy."""
        return self.embedding.weight if self.output is None else dense_weight(self.output)

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps only the inputs of each block of encoder and decoder; see `Decoder`."""
        return self.decoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def decoding_state(self, source: Tensor, source_lengths: Tensor | None, max_length: int) -> "EncoderDecoderState":
        """A state for `pynlp.decoding` of a model in evaluation mode, with one row a source.

        Args:
            source, source_lengths: As in `features`.
            max_length: Most target tokens of a row, prefix included.
        """
        return EncoderDecoderState(self, source, source_lengths, max_length)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class SharedSource:
    """Keys and values of all sources in one layer, each source a page that any number of rows may look at.

    Args:
        k, v: `(N, S, kv_heads, head_dim)`.
        sources: int32 `(R,)`, the source of each row.
        lengths: int32 `(R,)`, its length.

    Attributes:
        query: The query of each row's last token, `(R, 1, heads, head_dim)`, as soon as the layer has attended.
    """

    def __init__(self, k: Tensor, v: Tensor, sources: Tensor, lengths: Tensor):
        self.k, self.v, self.sources, self.lengths = k, v, sources, lengths

    def attend(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        q = attention.q_proj(x).unflatten(-1, (attention.heads, attention.head_dim))
        self.query = q[:, -1:]
        out = attention_decode(q, self.k, self.v, self.lengths, block_table=self.sources[:, None])
        return attention.out_proj(out.flatten(-2))


class EncoderDecoderState:
    """A `pynlp.decoding.AttentiveState` of an `EncoderDecoder`: the tokens written so far, and the encoded sources.

    Each source's keys and values are computed once and stay where they are, however many rows look at them.

    Args:
        model: In evaluation mode if it has dropout.
        source: Ids `(N, S)`; a row each at first.
        source_lengths: int32 `(N,)`; None = all S.
        max_length: Most target tokens of a row, prefix included.
    """

    def __init__(self, model: EncoderDecoder, source: Tensor, source_lengths: Tensor | None, max_length: int):
        check_tokens("source", source)
        batch, seqlen = source.shape
        weight = model.embedding.weight
        shape = model.decoder.cache_shape
        self.model = model
        self.cache = KVCache(batch, max_length, **shape, dtype=weight.dtype, device=weight.device)
        self.sources = torch.arange(batch, dtype=torch.int32, device=source.device)
        self.lengths = torch.full_like(self.sources, seqlen) if source_lengths is None else source_lengths
        self.query = None  # of the last layer's cross-attention
        with torch.inference_mode():
            features, places = model.encode_packed(source, self.lengths)  # (total, E)
            self.keys_values = [
                [padded(x, places, source.shape) for x in block.cross_attention.keys_values(features)]
                for block in model.decoder.blocks
            ]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits `(R, V)` of what follows tokens `(R, n)`."""
        check_rows(tokens, len(self.cache.lengths))
        memories = [SharedSource(k, v, self.sources, self.lengths) for k, v in self.keys_values]
        with torch.inference_mode():
            features = self.model.decode(tokens, memories, self.cache.append(tokens.shape[1]))
        self.query = memories[-1].query
        return self.model.logits(features[:, -1])

    def select(self, rows: Tensor) -> None:
        """Make row i a continuation of old row `rows[i]`."""
        self.cache.select(rows)
        self.sources, self.lengths = self.sources[rows], self.lengths[rows]
        self.query = None if self.query is None else self.query[rows]

    @property
    def attention(self) -> Tensor:
        """Weights `(R, S)` of each row's last token in the last layer, mean over heads; 1 at padding.

        They are computed when they are asked for.
        """
        if self.query is None:
            raise ValueError("attention: expected a step before it, got none")
        keys, _ = self.keys_values[-1]
        # Here, in one layer and only if asked for, a source's keys are copied for each of its rows.
        weights = attention_weights(self.query, keys[self.sources], key_lengths=self.lengths)  # (R, H, 1, S)
        padding = torch.arange(keys.shape[1], device=keys.device) >= self.lengths[:, None]
        return weights.squeeze(2).mean(1).masked_fill(padding, 1.0)


def padded(x: Tensor, places: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Packed rows `(total, ..)` at their places among `N * S`: `(N, S, ..)`, 0 elsewhere."""
    rows = x.new_zeros(sizes[0] * sizes[1], *x.shape[1:])
    return rows.index_copy_(0, places, x).unflatten(0, sizes)
