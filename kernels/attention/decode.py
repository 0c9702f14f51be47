"""Attention over a cache of keys and values, contiguous or in pages: FlashDecoding (Dao et al., 2023)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import Heads, add_product, finite_or_zero, has_nonfinite, nonfinite_rows, scale_pieces, spoil_rows
from .rows import RowRotary, load_rows, load_turned_rows, row_score, row_scores, seen_keys, store_rows
from .scores import LN2, LOG2E, Running, Span, block_ranges, softmax_step, start_of_rows


class DecodeFeatures(NamedTuple):
    """The features of a call of attention over a cache."""

    HEAD_DIM: int  # of q and the keys
    HEAD_DIM_V: int  # of the values and out
    BLOCK_D: int  # channels of a piece of q and the keys ...
    BLOCK_V: int  # ... and of the values and out
    INSIDE: int  # the channel of the keys at which the values start, if they are a part of the keys, else -1
    PAGE: int  # keys of a page; 0: an entry's keys lie one after the other
    HALF: int  # pairs of channels that rotary embeddings turn
    INTERLEAVED: bool
    HAS_LEFT: bool
    HAS_RIGHT: bool
    HAS_SOFTCAP: bool
    HAS_SLOPES: bool
    HAS_TABLE: bool
    HAS_SINKS: bool
    EVEN: bool  # all queries see the same keys
    SPLIT: bool  # the keys of an entry are cut into parts
    PRECISION: str | None  # of products of fp32


class DecodeTile(NamedTuple):
    """The cut of a call of attention over a cache into blocks."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # keys
    HOIST: bool  # whether loops may compute their constants, such as the parts of fp32 queries, before they start
    LONG: bool  # whether offsets within a block of keys need 64 bits
    UNIT: int  # the caches' strides are given in multiples of it, so that the compiler knows they are multiples


class Cache(NamedTuple):
    """The keys and values of an entry's head; pointers are to its key 0 or, in pages, to page 0."""

    p_k: tl.tensor
    p_v: tl.tensor
    p_pages: tl.tensor  # the entry's page numbers
    stride_kb: tl.tensor
    stride_ks: tl.tensor
    stride_vb: tl.tensor
    stride_vs: tl.tensor
    start: tl.tensor  # keys before here ...
    end: tl.tensor  # ... and from here on are zeros, and are not read


class Share(NamedTuple):
    """A program's blocks of keys, start .. end; all rows see the keys of full_start .. full_end."""

    start: tl.tensor
    end: tl.tensor
    full_start: tl.tensor
    full_end: tl.tensor


@triton.jit
def _key_rows(cache, i_n, F: tl.constexpr, BLOCK_N: tl.constexpr, BOUND: tl.constexpr, LONG: tl.constexpr):
    """Pointers to keys and values, the offsets from them of keys i_n .. i_n + BLOCK_N, and a mask of those to read."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = (o_n >= cache.start - i_n) & (o_n < cache.end - i_n)  # (BLOCK_N,)
    p_k = cache.p_k
    p_v = cache.p_v
    if F.PAGE % BLOCK_N > 0:  # keys of several pages
        if BLOCK_N % F.PAGE == 0:  # only a scalar changes with the block
            p_pages = cache.p_pages + i_n // F.PAGE + o_n // F.PAGE
            b_row = o_n % F.PAGE
        else:
            p_pages = cache.p_pages + (i_n + o_n) // F.PAGE
            b_row = (i_n + o_n) % F.PAGE
        if BOUND:
            b_page = tl.load(p_pages, mask=m_n, other=0).to(tl.int64)
        else:
            b_page = tl.load(p_pages).to(tl.int64)
        b_row = b_row.to(tl.int64)
        o_k = b_page * cache.stride_kb + b_row * cache.stride_ks
        o_v = b_page * cache.stride_vb + b_row * cache.stride_vs
    else:
        i_row = i_n
        if F.PAGE > 0:
            some = (i_n < cache.end) & (i_n + BLOCK_N > cache.start)
            i_page = tl.load(cache.p_pages + i_n // F.PAGE, mask=some, other=0).to(tl.int64)
            p_k += i_page * cache.stride_kb
            p_v += i_page * cache.stride_vb
            i_row = i_n % F.PAGE
        # A scalar base moves with the block, the offsets inside it stay constant.
        p_k += i_row.to(tl.int64) * cache.stride_ks
        p_v += i_row.to(tl.int64) * cache.stride_vs
        b_row = o_n.to(tl.int64) if LONG else o_n
        o_k = b_row * cache.stride_ks
        o_v = b_row * cache.stride_vs
    return p_k, p_v, o_k, o_v, m_n


@triton.jit
def _add_key_product(
    b_s, b_q, p_k, o_k, m_n, F: tl.constexpr,
    FIRST: tl.constexpr, END: tl.constexpr, BLOCK_C: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """s + q k^T over channels FIRST .. END, and the pieces of k; b_q holds the same pieces of q."""
    b_k = ()
    for i_c in tl.static_range(FIRST, END, BLOCK_C):
        b_k = b_k + load_rows(p_k + i_c, o_k, m_n, 0, min(END - i_c, BLOCK_C), BLOCK_C, BOUND)
        b_s = tl.dot(b_q[(i_c - FIRST) // BLOCK_C], tl.trans(b_k[len(b_k) - 1]), b_s, input_precision=F.PRECISION)
    return b_s, b_k


@triton.jit
def _score_keys(b_q, p_k, o_k, m_n, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUND: tl.constexpr):
    """q k^T (BLOCK_M, BLOCK_N), and the pieces of k that are values, too."""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_v = ()
    if F.INSIDE >= 0:
        BEFORE: tl.constexpr = (F.INSIDE + F.BLOCK_D - 1) // F.BLOCK_D  # pieces
        BEHIND: tl.constexpr = BEFORE + (F.HEAD_DIM_V + F.BLOCK_V - 1) // F.BLOCK_V
        END: tl.constexpr = F.INSIDE + F.HEAD_DIM_V
        b_s, _ = _add_key_product(b_s, b_q, p_k, o_k, m_n, F, 0, F.INSIDE, F.BLOCK_D, BOUND)
        b_s, b_v = _add_key_product(
            b_s, b_q[BEFORE:BEHIND], p_k, o_k, m_n, F, F.INSIDE, END, F.BLOCK_V, BOUND
        )  # fmt: skip
        b_s, _ = _add_key_product(b_s, b_q[BEHIND:], p_k, o_k, m_n, F, END, F.HEAD_DIM, F.BLOCK_D, BOUND)
    else:
        b_s, _ = _add_key_product(b_s, b_q, p_k, o_k, m_n, F, 0, F.HEAD_DIM, F.BLOCK_D, BOUND)
    return b_s, b_v


@triton.jit
def _add_values(
    b_acc, b_p, b_inside, p_v, o_v, m_n, m_pair, F: tl.constexpr, BOUND: tl.constexpr, CAREFUL: tl.constexpr
):  # fmt: skip
    """acc + p v. CAREFUL: a value that is not finite makes NaN of the rows that see it, and leaves the others alone."""
    END: tl.constexpr = F.HEAD_DIM_V
    BLOCK_C: tl.constexpr = F.BLOCK_V
    b_w = b_p.to(p_v.dtype.element_ty)
    b_bad = tl.zeros([b_p.shape[1]], tl.int1)  # (BLOCK_N,)
    b_y = ()
    for i_c in tl.static_range(0, END, BLOCK_C):
        if F.INSIDE >= 0:
            b_v = (b_inside[i_c // BLOCK_C],)
        else:
            b_v = load_rows(p_v + i_c, o_v, m_n, 0, min(END - i_c, BLOCK_C), BLOCK_C, BOUND)
        if CAREFUL:
            b_bad = b_bad | nonfinite_rows(b_v)
            b_v = finite_or_zero(b_v)
        b_y = b_y + add_product((b_acc[i_c // BLOCK_C],), b_w, b_v, F)  # (BLOCK_M, BLOCK_V)
    if CAREFUL:
        b_y = spoil_rows(b_y, m_pair & b_bad[None, :])
    return b_y


@triton.jit
def _load_queries(p_q, o_q, m_m, rotary, F: tl.constexpr):
    """The pieces of the queries, turned and cut like the keys'."""
    if F.INSIDE >= 0:
        INSIDE_END: tl.constexpr = F.INSIDE + F.HEAD_DIM_V
        b_q = load_turned_rows(p_q, o_q, m_m, rotary, 0, F.INSIDE, F.BLOCK_D, F.HALF, F.INTERLEAVED)
        b_q = b_q + load_turned_rows(
            p_q, o_q, m_m, rotary, F.INSIDE, INSIDE_END, F.BLOCK_V, F.HALF, F.INTERLEAVED
        )  # fmt: skip
        b_q = b_q + load_turned_rows(
            p_q, o_q, m_m, rotary, INSIDE_END, F.HEAD_DIM, F.BLOCK_D, F.HALF, F.INTERLEAVED
        )  # fmt: skip
    else:
        b_q = load_turned_rows(p_q, o_q, m_m, rotary, 0, F.HEAD_DIM, F.BLOCK_D, F.HALF, F.INTERLEAVED)
    return b_q


@triton.jit
def _visit_keys(
    running, b_q, cache, score, span,
    F: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The running softmax after the blocks of keys of a span.

    KIND masked: rows may not see all keys; careful: masked, and a value that is not finite reaches only the rows that
    see its key; full: all rows see all keys.
    """
    b_m, b_l, b_acc = running
    MASKED: tl.constexpr = KIND != "full"
    ACCURATE: tl.constexpr = b_q[0].dtype == tl.float32
    for i_block in tl.range(
        span.start, span.end, BLOCK_N, num_stages=1 if KIND == "careful" else None, disable_licm=not TILE.HOIST
    ):  # fmt: skip
        i_n = i_block
        if MASKED:
            i_n += tl.where(i_block >= span.split, span.gap, 0)
        p_k, p_v, o_k, o_v, m_n = _key_rows(cache, i_n, F, BLOCK_N, MASKED, TILE.LONG)
        b_s, b_inside = _score_keys(b_q, p_k, o_k, m_n, F, TILE.BLOCK_M, BLOCK_N, MASKED)
        b_x = row_scores(b_s, score, i_n, F, ACCURATE, BLOCK_N)
        m_pair = m_n[None, :]
        if MASKED:
            if not F.EVEN:
                m_pair = m_pair & seen_keys(score, i_n, F, BLOCK_N)
            b_x = tl.where(m_pair, b_x, -float("inf"))
        b_p, b_m, b_l, b_alpha = softmax_step(b_m, b_l, b_x)
        b_acc = scale_pieces(b_acc, b_alpha[:, None])
        b_acc = _add_values(b_acc, b_p, b_inside, p_v, o_v, m_n, m_pair, F, MASKED, KIND == "careful")
    return Running(b_m, b_l, b_acc)


@triton.jit
def _share_of_keys(start, end, full_start, full_end, i_split, splits, BLOCK_N: tl.constexpr):
    """Part i_split of the blocks of keys start .. end: all parts have the same number of blocks, or one more."""
    i_block = start // BLOCK_N
    blocks = tl.where(end > start, tl.cdiv(end, BLOCK_N) - i_block, 0)
    more = blocks % splits
    i_block += i_split * (blocks // splits) + tl.minimum(i_split, more)
    count = blocks // splits + tl.where(i_split < more, 1, 0)
    start = i_block * BLOCK_N
    end = start + count * BLOCK_N
    full_start = tl.minimum(tl.maximum(tl.cdiv(full_start, BLOCK_N) * BLOCK_N, start), end)
    full_end = tl.minimum(tl.maximum(full_end // BLOCK_N * BLOCK_N, full_start), end)
    return Share(start, end, full_start, full_end)


class Limits(NamedTuple):
    """What the lengths of a cache must keep to."""

    capacity: tl.tensor  # keys that an entry can have, without those that are appended
    pages: tl.tensor  # of the cache
    first: tl.tensor  # a length and this are the first position of rotary embeddings that is used ...
    end: tl.tensor  # ... and a length and this the end of them
    positions: tl.tensor  # of the tables


@triton.jit
def _checked_length(p_lengths, i_b, limits, HAS_ROTARY: tl.constexpr):
    """The length of an entry, asserted to fit the cache and the tables."""
    length = tl.load(p_lengths + i_b)
    tl.device_assert((length >= 0) & (length <= limits.capacity), "cache_lengths: expected values in range")
    if HAS_ROTARY:
        tl.device_assert(length + limits.first >= 0, "rotary_offset: expected no position below 0")
        tl.device_assert(
            length + limits.end <= limits.positions, "rotary: expected tables that reach the last position"
        )  # fmt: skip
    return length


@triton.jit
def _check_pages(p_pages, needed, limits, BLOCK: tl.constexpr):
    """Asserts that the first pages of an entry are pages of the cache."""
    for i_page in tl.range(0, needed, BLOCK):
        o_page = i_page + tl.arange(0, BLOCK)
        b_page = tl.load(p_pages + o_page, mask=o_page < needed, other=0)
        tl.device_assert((b_page >= 0) & (b_page < limits.pages), "block_table: expected pages of the cache")


@triton.jit
def attention_check_kernel(
    p_lengths, p_pages, stride_pages, limits, appended,
    PAGE: tl.constexpr, HAS_ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Asserts what attention over a cache relies on: lengths, pages and positions of an entry."""
    i_b = tl.program_id(0).to(tl.int64)
    limits = Limits(*limits)
    length = _checked_length(p_lengths, i_b, limits, HAS_ROTARY)
    if PAGE > 0:
        _check_pages(p_pages + i_b * stride_pages, tl.cdiv(length + appended, PAGE), limits, BLOCK)


@triton.jit(do_not_specialize=["rotary_offset"])
def attention_append_kernel(
    k, v, k_cache, v_cache, p_lengths, p_pages, stride_pages, p_cos, p_sin, seqlen, kv_heads, rotary_offset, limits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Appends k, turned by the angles of their places, and v to the keys of each entry; a row is a token's head.

    It also asserts that all of an entry's keys, old and new, lie in the cache.
    """
    limits = Limits(*limits)
    k = Heads(*k)
    v = Heads(*v)
    k_cache = Heads(*k_cache)
    v_cache = Heads(*v_cache)
    tiles = tl.cdiv(seqlen * kv_heads, BLOCK_M)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen * kv_heads
    b_token = (o_m // kv_heads).to(tl.int64)
    b_h = (o_m % kv_heads).to(tl.int64)
    length = _checked_length(p_lengths, i_b, limits, HALF > 0)
    b_place = length + b_token
    rotary = RowRotary(p_cos, p_sin, b_place + rotary_offset)
    b_page = i_b
    if PAGE > 0:
        p_pages += i_b * stride_pages
        if tl.program_id(0) % tiles == 0:
            _check_pages(p_pages, length // PAGE, limits, CHECKED)
        b_page = tl.load(p_pages + b_place // PAGE, mask=m_m, other=0).to(tl.int64)
        tl.device_assert((b_page >= 0) & (b_page < limits.pages), "block_table: expected pages of the cache")
        b_place = b_place % PAGE

    o_k = b_token * k.stride_s + b_h * k.stride_h
    b_k = load_turned_rows(k.p + i_b * k.stride_b, o_k, m_m, rotary, 0, HEAD_DIM, BLOCK_D, HALF, INTERLEAVED)
    o_v = b_token * v.stride_s + b_h * v.stride_h
    b_v = load_rows(v.p + i_b * v.stride_b, o_v, m_m, 0, HEAD_DIM_V, BLOCK_V, True)
    o_k = b_page * k_cache.stride_b + b_place * k_cache.stride_s + b_h * k_cache.stride_h
    store_rows(k_cache.p, o_k, m_m, b_k, 0, HEAD_DIM, BLOCK_D)
    tl.debug_barrier()  # the caches may share memory: then the values stay
    o_v = b_page * v_cache.stride_b + b_place * v_cache.stride_s + b_h * v_cache.stride_h
    store_rows(v_cache.p, o_v, m_m, b_v, 0, HEAD_DIM_V, BLOCK_V)


@triton.jit(do_not_specialize=["appended", "splits", "left", "right", "radius", "rotary_offset"])
def attention_decode_kernel(
    q, k, v, p_out, p_lse, p_max, p_sum, p_lengths, pages, p_sinks, p_slopes, stride_slopes, table,
    p_cos, p_sin, seqlen_q, appended, heads, group, splits, left, right, radius, rotary_offset, scale, softcap,
    F: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = softmax(score) v and lse = log sum exp(score), score = softcap(q.k * scale) + biases, over an entry's keys.

    A row is a token in one of the query heads that share a key head, so that a program reads each key once for all of
    them. The last token stands at the entry's last key. With SPLIT a program does a part of the keys that its rows see
    and leaves the maximum (log2 units), the sum, and the result times the sum to attention_combine_kernel.
    Source: FlashDecoding (Dao et al., 2023); pages: Kwon et al., arXiv 2309.06180.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    rows = seqlen_q * group
    tiles = tl.cdiv(rows, BLOCK_M)
    i_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # causal: the rows with most keys start first
    i_split = tl.program_id(0) // tiles % splits
    i_g = tl.program_id(0) // tiles // splits % (heads // group)
    i_b = tl.program_id(0) // tiles // splits // (heads // group)

    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_token = o_m // group
    b_h = i_g * group + o_m % group
    length = tl.load(p_lengths + i_b) + appended
    first = length - seqlen_q + i_m // group
    last = length - seqlen_q + (tl.minimum(i_m + BLOCK_M, rows) - 1) // group
    seen, full_start, full_end = block_ranges(first, last, length, left, right, F.HAS_LEFT, F.HAS_RIGHT, True, 1, 1)
    end = seen.end + seen.gap
    share = _share_of_keys(seen.start, end, full_start, full_end, i_split, splits, BLOCK_N)

    p_q, stride_qb, stride_qs, stride_qh = Heads(*q)
    p_k, stride_kb, stride_ks, stride_kh = Heads(*k)
    p_v, stride_vb, stride_vs, stride_vh = Heads(*v)
    if TILE.LONG:
        stride_ks = tl.cast(stride_ks, tl.int64)
        stride_vs = tl.cast(stride_vs, tl.int64)
    stride_ks *= TILE.UNIT
    stride_vs *= TILE.UNIT
    stride_kb = tl.cast(stride_kb, tl.int64) * TILE.UNIT
    stride_vb = tl.cast(stride_vb, tl.int64) * TILE.UNIT
    i_b = i_b.to(tl.int64)
    i_g = i_g.to(tl.int64)
    p_k += i_g * stride_kh * TILE.UNIT
    p_v += i_g * stride_vh * TILE.UNIT
    p_pages, stride_pages = pages
    if F.PAGE > 0:
        p_pages += i_b * stride_pages
    else:
        p_k += i_b * stride_kb
        p_v += i_b * stride_vb
    cache = Cache(p_k, p_v, p_pages, stride_kb, stride_ks, stride_vb, stride_vs, seen.start, end)
    b_place = length - seqlen_q + b_token
    if F.HAS_SLOPES:
        p_slopes += i_b * stride_slopes
    p_table, p_buckets = table
    score = row_score(p_slopes, p_table, p_buckets, b_place, b_h, scale, softcap, heads, radius, left, right, F)
    rotary = RowRotary(p_cos, p_sin, b_place + rotary_offset)
    o_q = b_token.to(tl.int64) * stride_qs + b_h.to(tl.int64) * stride_qh
    b_q = _load_queries(p_q + i_b * stride_qb, o_q, m_m, rotary, F)

    # The sinks of rows that are cut into parts are for the kernel that combines these.
    running = start_of_rows(p_sinks, b_h, F.HAS_SINKS and not F.SPLIT, F.HEAD_DIM_V, F.BLOCK_V, BLOCK_M)
    if F.EVEN:
        span = Span(share.start, share.end, 0, share.end)
        running = _visit_keys(running, b_q, cache, score, span, F, TILE, BLOCK_N, "masked")
    else:
        # The blocks in which rows see different keys come first, so that a value that is not finite can be caught.
        gap = share.full_end - share.full_start
        span = Span(share.start, share.full_start, gap, share.end - gap)
        running = _visit_keys(running, b_q, cache, score, span, F, TILE, BLOCK_N, "masked")
        if has_nonfinite(running.b_acc):
            running = start_of_rows(p_sinks, b_h, F.HAS_SINKS and not F.SPLIT, F.HEAD_DIM_V, F.BLOCK_V, BLOCK_M)
            running = _visit_keys(running, b_q, cache, score, span, F, TILE, 16, "careful")
        span = Span(share.full_start, share.full_end, 0, share.full_end)
        running = _visit_keys(running, b_q, cache, score, span, F, TILE, BLOCK_N, "full")

    b_m, b_l, b_acc = running
    o_out = (i_b * seqlen_q + b_token) * heads + b_h  # (BLOCK_M,)
    if F.SPLIT:
        o_out += i_split.to(tl.int64) * (tl.num_programs(0) // (tiles * splits)) * rows
        tl.store(p_max + o_out, b_m, mask=m_m)
        tl.store(p_sum + o_out, b_l, mask=m_m)
        # A part without keys leaves no result, and the sum 0.
        store_rows(p_out, o_out * F.HEAD_DIM_V, m_m & (b_l != 0.0), b_acc, 0, F.HEAD_DIM_V, F.BLOCK_V)
    else:
        b_lse = (b_m + tl.log2(b_l)) * LN2
        b_acc = scale_pieces(b_acc, (1.0 / tl.where(b_l == 0.0, 1.0, b_l))[:, None])  # nothing seen: out 0, lse -inf
        tl.store(p_lse + (i_b * heads + b_h) * seqlen_q + b_token, b_lse, mask=m_m)
        store_rows(p_out, o_out * F.HEAD_DIM_V, m_m, b_acc, 0, F.HEAD_DIM_V, F.BLOCK_V)


@triton.jit(do_not_specialize=["splits"])
def attention_combine_kernel(
    p_partial, p_max, p_sum, p_sinks, p_out, p_lse, seqlen_q, heads, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = sum_s exp2(max_s - max) partial_s / sum_s exp2(max_s - max) sum_s over the parts s of a row, in order."""
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    i_h = i_row % heads
    i_token = i_row // heads % seqlen_q
    i_b = i_row // heads // seqlen_q
    o_c = tl.arange(0, BLOCK_D)
    max = tl.full([], -float("inf"), tl.float32)
    sum = tl.full([], 0.0, tl.float32)
    if HAS_SINKS:  # a score without a value
        max = tl.load(p_sinks + i_h) * LOG2E
        sum += 1.0
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    for i_split in tl.range(0, splits, BLOCK_S):
        o_s = i_split + tl.arange(0, BLOCK_S)
        o_part = o_s.to(tl.int64) * rows + i_row
        b_max = tl.load(p_max + o_part, mask=o_s < splits, other=-float("inf"))
        b_sum = tl.load(p_sum + o_part, mask=o_s < splits, other=0.0)
        m_part = (b_sum != 0.0)[:, None] & (o_c < HEAD_DIM)[None, :]
        b_part = tl.load(p_partial + o_part[:, None] * HEAD_DIM + o_c[None, :], mask=m_part, other=0.0)
        before = max
        max = tl.maximum(max, tl.max(b_max, 0))
        pivot = tl.where(max == -float("inf"), 0.0, max)
        b_weight = tl.exp2(b_max - pivot)  # (BLOCK_S,)
        alpha = tl.exp2(before - pivot)
        sum = sum * alpha + tl.sum(b_weight * b_sum, 0)
        b_acc = b_acc * alpha + tl.sum(b_weight[:, None] * b_part, 0)
    tl.store(p_lse + (i_b * heads + i_h) * seqlen_q + i_token, (max + tl.log2(sum)) * LN2)
    b_out = b_acc / tl.where(sum == 0.0, 1.0, sum)
    tl.store(p_out + i_row * HEAD_DIM + o_c, b_out.to(p_out.dtype.element_ty), mask=o_c < HEAD_DIM)
