"""What `pynlp.decoding` asks of a model, over caches.

Shapes: R rows (sequences being written), N sources, S source tokens, V vocab_size; heads as in `pynlp.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pynlp.nn import KVCache, MultiHeadAttention
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.attention.weights import attention_weights
from pynlp.ops.layers.linear import linear

if TYPE_CHECKING:
    from pynlp.models.encoder_decoder import EncoderDecoder
    from pynlp.models.transformer import Decoder


class DecoderState:
    """A `pynlp.decoding.DecodingState` of a `Decoder`: keys and values of the tokens written so far.

    Args:
        model: In evaluation mode if it has dropout.
        batch: Rows at first.
        max_length: Most tokens of a row, prefix included.
    """

    def __init__(self, model: Decoder, batch: int, max_length: int):
        weight = model.embedding.weight
        self.model = model
        self.cache = KVCache(batch, max_length, **model.cache_shape, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits `(R, V)` of what follows tokens `(R, n)`."""
        with torch.inference_mode():
            features = self.model.features(tokens, self.cache.append(tokens.shape[1]))
        return linear(features[:, -1], self.model.output_weight)

    def select(self, rows: Tensor) -> None:
        """Row i goes on from the history of old row `rows[i]`."""
        self.cache.select(rows)


class SharedSource:
    """Keys and values of all sources in one layer, to which rows look as to pages: a source is a page.

    Args:
        k, v: `(N, S, kv_heads, head_dim)`.
        sources: int32 `(R,)`, the source of each row.
        lengths: int32 `(R,)`, its length.

    Attributes:
        query: That of each row's last token, `(R, 1, heads, head_dim)`, as soon as the layer has attended.
    """

    def __init__(self, k: Tensor, v: Tensor, sources: Tensor, lengths: Tensor):
        self.k, self.v, self.sources, self.lengths = k, v, sources, lengths

    def attend(self, attention: MultiHeadAttention, x: Tensor) -> Tensor:
        q = attention.q_proj(x).unflatten(-1, (attention.heads, attention.head_dim))
        self.query = q[:, -1:]
        out = attention_decode(q, self.k, self.v, self.lengths, block_table=self.sources[:, None])
        return attention.out_proj(out.flatten(-2))


class EncoderDecoderState:
    """A `pynlp.decoding.AttentiveState` of an `EncoderDecoder`: what was written so far, and the encoded sources.

    Each source's keys and values are computed once and stay where they are, however many rows look at them.

    Args:
        model: In evaluation mode if it has dropout.
        source: Ids `(N, S)`; a row each at first.
        source_lengths: int32 `(N,)`; None = all S.
        max_length: Most target tokens of a row, prefix included.
    """

    def __init__(self, model: EncoderDecoder, source: Tensor, source_lengths: Tensor | None, max_length: int):
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
        memories = [SharedSource(k, v, self.sources, self.lengths) for k, v in self.keys_values]
        with torch.inference_mode():
            features = self.model.decode(tokens, memories, self.cache.append(tokens.shape[1]))
        self.query = memories[-1].query
        return linear(features[:, -1], self.model.output_weight)

    def select(self, rows: Tensor) -> None:
        """Row i goes on from the history of old row `rows[i]`."""
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
        # Only here, where few ask, and in one layer, are a source's keys copied for each of its rows.
        weights = attention_weights(self.query, keys[self.sources], key_lengths=self.lengths)  # (R, H, 1, S)
        padding = torch.arange(keys.shape[1], device=keys.device) >= self.lengths[:, None]
        return weights.squeeze(2).mean(1).masked_fill(padding, 1.0)


def padded(x: Tensor, places: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Packed rows `(total, ..)` at their places among `N * S`: `(N, S, ..)`, 0 elsewhere."""
    rows = x.new_zeros(sizes[0] * sizes[1], *x.shape[1:])
    return rows.index_copy_(0, places, x).unflatten(0, sizes)
