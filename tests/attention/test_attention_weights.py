"""The weights of chosen queries against eager attention in fp64, and against what attention does with them."""

import math

import pytest
import torch
from cases.attention import Case, eager_attention, errors, make_inputs

from pynlp import backends
from pynlp.functional import attention, attention_weights, rotary_tables

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = [
    Case(),
    Case(seqlen_q=1, seqlen_k=300),
    Case(causal=True, heads=6, kv_heads=2, seqlen_k=70),
    Case(causal=True, seqlen_q=70, seqlen_k=33),  # the first queries see nothing
    Case(window=(7, 3), softcap=2.0, seqlen_k=150),
    Case(key_lengths=(0, 17), head_dim=33),
    Case(alibi="batch", causal=True, seqlen_k=130),
    Case(relative=(8, 20), softmax_scale=-0.3),
    Case(rotary_dim=10, rotary_interleaved=True, rotary_offset="ids"),
    Case(rotary_dim=16, rotary_offset=11, sinks=True, causal=True, head_dim=80),
    Case(
        2, 65, 130, 4, 2, 24, causal=True, window=(50, None), softcap=5.0, key_lengths=(130, 90), alibi="heads",
        relative=(16, 40), rotary_dim=8, sinks=True,
    ),
]  # fmt: skip


def test_native_kernel_is_loaded():
    assert backends.native_missing_reason() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("pynlp::attention_weights", "CPU")


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights(case, dtype, isa):
    """All rows and some, with and without the lse that attention gave. Unit vectors as values give the weights."""
    tensors, options = make_inputs(case, dtype)
    wide = {name: x.double() for name, x in tensors.items()}
    unit = torch.eye(case.seqlen_k, dtype=torch.float64)[None, :, None].expand(case.batch, -1, case.kv_heads, -1)
    expected = eager_attention(**wide | {"v": unit}, **options)[0].transpose(1, 2)  # (B, H, Sq, Sk)
    _, lse = attention(**tensors, **options, return_lse=True)
    del tensors["v"]
    # What scores cost that are computed in fp32 from the very inputs: 1e-6 of their size, relative to a weight.
    allowed = 1e-12 if dtype == torch.float64 else 3e-5
    given = allowed if dtype != torch.bfloat16 else 2e-2  # that lse comes of products in bf16, turned and rounded
    rows = torch.tensor([case.seqlen_q - 1, 0, case.seqlen_q // 2, 0])
    for chosen in (None, rows):
        exact = expected if chosen is None else expected[:, :, chosen]
        for known, limit in ((None, allowed), (lse, given)):
            weights = attention_weights(**tensors, rows=chosen, lse=known, **options)
            assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert weights.shape == exact.shape
            assert errors(weights, exact)[0] <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_add_up(dtype):
    """To 1, to 0 where nothing is seen, and with a sink to what it leaves."""
    q, k = torch.randn(2, 40, 4, 16).to(dtype), torch.randn(2, 20, 2, 16).to(dtype)
    sums = attention_weights(q, k, causal=True).sum(-1)
    assert (sums[:, :, :20] == 0).all() and torch.allclose(sums[:, :, 20:], torch.ones(()), atol=1e-5)
    sinks = torch.randn(4)
    _, lse = attention(q, k, k, causal=True, sinks=sinks, return_lse=True)
    left = 1 - torch.exp(sinks[:, None] - lse)
    torch.testing.assert_close(attention_weights(q, k, causal=True, sinks=sinks).sum(-1), left, rtol=0, atol=5e-3)


def test_the_weighted_sum_of_the_values_is_attention():
    q, k, v = (torch.randn(2, 50, heads, 24) for heads in (6, 2, 2))
    options = dict(causal=True, window=(20, None), rotary=rotary_tables(64, 24))
    weights = attention_weights(q, k, **options)
    values = v.repeat_interleave(3, dim=2)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, values), attention(q, k, v, **options))


def test_hidden_keys_are_not_read(isa):
    q, k = torch.randn(1, 30, 2, 16), torch.randn(1, 90, 2, 16)
    clean = attention_weights(q, k, key_lengths=torch.tensor([40]))
    k[:, 40:] = math.nan
    assert torch.equal(attention_weights(q, k, key_lengths=torch.tensor([40])), clean)


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_there(shape, isa):
    batch, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, seqlen_q, 4, 8), torch.randn(batch, seqlen_k, 2, 8)
    assert attention_weights(q, k).shape == (batch, 4, seqlen_q, seqlen_k)


def test_no_gradients():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert not attention_weights(q, q).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k = torch.randn(2, 5, 4, 8, dtype=dtype), torch.randn(2, 7, 2, 8, dtype=dtype)
    nothing = (None,) * 10
    arguments = (q, k, torch.tensor([3, 1], dtype=torch.int32), None, 0.3, -1, 0, 1.0, *nothing, 0, False, 0.0, None)
    assert set(torch.library.opcheck(torch.ops.pynlp.attention_weights.default, arguments).values()) == {"SUCCESS"}


REFUSED = {
    "rows' dtype": (dict(rows=torch.tensor([1.0])), TypeError, "rows: expected dtype int32, got torch.float32"),
    "rows' rank": (dict(rows=torch.tensor([[1]])), ValueError, "rows: expected shape \\(1,\\), got \\(1, 1\\)"),
    "a row too many": (dict(rows=torch.tensor([5])), ValueError, "rows: expected values of 0 to 4, got 5 to 5"),
    "lse's shape": (dict(lse=torch.zeros(2, 4, 7)), ValueError, "lse: expected shape \\(2, 4, 5\\), got \\(2, 4, 7\\)"),
    "k's heads": (dict(k=torch.zeros(2, 7, 3, 8)), ValueError, "k: expected a number of heads that divides q's 4"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_bad_arguments(refused):
    change, error, message = REFUSED[refused]
    good = dict(q=torch.zeros(2, 5, 4, 8), k=torch.zeros(2, 7, 2, 8))
    attention_weights(**good)
    with pytest.raises(error, match=message):
        attention_weights(**good | change)
