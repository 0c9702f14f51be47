"""Assertions about integers on a device: launchers and kernels.

A launcher takes the messages of its assertions, too; they are constants of a kernel.
"""

import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .launch import launch

BLOCK = 1024
ASSERTS = {"debug": True, "sanitize_overflow": False}  # Triton leaves assertions out unless it debugs


@triton.jit
def range_kernel(p_x, count, low, high, MESSAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Asserts low <= x <= high."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < count, other=low)
    tl.device_assert((b_x >= low) & (b_x <= high), MESSAGE)


@triton.jit
def starts_kernel(
    p_starts, sequences, total, longest, MESSAGE: tl.constexpr, LONGEST_MESSAGE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Asserts 0 = starts[0] <= starts[1] <= .. <= starts[sequences] = total, or PADDED <= total; how long they are."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x <= sequences
    b_x = tl.load(p_starts + o_x, mask=m_x, other=0)
    b_before = tl.load(p_starts + o_x - 1, mask=m_x & (o_x > 0), other=0)
    m_last = (b_x <= total) if PADDED else (b_x == total)
    tl.device_assert((o_x > 0) | (b_x == 0), MESSAGE)
    tl.device_assert((o_x != sequences) | m_last, MESSAGE)
    tl.device_assert((b_x >= b_before) | (o_x > sequences), MESSAGE)
    if LONGEST_MESSAGE is not None:
        tl.device_assert((b_x - b_before <= longest) | (o_x > sequences), LONGEST_MESSAGE)


@triton.jit
def positions_kernel(
    p_starts_q, p_starts_k, sequences, offset, positions, FIRST_MESSAGE: tl.constexpr, LAST_MESSAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Asserts that the queries and keys of packed sequences have positions 0 .. positions - 1."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < sequences
    b_queries = tl.load(p_starts_q + o_x + 1, mask=m_x, other=0) - tl.load(p_starts_q + o_x, mask=m_x, other=0)
    b_keys = tl.load(p_starts_k + o_x + 1, mask=m_x, other=0) - tl.load(p_starts_k + o_x, mask=m_x, other=0)
    tl.device_assert((b_keys - b_queries + offset >= 0) | (o_x >= sequences), FIRST_MESSAGE)
    tl.device_assert((b_keys + offset <= positions) | (o_x >= sequences), LAST_MESSAGE)


def assert_range(x: Tensor, low: int, high: int, message: str) -> None:
    launch(
        range_kernel, (cdiv(x.numel(), BLOCK),), x.contiguous(), x.numel(), low, high, MESSAGE=message, BLOCK=BLOCK,
        num_warps=4, **ASSERTS,
    )  # fmt: skip


def assert_starts(
    starts: Tensor, total: int, padded: bool, longest: int | None, message: str, longest_message: str
) -> None:
    """Where sequences start and end, from 0 to the total or less; `longest`: the most that one may have, None: any."""
    launch(
        starts_kernel, (cdiv(starts.numel(), BLOCK),), starts.contiguous(), starts.numel() - 1, total, longest or 0,
        MESSAGE=message, LONGEST_MESSAGE=None if longest is None else longest_message, PADDED=padded, BLOCK=BLOCK,
        num_warps=4, **ASSERTS,
    )  # fmt: skip


def assert_positions(
    starts_q: Tensor, starts_k: Tensor, offset: int, positions: int, first_message: str, last_message: str
) -> None:
    """The positions of packed sequences' queries and keys; a sequence's key 0 stands at `offset`."""
    sequences = starts_q.numel() - 1
    launch(
        positions_kernel, (cdiv(sequences, BLOCK),), starts_q.contiguous(), starts_k.contiguous(), sequences, offset,
        positions, FIRST_MESSAGE=first_message, LAST_MESSAGE=last_message, BLOCK=BLOCK, num_warps=4, **ASSERTS,
    )  # fmt: skip
