"""What holds bit for bit on the CPU: threads, strides, masked NaN; and what happens where there is nothing to see."""

import math

import pytest
import torch
from cases.attention import Case, evaluate, fused_attention, make_inputs

from pynlp.functional import attention, rotary_tables

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = dict(softcap=4.0, alibi="heads", relative=(32, 100), rotary_dim=16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 257, 300, 4, 2, 40, causal=True, **EVERYTHING),
        Case(2, 300, 257, 4, 4, 24, window=(100, 30), alibi="batch", relative=(8, 20), key_lengths=(257, 80)),
        Case(1, 700, 700, 1, 1, 64, causal=True),  # one head: its blocks are all the threads can share
        Case(5, 3, 1100, 6, 1, 32),
    ],
    ids=str,
)
def test_threads_and_runs(case, dtype, isa):
    tensors, options = make_inputs(case, dtype)
    torch.set_num_threads(1)
    expected = evaluate(fused_attention, tensors, options)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert_same_bits(evaluate(fused_attention, tensors, options), expected)


def from_heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def from_packed(x):
    return torch.stack([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)], dim=2)[:, :, 1]


def from_wider(x):
    """Rows with an odd gap, the first not at the start of the storage."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), math.nan, dtype=x.dtype)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def from_column_major(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def from_every_other(x):
    """Every other row of a tensor twice as long, and a last dimension that is not contiguous."""
    return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=-1)[:, ::2, :, ::2]


LAYOUTS = [from_heads_first, from_packed, from_wider, from_column_major, from_every_other]


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_strides(layout, dtype, isa):
    tensors, options = make_inputs(Case(2, 37, 45, 4, 2, 24, causal=True, rotary_dim=12), dtype)
    strided = {name: layout(x) for name, x in tensors.items()}
    assert any(x.stride() != tensors[name].stride() for name, x in strided.items())
    assert_same_bits(evaluate(fused_attention, strided, options), evaluate(fused_attention, tensors, options))


@dtypes
def test_expanded_inputs(dtype, isa):
    """Stride 0 in the batch and in the heads."""
    tensors, options = make_inputs(Case(3, 37, 45, 4, 4, 24, causal=True), dtype)
    expanded = {
        "q": tensors["q"][:1].expand(3, -1, -1, -1),
        "k": tensors["k"][:, :, :1].expand(-1, -1, 4, -1),
        "v": tensors["v"][:1, :, :1].expand(3, -1, 4, -1),
    }
    contiguous = {name: x.contiguous() for name, x in expanded.items()}
    assert_same_bits(evaluate(fused_attention, expanded, options), evaluate(fused_attention, contiguous, options))


@dtypes
def test_strides_of_incoming_gradients(dtype, isa):
    tensors, options = make_inputs(Case(2, 37, 45, 4, 2, 24, causal=True), dtype)

    def gradients(weight_of):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        out = attention(*leaves, **options)
        return torch.autograd.grad(out, leaves, weight_of(out))

    ones = gradients(torch.ones_like)
    for expanded, contiguous in zip(gradients(lambda out: out.new_ones(()).expand(out.shape)), ones, strict=True):
        assert torch.equal(expanded, contiguous)
    weight = torch.randn(tensors["q"].shape).to(dtype)
    expected = gradients(lambda out: weight)
    for layout in LAYOUTS:
        for strided, contiguous in zip(gradients(lambda out, layout=layout: layout(weight)), expected, strict=True):
            assert torch.equal(strided, contiguous), layout.__name__


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=0, alibi="batch", relative=(8, 20)),
        Case(seqlen_q=0, alibi="heads", relative=(8, 20)),
        Case(seqlen_k=0, alibi="heads", relative=(8, 20)),
        Case(seqlen_k=0, causal=True, key_lengths=(0, 0)),
        Case(seqlen_q=0, seqlen_k=0, window=(3, 3)),
        Case(heads=0, kv_heads=0),
    ],
    ids=str,
)
def test_nothing_there(case, dtype, isa):
    tensors, options = make_inputs(case, dtype)
    results = evaluate(fused_attention, tensors, options)
    assert results["out"].shape == (case.batch, case.seqlen_q, case.heads, case.head_dim)
    assert (results.pop("lse") == -math.inf).all()
    for name, value in results.items():
        assert (value == 0).all(), name
        assert name == "out" or value.shape == tensors[name.removeprefix("gradient of ")].shape


def test_nothing_there_with_strides():
    """A tensor without elements counts as contiguous whatever its strides."""
    q = torch.randn(2, 0, 4, 16)[..., ::2].requires_grad_()
    k = torch.randn(2, 7, 2, 8, requires_grad=True)
    attention(q, k, k).sum().backward()  # whose gradient is expanded
    assert q.grad.shape == q.shape and torch.equal(k.grad, torch.zeros_like(k))


@dtypes
def test_a_single_key_has_the_weight_1_in_backward(dtype, isa):
    """However large its score is, and whatever turned rows are rounded to."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 1, 2, 64).mul(3).to(dtype).requires_grad_() for _ in range(3))
    out = attention(q, k, v, rotary=rotary_tables(8, 64), rotary_offset=7)
    grad = torch.randn_like(out)
    (grad_v,) = torch.autograd.grad(out, v, grad)
    torch.testing.assert_close(grad_v, grad, rtol=1e-5 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_single_key_has_the_weight_1_where_scores_are_large(head_dim, isa):
    """Scores reach 4000, whose last bit is 2e-4: grad_v errs a hundredth of that."""
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(1, 64, 2, head_dim, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, 1, 2, head_dim, generator=generator) for _ in range(2))
    v.requires_grad_()
    attention((100 * q).requires_grad_(), k, v).backward(grad)
    torch.testing.assert_close(v.grad, grad.double().sum(1, keepdim=True).float(), rtol=0, atol=1e-5)


@dtypes
def test_rows_that_see_nothing(dtype, isa):
    """Queries before the first key, and a batch entry of length 0: zeros, -inf, and no part in any gradient."""
    case = Case(2, 70, 40, 4, 2, 24, causal=True, alibi="heads", relative=(8, 20), key_lengths=(40, 0))
    tensors, options = make_inputs(case, dtype)
    results = evaluate(fused_attention, tensors, options)
    for blind in (results["out"][0, :30], results["out"][1], results["gradient of q"][0, :30]):
        assert (blind == 0).all()
    for name in ("q", "k", "v"):
        assert (results[f"gradient of {name}"][1] == 0).all(), name
    assert (results["lse"][0, :, :30] == -math.inf).all() and (results["lse"][1] == -math.inf).all()
    assert results["lse"][0, :, 30:].isfinite().all() and results["out"][0, 30:].ne(0).all()
    assert all(value.isfinite().all() for name, value in results.items() if name != "lse")
    tensors["q"][0, :30] = tensors["q"][1] = 99.0  # changes nothing: their queries see nothing
    assert_same_bits(evaluate(fused_attention, tensors, options), results)


# Which keys a spoiled row is put at, and which queries see them: query i stands at key i + 60 of 130.
SPOILED_KEYS = {
    "causal": (dict(causal=True), [64, 100, 129], lambda query, key: key <= query),
    "window": (dict(window=(9, 4)), [0, 61, 77, 125], lambda query, key: -9 <= key - query <= 4),
    "causal window": (dict(causal=True, window=(20, None)), [45, 90], lambda query, key: -20 <= key - query <= 0),
}


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", ["k", "v"])
@pytest.mark.parametrize("mask", SPOILED_KEYS)
def test_hidden_keys_change_nothing(mask, spoiled, value, dtype, isa):
    """A NaN or an infinity in a row of k or v reaches the queries that see it, and no bit of any other."""
    options, keys, sees = SPOILED_KEYS[mask]
    tensors, options = make_inputs(Case(2, 70, 130, 4, 2, 24, alibi="batch", **options), dtype)
    clean = evaluate(fused_attention, tensors, options)
    tensors[spoiled][0, keys, 1, 5] = value  # heads 2 and 3 of batch entry 0
    results = evaluate(fused_attention, tensors, options)
    hit = torch.tensor([any(sees(query, key) for key in keys) for query in range(60, 130)])
    assert hit.any() and not hit.all()
    for name in ("out", "gradient of q"):
        assert torch.equal(results[name][0, ~hit], clean[name][0, ~hit]), name
        assert torch.equal(results[name][0, :, :2], clean[name][0, :, :2]), name
        assert torch.equal(results[name][1], clean[name][1]), name
    assert torch.equal(results["lse"][0][:, ~hit], clean["lse"][0][:, ~hit])
    if math.isnan(value):
        spread = results["out"][0, hit][:, 2:]
        assert spread.isnan().all() if spoiled == "k" else spread[..., 5].isnan().all(), "a NaN must not be lost"
    # Keys that no hit query sees have clean gradients.
    far = torch.tensor([not any(hit[i] and sees(i + 60, key) for i in range(70)) for key in range(130)])
    assert far.any() or mask == "causal"
    for name in ("gradient of k", "gradient of v"):
        assert torch.equal(results[name][0, far], clean[name][0, far]), name
        assert torch.equal(results[name][:, :, 0], clean[name][:, :, 0]), name
        assert torch.equal(results[name][1], clean[name][1]), name


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spoiled_queries_change_no_other(value, dtype, isa):
    """A NaN in a query, or in the gradient of its output, reaches the keys it sees and nothing else."""
    tensors, options = make_inputs(Case(2, 130, 130, 4, 2, 24, causal=True, window=(30, None)), dtype)

    def run(q, weight):
        leaves = [x.detach().requires_grad_() for x in (q, tensors["k"], tensors["v"])]
        out = attention(*leaves, **options)
        return (out.detach(), *torch.autograd.grad(out, leaves, weight))

    weight = torch.randn(tensors["q"].shape).to(dtype)
    clean = run(tensors["q"], weight)
    for spoil_query in (True, False):
        q, w = tensors["q"].clone(), weight.clone()
        (q if spoil_query else w)[0, 70, 1, 3] = value
        out, grad_q, grad_k, grad_v = run(q, w)
        others = torch.arange(130) != 70
        assert torch.equal(out[0, others], clean[0][0, others]) and torch.equal(grad_q[0, others], clean[1][0, others])
        hidden = torch.tensor([not 40 <= key <= 70 for key in range(130)])
        for gradient, expected in ((grad_k, clean[2]), (grad_v, clean[3])):
            assert torch.equal(gradient[0, hidden], expected[0, hidden])
            assert torch.equal(gradient[0, :, 1], expected[0, :, 1]) and torch.equal(gradient[1], expected[1])
            assert not gradient[0, 40:71, 0].isfinite().all()


@dtypes
def test_garbage_beyond_key_lengths(dtype, isa):
    """A padded batch: what lies in the padding is not read, and gets gradients of zero."""
    case = Case(3, 50, 140, 4, 2, 24, key_lengths=(140, 53, 0), alibi="heads", relative=(8, 20), softcap=3.0)
    tensors, options = make_inputs(case, dtype)
    clean = evaluate(fused_attention, tensors, options)
    for entry, length in enumerate(case.key_lengths):
        tensors["k"][entry, length:] = math.nan
        tensors["v"][entry, length:] = math.nan
    results = evaluate(fused_attention, tensors, options)
    assert_same_bits(results, clean)
    for entry, length in enumerate(case.key_lengths):
        assert (results["gradient of k"][entry, length:] == 0).all()
        assert (results["gradient of v"][entry, length:] == 0).all()


@dtypes
def test_key_lengths_equal_a_shorter_tensor(dtype, isa):
    """Masked keys take no part: the same values as without them, where the alignment plays no role."""
    tensors, options = make_inputs(Case(1, 50, 140, 4, 2, 24), dtype)
    padded = evaluate(fused_attention, tensors, options | {"key_lengths": torch.tensor([77])})
    cut = {name: x if name == "q" else x[:, :77] for name, x in tensors.items()}
    results = evaluate(fused_attention, cut, options)
    for name in ("out", "lse", "gradient of q"):
        assert torch.equal(padded[name], results[name]), name
    for name in ("gradient of k", "gradient of v"):
        assert torch.equal(padded[name][:, :77], results[name]), name
