"""flash-attn's functions for packed sequences with padding behind the last: zeros there, the same bits elsewhere."""

import pytest
import torch

from pynlp.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

LENGTHS_Q, LENGTHS_K = [5, 0, 9, 1], [7, 3, 0, 4]
CU_Q, CU_K = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (LENGTHS_Q, LENGTHS_K))
TOTAL_Q, TOTAL_K = 15, 14
OPTIONS = {
    "plain": {},
    "causal window": dict(causal=True, window_size=(3, -1)),
    "alibi of heads": dict(alibi_slopes=torch.tensor([0.5, 0.25])),
    "alibi of entries": dict(causal=True, alibi_slopes=torch.rand(4, 2)),
    "dropout": dict(dropout_p=0.3, softcap=2.0),
}


def outputs_and_gradients(function, tensors, **arguments):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    torch.manual_seed(4)
    out = function(*leaves, **arguments)
    (out * torch.arange(1, len(out) + 1)[:, None, None]).sum().backward()
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("padding", [(0, 6), (20, 0), (3, 30)], ids=["keys", "queries", "both"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_gives_zeros_and_changes_nothing_else(options, padding):
    """Also where it is longer than the longest sequence, and of NaN."""
    more_q, more_k = padding
    q, k, v = (torch.randn(total, heads, 8) for total, heads in ((TOTAL_Q, 2), (TOTAL_K, 1), (TOTAL_K, 1)))
    arguments = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=9, max_seqlen_k=7, **options)
    expected = outputs_and_gradients(flash_attn_varlen_func, (q, k, v), **arguments)
    padded = [
        torch.cat((x, torch.full((more, *x.shape[1:]), float("nan"))))
        for x, more in ((q, more_q), (k, more_k), (v, more_k))
    ]
    for function, tensors in (
        (flash_attn_varlen_func, padded),
        (flash_attn_varlen_kvpacked_func, (padded[0], torch.stack(padded[1:], 1))),
    ):
        results = outputs_and_gradients(function, tensors, **arguments)
        if len(results) == 3:
            results = (*results[:2], *results[2].unbind(1))
        for result, exact in zip(results, expected, strict=True):
            assert torch.equal(result[: len(exact)], exact) and result[len(exact) :].eq(0).all()


def test_padding_of_one_tensor():
    qkv = torch.randn(TOTAL_Q + 4, 3, 2, 8)
    arguments = dict(cu_seqlens=CU_Q, max_seqlen=9, causal=True)
    expected = outputs_and_gradients(flash_attn_varlen_qkvpacked_func, [qkv[:TOTAL_Q]], **arguments)
    results = outputs_and_gradients(flash_attn_varlen_qkvpacked_func, [qkv], **arguments)
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result[:TOTAL_Q], exact) and result[TOTAL_Q:].eq(0).all()


def test_padding_of_queries_over_pages():
    q, pages = torch.randn(TOTAL_Q + 5, 2, 8), torch.randn(2, 6, 4, 1, 8)
    table = torch.tensor([[5, 0], [1, 1], [2, 2], [3, 4]], dtype=torch.int32)
    arguments = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=9, max_seqlen_k=7, block_table=table)
    out = flash_attn_varlen_func(q, *pages, **arguments)
    assert torch.equal(out[:TOTAL_Q], flash_attn_varlen_func(q[:TOTAL_Q], *pages, **arguments))
    assert out[TOTAL_Q:].eq(0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(max_seqlen_q=8), "max_seqlen_q: expected at least the longest sequence, got 8 and a sequence of 9"),
        (dict(max_seqlen_k=6), "max_seqlen_k: expected at least the longest sequence, got 6 and a sequence of 7"),
        (dict(cu_seqlens_k=CU_K[:4]), "cu_seqlens_k: expected as many sequences as cu_seqlens_q has, 4, got 3"),
        (dict(cu_seqlens_q=CU_Q + 2), "cu_seqlens_q: expected the first to be 0 .* the total, 20, got 2 and 17"),
        (dict(alibi_slopes=torch.ones(6, 2)), r"alibi_slopes: expected shape \(2,\) or \(4, 2\), got \(6, 2\)"),
    ],
)
def test_padding_refuses_what_is_refused_without(change, message):
    q, k = torch.randn(TOTAL_Q + 5, 2, 8), torch.randn(TOTAL_K, 2, 8)
    arguments = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=9, max_seqlen_k=7)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, k, **arguments | change)


def test_padding_in_a_graph():
    """Where no length can be looked at, the two sequences are there for all calls."""
    torch._dynamo.reset()
    q, k = torch.randn(TOTAL_Q + 5, 2, 8), torch.randn(TOTAL_K + 3, 2, 8)

    def function(q, k, cu_q, cu_k):
        return flash_attn_varlen_func(q, k, k, cu_q, cu_k, 9, 7, causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows_q, rows_k in ((TOTAL_Q + 5, TOTAL_K + 3), (TOTAL_Q, TOTAL_K)):
        arguments = q[:rows_q], k[:rows_k], CU_Q, CU_K
        assert torch.equal(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [2, torch.tensor([0, 3, 1, 2], dtype=torch.int32)], ids=["int", "tensor"])
def test_rotary_leaves_padding_as_it_is(offsets, inplace):
    angles = torch.rand(12, 3)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(TOTAL_Q + 6, 2, 8)
    arguments = dict(cos=cos, sin=sin, seqlen_offsets=offsets, cu_seqlens=CU_Q, max_seqlen=9)
    expected, gradient = outputs_and_gradients(apply_rotary_emb, [x[:TOTAL_Q]], **arguments)
    out, padded_gradient = outputs_and_gradients(apply_rotary_emb, [x], **arguments)
    assert torch.equal(out, torch.cat((expected, x[TOTAL_Q:])))
    assert torch.equal(padded_gradient[:TOTAL_Q], gradient)
    changed = x.clone()
    assert torch.equal(apply_rotary_emb(changed, inplace=inplace, **arguments), out)
    assert torch.equal(changed, out if inplace else x)
