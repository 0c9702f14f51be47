"""Strides that lead beyond 2^31 elements: the bits of contiguous tensors. What is not touched takes no memory."""

import math
import mmap
import sys

import pytest
import torch

from pynlp.functional import attention, attention_decode, attention_varlen, attention_weights, rotary_tables

FAR = 2**31
MAP_NORESERVE = 0x4000  # Linux; a name in mmap from Python 3.13 on
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
OPTIONS = {"plain": {}, "causal, RoPE": dict(causal=True, rotary=rotary_tables(200, 16))}
options_of = pytest.mark.parametrize("name", OPTIONS)


def untouched(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are touched, in small pages; more of them than the machine may have."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sys.platform == "linux" else 0)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy, the last index of one of whose dimensions is beyond FAR elements."""
    strides = list(x.contiguous().stride())
    strides[dim] = FAR // (x.shape[dim] - 1) + x.numel()
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    return untouched(size, x.dtype).as_strided(x.shape, strides).copy_(x)


def random(*shape, dtype):
    return torch.randn(shape).to(dtype)


def gradients(function, rows, weight):
    leaves = [x.detach().requires_grad_() for x in rows]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_same_bits(results, expected):
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


@dtypes
@options_of
@pytest.mark.parametrize("queries", [3, 100], ids=["few queries", "blocks of queries"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_attention(dim, queries, name, dtype, isa):
    rows = [random(2, n, heads, 16, dtype=dtype) for n, heads in ((queries, 4), (130, 2), (130, 2))]
    weight = random(2, queries, 4, 16, dtype=dtype)

    def function(q, k, v):
        return attention(q, k, v, **OPTIONS[name])

    results = gradients(function, [far_apart(x, dim) for x in rows], far_apart(weight, dim))
    assert_same_bits(results, gradients(function, rows, weight))


@dtypes
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "heads"])
def test_packed_sequences(dim, dtype, isa):
    cu_seqlens = torch.tensor([0, 70, 73, 73, 130])
    rows = [random(130, heads, 16, dtype=dtype) for heads in (4, 2, 2)]
    weight = random(130, 4, 16, dtype=dtype)

    def function(q, k, v):
        return attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)

    results = gradients(function, [far_apart(x, dim) for x in rows], far_apart(weight, dim))
    assert_same_bits(results, gradients(function, rows, weight))


@dtypes
@options_of
@pytest.mark.parametrize("queries", [3, 20], ids=["few queries", "blocks of queries"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch or pages", "rows", "heads"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_decoding(paged, dim, queries, name, dtype, isa):
    """The new rows are written where they belong, too."""
    table = torch.tensor([[6, 1, 5], [0, 3, 2]]) if paged else None
    shape = (7, 30) if paged else (2, 90)
    caches = [torch.full((*shape, 2, size), math.nan, dtype=dtype) for size in (16, 24)]
    for cache in caches:
        if paged:
            cache[table] = random(2, 3, 30, 2, cache.shape[-1], dtype=dtype)
        else:
            cache[:, :70] = random(2, 70, 2, cache.shape[-1], dtype=dtype)
    q, k, v = (random(2, queries, heads, size, dtype=dtype) for heads, size in ((4, 16), (2, 16), (2, 24)))

    def decode(caches, *rows):
        q, k, v = rows
        lengths = torch.tensor([70, 41])
        out = attention_decode(q, *caches, lengths, k=k, v=v, block_table=table, **OPTIONS[name])
        return [out, *(cache.nan_to_num(nan=1e4) for cache in caches)]

    results = decode([far_apart(x, dim) for x in caches], *(far_apart(x, dim) for x in (q, k, v)))
    assert_same_bits(results, decode(caches, q, k, v))
    assert (results[0] != 0).all() and results[0].isfinite().all()


@dtypes
@options_of
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_weights(dim, name, dtype, isa):
    q, k = random(2, 40, 4, 16, dtype=dtype), random(2, 130, 2, 16, dtype=dtype)
    chosen = torch.tensor([39, 0, 7])
    results = attention_weights(far_apart(q, dim), far_apart(k, dim), rows=chosen, **OPTIONS[name])
    assert torch.equal(results, attention_weights(q, k, rows=chosen, **OPTIONS[name]))
