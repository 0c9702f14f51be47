"""Multi-head attention as a module: four projections around `pynlp.functional.attention`."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pynlp.nn.cache import LayerCache, check_layer_cache
from pynlp.nn.linear import Linear
from pynlp.nn.quantized_linear import compute_dtype
from pynlp.ops.attention.attention import attention as fused_attention
from pynlp.ops.attention.attention import attention_varlen
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.attention.positions import alibi_slopes, rotary_tables
from pynlp.ops.attention.weights import attention_weights
from pynlp.ops.common.checks import check_is_tensor, check_share
from pynlp.ops.common.hints import hint

POSITIONS = ("none", "rope", "alibi", "relative")


class MultiHeadAttention(nn.Module):
    """Self- or cross-attention with grouped heads, windows and three positional schemes.

    Shapes: B batch, Sq queries, Sk keys, E embed_dim, H heads, G key/value heads, D = E / H.

    Args:
        embed_dim: Width of the input and the output; a multiple of `heads`.
        heads: Query heads.
        kv_heads: Key/value heads, a divisor of `heads`; consecutive query heads share one. `heads` by default.
        memory_dim: Width of the memory in cross-attention; `embed_dim` by default.
        bias: Whether the four projections have one.
        causal, window, softmax_scale, softcap: Arguments of `pynlp.functional.attention`; the scale is `D ** -0.5` by
            default.
        dropout: Share of the attention weights that is set to 0 in training.
        sinks: Whether each head's softmax has one learned score more, of a key without a value; 0 at first.
        positions: "none", "rope", "alibi" or "relative" (T5's learned bias). The last three are for self-attention.
        rotary_dim: Channels of a head that "rope" turns; D by default.
        rotary_base: RoPE's base.
        rotary_scaling: Further arguments of `pynlp.functional.rotary_tables`, e.g.
            `{"scaling": "llama3", "factor": 8.0, "original_positions": 8192}`.
        rotary_interleaved: Pairs are channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        max_positions: Positions "rope" has tables for.
        relative_buckets: Rows of the table `relative_bias` of "relative".
        relative_max_distance: Distance from which on all keys fall into its last bucket.
        attention: Called with q, k, v; anything with the signature of `pynlp.functional.attention`. Packed
            sequences and caches go to `attention_varlen` and `attention_decode`.
        device, dtype: Those of the weights and biases.

    ALiBi's slopes are a constant; assign an `nn.Parameter` to `alibi_slopes` to train them.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Vaswani et al., arXiv 1706.03762; grouped heads: Ainslie et al., arXiv 2305.13245.

    Example:
        >>> import torch
        >>> from pynlp.nn import MultiHeadAttention
        >>> layer = MultiHeadAttention(256, heads=8, kv_heads=2, positions="rope", causal=True)
        >>> layer(torch.randn(2, 10, 256)).shape
        torch.Size([2, 10, 256])
        >>> cross = MultiHeadAttention(256, heads=8, memory_dim=512)
        >>> cross(torch.randn(2, 10, 256), torch.randn(2, 30, 512)).shape
        torch.Size([2, 10, 256])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        dropout: float = 0.0,
        sinks: bool = False,
        positions: str = "none",
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_scaling: Mapping[str, object] | None = None,
        rotary_interleaved: bool = False,
        max_positions: int = 2048,
        relative_buckets: int = 32,
        relative_max_distance: int = 128,
        attention: Callable[..., Tensor] = fused_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or embed_dim < 1 or embed_dim % heads:
            raise ValueError(f"embed_dim: expected a positive multiple of heads={heads}, got {embed_dim}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
        if positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(map(repr, POSITIONS))}, got {positions!r}")
        check_share("dropout", dropout)
        self.embed_dim, self.heads, self.kv_heads = embed_dim, heads, kv_heads
        self.memory_dim = embed_dim if memory_dim is None else memory_dim
        self.head_dim = head_dim = embed_dim // heads
        self.causal, self.window, self.softcap, self.dropout = causal, window, softcap, dropout
        self.softmax_scale = softmax_scale
        self.positions = positions
        self.rotary_interleaved = rotary_interleaved
        self.relative_max_distance = relative_max_distance
        self.attention = attention

        factory = {"device": device, "dtype": dtype}
        self.q_proj = Linear(embed_dim, heads * head_dim, bias, **factory)
        self.k_proj = Linear(self.memory_dim, kv_heads * head_dim, bias, **factory)
        self.v_proj = Linear(self.memory_dim, kv_heads * head_dim, bias, **factory)
        self.out_proj = Linear(heads * head_dim, embed_dim, bias, **factory)

        self.rotary = None
        if positions == "rope":
            rotary_dim = head_dim if rotary_dim is None else rotary_dim
            if rotary_dim > head_dim:
                raise ValueError(f"rotary_dim: expected at most embed_dim / heads = {head_dim}, got {rotary_dim}")
            self.rotary = RotaryTables(
                max_positions, rotary_dim, base=rotary_base, device=device, **(rotary_scaling or {})
            )
        self.register_buffer(
            "alibi_slopes", alibi_slopes(heads, device=device) if positions == "alibi" else None, persistent=False
        )
        self.relative_bias = None
        if positions == "relative":
            self.relative_bias = nn.Parameter(torch.empty(relative_buckets, heads, **factory))
        self.sinks = nn.Parameter(torch.empty(heads, **factory)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.MultiheadAttention, with Xavier over q, k and v as one matrix and biases of zero, and
        the table of relative positions as T5.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        together = sum(projection.out_features for projection in projections)
        for projection in projections:
            # With a memory of its own width the three are no longer one matrix.
            fan_out = together if self.memory_dim == self.embed_dim else projection.out_features
            bound = math.sqrt(6 / (projection.in_features + fan_out))
            nn.init.uniform_(projection.weight, -bound, bound)
        self.out_proj.reset_parameters()
        for projection in (*projections, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.relative_bias is not None:
            nn.init.normal_(self.relative_bias, std=self.embed_dim**-0.5)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    @hint(
        more="keys and values come from x, or for cross-attention both from memory",
        key_padding_mask="write key_lengths, each row's keys before its padding",
        attn_mask="say what it masks: causal or window of the module, key_lengths of the call",
        is_causal="it is an option of the module: causal",
        need_weights="the weights are what the module's method `weights` gives",
    )
    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        key_lengths: Tensor | None = None,
        rotary_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_memory: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention of each token of x to x, to memory, or to the cache and x.

        Args:
            x: `(B, Sq, E)`, or packed sequences `(total, E)`.
            memory: `(B, Sk, memory_dim)`: keys and values come from here; only with `positions="none"`. For several
                calls with one memory: its `keys_values(memory)`.
            key_lengths: int32 `(B,)`, each row's keys; the padding behind them is masked.
            rotary_offset: With "rope", the position of the first token, or the positions `(B, Sq)` of all; `(total,)`
                of packed sequences. With a cache, the position of an entry's first token.
            cu_seqlens: int32 `(sequences + 1,)`, where each packed sequence of x starts and the last one ends.
            cu_seqlens_memory: The same for a packed memory `(total_k, memory_dim)`.
            cache: This layer's part of what `append` of a `KVCache` or `PagedKVCache` gave for the tokens of x. Their
                keys, turned by "rope", and values are written there. Without gradients.

        Returns:
            `(B, Sq, E)`, or `(total, E)`.
        """
        self._check_input(x, memory, key_lengths, cu_seqlens, cu_seqlens_memory, cache)
        if cache is not None:
            check_layer_cache(cache)
        if self.rotary is not None and not isinstance(rotary_offset, Tensor) and cu_seqlens is None and cache is None:
            self.rotary.check(rotary_offset, x.shape[1])

        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))  # (B, Sq, H, D)
        k, v = memory if isinstance(memory, tuple) else self.keys_values(x if memory is None else memory)
        dropout = self.dropout if self.training else 0.0
        options = self._options(rotary_offset, x.device)
        if cache is not None:
            cache.check(dropout, x, q, k, v)
            # The first tokens are only written to the cache: they see each other, which needs nothing from there.
            out = attention_decode(
                q[:, :0] if cache.empty else q, cache.k, cache.v, cache.lengths,
                k=k, v=v, block_table=cache.block_table, **options,
            )  # fmt: skip
        if cu_seqlens is not None:
            cu_seqlens_k = cu_seqlens if cu_seqlens_memory is None else cu_seqlens_memory
            out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens_k, dropout_p=dropout, **options)
        elif cache is None or cache.empty:
            out = self.attention(q, k, v, key_lengths=key_lengths, dropout_p=dropout, **options)
        return self.out_proj(out.flatten(-2))

    def _options(self, rotary_offset: int | Tensor, device: torch.device) -> dict:
        """Arguments that all attention functions take."""
        if self.alibi_slopes is not None and self.alibi_slopes.is_meta:  # of a module that was filled by assignment
            self.alibi_slopes = alibi_slopes(self.heads, device=device)
        return dict(
            causal=self.causal, window=self.window, softmax_scale=self.softmax_scale, softcap=self.softcap,
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            relative_bias=self.relative_bias, relative_max_distance=self.relative_max_distance,
            rotary=None if self.rotary is None else self.rotary.on(device),
            rotary_offset=rotary_offset, rotary_interleaved=self.rotary_interleaved,
        )  # fmt: skip

    def weights(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        key_lengths: Tensor | None = None,
        rotary_offset: int | Tensor = 0,
    ) -> Tensor:
        """The attention weights of each token of x: for plots and checks, without dropout or gradients.

        Args:
            rows: int32 `(rows,)`, which tokens of x; all by default.
            The others: as in `forward`.

        Returns:
            `(B, H, rows, Sk)`, fp32.
        """
        self._check_input(x, memory, key_lengths, None, None, None)
        with torch.no_grad():
            q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))  # (B, Sq, H, D)
            k, _ = self.keys_values(x if memory is None else memory)
            return attention_weights(q, k, rows=rows, key_lengths=key_lengths, **self._options(rotary_offset, x.device))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `(B, Sk, G, D)` of a memory, for `forward` to take in its place; differentiable."""
        k = self.k_proj(memory).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(memory).unflatten(-1, (self.kv_heads, self.head_dim))
        return k, v

    def _check_input(self, x, memory, key_lengths, cu_seqlens, cu_seqlens_memory, cache) -> None:
        check_is_tensor("x", x)
        layout = "batch, seqlen" if cu_seqlens is None else "total"
        dimensions = 3 if cu_seqlens is None else 2
        if x.dim() != dimensions or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected shape ({layout}, {self.embed_dim}), got {tuple(x.shape)}")
        if memory is None:
            if self.memory_dim != self.embed_dim:
                raise ValueError(f"memory: expected shape ({layout}, {self.memory_dim}), got None")
        elif self.positions != "none":
            raise ValueError(
                f"memory: expected None with positions={self.positions!r}, whose distances between x and memory "
                "would mean nothing; cross-attention takes positions='none'"
            )
        elif isinstance(memory, Tensor) and (memory.dim() != dimensions or memory.shape[-1] != self.memory_dim):
            raise ValueError(f"memory: expected shape ({layout}, {self.memory_dim}), got {tuple(memory.shape)}")
        if (cu_seqlens_memory is not None) != (cu_seqlens is not None and memory is not None):
            needed = "the starts of the memory's" if cu_seqlens_memory is None else "None without a memory of"
            raise ValueError(f"cu_seqlens_memory: expected {needed} packed sequences, got {cu_seqlens_memory}")
        if cu_seqlens is not None and key_lengths is not None:
            raise ValueError("key_lengths: expected None with cu_seqlens, which say where sequences end")
        if cache is not None:
            for name, x in (("memory", memory), ("key_lengths", key_lengths), ("cu_seqlens", cu_seqlens)):
                if x is not None:
                    raise ValueError(f"{name}: expected None with a cache, which has the keys and their number")

    @property
    def cache_shape(self) -> dict[str, int]:
        """Arguments of `KVCache` and `PagedKVCache` that make them fit this module."""
        return dict(kv_heads=self.kv_heads, head_dim=self.head_dim, head_dim_v=self.head_dim)

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of a token's keys and values in a cache of `dtype`, by default that of the weights."""
        dtype = compute_dtype(self.k_proj) if dtype is None else dtype
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Slopes stay fp32 in a module cast to half precision, and come to be in one made on the meta device.
        if self._buffers.get("alibi_slopes") is not None:
            self.alibi_slopes = alibi_slopes(self.heads, device=self.alibi_slopes.device)
        return self

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options) -> "MultiHeadAttention":
        """A module with the weights of a torch.nn.MultiheadAttention.

        Input and output are batch-first whatever `module.batch_first` is. What torch takes at every call is an option
        here: `causal=True` for its causal mask; its `key_padding_mask` becomes `key_lengths`.

        Args:
            module: To copy the weights, dropout, dtype, device and training mode from.
            options: Further arguments of the constructor, e.g. `causal` or `positions`.

        Raises:
            TypeError: the module is of another kind.
            ValueError: the module has what this one has not (bias_k, zero attention, unlike kdim and vdim).
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("module: expected add_bias_kv=False and add_zero_attn=False, which have no counterpart")
        if module.kdim != module.vdim:
            raise ValueError(
                f"module: expected keys and values of one width, got kdim={module.kdim} and vdim={module.vdim}"
            )
        weight = module.out_proj.weight
        ours = cls(
            module.embed_dim,
            module.num_heads,
            memory_dim=module.kdim,
            bias=module.in_proj_bias is not None,
            dropout=module.dropout,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        with torch.no_grad():
            for projection, weight in zip(projections, weights, strict=True):
                projection.weight.copy_(weight)
            ours.out_proj.weight.copy_(module.out_proj.weight)
            if module.in_proj_bias is not None:
                for projection, bias in zip(projections, module.in_proj_bias.chunk(3), strict=True):
                    projection.bias.copy_(bias)
                ours.out_proj.bias.copy_(module.out_proj.bias)
        return ours.train(module.training)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, positions={self.positions!r}, causal={self.causal}{window}"
        )


class RotaryTables(nn.Module):
    """RoPE's `(cos, sin)` as buffers, in fp32 whatever the module around them is cast to; layers may share one."""

    def __init__(self, max_positions: int, rotary_dim: int, *, device: torch.device | str | None = None, **options):
        super().__init__()
        self.max_positions, self.rotary_dim, self.options = max_positions, rotary_dim, options
        cos, sin = rotary_tables(max_positions, rotary_dim, device=device, **options)
        self.register_buffer("cos", cos, persistent=False)  # (max_positions, rotary_dim / 2)
        self.register_buffer("sin", sin, persistent=False)  # (max_positions, rotary_dim / 2)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # In bf16 the angles of neighbouring positions would fall together, and a module that was made on the meta
        # device gets buffers with nothing in them: so computed anew where they have gone.
        self.cos, self.sin = rotary_tables(self.max_positions, self.rotary_dim, device=self.cos.device, **self.options)
        return self

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each `(max_positions, rotary_dim / 2)`.

        They are made on `device` if they are on the meta device still, as in a module that was filled by
        load_state_dict(assign=True), which moves nothing else.
        """
        if self.cos.is_meta and device.type != "meta":
            self.cos, self.sin = rotary_tables(self.max_positions, self.rotary_dim, device=device, **self.options)
        return self.cos, self.sin

    def check(self, offset: int, seqlen: int) -> None:
        if offset < 0 or offset + seqlen > self.max_positions:
            raise ValueError(
                f"x: expected positions from 0 to max_positions - 1 = {self.max_positions - 1}, "
                f"got {offset} to {offset + seqlen - 1}"
            )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.max_positions}, {self.rotary_dim}{options}"
