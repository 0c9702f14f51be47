"""What a newcomer writes by habit of other libraries, and the message that says what to write instead."""

import pytest
import torch
from torch import nn

import pynlp.nn
from pynlp import functional as F
from pynlp.decoding import beam_search, greedy, sample
from pynlp.models import Decoder, EncoderDecoder, TransformerConfig

Q = torch.randn(2, 5, 4, 8)
CU_SEQLENS = torch.tensor([0, 5, 10], dtype=torch.int32)
COS, SIN = F.rotary_tables(16, 8)
MASK = torch.ones(5, 5, dtype=torch.bool)
X = torch.randn(2, 5, 8)
CONFIG = TransformerConfig(vocab_size=11, embed_dim=8, heads=2, layers=1)


def attention(*more, **options):
    return lambda: F.attention(Q, Q, Q, *more, **options)


def layer(*more, **options):
    return lambda: pynlp.nn.MultiHeadAttention(8, 2)(X, *more, **options)


def decoder():
    return Decoder(CONFIG).eval()


PREFIX = torch.zeros(2, 1, dtype=torch.int64)

CALLS = {
    "list for q": (lambda: F.attention(Q.tolist(), Q, Q), TypeError, "q: expected a tensor, got list"),
    "array for k": (lambda: F.attention(Q, Q.numpy(), Q), TypeError, "k: expected a tensor, got ndarray"),
    "list of lengths": (attention(key_lengths=[5, 3]), TypeError, "key_lengths: expected a tensor, got list"),
    "list of slopes": (attention(alibi_slopes=[1.0] * 4), TypeError, "alibi_slopes: expected a tensor, got list"),
    "table of floats": (attention(relative_bias=0.5), TypeError, "relative_bias: expected a tensor, got float"),
    "list of starts": (
        lambda: F.attention_varlen(*[Q.flatten(0, 1)] * 3, [0, 5, 10], CU_SEQLENS),
        TypeError,
        "cu_seqlens_q: expected a tensor, got list",
    ),
    "list for a norm's weight": (lambda: F.rms_norm(X, [1.0] * 8), TypeError, "weight: expected a tensor, got list"),
    "one number as window": (attention(window=4), TypeError, r"window: expected \(left, right\), .* got 4"),
    "fractions of keys": (attention(window=(1.5, 0)), TypeError, "window: expected left to be an int or None, got 1.5"),
    "no softcap": (attention(softcap=None), TypeError, "softcap: expected a number, got None"),
    "cosines alone": (attention(rotary=COS), TypeError, r"rotary: expected \(cos, sin\), two tensors, got Tensor"),
    "offset as a float": (
        attention(rotary=(COS, SIN), rotary_offset=1.0),
        TypeError,
        "rotary_offset: expected an int or a tensor of position ids, got 1.0",
    ),
    "a mask": (attention(attn_mask=MASK), TypeError, "attn_mask: attention has no such argument; .* key_lengths"),
    "a mask by position": (attention(MASK), TypeError, "attention: expected no argument by position but q, k, v; .*"),
    "is_causal": (attention(is_causal=True), TypeError, "is_causal: attention has no such argument; write causal"),
    "scale": (attention(scale=1.0), TypeError, "scale: attention has no such argument; write softmax_scale"),
    "flash-attn's window": (attention(window_size=(3, 0)), TypeError, r"window_size: .* write window=\(left, right\)"),
    "query, key, value": (layer(X, X), TypeError, "MultiHeadAttention: expected .* but x, memory; keys and values"),
    "padding mask": (layer(key_padding_mask=MASK), TypeError, "key_padding_mask: MultiHeadAttention .* key_lengths"),
    "list for x": (
        lambda: pynlp.nn.MultiHeadAttention(8, 2)(X.tolist()),
        TypeError,
        "x: expected a tensor, got list",
    ),
    "the cache itself": (
        layer(cache=pynlp.nn.KVCache(2, 8, layers=1, kv_heads=2, head_dim=4)),
        TypeError,
        "cache: expected this layer's part of what `append` .* got KVCache",
    ),
    "another module": (
        lambda: pynlp.nn.MultiHeadAttention.from_torch(nn.Linear(8, 8)),
        TypeError,
        "module: expected a torch.nn.MultiheadAttention, got Linear",
    ),
    "the model as a state": (
        lambda: greedy(decoder(), PREFIX, end=0, max_length=4),
        TypeError,
        r"state: expected a DecodingState, .* decoding_state\(..\), got Decoder",
    ),
    "the model for beams": (
        lambda: beam_search(decoder(), PREFIX, end=0, max_length=4, beam_size=2),
        TypeError,
        "state: expected a DecodingState, .* got Decoder",
    ),
    "the model to sample": (
        lambda: sample(decoder(), PREFIX, end=0, max_length=4, seed=0),
        TypeError,
        "state: expected a DecodingState, .* got Decoder",
    ),
    "a state of other rows": (
        lambda: greedy(decoder().decoding_state(3, 8), PREFIX, end=0, max_length=4),
        ValueError,
        "tokens: expected 3 rows, which the state has, got 2",
    ),
    "a state of one source": (
        lambda: EncoderDecoder(CONFIG).eval().decoding_state(torch.zeros(5, dtype=torch.int64), None, 8),
        ValueError,
        r"source: expected shape \(batch, seqlen\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_message_names_the_argument(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_other_errors_stay_as_they_are():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        F.attention(Q, Q, Q, colour="red")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'v'"):
        F.attention(Q, Q)


def test_the_layout_of_others_is_read_in_place():
    """Transposed, as `attention` says to those who come from scaled_dot_product_attention."""
    theirs = torch.randn(2, 4, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(theirs, theirs, theirs, is_causal=True)
    ours = F.attention(*[theirs.transpose(1, 2)] * 3, causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
