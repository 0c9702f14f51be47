"""Decoding over a cache: against eager attention in fp64, against prefill, and what it may not touch."""

import functools
import math

import pytest
import torch
from cases.attention import eager_attention, errors
from cases.pairs import every_pair

from pynlp import backends
from pynlp.functional import attention, attention_decode, rotary_tables

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
LENGTHS = (150, 0, 33, 64, 1)  # keys in the cache before
HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 6, 2, 32, 20

FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(causal=True, window=(40, None)),
    "both sides": dict(window=(9, 1)),
    "softcap, scale": dict(softcap=2.0, softmax_scale=0.4),
    "sinks": dict(causal=True, sinks=True),
    "ALiBi": dict(causal=True, alibi="heads"),
    "ALiBi of each entry": dict(alibi="batch", causal=True),
    "T5": dict(relative=True, causal=True),
    "RoPE": dict(causal=True, rotary=True),
    "RoPE, interleaved": dict(causal=True, rotary=True, rotary_interleaved=True, rotary_offset=7),
    "all": dict(causal=True, window=(60, None), softcap=4.0, sinks=True, alibi="batch", relative=True, rotary=True),
}


def test_native_kernels_are_loaded():
    assert backends.native_missing_reason() is None
    for op in ("attention_append", "attention_decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{op}", "CPU"), op


class Step:
    """New tokens for a cache: all keys and values there are in the end, a cache with the old ones, and the options."""

    def __init__(self, features, dtype, new, page_size=None, lengths=LENGTHS, heads=(HEADS, KV_HEADS), dim=None):
        options, generator = dict(features), torch.Generator().manual_seed(0)
        batch, (heads, kv_heads), (dim, dim_v) = len(lengths), heads, dim or (HEAD_DIM, HEAD_DIM_V)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.new, self.lengths = new, torch.tensor(lengths, dtype=torch.int32)
        self.q = normal(batch, new, heads, dim)
        self.keys = [normal(1, length + new, kv_heads, dim) for length in lengths]  # not turned
        self.values = [normal(1, length + new, kv_heads, dim_v) for length in lengths]
        statistics = torch.promote_types(dtype, torch.float32)
        if options.pop("sinks", False):
            options["sinks"] = normal(heads).to(statistics)
        alibi = options.pop("alibi", None)
        if alibi:
            options["alibi_slopes"] = normal(*(batch, heads)[alibi == "heads" :]).abs().to(statistics) * 0.1
        if options.pop("relative", False):
            options |= dict(relative_bias=normal(8, heads).to(statistics), relative_max_distance=50)
        if options.pop("rotary", False):
            options["rotary"] = rotary_tables(max(lengths) + new + 10, dim // 2)
        self.options = options

        # Everything that is not a key of an entry is NaN: the rest of the cache, and other pages.
        capacity = max(lengths) + new + 3
        self.block_table, self.page_size = None, page_size
        if page_size is None:
            shape = (batch, capacity)
        else:
            pages = -(-capacity // page_size)
            table = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages].view(batch, pages)
            self.block_table, shape = table.to(torch.int32), (batch * pages + 2, page_size)
        self.k_cache = torch.full((*shape, kv_heads, dim), math.nan, dtype=dtype)
        self.v_cache = torch.full((*shape, kv_heads, dim_v), math.nan, dtype=dtype)
        for entry, length in enumerate(lengths):
            keys = self.turned_keys(entry)
            for place in range(length):
                at = self.place(entry, place)
                self.k_cache[at] = keys[0, place]
                self.v_cache[at] = self.values[entry][0, place]
            if self.block_table is not None:  # entries of the table beyond the length may be anything
                self.block_table[entry, -(-(length + new) // page_size) :] = -77

    def place(self, entry, key):
        """Where a key is in the cache."""
        if self.block_table is None:
            return entry, key
        return self.block_table[entry, key // self.page_size].item(), key % self.page_size

    def turned_keys(self, entry):
        keys = self.keys[entry]
        if "rotary" not in self.options:
            return keys
        first = self.options.get("rotary_offset", 0)
        cos, sin = (x[first : first + keys.shape[1], None].double() for x in self.options["rotary"])
        pairs = keys.double()[..., : 2 * cos.shape[-1]]
        interleaved = self.options.get("rotary_interleaved", False)
        a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat((turned.to(keys.dtype), keys[..., pairs.shape[-1] :]), dim=-1)

    def new_rows(self):
        rows = ([x[:, -self.new :] for x in all_rows] for all_rows in (self.keys, self.values))
        return dict(zip("kv", map(torch.cat, rows), strict=True))

    def run(self, **more):
        arguments = dict(block_table=self.block_table, return_lse=True, **self.new_rows(), **self.options)
        return attention_decode(self.q, self.k_cache, self.v_cache, self.lengths, **arguments | more)

    def eager(self, dtype):
        """(out, lse) by plain PyTorch in `dtype`, each entry by itself over all of its keys."""
        results = []
        for entry in range(len(self.lengths)):
            options = dict(causal=False, window=None, softmax_scale=None, softcap=0.0) | self.options
            if "alibi_slopes" in options and options["alibi_slopes"].dim() == 2:
                options["alibi_slopes"] = options["alibi_slopes"][entry : entry + 1]
            rows = (self.q[entry : entry + 1], self.keys[entry], self.values[entry])
            results.append(eager_attention(*(x.to(dtype) for x in rows), **options))
        return tuple(map(torch.cat, zip(*results, strict=True)))

    @functools.cached_property
    def expected(self):
        return self.eager(torch.float64), self.eager(self.q.dtype)

    def check(self, results):
        """Errors at most twice those of eager attention in the same dtype, and rounding."""
        for name, value, exact, peer in zip(("out", "lse"), results, *self.expected, strict=True):
            assert value.shape == exact.shape and value.dtype == peer.dtype, name
            size = exact.nan_to_num(neginf=0.0).abs().max().item()
            rounding = torch.finfo(value.dtype).eps * size + 4e-7 * size
            error, allowed = errors(value, exact)[0], 2 * errors(peer, exact)[0] + rounding
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@functools.cache
def step_of(name, *arguments):
    """For tests that run the same step at every instruction set: what they write is the same every time."""
    return Step(FEATURES[name], *arguments)


@pytest.mark.every_isa
@every_pair(name=list(FEATURES), page_size=[None, 16], new=[1, 3, 20], dtype=DTYPES)
def test_features(name, page_size, new, dtype, isa):
    step = step_of(name, dtype, new, page_size)
    step.check(step.run())


@dtypes
@pytest.mark.parametrize("page_size", [1, 3, 64, 1000])
def test_page_sizes(page_size, dtype):
    step = Step(FEATURES["all"], dtype, 2, page_size)
    step.check(step.run())


@dtypes
@pytest.mark.parametrize("dim", [(1, 1), (17, 5), (64, 64), (80, 128), (256, 256), (576, 512), (1024, 1000)])
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (4, 4)])
def test_heads(heads, dim, dtype, isa):
    step = step_of("causal", dtype, 2, 16, (70, 5), heads, dim)
    step.check(step.run())


@pytest.mark.parametrize("name", FEATURES)
def test_oracle(name):
    """The reference in fp64 is eager attention to within rounding."""
    for page_size in (None, 16):
        step = Step(FEATURES[name], torch.float64, 3, page_size)
        for value, exact in zip(step.run(), step.eager(torch.float64), strict=True):
            # Keys are kept as the cache's dtype has them: turned twice in fp64, which is exact to 1e-15.
            assert errors(value, exact)[0] <= 1e-12


@dtypes
@pytest.mark.parametrize("page_size", [None, 16])
def test_what_the_cache_holds_afterwards(page_size, dtype, isa):
    """The new keys, turned, and values behind the old ones, and not one value else."""
    step = Step(FEATURES["RoPE"], dtype, 3, page_size)
    before = step.k_cache.clone(), step.v_cache.clone()
    step.run()
    written = torch.zeros(step.k_cache.shape[:2], dtype=torch.bool)
    for entry, length in enumerate(step.lengths.tolist()):
        for key in range(length, length + 3):
            at = step.place(entry, key)
            written[at] = True
            turned = step.turned_keys(entry)[0, key]
            torch.testing.assert_close(step.k_cache[at].float(), turned.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert torch.equal(step.v_cache[at], step.values[entry][0, key])
    for cache, old in zip((step.k_cache, step.v_cache), before, strict=True):
        assert torch.equal(cache[~written].nan_to_num(nan=1e4), old[~written].nan_to_num(nan=1e4))


@dtypes
def test_a_step_gives_the_row_of_prefill(dtype, isa):
    """Token by token over a cache is attention over all tokens: to the rounding of what the cache keeps."""
    tokens, options = 40, dict(causal=True, window=(25, None), rotary=rotary_tables(64, 32))
    q, k, v = (torch.randn(2, tokens, heads, 32).to(dtype) for heads in (6, 2, 2))
    expected = attention(q, k, v, **options)
    k_cache, v_cache = torch.full((2, 2, 64, 2, 32), math.nan, dtype=dtype)
    steps, done = [], 0
    for count in (13, 1, 1, 5, 1, 10, 1, 8):
        rows = slice(done, done + count)
        lengths = torch.full((2,), done)
        steps.append(attention_decode(q[:, rows], k_cache, v_cache, lengths, k=k[:, rows], v=v[:, rows], **options))
        done += count
    assert done == tokens
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=tolerance)


@dtypes
@pytest.mark.parametrize("splits", [1, 2, 7, 1000])
def test_splits_change_only_rounding(splits, dtype, isa):
    lengths = (1500, 3, 700)
    step = step_of("all", dtype, 1, 16, lengths)
    step.check(step.run(num_splits=splits))


@dtypes
def test_threads_and_pages_change_no_bit(dtype, isa):
    lengths = (3000, 700, 64)
    expected = None
    for page_size in (None, 16, 50):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results = Step(FEATURES["window"], dtype, 1, page_size, lengths, heads=(8, 4)).run()
            for x, y in zip(results, expected or results, strict=True):
                assert torch.equal(x, y)
            expected = results


@dtypes
def test_batch_entries_do_not_mix(dtype, isa):
    """An entry's result has the same bits whatever the others are."""
    step = Step(FEATURES["all"], dtype, 2)
    out, lse = step.run()
    for entry in range(len(LENGTHS)):
        only = slice(entry, entry + 1)
        options = dict(step.options, alibi_slopes=step.options["alibi_slopes"][only])
        alone = attention_decode(
            step.q[only], step.k_cache[only], step.v_cache[only], step.lengths[only] + 2, return_lse=True, **options
        )
        assert torch.equal(alone[0], out[only]) and torch.equal(alone[1], lse[only])


@dtypes
def test_strides(dtype, isa):
    """A cache with heads first, as other libraries have it, and q and new rows out of a packed projection."""
    step = Step(FEATURES["RoPE"], dtype, 2)
    expected = step.run()
    other = Step(FEATURES["RoPE"], dtype, 2)
    other.k_cache, other.v_cache = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (other.k_cache, other.v_cache)
    )
    packed = torch.full((5, 2, HEADS + 2 * KV_HEADS, HEAD_DIM), math.nan, dtype=dtype)
    q, k, v = packed.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    rows = other.new_rows()
    q.copy_(other.q)
    k.copy_(rows["k"])
    v[..., :HEAD_DIM_V].copy_(rows["v"])
    other.q = q
    results = other.run(k=k, v=v[..., :HEAD_DIM_V])
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


def test_lengths_are_the_callers():
    step = Step({}, torch.float32, 2)
    before = step.lengths.clone()
    step.run()
    assert torch.equal(step.lengths, before)


def test_without_new_rows():
    """A cache that something else filled, such as cross-attention's."""
    step = Step(FEATURES["causal"], torch.float32, 2)
    expected = step.run()
    results = attention_decode(step.q, step.k_cache, step.v_cache, step.lengths + 2, causal=True, return_lse=True)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


@dtypes
def test_nothing_there(dtype, isa):
    """No keys: zeros and -inf, or the sink. No queries, no entries, no capacity: nothing."""
    q, cache = torch.randn(2, 1, 4, 8).to(dtype), torch.full((2, 5, 2, 8), math.nan, dtype=dtype)
    none = torch.zeros(2, dtype=torch.int32)
    out, lse = attention_decode(q, cache, cache, none, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = attention_decode(q, cache, cache, none, sinks=torch.arange(4.0), return_lse=True)
    assert (out == 0).all() and torch.allclose(lse[0, :, 0], torch.arange(4.0))
    assert attention_decode(q[:, :0], cache, cache, none).shape == (2, 0, 4, 8)
    assert attention_decode(q[:0], cache[:0], cache[:0], none[:0]).shape == (0, 1, 4, 8)
    assert (attention_decode(q, cache[:, :0], cache[:, :0], none) == 0).all()


def test_no_gradients():
    """Results are no part of a graph, and neither is the cache."""
    step = Step({}, torch.float32, 1)
    step.q.requires_grad_()
    rows = {name: x.requires_grad_() for name, x in step.new_rows().items()}
    out, lse = step.run(**rows)
    assert not (out.requires_grad or lse.requires_grad or step.k_cache.requires_grad or step.v_cache.requires_grad)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_follows_the_cache(kept):
    step = Step(FEATURES["causal"], kept, 2)
    expected = step.run()
    q, rows = step.q.float(), {name: x.float() for name, x in step.new_rows().items()}
    with torch.autocast("cpu", torch.bfloat16):
        results = attention_decode(q, step.k_cache, step.v_cache, step.lengths, causal=True, return_lse=True, **rows)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_opcheck(dtype, page_size):
    step = Step(FEATURES["all"], dtype, 2, page_size, (5, 0))
    statistics = torch.promote_types(dtype, torch.float32)
    rows, table = step.new_rows(), step.block_table
    cos, sin = (x.to(statistics) for x in step.options["rotary"])
    turn = (cos, sin, 0, False)
    # opcheck compares what is written with equal(), in which NaN is unlike itself.
    caches = [x.nan_to_num() for x in (step.k_cache, step.v_cache)]
    append = (rows["k"], rows["v"], *caches, step.lengths, table, *turn)
    assert set(torch.library.opcheck(torch.ops.pynlp.attention_append.default, append).values()) == {"SUCCESS"}
    biases = (step.options["sinks"], step.options["alibi_slopes"], None, None)
    decode = (step.q, *caches, step.lengths, 2, table, 0.3, 9, 0, 1.0, *biases, *turn, 0)
    assert set(torch.library.opcheck(torch.ops.pynlp.attention_decode.default, decode).values()) == {"SUCCESS"}


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention_decode, compiled):
        step = Step(FEATURES["all"], torch.float32, 1, 4, (5, 9))
        arguments = dict(block_table=step.block_table, **step.new_rows(), **step.options)
        results.append(
            (function(step.q, step.k_cache, step.v_cache, step.lengths, **arguments), step.k_cache.nan_to_num())
        )
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


CACHE = torch.zeros(2, 9, 2, 8)
PAGES = torch.zeros(5, 4, 2, 8)
NEW = torch.zeros(2, 3, 2, 8)
TABLE = torch.tensor([[4, 3, 2], [0, 1, 7]], dtype=torch.int32)
PAGED = dict(k_cache=PAGES, v_cache=PAGES, cache_lengths=torch.tensor([5, 8]), block_table=TABLE)
REFUSED = {
    "q's rank": (dict(q=torch.zeros(2, 4, 8)), ValueError, "q: expected 4 dimensions .*got \\(2, 4, 8\\)"),
    "q's dtype": (dict(q=torch.zeros(2, 1, 4, 8, dtype=torch.int32)), TypeError, "q: expected dtype float32.*int32"),
    "cache's rank": (dict(k_cache=CACHE[0]), ValueError, "k_cache: expected 4 dimensions \\(batch, capacity"),
    "cache's dtype": (
        dict(v_cache=CACHE.half()),
        TypeError,
        "v_cache: expected q's dtype torch.float32, got .*float16",
    ),
    "cache's device": (dict(k_cache=CACHE.to("meta")), ValueError, "k_cache: expected q's device cpu, got meta"),
    "cache's strides": (
        dict(k_cache=torch.zeros(2, 9, 8, 2).transpose(2, 3)),
        ValueError,
        "k_cache: expected a contiguous last dimension, got strides",
    ),
    "cache's batch": (dict(k_cache=CACHE[:1]), ValueError, "k_cache: expected shape \\(2, capacity, kv_heads, 8\\)"),
    "cache's head_dim": (dict(k_cache=CACHE[..., :6]), ValueError, "k_cache: .*kv_heads, 8\\).*got \\(2, 9, 2, 6\\)"),
    "v_cache's capacity": (dict(v_cache=CACHE[:, :8]), ValueError, "v_cache: expected the shape of k_cache"),
    "heads": (
        dict(k_cache=torch.zeros(2, 9, 3, 8), v_cache=torch.zeros(2, 9, 3, 8), k=None, v=None),
        ValueError,
        "k_cache: expected a number of heads that divides q's 4, got 3",
    ),
    "k without v": (dict(v=None), ValueError, "v: expected new rows to go with k, got None"),
    "k's heads": (dict(k=torch.zeros(2, 3, 4, 8)), ValueError, "k: expected shape \\(2, seqlen_new, 2, 8\\), got"),
    "v's rows": (dict(v=NEW[:, :2]), ValueError, "v: expected shape \\(2, 3, 2, 8\\), got \\(2, 2, 2, 8\\)"),
    "k's dtype": (dict(k=NEW.bfloat16()), TypeError, "k: expected q's dtype torch.float32, got torch.bfloat16"),
    "lengths' shape": (dict(cache_lengths=torch.tensor([1])), ValueError, "cache_lengths: expected shape \\(2,\\)"),
    "lengths' dtype": (
        dict(cache_lengths=torch.ones(2)),
        TypeError,
        "cache_lengths: expected dtype int32, got .*float32",
    ),
    "no room": (dict(cache_lengths=torch.tensor([7, 2])), ValueError, "cache_lengths: .* 0 to 6, got 2 to 7"),
    "negative length": (dict(cache_lengths=torch.tensor([-1, 2])), ValueError, "cache_lengths: .*got -1 to 2"),
    "beyond the pages": (
        PAGED | dict(cache_lengths=torch.tensor([10, 8])),
        ValueError,
        "cache_lengths: expected values of 0 to 9, got 8 to 10",
    ),
    "page of another cache": (
        PAGED | dict(cache_lengths=torch.tensor([5, 9])),
        ValueError,
        "block_table: .* 0 to 4, got 7",
    ),
    "negative page": (PAGED | dict(block_table=-TABLE), ValueError, "block_table: expected pages 0 to 4, got -4"),
    "table's rank": (PAGED | dict(block_table=TABLE[0]), ValueError, "block_table: expected shape \\(2, pages\\), got"),
    "table's batch": (
        PAGED | dict(block_table=TABLE[:1]),
        ValueError,
        "block_table: expected shape \\(2, 3\\), got \\(1, 3\\)",
    ),
    "table's dtype": (PAGED | dict(block_table=TABLE.float()), TypeError, "block_table: expected dtype int32"),
    "empty pages": (
        PAGED | dict(k_cache=PAGES[:, :0], v_cache=PAGES[:, :0], cache_lengths=torch.tensor([0, 0]), k=None, v=None),
        ValueError,
        "k_cache: expected pages of at least one key",
    ),
    "splits": (dict(num_splits=0), ValueError, "num_splits: expected at least 1, or None .*got 0"),
    "window": (dict(window=(-2, None)), ValueError, "window: expected left >= 0"),
    "short tables": (
        dict(rotary=(torch.ones(8, 4), torch.ones(8, 4))),
        ValueError,
        "rotary: expected tables that reach the last position, got 8 positions, needed 9",
    ),
    "queries before 0": (
        dict(q=torch.zeros(2, 9, 4, 8), rotary=(torch.ones(9, 4), torch.ones(9, 4))),
        ValueError,
        "rotary_offset: expected no position below 0, got -4 for the first query",
    ),
    "offset alone": (dict(rotary_offset=2), ValueError, "rotary_offset: expected rotary=.*got rotary=None"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes: expected shape \\(4,\\) or \\(2, 4\\)"),
    "sinks": (dict(sinks=torch.ones(3)), ValueError, "sinks: expected shape \\(4,\\), got \\(3,\\)"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_bad_arguments(refused):
    """And not a value of the cache has changed."""
    change, error, message = REFUSED[refused]
    good = dict(
        q=torch.zeros(2, 1, 4, 8),
        k_cache=CACHE,
        v_cache=CACHE,
        cache_lengths=torch.tensor([6, 2]),
        k=NEW + 1,
        v=NEW + 1,
    )
    attention_decode(**good | dict(k_cache=CACHE.clone(), v_cache=CACHE.clone()))
    with pytest.raises(error, match=message):
        attention_decode(**good | change)
    assert (CACHE == 0).all() and (PAGES == 0).all()


def test_the_op_itself_touches_nothing_outside():
    """Called without the public function's checks it still refuses lengths and pages that lie outside."""
    step = Step({}, torch.float32, 1, 16)
    rows = step.new_rows()
    for lengths, table in ((step.lengths + 1000, step.block_table), (step.lengths, step.block_table + 1000)):
        with pytest.raises(RuntimeError, match="cache_lengths: expected 0 to|block_table: expected pages 0 to"):
            torch.ops.pynlp.attention_append(
                rows["k"], rows["v"], step.k_cache, step.v_cache, lengths, table, None, None, 0, False
            )


def test_autograd_learns_that_the_caches_changed():
    """A backward pass that needs what they were raises an error; what it does not need is left alone."""
    lengths, q, new = torch.tensor([3], dtype=torch.int32), torch.randn(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    for _ in range(4):
        k_cache, v_cache, weight = *torch.randn(2, 1, 8, 2, 8), torch.ones(1, requires_grad=True)
        total = (k_cache * weight).sum()
        attention_decode(q, k_cache, v_cache, lengths)
        total.backward(retain_graph=True)
        attention_decode(q, k_cache, v_cache, lengths, k=new, v=new)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    with torch.inference_mode():
        caches = torch.zeros(2, 1, 8, 2, 8)
        attention_decode(q, *caches, lengths, k=new, v=new)
        assert caches[:, 0, 3].sum() == 32


def test_caches_that_cannot_be_written_to():
    lengths, q, new = torch.tensor([3, 3], dtype=torch.int32), torch.randn(2, 1, 2, 8), torch.ones(2, 1, 2, 8)
    cache, shared = torch.zeros(2, 8, 2, 8), torch.zeros(1, 8, 2, 8).expand(2, 8, 2, 8)
    leaf = cache.clone().requires_grad_()
    with pytest.raises(ValueError, match="k_cache: expected one that needs no gradient"):
        attention_decode(q, leaf, cache, lengths, k=new, v=new)
    with torch.no_grad():
        attention_decode(q, leaf, cache, lengths, k=new, v=new)
    with pytest.raises(ValueError, match="v_cache: expected memory of its own for each row"):
        attention_decode(q, cache, shared, lengths, k=new, v=new)
    attention_decode(q, cache, shared, lengths)
