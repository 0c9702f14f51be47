"""Dropout of attention weights by Philox, whose numbers depend on the pair alone: backward draws those of forward.

The eight halves of the four words of Philox(key = seed, counters (g, i, b heads + h, 0)) decide on the weights of
query i and keys 8 g .. 8 g + 7 in head h of sequence b. Source: Salmon et al., SC 2011: Philox4x32-10.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.random import philox

KEYS = tl.constexpr(8)  # of a draw


class Dropout(NamedTuple):
    """The draws of a head."""

    seed: tl.tensor
    i_h: tl.tensor  # the head's number among those of all sequences
    dropped: tl.tensor  # a weight is dropped if its number, in the upper half of 32 bits, is smaller


@triton.jit
def head_dropout(p_seed, i_h, dropped, HAS_DROPOUT: tl.constexpr):
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    return Dropout(seed, i_h, tl.full([], dropped, tl.uint32) << 16)


@triton.jit
def _kept_halves(b_word, dropped, BIT: tl.constexpr):
    """Two bits: BIT is set if the lower half of a word keeps its weight, BIT + 1 if the upper half does."""
    b_lower = tl.where(b_word << 16 >= dropped, 1 << BIT, 0)
    return b_lower | tl.where(b_word >= dropped, 2 << BIT, 0)


@triton.jit
def _kept_bits(dropout, b_query, b_draw):
    """Eight bits: n is set if the weight of key 8 b_draw + n is kept; for (ROWS, 1) and (1, COLUMNS) or the reverse."""
    b_0, b_1, b_2, b_3 = philox(dropout.seed, b_draw, b_query, dropout.i_h, 0)
    b_bits = _kept_halves(b_0, dropout.dropped, 0) | _kept_halves(b_1, dropout.dropped, 2)
    b_bits |= _kept_halves(b_2, dropout.dropped, 4) | _kept_halves(b_3, dropout.dropped, 6)
    # A sum over one value, which costs nothing: without it the compiler draws in the layout of the products' results,
    # where the eight weights lie in several threads, in each of them.
    return tl.sum(b_bits[None, :, :], 0)


@triton.jit
def kept_weights(dropout, i_m, i_n, QUERIES: tl.constexpr, COLUMNS: tl.constexpr):
    """A mask (QUERIES, COLUMNS) of the kept weights of queries i_m .. and keys i_n .., a multiple of 8."""
    o_m = tl.arange(0, QUERIES)
    o_draw = tl.arange(0, COLUMNS // KEYS)
    o_key = tl.arange(0, KEYS)
    b_bits = _kept_bits(dropout, (i_m + o_m)[:, None], (i_n // KEYS + o_draw)[None, :])  # (QUERIES, COLUMNS / 8)
    return tl.reshape((b_bits[:, :, None] >> o_key[None, None, :]) & 1, [QUERIES, COLUMNS]) != 0


@triton.jit
def kept_weights_on_end(dropout, i_m, i_n, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """kept_weights with keys in rows: (ROWS, QUERIES)."""
    o_m = tl.arange(0, QUERIES)
    o_draw = tl.arange(0, ROWS // KEYS)
    o_key = tl.arange(0, KEYS)
    b_bits = _kept_bits(dropout, (i_m + o_m)[None, :], (i_n // KEYS + o_draw)[:, None])  # (ROWS / 8, QUERIES)
    return tl.reshape((b_bits[:, None, :] >> o_key[None, :, None]) & 1, [ROWS, QUERIES]) != 0
