"""ALiBi slopes, T5 buckets and rotary tables against their formulas and against transformers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from pynlp.functional import alibi_slopes, relative_position_buckets, rotary_tables
from pynlp.reference.attention.attention import bucket_of


def transformers_tables(positions, rotary_dim, base, seq_len=None, max_positions=65536, **rope_parameters):
    """cos, sin in fp64 from transformers' fp32 frequencies, and the angles."""
    config = LlamaConfig(
        hidden_size=rotary_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": base, **rope_parameters},
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, seq_len=seq_len)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies.double()
    return angles.cos() * magnitude, angles.sin() * magnitude, angles


def assert_tables_close(ours, theirs):
    cos, sin, angles = theirs
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # Their frequencies carry a few fp32 roundings, which an angle multiplies by the position.
    allowed = 2.0**-21 * (1 + angles)
    for name, x, y in (("cos", ours[0], cos), ("sin", ours[1], sin)):
        excess = ((x.double() - y).abs() / allowed).max().item()
        assert excess <= 1, f"{name} is {excess:.3g} times further from transformers' than fp32 rounding explains"


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("rotary_dim", [2, 32, 128])
def test_rotary_tables_are_correctly_rounded(rotary_dim, base):
    cos, sin = rotary_tables(70000, rotary_dim, base=base)
    for position in (0, 1, 2, 4095, 69999):
        for i in range(rotary_dim // 2):
            angle = position * base ** (-2 * i / rotary_dim)
            for table, exact in ((cos, math.cos(angle)), (sin, math.sin(angle))):
                got = table[position, i].item()
                # Half a unit in the last place, plus what fp64 lets an angle of 70000 radians be off.
                assert abs(got - exact) <= 2.0**-24 * abs(exact) + 1e-10, (position, i)


@pytest.mark.parametrize("rotary_dim", [16, 64, 128])
def test_linear_matches_transformers(rotary_dim):
    ours = rotary_tables(5000, rotary_dim, scaling="linear", factor=4.0)
    assert_tables_close(ours, transformers_tables(5000, rotary_dim, 10000.0, rope_type="linear", factor=4.0))


@pytest.mark.parametrize("rotary_dim", [4, 64, 128])
def test_ntk_matches_transformers_dynamic_ntk_at_a_fixed_length(rotary_dim):
    # At three times the original length their dynamic factor 2 is a static one of 2 * 3 - (2 - 1) = 5.
    theirs = transformers_tables(
        6144, rotary_dim, 10000.0, seq_len=6144, max_positions=2048, rope_type="dynamic", factor=2.0
    )
    assert_tables_close(rotary_tables(6144, rotary_dim, scaling="ntk", factor=5.0), theirs)


@pytest.mark.parametrize("rotary_dim", [8, 64, 128])
@pytest.mark.parametrize("base, factor, original", [(10000.0, 16.0, 4096), (1000000.0, 4.0, 32768), (10000.0, 1.0, 64)])
def test_yarn_matches_transformers(rotary_dim, base, factor, original):
    ours = rotary_tables(9000, rotary_dim, base=base, scaling="yarn", factor=factor, original_positions=original)
    theirs = transformers_tables(
        9000, rotary_dim, base, rope_type="yarn", factor=factor, original_max_position_embeddings=original
    )
    assert_tables_close(ours, theirs)
    assert ours[0][0, 0].item() == pytest.approx(0.1 * math.log(factor) + 1.0, abs=1e-7)


def test_yarn_options_match_transformers():
    ours = rotary_tables(
        3000, 64, scaling="yarn", factor=8.0, original_positions=512,
        attention_factor=0.7, beta_fast=20.0, beta_slow=2.0,
    )  # fmt: skip
    theirs = transformers_tables(
        3000, 64, 10000.0, rope_type="yarn", factor=8.0, original_max_position_embeddings=512,
        attention_factor=0.7, beta_fast=20.0, beta_slow=2.0,
    )  # fmt: skip
    assert_tables_close(ours, theirs)


@pytest.mark.parametrize("rotary_dim", [16, 128])
@pytest.mark.parametrize("low, high", [(1.0, 4.0), (0.5, 8.0)])
def test_llama3_matches_transformers(rotary_dim, low, high):
    ours = rotary_tables(
        20000, rotary_dim, base=500000.0, scaling="llama3", factor=8.0, original_positions=8192,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip
    theirs = transformers_tables(
        20000, rotary_dim, 500000.0, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip
    assert_tables_close(ours, theirs)


def test_scalings_differ_from_each_other():
    """So the comparisons above cannot all pass on one and the same table."""
    tables = [rotary_tables(100, 32)[1]]
    for scaling in ("linear", "ntk", "yarn", "llama3"):
        tables.append(rotary_tables(100, 32, scaling=scaling, factor=4.0, original_positions=256)[1])
    for i, a in enumerate(tables):
        for b in tables[i + 1 :]:
            assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(positions=-1, rotary_dim=8), "positions: expected 0 or more, got -1"),
        (dict(positions=4, rotary_dim=7), "rotary_dim: expected an even number"),
        (dict(positions=4, rotary_dim=0), "rotary_dim: expected an even number"),
        (dict(positions=4, rotary_dim=8, base=1.0), "base: expected more than 1"),
        (dict(positions=4, rotary_dim=8, scaling="dynamic"), "scaling: expected one of .*'yarn'.* got 'dynamic'"),
        (dict(positions=4, rotary_dim=8, factor=2.0), "factor: expected a scaling with it"),
        (
            dict(positions=4, rotary_dim=8, scaling="linear"),
            "factor: expected at least 1 for scaling='linear', got None",
        ),
        (dict(positions=4, rotary_dim=8, scaling="ntk", factor=0.5), "factor: expected at least 1"),
        (dict(positions=4, rotary_dim=2, scaling="ntk", factor=2.0), "rotary_dim: expected at least 4"),
        (dict(positions=4, rotary_dim=8, scaling="yarn", factor=2.0), "original_positions: expected at least 1"),
        (dict(positions=4, rotary_dim=8, scaling="llama3", factor=2.0), "original_positions: expected at least 1"),
        (dict(positions=4, rotary_dim=8, attention_factor=2.0), "attention_factor: expected scaling='yarn'"),
        (
            dict(positions=4, rotary_dim=8, scaling="yarn", factor=2.0, original_positions=64, beta_fast=1.0),
            "beta_fast: expected beta_fast > beta_slow",
        ),
        (
            dict(positions=4, rotary_dim=8, scaling="llama3", factor=2.0, original_positions=64, low_freq_factor=4.0),
            "high_freq_factor: expected high_freq_factor > low_freq_factor",
        ),
    ],
)
def test_rotary_tables_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary_tables(**arguments)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 64])
def test_alibi_slopes_of_powers_of_two(heads):
    expected = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])
    assert torch.equal(alibi_slopes(heads), expected)


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12, 25, 40, 71, 112])
def test_alibi_slopes_match_bloom(heads):
    # BLOOM's bias of key 1 is the slope itself.
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=2e-6, atol=0)


def test_alibi_slopes_refuse_no_heads():
    with pytest.raises(ValueError, match="heads: expected at least 1, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 20), (8, 16), (64, 500), (10, 100), (4, 3)])
def test_relative_buckets_match_t5(num_buckets, max_distance, bidirectional):
    distance = torch.arange(-4 * max_distance, 4 * max_distance + 1)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    buckets = relative_position_buckets(num_buckets, max_distance, bidirectional)
    assert buckets.dtype == torch.int32 and buckets.numel() == 2 * max_distance + 1
    assert torch.equal(bucket_of(distance, buckets), theirs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, 128, True), "num_buckets: expected at least 4 buckets, got 3"),
        ((1, 128, False), "num_buckets: expected at least 2 buckets, got 1"),
        ((32, 8, True), "max_distance: expected more than 8, got 8"),
    ],
)
def test_relative_buckets_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        relative_position_buckets(*arguments)
