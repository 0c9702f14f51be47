"""The weights that attention gives to its keys, for plots and checks: launcher and kernel."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from ..common.integers import cdiv, tile_width
from ..common.launch import chip_of, choose, launch
from .configs import Config, configs, neighbours
from .heads import HeadRotary, Heads, pieces_product
from .launch import Options, heads_of, kernel_numbers, slopes_stride, table_radius
from .rows import RowRotary, load_turned_rows, row_score, row_scores, seen_keys
from .scores import LOG2E, softmax_step, start_of_rows


class WeightsFeatures(NamedTuple):
    """The features of a call for attention weights."""

    HEAD_DIM: int
    BLOCK_D: int  # channels of a piece
    HALF: int  # pairs of channels that rotary embeddings turn
    INTERLEAVED: bool
    HAS_POSITIONS: bool
    HAS_ROWS: bool
    HAS_LSE: bool
    HAS_LEFT: bool
    HAS_RIGHT: bool
    HAS_SOFTCAP: bool
    HAS_SLOPES: bool
    HAS_TABLE: bool
    HAS_LENGTHS: bool
    HAS_SINKS: bool
    ALIGNED: bool  # rows of the result start at multiples of 16 bytes
    PRECISION: str | None  # of products of fp32


class KeyRows(NamedTuple):
    """The keys of a head; a program's rows see keys start .. end at most."""

    p: tl.tensor
    stride: tl.tensor
    start: tl.tensor
    end: tl.tensor


@triton.jit
def _row_rotary(rotary, b_key, m_key, HAS_POSITIONS: tl.constexpr):
    """The tables for rows that stand at keys b_key."""
    b_position = b_key + rotary.start
    if HAS_POSITIONS:
        b_position = tl.load(rotary.p_positions + b_key, mask=m_key, other=0)
    return RowRotary(rotary.p_cos, rotary.p_sin, b_position)


@triton.jit
def _scores(b_q, keys, rotary, score, i_n, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scores of keys i_n .. i_n + BLOCK_N in log2 units, -inf for keys that a row does not see."""
    b_key = i_n + tl.arange(0, BLOCK_N)
    m_key = (b_key >= keys.start) & (b_key < keys.end)
    rotary_k = _row_rotary(rotary, b_key, m_key, F.HAS_POSITIONS)
    o_k = b_key.to(tl.int64) * keys.stride
    b_k = load_turned_rows(keys.p, o_k, m_key, rotary_k, 0, F.HEAD_DIM, F.BLOCK_D, F.HALF, F.INTERLEAVED)
    b_s = pieces_product(b_q, b_k, F)  # (BLOCK_M, BLOCK_N)
    b_x = row_scores(b_s, score, i_n, F, b_q[0].dtype == tl.float32, BLOCK_N)
    m_pair = m_key[None, :] & seen_keys(score, i_n, F, BLOCK_N)
    return tl.where(m_pair, b_x, -float("inf"))


@triton.jit
def attention_weights_kernel(
    q, k, p_rows, p_lse, p_weights, p_key_lengths, p_sinks, p_slopes, stride_slopes, table, radius, rotary,
    rows, seqlen_q, seqlen_k, heads, group, left, right, scale, softcap,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """exp(score - lse) for chosen queries and all keys; lse = log sum exp(score), given or by a pass of its own.

    Source of the biases: Press et al., arXiv 2108.12409, and Raffel et al., 1910.10683.
    """
    if F.ALIGNED:
        seqlen_k = tl.multiple_of(seqlen_k, 4)
    tiles = tl.cdiv(rows, BLOCK_M)
    o_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = tl.program_id(0) // tiles % heads
    i_b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    m_m = o_m < rows
    b_query = o_m
    if F.HAS_ROWS:
        b_query = tl.load(p_rows + o_m, mask=m_m, other=0)
    b_place = b_query + seqlen_k - seqlen_q  # (BLOCK_M,)
    limit = seqlen_k
    if F.HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(p_key_lengths + i_b), 0), seqlen_k)
    start = 0
    end = limit
    if F.HAS_LEFT:
        start = tl.maximum(tl.min(tl.where(m_m, b_place, seqlen_k), 0) - left, 0)
    if F.HAS_RIGHT:
        end = tl.minimum(tl.max(tl.where(m_m, b_place, -1 - right), 0) + right + 1, limit)
    k = Heads(*k)
    keys = KeyRows(k.p + i_b * k.stride_b + (i_h // group).to(tl.int64) * k.stride_h, k.stride_s, start, end)

    p_cos, p_sin, p_positions, rotary_offset = rotary
    if F.HAS_POSITIONS:
        p_positions += i_b * seqlen_k
    rotary = HeadRotary(p_cos, p_sin, p_positions, rotary_offset)
    p_table, p_buckets = table
    if F.HAS_SLOPES:
        p_slopes += i_b * stride_slopes
    b_h = i_h + tl.zeros_like(o_m)
    score = row_score(p_slopes, p_table, p_buckets, b_place, b_h, scale, softcap, heads, radius, left, right, F)
    rotary_q = _row_rotary(rotary, b_place, m_m, F.HAS_POSITIONS)
    p_q, stride_qb, stride_qs, stride_qh = Heads(*q)
    p_q += i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    o_q = b_query.to(tl.int64) * stride_qs
    b_q = load_turned_rows(p_q, o_q, m_m, rotary_q, 0, F.HEAD_DIM, F.BLOCK_D, F.HALF, F.INTERLEAVED)

    if F.HAS_LSE:
        b_lse = tl.load(p_lse + (i_b * heads + i_h) * seqlen_q + b_query, mask=m_m, other=0.0) * LOG2E
    else:
        running = start_of_rows(p_sinks, i_h, F.HAS_SINKS, 0, 16, BLOCK_M)
        b_m = running.b_m
        b_l = running.b_l
        for i_n in tl.range(start // BLOCK_N * BLOCK_N, end, BLOCK_N):
            b_x = _scores(b_q, keys, rotary, score, i_n, F, BLOCK_N)
            _, b_m, b_l, _ = softmax_step(b_m, b_l, b_x)
        b_lse = b_m + tl.log2(b_l)

    p_weights += (i_b * heads + i_h) * rows * seqlen_k
    o_row = o_m.to(tl.int64) * seqlen_k
    for i_n in tl.range(0, seqlen_k, BLOCK_N):
        b_x = _scores(b_q, keys, rotary, score, i_n, F, BLOCK_N)
        b_key = i_n + tl.arange(0, BLOCK_N)
        m_tile = m_m[:, None] & (b_key < seqlen_k)[None, :]
        b_w = tl.where(b_x == -float("inf"), 0.0, tl.exp2(b_x - b_lse[:, None]))  # also where the lse is -inf or NaN
        tl.store(p_weights + o_row[:, None] + b_key[None, :], b_w, mask=m_tile)


def attention_weights(q: Tensor, k: Tensor, rows: Tensor | None, lse: Tensor | None, *options) -> Tensor:
    """The weights of chosen queries, (batch, heads, rows, seqlen_k); `rows` None: of all queries."""
    options = Options(*options)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    count = seqlen_q if rows is None else rows.shape[0]
    weights = torch.empty((batch, heads, count, seqlen_k), dtype=torch.float32, device=q.device)
    if weights.numel() == 0:
        return weights
    left, right, scale = kernel_numbers(options, seqlen_q + seqlen_k)

    def features(config: Config) -> WeightsFeatures:
        return WeightsFeatures(
            HEAD_DIM=head_dim,
            BLOCK_D=min(config.piece, tile_width(head_dim)),
            HALF=0 if options.rotary_cos is None else options.rotary_cos.shape[1],
            INTERLEAVED=options.rotary_interleaved,
            HAS_POSITIONS=options.rotary_positions is not None,
            HAS_ROWS=rows is not None,
            HAS_LSE=lse is not None,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=options.softcap > 0,
            HAS_SLOPES=options.alibi_slopes is not None,
            HAS_TABLE=options.relative_bias is not None,
            HAS_LENGTHS=options.key_lengths is not None,
            HAS_SINKS=options.sinks is not None,
            ALIGNED=seqlen_k % 4 == 0,
            PRECISION=config.precision if q.dtype == torch.float32 else None,
        )

    def start(config: Config, compile_only: bool = False) -> CompiledKernel | None:
        return launch(
            attention_weights_kernel, (cdiv(count, config.block_m) * batch * heads,),
            heads_of(q), heads_of(k), rows, None if lse is None else lse.contiguous(), weights, options.key_lengths,
            options.sinks, options.alibi_slopes, slopes_stride(options.alibi_slopes),
            (options.relative_bias, options.relative_buckets), table_radius(options.relative_buckets),
            (options.rotary_cos, options.rotary_sin, options.rotary_positions, options.rotary_offset),
            count, seqlen_q, seqlen_k, heads, heads // kv_heads, left, right, scale, float(options.softcap),
            features(config), config.block_m, config.block_n, compile_only=compile_only, **config.options(),
        )  # fmt: skip

    chip = chip_of(q)
    candidates = configs("weights", chip, head_dim, q.element_size())
    key = (chip, q.dtype, q.device, *q.stride()[:3], *features(candidates[0]))
    start(choose("weights", q.device, candidates, key, (count, seqlen_k), start, neighbours))
    return weights
