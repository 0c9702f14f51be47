"""The caches: attention_decode over them equals full attention, and no page is lost or shared wrongly."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from pynlp.functional import attention, attention_decode
from pynlp.nn import KVCache, OutOfPages, PagedKVCache

HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 4, 2, 6, 3


def rows(batch, tokens, heads=KV_HEADS, head_dim=HEAD_DIM):
    return torch.randn(batch, tokens, heads, head_dim, dtype=torch.float64)


def filled(cache):
    """The cache, NaN wherever nothing has been written."""
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def contiguous(**options):
    return filled(KVCache(2, 16, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V, dtype=torch.float64, **options))


def paged(pages=8, **options):
    return filled(PagedKVCache(pages, 4, KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V, dtype=torch.float64, **options))


def write(layer, k, v):
    """The new rows of one layer, by an attention without queries."""
    empty = k.new_empty(k.shape[0], 0, HEADS, k.shape[3])
    attention_decode(empty, layer.k, layer.v, layer.lengths, k=k, v=v, block_table=layer.block_table)


def read(cache, sequence, layer=0):
    """All keys and values of a sequence, gathered by its block table."""
    step = cache.append([sequence], 0)[layer]
    pages = step.block_table[0].long()
    return tuple(pool[pages].flatten(0, 1)[: cache.length(sequence)] for pool in (step.k, step.v))


@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (5, 1, 0, 3, 2)])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_decoding_equals_full_attention(kind, chunks):
    """In each of two layers, whose keys and values differ."""
    if kind == "paged":
        cache = paged(layers=2)
        sequences = [cache.allocate(), cache.allocate()]
    else:
        cache = contiguous(layers=2)
    q, k, v = (torch.stack([rows(2, 11, *shape) for _ in range(2)]) for shape in ((HEADS,), (), (KV_HEADS, HEAD_DIM_V)))
    outs, at = [], 0
    for tokens in chunks:
        step = cache.append(sequences, tokens) if kind == "paged" else cache.append(tokens)
        new = slice(at, at + tokens)
        outs.append(
            [
                attention_decode(
                    q[i, :, new], layer.k, layer.v, layer.lengths, k=k[i, :, new], v=v[i, :, new],
                    block_table=layer.block_table, causal=True,
                )
                for i, layer in enumerate(step)
            ]
        )  # fmt: skip
        at += tokens
    for i in range(2):
        out = torch.cat([step[i] for step in outs], dim=1)
        torch.testing.assert_close(out, attention(q[i], k[i], v[i], causal=True), rtol=1e-12, atol=1e-12)


def test_prompts_of_unequal_lengths_are_padded_and_cut():
    """The padding's keys are overwritten by the tokens that follow, and never seen."""
    lengths, q, k, v = [3, 7], rows(2, 9, HEADS), rows(2, 9), rows(2, 9, KV_HEADS, HEAD_DIM_V)
    contiguous_cache, paged_cache = contiguous(), paged()
    sequences = [paged_cache.allocate(), paged_cache.allocate()]
    for cache in (contiguous_cache, paged_cache):
        append = cache.append if cache is contiguous_cache else lambda tokens: paged_cache.append(sequences, tokens)
        padding = torch.arange(7)[:, None, None] >= torch.tensor(lengths)[:, None, None, None]
        write(append(7)[0], k[:, :7].masked_fill(padding, 1e6), v[:, :7].masked_fill(padding, 1e6))
        if cache is contiguous_cache:
            cache.truncate(lengths)
        else:
            assert cache.free_pages == 8 - 2 * 2
            for sequence, length in zip(sequences, lengths, strict=True):
                cache.truncate(sequence, length)
            assert cache.free_pages == 8 - 1 - 2
        (layer,) = append(2)
        assert layer.lengths.tolist() == lengths
        new = torch.tensor([[3, 4], [7, 8]])
        q_new, k_new, v_new = (torch.stack([x[b, new[b]] for b in range(2)]) for x in (q, k, v))
        out = attention_decode(
            q_new, layer.k, layer.v, layer.lengths, k=k_new, v=v_new, block_table=layer.block_table, causal=True
        )
        for b, length in enumerate(lengths):
            seen = slice(b, b + 1), slice(length + 2)
            expected = attention(q[seen][:, length:], k[seen], v[seen], causal=True)
            torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-12, atol=1e-12)


def test_selected_entries_go_on_from_their_own_histories():
    """Named twice, not at all, or in another order; unequal lengths, in two layers; copied, moved and given back."""
    cache = contiguous(layers=2)
    written = [(rows(2, 5), rows(2, 5, KV_HEADS, HEAD_DIM_V)) for _ in range(2)]
    before = cache.append(5)
    for layer, (k, v) in zip(before, written, strict=True):
        write(layer, k, v)
    cache.truncate([5, 2])
    histories = [[(k[0], v[0]), (k[1, :2], v[1, :2])] for k, v in written]
    pages = []
    for chosen in ([1, 0, 1], [2, 2, 1, 0], [3, 0, 1], [2, 0, 2, 1], [1, 1, 1, 0], [3], [0, 0]):
        cache.select(torch.tensor(chosen))
        histories = [[layer[row] for row in chosen] for layer in histories]
        assert cache.lengths == [len(k) for k, _ in histories[0]]
        new = [(rows(len(chosen), 1), rows(len(chosen), 1, KV_HEADS, HEAD_DIM_V)) for _ in range(2)]
        for i, layer in enumerate(cache.append(1)):
            assert layer.k.shape[1:] == (16, KV_HEADS, HEAD_DIM) and not layer.empty
            write(layer, *new[i])
            places = range(len(chosen)) if layer.block_table is None else layer.block_table.squeeze(1).tolist()
            for row, (k, v) in enumerate(histories[i]):
                k, v = torch.cat((k, new[i][0][row])), torch.cat((v, new[i][1][row]))
                place = places[row]
                assert torch.equal(layer.k[place, : len(k)], k) and torch.equal(layer.v[place, : len(v)], v)
                histories[i][row] = k, v
        pages.append(len(layer.k))
    assert pages == [3, 4, 4, 4, 4, 1, 2]
    assert cache.nbytes == contiguous(layers=2).nbytes


def test_selecting_nothing_leaves_a_cache_of_no_entries():
    cache = contiguous()
    cache.append(3)
    cache.select(torch.empty(0, dtype=torch.int64))
    (layer,) = cache.append(16)
    assert cache.lengths == [] and layer.k.shape[:2] == (0, 16) and layer.lengths.shape == (0,)


def test_lengths_and_emptiness_of_a_step():
    cache = contiguous()
    (first,) = cache.append(3)
    assert first.empty and first.lengths.tolist() == [0, 0] and first.block_table is None
    cache.truncate([0, 2])
    (second,) = cache.append(1)
    assert not second.empty and second.lengths.tolist() == [0, 2] and second.lengths.dtype == torch.int32
    assert cache.lengths == [1, 3]
    cache.truncate([0, 0])
    assert cache.append(16)[0].empty


def test_block_tables_hold_the_pages_in_order():
    cache = paged()
    long, short, none = (cache.allocate() for _ in range(3))
    cache.append([long], 9)
    cache.append([short], 2)
    (layer,) = cache.append([short, none, long], 0)
    table = layer.block_table
    assert table.dtype == torch.int32 and table.shape == (3, 3) and layer.lengths.tolist() == [2, 0, 9]
    assert (table[0] >= 0).tolist() == [True, False, False] and (table[1] == -1).all()
    assert len(set(table[2].tolist()) | {table[0, 0].item()}) == 4 == 8 - cache.free_pages
    (layer,) = cache.append([none], 0)
    assert layer.block_table.shape == (1, 0) and layer.empty


def test_forks_share_pages_until_one_writes():
    cache = paged(layers=2)
    parent = cache.allocate()
    k, v = rows(1, 6), rows(1, 6, KV_HEADS, HEAD_DIM_V)
    for i, layer in enumerate(cache.append([parent], 6)):
        write(layer, k + i, v + i)
    whole, half = cache.fork(parent), cache.fork(parent, 3)
    assert cache.free_pages == 8 - 2
    assert cache.length(whole) == 6 and cache.length(half) == 3
    # All three write: `half` to its copy of page 0, two of the others to copies of page 1, the last one in place.
    step = cache.append([parent, half, whole], 1)
    assert cache.free_pages == 8 - 2 - 1 - 1
    new_k, new_v = rows(3, 1), rows(3, 1, KV_HEADS, HEAD_DIM_V)
    for i, layer in enumerate(step):
        write(layer, new_k + i, new_v + i)
    for i in range(2):
        for place, (sequence, length) in enumerate(((parent, 6), (half, 3), (whole, 6))):
            their_k, their_v = read(cache, sequence, i)
            assert torch.equal(their_k, torch.cat((k[0, :length], new_k[place])) + i)
            assert torch.equal(their_v, torch.cat((v[0, :length], new_v[place])) + i)
    for sequence in (parent, half, whole):
        cache.free(sequence)
    assert cache.free_pages == 8


def test_a_full_page_is_shared_for_good():
    cache = paged()
    parent = cache.allocate()
    cache.append([parent], 4)
    child = cache.fork(parent)
    (layer,) = cache.append([parent, child], 1)
    assert layer.block_table[0, 0] == layer.block_table[1, 0] and layer.block_table[0, 1] != layer.block_table[1, 1]
    assert cache.free_pages == 8 - 3


def test_out_of_pages_changes_nothing():
    cache = paged(pages=4)
    first, second = cache.allocate(), cache.allocate()
    (layer,) = cache.append([first], 6)
    write(layer, rows(1, 6), rows(1, 6, KV_HEADS, HEAD_DIM_V))
    child = cache.fork(first)
    k, v = cache.k.clone(), cache.v.clone()
    with pytest.raises(OutOfPages, match="append: expected 5 free pages for the new tokens, got 2") as error:
        cache.append([first, child, second], 5)
    assert (error.value.needed, error.value.free) == (5, 2)
    assert [cache.length(sequence) for sequence in (first, child, second)] == [6, 6, 0] and cache.free_pages == 2
    torch.testing.assert_close((cache.k, cache.v), (k, v), rtol=0, atol=0, equal_nan=True)
    cache.append([first, child], 1)  # one copy: the pages are there
    assert cache.free_pages == 1


def test_bytes():
    tokens = 2 * 16
    assert contiguous(layers=3).nbytes == 3 * tokens * KV_HEADS * (HEAD_DIM + HEAD_DIM_V) * 8
    assert paged(layers=3).nbytes == 3 * tokens * KV_HEADS * (HEAD_DIM + HEAD_DIM_V) * 8
    assert KVCache(2, 16, 1, 5, dtype=torch.bfloat16).nbytes == tokens * 2 * 5 * 2
    assert PagedKVCache(8, 4, 1, 5, head_dim_v=0).nbytes == tokens * 5 * 4


@pytest.mark.parametrize("name", ["layers", "batch", "capacity", "kv_heads", "head_dim"])
def test_contiguous_refuses_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        KVCache(**{**dict(batch=2, capacity=8, kv_heads=2, head_dim=4), name: 0})


@pytest.mark.parametrize("name", ["layers", "pages", "page_size", "kv_heads", "head_dim"])
def test_paged_refuses_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        PagedKVCache(**{**dict(pages=2, page_size=8, kv_heads=2, head_dim=4), name: 0})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cache: cache.append(-1), "tokens: expected 0 or more, got -1"),
        (lambda cache: cache.append(8), "tokens: expected at most 7, the room behind the longest entry, got 8"),
        (lambda cache: cache.truncate([3]), "lengths: expected one for each of 2 entries, got 1"),
        (lambda cache: cache.truncate([4, 5]), "lengths: expected 0 to the 4 tokens that are there, got 5"),
        (lambda cache: cache.truncate([-1, 4]), "lengths: expected 0 to the 9 tokens that are there, got -1"),
        (lambda cache: cache.select(torch.tensor([0, 2])), "rows: expected entries 0 to 1, got 2"),
        (lambda cache: cache.select(torch.tensor([-1, 0])), "rows: expected entries 0 to 1, got -1"),
        (
            lambda cache: cache.select(torch.tensor([[0]])),
            r"rows: expected int64 of shape .*, got .*\(1, 1\)",
        ),
        (lambda cache: cache.select(torch.tensor([True])), "rows: expected int64 of shape .*, got torch.bool"),
    ],
)
def test_contiguous_refuses_bad_calls_and_stays_as_it_was(call, message):
    cache = contiguous()
    cache.append(9)
    cache.truncate([9, 4])
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.lengths == [9, 4]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cache: cache.append([0], -1), "tokens: expected 0 or more, got -1"),
        (lambda cache: cache.append([0, 7], 1), "sequence: expected one that was allocated and not freed, got 7"),
        (lambda cache: cache.append([0, 0], 1), r"sequences: expected each one once, got \[0, 0\]"),
        (lambda cache: cache.free(1), "sequence: expected one that was allocated and not freed, got 1"),
        (lambda cache: cache.fork(1), "sequence: .* got 1"),
        (lambda cache: cache.length(1), "sequence: .* got 1"),
        (lambda cache: cache.truncate(1, 0), "sequence: .* got 1"),
        (lambda cache: cache.fork(0, 6), "length: expected 0 to the 5 tokens that are there, got 6"),
        (lambda cache: cache.fork(0, -1), "length: expected 0 to the 5 tokens that are there, got -1"),
        (lambda cache: cache.truncate(0, 6), "length: expected 0 to the 5 tokens that are there, got 6"),
    ],
)
def test_paged_refuses_bad_calls_and_stays_as_it_was(call, message):
    """Sequence 0 has 5 tokens; 1 was freed, and its number never comes back."""
    cache = paged()
    cache.append([cache.allocate()], 5)
    cache.append([cache.allocate()], 5)
    cache.free(1)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.length(0) == 5 and cache.free_pages == 6 and cache.allocate() == 2


def test_refuses_a_negative_head_dim_v():
    with pytest.raises(ValueError, match="head_dim_v: expected 0 or more, got -1"):
        KVCache(2, 8, 2, 4, head_dim_v=-1)


class PagedCacheMachine(RuleBasedStateMachine):
    """PagedKVCache beside plain lists of rows, under any order of calls."""

    PAGES, PAGE_SIZE = 10, 3
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.cache = filled(PagedKVCache(self.PAGES, self.PAGE_SIZE, 1, 2, head_dim_v=1, layers=2, dtype=torch.float64))
        self.model = {}  # of each sequence its keys (tokens, 2)
        self.written = 0

    @initialize(target=sequences, tokens=st.integers(1, 8))
    def start(self, tokens):
        """A long sequence and two forks of it, so that most runs share pages."""
        parent = self.allocate()
        self.append([parent], tokens)
        return multiple(parent, self.fork(parent, tokens), self.fork(parent, tokens // 2))

    @rule(target=sequences)
    def allocate(self):
        sequence = self.cache.allocate()
        self.model[sequence] = torch.empty(0, 2, dtype=torch.float64)
        return sequence

    @rule(target=sequences, parent=sequences, most=st.integers(0, 12))
    def fork(self, parent, most):
        length = min(most, len(self.model[parent]))
        child = self.cache.fork(parent, length)
        self.model[child] = self.model[parent][:length]
        return child

    @rule(sequence=sequences, most=st.integers(0, 12))
    def truncate(self, sequence, most):
        length = min(most, len(self.model[sequence]))
        self.cache.truncate(sequence, length)
        self.model[sequence] = self.model[sequence][:length]

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.model[sequence]
        with pytest.raises(ValueError, match="sequence: expected one that was allocated and not freed"):
            self.cache.free(sequence)

    @rule(batch=st.lists(sequences, min_size=1, max_size=4, unique=True), tokens=st.integers(0, 4))
    def append(self, batch, tokens):
        tables = self.tables(batch)
        # What must be free: pages for the rows behind the last page, and a copy of each page that is to be written to
        # while anyone else holds it. Of those that write, the last to hold a page alone writes in place.
        needed = sum(-(-(len(self.model[s]) + tokens) // self.PAGE_SIZE) - len(tables[s]) for s in batch)
        everyone = self.tables(self.model)
        partial = [tables[s][-1] for s in batch if tokens and len(self.model[s]) % self.PAGE_SIZE]
        for page in set(partial):
            holders = sum(page in table for table in everyone.values())
            needed += min(partial.count(page), holders - 1)
        if needed > self.cache.free_pages:
            with pytest.raises(OutOfPages) as error:
                self.cache.append(batch, tokens)
            assert (error.value.needed, error.value.free) == (needed, self.cache.free_pages)
            assert self.tables(self.model) == everyone
            return
        free = self.cache.free_pages
        step = self.cache.append(batch, tokens)
        assert self.cache.free_pages == free - needed
        count = len(batch) * tokens * 2
        new = torch.arange(self.written, self.written + count, dtype=torch.float64).view(len(batch), tokens, 1, 2)
        self.written += count
        for i, layer in enumerate(step):
            write(layer, new + i / 4, -new[..., :1] - i / 4)
        for place, sequence in enumerate(batch):
            self.model[sequence] = torch.cat((self.model[sequence], new[place, :, 0]))

    def tables(self, sequences):
        if not sequences:
            return {}
        (layer, _) = self.cache.append(list(sequences), 0)
        return {s: [p for p in table if p >= 0] for s, table in zip(sequences, layer.block_table.tolist(), strict=True)}

    @invariant()
    def keys_and_values_are_those_written(self):
        for sequence, expected in self.model.items():
            for i in range(2):
                k, v = read(self.cache, sequence, i)
                assert torch.equal(k[:, 0], expected + i / 4)
                assert torch.equal(v[:, 0], -expected[:, :1] - i / 4)

    @invariant()
    def no_page_is_lost_or_too_many(self):
        tables = self.tables(self.model)
        for sequence, table in tables.items():
            assert len(table) == len(set(table)) == -(-len(self.model[sequence]) // self.PAGE_SIZE)
        used = {page for table in tables.values() for page in table}
        assert used <= set(range(self.PAGES)) and self.cache.free_pages == self.PAGES - len(used)

    def teardown(self):
        for sequence in list(self.model):
            self.cache.free(sequence)
        assert self.cache.free_pages == self.PAGES


TestPagedCacheMachine = PagedCacheMachine.TestCase
TestPagedCacheMachine.settings = settings(max_examples=100, stateful_step_count=20)
