"""Caches of keys and values: each entry with memory of its own, or sequences in pages that they share.

A step of decoding is the same with both. `append` makes room for the new tokens and gives each layer a `LayerCache`, to
which the layer writes its keys and values. All layers of a model share one set of lengths and pages.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's view of a cache for one step: arguments of `pynlp.functional.attention_decode`, and two facts.

    Attributes:
        k, v: `(batch, capacity, kv_heads, head_dim)`, `(.., head_dim_v)`; or `(pages, page_size, kv_heads, head_dim)`.
        lengths: int32 `(batch,)`, each entry's tokens before the step.
        block_table: int32 `(batch, pages)`, the pages of each entry in order, -1 behind the last; None where entry i is
            row i of k and v.
        tokens: New tokens of each entry, for which there is room.
        empty: Whether all lengths are 0: known without asking the device.

    Example:
        >>> from pynlp.nn import KVCache
        >>> first, second = KVCache(batch=1, capacity=128, kv_heads=2, head_dim=64, layers=2).append(5)
        >>> first.tokens, first.lengths.tolist(), first.empty
        (5, [0], True)
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    block_table: Tensor | None
    tokens: int
    empty: bool

    def check(self, dropout: float, x: Tensor, *projected: Tensor) -> None:
        """Raise ValueError unless x has the cache's entries and new tokens, without gradients or dropout.

        Args:
            dropout: What the layer would drop.
            x: `(batch, seqlen, embed_dim)`.
            projected: The queries, keys and values of x.
        """
        if x.shape[0] != self.lengths.shape[0]:
            raise ValueError(f"x: expected {self.lengths.shape[0]} rows, the entries of the cache, got {x.shape[0]}")
        if x.shape[1] != self.tokens:
            raise ValueError(f"x: expected the {self.tokens} tokens that were appended to the cache, got {x.shape[1]}")
        if torch.is_grad_enabled() and any(p.requires_grad for p in projected):
            raise ValueError("cache: expected a call under torch.no_grad(), as decoding has no gradients")
        if dropout > 0:
            raise ValueError(f"cache: expected evaluation mode, as decoding drops nothing, got dropout={dropout}")


def check_layer_cache(cache: object) -> None:
    if not isinstance(cache, LayerCache):
        raise TypeError(
            f"cache: expected this layer's part of what `append` of a KVCache or PagedKVCache gave, "
            f"got {type(cache).__name__}"
        )


class OutOfPages(RuntimeError):
    """A `PagedKVCache` has fewer free pages than a call needs; the cache is as it was before.

    Attributes:
        needed, free: Pages.

    Example:
        >>> from pynlp.nn import OutOfPages, PagedKVCache
        >>> cache = PagedKVCache(pages=4, page_size=16, kv_heads=2, head_dim=64)
        >>> try:
        ...     cache.append([cache.allocate()], 100)
        ... except OutOfPages as error:
        ...     print(error.needed, error.free)
        7 4
    """

    def __init__(self, needed: int, free: int):
        super().__init__(f"append: expected {needed} free pages for the new tokens, got {free}")
        self.needed, self.free = needed, free


class KVCache:
    """Keys and values of a batch, with room for `capacity` tokens an entry.

    An entry is a page of memory of its own. Where entries change places or leave, only a table of pages changes.

    Args:
        batch, capacity: Entries, and the most tokens of each.
        kv_heads, head_dim: Sizes of the keys; a module's `cache_shape` has what it needs.
        head_dim_v: Size of the values; `head_dim` by default, 0 if they are channels of the keys (latent attention).
        layers: Layers, all of one shape.

    Attributes:
        k, v: `(layers, pages, capacity, kv_heads, head_dim)` and `(.., head_dim_v)`; at first page i is entry i's.
        lengths: Tokens of each entry.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.nn import KVCache, MultiHeadAttention
        >>> layer = MultiHeadAttention(256, heads=8, positions="rope", causal=True).eval()
        >>> cache = KVCache(2, 128, **layer.cache_shape)  # 2 entries with room for 128 tokens, one layer
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(2, 10, 256), cache=cache.append(10)[0])  # the prompts
        ...     y = layer(torch.randn(2, 1, 256), cache=cache.append(1)[0])  # one token more
        >>> cache.lengths
        [11, 11]
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        sizes = dict(layers=layers, batch=batch, capacity=capacity, kv_heads=kv_heads, head_dim=head_dim)
        self.k, self.v = _pools(sizes, head_dim_v, dtype, device)
        self.lengths = [0] * batch
        self._pages = list(range(batch))  # of each entry

    def append(self, tokens: int) -> list[LayerCache]:
        """Make room for `tokens` more tokens in every entry.

        Returns:
            One view a layer, in the order of the layers: `append(tokens)[0]` is the first layer's, and all there is for
            a cache of one.

        Prompts of unequal lengths are padded at their ends, and the padding is cut off afterwards by `truncate`: right
        for causal models, whose tokens do not see it.

        Raises:
            ValueError: `tokens` is negative, or more than there is room for. Nothing has changed then.
        """
        _check_count("tokens", tokens)
        capacity = self.k.shape[2]
        room = capacity - max(self.lengths, default=0)
        if tokens > room:
            raise ValueError(f"tokens: expected at most {room}, the room behind the longest entry, got {tokens}")
        in_order = self._pages == list(range(self.k.shape[1]))
        tables = None if in_order else [[page] for page in self._pages]
        layers = _layers(self.k, self.v, self.lengths, tables, tokens)
        self.lengths = [length + tokens for length in self.lengths]
        return layers

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths` tokens of each entry.

        Raises:
            ValueError: a length is negative or more than there is. Nothing has changed then.
        """
        if len(lengths) != len(self.lengths):
            raise ValueError(f"lengths: expected one for each of {len(self.lengths)} entries, got {len(lengths)}")
        for length, there in zip(lengths, self.lengths, strict=True):
            _check_length("lengths", length, there)
        self.lengths = list(lengths)

    def select(self, rows: Tensor) -> None:
        """Make entry i a continuation of old entry `rows[i]`; an entry may be named several times or not at all.

        An entry named again is copied, into pages that have become free or into new memory; when more than half of the
        pages are free they are given back. Views from before are of no use any more.

        Args:
            rows: int64 or int32 `(new_batch,)`.

        Raises:
            ValueError: rows is no such tensor, or names an entry that there is not. Nothing has changed then.
        """
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows: expected int64 of shape (new_batch,), got {rows.dtype} {tuple(rows.shape)}")
        chosen = rows.tolist()
        for row in chosen:
            if not 0 <= row < len(self.lengths):
                raise ValueError(f"rows: expected entries 0 to {len(self.lengths) - 1}, got {row}")
        pages = [self._pages[row] for row in chosen]
        first = {page: entry for entry, page in reversed(list(enumerate(pages)))}
        again = [entry for entry, page in enumerate(pages) if first[page] != entry]
        free = [page for page in range(self.k.shape[1]) if page not in first]
        longest = max(self.lengths, default=0)  # there is nothing behind it that would need copying
        if len(again) > len(free) or 2 * len(pages) < self.k.shape[1]:
            order = torch.tensor(pages, dtype=torch.int64, device=self.k.device)
            self.k, self.v = (_selected(pool, order, longest) for pool in (self.k, self.v))
            pages = list(range(len(pages)))
        elif again:
            sources, targets = [pages[entry] for entry in again], free[: len(again)]
            for pool in (self.k, self.v):
                pool[:, targets, :longest] = pool[:, sources, :longest]
            for entry, page in zip(again, targets, strict=True):
                pages[entry] = page
        self._pages = pages
        self.lengths = [self.lengths[row] for row in chosen]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class PagedKVCache:
    """Keys and values of sequences that come and go, in pages of a common pool.

    A sequence has the pages that its length needs, and sequences with a common beginning share them. A page that
    several hold is copied before one of them writes to it.

    Args:
        pages, page_size: Pages of the pool, and the tokens of each.
        kv_heads, head_dim, head_dim_v, layers: As in `KVCache`. A page holds its tokens' keys and values of all layers.

    Attributes:
        k, v: `(layers, pages, page_size, kv_heads, head_dim)` and `(.., head_dim_v)`.

    Raises:
        ValueError: an argument is out of range, or a sequence is not there (any more); the message names it.

    Source: Kwon et al., arXiv 2309.06180.

    Example:
        >>> from pynlp.nn import PagedKVCache
        >>> cache = PagedKVCache(pages=8, page_size=16, kv_heads=2, head_dim=64, layers=3)
        >>> prompt = cache.allocate()
        >>> views = cache.append([prompt], 40)  # one a layer, for its `cache` argument
        >>> other = cache.fork(prompt)  # another continuation: shares the prompt's pages
        >>> cache.free_pages, cache.length(other)
        (5, 40)
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        sizes = dict(layers=layers, pages=pages, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim)
        self.k, self.v = _pools(sizes, head_dim_v, dtype, device)
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))  # a stack
        self._holders = [0] * pages  # how many sequences hold each page
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0  # numbers are not used again, so that a stale one is always an error

    def allocate(self) -> int:
        """Add a sequence without tokens and pages; returns its number."""
        return self._add([], 0)

    def append(self, sequences: Sequence[int], tokens: int) -> list[LayerCache]:
        """Make room for `tokens` more tokens in each of the sequences; with `tokens=0` only look at them.

        Returns:
            One view a layer, as `KVCache.append`, which also says what to do with prompts of unequal lengths.

        Raises:
            OutOfPages: too few pages are free for all of them. The cache is as it was before.
            ValueError: a sequence is not there or named twice, or `tokens` is negative. The cache is as it was before.
        """
        _check_count("tokens", tokens)
        for sequence in sequences:
            self._check(sequence)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences: expected each one once, got {list(sequences)}")
        lengths = [self._lengths[sequence] for sequence in sequences]
        copying = self._writers_to_shared_pages(sequences) if tokens else []
        growth = [
            self._pages_of(length + tokens) - len(self._pages[sequence])
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        needed = len(copying) + sum(growth)
        if needed > len(self._free):
            raise OutOfPages(needed, len(self._free))

        kept = len(self._free) - needed
        new = self._free[kept:]
        unused = reversed(new)
        tables = {sequence: list(self._pages[sequence]) for sequence in sequences}
        copied = [tables[sequence][-1] for sequence in copying]
        for sequence in copying:
            tables[sequence][-1] = next(unused)
        self._copy(copied, [tables[sequence][-1] for sequence in copying])
        for sequence, count in zip(sequences, growth, strict=True):
            tables[sequence] += islice(unused, count)
        layers = _layers(self.k, self.v, lengths, list(tables.values()), tokens)

        # From here on nothing can fail: the changes are made together or not at all.
        del self._free[kept:]
        for page in new:
            self._holders[page] = 1
        for page in copied:
            self._holders[page] -= 1
        self._pages.update(tables)
        for sequence in sequences:
            self._lengths[sequence] += tokens
        return layers

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Add a sequence that begins with the first `length` tokens of another, all by default; returns its number.

        It takes no memory: the pages are shared.
        """
        self._check(sequence)
        if length is None:
            length = self._lengths[sequence]
        _check_length("length", length, self._lengths[sequence])
        pages = self._pages[sequence][: self._pages_of(length)]
        for page in pages:
            self._holders[page] += 1
        return self._add(pages, length)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._check(sequence)
        _check_length("length", length, self._lengths[sequence])
        pages = self._pages[sequence]
        self._release(pages[self._pages_of(length) :])
        self._pages[sequence] = pages[: self._pages_of(length)]
        self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Give back the pages that no other sequence holds."""
        self._check(sequence)
        self._release(self._pages.pop(sequence))
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        self._check(sequence)
        return self._lengths[sequence]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def _add(self, pages: list[int], length: int) -> int:
        sequence = self._next
        self._next += 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _check(self, sequence: int) -> None:
        if sequence not in self._pages:
            raise ValueError(f"sequence: expected one that was allocated and not freed, got {sequence}")

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _writers_to_shared_pages(self, sequences: Sequence[int]) -> list[int]:
        """The sequences whose next token falls into a page that they must not write to."""
        writers, leaving = [], Counter()
        for sequence in sequences:
            if self._lengths[sequence] % self.page_size:
                page = self._pages[sequence][-1]
                if self._holders[page] - leaving[page] > 1:  # the last one to hold it may have it
                    leaving[page] += 1
                    writers.append(sequence)
        return writers

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        if targets:
            self.k[:, targets] = self.k[:, sources]
            self.v[:, targets] = self.v[:, sources]

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


def _pools(
    sizes: dict[str, int],
    head_dim_v: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if head_dim_v is not None:
        _check_count("head_dim_v", head_dim_v)
    *rows, head_dim = sizes.values()
    k = torch.empty(*rows, head_dim, dtype=dtype, device=device)
    return k, k.new_empty(*rows, head_dim if head_dim_v is None else head_dim_v)


def _selected(pool: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """A new pool (layers, new_batch, capacity, heads, head_dim) with the first tokens of these pages of a pool."""
    layers, _, *rest = pool.shape
    selected = pool.new_empty(layers, len(rows), *rest)
    torch.index_select(pool[:, :, :tokens], 1, rows, out=selected[:, :, :tokens])
    return selected


def _layers(
    k: Tensor, v: Tensor, lengths: Sequence[int], tables: list[list[int]] | None, tokens: int
) -> list[LayerCache]:
    block_table = None
    if tables is not None:
        width = max(map(len, tables), default=0)
        padded = [table + [-1] * (width - len(table)) for table in tables]
        block_table = torch.tensor(padded, dtype=torch.int32, device=k.device).view(len(tables), width)
    there = torch.tensor(lengths, dtype=torch.int32, device=k.device)
    return [LayerCache(*layer, there, block_table, tokens, not any(lengths)) for layer in zip(k, v, strict=True)]


def _check_count(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"{name}: expected 0 or more, got {count}")


def _check_length(name: str, length: int, there: int) -> None:
    if not 0 <= length <= there:
        raise ValueError(f"{name}: expected 0 to the {there} tokens that are there, got {length}")
