"""Philox, a hash of counters, whose numbers any kernel can draw again, and dropout of rows of values with it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10.
"""

import triton
import triton.language as tl

VALUES = tl.constexpr(8)  # of a draw, side by side in a row


def dropped_parts(dropout_p: float) -> int:
    """The number of random 16-bit numbers that drop a value, of 65536."""
    return min(round(dropout_p * 65536), 65535)


@triton.jit
def _product_halves(x, FACTOR: tl.constexpr):
    """The upper and the lower 32 bits of x * FACTOR, in one multiplication where tl.philox makes two."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, c0, c1, c2, c3=0):
    """Four random words of the key `seed` and the counters (c0, c1, c2, c3), which broadcast."""
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = c2.to(tl.uint32)
    c3 = tl.full([], c3, tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        upper_0, lower_0 = _product_halves(c0, 0xD2511F53)
        upper_2, lower_2 = _product_halves(c2, 0xCD9E8D57)
        c0 = upper_2 ^ c1 ^ k0
        c1 = lower_2
        c2 = upper_0 ^ c3 ^ k1
        c3 = lower_0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def drop(b_x, p_seed, b_row, i_d, dropped, kept_share):
    """Dropout of b_x (ROWS, COLUMNS), which has the rows b_row, int64, and the columns from i_d, a multiple of 8, on.

    Value (i, j) is kept if the 16 bits number j % 8 of Philox(key = seed, counters (j // 8, lower half of i, upper half
    of i, 1)) are at least `dropped`, and then divided by the share that is kept.
    """
    o_draw = i_d // VALUES + tl.arange(0, b_x.shape[1] // VALUES)
    b_0, b_1, b_2, b_3 = philox(tl.load(p_seed), o_draw[None, :], b_row[:, None], (b_row >> 32)[:, None], 1)
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # (ROWS, COLUMNS / 8, 2, 2): 2 i + j at [.., i, j]
    b_halves = tl.join(b_words << 16, b_words)  # (ROWS, COLUMNS / 8, 2, 2, 2), in the upper half of 32 bits
    m_kept = tl.reshape(b_halves, b_x.shape) >= tl.full([], dropped, tl.uint32) << 16
    return tl.where(m_kept, b_x * (1.0 / kept_share), 0.0)
