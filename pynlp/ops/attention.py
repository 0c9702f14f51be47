"""Fused attention: schema, checks, fake, autograd and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.ops.library import LIBRARY, define, register_autograd
from pynlp.ops.positions import relative_position_buckets
from pynlp.reference import attention as reference

MAX_HEAD_DIM = 256

_OPTIONS = (
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, Tensor? key_lengths, "
    "Tensor? alibi_slopes, Tensor? relative_bias, Tensor? relative_buckets, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_positions, SymInt rotary_offset, bool rotary_interleaved"
)


def _forward_triton(q, *arguments):
    launcher = _triton_launcher(q)
    return (launcher.attention_forward if launcher else reference.attention_forward)(q, *arguments)


def _backward_triton(grad_out, grad_lse, q, *arguments):
    launcher = _triton_launcher(q)
    backward = launcher.attention_backward if launcher else reference.attention_backward
    return backward(grad_out, grad_lse, q, *arguments)


def _triton_launcher(q: Tensor):
    """The module of Triton launchers, or None where the reference must serve."""
    from pynlp.backends import triton_missing_reason, warn_once

    reason = "fp64 runs on the reference" if q.dtype == torch.float64 else triton_missing_reason()
    if reason is None:
        from pynlp.kernels import attention

        return attention
    if q.dtype != torch.float64:
        warn_once(f"pynlp.attention runs on the slow reference: {reason}")
    return None


define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.attention_forward,
    _forward_triton,
)
define(
    "attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool needs_slopes, bool needs_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.attention_backward,
    _backward_triton,
)


@torch.library.register_fake("pynlp::attention_forward", lib=LIBRARY)
def _forward_fake(q, k, v, *options):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=statistics)


@torch.library.register_fake("pynlp::attention_backward", lib=LIBRARY)
def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, *options):
    *options, needs_slopes, needs_table = options
    alibi_slopes, relative_bias = options[5], options[6]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for x, needed in ((alibi_slopes, needs_slopes), (relative_bias, needs_table)):
        gradients.append(torch.empty_like(x) if needed else q.new_empty(0, dtype=torch.float32))
    return tuple(gradients)


def _setup_context(ctx, inputs, output):
    q, k, v, *options = inputs
    # The scalars go on ctx, the tensors (also the absent ones) through save_for_backward.
    is_tensor = [option is None or isinstance(option, Tensor) for option in options]
    ctx.save_for_backward(q, k, v, *output, *(o for o, tensor in zip(options, is_tensor, strict=True) if tensor))
    ctx.scalars = [None if tensor else o for o, tensor in zip(options, is_tensor, strict=True)]
    ctx.is_tensor = is_tensor
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    tensors = iter(tensors)
    options = [next(tensors) if tensor else scalar for tensor, scalar in zip(ctx.is_tensor, ctx.scalars, strict=True)]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:  # e.g. the expanded ones that sum() sends
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    _, *needed = ctx.needs_input_grad
    needs_slopes, needs_table = needed[8], needed[9]
    grad_q, grad_k, grad_v, grad_slopes, grad_table = torch.ops.pynlp.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *options, needs_slopes, needs_table
    )
    grad_options = [None] * len(options)
    grad_options[5] = grad_slopes if needs_slopes else None
    grad_options[6] = grad_table if needs_table else None
    return (grad_q, grad_k, grad_v, *grad_options)


register_autograd("attention_forward", _setup_context, _backward)


def _no_double_backward(ctx, *gradients):
    raise NotImplementedError("pynlp.attention has no second derivative: backward with create_graph=True is not served")


register_autograd("attention_backward", lambda ctx, inputs, output: None, _no_double_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_max_distance: int = 128,
    relative_bidirectional: bool | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    rotary_offset: int | Tensor = 0,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) v without the scores in memory: `score = softcap(q.k * scale) + biases`, then the mask.

    Args:
        q: Queries `(batch, seqlen_q, heads, head_dim)`; fp32, bf16, fp16 (fp64 on the reference). Any strides with a
            contiguous last dimension are read in place.
        k, v: Keys and values `(batch, seqlen_k, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`, consecutive
            query heads share one (grouped-query attention).
        causal: A query sees no later key. Query i stands at key `i + seqlen_k - seqlen_q` (bottom-right alignment).
        window: `(left, right)`, the keys seen on each side of a query's own, both ends included; None = no limit.
        softmax_scale: Factor of q.k; `head_dim ** -0.5` by default.
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
        return_lse: Also return the natural log-sum-exp of the scores `(batch, heads, seqlen_q)`, fp32, differentiable.

    Returns:
        `(batch, seqlen_q, heads, head_dim)` in q's dtype; a query that sees no key gives 0 and an lse of -inf.
        The same bits for every run and any number of threads, forward and backward.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; the message names it.

    Source: FlashAttention-2 (Dao, arXiv 2307.08691).
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    _check_queries_keys_values(q, k, v)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k = k.shape[1]
    q, k, v = (x if x.stride(-1) == 1 or head_dim == 1 else x.contiguous() for x in (q, k, v))
    window_left, window_right = _check_window(window, causal)
    if softcap < 0:
        raise ValueError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    if key_lengths is not None:
        key_lengths = _check_key_lengths(key_lengths, q, seqlen_k)
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, q, [(heads,), (batch, heads)])
        alibi_slopes = _statistics(alibi_slopes, q)
    relative_buckets = None
    if relative_bias is not None:
        if relative_bias.dim() != 2:
            raise ValueError(f"relative_bias: expected shape (num_buckets, {heads}), got {tuple(relative_bias.shape)}")
        _check_tensor("relative_bias", relative_bias, q, [(relative_bias.shape[0], heads)])
        bidirectional = not causal if relative_bidirectional is None else relative_bidirectional
        relative_buckets = relative_position_buckets(
            relative_bias.shape[0], relative_max_distance, bidirectional, q.device
        )
        relative_bias = _statistics(relative_bias, q)
    cos = sin = positions = None
    offset = 0
    if rotary is not None:
        cos, sin, positions, offset = _check_rotary(rotary, rotary_offset, q, seqlen_k)
    elif isinstance(rotary_offset, Tensor) or rotary_offset != 0:
        raise ValueError("rotary_offset: expected rotary=(cos, sin) with it, got rotary=None")
    out, lse = torch.ops.pynlp.attention_forward(
        q, k, v, head_dim**-0.5 if softmax_scale is None else softmax_scale, window_left, window_right, softcap,
        key_lengths, alibi_slopes, relative_bias, relative_buckets, cos, sin, positions, offset, rotary_interleaved,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_queries_keys_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, seqlen, heads, head_dim), got {tuple(x.shape)}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"q: expected dtype float32, bfloat16, float16 or float64, got {q.dtype}")
    batch, _, heads, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != batch or x.shape[3] != head_dim:
            raise ValueError(
                f"{name}: expected shape ({batch}, seqlen_k, kv_heads, {head_dim}) to go with q {tuple(q.shape)}, "
                f"got {tuple(x.shape)}"
            )
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    kv_heads = k.shape[2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")


def _check_window(window: Sequence[int | None] | None, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    left, right = (None, None) if window is None else window
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"window: expected {name} >= 0 or None for no limit, got {side}")
    if causal:
        right = 0
    return -1 if left is None else left, -1 if right is None else right


def _check_tensor(name: str, x: Tensor, q: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def _statistics(x: Tensor, q: Tensor) -> Tensor:
    """Biases and tables are kept in fp32 (fp64 for fp64 inputs), contiguous."""
    return x.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


def _check_key_lengths(key_lengths: Tensor, q: Tensor, seqlen_k: int) -> Tensor:
    if tuple(key_lengths.shape) != (q.shape[0],):
        raise ValueError(f"key_lengths: expected shape ({q.shape[0]},), got {tuple(key_lengths.shape)}")
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths: expected dtype int32, got {key_lengths.dtype}")
    if key_lengths.device != q.device:
        raise ValueError(f"key_lengths: expected q's device {q.device}, got {key_lengths.device}")
    _check_range("key_lengths", key_lengths, 0, seqlen_k)
    return key_lengths.to(torch.int32).contiguous()


def _check_rotary(
    rotary: Sequence[Tensor], rotary_offset: int | Tensor, q: Tensor, seqlen_k: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """cos, sin, position ids or None, offset."""
    cos, sin = rotary
    batch, seqlen_q, _, head_dim = q.shape
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(
            f"rotary: expected cos of shape (positions, rotary_dim / 2) with rotary_dim <= head_dim {head_dim}, "
            f"got {tuple(cos.shape)}"
        )
    for name, x in (("rotary cos", cos), ("rotary sin", sin)):
        _check_tensor(name, x, q, [tuple(cos.shape)])
        if x.requires_grad:
            raise ValueError(f"{name}: expected a table that needs no gradient, got requires_grad=True")
    positions, offset = None, 0
    if isinstance(rotary_offset, Tensor):
        positions = rotary_offset
        if tuple(positions.shape) != (batch, seqlen_k):
            raise ValueError(
                f"rotary_offset: expected an int or position ids of shape ({batch}, {seqlen_k}), "
                f"got {tuple(positions.shape)}"
            )
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rotary_offset: expected dtype int32 or int64, got {positions.dtype}")
        if positions.device != q.device:
            raise ValueError(f"rotary_offset: expected q's device {q.device}, got {positions.device}")
        if seqlen_q > seqlen_k:
            raise ValueError(f"rotary_offset: position ids need seqlen_q <= seqlen_k, got {seqlen_q} > {seqlen_k}")
        _check_range("rotary_offset", positions, 0, cos.shape[0] - 1)
        positions = positions.to(torch.int32).contiguous()
    else:
        offset = rotary_offset
        first = offset + min(0, seqlen_k - seqlen_q)
        if first < 0:
            raise ValueError(f"rotary_offset: expected no position below 0, got {first} for the first query or key")
        if offset + seqlen_k > cos.shape[0]:
            raise ValueError(
                f"rotary: expected tables of at least {offset + seqlen_k} positions (rotary_offset {offset} + "
                f"{seqlen_k} keys), got {cos.shape[0]}"
            )
    return _statistics(cos, q), _statistics(sin, q), positions, offset


def _check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """Values outside low .. high raise: at once on a CPU, as a device-side assertion where reading them would wait."""
    if x.numel() == 0:
        return
    smallest, largest = torch.aminmax(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = smallest.item(), largest.item()
        if smallest < low or largest > high:
            raise ValueError(f"{name}: expected values of {low} to {high}, got {smallest} to {largest}")
    else:
        message = f"{name}: expected values of {low} to {high}"
        torch._assert_async((smallest >= low) & (largest <= high), message)
