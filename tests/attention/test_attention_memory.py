"""Peak memory: nothing grows with the square of the sequence, whatever the bias, nor a decoding step with its cache."""

import sys

import pytest

from benchmarks.attention import peak_bytes
from benchmarks.measure import peak_memory

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.slow]

SEQLEN = 4096
SIZE = 7 * SEQLEN * 8 * 64 * 4  # q, k, v, out and three gradients


@pytest.mark.parametrize("options", ["causal=True", "window=256", "causal=True, alibi=True", "t5=True", "rope=True"])
def test_extra_memory_is_within_the_tensors_own(options):
    assert peak_bytes("ours", SEQLEN, options) <= 1.1 * SIZE


def test_the_measurement_sees_a_score_matrix():
    assert peak_bytes("sdpa", SEQLEN // 2, "t5=True") > 8 * (SEQLEN // 2) ** 2 * 4


LONG = 32768
TRAINING = """
import torch
from pynlp.functional import attention, attention_varlen
from pynlp.ops.attention.positions import alibi_slopes

def call(lengths, **options):
    total, packed = sum(lengths), len(lengths) > 1
    q, k, v = (torch.randn(total, heads, 32, requires_grad=True) for heads in (2, 1, 1))
    if packed:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        function = lambda: attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True, **options)
    else:
        function = lambda: attention(q[None], k[None], v[None], causal=True, **options)

    def run():
        out = function()
        out.backward(torch.ones_like(out))
        return out, q.grad, k.grad, v.grad

    return run

options = dict({options})
call([64, 64] if len({lengths}) > 1 else [64], **options)()
measured = call({lengths}, **options)
"""
TABLE = "relative_bias=torch.randn(32, 2, requires_grad=True)"
SLOPES = "alibi_slopes=alibi_slopes(2).requires_grad_()"


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (TABLE, [LONG]),
        (f"{TABLE}, {SLOPES}, window=(2000, None)", [LONG]),
        (SLOPES, [LONG, *range(1, 200)]),
    ],
    ids=["T5", "T5 and ALiBi in a window", "ALiBi, packed with short sequences"],
)
def test_32768_tokens(options, lengths):
    """Forward and backward: out, its gradient and those of q, k and v, and half of that to work with."""
    size = (3 * 2 + 2 * 1) * sum(lengths) * 32 * 4  # of two heads three times, of one twice
    assert peak_memory(TRAINING.format(options=options, lengths=lengths)) <= 1.5 * size


DECODING = """
import torch
from pynlp.functional import attention_decode

def call(length, batch=2):
    q = torch.randn(batch, 1, 8, 64).bfloat16()
    caches = torch.randn(2, batch, length + 1, 2, 64, dtype=torch.bfloat16)
    rows = torch.randn(2, batch, 1, 2, 64).bfloat16()
    lengths = torch.full((batch,), length, dtype=torch.int32)
    {pages}
    return lambda: attention_decode(q, *caches, lengths, k=rows[0], v=rows[1], causal=True, block_table=table)

call(63)()
measured = call({length})
"""
CONTIGUOUS = "table = None"
PAGED = """
    caches = caches.view(2, batch * (length + 1) // 16, 16, 2, 64)
    table = torch.arange(batch * (length + 1) // 16, dtype=torch.int32).view(batch, -1)
"""


@pytest.mark.parametrize("pages", [CONTIGUOUS, PAGED], ids=["contiguous", "paged"])
def test_a_step_of_decoding(pages):
    """Over 134 MB of keys and values: what each head makes of every 1024 keys, and some integers of each page."""
    partial_results = 2 * 8 * 2**17 // 1024 * (64 + 16) * 4
    assert peak_memory(DECODING.format(pages=pages, length=2**17 - 1)) <= partial_results + 2**20
