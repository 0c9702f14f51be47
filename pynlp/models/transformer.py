"""Transformers that read one sequence: an encoder that sees all of it, a decoder whose tokens see no later ones.

Shapes: B batch, S tokens, E embed_dim, V vocab_size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pynlp.models.blocks import Stack, check_lengths, check_rows, check_tokens
from pynlp.models.config import TransformerConfig
from pynlp.nn import KVCache, LayerCache, Linear
from pynlp.nn.quantized_linear import dense_weight
from pynlp.ops.attention.attention import attention as fused_attention
from pynlp.ops.layers.linear import linear


class Encoder(Stack):
    """Features of tokens that see all others of their row.

    Args:
        config: Its sizes and parts.
        attention: What its layers call with q, k, v; anything with the signature of `pynlp.functional.attention`.
        device, dtype: Those of the parameters.

    Attributes:
        checkpointing: See `Decoder`.

    Example:
        >>> import torch
        >>> from pynlp.models import Encoder, TransformerConfig
        >>> model = Encoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1, norm="layer", activation="gelu"))
        >>> model(torch.randint(100, (2, 7)), torch.tensor([7, 4], dtype=torch.int32)).shape
        torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Callable[..., Tensor] = fused_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, config.layers, causal=False, attention=attention, device=device, dtype=dtype)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features `(B, S, E)`.

        Args:
            tokens: Ids `(B, S)`.
            lengths: int32 `(B,)`, the tokens of each row; the rest is padding, which no token sees and whose features
                mean nothing. All are tokens by default.
        """
        check_tokens("tokens", tokens)
        check_lengths("lengths", lengths, tokens)
        return super().forward(self.embedding(tokens), token_ids=tokens, key_lengths=lengths)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Decoder(Stack):
    """A causal language model.

    Args:
        config: Its sizes and parts.
        attention: What its layers call with q, k, v; anything with the signature of `pynlp.functional.attention`.
        device, dtype: Those of the parameters.

    Attributes:
        checkpointing: Whether training keeps only the inputs of each block, and backward computes the rest again: same
            gradients, less memory, more time. False at first.

    Example:
        >>> import torch
        >>> from pynlp.decoding import sample
        >>> from pynlp.models import Decoder, TransformerConfig
        >>> model = Decoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
        >>> model(torch.randint(100, (2, 7))).shape  # logits of the next token
        torch.Size([2, 7, 100])
        >>> state = model.decoding_state(batch=1, max_length=20)
        >>> [[hypothesis]] = sample(state, torch.tensor([[1]]), end=2, max_length=19, seed=0)
        >>> len(hypothesis.tokens) <= 19
        True
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Callable[..., Tensor] = fused_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, config.layers, causal=True, attention=attention, device=device, dtype=dtype)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, device=device, dtype=dtype)
        self.output = None
        if not config.tied_embeddings:
            self.output = Linear(config.embed_dim, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Logits of the next token, `(B, S, V)`; see `features` for the arguments."""
        return self.logits(self.features(tokens, cache))

    def features(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Features of tokens, of which the logits are a projection.

        Args:
            tokens: Ids `(B, S)`.
            cache: The views of a `KVCache`'s `append(S)` or a `PagedKVCache`'s `append(sequences, S)`, made with this
                model's `cache_shape`: the tokens then follow the cached ones. Without gradients.

        Returns:
            `(B, S, E)`.
        """
        check_tokens("tokens", tokens)
        return super().forward(self.embedding(tokens), token_ids=tokens, cache=cache)

    def logits(self, features: Tensor) -> Tensor:
        """Logits `(.., V)` of features `(.., E)`."""
        return linear(features, self.embedding.weight) if self.output is None else self.output(features)

    @property
    def output_weight(self) -> Tensor:
        """The projection of features to logits, `(V, E)`; where it is quantized, a dense copy."""
        return self.embedding.weight if self.output is None else dense_weight(self.output)

    def decoding_state(self, batch: int, max_length: int) -> "DecoderState":
        """A state for `pynlp.decoding` of a model in evaluation mode: `batch` rows of at most `max_length` tokens."""
        return DecoderState(self, batch, max_length)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


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
        check_rows(tokens, len(self.cache.lengths))
        with torch.inference_mode():
            features = self.model.features(tokens, self.cache.append(tokens.shape[1]))
        return self.model.logits(features[:, -1])

    def select(self, rows: Tensor) -> None:
        """Make row i a continuation of old row `rows[i]`."""
        self.cache.select(rows)
