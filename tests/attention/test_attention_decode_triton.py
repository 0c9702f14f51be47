"""The kernels of attention over a cache, and of attention's weights: in Triton's interpreter, or on a GPU.

The public functions are called with the launchers in the place of the ops. What an entry does not have is NaN in the
cache, pages that it does not need are numbers no page has, and the interpreter tells what was read.
"""

import math

import numpy as np
import pytest
import torch
from cases.attention import Case, eager_attention, errors, make_inputs
from cases.triton import DEVICE, GPU, GuardedAllocations, in_a_sea_of_nan, triton
from pynlp.kernels.attention import decode_launch as kernels
from pynlp.kernels.attention import weights as weights_kernels
from test_attention_decode import FEATURES, Step
from test_attention_offsets import far_apart

from pynlp.functional import attention_decode, attention_weights, rotary_tables
from pynlp.reference.attention.decode import attention_append as append_reference

# NumPy, which the interpreter computes with, warns of log2(0) and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: the kernels' machine code runs nowhere else")
LENGTHS = (37, 0, 16, 1)  # keys in the cache before
EVERYTHING = dict(
    window=(25, 1), softcap=4.0, sinks=True, alibi="batch", relative=True, rotary=True, rotary_interleaved=True,
    rotary_offset=7, softmax_scale=0.3,
)  # fmt: skip


def guarded(launcher):
    """The launcher with guard zones around whatever it allocates."""

    def launch(*arguments):
        allocations = GuardedAllocations()
        with allocations.active():
            results = launcher(*arguments)
        if allocations.zones:
            allocations.check()
        return results

    return launch


@pytest.fixture(autouse=True)
def launchers(monkeypatch):
    """The public functions start the kernels, on CPUs too."""
    for name in ("attention_append", "attention_decode"):
        monkeypatch.setattr(f"pynlp.ops.attention.decode._{name}", guarded(getattr(kernels, name)))
    monkeypatch.setattr(torch.ops.pynlp, "attention_weights", guarded(weights_kernels.attention_weights))


def tile(monkeypatch, block_m=16, block_n=16, piece=256):
    """A tile for the interpreter; on a GPU the launcher's own."""
    if not GPU:
        config = kernels.Config(block_m, block_n, 1, 1, precision="ieee", piece=piece)
        monkeypatch.setattr(kernels, "configs", lambda *_: [config])


def on_device(x):
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


class KernelStep(Step):
    """New tokens for a cache, by the kernels: q and new rows in a sea of NaN, no angle that is not needed."""

    def __init__(
        self, features, dtype=torch.float32, new=1, page_size=None, lengths=LENGTHS, heads=(6, 2), dim=(24, 20)
    ):
        super().__init__(features, dtype, new, page_size, lengths, heads, dim)
        self.inside = None  # the channel of the keys at which the values are
        if "rotary" in self.options:
            first = self.options.get("rotary_offset", 0)
            for table in self.options["rotary"]:
                table[: max(0, first - new)] = table[first + max(lengths) + new :] = math.nan

    def run(self, **more):
        rows = {name: in_a_sea_of_nan(x) for name, x in dict(q=self.q, **self.new_rows()).items()}
        arguments = dict(k_cache=self.k_cache, v_cache=self.v_cache, cache_lengths=self.lengths)
        arguments |= dict(block_table=self.block_table, return_lse=True, **rows, **self.options) | more
        arguments = {name: on_device(x) for name, x in arguments.items()}
        if self.inside is not None:  # moving them made two tensors of one
            arguments["v_cache"] = arguments["k_cache"][..., self.inside : self.inside + self.v_cache.shape[3]]
        results = attention_decode(**arguments)
        self.k_cache, self.v_cache = (arguments[name].cpu() for name in ("k_cache", "v_cache"))
        return [x.cpu() for x in results]


@pytest.mark.parametrize(("new", "page_size"), [(1, None), (5, 3)])
@pytest.mark.parametrize("name", [*FEATURES, "everything"])
def test_features(name, new, page_size, monkeypatch):
    tile(monkeypatch)
    step = KernelStep(FEATURES.get(name, EVERYTHING), new=new, page_size=page_size)
    step.check(step.run())


@pytest.mark.parametrize(
    ("name", "new", "page_size"), [("plain", 1, 16), ("causal", 20, None), ("RoPE", 5, 16), ("everything", 3, None)]
)
def test_half_precision_is_as_good_as_pytorch(name, new, page_size, monkeypatch):
    tile(monkeypatch, 16, 32)
    step = KernelStep(FEATURES.get(name, EVERYTHING), torch.float16, new, page_size)
    step.check(step.run())


@pytest.mark.parametrize(("page_size", "block_n"), [(1, 16), (16, 16), (16, 32), (24, 16), (32, 16), (1000, 32)])
def test_page_sizes(page_size, block_n, monkeypatch):
    """Keys of several pages in a tile, of one, and tiles that are parts of pages."""
    tile(monkeypatch, 32, block_n)
    step = KernelStep(EVERYTHING, new=2, page_size=page_size, lengths=(65, 0, 30))
    step.check(step.run())


@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("splits", [2, 3, 1000])
def test_splits_change_only_rounding(splits, new, monkeypatch):
    """Parts of equal sizes, of unequal ones, and without keys."""
    tile(monkeypatch)
    step = KernelStep(FEATURES["all"], new=new, page_size=3, lengths=(70, 0, 33), heads=(2, 1))
    step.check(step.run(num_splits=splits))


def test_splits_are_chosen_by_what_the_host_knows(monkeypatch):
    """Enough parts for the machine, none of few keys; the fewer rows, the more."""
    options = kernels.DecodeOptions(0, None, 1.0, -1, -1, 0.0, *[None] * 6, 0, False, 0)

    def splits(batch, capacity, new=1, heads=8, **changes):
        q = torch.zeros(batch, new, heads, 64, device="meta")
        return kernels._splits(q, 8, capacity, options._replace(**changes), kernels.Config(16, 64, 4, 3), 64)

    full = 64 * kernels.PROGRAMS // 8
    assert splits(1, 2**20) == full and splits(2, 2**20) == full // 2 and splits(2, 2**20, 17) == full // 4
    assert splits(full, 2**20) == 1 and splits(10**6, 2**20) == 1
    assert splits(1, 100) == 1 and splits(1, 5 * kernels.LEAST_KEYS) == 5
    assert splits(1, 5 * 16 * kernels.LEAST_KEYS_A_ROW, 16) <= 5
    assert splits(1, 2**20, window_left=kernels.LEAST_KEYS, window_right=0) == 1
    assert splits(1, 2**20, num_splits=5) == 5 and splits(1, 130, num_splits=5) == 3
    monkeypatch.setattr(kernels, "LEAST_KEYS", 16)
    monkeypatch.setattr(kernels, "LEAST_KEYS_A_ROW", 1)
    tile(monkeypatch)
    step = KernelStep(FEATURES["sinks"], new=3, lengths=(70, 0, 33), heads=(2, 1))
    step.check(step.run())


@pytest.mark.parametrize(
    ("heads", "dim"),
    [((1, 1), (1, 1)), ((7, 1), (17, 5)), ((4, 4), (80, 96)), ((2, 1), (192, 128)), ((2, 2), (12, 40))],
)
@pytest.mark.parametrize("piece", [16, 256])
def test_heads(heads, dim, piece, monkeypatch):
    tile(monkeypatch, piece=piece)
    step = KernelStep(FEATURES["RoPE"] if dim[0] > 1 else {}, new=2, lengths=(35, 5), heads=heads, dim=dim)
    step.check(step.run())


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, (576, 512)), (torch.float32, (72, 64))])
@pytest.mark.parametrize("place", ["first", "last", "elsewhere"])
def test_values_that_are_channels_of_the_keys(place, dtype, dim, monkeypatch):
    """Latent attention: written twice, and read once."""
    tile(monkeypatch, 32)
    step = KernelStep({}, dtype, 2, 16, (20, 5), (20, 1), dim)
    first = dict(first=0, last=dim[0] - dim[1], elsewhere=0)[place]
    step.values = [x[..., first : first + dim[1]] for x in step.keys]
    step.v_cache = step.k_cache[..., first : first + dim[1]]
    if place == "elsewhere":
        step.v_cache = step.v_cache.clone()
    else:
        step.inside = first
    inside = set()
    place_in_keys = kernels._place_in_keys
    monkeypatch.setattr(kernels, "_place_in_keys", lambda *x: inside.add(place_in_keys(*x)) or place_in_keys(*x))
    step.check(step.run())
    assert inside == {-1 if place == "elsewhere" else first}


def places(step, entry, keys):
    """The rows at which an entry's keys lie in a cache that is flat in its first two dimensions."""
    if step.block_table is None:
        return {entry * step.k_cache.shape[1] + key for key in keys}
    return {
        step.block_table[entry, key // step.page_size].item() * step.page_size + key % step.page_size for key in keys
    }


@pytest.mark.skipif(GPU, reason="needs a GPU to be absent")
@pytest.mark.parametrize(("page_size", "splits"), [(None, 1), (3, 3), (16, 1), (64, 2)])
@pytest.mark.parametrize(
    ("window", "new"), [((None, None), 1), ((9, None), 1), ((9, 0), 5), ((None, 2), 5), ((4, 0), 20)]
)
def test_what_is_read(window, new, page_size, splits, monkeypatch):
    """The keys that some query sees, and no other; and of the block table what leads to them."""
    tile(monkeypatch, 16, 32)
    monkeypatch.setattr(kernels, "_check_values", lambda *arguments: None)  # it reads all pages that lengths need
    step = KernelStep(dict(window=window), new=new, page_size=page_size, lengths=(65, 3), heads=(1, 1), dim=(16, 16))
    step.run()
    step.v_cache[step.place(0, 64 + new)] = math.nan  # computed again with care, where tokens see different keys
    loaded = []

    class Spy:
        store = staticmethod(triton.runtime.interpreter._interpreter.store)

        @staticmethod
        def load(pointers, mask, other, dtype, load=triton.runtime.interpreter._interpreter.load):
            loaded.append(np.broadcast_to(pointers, mask.shape)[mask])
            return load(pointers, mask, other, dtype)

    monkeypatch.setattr(triton.runtime.interpreter, "_interpreter", Spy)
    lengths = step.lengths + new
    attention_decode(
        step.q, step.k_cache, step.v_cache, lengths, block_table=step.block_table, window=window, num_splits=splits
    )
    loaded = np.unique(np.concatenate([x.astype(np.int64) for x in loaded]))

    def rows_of(x, size):
        inside = (loaded >= x.data_ptr()) & (loaded < x.data_ptr() + x.numel() * x.element_size())
        return {*((loaded[inside] - x.data_ptr()) // (size * x.element_size())).tolist()}

    left, right = window
    expected, pages = set(), set()
    for entry, length in enumerate(lengths.tolist()):
        seen = {
            key for place in range(length - new, length) for key in range(length)
            if (left is None or key >= place - left) and (right is None or key <= place + right)
        }  # fmt: skip
        expected |= places(step, entry, seen)
        if page_size:
            pages |= {entry * step.block_table.shape[1] + key // page_size for key in seen}
    for cache in (step.k_cache, step.v_cache):
        assert rows_of(cache, cache.shape[3]) == expected
    if page_size:
        assert rows_of(step.block_table, 1) == pages


@pytest.mark.parametrize(
    ("features", "new", "page_size", "dtype"),
    [
        (FEATURES["RoPE"], 3, None, torch.float32),
        (FEATURES["RoPE"], 20, 3, torch.float16),
        (EVERYTHING, 1, 16, torch.float32),
        (EVERYTHING, 17, None, torch.float16),
        ({}, 2, 1, torch.float16),
    ],
)
def test_what_the_cache_holds_afterwards(features, new, page_size, dtype, monkeypatch):
    """The new keys, turned, and values behind the old ones, and not one bit else."""
    tile(monkeypatch)
    step = KernelStep(features, dtype, new, page_size)
    before = step.k_cache.clone(), step.v_cache.clone()
    step.run()
    written = torch.zeros(step.k_cache.shape[:2], dtype=torch.bool)
    for entry, length in enumerate(step.lengths.tolist()):
        for key in range(length, length + new):
            at = step.place(entry, key)
            written[at] = True
            turned = step.turned_keys(entry)[0, key]
            torch.testing.assert_close(step.k_cache[at].float(), turned.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert torch.equal(step.v_cache[at], step.values[entry][0, key])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for cache, old in zip((step.k_cache, step.v_cache), before, strict=True):
        assert torch.equal(cache[~written].view(bits), old[~written].view(bits))


@pytest.mark.parametrize("interleaved", [False, True])
def test_appending_to_caches_that_share_memory(interleaved):
    """The values stay, as they do where writes come one after the other; and NaN is kept too."""
    k, v = torch.randn(2, 3, 1, 24), torch.randn(2, 3, 1, 16)
    k[0, 1, 0, 20] = v[1, 2, 0, 3] = math.nan
    lengths, rotary = torch.tensor([4, 0], dtype=torch.int32), rotary_tables(9, 20)
    caches = [torch.full((2, 8, 1, 24), math.nan) for _ in range(2)]
    for cache, function in zip(caches, (kernels.attention_append, append_reference), strict=True):
        arguments = on_device((k, v, cache, lengths, *rotary))
        k_cache = arguments[2]
        function(*arguments[:3], k_cache[..., 8:], arguments[3], None, *arguments[4:], 0, interleaved)
        cache.copy_(k_cache)
    torch.testing.assert_close(*caches, equal_nan=True)


def test_strides(monkeypatch):
    """A cache with heads first, as other libraries have it; and offsets within a tile that need 64 bits."""
    tile(monkeypatch)
    step, other = (KernelStep(FEATURES["RoPE"], new=2) for _ in range(2))
    expected = step.run()
    other.k_cache, other.v_cache = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (other.k_cache, other.v_cache)
    )
    x = torch.zeros(1, 2, 1, 64, device="meta")
    assert not kernels.needs_long(128, x.as_strided((1, 2, 1, 64), (1, 2**23, 1, 1)))
    assert kernels.needs_long(128, x.as_strided((1, 2, 1, 64), (1, 2**24, 1, 1)))
    monkeypatch.setattr(kernels, "needs_long", lambda *_: True)
    for x, y in zip(other.run(), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(GPU, reason="needs a GPU to be absent: memory that nothing touches costs nothing")
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["entries or pages", "rows", "heads"])
def test_offsets_beyond_31_bits(dim, page_size, monkeypatch):
    tile(monkeypatch)
    step, far = (KernelStep({}, torch.float16, 2, page_size, (20, 5), (4, 2), (16, 16)) for _ in range(2))
    far.k_cache, far.v_cache = (far_apart(x, dim) for x in (far.k_cache, far.v_cache))
    for x, y in zip(far.run(), step.run(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["all", "everything"])
def test_every_run_gives_the_same_bits(name, monkeypatch):
    tile(monkeypatch)
    runs = [KernelStep(FEATURES.get(name, EVERYTHING), new=2, page_size=3).run(num_splits=3) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("which", "bad", "splits"),
    [
        ("q", math.nan, 1),
        ("k", math.nan, 2),
        ("k", math.inf, 1),
        ("v", math.nan, 1),
        ("v", math.nan, 2),
        ("v", math.inf, 1),
    ],
)
def test_nan_reaches_only_the_rows_that_may_see_it(which, bad, splits, monkeypatch):
    """A bad row is seen by some tokens of one entry and one head; the others keep the values they have without it."""
    tile(monkeypatch)
    new, row, lengths = 9, 25, (30, 33)
    options = dict(window=(6, 2), num_splits=splits)
    clean, spoiled = (KernelStep({}, new=new, lengths=lengths, heads=(4, 2)) for _ in range(2))
    token = torch.arange(new)
    if which == "q":
        spoiled.q[0, 3, 1] = bad
        tokens, heads = token == 3, [1]
    else:
        dict(k=spoiled.k_cache, v=spoiled.v_cache)[which][0, row, 1] = bad
        tokens, heads = (row >= token + 30 - 6) & (row <= token + 30 + 2), [2, 3]
    reached = torch.zeros(2, new, 4, dtype=torch.bool)
    reached[0, tokens] = torch.isin(torch.arange(4), torch.tensor(heads))
    assert 0 < reached.sum() < reached.numel() / 4
    for name, x, y in zip(("out", "lse"), spoiled.run(**options), clean.run(**options), strict=True):
        if name == "lse":
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        touched = reached if (name, which) != ("lse", "v") else torch.zeros_like(reached)
        # Not bit for bit: a block with a bad row is computed again in narrower blocks.
        torch.testing.assert_close(x[~touched], y[~touched], rtol=1e-5, atol=1e-6)
        if name == "out":
            assert (~x[touched].isfinite()).any(-1).all(), "the bad row is hidden"


def test_nothing_there():
    """No keys: zeros and -inf, or the sink. No queries, no entries, no capacity, no new rows: nothing."""
    q, cache = on_device((torch.randn(2, 1, 4, 8), torch.full((2, 5, 2, 8), math.nan)))
    none, sinks = on_device((torch.zeros(2, dtype=torch.int32), torch.arange(4.0)))
    for splits in (1, 2):
        for k_cache in (cache, cache[:, :0]):
            out, lse = attention_decode(q, k_cache, k_cache, none, return_lse=True, num_splits=splits)
            assert (out == 0).all() and (lse == -math.inf).all()
            out, lse = attention_decode(q, k_cache, k_cache, none, sinks=sinks, return_lse=True, num_splits=splits)
            assert (out == 0).all() and torch.allclose(lse, sinks[:, None])
    assert attention_decode(q[:, :0], cache, cache, none).shape == (2, 0, 4, 8)
    assert attention_decode(q[:0], cache[:0], cache[:0], none[:0]).shape == (0, 1, 4, 8)
    nothing = cache[:, :0]
    assert (attention_decode(q, cache, cache, none, k=nothing, v=nothing) == 0).all() and cache.isnan().all()


WEIGHTS = [
    Case(1, 20, 37),
    Case(1, 18, 40, 4, 2, causal=True),
    Case(1, 37, 20, 2, 1, causal=True),  # the first queries see nothing
    Case(1, 20, 50, 2, 2, window=(7, 3), softcap=2.0, alibi="heads"),
    Case(2, 17, 20, 2, 1, 33, key_lengths=(0, 17), relative=(8, 20)),
    Case(2, 20, 33, 2, 1, rotary_dim=10, rotary_interleaved=True, rotary_offset="ids"),
    Case(1, 5, 33, 2, 1, 80, rotary_dim=16, rotary_offset=11, sinks=True, causal=True),
    Case(
        2, 9, 50, 4, 2, 24, causal=True, window=(30, None), softcap=5.0, key_lengths=(50, 40), alibi="batch",
        relative=(16, 40), rotary_dim=8, sinks=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in WEIGHTS] + [(WEIGHTS[i], torch.float16) for i in (1, 5)],
    ids=str,
)
def test_weights(case, dtype):
    """All rows and some, with and without the lse that attention gave. Unit vectors as values give the weights."""
    tensors, options = make_inputs(case, dtype)
    wide = {name: x.double() for name, x in tensors.items()}
    unit = torch.eye(case.seqlen_k, dtype=torch.float64)[None, :, None].expand(case.batch, -1, case.kv_heads, -1)
    expected, lse = eager_attention(**wide | {"v": unit}, **options)
    expected = expected.transpose(1, 2)  # (B, H, Sq, Sk)
    peer = eager_attention(**tensors | {"v": unit.to(dtype)}, **options)[0].transpose(1, 2)
    tensors |= {name: in_a_sea_of_nan(tensors[name]) for name in "qk"}
    for entry, length in enumerate(case.key_lengths or ()):
        tensors["k"][entry, length:] = math.nan
    del tensors["v"]
    arguments = {name: on_device(x) for name, x in (tensors | options).items()}
    rows = torch.tensor([case.seqlen_q - 1, 0, case.seqlen_q // 2, 0])
    for chosen, known in ((None, None), (rows, lse.float())):
        exact, theirs = (x if chosen is None else x[:, :, chosen] for x in (expected, peer))
        weights = attention_weights(**arguments, rows=on_device(chosen), lse=on_device(known)).cpu()
        assert weights.shape == exact.shape and weights.dtype == torch.float32
        assert errors(weights, exact)[0] <= 2 * errors(theirs, exact)[0] + 1e-6


def test_weights_of_nothing_and_hidden_nan():
    q, k = on_device((torch.randn(2, 18, 4, 8), torch.randn(2, 21, 2, 8)))
    for queries, keys in ((q[:0], k[:0]), (q[:, :0], k), (q, k[:, :0])):
        assert attention_weights(queries, keys).shape == (queries.shape[0], 4, queries.shape[1], keys.shape[1])
    assert attention_weights(q, k, rows=torch.zeros(0, dtype=torch.int32, device=DEVICE)).shape == (2, 4, 0, 21)
    clean = attention_weights(q, k, causal=True)
    q[0, 3, 1] = k[1, 20, 1] = math.nan
    spoiled = attention_weights(q, k, causal=True)
    bad = torch.zeros_like(clean, dtype=torch.bool)
    bad[0, 1, 3, :7] = bad[1, 2:, 17] = True
    assert torch.equal(spoiled.isnan(), bad) and torch.equal(spoiled[~bad], clean[~bad])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("new", "page_size"), [(1, None), (1, 16), (7, 1), (300, 256)])
@pytest.mark.parametrize(
    ("heads", "dim"), [((32, 8), (128, 128)), ((8, 8), (64, 64)), ((10, 2), (80, 256)), ((128, 1), (576, 512))]
)
@pytest.mark.parametrize("name", ["causal", "all", "everything"])
def test_on_a_gpu(name, heads, dim, new, page_size, dtype):
    step = KernelStep(FEATURES.get(name, EVERYTHING), dtype, new, page_size, (1500, 3, 700), heads, dim)
    step.check(step.run())
