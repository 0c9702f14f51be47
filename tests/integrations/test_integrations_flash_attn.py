"""flash-attn's functions on our kernels: signatures as there, results against dense attention in fp64."""

import inspect
import math

import pytest
import torch
from cases.flash_attn import DTYPES, assert_agree, dense_attention
from cases.pairs import every_pair

from pynlp.integrations import flash_attn
from pynlp.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

OPTIONS = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
# Names in order, a pair with the default where there is one; of flash-attn 2.8.3.
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *OPTIONS],
    "flash_attn_qkvpacked_func": ["qkv", *OPTIONS],
    "flash_attn_kvpacked_func": ["q", "kv", *OPTIONS],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *OPTIONS, ("block_table", None)],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *OPTIONS],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *OPTIONS],
    "flash_attn_with_kvcache": [
        "q",
        "k_cache",
        "v_cache",
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ],
    "apply_rotary_emb": [
        "x",
        "cos",
        "sin",
        ("interleaved", False),
        ("inplace", False),
        ("seqlen_offsets", 0),
        ("cu_seqlens", None),
        ("max_seqlen", None),
    ],
}


def test_every_function_has_its_signature_here():
    assert sorted(SIGNATURES) == flash_attn.__all__


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert [p.name if p.default is p.empty else (p.name, p.default) for p in parameters] == SIGNATURES[name]


def dense_packed_attention(q, k, v, lengths_q, lengths_k, alibi_slopes=None, **options):
    """dense_attention of each sequence by itself: (total_q, H, D) and (H, total_q)."""
    results = []
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for i, (queries, keys, values) in enumerate(sequences):
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        results.append(dense_attention(queries[None], keys[None], values[None], alibi_slopes=slopes, **options))
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], dim=-1)


CHOICES = {
    "plain": {},
    "scale": dict(softmax_scale=0.7),
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "window to the left": dict(window_size=[3, -1]),
    "window to the right": dict(window_size=(-1, 2)),
    "window of nobody else": dict(window_size=(0, 0)),
    "window as a tensor": dict(window_size=torch.tensor([1, 4])),
    "causal window": dict(causal=True, window_size=(2, 3)),
    "softcap": dict(softcap=0.8),
    "negative softcap": dict(softcap=-1.0),
    "deterministic": dict(deterministic=True),
    "alibi of heads": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "causal alibi of entries": dict(causal=True, alibi_slopes=torch.linspace(0.9, 0.05, 8).view(2, 4)),
    "all": dict(softmax_scale=0.4, causal=True, window_size=(4, -1), softcap=1.5, alibi_slopes=torch.full((2, 4), 0.3)),
}
choices = pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)


def without_deterministic(options):
    return {name: value for name, value in options.items() if name != "deterministic"}


@every_pair(options=list(CHOICES), lengths=[(5, 9), (9, 5), (7, 7)], dtype=DTYPES)
def test_flash_attn_func(options, lengths, dtype):
    options, (seqlen_q, seqlen_k) = CHOICES[options], lengths

    def ours(q, k, v):
        out, lse, weights = flash_attn_func(q, k, v, **options, return_attn_probs=True)
        assert weights.shape == (0,) and weights.dtype == dtype
        assert torch.equal(out, flash_attn_func(q, k, v, **options))
        return out, lse

    def dense(q, k, v):
        return dense_attention(q, k, v, **without_deterministic(options))

    q = torch.randn(2, seqlen_q, 4, 10, dtype=dtype)
    k, v = torch.randn(2, 2, seqlen_k, 2, 10, dtype=dtype)
    assert_agree(ours, dense, q=q, k=k, v=v)


def test_blind_queries_give_zeros_and_an_infinite_lse():
    q, kv = torch.randn(1, 5, 2, 4), torch.randn(1, 3, 2, 2, 4)
    out, lse, _ = flash_attn_kvpacked_func(q, kv, causal=True, return_attn_probs=True)
    assert out[:, :2].eq(0).all() and out[:, 2:].ne(0).all()
    assert lse[..., :2].eq(math.inf).all() and lse[..., 2:].isfinite().all()
    out, lse, _ = flash_attn_func(q, q[:, :0], q[:, :0], return_attn_probs=True)
    assert out.eq(0).all() and lse.eq(math.inf).all()


def test_arguments_by_position():
    q, k, v = torch.randn(3, 2, 7, 4, 8)
    slopes = torch.rand(4)
    expected, _ = dense_attention(q, k, v, 0.3, False, (3, 2), 0.9, slopes)
    arguments = (0.0, 0.3, False, (3, 2), 0.9, slopes, True, False)
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    for out in (
        flash_attn_func(q, k, v, *arguments),
        flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), *arguments),
        flash_attn_kvpacked_func(q, torch.stack((k, v), 2), *arguments),
        flash_attn_varlen_func(*packed, cu, cu, 7, 7, *arguments),
        flash_attn_varlen_qkvpacked_func(torch.stack(packed, 1), cu, 7, *arguments),
        flash_attn_varlen_kvpacked_func(packed[0], torch.stack(packed[1:], 1), cu, cu, 7, 7, *arguments),
    ):
        torch.testing.assert_close(out.view_as(expected), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@choices
def test_flash_attn_qkvpacked_func(options, dtype):
    def ours(qkv):
        return flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)[:2]

    def dense(qkv):
        return dense_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **without_deterministic(options))

    assert_agree(ours, dense, qkv=torch.randn(2, 6, 3, 4, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@choices
def test_flash_attn_kvpacked_func(options, dtype):
    def ours(q, kv):
        return flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True)[:2]

    def dense(q, kv):
        return dense_attention(q, kv[:, :, 0], kv[:, :, 1], **without_deterministic(options))

    q, kv = torch.randn(2, 4, 4, 7, dtype=dtype), torch.randn(2, 6, 2, 1, 7, dtype=dtype)
    assert_agree(ours, dense, q=q, kv=kv)


LENGTHS_Q, LENGTHS_K = [5, 0, 9, 1], [7, 3, 0, 4]
CU_Q, CU_K = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (LENGTHS_Q, LENGTHS_K))
PACKED_CHOICES = CHOICES | {
    "causal alibi of entries": dict(causal=True, alibi_slopes=torch.linspace(0.9, 0.05, 16).view(4, 4)),
    "all": dict(softmax_scale=0.4, causal=True, window_size=(4, -1), softcap=1.5, alibi_slopes=torch.full((4, 4), 0.3)),
}
packed_choices = pytest.mark.parametrize("options", PACKED_CHOICES.values(), ids=PACKED_CHOICES)


@pytest.mark.parametrize("dtype", DTYPES)
@packed_choices
def test_flash_attn_varlen_func(options, dtype):
    def ours(q, k, v):
        out, lse, weights = flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 9, 8, **options, return_attn_probs=True)
        assert weights.shape == (0,) and lse.shape == (4, 15)
        assert torch.equal(out, flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 9, 8, **options))
        return out, lse

    def dense(q, k, v):
        return dense_packed_attention(q, k, v, LENGTHS_Q, LENGTHS_K, **without_deterministic(options))

    q, (k, v) = torch.randn(15, 4, 10, dtype=dtype), torch.randn(2, 14, 2, 10, dtype=dtype)
    assert_agree(ours, dense, q=q, k=k, v=v)


@pytest.mark.parametrize("dtype", DTYPES)
@packed_choices
def test_flash_attn_varlen_kvpacked_func(options, dtype):
    def ours(q, kv):
        return flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 9, 7, **options, return_attn_probs=True)[:2]

    def dense(q, kv):
        return dense_packed_attention(q, kv[:, 0], kv[:, 1], LENGTHS_Q, LENGTHS_K, **without_deterministic(options))

    assert_agree(ours, dense, q=torch.randn(15, 4, 6, dtype=dtype), kv=torch.randn(14, 2, 4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@packed_choices
def test_flash_attn_varlen_qkvpacked_func(options, dtype):
    def ours(qkv):
        return flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 9, **options, return_attn_probs=True)[:2]

    def dense(qkv):
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        return dense_packed_attention(q, k, v, LENGTHS_Q, LENGTHS_Q, **without_deterministic(options))

    assert_agree(ours, dense, qkv=torch.randn(15, 3, 4, 3, dtype=dtype))


# Pages of 3 for LENGTHS_K: in no order, one unused, and entries that no length needs point outside.
BLOCK_TABLE = torch.tensor([[5, 0, 3], [1, -1, 99], [-7, -1, -1], [6, 2, 42]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(1, 1), softcap=2.0)], ids=str)
def test_varlen_with_a_block_table(options, dtype):
    def ours(q, k, v):
        return flash_attn_varlen_func(
            q, k, v, CU_Q, CU_K, 9, 7, block_table=BLOCK_TABLE, return_attn_probs=True, **options
        )[:2]

    def dense(q, k, v):
        pages = [(b, i // 3, i % 3) for b, length in enumerate(LENGTHS_K) for i in range(length)]
        k, v = (torch.stack([x[BLOCK_TABLE[b, page], place] for b, page, place in pages]) for x in (k, v))
        return dense_packed_attention(q, k, v, LENGTHS_Q, LENGTHS_K, **options)

    k, v = torch.randn(2, 7, 3, 2, 8, dtype=dtype)
    assert_agree(ours, dense, q=torch.randn(15, 4, 8, dtype=dtype), k=k, v=v)


def test_varlen_with_a_block_table_of_no_keys():
    q, pages = torch.randn(3, 4, 8), torch.randn(2, 5, 2, 8)
    cu_q, cu_k = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    assert flash_attn_varlen_func(q, pages, pages, cu_q, cu_k, 3, 0, block_table=table).eq(0).all()


def test_dropout():
    """Values that are unit vectors show the weights: dropped, or divided by the share that is kept."""
    q, k, v = torch.randn(3, 2, 64, 2, 64)
    unit_vectors = torch.eye(64)[None, :, None].expand(2, -1, 2, -1)
    torch.manual_seed(5)
    shown = flash_attn_func(q, k, unit_vectors, 0.25, causal=True).transpose(1, 2)  # (B, H, Sq, Sk)
    kept = shown != 0
    share = kept[..., torch.ones(64, 64).tril().bool()].float().mean().item()  # of 8320 weights
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 8320)

    torch.manual_seed(5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, dropout_p=0.25, causal=True)
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact, _ = dense_attention(*exact_leaves, causal=True, keep=kept / 0.75)
    weights = torch.randn_like(out)
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out, leaves, weights)
    for result, expected in zip(gradients, torch.autograd.grad(exact, exact_leaves, weights.double()), strict=True):
        torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_from_the_generator_by_all_alike():
    q, k, v = torch.randn(3, 2, 7, 4, 8)
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    torch.manual_seed(3)
    first, second = flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)
    assert not torch.equal(first, second)
    for function, arguments in (
        (flash_attn_qkvpacked_func, (torch.stack((q, k, v), 2),)),
        (flash_attn_kvpacked_func, (q, torch.stack((k, v), 2))),
        (flash_attn_varlen_func, (*packed, cu, cu, 7, 7)),
        (flash_attn_varlen_qkvpacked_func, (torch.stack(packed, 1), cu, 7)),
        (flash_attn_varlen_kvpacked_func, (packed[0], torch.stack(packed[1:], 1), cu, cu, 7, 7)),
    ):
        torch.manual_seed(3)
        for expected in (first, second):
            assert torch.equal(function(*arguments, 0.5).view_as(expected), expected), function.__name__


def test_compile():
    torch._dynamo.reset()
    angles = torch.rand(5, 4)

    def function(qkv):
        q, k, v = qkv.unbind(2)
        q, k = (apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved=True) for x in (q, k))
        return flash_attn_func(q, k, v, causal=True, window_size=(3, -1))

    gradients = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        qkv = torch.linspace(-1, 1, 480).view(2, 5, 3, 2, 8).sin().requires_grad_()
        out = call(qkv)
        out.backward(out.detach().cos())
        gradients.append(torch.cat((out.detach().flatten(), qkv.grad.flatten())))
    assert torch.equal(*gradients)
