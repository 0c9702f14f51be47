"""The measured peaks are possible ones: none beyond the widest vectors at the highest clock, none below scalar code."""

import pytest

import pynlp
from pynlp import backends, probes

CLOCK = 6.5e9  # no CPU's is higher
# fp32 operations a cycle and core: two pipes, a multiplication and an addition in each lane.
FMA_A_CYCLE = {"portable": 16, "avx2": 32, "avx512": 64, "avx512_bf16_vnni": 64}


@pytest.mark.every_isa
def test_peak_of_every_isa(isa):
    peak = probes.peak_fma(1)
    assert FMA_A_CYCLE[isa] / 32 * 1e9 < peak < FMA_A_CYCLE[isa] * CLOCK
    bf16, int8 = probes.peak_bf16_dot(1), probes.peak_int8_dot(1)
    features = backends.native().features()
    assert bool(bf16) == features["avx512_bf16"] and bool(int8) == features["avx2"]
    if bf16:
        assert 1.3 * peak < bf16 < 128 * CLOCK
    if int8:
        vnni = features["avx512_vnni"] or (features["avx_vnni"] and not features["avx512"])
        assert (2.5 if vnni else 1.3) * peak < int8 < 256 * CLOCK
    bf16, int8 = probes.peak_bf16_tile(1), probes.peak_int8_tile(1)
    assert (not bf16 or features["amx_bf16"]) and (not int8 or features["amx_int8"])  # the system may refuse tiles
    assert max(bf16, int8 / 2) < 1024 * CLOCK


def best(probe, *arguments, **options):
    """The most of several measurements: what else runs on the machine only takes from it."""
    return max(probe(*arguments, **options) for _ in range(5))


def test_wider_vectors_are_faster():
    if "avx2" in backends.available_isas():
        pynlp.set_isa("portable")
        narrow = best(probes.peak_fma, 1)
        pynlp.set_isa("avx2")
        assert best(probes.peak_fma, 1) > 1.3 * narrow


@pytest.mark.every_isa
@pytest.mark.parametrize("probe", [probes.read_bandwidth, probes.copy_bandwidth])
def test_bandwidth_of_every_isa(probe, isa):
    assert 1e9 < probe(1, size=2**26) < 1e12
    assert 1e9 < probe(3, size=2**26 + 12345) < 1e12  # more threads than cores, and parts that are not round


def test_small_buffers_stay_in_cache():
    """What fits the first-level cache is read faster than memory: the loop does not limit the probe."""
    assert best(probes.read_bandwidth, 1, size=2**14) > 1.2 * best(probes.read_bandwidth, 1, size=2**28)


def test_threads_add_up():
    one = best(probes.peak_fma, 1)
    assert 0.7 * one < best(probes.peak_fma, 2, seconds=0.5) < 2.5 * one


def test_bad_arguments():
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        probes.peak_fma(0)
    with pytest.raises(ValueError, match="size: expected at least 1, got -5"):
        probes.read_bandwidth(1, size=-5)
