"""Packed sequences: the bits of each sequence alone, and clear errors."""

import itertools
import math

import pytest
import torch

from pynlp.functional import attention, attention_varlen, rotary_tables

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [(33, 33), (0, 5), (1, 1), (7, 0), (70, 40), (0, 0), (40, 170), (129, 300)]  # queries, keys
HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 4, 2, 24, 16

FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(9, 20)),
    "causal window, softcap": dict(causal=True, window=(30, None), softcap=3.0),
    "sinks": dict(causal=True, sinks=True),
    "ALiBi": dict(alibi="heads"),
    "ALiBi of each sequence": dict(alibi="batch", causal=True),
    "T5": dict(relative=True),
    "T5, causal": dict(relative=True, causal=True),
    "RoPE": dict(rotary=True),
    "RoPE, position ids": dict(rotary="ids", causal=True, rotary_interleaved=True),
    "all": dict(causal=True, window=(50, None), sinks=True, alibi="batch", relative=True, rotary=True, softcap=5.0),
}


def pack(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make(features, dtype, lengths):
    """Tensors that get gradients by name, options, and cu_seqlens."""
    features, generator = dict(features), torch.Generator().manual_seed(0)
    total_q, total_k = (sum(side) for side in zip(*lengths, strict=True))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "q": normal(total_q, HEADS, HEAD_DIM).to(dtype),
        "k": normal(total_k, KV_HEADS, HEAD_DIM).to(dtype),
        "v": normal(total_k, KV_HEADS, HEAD_DIM_V).to(dtype),
    }
    statistics = torch.promote_types(dtype, torch.float32)
    if features.pop("sinks", False):
        tensors["sinks"] = normal(HEADS).to(statistics)
    alibi = features.pop("alibi", None)
    if alibi:
        tensors["alibi_slopes"] = normal(*(len(lengths), HEADS)[alibi == "heads" :]).abs().to(statistics) * 0.1
    if features.pop("relative", False):
        tensors["relative_bias"] = normal(8, HEADS).to(statistics)
        features["relative_max_distance"] = 20
    rotary = features.pop("rotary", None)
    if rotary:
        features["rotary"] = rotary_tables(400, 16)
        features["rotary_offset"] = 40
    if rotary == "ids":
        lengths = [(min(queries, keys), keys) for queries, keys in lengths]
        tensors["q"] = tensors["q"][: sum(queries for queries, _ in lengths)]
        features["rotary_offset"] = torch.randint(0, 400, (total_k,), generator=generator)
    return tensors, features, *(pack(side) for side in zip(*lengths, strict=True))


def weights_for(out, lse):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse)]
    return weights[0], weights[1].masked_fill(lse.detach() == -math.inf, 0.0)


def one_by_one(tensors, options, cu_seqlens_q, cu_seqlens_k):
    """(out, lse) of each sequence alone, side by side."""
    outs, lses = [], []
    for i in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(cu[i], cu[i + 1]) for cu in (cu_seqlens_q, cu_seqlens_k))
        own = {name: x for name, x in tensors.items() if name not in "qkv"} | options
        if "alibi_slopes" in own and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][i : i + 1]
        if isinstance(own.get("rotary_offset"), torch.Tensor):
            own["rotary_offset"] = own["rotary_offset"][None, keys]
        rows = (tensors["q"][None, queries], tensors["k"][None, keys], tensors["v"][None, keys])
        out, lse = attention(*rows, return_lse=True, **own)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_each_sequence_as_if_alone(name, dtype, isa):
    """Bit for bit but for the gradients of what all sequences share: there the order of the sums differs."""
    tensors, options, *cu_seqlens = make(FEATURES[name], dtype, LENGTHS)
    results = []
    for function in (attention_varlen, None):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        if function:
            out, lse = function(
                **leaves, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1], return_lse=True, **options
            )
        else:
            out, lse = one_by_one(leaves, options, *cu_seqlens)
        torch.autograd.backward((out, lse), weights_for(out, lse))
        results.append({"out": out, "lse": lse} | {f"gradient of {name}": x.grad for name, x in leaves.items()})
    packed, alone = results
    for what, expected in alone.items():
        if what.split()[-1] in ("sinks", "alibi_slopes", "relative_bias"):
            torch.testing.assert_close(packed[what], expected, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
        else:
            assert torch.equal(packed[what], expected), what
    assert packed["out"].isfinite().all() and packed["gradient of k"].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_lengths_are_a_batch(dtype, isa):
    """Dropout, which counts by the sequence's number, included."""
    q, k, v = (torch.randn(3, 50, 4, 24).to(dtype) for _ in range(3))
    cu_seqlens = pack([50] * 3)
    results = []
    for packed in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        options = dict(causal=True, dropout_p=0.3, seed=9)
        if packed:
            out = attention_varlen(*(x.flatten(0, 1) for x in leaves), cu_seqlens, cu_seqlens, **options).view(q.shape)
        else:
            out = attention(*leaves, **options)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads(dtype, isa):
    tensors, options, *cu_seqlens = make(FEATURES["all"], dtype, LENGTHS * 3)
    expected = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = attention_varlen(**leaves, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1], **options)
        out.backward(torch.ones_like(out))
        results = [out, *(x.grad for x in leaves.values())]
        for x, y in zip(results, expected or results, strict=True):
            assert torch.equal(x, y)
        expected = results


@pytest.mark.slow
def test_gradcheck():
    tensors, options, *cu_seqlens = make(FEATURES["all"], torch.float64, [(3, 4), (0, 2), (2, 2)])
    names = list(tensors)
    # Windows and buckets are of small sequences' size.
    options |= dict(window=(2, None), relative_max_distance=5)

    def function(*values):
        return attention_varlen(**dict(zip(names, values, strict=True)), cu_seqlens_q=cu_seqlens[0],
                                cu_seqlens_k=cu_seqlens[1], return_lse=True, **options)  # fmt: skip

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    tensors, _, *cu_seqlens = make(FEATURES["sinks"], dtype, [(5, 7), (0, 3), (4, 4)])
    q, k, v, sinks = (x.requires_grad_() for x in tensors.values())
    nothing = (None,) * 6
    arguments = (q[None], k[None], v[None], 0.3, -1, 0, 0.0, None, *cu_seqlens, sinks, *nothing, 0, False, 0.0, None)
    results = torch.library.opcheck(
        torch.ops.pynlp.attention_forward.default,
        [
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in arguments
        ],
    )
    assert set(results.values()) == {"SUCCESS"}


def test_compile():
    """One graph for any lengths: nothing in it asks how long a sequence is."""
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([(5, 7), (0, 3), (4, 4)], [(9, 9), (2, 11), (3, 3)]):
        tensors, options, *cu_seqlens = make(FEATURES["all"], torch.float32, lengths)
        rows, biases = [tensors.pop(name) for name in "qkv"], tensors
        expected = attention_varlen(*rows, *cu_seqlens, **biases, **options)
        assert torch.equal(compiled(*rows, *cu_seqlens, **biases, **options), expected)


def test_no_sequence_at_all():
    q, none = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    out, lse = attention_varlen(q, q, q, none, none, return_lse=True)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    out.sum().backward()
    assert q.grad.shape == q.shape


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


REFUSED = {
    "q's rank": (dict(q=torch.zeros(1, 9, 4, 8)), ValueError, "q: expected 3 dimensions \\(total, heads, head_dim\\)"),
    "first": (dict(cu_seqlens_q=cu(1, 4, 9)), ValueError, "cu_seqlens_q: .*the first to be 0 .*total, 9, got 1 and 9"),
    "last": (dict(cu_seqlens_k=cu(0, 4, 8)), ValueError, "cu_seqlens_k: .*total, 11, got 0 and 8"),
    "falling": (
        dict(cu_seqlens_q=cu(0, 10, 9)),
        ValueError,
        "cu_seqlens_q: .*never fall, got one 1 below the one before",
    ),
    "one more": (dict(cu_seqlens_k=cu(0, 4, 8, 11)), ValueError, "cu_seqlens_k: expected as many .* 2, got 3"),
    "rank": (
        dict(cu_seqlens_q=cu(0, 9)[None]),
        ValueError,
        "cu_seqlens_q: expected shape \\(batch \\+ 1,\\), got \\(1, 2\\)",
    ),
    "nothing": (dict(cu_seqlens_q=cu()), ValueError, "cu_seqlens_q: expected shape \\(batch \\+ 1,\\), got \\(0,\\)"),
    "dtype": (dict(cu_seqlens_q=cu(0, 4.0, 9, dtype=torch.float32)), TypeError, "cu_seqlens_q: expected dtype int32"),
    "device": (
        dict(cu_seqlens_k=cu(0, 4, 11).to("meta")),
        ValueError,
        "cu_seqlens_k: expected q's device cpu, got meta",
    ),
    "longest": (dict(max_seqlen_q=4), ValueError, "max_seqlen_q: .*the longest sequence, got 4 and a sequence of 5"),
    "slopes": (
        dict(alibi_slopes=torch.ones(3, 4)),
        ValueError,
        "alibi_slopes: .*\\(4,\\) or \\(2, 4\\), got \\(3, 4\\)",
    ),
    "short tables": (
        dict(rotary=(torch.ones(6, 4), torch.ones(6, 4))),
        ValueError,
        "rotary: .*the longest sequence, got 6 positions, needed 7",
    ),
    "queries before 0": (
        dict(cu_seqlens_q=cu(0, 6, 9), max_seqlen_q=6, rotary=(torch.ones(9, 4), torch.ones(9, 4))),
        ValueError,
        "rotary_offset: expected no position below 0, got -2 for the first query",
    ),
    "ids' shape": (
        dict(rotary=(torch.ones(9, 4), torch.ones(9, 4)), rotary_offset=cu(1, 2)),
        ValueError,
        "rotary_offset: .*ids of shape \\(11,\\), got \\(2,\\)",
    ),
    "dropout": (dict(dropout_p=2.0), ValueError, "dropout_p: expected at least 0 and less than 1, got 2.0"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_bad_arguments(refused):
    change, error, message = REFUSED[refused]
    good = dict(
        q=torch.zeros(9, 4, 8), k=torch.zeros(11, 2, 8), v=torch.zeros(11, 2, 8),
        cu_seqlens_q=cu(0, 4, 9), cu_seqlens_k=cu(0, 4, 11), max_seqlen_q=5, max_seqlen_k=7,
    )  # fmt: skip
    attention_varlen(**good)
    with pytest.raises(error, match=message):
        attention_varlen(**good | change)
