"""The random numbers of dropout: Philox as published, and which weights they drop."""

import pytest
import torch

from pynlp.functional import attention
from pynlp.reference.common.random import attention_keeps, dropped_parts, philox

# Of Random123's published test vectors: counters, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counters", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counters, key, expected):
    words = philox(tuple(map(torch.tensor, counters)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in words) == expected


def dropped_weights(seed, dropout_p, batch=2, heads=3, seqlen_q=37, seqlen_k=61, dtype=torch.float32):
    """What the kernel leaves of weights of 1 / seqlen_k: values of which each is the unit vector of its key."""
    q = torch.zeros(batch, seqlen_q, heads, 8, dtype=dtype)
    k = torch.zeros(batch, seqlen_k, heads, 8, dtype=dtype)
    v = torch.eye(seqlen_k, dtype=dtype)[None, :, None].expand(batch, -1, heads, -1)
    return attention(q, k, v, dropout_p=dropout_p, seed=seed).transpose(1, 2) * seqlen_k  # (B, H, Sq, Sk)


@pytest.mark.every_isa
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 0x123456789ABCDEF])
def test_the_kernel_drops_what_philox_says(seed, isa):
    """Weight (b, h, i, j): 16 bits number j % 8 of the words of counters (j // 8, i, b H + h, 0), key seed."""
    weights = dropped_weights(seed, 0.3)
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist()[::37]:
        words = philox((torch.tensor(j // 8), torch.tensor(i), torch.tensor(b * 3 + h), torch.tensor(0)), key)
        bits = words[j % 8 // 2].item() >> (16 * (j % 2)) & 0xFFFF
        expected = 0.0 if bits < round(0.3 * 65536) else 1 / (1 - round(0.3 * 65536) / 65536)
        assert weights[b, h, i, j].item() == pytest.approx(expected, abs=1e-5), (b, h, i, j)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_dropped(dropout_p):
    """Within five standard deviations, in all and in each row, column and head; neighbours are not correlated."""
    keeps = attention_keeps(torch.tensor(3), dropout_p, torch.arange(2), 4, 256, 512)
    share = 1 - dropped_parts(dropout_p) / 65536
    deviation = (share * (1 - share)) ** 0.5
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        counted = keeps.sum(dims)
        size = keeps.numel() / counted.numel()
        assert ((counted / size - share).abs() <= 5 * deviation / size**0.5).all(), dims
    centred = (keeps.double() - share) / deviation
    for dim in range(4):
        for step in (1, 2, 4, 8):
            n = keeps.shape[dim] - step
            if n > 0:
                product = centred.narrow(dim, 0, n) * centred.narrow(dim, step, n)
                assert product.mean().abs() <= 5 / product.numel() ** 0.5, (dim, step)


def test_seeds():
    first = dropped_weights(5, 0.5)
    assert torch.equal(first, dropped_weights(5, 0.5))
    assert torch.equal(first, dropped_weights(torch.tensor([5]), 0.5))
    assert not torch.equal(first, dropped_weights(6, 0.5))
    torch.manual_seed(1)
    drawn, other = dropped_weights(None, 0.5), dropped_weights(None, 0.5)
    assert not torch.equal(drawn, other)
    torch.manual_seed(1)
    assert torch.equal(drawn, dropped_weights(None, 0.5))


def test_no_dropout_draws_nothing():
    state = torch.get_rng_state()
    torch.testing.assert_close(dropped_weights(None, 0.0), torch.ones(2, 3, 37, 61))
    assert torch.equal(state, torch.get_rng_state())


def test_nearly_everything_dropped():
    weights = dropped_weights(0, 0.99999)  # more than a 16-bit number can say: 1 in 65536 is kept
    assert (weights != 0).sum() <= 3
