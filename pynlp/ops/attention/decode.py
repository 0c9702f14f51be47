"""Attention over a cache of keys and values, contiguous or in pages: schema, fake and the public function."""

import torch
from torch import Tensor

from pynlp.ops.attention import checks
from pynlp.ops.common.checks import (
    at_once,
    check,
    check_dtype,
    check_is_tensor,
    check_range,
    extremes,
    is_autocast_on,
    rows_in_place,
)
from pynlp.ops.common.library import LIBRARY, define, launcher_serves, refuse_derivatives, without_gradient
from pynlp.ops.common.plans import act, planned
from pynlp.reference.attention import decode as reference
from pynlp.reference.common.dtypes import compute_dtype

MAX_HEAD_DIM = 1024  # room for the compressed keys of latent attention


define(
    "attention_append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lengths, Tensor? block_table, "
    "Tensor? rotary_cos, Tensor? rotary_sin, SymInt rotary_offset, bool rotary_interleaved) -> ()",
    reference,
    triton="attention.decode_launch",
    dtype_of="k",
)
define(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, SymInt appended, Tensor? block_table, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? relative_bias, Tensor? relative_buckets, "
    "Tensor? rotary_cos, Tensor? rotary_sin, SymInt rotary_offset, bool rotary_interleaved, SymInt num_splits) "
    "-> (Tensor, Tensor)",
    reference,
    triton="attention.decode_launch",
    dtype_of="q",
)


@torch.library.register_fake("pynlp::attention_append", lib=LIBRARY)
def _append_fake(*arguments):
    return None


@torch.library.register_fake("pynlp::attention_decode", lib=LIBRARY)
def _decode_fake(q, k_cache, v_cache, *options):
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty((batch, seqlen_q, heads, v_cache.shape[3])), q.new_empty(
        (batch, heads, seqlen_q), dtype=compute_dtype(q)
    )


_attention_append = without_gradient("attention_append")
_attention_decode = without_gradient("attention_decode")


@planned
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
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
    rotary_offset: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over a cache of keys and values, to which their own are added first, in place.

    No gradients. Reads no key beyond an entry's length, and each one once, so that a step costs what reading the cache
    costs. Alignment is by the lengths: the last query of an entry stands at its last key.

    Args:
        q: Queries `(batch, seqlen_q, heads, head_dim)`; fp32, bf16, fp16 (fp64 on the reference).
        k_cache, v_cache: `(batch, capacity, kv_heads, head_dim)` and `(.., head_dim_v)`, or with a block table
            `(pages, page_size, kv_heads, head_dim)`; any strides with a contiguous last dimension. head_dim up to 1024.
        cache_lengths: int32 `(batch,)`, the keys of each entry that the cache holds, without `k`.
        k, v: New keys and values `(batch, seqlen_new, kv_heads, head_dim)`, written behind the cached ones; the keys
            turned by `rotary`. `cache_lengths` is not changed: that is left to the caller.
        block_table: int32 `(batch, pages)`, the pages of each entry in order. Entries beyond what a length needs are
            not read.
        num_splits: Into how many parts the keys of an entry are cut, to be worked on at once; chosen by default. The
            result is the same to within rounding.
        causal: Matters for more than one new token: a query sees no later key.
        rotary: `(cos, sin)`, see `rotary_tables`: turns q and `k`; the keys in the cache are turned already.
        rotary_offset: Position of an entry's key 0.
        return_lse: Also return the log-sum-exp of the scores `(batch, heads, seqlen_q)`, fp32.
        The others: as in `attention`.

    Returns:
        `(batch, seqlen_q, heads, head_dim_v)` in q's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off, before any memory is touched: lengths
            beyond the capacity or the pages, a block table that points outside of the cache.

    Source: Flash-Decoding (Dao et al., 2023); pages: PagedAttention (Kwon et al., arXiv 2309.06180).

    Example:
        >>> import torch
        >>> from pynlp.functional import attention_decode
        >>> k_cache, v_cache = torch.zeros(2, 3, 128, 2, 64).unbind(0)  # 3 entries with room for 128 tokens
        >>> lengths = torch.tensor([10, 0, 57], dtype=torch.int32)
        >>> q = torch.randn(3, 1, 8, 64)  # one new token each
        >>> k, v = torch.randn(2, 3, 1, 2, 64).unbind(0)
        >>> attention_decode(q, k_cache, v_cache, lengths, k=k, v=v).shape
        torch.Size([3, 1, 8, 64])
        >>> torch.equal(k_cache[0, 10], k[0, 0])  # written behind the 10 that were there
        True
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_is_tensor(name, x)
    if is_autocast_on(q.device.type):  # the cache keeps its dtype
        q, k, v = (None if x is None else x.to(k_cache.dtype) for x in (q, k, v))
    _check_cache(q, k_cache, v_cache, block_table)
    batch, seqlen_q, heads, head_dim = q.shape
    appended = _check_new_rows(q, k, v, k_cache, v_cache)
    checks.check_integers("cache_lengths", cache_lengths, (batch,), q)
    if block_table is not None:
        check_is_tensor("block_table", block_table)
    if block_table is not None and block_table.dim() != 2:
        raise ValueError(f"block_table: expected shape ({batch}, pages), got {tuple(block_table.shape)}")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    asserted = launcher_serves("attention_decode", q)  # by kernels that run anyway: with torch by a dozen more
    if not asserted:
        check_range("cache_lengths", cache_lengths, 0, capacity - appended)
    cache_lengths = checks.int32(cache_lengths)
    if block_table is not None:
        checks.check_integers("block_table", block_table, (batch, block_table.shape[1]), k_cache)
        if not asserted:
            _check_pages(block_table, cache_lengths, appended, k_cache)
        block_table = checks.int32(block_table)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: expected at least 1, or None to have it chosen, got {num_splits}")
    window_left, window_right = checks.prepare_window(window, causal)
    checks.check_softcap(softcap)
    sinks = checks.prepare_sinks(sinks, q)
    slopes = checks.prepare_slopes(alibi_slopes, q, batch)
    table, buckets = checks.prepare_relative(relative_bias, relative_max_distance, relative_bidirectional, causal, q)
    cos, sin = _prepare_rotary(rotary, rotary_offset, q)
    if cos is not None and not asserted:
        _check_positions(cos, rotary_offset, cache_lengths, appended, q)
    turn = (cos, sin, rotary_offset, rotary_interleaved)
    refuse_derivatives("attention_decode", q, k, v, k_cache, v_cache, sinks, slopes, table)
    with torch.no_grad():
        if appended:
            rows = (rows_in_place(x) for x in (k, v))
            _attention_append(*rows, k_cache, v_cache, cache_lengths, block_table, *turn)
            act(_note_change, k_cache, v_cache)
        out, lse = _attention_decode(
            rows_in_place(q), k_cache, v_cache, cache_lengths, appended, block_table,
            checks.prepare_scale(softmax_scale, head_dim), window_left, window_right, softcap, sinks,
            slopes, table, buckets, *turn, num_splits or 0,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _note_change(*caches: Tensor) -> None:
    """Tell autograd, which raises an error where a backward pass needs what they were before."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([x for x in caches if not x.is_inference()])


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    layout = (
        "(batch, capacity, kv_heads, head_dim)" if block_table is None else "(pages, page_size, kv_heads, head_dim)"
    )
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dimensions (batch, seqlen, heads, head_dim), got {tuple(q.shape)}")
    check_dtype("q", q)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions {layout}, got {tuple(x.shape)}")
        checks.check_like_q(name, x, q)
        if x.stride(-1) != 1 and x.shape[-1] != 1 and x.numel():
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {x.stride()}")
    batch, _, heads, head_dim = q.shape
    for name, x in (("q", q), ("v_cache", v_cache)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    if block_table is not None and k_cache.shape[1] == 0:
        raise ValueError(f"k_cache: expected pages of at least one key, got shape {tuple(k_cache.shape)}")
    if k_cache.shape[3] != head_dim or (block_table is None and k_cache.shape[0] != batch):
        first = f"{batch}, capacity" if block_table is None else "pages, page_size"
        raise ValueError(
            f"k_cache: expected shape ({first}, kv_heads, {head_dim}) to go with q {tuple(q.shape)}, "
            f"got {tuple(k_cache.shape)}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache: expected the shape of k_cache {tuple(k_cache.shape)} but for head_dim, "
            f"got {tuple(v_cache.shape)}"
        )
    checks.check_heads("k_cache", heads, k_cache.shape[2])


def _check_new_rows(q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor) -> int:
    """The number of new keys."""
    if k is None and v is None:
        return 0
    for name, x, other in (("k", k, "v"), ("v", v, "k")):
        if x is None:
            raise ValueError(f"{name}: expected new rows to go with {other}, got None")
        check_is_tensor(name, x)
        checks.check_like_q(name, x, q)
    batch, heads = q.shape[0], k_cache.shape[2]
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected one that needs no gradient, to write to, got requires_grad=True")
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"{name}: expected memory of its own for each row, to write to, got strides {x.stride()}")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, cache.shape[3]) or x.shape[1] != k.shape[1]:
            rows = "seqlen_new" if name == "k" else k.shape[1]
            raise ValueError(
                f"{name}: expected shape ({batch}, {rows}, {heads}, {cache.shape[3]}), got {tuple(x.shape)}"
            )
    return k.shape[1]


def _check_pages(block_table: Tensor, cache_lengths: Tensor, appended: int, k_cache: Tensor) -> None:
    """Check that the entries which the lengths need are pages of the cache."""
    if block_table.numel() == 0:
        return
    pages, page_size = k_cache.shape[:2]
    if at_once(block_table):
        smallest, largest = extremes(block_table)
        if smallest >= 0 and largest < pages:  # then it does not matter which entries are needed
            return
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size  # a page's first key
    unused = first >= cache_lengths[:, None] + appended
    outside = ~unused & ((block_table < 0) | (block_table >= pages))
    check(
        ~outside.any(),
        "block_table: expected pages of the cache",
        lambda: f"got {block_table[outside][0].item()}",
        lambda: f"block_table: expected pages 0 to {pages - 1}",
    )


def _prepare_rotary(
    rotary: tuple[Tensor, Tensor] | None, rotary_offset: int, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        checks.check_no_offset(rotary_offset)
        return None, None
    cos, sin = checks.prepare_tables(rotary, q)
    checks.check_offset(rotary_offset)
    if isinstance(rotary_offset, Tensor):
        raise TypeError("rotary_offset: expected an int, the position of each entry's key 0, got a tensor")
    return cos, sin


def _check_positions(cos: Tensor, rotary_offset: int, cache_lengths: Tensor, appended: int, q: Tensor) -> None:
    """Check that the tables have the positions of all queries and new keys."""
    if cache_lengths.numel() == 0:
        return
    shortest, longest = extremes(cache_lengths)
    first = shortest + (appended - q.shape[1] + rotary_offset)
    check(first >= 0, "rotary_offset: expected no position below 0", lambda: f"got {first} for the first query")
    last = longest + (appended + rotary_offset)
    check(
        last <= cos.shape[0],
        "rotary: expected tables that reach the last position",
        lambda: f"got {cos.shape[0]} positions, needed {last}",
    )
