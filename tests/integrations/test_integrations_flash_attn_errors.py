"""What flash-attn's functions do not serve, and what they refuse, by message."""

import inspect
import re

import pytest
import torch

from pynlp.integrations import flash_attn
from pynlp.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

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
    "full cache": (dict(cache_seqlens=5), ValueError, "cache_seqlens: expected values of 0 to 4, got 5 to 5"),
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
        "rotary_cos: expected tables .*got 6 positions, needed 7",
    ),
    "short tables for keys": (
        dict(rotary_cos=TABLE[:6], rotary_sin=TABLE[:6]),
        ValueError,
        "rotary_cos: expected positions within .*got 4 to 6 in tables of 6",
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
        (Q, dict(cos=torch.ones(7, 5)), ValueError, "cos: .*rotary_dim <= head_dim 8, got \\(7, 5\\)"),
        (Q, dict(sin=TABLE[:6]), ValueError, "sin: .*\\(7, 4\\), got \\(6, 4\\)"),
        (Q, dict(seqlen_offsets=1), ValueError, "seqlen_offsets: .*0 to 6, got 1 to 7"),
        (Q, dict(seqlen_offsets=-1), ValueError, "seqlen_offsets: .*got -1 to 5"),
        (Q, dict(seqlen_offsets=INDEX), ValueError, "positions within cos and sin, got 0 to 7 in tables of 7"),
        (Q, dict(seqlen_offsets=-INDEX), ValueError, "positions within cos and sin, got -1 to 6"),
        (Q, dict(seqlen_offsets=INDEX[:1]), ValueError, "seqlen_offsets: .*\\(2,\\), got \\(1,\\)"),
        (Q, dict(seqlen_offsets=INDEX.float()), TypeError, "seqlen_offsets: .*int32, got torch.float32"),
        (PACKED_Q, dict(cu_seqlens=CU, seqlen_offsets=1), ValueError, "positions within .*got 1 to 7"),
        (PACKED_Q, dict(cu_seqlens=CU, max_seqlen=6), ValueError, "max_seqlen.*got 6 and a sequence of 7"),
        (PACKED_Q, dict(cu_seqlens=CU + 1), ValueError, "cu_seqlens: .*at most the total, 14, got 1 and 15"),
    ],
)
def test_apply_rotary_emb_refused(x, arguments, error, message):
    with pytest.raises(error, match=message):
        apply_rotary_emb(x, **dict(cos=TABLE, sin=TABLE) | arguments)


LENGTHS = dict(cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=7, max_seqlen_k=7)
VALID = {  # calls with tensors for all that takes some
    "flash_attn_func": dict(q=Q, k=Q, v=Q, alibi_slopes=TABLE[0]),
    "flash_attn_qkvpacked_func": dict(qkv=QKV, alibi_slopes=TABLE[0]),
    "flash_attn_kvpacked_func": dict(q=Q, kv=KV, alibi_slopes=TABLE[0]),
    "flash_attn_varlen_func": dict(q=PACKED_Q, k=PACKED_Q, v=PACKED_Q, alibi_slopes=TABLE[:2], **LENGTHS),
    "flash_attn_varlen_qkvpacked_func": dict(qkv=PACKED_QKV, cu_seqlens=CU, max_seqlen=7, alibi_slopes=TABLE[:2]),
    "flash_attn_varlen_kvpacked_func": dict(q=PACKED_Q, kv=PACKED_KV, alibi_slopes=TABLE[:2], **LENGTHS),
    "flash_attn_with_kvcache": dict(
        q=Q[:, :3], k_cache=CACHE, v_cache=CACHE, k=NEW, v=NEW, rotary_cos=TABLE, rotary_sin=TABLE,
        cache_seqlens=INDEX, cache_batch_idx=INDEX, cache_leftpad=0 * INDEX, causal=True, alibi_slopes=TABLE[:2],
    ),
    "apply_rotary_emb": dict(x=Q, cos=TABLE, sin=TABLE, seqlen_offsets=0 * INDEX),
}  # fmt: skip
CALLS = [(name, {}) for name in VALID] + [
    ("flash_attn_varlen_func", dict(q=Q[0], k=Q[0], v=Q[0], cu_seqlens_q=CU[:2] - 0, cu_seqlens_k=CU[:2])),
    ("flash_attn_varlen_func", dict(k=CACHE[:, :, :1], v=CACHE[:, :, :1], block_table=INDEX[:, None])),
    ("flash_attn_with_kvcache", dict(cache_batch_idx=None, cache_leftpad=None)),
    ("flash_attn_with_kvcache", dict(cache_batch_idx=None, cache_leftpad=None, block_table=INDEX[:, None])),
    ("apply_rotary_emb", dict(x=PACKED_Q, cu_seqlens=CU, max_seqlen=7)),
]  # fmt: skip
FOREIGN = (  # arguments of what the functions call
    "cache_lengths", "key_lengths", "window", "rotary", "rotary_offset", "rotary cos", "rotary sin", "rotary tables",
    "seed", "return_lse", "head_dim_v",
)  # fmt: skip


def wrong_values(value):
    """What is wrong in the place of an argument, by a word."""
    wrong = {"a list": [1.0], "a text": "x", "a number": 3.5, "None": None, "negative": -5, "large": 2**20}
    if isinstance(value, torch.Tensor):
        wrong |= {
            "of another shape": value[..., :1].repeat_interleave(3, -1), "with a dimension more": value[None],
            "with one less": value[0], "complex": value.to(torch.complex64), "negative numbers": -3 - value.abs(),
            "large numbers": value + 10**4, "on another device": value.to("meta"), "shorter": value[:-1],
            "integers": value.to(torch.int16), "double": value.double(),
        }  # fmt: skip
    return wrong


@pytest.mark.parametrize("name, change", CALLS, ids=[f"{name} {list(change)}" for name, change in CALLS])
def test_every_message_names_an_argument_of_the_function_that_was_called(name, change):
    function = getattr(flash_attn, name)
    parameters = inspect.signature(function).parameters
    valid = VALID[name] | change
    foreign = [word for word in (*FOREIGN, *SIGNATURE_NAMES) if word not in parameters]
    refused = 0
    for parameter in parameters:
        value = valid.get(parameter, parameters[parameter].default)
        for kind, wrong in wrong_values(value).items():
            if kind == "on another device" and parameter == next(iter(parameters)):
                continue  # the others are then
            arguments = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in valid.items()}
            try:
                function(**arguments | {parameter: wrong})
            except (ValueError, TypeError, NotImplementedError) as error:
                refused += 1
                message = f"{parameter} {kind}: {type(error).__name__}: {error}"
                assert str(error).split(":")[0] in parameters, message
                words = [word for word in foreign if re.search(rf"\b{word}\b", str(error))]
                assert not words, f"{words} in {message}"
    assert refused > 15


SIGNATURE_NAMES = {
    name for function in VALID for name in inspect.signature(getattr(flash_attn, function)).parameters
} - {"causal", "x", "cos", "sin", "inplace", "interleaved"}  # words of plain messages, too
