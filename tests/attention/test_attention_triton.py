"""The attention kernels against the reference in fp64: in Triton's interpreter, on a GPU where there is one."""

import pytest
import torch
from cases.triton import (
    DEVICE,
    GPU,
    NAMES,
    attention,
    check_against_oracle,
    make_case,
    needs,
    run_kernels,
    sequences_of,
    tiles,
    triton,
)
from pynlp.kernels.attention.dropout import philox as philox_in_kernels
from triton import language as tl

from pynlp.reference.common.random import attention_keeps, philox

# NumPy, which the interpreter computes with, warns of log2(0) and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: the kernels' machine code runs nowhere else")

# Queries and keys: more of either, none, both none; no start is a multiple of a tile.
SEQUENCES = [(18, 37), (17, 5), (0, 9), (6, 0), (0, 0), (3, 20)]
CASES = {
    "plain": dict(),
    "more_queries_than_keys": dict(seqlen_q=70, seqlen_k=37),
    "grouped": dict(heads=4, kv_heads=2, seqlen_k=40, window=(-1, 0)),
    "causal": dict(window=(-1, 0)),
    "causal_more_queries": dict(seqlen_q=50, seqlen_k=21, window=(-1, 0)),
    "window": dict(window=(9, 4)),
    "window_right": dict(window=(-1, 20)),
    "causal_window": dict(window=(5, 0)),
    "window_of_one": dict(window=(0, 0), seqlen_q=33, seqlen_k=33),
    "lengths": dict(lengths=[19, 0]),
    "causal_lengths": dict(lengths=[48, 64], window=(-1, 0)),
    "window_lengths": dict(lengths=[48, 64], window=(20, 3)),
    "alibi": dict(slopes=1),
    "alibi_causal": dict(slopes=1, window=(-1, 0)),
    "alibi_batch_more_queries": dict(slopes=2, seqlen_q=70, seqlen_k=37, lengths=[30, 37]),
    "table": dict(table=True),
    "table_causal": dict(table=True, window=(-1, 0), lengths=[70, 33]),
    "table_more_queries": dict(table=True, seqlen_q=70, seqlen_k=35),
    "table_wide": dict(table=True, max_distance=50, window=(-1, 9)),
    "table_and_alibi_window": dict(table=True, slopes=2, window=(25, 30)),
    "softcap": dict(softcap=2.0),
    "softcap_biases_causal": dict(softcap=30.0, slopes=1, table=True, window=(-1, 0)),
    "rotary": dict(rotary_dim=20),
    "rotary_part_causal": dict(rotary_dim=8, window=(-1, 0), offset=3),
    "rotary_interleaved": dict(rotary_dim=20, interleaved=True),
    "rotary_interleaved_part": dict(rotary_dim=12, interleaved=True, seqlen_q=45, seqlen_k=30, offset=15),
    "rotary_positions": dict(rotary_dim=16, position_ids=True, lengths=[70, 20]),
    "rotary_interleaved_positions": dict(rotary_dim=20, position_ids=True, interleaved=True, window=(12, 6)),
    "negative_scale": dict(scale=-0.3, window=(-1, 0)),
    "no_scale": dict(scale=0.0),
    "no_grad_lse": dict(grad_lse=False),
    "one_channel": dict(head_dim=1),
    "odd_channels": dict(head_dim=33, window=(-1, 0), seqlen_k=37),
    "one_query": dict(seqlen_q=1, window=(-1, 0)),
    "sinks": dict(sinks=True),
    "sinks_causal_more_queries": dict(sinks=True, seqlen_q=50, seqlen_k=21, window=(-1, 0)),
    "sinks_lengths_alibi": dict(sinks=True, lengths=[0, 50], slopes=1, window=(-1, 0)),
    "values_of_fewer_channels": dict(head_dim=24, head_dim_v=7, window=(-1, 0)),
    "values_of_more_channels": dict(head_dim=9, head_dim_v=40, rotary_dim=4, window=(7, 3)),
    "dropout": dict(dropout=0.3),
    "dropout_causal_lengths": dict(dropout=0.5, window=(-1, 0), lengths=[48, 64], seqlen_k=66),
    "dropout_of_almost_all": dict(dropout=0.999, seqlen_k=33, sinks=True),
    "packed": dict(packed=SEQUENCES),
    "packed_causal": dict(packed=SEQUENCES, window=(-1, 0), grad_lse=False),
    "packed_window_sinks": dict(packed=SEQUENCES, window=(6, 3), sinks=True),
    "packed_lengths": dict(packed=[(20, 37), (17, 5), (6, 0)], lengths=[30, 0, 0]),
    "packed_alibi": dict(packed=SEQUENCES, slopes=2),
    "packed_alibi_of_heads_causal": dict(packed=SEQUENCES, slopes=1, window=(-1, 0)),
    "packed_table": dict(packed=SEQUENCES, table=True),
    "packed_table_causal": dict(packed=[(18, 18), (3, 40), (5, 0), (21, 9)], table=True, window=(-1, 0)),
    "packed_rotary": dict(packed=SEQUENCES, rotary_dim=12, interleaved=True, offset=14, head_dim_v=12),
    "packed_positions": dict(packed=[(20, 37), (0, 9), (18, 18)], rotary_dim=16, position_ids=True),
    "packed_dropout": dict(packed=SEQUENCES, dropout=0.4, window=(-1, 0)),
    "packed_one": dict(packed=[(19, 34)]),
    "everything": dict(
        heads=4, kv_heads=2, head_dim_v=24, window=(33, 17), softcap=5.0, lengths=[66, 40], sinks=True, slopes=2,
        table=True, rotary_dim=12,
    ),
    "packed_everything": dict(
        packed=[(18, 37), (17, 9), (0, 9), (6, 0)], head_dim_v=12, window=(20, 17), softcap=5.0, sinks=True, slopes=2,
        table=True, rotary_dim=12, offset=8, dropout=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_match_the_reference(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name])
    check_against_oracle(tensors, options)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal_lengths",
        "alibi_causal",
        "table",
        "softcap",
        "rotary",
        "sinks",
        "dropout",
        "packed_causal",
        "everything",
    ],  # fmt: skip
)
def test_half_precision_is_as_good_as_pytorch(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name], dtype=torch.float16)
    ours = check_against_oracle(tensors, options)
    assert ours[0].dtype == torch.float16 and ours[1].dtype == torch.float32 and ours[2].dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("plain", 20, torch.float32),
        ("causal", 16, torch.float16),
        ("causal_lengths", 24, torch.float16),
        ("alibi", 16, torch.float32),
        ("table_and_alibi_window", 16, torch.float32),
        ("rotary_part_causal", 24, torch.float16),
        ("values_of_fewer_channels", 16, torch.float16),
        ("packed", 16, torch.float16),
        ("packed_causal", 24, torch.float16),
        ("packed_dropout", 16, torch.float32),
    ],
)
def test_tensor_descriptors_read_the_same(name, head_dim, dtype, monkeypatch):
    tiles(monkeypatch, descriptors=True)
    sizes = dict(head_dim=head_dim) | (dict(head_dim_v=8) if "head_dim_v" in CASES[name] else {})
    tensors, options = make_case(**CASES[name] | sizes, dtype=dtype)
    seen = []
    describe = attention._descriptors

    def spy(*arguments):
        seen.append(describe(*arguments))
        return seen[-1]

    monkeypatch.setattr(attention, "_descriptors", spy)
    check_against_oracle(tensors, options)
    if not GPU:
        assert len(seen) == 3 and all(d is not None for pair in seen for d in pair)


def test_tensors_that_tma_cannot_read_take_the_pointer_path(monkeypatch):
    tiles(monkeypatch, descriptors=True)
    x = torch.zeros(2, 8, 2, 24, dtype=torch.float16)
    unreadable = (
        x.flatten()[1:2].expand_as(x),  # not at 16 bytes
        x[..., :20].contiguous(),  # rows 40 bytes apart
        x[:1].expand(2, -1, -1, -1),  # stride 0
    )
    assert attention._tma(x, *unreadable) == [[384, 24, 48], None, None, None]
    config = attention.Config(16, 16, 1, 1, True)
    assert attention._descriptors(config, 16, [x], attention._tma(x))[0] is not None
    assert attention._descriptors(config, 16, [x, x], [*attention._tma(x), None]) == [None, None]
    assert attention._descriptors(config._replace(descriptors=False), 16, [x], attention._tma(x)) == [None]
    assert attention._descriptors(config._replace(piece=16), 16, [x], attention._tma(x)) == [None]
    tensors, options = make_case(head_dim=20, dtype=torch.float16, seqlen_q=18, seqlen_k=40)
    check_against_oracle([x if x is None else x.contiguous() for x in tensors], options)


@pytest.mark.parametrize(
    "name", ["causal", "alibi", "rotary", "rotary_interleaved_positions", "values_of_more_channels", "everything"]
)
def test_heads_in_pieces_give_the_same(name, monkeypatch):
    tiles(monkeypatch, piece=16)
    sizes = dict(head_dim=40) if name == "everything" else dict(head_dim=72)
    sizes |= dict(rotary_dim=sizes["head_dim"] // 2) if "rotary_dim" in CASES[name] else {}
    tensors, options = make_case(**CASES[name] | sizes)
    check_against_oracle(tensors, options)


@pytest.mark.parametrize("name", ["causal", "table_and_alibi_window", "packed_everything"])
def test_other_tiles_give_the_same(name, monkeypatch):
    tiles(monkeypatch, forward=(32, 16, 0), queries=(32, 32), keys=(32, 16))
    tensors, options = make_case(**CASES[name], seed=1)
    check_against_oracle(tensors, options)


def test_offsets_within_a_tile_can_need_64_bits(monkeypatch):
    tiles(monkeypatch)
    x = torch.zeros(1, 2, 1, 64, device="meta")
    assert not attention.needs_long(128, x.as_strided((1, 2, 1, 64), (1, 2**23, 1, 1)))
    assert attention.needs_long(128, x.as_strided((1, 2, 1, 64), (1, 2**24, 1, 1)))
    monkeypatch.setattr(attention, "needs_long", lambda *_: True)
    tensors, options = make_case(seqlen_q=20, seqlen_k=40, rotary_dim=8)
    check_against_oracle(tensors, options)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k", "heads", "packed"])
def test_nothing_in_nothing_out(empty, sinks, monkeypatch):
    tiles(monkeypatch)
    sizes = dict(batch=2, seqlen_q=5, seqlen_k=7, slopes=1, table=True, sinks=sinks)
    sizes |= dict(packed=[(3, 0), (0, 0)]) if empty == "packed" else {empty: 0}
    if empty == "heads":
        sizes["kv_heads"] = 0
    tensors, options = make_case(**sizes)
    q, k, v, grad_out, grad_lse = tensors
    out, lse = attention.attention_forward(q, k, v, *options)
    assert out.shape == q.shape and (out == 0).all()
    expected = options.sinks[:, None] if sinks else torch.tensor(-torch.inf)
    assert lse.shape == grad_lse.shape and (lse == expected.to(DEVICE)).all()
    gradients = attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, *needs(options))
    for x, expected in zip(gradients, (q, k, v, options.alibi_slopes, options.relative_bias), strict=False):
        assert x.shape == expected.shape and (x == 0).all()
    if sinks:  # all that rows without keys have
        torch.testing.assert_close(gradients[5], grad_lse.sum((0, 2)))


def test_no_sequences_at_all():
    tensors, options = make_case(packed=[(0, 0)], table=True)
    nowhere = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    options = options._replace(cu_seqlens_q=nowhere, cu_seqlens_k=nowhere)
    q, k, v, grad_out, grad_lse = tensors
    out, lse = attention.attention_forward(q, k, v, *options)
    gradients = attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, False, True, False)
    assert out.numel() == lse.numel() == 0 and (gradients[4] == 0).all()


def test_rows_that_see_nothing_are_zero_and_give_no_gradient(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(seqlen_q=40, seqlen_k=21, window=(-1, 0), slopes=1, lengths=[0, 15])
    out, lse, grad_q, grad_k, grad_v, *_ = check_against_oracle(tensors, options)
    assert (lse[0] == -torch.inf).all() and (out[0] == 0).all() and (grad_q[0] == 0).all()
    assert (grad_k[0] == 0).all() and (grad_v[0] == 0).all()
    assert (lse[1, :, :19] == -torch.inf).all() and (out[1, :19] == 0).all() and (grad_q[1, :19] == 0).all()
    assert (grad_k[1, 15:] == 0).all() and (grad_v[1, 15:] == 0).all() and (grad_v[1, :15] != 0).all()


def test_rows_that_see_only_a_sink(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES["sinks_causal_more_queries"])
    out, lse, grad_q, *_ = check_against_oracle(tensors, options)
    assert (out[0, :29] == 0).all() and (grad_q[0, :29] == 0).all()
    torch.testing.assert_close(lse[0, :, :29], options.sinks[:, None].expand(-1, 29))


@pytest.mark.parametrize(("bad", "extra"), [(torch.nan, dict(sinks=True)), (torch.inf, dict(rotary_dim=8))])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_nan_reaches_only_the_rows_that_may_see_it(which, bad, extra, monkeypatch):
    """A bad row in a partly masked block: whatever may not see it keeps the value it has without it."""
    tiles(monkeypatch)
    tensors, options = make_case(batch=2, seqlen_q=40, seqlen_k=40, heads=1, head_dim=12, window=(6, 2), **extra)
    clean = run_kernels(tensors, options)
    index, row = ["q", "k", "v", "grad_out"].index(which), 21
    tensors[index][1, row] = bad
    spoiled = run_kernels(tensors, options)
    position = torch.arange(40, device=DEVICE)
    # Queries that see the bad row, and the keys that those see.
    queries = (position == row) if which in ("q", "grad_out") else (row >= position - 6) & (row <= position + 2)
    seen = (position[None] >= position[queries][:, None] - 6) & (position[None] <= position[queries][:, None] + 2)
    keys = seen.any(0)
    no_rows = torch.zeros_like(queries)
    reach = dict(zip(NAMES, (queries, queries, queries, keys, keys), strict=False))
    if which == "grad_out":
        reach |= dict(out=no_rows, lse=no_rows)
    if which == "v":
        reach |= dict(lse=no_rows, grad_v=no_rows)
    visibly_bad = dict(q="grad_k", k="grad_q", v="grad_q", grad_out="grad_v")[which]
    for name, x, y in zip(NAMES[:5], spoiled, clean, strict=False):
        if name == "lse":
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        untouched = ~reach[name]
        assert torch.equal(x[0], y[0]), f"{name}: another batch"
        # Not bit for bit: a block with a bad row is computed again in narrower blocks.
        torch.testing.assert_close(
            x[1, untouched], y[1, untouched], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name == visibly_bad:
            assert (~x[1, reach[name]].isfinite()).flatten(1).any(1).all(), f"{name} hides the bad row"


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 2)])
def test_what_is_not_finite_stays_in_its_packed_sequence(window, descriptors, monkeypatch):
    """Also where blocks reach beyond the end of a sequence, into the rows of the next: bit for bit, so that no block is
    computed again in narrower ones."""
    tiles(monkeypatch, forward=(16, 64, 0), queries=(16, 64), keys=(64, 16), descriptors=descriptors)
    tensors, options = make_case(packed=[(41, 42), (18, 19), (17, 37)], heads=1, head_dim=8, window=window)
    clean = run_kernels(tensors, options)
    _, queries, keys = sequences_of(tensors, options)[1]
    for x, rows in zip(tensors[:4], (queries, keys, keys, queries), strict=True):
        x[rows] = torch.tensor([torch.nan, torch.inf]).repeat(4).to(x)
    spoiled = run_kernels(tensors, options)
    for name, x, y in zip(NAMES[:5], spoiled, clean, strict=False):
        rows = keys if name in ("grad_k", "grad_v") else queries
        if name == "lse":
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        assert not x[rows].isfinite().any(), name
        x[rows] = y[rows] = 0.0
        assert torch.equal(x, y), name


def test_packed_sequences_are_found_among_many(monkeypatch):
    """The forward pass gives the bits of each sequence alone, and the backward pass what the reference gives."""
    tiles(monkeypatch)
    lengths = torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(0)) ** 2 // 12
    lengths[:, 25:29] = 0
    tensors, options = make_case(packed=lengths.T.tolist(), heads=1, head_dim=8, window=(-1, 0), slopes=2)
    out, lse, *_ = check_against_oracle(tensors, options)
    q, k, v, *_ = tensors
    for i, queries, keys in sequences_of(tensors, options)[::3]:
        own = options._replace(cu_seqlens_q=None, cu_seqlens_k=None, alibi_slopes=options.alibi_slopes[i])
        expected, expected_lse = attention.attention_forward(q[queries][None], k[keys][None], v[keys][None], *own)
        assert torch.equal(out[queries], expected[0]) and torch.equal(lse[0][:, queries[1]], expected_lse[0])


@triton.jit
def philox_kernel(p_counters, p_seed, p_words, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    counters = ()
    for i in tl.static_range(3):
        counters = counters + (tl.load(p_counters + i * SIZE + offsets),)
    words = philox_in_kernels(tl.load(p_seed), counters[0], counters[1], counters[2])
    for i in tl.static_range(4):
        tl.store(p_words + i * SIZE + offsets, words[i])


@pytest.mark.parametrize("seed", [0, -1, -(3**37), 2**40 + 5])
def test_philox_is_that_of_the_reference(seed):
    counters = torch.randint(-(2**31), 2**31, (3, 64), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    counters[:, 0] = 0
    words = torch.empty(4, 64, dtype=torch.int32, device=DEVICE)
    key = torch.tensor([seed], device=DEVICE)
    philox_kernel[(1,)](counters.int(), key, words, SIZE=64)
    unsigned = (*counters & 0xFFFFFFFF, torch.zeros_like(counters[0]))
    expected = torch.stack(philox(unsigned, (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)))
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
    if seed == 0:  # of Random123's published test vectors
        assert expected[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("packed", [None, [(17, 9), (5, 20)]])
def test_dropout_drops_the_weights_that_the_reference_drops(packed, monkeypatch):
    """Values, and incoming gradients, of which each is the unit vector of its key or query show single weights."""
    tiles(monkeypatch)
    sizes = dict(batch=2, seqlen_q=22, seqlen_k=29, heads=2, head_dim=8, head_dim_v=32, dropout=0.4, grad_lse=False)
    (q, k, v, grad_out, _), options = make_case(**sizes, packed=packed)
    q.zero_()
    for _, queries, keys in sequences_of((q, k), options):
        seqlen_q, seqlen_k = q[queries].shape[0], k[keys].shape[0]
        v[keys] = torch.eye(32)[:seqlen_k, None].to(v)
        grad_out[queries] = torch.eye(32)[:seqlen_q, None].to(v)
    out, lse = attention.attention_forward(q, k, v, *options)
    grads = attention.attention_backward(grad_out, None, q, k, v, out, lse, *options, *needs(options))
    for i, queries, keys in sequences_of((q, k), options):
        seqlen_q, seqlen_k = q[queries].shape[0], k[keys].shape[0]
        entry = torch.tensor([i], device=DEVICE)
        keeps = attention_keeps(options.dropout_seed, options.dropout_p, entry, 2, seqlen_q, seqlen_k)[0]
        weights = keeps / (1 - 26214 / 65536) / seqlen_k  # (H, Sq, Sk)
        torch.testing.assert_close(out[queries].transpose(0, 1)[..., :seqlen_k], weights)
        grad_v = grads[2][keys][:, 0, :seqlen_q]  # (Sk, Sq): both query heads share the head of v
        torch.testing.assert_close(grad_v, weights.sum(0).T)


def test_every_run_gives_the_same_bits(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES["packed_everything"])
    first, second = (run_kernels(tensors, options) for _ in range(2))
    for name, x, y in zip(NAMES, first, second, strict=True):
        assert torch.equal(x, y), name


def test_the_heads_of_a_group_add_up(monkeypatch):
    """Two query heads that are equal give twice the key and value gradient of one."""
    tiles(monkeypatch)
    tensors, options = make_case(heads=1, kv_heads=1, seqlen_q=20, seqlen_k=40)
    one = run_kernels(tensors, options)
    q, k, v, grad_out, grad_lse = tensors
    two = run_kernels([q.repeat(1, 1, 2, 1), k, v, grad_out.repeat(1, 1, 2, 1), grad_lse.repeat(1, 2, 1)], options)
    torch.testing.assert_close(two[3], 2 * one[3])
    torch.testing.assert_close(two[4], 2 * one[4])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "window",
        "alibi_causal",
        "table",
        "rotary",
        "sinks",
        "dropout",
        "values_of_fewer_channels",
        "packed_causal",
        "everything",
        "packed_everything",
    ],  # fmt: skip
)
def test_on_a_gpu(name, dtype, head_dim):
    sizes = dict(seqlen_q=500, seqlen_k=777, head_dim=head_dim, dtype=dtype)
    if "rotary_dim" in CASES[name]:
        sizes["rotary_dim"] = min(CASES[name]["rotary_dim"], head_dim)
    if "lengths" in CASES[name]:
        sizes["lengths"] = [700, 333]
    if "packed" in CASES[name]:
        sizes |= dict(packed=[(500, 777), (300, 20), (0, 9), (6, 0), (64, 64)], offset=280)
    tensors, options = make_case(**CASES[name] | sizes)
    check_against_oracle(tensors, options)
