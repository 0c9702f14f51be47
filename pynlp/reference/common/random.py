"""The random numbers of dropout: Philox, a hash of counters, so that any kernel can compute any of them again.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counters: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words of four 32-bit counters and a 64-bit key, all in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps around, but its bits are those of the unsigned one.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def dropped_parts(dropout_p: float) -> int:
    """The number, of 65536, below which a 16-bit random number drops its element."""
    return min(round(dropout_p * 65536), 65535)


def attention_keeps(seed: Tensor, dropout_p: float, entry: Tensor, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The attention weights that dropout keeps: (entries, H, Sq, Sk) booleans for the batch entries `entry`.

    Weight (b, h, i, j) has the 16 bits number j % 8 of Philox(key seed, counters (j // 8, i, b H + h, 0)).
    """
    device = seed.device
    group = torch.arange((seqlen_k + 7) // 8, device=device)  # (groups,)
    query = torch.arange(seqlen_q, device=device)[:, None]
    head = (entry.to(device)[:, None] * heads + torch.arange(heads, device=device))[
        ..., None, None
    ]  # (entries, H, 1, 1)
    key = (seed.view(()) & MASK, seed.view(()) >> 32 & MASK)
    words = philox((group, query, head, torch.zeros_like(group)), key)
    words = torch.stack([x.expand(*head.shape[:2], seqlen_q, -1) for x in words], dim=-1)  # (entries, H, Sq, groups, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3)[..., :seqlen_k]
    return halves >= dropped_parts(dropout_p)


def keeps(seed: Tensor, dropout_p: float, rows: int, columns: int) -> Tensor:
    """The values of each row that dropout keeps: (rows, columns) booleans.

    Value (i, j) has the 16 bits number j % 8 of Philox(key seed, counters (j // 8, low half of i, high half of i, 1)).
    """
    group = torch.arange((columns + 7) // 8, device=seed.device)  # (groups,)
    row = torch.arange(rows, device=seed.device)[:, None]
    key = (seed.view(()) & MASK, seed.view(()) >> 32 & MASK)
    words = philox((group, row & MASK, row >> 32, torch.ones_like(group)), key)
    words = torch.stack([x.expand(rows, -1) for x in words], dim=-1)  # (rows, groups, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :columns]
    return halves >= dropped_parts(dropout_p)


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x (.., columns) with some values 0, the others divided by the share that is kept."""
    if dropout_p == 0:
        return x
    kept = keeps(seed, dropout_p, x.numel() // max(1, x.shape[-1]), x.shape[-1]).view(x.shape)
    return x.masked_fill(~kept, 0.0) / (1 - dropped_parts(dropout_p) / 65536)
