"""One drawn call of `attention_decode`, held against eager attention over what the cache holds afterwards."""

import dataclasses
import math

import torch
from cases.attention import eager_attention, turned
from fuzz import draws
from fuzz.criterion import UNIT, assert_accurate, smallest
from hypothesis import strategies
from torch import Tensor

from pynlp.functional import attention_decode

cache_layouts = strategies.sampled_from(
    (torch.clone, draws.one_of_packed, draws.with_gaps, draws.every_other_row, draws.heads_first)
)


@dataclasses.dataclass(frozen=True)
class Call:
    lengths: tuple[int, ...]  # keys in the cache before
    queries: int
    appended: int | None  # new keys; None: no arguments for them
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    latent: bool  # values are the last channels of the keys, in the same memory
    page_size: int | None
    shared_pages: int  # of all entries, before their own
    spare: int  # pages, or places of an entry, that nobody uses
    num_splits: int | None
    features: dict
    rotary_offset: int
    dtype: torch.dtype
    machine: draws.Machine
    seed: int
    layouts: tuple  # of q and the new rows
    cache_layouts: tuple
    integers: torch.dtype
    low_biases: bool
    return_lse: bool


class Step:
    """The tensors of a call. All of the cache that is not a key or a value is NaN."""

    def __init__(self, call: Call):
        self.call = call
        generator = torch.Generator().manual_seed(call.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(call.dtype)

        batch, appended = len(call.lengths), call.appended or 0
        self.q = call.layouts[0](normal(batch, call.queries, call.heads, call.head_dim) * call.features["magnitude"])
        self.lengths = torch.tensor(call.lengths, dtype=call.integers)
        self.block_table, shape = None, (batch, max(call.lengths, default=0) + appended + call.spare)
        if call.page_size:
            pages = -(-shape[1] // call.page_size)
            total = batch * pages + call.spare + 1
            table = torch.randperm(total, generator=generator)[: batch * pages].view(batch, pages)
            table[:, : call.shared_pages] = table[:1, : call.shared_pages]
            self.block_table, shape = table.to(call.integers), (total, call.page_size)
        k_cache = torch.full((*shape, call.kv_heads, call.head_dim), math.nan, dtype=call.dtype)
        v_cache = torch.full((*shape, call.kv_heads, call.head_dim_v), math.nan, dtype=call.dtype)
        for entry, length in enumerate(call.lengths):
            at = self.places(entry, 0, length)
            k_cache[at], v_cache[at] = (normal(length, call.kv_heads, x.shape[-1]) for x in (k_cache, v_cache))
        self.k_cache, self.v_cache = (f(x) for f, x in zip(call.cache_layouts, (k_cache, v_cache), strict=True))
        new = [normal(batch, appended, call.kv_heads, x.shape[-1]) for x in (k_cache, v_cache)]
        new = [layout(x) for layout, x in zip(call.layouts[1:], new, strict=True)]
        if call.latent:
            self.v_cache, new[1] = self.k_cache[..., -call.head_dim_v :], new[0][..., -call.head_dim_v :]
        self.new = dict(zip("kv", new, strict=True)) if call.appended is not None else {}
        if self.block_table is not None:  # what lies beyond an entry's keys is not looked at
            for entry, length in enumerate(call.lengths):
                self.block_table[entry, -(-(length + appended) // call.page_size) :] = -77

        features, biases = call.features, {}
        if features["sinks"]:
            biases["sinks"] = normal(call.heads)
        if features["alibi"]:
            biases["alibi_slopes"] = normal(*(batch, call.heads)[features["alibi"] == "heads" :]).abs() * 0.2
        if features["relative"]:
            biases["relative_bias"] = normal(features["relative"][0], call.heads)
        self.biases = biases if call.low_biases else {name: x.float() for name, x in biases.items()}
        names = ("causal", "window", "softmax_scale", "softcap", "relative_bidirectional")
        self.options = {name: features[name] for name in names}
        if features["relative"]:
            self.options["relative_max_distance"] = features["relative"][1]
        self.rotary = None
        if features["rotary_dim"]:
            half = features["rotary_dim"] // 2
            positions = torch.arange(max(call.lengths, default=0) + appended + call.rotary_offset)
            angles = positions[:, None] * 100.0 ** -(torch.arange(half) / half)
            self.rotary = (angles.cos(), angles.sin())

    def places(self, entry: int, first: int, last: int) -> tuple:
        """Index of some keys of an entry in a cache."""
        keys = torch.arange(first, last)
        if self.block_table is None:
            return entry, keys
        return self.block_table[entry].long()[keys // self.call.page_size], keys % self.call.page_size

    def run(self, machine: draws.Machine) -> dict[str, Tensor]:
        call = self.call
        turn = dict(rotary_interleaved=call.features["rotary_interleaved"], rotary_offset=call.rotary_offset)
        with machine.used():
            results = attention_decode(
                self.q, self.k_cache, self.v_cache, self.lengths, **self.new, block_table=self.block_table,
                num_splits=call.num_splits, return_lse=call.return_lse, **self.options, **self.biases,
                **(turn | {"rotary": self.rotary} if self.rotary else {}),
            )  # fmt: skip
        return dict(zip(("out", "lse"), results if call.return_lse else (results,), strict=False))

    def turned(self, x: Tensor, entry: int, first: int) -> Tensor:
        """Rows (S, heads, head_dim) of an entry, the first of which stands at key `first`."""
        if self.rotary is None:
            return x
        positions = torch.arange(first, first + x.shape[0])[None] + self.call.rotary_offset
        tables = [table.to(torch.promote_types(x.dtype, torch.float32)) for table in self.rotary]
        return turned(x[None], tables, positions, self.call.features["rotary_interleaved"])[0]

    def eager(self, q: Tensor, *, alibi_slopes: Tensor | None = None, **arguments) -> tuple[Tensor, Tensor]:
        """Each entry by itself, over the keys and values that the cache holds."""
        statistics = torch.promote_types(q.dtype, torch.float32)
        outs = [q.new_zeros(0, *q.shape[1:3], self.call.head_dim_v)]
        lses = [q.new_zeros(0, q.shape[2], q.shape[1], dtype=statistics)]
        for entry, length in enumerate(self.call.lengths):
            length += self.call.appended or 0
            at = self.places(entry, 0, length)
            rows = (self.turned(q[entry], entry, length - q.shape[1]), self.k_cache[at], self.v_cache[at])
            own = alibi_slopes[entry] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            out, lse = eager_attention(*(x[None].to(q.dtype) for x in rows), alibi_slopes=own, **arguments)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def check_caches(self, before: list[Tensor]) -> None:
        """New rows are there, keys turned; nothing else in the memory of both caches has changed."""
        for entry, length in enumerate(self.call.lengths):
            if not self.new:
                continue
            at = self.places(entry, length, length + self.call.appended)
            new_k, new_v = (self.new[name][entry] for name in "kv")
            exact = self.turned(new_k.double(), entry, length)
            off = (self.k_cache[at].double() - exact).abs()
            # Rounded once, after a sum of two products in fp32.
            allowed = torch.finfo(new_k.dtype).eps / 2 * exact.abs() + smallest(new_k.dtype)
            if self.rotary is not None:
                allowed = allowed + 4 * UNIT * new_k.double().abs().amax(-1, keepdim=True)
            assert (off <= allowed).all(), f"entry {entry}: a new key is off by {off.max():.3g}"
            assert torch.equal(self.v_cache[at], new_v), f"entry {entry}: not the new values"
            for cache, old in zip((self.k_cache, self.v_cache), before, strict=True):
                old = old.as_strided(cache.shape, cache.stride(), cache.storage_offset())
                old[at] = cache[at]
        for name, cache, old in zip("kv", (self.k_cache, self.v_cache), before, strict=True):
            same = memory(cache).nan_to_num(nan=12345.0) == old.nan_to_num(nan=12345.0)
            assert same.all(), f"{name}_cache: memory that is nobody's has changed"


def memory(x: Tensor) -> Tensor:
    """All of the storage behind x."""
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)


@strategies.composite
def calls(draw) -> Call:
    lengths = tuple(draw(strategies.lists(draws.lengths | strategies.integers(0, 700), max_size=4)))
    queries = draw(strategies.integers(1, 4) | strategies.integers(0, 20))
    appended = draw(strategies.just(queries) | strategies.integers(0, 9) | draws.maybe)
    large = strategies.sampled_from((512, 576, 1024)) | strategies.integers(257, 1024)
    head_dim, head_dim_v = draw(draws.head_dims | large), draw(draws.head_dims | large)
    heads, kv_heads = draw(draws.head_counts(sum(lengths) * max(1, queries) * max(1, head_dim // 64)))
    features = draw(draws.features(head_dim))
    latent = head_dim - head_dim_v >= features["rotary_dim"] and draw(strategies.booleans())
    page_size = draw(draws.maybe | strategies.integers(1, 70) | strategies.sampled_from((16, 64, 128)))
    shared = min(lengths, default=0) // page_size if page_size else 0
    missing = queries - min(lengths, default=0) - (appended or 0)  # queries before the first key
    return Call(
        lengths, queries, appended, heads, kv_heads, head_dim, head_dim_v, latent, page_size,
        shared_pages=draw(strategies.integers(0, shared)),
        spare=draw(strategies.integers(0, 3)),
        num_splits=draw(draws.maybe | strategies.integers(1, 9) | strategies.sampled_from((1000, 2**31, 2**62))),
        features=features,
        rotary_offset=max(0, missing) + draw(strategies.integers(0, 50)) if features["rotary_dim"] else 0,
        dtype=draw(draws.dtypes),
        machine=draw(draws.machines),
        seed=draw(draws.generator_seeds),
        layouts=draw(strategies.tuples(*[draws.layouts] * 3)),
        cache_layouts=draw(strategies.tuples(*[cache_layouts] * 2)),
        integers=draw(draws.integer_dtypes),
        low_biases=draw(strategies.booleans()),
        return_lse=draw(strategies.booleans()),
    )  # fmt: skip


def check_attention_decode(call: Call) -> None:
    step, again = Step(call), Step(call)
    before = [memory(step.k_cache).clone()]
    before += before if call.latent else [memory(step.v_cache).clone()]
    table = None if step.block_table is None else step.block_table.clone()
    results = step.run(call.machine)
    step.check_caches(before)
    assert torch.equal(step.lengths, torch.tensor(call.lengths, dtype=call.integers))
    assert table is None or torch.equal(step.block_table, table)
    for name, x in again.run(dataclasses.replace(call.machine, threads=1)).items():
        assert torch.equal(x, results[name]), f"{name} differs with {call.machine.threads} threads"
    tensors = {"q": step.q, **step.biases}
    assert_accurate(results, step.eager, tensors, step.options)
