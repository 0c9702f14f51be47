"""Multi-head latent attention: keys and values of all heads are projections of one short vector, which is cached."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pynlp.nn.attention import RotaryTables
from pynlp.nn.cache import LayerCache, check_layer_cache
from pynlp.nn.linear import Linear
from pynlp.nn.quantized_linear import compute_dtype, dense_weight
from pynlp.ops.attention.attention import attention as fused_attention
from pynlp.ops.attention.attention import attention_varlen
from pynlp.ops.attention.decode import attention_decode
from pynlp.ops.common.checks import check_is_tensor, check_share


class LatentAttention(nn.Module):
    """Self-attention over compressed keys and values, with rotated channels that all heads share.

    A token's key is `[rope | up-projection of its latent]`, its value another up-projection of it. Decoding makes
    neither: `q . (W latent) = (W^T q) . latent`, so it projects queries down instead, and all heads attend to the
    latents as if these were one head's keys and values.

    Shapes: B batch, S tokens, E embed_dim, H heads, N nope_dim, P rope_dim, Dv head_dim_v, R kv_rank.

    Args:
        embed_dim: Width of the input and the output.
        heads: Heads.
        kv_rank: Width of the latent.
        nope_dim, rope_dim: Channels of a head's queries and keys without and with a position; together up to 256.
        head_dim_v: Channels of a head's values; `nope_dim` by default.
        q_rank: Width that queries are compressed to; they are not by default.
        causal, softmax_scale: As in `pynlp.functional.attention`; the scale is `(nope_dim + rope_dim) ** -0.5`.
        dropout: Share of the attention weights that is set to 0 in training.
        norm_eps: eps of the RMS norms behind both compressions.
        rotary_base, rotary_scaling, rotary_interleaved, max_positions, attention, device, dtype: Arguments of
            `MultiHeadAttention`.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; with the norms of its published code and of DeepSeek-V3.

    Example:
        >>> import torch
        >>> from pynlp.nn import KVCache, LatentAttention
        >>> layer = LatentAttention(256, heads=8, kv_rank=64, nope_dim=32, rope_dim=16, causal=True).eval()
        >>> x = torch.randn(2, 10, 256)
        >>> cache = KVCache(2, 10, **layer.cache_shape)
        >>> with torch.no_grad():
        ...     y = layer(x, cache=cache.append(10)[0])
        >>> torch.allclose(y, layer(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        head_dim_v: int | None = None,
        q_rank: int | None = None,
        causal: bool = False,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        rotary_base: float = 10000.0,
        rotary_scaling: Mapping[str, object] | None = None,
        rotary_interleaved: bool = False,
        max_positions: int = 2048,
        attention: Callable[..., Tensor] = fused_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        head_dim_v = nope_dim if head_dim_v is None else head_dim_v
        sizes = dict(embed_dim=embed_dim, heads=heads, kv_rank=kv_rank, nope_dim=nope_dim, head_dim_v=head_dim_v)
        for name, size in (*sizes.items(), ("q_rank", 1 if q_rank is None else q_rank)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        check_share("dropout", dropout)
        self.embed_dim, self.heads, self.kv_rank, self.q_rank = embed_dim, heads, kv_rank, q_rank
        self.nope_dim, self.rope_dim, self.head_dim_v = nope_dim, rope_dim, head_dim_v
        self.causal, self.dropout = causal, dropout
        self.softmax_scale = (nope_dim + rope_dim) ** -0.5 if softmax_scale is None else softmax_scale
        self.rotary_interleaved = rotary_interleaved
        self.attention = attention

        self.rotary = RotaryTables(max_positions, rope_dim, base=rotary_base, device=device, **(rotary_scaling or {}))
        factory = {"device": device, "dtype": dtype}
        q_width = heads * (rope_dim + nope_dim)
        if q_rank is None:
            self.q_proj = Linear(embed_dim, q_width, bias=False, **factory)
        else:
            self.q_proj = nn.Sequential(
                Linear(embed_dim, q_rank, bias=False, **factory),
                nn.RMSNorm(q_rank, norm_eps, **factory),
                Linear(q_rank, q_width, bias=False, **factory),
            )
        self.kv_down_proj = Linear(embed_dim, rope_dim + kv_rank, bias=False, **factory)
        self.kv_norm = nn.RMSNorm(kv_rank, norm_eps, **factory)
        self.kv_up_proj = Linear(kv_rank, heads * (nope_dim + head_dim_v), bias=False, **factory)
        self.out_proj = Linear(heads * head_dim_v, embed_dim, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        key_lengths: Tensor | None = None,
        rotary_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention of each token of x to x, or to the cache and x. Arguments and result are `MultiHeadAttention`'s.

        A token's row of the cache is its turned rope channels, then its latent.
        """
        check_is_tensor("x", x)
        if cache is not None:
            check_layer_cache(cache)
        layout = "batch, seqlen" if cu_seqlens is None else "total"
        if x.dim() != (3 if cu_seqlens is None else 2) or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected shape ({layout}, {self.embed_dim}), got {tuple(x.shape)}")
        if key_lengths is not None and (cu_seqlens is not None or cache is not None):
            raise ValueError("key_lengths: expected None with cu_seqlens or a cache, which say where sequences end")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cu_seqlens: expected None with a cache, which has the keys and their number")
        if cu_seqlens is None and cache is None and not isinstance(rotary_offset, Tensor):
            self.rotary.check(rotary_offset, x.shape[1])

        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # (B, S, H, P + N)
        rope, latent = self.kv_down_proj(x).split((self.rope_dim, self.kv_rank), dim=-1)
        latent = self.kv_norm(latent).to(rope.dtype)  # (B, S, R); under autocast on a GPU the norm gives fp32
        dropout = self.dropout if self.training else 0.0
        options = dict(
            causal=self.causal, softmax_scale=self.softmax_scale, rotary=self.rotary.on(x.device),
            rotary_offset=rotary_offset, rotary_interleaved=self.rotary_interleaved,
        )  # fmt: skip
        if cache is not None:
            cache.check(dropout, x, q, rope, latent)
            # The first tokens are only written to the cache: they see each other, which needs nothing from there.
            out = self._decode(q[:, :0] if cache.empty else q, rope, latent, cache, options)
        if cache is None or cache.empty:
            k, v = self._keys_values(rope, latent)
            if cu_seqlens is not None:
                out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, dropout_p=dropout, **options)
            else:
                out = self.attention(q, k, v, key_lengths=key_lengths, dropout_p=dropout, **options)
        return self.out_proj(out.flatten(-2))

    def _keys_values(self, rope: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, P + N) and values (B, S, H, Dv) of all heads."""
        per_head = self.kv_up_proj(latent).unflatten(-1, (self.heads, -1))
        nope, v = per_head.split((self.nope_dim, self.head_dim_v), dim=-1)
        return torch.cat((rope.unsqueeze(-2).expand(*nope.shape[:-1], -1), nope), dim=-1), v

    def _decode(self, q: Tensor, rope: Tensor, latent: Tensor, cache: LayerCache, options: dict) -> Tensor:
        """Attention (B, Sq, H, Dv) of q (B, Sq, H, P + N) over the cache, to which rope and latent are added first."""
        up = dense_weight(self.kv_up_proj).unflatten(0, (self.heads, -1))
        up_k, up_v = up.split((self.nope_dim, self.head_dim_v), dim=1)  # (H, N, R), (H, Dv, R)
        q_rope, q_nope = q.split((self.rope_dim, self.nope_dim), dim=-1)
        q = torch.cat((q_rope, torch.einsum("bshn,hnr->bshr", q_nope, up_k)), dim=-1)  # (B, Sq, H, P + R)
        k = torch.cat((rope, latent), dim=-1).unsqueeze(2)  # (B, S, 1, P + R)
        # The values are channels of the same memory, which are written twice with the same numbers.
        out = attention_decode(
            q, cache.k, cache.k[..., self.rope_dim :], cache.lengths,
            k=k, v=k[..., self.rope_dim :], block_table=cache.block_table, **options,
        )  # fmt: skip
        return torch.einsum("bshr,hvr->bshv", out, up_v)

    @property
    def cache_shape(self) -> dict[str, int]:
        """Arguments of `KVCache` and `PagedKVCache` that make them fit this module."""
        return dict(kv_heads=1, head_dim=self.rope_dim + self.kv_rank, head_dim_v=0)

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of a token in a cache of `dtype`, by default that of the weights; for any number of heads."""
        dtype = compute_dtype(self.out_proj) if dtype is None else dtype
        return (self.rope_dim + self.kv_rank) * dtype.itemsize

    @classmethod
    def from_transformers(cls, module: nn.Module, **options) -> "LatentAttention":
        """A causal module with the weights of a DeepseekV2Attention or DeepseekV3Attention of transformers.

        Args:
            module: To copy the weights, sizes, scale, dropout, dtype, device and training mode from.
            options: Further arguments of the constructor, e.g. `max_positions`, and `rotary_scaling` where
                the module's rope has one.

        Raises:
            ValueError: the module has biases, or a scaling of rope that `options` do not name.
        """
        config = module.config
        if config.attention_bias:
            raise ValueError("module: expected attention_bias=False, as the projections here have none")
        rope = config.rope_parameters
        if rope["rope_type"] != "default" and "rotary_scaling" not in options:
            raise ValueError(f"rotary_scaling: expected the module's {rope['rope_type']!r} in words of ours, got None")
        weight = module.o_proj.weight
        ours = cls(
            config.hidden_size,
            config.num_attention_heads,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            head_dim_v=config.v_head_dim,
            q_rank=config.q_lora_rank,
            causal=True,
            softmax_scale=module.scaling,
            dropout=config.attention_dropout,
            norm_eps=module.kv_a_layernorm.variance_epsilon,
            rotary_base=rope["rope_theta"],
            rotary_interleaved=getattr(config, "rope_interleave", True),  # version 2 knows nothing else
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )

        def rope_first(weight: Tensor, heads: int) -> Tensor:
            rest, rope = weight.unflatten(0, (heads, -1)).tensor_split((-ours.rope_dim,), dim=1)
            return torch.cat((rope, rest), dim=1).flatten(0, 1)

        pairs = [
            (ours.kv_down_proj, rope_first(module.kv_a_proj_with_mqa.weight, 1)),
            (ours.kv_norm, module.kv_a_layernorm.weight),
            (ours.kv_up_proj, module.kv_b_proj.weight),
            (ours.out_proj, module.o_proj.weight),
        ]
        if ours.q_rank is None:
            pairs += [(ours.q_proj, rope_first(module.q_proj.weight, ours.heads))]
        else:
            down, norm, up = ours.q_proj
            pairs += [(down, module.q_a_proj.weight), (norm, module.q_a_layernorm.weight)]
            pairs += [(up, rope_first(module.q_b_proj.weight, ours.heads))]
        with torch.no_grad():
            for target, source in pairs:
                target.weight.copy_(source)
        return ours.train(module.training)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_rank={self.kv_rank}, nope_dim={self.nope_dim}, rope_dim={self.rope_dim}, "
            f"head_dim_v={self.head_dim_v}, causal={self.causal}"
        )
