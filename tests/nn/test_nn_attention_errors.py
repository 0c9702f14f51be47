"""What MultiHeadAttention refuses, and how it says so."""

import pytest
import torch

from pynlp.nn import MultiHeadAttention


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((25, 4), {}, "embed_dim: expected a positive multiple of heads=4, got 25"),
        ((24, 0), {}, "embed_dim: expected a positive multiple of heads=0"),
        ((24, 4), dict(kv_heads=3), "kv_heads: expected a divisor of heads=4, got 3"),
        ((24, 4), dict(positions="sinusoidal"), "positions: expected one of 'none', .* got 'sinusoidal'"),
        ((24, 4), dict(positions="rope", rotary_dim=8), "rotary_dim: expected at most embed_dim / heads = 6, got 8"),
        ((24, 4), dict(dropout=1.0), "dropout: expected at least 0 and less than 1, got 1.0"),
        ((28, 4), dict(positions="rope"), "rotary_dim: expected an even number of at least 2, got 7"),
        ((24, 4), dict(positions="rope", rotary_scaling={"scaling": "linear"}), "factor: expected at least 1"),
    ],
)
def test_refuses_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*arguments, **options)


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({}, dict(x=torch.zeros(3, 24)), r"x: expected shape \(batch, seqlen, 24\), got \(3, 24\)"),
        ({}, dict(x=torch.zeros(1, 3, 12)), r"x: expected shape \(batch, seqlen, 24\), got \(1, 3, 12\)"),
        (
            {},
            dict(x=torch.zeros(1, 3, 24), memory=torch.zeros(1, 3, 12)),
            r"memory: expected shape .* got \(1, 3, 12\)",
        ),
        (
            dict(positions="relative"),
            dict(x=torch.zeros(1, 3, 24), memory=torch.zeros(1, 3, 24)),
            "memory: expected None with positions='relative'",
        ),
        (
            dict(positions="rope", max_positions=8),
            dict(x=torch.zeros(1, 5, 24), rotary_offset=4),
            "x: expected positions from 0 to max_positions - 1 = 7, got 4 to 8",
        ),
        (
            {},
            dict(x=torch.zeros(1, 3, 24), cu_seqlens=torch.tensor([0, 3])),
            r"x: expected shape \(total, 24\), got \(1, 3, 24\)",
        ),
        (
            {},
            dict(x=torch.zeros(3, 24), memory=torch.zeros(4, 24), cu_seqlens=torch.tensor([0, 3])),
            "cu_seqlens_memory: expected the starts of the memory's packed sequences, got None",
        ),
        (
            {},
            dict(x=torch.zeros(3, 24), cu_seqlens=torch.tensor([0, 3]), cu_seqlens_memory=torch.tensor([0, 3])),
            "cu_seqlens_memory: expected None without a memory of packed sequences",
        ),
        (
            {},
            dict(x=torch.zeros(3, 24), cu_seqlens=torch.tensor([0, 3]), key_lengths=torch.tensor([2])),
            "key_lengths: expected None with cu_seqlens",
        ),
        (dict(window=(-2, 0)), dict(x=torch.zeros(1, 3, 24)), "window: expected left >= 0"),
        ({}, dict(x=torch.zeros(1, 3, 24), rotary_offset=2), "rotary_offset: expected rotary="),
    ],
)
def test_refuses_bad_inputs(options, arguments, message):
    module = MultiHeadAttention(24, 4, **options)
    with pytest.raises(ValueError, match=message):
        module(**arguments)
