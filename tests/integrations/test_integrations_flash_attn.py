"""flash-attn's functions on our kernels: signatures as there, results against dense attention in fp64."""

import inspect
import math

import pytest
import torch

from pynlp.integrations import flash_attn
from pynlp.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

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


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_every_function_has_its_signature_here():
    assert sorted(SIGNATURES) == flash_attn.__all__


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert [p.name if p.default is p.empty else (p.name, p.default) for p in parameters] == SIGNATURES[name]


def dense_attention(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, keep=None
):
    """q (B, Sq, H, D), k and v (B, Sk, G, D) -> out in q's dtype and lse (B, H, Sq), by PyTorch's own operations.

    `keep` (B, H, Sq, Sk): the factors that dropout multiplies the weights with.
    """
    seqlen_q, heads, seqlen_k = q.shape[1], q.shape[2], k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (softmax_scale or q.shape[3] ** -0.5)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    row = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    column = torch.arange(seqlen_k)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * (row - column).abs()
    left, right = window_size
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    if causal:
        right = 0
    if left >= 0:
        hidden = hidden | (column < row - left)
    if right >= 0:
        hidden = hidden | (column > row + right)
    blind = hidden.all(-1, keepdim=True)  # rows of -inf only would have NaN gradients
    scores = scores.masked_fill(hidden & ~blind, -math.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind[:, 0], math.inf)
    if keep is not None:
        weights = weights * keep
    return torch.einsum("bhij,bjhd->bihd", weights.to(q.dtype), v), lse


def dense_packed_attention(q, k, v, lengths_q, lengths_k, alibi_slopes=None, **options):
    """dense_attention of each sequence by itself: (total_q, H, D) and (H, total_q)."""
    results = []
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for i, (queries, keys, values) in enumerate(sequences):
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        results.append(dense_attention(queries[None], keys[None], values[None], alibi_slopes=slopes, **options))
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], dim=-1)


def outputs_and_gradients(function, tensors):
    """out, lse, and the gradient of each tensor for a fixed random weighting of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, lse = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    of_out, of_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    torch.autograd.backward((out, lse), (of_out, of_lse.masked_fill(lse.detach().isinf(), 0.0)))
    return {"out": out.detach(), "lse": lse.detach()} | {name: x.grad for name, x in leaves.items()}


def largest_error(result, exact):
    """Equal infinities are no error, unequal ones an infinite one, as is NaN."""
    difference = torch.where(result.double() == exact, 0.0, (result.double() - exact).abs())
    return difference.nan_to_num(nan=math.inf).max().item() if exact.numel() else 0.0


def assert_as_accurate(name, result, exact, peer, factor):
    """The error of `result` is at most `factor` times that of `peer`, which PyTorch computed in the same dtype.

    And two units in the last place of the largest value on top, as the few values of a small case may come out exactly.
    """
    assert result.shape == exact.shape and result.dtype == peer.dtype, name
    size = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    room = factor * largest_error(peer, exact) + 2 * torch.finfo(result.dtype).eps * size
    error = largest_error(result, exact)
    assert error <= room, f"{name}: error {error:.3g}, expected at most {room:.3g}"


def assert_agree(function, dense, **tensors):
    """Our error against `dense` in fp64 is at most 4 (gradients: 6) times that of `dense` in the tensors' dtype."""
    ours = outputs_and_gradients(function, tensors)
    exact = outputs_and_gradients(dense, {name: x.double() for name, x in tensors.items()})
    peer = outputs_and_gradients(dense, tensors)
    for name in exact:
        assert_as_accurate(name, ours[name], exact[name], peer[name], 6 if name in tensors else 4)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 9), (9, 5), (7, 7)])
@choices
def test_flash_attn_func(options, seqlen_q, seqlen_k, dtype):
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


def turned(x, cos, sin, interleaved):
    """x (..., S, H, D) with pairs of channels as complex numbers times cos + i sin, (..., S, rotary_dim / 2)."""
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[..., None, :]
    pairs = torch.view_as_real(product)
    return torch.cat(((pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), x[..., rotary_dim:]), dim=-1)


CAPACITY, ENTRIES, PAGE = 11, 5, 4
CACHE_SEQLENS = torch.tensor([0, 7, 4], dtype=torch.int32)
CACHES = {
    "entries": {},
    "batch_idx": dict(cache_batch_idx=torch.tensor([4, 0, 3], dtype=torch.int32)),
    "leftpad": dict(cache_leftpad=torch.tensor([0, 3, 4], dtype=torch.int32)),
    "batch_idx and leftpad": dict(
        cache_batch_idx=torch.tensor([1, 4, 2], dtype=torch.int32),
        cache_leftpad=torch.tensor([0, 6, 1], dtype=torch.int32),
    ),
    "block_table": dict(block_table=torch.tensor([[4, 9, 1], [0, 8, 2], [7, 3, 6]], dtype=torch.int32)),
}
STEPS = {  # new queries, new keys, and how rotary pairs channels
    "full": (2, None, None),
    "one": (1, 1, None),
    "one, interleaved": (1, 1, True),
    "one, halves": (1, 1, False),
    "several, interleaved": (3, 3, True),
    "several, halves": (3, 3, False),
    "more queries than keys": (4, 2, True),
    "more keys than queries": (1, 3, False),
}
MASKS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(4, 1), softcap=3.0),
    "causal window, alibi": dict(causal=True, window_size=(5, -1), alibi_slopes=torch.linspace(0.5, 0.1, 4)),
    "alibi of entries": dict(alibi_slopes=torch.linspace(0.9, 0.1, 12).view(3, 4), softmax_scale=0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("seqlen_q, seqlen_new, interleaved", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flash_attn_with_kvcache(mask, seqlen_q, seqlen_new, interleaved, cache, dtype):
    shape = (10, PAGE) if "block_table" in cache else (ENTRIES, CAPACITY)
    k_cache, v_cache = torch.randn(2, *shape, 2, 12, dtype=dtype)
    q = torch.randn(3, seqlen_q, 4, 12, dtype=dtype)
    k, v = (None, None) if seqlen_new is None else torch.randn(2, 3, seqlen_new, 2, 12, dtype=dtype)
    arguments, tables = {}, None
    if interleaved is not None:
        angles = torch.rand(CAPACITY, 4) * 2 * math.pi
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tables = (cos.double(), sin.double())
        arguments = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)

    keys, values = k_cache.clone(), v_cache.clone()  # what the cache should hold afterwards
    written = torch.zeros(shape, dtype=torch.bool)
    exact, peer = [], []
    for b, length in enumerate(CACHE_SEQLENS.tolist()):
        place = torch.arange(CAPACITY)
        if "block_table" in cache:
            where = cache["block_table"][b, place // PAGE].long(), place % PAGE
        else:
            where = torch.full_like(place, cache["cache_batch_idx"][b] if "cache_batch_idx" in cache else b), place
        queries, total = q[b].double(), length + (seqlen_new or 0)
        if seqlen_new is not None:
            new = where[0][length:total], where[1][length:total]
            new_keys = k[b].double()
            if tables is not None:
                in_a_row = mask.get("causal", False) or mask.get("window_size", (-1, -1)) != (-1, -1)
                of_q = length + (torch.arange(seqlen_q) if in_a_row else torch.zeros(seqlen_q, dtype=torch.long))
                of_k = length + torch.arange(seqlen_new)
                queries = turned(queries, *(table[of_q] for table in tables), interleaved)
                new_keys = turned(new_keys, *(table[of_k] for table in tables), interleaved)
            keys[new], values[new], written[new] = new_keys.to(dtype), v[b], True
        first = cache["cache_leftpad"][b] if "cache_leftpad" in cache else 0
        seen = where[0][first:total], where[1][first:total]
        own = dict(mask)
        if "alibi_slopes" in mask and mask["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = mask["alibi_slopes"][b]
        exact.append(dense_attention(queries[None], keys[seen][None].double(), values[seen][None].double(), **own))
        peer.append(dense_attention(queries[None].to(dtype), keys[seen][None], values[seen][None], **own))

    results = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=CACHE_SEQLENS, return_softmax_lse=True, **arguments, **cache, **mask
    )
    for i, name in enumerate(("out", "lse")):
        assert_as_accurate(name, results[i], torch.cat([x[i] for x in exact]), torch.cat([x[i] for x in peer]), 4)
    assert torch.equal(v_cache, values)
    assert torch.equal(k_cache[~written], keys[~written])
    ulp = torch.finfo(dtype).eps  # a turned key may be rounded to the other side
    torch.testing.assert_close(k_cache[written], keys[written], rtol=ulp, atol=ulp)


def test_kvcache_lengths():
    """An int for all; None for a cache that is full; and the default is no lse."""
    q, k_cache, v_cache = torch.randn(2, 3, 4, 8), *torch.randn(2, 2, 9, 2, 8)
    new = torch.randn(2, 2, 3, 2, 8)
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    expected = flash_attn_with_kvcache(q, *caches[0], *new, cache_seqlens=lengths, causal=True)
    assert torch.equal(flash_attn_with_kvcache(q, *caches[1], *new, cache_seqlens=5, causal=True), expected)
    assert torch.equal(torch.stack(caches[0]), torch.stack(caches[1]))
    assert torch.equal(caches[0][0][:, 5:8], new[0])
    full, _ = dense_attention(q, k_cache, v_cache, causal=True)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k_cache, v_cache, causal=True), full, rtol=1e-5, atol=1e-6)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, block_table=table, causal=True)
    torch.testing.assert_close(out, full, rtol=1e-5, atol=1e-6)


def test_kvcache_in_one_tensor_with_padding():
    """Entries of keys and values that alternate in memory: strides, but no copies."""
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 6, 2, 2, 8)
    before, new = cache.clone(), torch.randn(2, 2, 1, 2, 8)
    leftpad = torch.tensor([2, 0], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, cache[:, :, 0], cache[:, :, 1], *new, cache_seqlens=4, cache_leftpad=leftpad)
    before[:, 4] = torch.stack((new[0][:, 0], new[1][:, 0]), dim=1)
    assert torch.equal(cache, before)
    for b, first in enumerate(leftpad.tolist()):
        keys, values = before[b : b + 1, first:5].unbind(2)
        expected, _ = dense_attention(q[b : b + 1], keys, values)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_kvcache_splits(num_splits):
    q, caches = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 300, 2, 8)
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=290, num_splits=num_splits)
    expected, _ = dense_attention(q, *(x[:, :290] for x in caches))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_kvcache_keeps_no_graph():
    q, cache = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 5, 2, 4)
    out, lse = flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=2, return_softmax_lse=True)
    assert not (out.requires_grad or lse.requires_grad or cache.requires_grad)


def rotary_tables_and_offsets(offsets, dtype, batch, longest):
    """Random angles for the 9 positions past `longest`, and the offset of each sequence."""
    angles = torch.rand(longest + 9, 3) * 2 * math.pi
    each = {"none": torch.zeros(batch, dtype=torch.int64), "int": torch.full((batch,), 9)}
    each = each.get(offsets, torch.randint(0, 10, (batch,)))
    seqlen_offsets = {"none": 0, "int": 9, "int32": each.int(), "int64": each}[offsets]
    return angles.cos().to(dtype), angles.sin().to(dtype), seqlen_offsets, each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [6, 11])
@pytest.mark.parametrize("offsets", ["none", "int", "int32", "int64"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary_emb(inplace, interleaved, offsets, head_dim, dtype):
    cos, sin, seqlen_offsets, each = rotary_tables_and_offsets(offsets, dtype, 3, 5)
    x = torch.randn(3, 5, 2, head_dim, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    before = x.detach().clone()
    positions = each[:, None] + torch.arange(5)
    expected = turned(exact, cos.double()[positions], sin.double()[positions], interleaved)

    out = apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=inplace, seqlen_offsets=seqlen_offsets)
    assert_rotated(out, expected, x, exact)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x.detach(), out.detach() if inplace else before)


def assert_rotated(out, expected, x, exact):
    """Values and gradients rounded once; fp32 four times, for two products, their sum and the tables."""
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, weights)
    (exact_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    for result, reference in ((out, expected), (gradient, exact_gradient)):
        assert result.dtype == x.dtype
        allowed = torch.finfo(x.dtype).eps * reference.abs().clamp(min=0.1) + 2**-21
        assert ((result.double() - reference).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_seqlen", [None, 6, 7])
@pytest.mark.parametrize("offsets", ["none", "int", "int32"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary_emb_of_packed_sequences(inplace, interleaved, offsets, max_seqlen, dtype):
    lengths = [4, 0, 6, 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cos, sin, seqlen_offsets, each = rotary_tables_and_offsets(offsets, dtype, 4, 6)
    x = torch.randn(11, 2, 8, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    before = x.detach().clone()
    positions = torch.cat([torch.arange(length) + offset for length, offset in zip(lengths, each, strict=True)])
    expected = turned(exact, cos.double()[positions], sin.double()[positions], interleaved)

    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    assert_rotated(out, expected, x, exact)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x.detach(), out.detach() if inplace else before)


def test_apply_rotary_emb_in_place_of_a_part():
    """Queries in a packed tensor that is not a leaf: the rest stays, and all gradients arrive."""
    angles = torch.rand(5, 4)
    packed = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    qkv = packed * 1
    before = qkv.detach().clone()
    q = apply_rotary_emb(qkv[:, :, 0], angles.cos(), angles.sin(), inplace=True)
    out = flash_attn_func(q, qkv[:, :, 1], qkv[:, :, 2])
    assert torch.equal(qkv[:, :, 1:], before[:, :, 1:])
    exact = packed.detach().double().requires_grad_()
    queries = turned(exact[:, :, 0], angles.double().cos(), angles.double().sin(), False)
    torch.testing.assert_close(qkv[:, :, 0].double(), queries, rtol=1e-5, atol=1e-6)
    expected, _ = dense_attention(queries, exact[:, :, 1], exact[:, :, 2])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(out)
    out.backward(weights)
    expected.backward(weights.double())
    torch.testing.assert_close(packed.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_apply_rotary_emb_gives_tables_no_gradient():
    x, angles = torch.randn(1, 3, 1, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    apply_rotary_emb(x, angles.cos(), angles.sin()).sum().backward()
    assert angles.grad is None and x.grad is not None


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


Q, KV, QKV = torch.ones(2, 7, 4, 8), torch.ones(2, 7, 2, 2, 8), torch.ones(2, 7, 3, 4, 8)
CU = torch.tensor([0, 7, 14], dtype=torch.int32)
PACKED_Q, PACKED_KV, PACKED_QKV = (x.flatten(0, 1) for x in (Q, KV, QKV))
NOT_SERVED = {
    "flash_attn_func": (Q, Q, Q),
    "flash_attn_qkvpacked_func": (QKV,),
    "flash_attn_kvpacked_func": (Q, KV),
    "flash_attn_varlen_func": (PACKED_Q, PACKED_Q, PACKED_Q, CU, CU, 7, 7),
    "flash_attn_varlen_qkvpacked_func": (PACKED_QKV, CU, 7),
    "flash_attn_varlen_kvpacked_func": (PACKED_Q, PACKED_KV, CU, CU, 7, 7),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_weights_of_dropout_are_not_served(name):
    with pytest.raises(NotImplementedError, match="return_attn_probs: not served with dropout_p > 0"):
        getattr(flash_attn, name)(*NOT_SERVED[name], dropout_p=0.1, return_attn_probs=True)


INDEX = torch.tensor([0, 1], dtype=torch.int32)
CACHE = torch.ones(2, 7, 2, 8)
NEW = torch.ones(2, 3, 2, 8)
TABLE = torch.ones(7, 4)


@pytest.mark.parametrize(
    "cache, arguments, message",
    [
        (CACHE, dict(block_table=INDEX[:, None], cache_batch_idx=INDEX), "cache_batch_idx: .*block_table"),
        (CACHE, dict(block_table=INDEX[:, None], cache_leftpad=INDEX), "cache_leftpad: .*block_table"),
        (torch.ones(2, 9, 2, 8)[:, :7], dict(cache_leftpad=INDEX), "cache_leftpad: .*k_cache.*strides \\(144"),
    ],
    ids=["batch_idx", "leftpad", "leftpad of a part"],
)
def test_kvcache_not_served(cache, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        flash_attn_with_kvcache(Q, cache, cache, **arguments)


# A change to the call with k, v and 4 keys in each entry, the error, and what its message says in order.
REFUSED_KVCACHE = {
    "no lengths": (dict(cache_seqlens=None), ValueError, "cache_seqlens: expected .*k, got None"),
    "lengths' shape": (dict(cache_seqlens=INDEX[:1]), ValueError, "cache_seqlens: .*\\(2,\\), got \\(1,\\)"),
    "lengths' dtype": (dict(cache_seqlens=torch.ones(2)), TypeError, "cache_seqlens: .*int32, got torch.float32"),
    "full cache": (dict(cache_seqlens=5), ValueError, "expected values of 0 to 4, got 5 to 5"),
    "full cache with padding": (
        dict(cache_seqlens=5, cache_leftpad=INDEX),
        ValueError,
        "cache_seqlens: expected values of 0 to 4, got 5 to 5",
    ),
    "cos alone": (dict(rotary_cos=TABLE), ValueError, "rotary_cos: expected rotary_sin"),
    "sin alone": (dict(rotary_sin=TABLE), ValueError, "rotary_cos: expected rotary_sin"),
    "rotary without keys": (
        dict(k=None, v=None, rotary_cos=TABLE, rotary_sin=TABLE),
        ValueError,
        "rotary_cos: expected new keys .*k=None",
    ),
    "short tables": (
        dict(rotary_cos=TABLE[:6], rotary_sin=TABLE[:6], causal=True),
        ValueError,
        "rotary: expected tables .*got 6 positions, needed 7",
    ),
    "short tables for keys": (
        dict(rotary_cos=TABLE[:6], rotary_sin=TABLE[:6]),
        ValueError,
        "rotary tables: expected positions within .*got 4 to 6 in tables of 6",
    ),
    "keys alone": (dict(v=None), ValueError, "v: expected new rows"),
    "index' range": (dict(cache_batch_idx=INDEX + 1), ValueError, "cache_batch_idx: .*0 to 1, got 1 to 2"),
    "index' shape": (dict(cache_batch_idx=INDEX[:1]), ValueError, "cache_batch_idx: .*\\(2,\\), got \\(1,\\)"),
    "padding's range": (
        dict(cache_leftpad=INDEX + 4),
        ValueError,
        "cache_leftpad: .*0 to cache_seqlens, got \\[4, 5\\] and .*\\[4, 4\\]",
    ),
    "negative padding": (dict(cache_leftpad=-INDEX), ValueError, "cache_leftpad: .*got \\[0, -1\\]"),
    "padding's shape": (dict(cache_leftpad=INDEX[:1]), ValueError, "cache_leftpad: .*\\(2,\\), got \\(1,\\)"),
    "padding and index": (
        dict(cache_leftpad=INDEX, cache_batch_idx=-INDEX),
        ValueError,
        "cache_batch_idx: .*0 to 1, got -1 to 0",
    ),
    "splits": (dict(num_splits=-1), ValueError, "num_splits: .*got -1"),
}


@pytest.mark.parametrize("change, error, message", REFUSED_KVCACHE.values(), ids=REFUSED_KVCACHE)
def test_kvcache_refused(change, error, message):
    """Before a byte of the cache is written."""
    caches = CACHE.clone(), CACHE.clone()
    arguments = dict(q=Q[:, :3], k_cache=caches[0], v_cache=caches[1], k=2 * NEW, v=2 * NEW, cache_seqlens=4) | change
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(caches[0], CACHE) and torch.equal(caches[1], CACHE)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (flash_attn_qkvpacked_func, (KV,), "qkv: expected shape .*3, .*got \\(2, 7, 2, 2, 8\\)"),
        (flash_attn_qkvpacked_func, (PACKED_QKV,), "qkv: expected shape .*got \\(14, 3, 4, 8\\)"),
        (flash_attn_kvpacked_func, (Q, QKV), "kv: expected shape .*2, .*got \\(2, 7, 3, 4, 8\\)"),
        (flash_attn_varlen_qkvpacked_func, (QKV, CU, 7), "qkv: expected shape .*got \\(2, 7, 3, 4, 8\\)"),
        (flash_attn_varlen_kvpacked_func, (PACKED_Q, PACKED_QKV, CU, CU, 7, 7), "kv: .*got \\(14, 3, 4, 8\\)"),
        (flash_attn_varlen_kvpacked_func, (PACKED_Q, PACKED_KV, CU, CU, 7, 6), "max_seqlen_k: .*got 6 and .* 7"),
    ],
)
def test_packed_tensors_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


PAGES = torch.ones(3, 4, 4, 8)


@pytest.mark.parametrize(
    "k, v, block_table, message",
    [
        (PACKED_Q, PAGES, [[0, 1], [1, 2]], "k: expected shape \\(pages, .*got \\(14, 4, 8\\)"),
        (PAGES, PAGES[:2], [[0, 1], [1, 2]], "v: expected k's pages .*\\(3, 4\\), got \\(2, 4\\)"),
        (PAGES, PAGES, [0, 1], "block_table: expected shape \\(2, pages\\), got \\(2,\\)"),
        (PAGES, PAGES, [[0, 1]], "block_table: expected shape \\(2, 2\\), got \\(1, 2\\)"),
        (PAGES, PAGES, [[0], [1]], "block_table: expected pages for .*got 1 pages of 4 for 7 keys"),
        (PAGES, PAGES, [[0, 1], [3, 2]], "block_table: expected values of 0 to 2, got 0 to 3"),
        (PAGES, PAGES, [[0, 1], [1, -1]], "block_table: expected values of 0 to 2, got -1 to 1"),
    ],
)
def test_block_table_refused(k, v, block_table, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(PACKED_Q, k, v, CU, CU, 7, 7, block_table=torch.tensor(block_table, dtype=torch.int32))


@pytest.mark.parametrize(
    "x, arguments, error, message",
    [
        (PACKED_Q, {}, ValueError, "x: expected 4 dimensions .*got \\(14, 4, 8\\)"),
        (Q, dict(cu_seqlens=CU), ValueError, "x: expected 3 dimensions .*got \\(2, 7, 4, 8\\)"),
        (Q, dict(cos=torch.ones(7, 5)), ValueError, "rotary: .*rotary_dim <= head_dim 8, got \\(7, 5\\)"),
        (Q, dict(sin=TABLE[:6]), ValueError, "rotary sin: .*\\(7, 4\\), got \\(6, 4\\)"),
        (Q, dict(seqlen_offsets=1), ValueError, "seqlen_offsets: .*0 to 6, got 1 to 7"),
        (Q, dict(seqlen_offsets=-1), ValueError, "seqlen_offsets: .*got -1 to 5"),
        (Q, dict(seqlen_offsets=INDEX), ValueError, "positions within cos and sin, got 0 to 7 in tables of 7"),
        (Q, dict(seqlen_offsets=-INDEX), ValueError, "positions within cos and sin, got -1 to 6"),
        (Q, dict(seqlen_offsets=INDEX[:1]), ValueError, "seqlen_offsets: .*\\(2,\\), got \\(1,\\)"),
        (Q, dict(seqlen_offsets=INDEX.float()), TypeError, "seqlen_offsets: .*int32, got torch.float32"),
        (PACKED_Q, dict(cu_seqlens=CU, seqlen_offsets=1), ValueError, "positions within .*got 1 to 7"),
        (PACKED_Q, dict(cu_seqlens=CU, max_seqlen=6), ValueError, "max_seqlen.*got 6 and a sequence of 7"),
        (PACKED_Q, dict(cu_seqlens=CU[:2]), ValueError, "cu_seqlens.*the total, 14, got 0 and 7"),
    ],
)
def test_apply_rotary_emb_refused(x, arguments, error, message):
    with pytest.raises(error, match=message):
        apply_rotary_emb(x, **dict(cos=TABLE, sin=TABLE) | arguments)
