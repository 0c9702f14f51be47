"""Peak memory of forward + backward: nothing grows with the square of the sequence, whatever the bias."""

import sys

import pytest

from benchmarks.attention import peak_bytes

SEQLEN = 4096
SIZE = 7 * SEQLEN * 8 * 64 * 4  # q, k, v, out and three gradients


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", ["causal=True", "window=256", "causal=True, alibi=True", "t5=True", "rope=True"])
def test_extra_memory_is_within_the_tensors_own(options):
    assert peak_bytes("ours", SEQLEN, options) <= 1.1 * SIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_a_score_matrix():
    assert peak_bytes("sdpa", SEQLEN, "t5=True") > 8 * SEQLEN**2 * 4
