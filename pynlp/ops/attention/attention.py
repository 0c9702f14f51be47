"""Fused attention: schema, fake, autograd and the public functions, for batches and for packed sequences."""

import torch
from torch import Tensor

from pynlp.ops.attention import checks
from pynlp.ops.common.checks import autocast, prepare_dropout, rows_in_place
from pynlp.ops.common.hints import hint
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.common.plans import derive, planned
from pynlp.reference.attention import attention as reference
from pynlp.reference.attention.attention import Options
from pynlp.reference.common.dtypes import compute_dtype

MASK = "say what it masks: causal=True, window=(left, right), key_lengths=lengths"
# What others call it: scaled_dot_product_attention, flash-attn, torch.nn.MultiheadAttention.
FOREIGN = dict(
    more=f"the others go by name. Of a mask {MASK}",
    attn_mask=MASK,
    mask=MASK,
    key_padding_mask="write key_lengths, each row's keys before its padding",
    is_causal="write causal",
    scale="write softmax_scale",
    enable_gqa="leave it out: k and v may have fewer heads",
    window_size="write window=(left, right), with None for no limit instead of -1",
    return_attn_probs="write return_lse, or call attention_weights",
)
OPTIONS = (
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, Tensor? key_lengths, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? relative_bias, Tensor? relative_buckets, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_positions, SymInt rotary_offset, bool rotary_interleaved, "
    "float dropout_p, Tensor? dropout_seed"
)


define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    reference,
    triton="attention.launch",
    dtype_of="q",
)
define(
    "attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {OPTIONS}, "
    "bool needs_slopes, bool needs_table, bool needs_sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="attention.launch",
    dtype_of="q",
)


@torch.library.register_fake("pynlp::attention_forward", lib=LIBRARY)
def _forward_fake(q, k, v, *options):
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=compute_dtype(q))


@torch.library.register_fake("pynlp::attention_backward", lib=LIBRARY)
def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, *options):
    *options, needs_slopes, needs_table, needs_sinks = options
    options = Options(*options)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    biases = (options.alibi_slopes, options.relative_bias, options.sinks)
    for x, needed in zip(biases, (needs_slopes, needs_table, needs_sinks), strict=True):
        gradients.append(torch.empty_like(x) if needed else q.new_empty(0, dtype=torch.float32))
    return tuple(gradients)


_TENSORS = [i for i, kind in enumerate(Options.__annotations__.values()) if kind == Tensor | None]
_BIASES = [Options._fields.index(name) for name in ("alibi_slopes", "relative_bias", "sinks")]


def _setup_context(ctx, inputs, output):
    q, k, v, *options = inputs
    ctx.save_for_backward(q, k, v, *output, *(options[i] for i in _TENSORS))
    for i in _TENSORS:
        options[i] = None
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, saved, needs, grad_out, grad_lse):
    q, k, v, out, lse, *tensors = saved
    options = list(ctx.options)
    for i, tensor in zip(_TENSORS, tensors, strict=True):
        options[i] = tensor
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:  # e.g. the expanded ones that sum() sends
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    needs = [needs[3 + i] for i in _BIASES]  # behind q, k and v
    *grads, grad_slopes, grad_table, grad_sinks = _attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *options, *needs
    )
    grad_options = [None] * len(options)
    for i, grad, need in zip(_BIASES, (grad_slopes, grad_table, grad_sinks), needs, strict=True):
        grad_options[i] = grad if need else None
    return (*grads, *grad_options)


_attention_forward = register_autograd("attention_forward", _setup_context, _backward)
_attention_backward = refuse_double_backward("attention_backward", "pynlp's attention has")


@planned
@hint(**FOREIGN)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_max_distance: int = 128,
    relative_bidirectional: bool | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    rotary_offset: int | Tensor = 0,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) v without the scores in memory: `score = softcap(q.k * scale) + biases`, then the mask.

    All tensors are (batch, seqlen, heads, head_dim), as in flash-attn; those of scaled_dot_product_attention are
    (batch, heads, seqlen, head_dim): hand on `x.transpose(1, 2)`, which is read in place.

    Args:
        q: Queries `(batch, seqlen_q, heads, head_dim)`; fp32, bf16, fp16 (fp64 on the reference). Any strides with a
            contiguous last dimension are read in place.
        k, v: Keys `(batch, seqlen_k, kv_heads, head_dim)` and values `(batch, seqlen_k, kv_heads, head_dim_v)`; `heads`
            is a multiple of `kv_heads`, consecutive query heads share one (grouped-query attention).
        causal: A query sees no later key. Query i stands at key `i + seqlen_k - seqlen_q` (bottom-right alignment).
        window: `(left, right)`, the keys seen on each side of a query's own, both ends included; None = no limit.
        softmax_scale: Factor of q.k; `head_dim ** -0.5` by default.
        sinks: fp32 `(heads,)`; one score more in each row's softmax, of a key without a value: a row's weights add up
            to less than 1. Differentiable. Xiao et al., arXiv 2309.17453; learned ones: GPT-OSS, arXiv 2508.10925.
        alibi_slopes: fp32 `(heads,)` or `(batch, heads)`; adds `-slope * |distance|`. Differentiable. Press et al.,
            arXiv 2108.12409; see `alibi_slopes`.
        relative_bias: T5's table `(num_buckets, heads)`; adds the entry of the distance's bucket. Differentiable.
            Raffel et al., arXiv 1910.10683.
        relative_max_distance: Distance from which on all keys fall into the last bucket.
        relative_bidirectional: Whether half of the buckets are for later keys; by default `not causal`.
        rotary: `(cos, sin)` of `(positions, rotary_dim / 2)`, see `rotary_tables`; q and k are turned on the fly, and
            their gradients are those of the un-rotated q and k. Su et al., arXiv 2104.09864.
        rotary_interleaved: Pairs are channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        rotary_offset: Position of key 0, or the position ids of the keys `(batch, seqlen_k)`; query i uses that of key
            `i + seqlen_k - seqlen_q`.
        softcap: c > 0 turns a score s into `c * tanh(s / c)` (Gemma 2, arXiv 2408.00118).
        key_lengths: int32 `(batch,)`; keys from there on are masked. The alignment stays that of the tensors.
        dropout_p: Share of the weights that is set to 0, in steps of 1/65536; the others are divided by the share that
            is kept. The lse knows nothing of it. Srivastava et al., JMLR 15, 2014.
        seed: Which weights: an int, or an int64 tensor of one value; drawn from torch's generator by default. The same
            seed drops the same weights on every back end, and again in backward. Philox; Salmon et al., SC 2011.
        return_lse: Also return the natural log-sum-exp of the scores `(batch, heads, seqlen_q)`, fp32, differentiable.

    Returns:
        `(batch, seqlen_q, heads, head_dim_v)` in q's dtype; a query that sees no key gives 0, and an lse of -inf or,
        with sinks, of its head's sink. The same bits for every run and any number of threads, forward and backward.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Source: FlashAttention-2 (Dao, arXiv 2307.08691).

    Example:
        >>> import torch
        >>> from pynlp.functional import attention, rotary_tables
        >>> q = torch.randn(2, 100, 8, 64, requires_grad=True)  # (batch, seqlen, heads, head_dim)
        >>> k, v = torch.randn(2, 2, 100, 2, 64).unbind(0)  # 2 key/value heads for 8 query heads
        >>> out = attention(q, k, v, causal=True, window=(32, 0), rotary=rotary_tables(100, 64))
        >>> out.shape
        torch.Size([2, 100, 8, 64])
        >>> out.sum().backward()
    """
    q, k, v = autocast(q, k, v)
    checks.check_queries_keys_values(q, k, v)
    batch, seqlen_k = k.shape[:2]
    table, buckets = checks.prepare_relative(relative_bias, relative_max_distance, relative_bidirectional, causal, q)
    out, lse = _attention_forward(
        *map(rows_in_place, (q, k, v)),
        checks.prepare_scale(softmax_scale, q.shape[3]), *checks.prepare_window(window, causal),
        checks.check_softcap(softcap), checks.prepare_key_lengths(key_lengths, q, batch, seqlen_k), None, None,
        checks.prepare_sinks(sinks, q), checks.prepare_slopes(alibi_slopes, q, batch), table, buckets,
        *checks.prepare_rotary(rotary, rotary_offset, q, seqlen_k), rotary_interleaved,
        *prepare_dropout(dropout_p, seed, q),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@planned
@hint(**FOREIGN)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_max_distance: int = 128,
    relative_bidirectional: bool | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    rotary_offset: int | Tensor = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` for sequences of unequal lengths, packed one after the other without padding.

    Args:
        q: Queries `(total_q, heads, head_dim)`.
        k, v: Keys `(total_k, kv_heads, head_dim)` and values `(total_k, kv_heads, head_dim_v)`.
        cu_seqlens_q, cu_seqlens_k: int32 `(batch + 1,)`: sequence b has the queries (keys) from entry b to entry b + 1;
            from 0 to the total, never falling. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: The longest sequence. Not needed: the work is laid out by the totals, and nothing
            waits for the device. Where it is given and too small, that is an error.
        alibi_slopes: fp32 `(heads,)` or `(batch, heads)`.
        rotary_offset: Position of each sequence's key 0, or the position ids of the keys `(total_k,)`.
        return_lse: Also return the log-sum-exp of the scores `(heads, total_q)`.
        The others: as in `attention`, for each sequence by itself.

    Returns:
        `(total_q, heads, head_dim_v)` in q's dtype, the same bits as `attention` gives for each sequence alone; but for
        dropout, which counts by a sequence's number.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import attention, attention_varlen
        >>> q, k, v = torch.randn(3, 12, 4, 32)  # 5 tokens of one sequence, then 7 of another
        >>> cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
        >>> torch.equal(out[:5], attention(q[None, :5], k[None, :5], v[None, :5], causal=True)[0])
        True
    """
    q, k, v = autocast(q, k, v)
    checks.check_queries_keys_values(q, k, v, packed=True)
    total_q, total_k = q.shape[0], k.shape[0]
    cu_seqlens_q = checks.prepare_cu_seqlens("q", cu_seqlens_q, total_q, max_seqlen_q, q)
    cu_seqlens_k = checks.prepare_cu_seqlens("k", cu_seqlens_k, total_k, max_seqlen_k, q)
    checks.check_as_many_sequences(cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    table, buckets = checks.prepare_relative(relative_bias, relative_max_distance, relative_bidirectional, causal, q)
    out, lse = _attention_forward(
        *(derive(torch.unsqueeze, rows_in_place(x), 0) for x in (q, k, v)),
        checks.prepare_scale(softmax_scale, q.shape[2]), *checks.prepare_window(window, causal),
        checks.check_softcap(softcap), None, cu_seqlens_q, cu_seqlens_k,
        checks.prepare_sinks(sinks, q), checks.prepare_slopes(alibi_slopes, q, batch), table, buckets,
        *checks.prepare_packed_rotary(rotary, rotary_offset, q, total_k, cu_seqlens_q, cu_seqlens_k),
        rotary_interleaved, *prepare_dropout(dropout_p, seed, q),
    )  # fmt: skip
    out = derive(torch.squeeze, out, 0)
    return (out, derive(torch.squeeze, lse, 0)) if return_lse else out
