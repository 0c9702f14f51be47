"""The values of attention and its gradients on a CPU, at every instruction set, against eager PyTorch in fp64."""

import pytest
import torch
from cases.attention import (
    Case,
    assert_accurate,
    eager_attention,
    errors,
    evaluate,
    fused_attention,
    make_inputs,
)
from cases.pairs import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def one_thread():
    """For such small shapes more threads only cost; test_attention_contract.py shows that they change no bit."""
    torch.set_num_threads(1)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FEATURES = [
    Case(),
    Case(causal=True),
    Case(causal=True, seqlen_q=33, seqlen_k=70),
    Case(causal=True, seqlen_q=70, seqlen_k=33),  # the first 37 queries see nothing
    Case(window=(7, 3)),
    Case(window=(None, 5), seqlen_q=40, seqlen_k=150),
    Case(window=(5, None), seqlen_q=150, seqlen_k=40),
    Case(window=(0, 0)),
    Case(window=(20, None), causal=True, seqlen_q=140, seqlen_k=300),
    Case(heads=6, kv_heads=2, causal=True),
    Case(heads=5, kv_heads=1),
    Case(batch=3, key_lengths=(0, 17, 33)),
    Case(batch=3, key_lengths=(1, 0, 64), seqlen_k=64, causal=True, window=(40, None)),
    Case(softcap=2.0, magnitude=3.0),
    Case(softmax_scale=0.7),
    Case(softmax_scale=-0.2, causal=True),
    Case(magnitude=30.0),  # nearly one key a query
    Case(alibi="heads"),
    Case(alibi="batch", causal=True, seqlen_q=33, seqlen_k=130),
    Case(alibi="heads", seqlen_q=130, seqlen_k=33),
    Case(relative=(32, 128), seqlen_q=150, seqlen_k=140),
    Case(relative=(32, 128), causal=True, seqlen_k=150),
    Case(relative=(8, 20), relative_bidirectional=True, causal=True),
    Case(relative=(8, 20), relative_bidirectional=False),
    Case(relative=(32, 60), alibi="batch", seqlen_q=70),
    Case(rotary_dim=16, causal=True),
    Case(rotary_dim=16, rotary_interleaved=True),
    Case(rotary_dim=6, seqlen_q=20),
    Case(rotary_dim=10, rotary_interleaved=True, rotary_offset=11, causal=True),
    Case(rotary_dim=16, rotary_offset=40, seqlen_q=70),  # queries before the first key, at positions 3 and up
    Case(rotary_dim=8, rotary_offset="ids", seqlen_q=20),
    Case(rotary_dim=16, rotary_offset="ids", rotary_interleaved=True, causal=True, heads=4, kv_heads=2),
    Case(sinks=True, causal=True, seqlen_q=70, seqlen_k=33),  # where nothing else is seen, the lse is the sink
    Case(sinks=True, heads=6, kv_heads=2, window=(7, 3), softcap=3.0),
    Case(dropout_p=0.1, seqlen_k=150),
    Case(dropout_p=0.5, causal=True, heads=4, kv_heads=2, seqlen_q=70, seqlen_k=75),
    Case(head_dim_v=40),
    Case(head_dim=40, head_dim_v=7, causal=True, heads=4, kv_heads=2),
]
COMBINED = [
    Case(3, 65, 130, 6, 3, 40, causal=True, window=(50, None), key_lengths=(130, 0, 77), alibi="batch", rotary_dim=20),
    Case(2, 130, 65, 4, 1, 24, window=(30, 20), softcap=5.0, relative=(16, 40), key_lengths=(60, 65)),
    Case(
        2, 64, 64, 4, 2, 64, causal=True, softmax_scale=0.2, softcap=3.0, key_lengths=(64, 31), alibi="heads",
        relative=(32, 100), rotary_dim=64, rotary_offset="ids",
    ),
    Case(1, 129, 257, 8, 2, 80, causal=True, rotary_dim=40, rotary_interleaved=True, rotary_offset=7, magnitude=4.0),
    Case(
        2, 130, 65, 4, 2, 24, 33, window=(30, 20), softcap=5.0, relative=(16, 40), alibi="batch", key_lengths=(60, 65),
        sinks=True, dropout_p=0.2,
    ),
]  # fmt: skip
HEAD_DIMS = [1, 3, 8, 17, 40, 64, 80, 128, 160, 256]
LENGTHS = [1, 2, 31, 33, 127, 129, 300, 513]


def short(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", FEATURES + COMBINED, ids=str)
def test_features(case, dtype, isa):
    assert_accurate(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, isa):
    assert_accurate(Case(seqlen_q=70, seqlen_k=75, head_dim=head_dim, kv_heads=2, causal=True), dtype)


@every_pair(seqlen_q=LENGTHS, seqlen_k=LENGTHS, dtype=[torch.float32, torch.bfloat16])
def test_lengths(seqlen_q, seqlen_k, dtype):
    assert_accurate(Case(1, seqlen_q, seqlen_k, 2, 1, 16, causal=True, alibi="heads"), dtype)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_at_every_isa(length, dtype, isa):
    assert_accurate(Case(1, length, length, 2, 2, 8, window=(60, 2)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_long(dtype):
    assert_accurate(Case(1, 2048, 2048, 2, 1, 64, causal=True), dtype)


@pytest.mark.every_isa
@pytest.mark.parametrize("scale", [0.0, 0.001])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nearly_equal_weights(dtype, scale, isa):
    """Here the products' rounding hardly matters, and what is left of lse's error is the exponential's own.

    In bf16 that may be 1e-4 of each weight, far below what rounding the weights costs, but all to one side.
    """
    case = Case(softmax_scale=scale)
    tensors, options = make_inputs(case, dtype)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(eager_attention, exact, options)
    results = evaluate(fused_attention, tensors, options)
    allowed = 1e-4 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(results["lse"].double(), expected["lse"], rtol=0, atol=allowed)
    for name in ("out", "gradient of q", "gradient of k", "gradient of v"):
        size = expected[name].abs().max().item()
        unit = torch.finfo(dtype).eps * size
        assert errors(results[name], expected[name])[0] <= 2 * unit + 1e-7, name


@pytest.mark.parametrize("case", FEATURES + COMBINED, ids=str)
def test_oracle(case):
    """The reference, in fp64, is the eager oracle to within fp64's rounding, gradients included."""
    tensors, options = make_inputs(case, torch.float64)
    expected = evaluate(eager_attention, tensors, options)
    for name, value in evaluate(fused_attention, tensors, options).items():
        scale = max(1.0, expected[name].nan_to_num(neginf=0.0).abs().max().item())
        assert errors(value, expected[name])[0] <= 1e-12 * scale, name


def test_t5_bias_of_transformers():
    """The same bias as T5's own attention layer computes from the same table."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    for is_decoder in (False, True):
        config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=is_decoder)
        layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
        torch.nn.init.normal_(layer.relative_attention_bias.weight)
        q, k, v = torch.randn(3, 2, 200, 4, 8, dtype=torch.float64).float()
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2).double() for x in (q, k, v)),
            attn_mask=layer.compute_bias(200, 200).double(),
            scale=1.0,
        ).transpose(1, 2)
        out, _ = fused_attention(
            q, k, v, softmax_scale=1.0, relative_bias=layer.relative_attention_bias.weight.detach(),
            relative_max_distance=config.relative_attention_max_distance, relative_bidirectional=not is_decoder,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
