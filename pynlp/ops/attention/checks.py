"""Checks of the public attention functions' arguments, and their conversion; every error names the argument."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pynlp.ops.attention.positions import buckets_like
from pynlp.ops.common import asserts
from pynlp.ops.common.checks import (
    as_fp32,
    check,
    check_dtype,
    check_is_tensor,
    check_not_negative,
    check_number,
    check_range,
    check_tensor,
    extremes,
    has_shape,
)
from pynlp.ops.common.plans import derive

MAX_HEAD_DIM = 256


def check_queries_keys_values(q: Tensor, k: Tensor, v: Tensor, packed: bool = False) -> None:
    layout = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
    dimensions = layout.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_is_tensor(name, x)
        if x.dim() != dimensions:
            raise ValueError(f"{name}: expected {dimensions} dimensions {layout}, got {tuple(x.shape)}")
    check_dtype("q", q)
    heads, head_dim = q.shape[-2:]
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}")
    for name, x in (("k", k), ("v", v)):
        check_like_q(name, x, q)
    batch = "" if packed else f"{q.shape[0]}, "
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != head_dim:
        rows = "total" if packed else "seqlen_k"
        raise ValueError(
            f"k: expected shape ({batch}{rows}, kv_heads, {head_dim}) to go with q {tuple(q.shape)}, "
            f"got {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)} but for head_dim, got {tuple(v.shape)}")
    check_heads("k", heads, k.shape[-2])


def check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def check_heads(name: str, heads: int, kv_heads: int) -> None:
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{name}: expected a number of heads that divides q's {heads}, got {kv_heads}")


def prepare_window(window: Sequence[int | None] | None, causal: bool) -> tuple[int, int]:
    """The window (left, right) with -1 for no limit."""
    if window is not None and (not isinstance(window, Sequence) or len(window) != 2):
        raise TypeError(f"window: expected (left, right), the keys seen on each side, or None, got {window!r}")
    left, right = (None, None) if window is None else window
    for name, side in (("left", left), ("right", right)):
        if side is not None and not isinstance(side, int | torch.SymInt):
            raise TypeError(f"window: expected {name} to be an int or None, got {side!r}")
        if side is not None and side < 0:
            raise ValueError(f"window: expected {name} >= 0 or None for no limit, got {side}")
    if not isinstance(causal, bool | int | torch.SymBool | Tensor):
        raise TypeError(f"causal: expected True or False, got {causal!r}")
    if causal:
        right = 0
    return -1 if left is None else left, -1 if right is None else right


def check_softcap(softcap: float) -> float:
    check_not_negative("softcap", softcap)
    if softcap == math.inf:
        raise ValueError("softcap: expected 0 (none) or a finite positive number, got inf")
    return softcap


def prepare_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, Tensor):
        check_number("softmax_scale", softmax_scale)
        if not -math.inf < softmax_scale < math.inf:
            raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")
    return softmax_scale


def prepare_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    check_tensor("sinks", sinks, q, [(q.shape[-2],)])
    return as_fp32(sinks, q)


def prepare_slopes(alibi_slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    if alibi_slopes is None:
        return None
    heads = q.shape[-2]
    check_tensor("alibi_slopes", alibi_slopes, q, [(heads,), (batch, heads)])
    return as_fp32(alibi_slopes, q)


def prepare_relative(
    relative_bias: Tensor | None, max_distance: int, bidirectional: bool | None, causal: bool, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The table, and the bucket of each distance."""
    if relative_bias is None:
        return None, None
    heads = q.shape[-2]
    check_is_tensor("relative_bias", relative_bias)
    if relative_bias.dim() != 2:
        raise ValueError(f"relative_bias: expected shape (num_buckets, {heads}), got {tuple(relative_bias.shape)}")
    check_tensor("relative_bias", relative_bias, q, [(relative_bias.shape[0], heads)])
    bidirectional = not causal if bidirectional is None else bidirectional
    buckets = buckets_like(q, relative_bias.shape[0], max_distance, bidirectional)
    return as_fp32(relative_bias, q), buckets


def check_integers(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Check lengths, places or position ids; errors ask for int32, int64 is taken, too."""
    check_is_tensor(name, x)
    if not has_shape(x, shape):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def int32(x: Tensor) -> Tensor:
    return derive(_int32, x)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def prepare_key_lengths(key_lengths: Tensor | None, q: Tensor, batch: int, seqlen_k: int) -> Tensor | None:
    if key_lengths is None:
        return None
    check_integers("key_lengths", key_lengths, (batch,), q)
    check_range("key_lengths", key_lengths, 0, seqlen_k)
    return int32(key_lengths)


def prepare_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int | None, q: Tensor) -> Tensor:
    """The places where packed sequences start and end, int32: from 0 to the total, never falling."""
    check_cu_seqlens(f"cu_seqlens_{name}", cu_seqlens, total, f"max_seqlen_{name}", max_seqlen, q)
    return int32(cu_seqlens)


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, total: int, max_name: str, max_seqlen: int | None, q: Tensor, *, padded: bool = False
) -> None:
    """Check where packed sequences start and end: from 0 to the total, never falling.

    Args:
        padded: Rows may lie behind the last sequence, so the last value may be less than the total.
    """
    check_starts(name, cu_seqlens, q)
    end = "the last at most the total" if padded else "the last to be the total"
    if asserts.are_on_device(cu_seqlens):
        order = f"{name}: expected the first to be 0 and {end}, and values that never fall"
        longest = f"{max_name}: expected at least the longest sequence"
        asserts.assert_starts(cu_seqlens, total, padded, max_seqlen, order, longest)
        return
    check(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= total if padded else cu_seqlens[-1] == total),
        f"{name}: expected the first to be 0 and {end}",
        lambda: f"got {cu_seqlens[0].item()} and {cu_seqlens[-1].item()}",
        lambda: f"{name}: expected the first to be 0 and {end}, {total}",
    )
    if cu_seqlens.shape[0] == 1:
        return
    shortest, longest = extremes(cu_seqlens.diff())
    check(
        shortest >= 0,
        f"{name}: expected values that never fall",
        lambda: f"got one {-shortest} below the one before",
    )
    if max_seqlen is not None:
        check(
            longest <= max_seqlen,
            f"{max_name}: expected at least the longest sequence",
            lambda: f"got {max_seqlen} and a sequence of {longest}",
        )


def check_starts(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Check the shape, dtype and device of places where sequences start, and the last one ends."""
    check_is_tensor(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    check_integers(name, cu_seqlens, tuple(cu_seqlens.shape), q)


def check_as_many_sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    sequences, got = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
    if got != sequences:
        raise ValueError(f"cu_seqlens_k: expected as many sequences as cu_seqlens_q has, {sequences}, got {got}")


def prepare_tables(rotary: Sequence[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(rotary, Sequence) or len(rotary) != 2:
        raise TypeError(f"rotary: expected (cos, sin), two tensors, got {type(rotary).__name__}")
    cos, sin = rotary
    check_is_tensor("rotary cos", cos)
    head_dim = q.shape[-1]
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(
            f"rotary: expected cos of shape (positions, rotary_dim / 2) with rotary_dim <= head_dim {head_dim}, "
            f"got {tuple(cos.shape)}"
        )
    for name, x in (("rotary cos", cos), ("rotary sin", sin)):
        check_tensor(name, x, q, [tuple(cos.shape)])
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a table that needs no gradient, got requires_grad=True")
    return as_fp32(cos, q), as_fp32(sin, q)


def check_no_offset(rotary_offset: int | Tensor) -> None:
    check_offset(rotary_offset)
    if isinstance(rotary_offset, Tensor) or rotary_offset != 0:
        raise ValueError("rotary_offset: expected rotary=(cos, sin) with it, got rotary=None")


def check_offset(rotary_offset: int | Tensor) -> None:
    if isinstance(rotary_offset, bool) or not isinstance(rotary_offset, int | torch.SymInt | Tensor):
        raise TypeError(f"rotary_offset: expected an int or a tensor of position ids, got {rotary_offset!r}")


def prepare_rotary(
    rotary: Sequence[Tensor] | None, rotary_offset: int | Tensor, q: Tensor, seqlen_k: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """cos, sin, position ids or None, and the offset, for q (batch, seqlen_q, heads, head_dim)."""
    if rotary is None:
        check_no_offset(rotary_offset)
        return None, None, None, 0
    cos, sin = prepare_tables(rotary, q)
    check_offset(rotary_offset)
    batch, seqlen_q = q.shape[:2]
    if isinstance(rotary_offset, Tensor):
        check_position_ids(rotary_offset, (batch, seqlen_k), cos, q)
        if seqlen_q > seqlen_k:
            raise ValueError(f"rotary_offset: position ids need seqlen_q <= seqlen_k, got {seqlen_q} > {seqlen_k}")
        return cos, sin, int32(rotary_offset), 0
    first = rotary_offset + min(0, seqlen_k - seqlen_q)
    if first < 0:
        raise ValueError(f"rotary_offset: expected no position below 0, got {first} for the first query or key")
    if rotary_offset + seqlen_k > cos.shape[0]:
        raise ValueError(
            f"rotary: expected tables of at least {rotary_offset + seqlen_k} positions (rotary_offset {rotary_offset} "
            f"+ {seqlen_k} keys), got {cos.shape[0]}"
        )
    return cos, sin, None, rotary_offset


def prepare_packed_rotary(
    rotary: Sequence[Tensor] | None,
    rotary_offset: int | Tensor,
    q: Tensor,
    total_k: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """The result of `prepare_rotary` for packed sequences."""
    if rotary is None:
        check_no_offset(rotary_offset)
        return None, None, None, 0
    cos, sin = prepare_tables(rotary, q)
    check_offset(rotary_offset)
    if asserts.are_on_device(q) and not isinstance(rotary_offset, Tensor) and rotary_offset >= 0:
        asserts.assert_positions(
            cu_seqlens_q, cu_seqlens_k, rotary_offset, cos.shape[0], "rotary_offset: expected no position below 0",
            "rotary: expected tables that reach the last position of the longest sequence",
        )  # fmt: skip
        return cos, sin, None, rotary_offset
    lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    fewest, most = 0, 0  # keys beyond the queries, and keys, of any sequence
    if lengths[0].numel():
        fewest, most = extremes(lengths[1] - lengths[0])[0], extremes(lengths[1])[1]
    if isinstance(rotary_offset, Tensor):
        check_position_ids(rotary_offset, (total_k,), cos, q)
        message = "rotary_offset: position ids need as many keys as queries in each sequence, or more"
        check(fewest >= 0, message, lambda: f"got {-fewest} too few")
        return cos, sin, int32(rotary_offset)[None], 0
    check(
        (fewest + rotary_offset >= 0) & (rotary_offset >= 0),
        "rotary_offset: expected no position below 0",
        lambda: f"got {min(fewest, 0) + rotary_offset} for the first query or key",
    )
    check(
        most + rotary_offset <= cos.shape[0],
        "rotary: expected tables that reach the last position of the longest sequence",
        lambda: f"got {cos.shape[0]} positions, needed {most + rotary_offset}",
    )
    return cos, sin, None, rotary_offset


def check_position_ids(positions: Tensor, shape: tuple[int, ...], cos: Tensor, q: Tensor) -> None:
    if not has_shape(positions, shape):
        raise ValueError(
            f"rotary_offset: expected an int or position ids of shape {shape}, got {tuple(positions.shape)}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rotary_offset: expected dtype int32 or int64, got {positions.dtype}")
    if positions.device != q.device:
        raise ValueError(f"rotary_offset: expected q's device {q.device}, got {positions.device}")
    check_range("rotary_offset", positions, 0, cos.shape[0] - 1)
