"""The keys that queries see, in the terms of `pynlp.functional.attention`, out of transformers' mask functions.

transformers describes a mask as a composition of small functions of (batch, head, query, key). The compositions that
the kernel can serve are recognised here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

BLIND = "the values of its mask cannot be looked at, as under fullgraph=True"


@dataclass(frozen=True)
class Structure:
    """The keys that queries see. At most one of `key_lengths`, `rows` and `cu_seqlens` is given.

    Args:
        shape: `(batch, seqlen_q, seqlen_k)`.
        window: `(left, right)` as in `pynlp.functional.attention`; a causal one has a right of 0.
        keys: Keys from there on are not written yet, and the last query stands before them.
        key_lengths: int32 `(B,)`, where every row's padding is behind its tokens.
        rows: int64 `(B, 2)`, where padding stands before the tokens: the first key of each row and their end.
        spans: The numbers in `rows`, where padding stands before the tokens of one row and behind those of one, too.
        cu_seqlens: int32 `(sequences + 1,)`, where packed sequences start in the B rows laid end to end, and their end.
    """

    shape: tuple[int, int, int]
    window: tuple[int | None, int | None]
    keys: int
    key_lengths: Tensor | None = None
    rows: Tensor | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    cu_seqlens: Tensor | None = None
    _kept: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def causal(self) -> bool:
        return self.window[1] == 0

    def to(self, device: torch.device) -> "Structure":
        tensors = {name: getattr(self, name) for name in ("key_lengths", "rows", "cu_seqlens")}
        return replace(self, _kept={}, **{name: x.to(device) for name, x in tensors.items() if x is not None})

    def within(self, left: int) -> "Structure":
        """The structure of queries that see no key more than `left` before their own, either."""
        own = self.window[0]
        return replace(self, window=(left if own is None else min(left, own), self.window[1]))

    def lengths(self, device: torch.device) -> Tensor:
        """int32 `(B,)`: the keys of each row, where none of them is padding in front of its tokens."""
        if self.key_lengths is not None:
            return self.key_lengths
        return self._once("lengths", lambda: torch.full(self.shape[:1], self.keys, dtype=torch.int32, device=device))

    def starts(self, copies: int, aligned: bool) -> tuple[Tensor, Tensor]:
        """Starts of the sequences of `rows` in rows laid end to end, those of the queries and of the keys.

        Each row is repeated `copies` times. It makes five sequences: queries without keys, keys without queries, the
        queries and keys that belong together, and behind them the first two again. So padding costs no work, and
        nothing has to be moved to get rid of it.

        Args:
            aligned: The last query stands at the last key, and those before the tokens are padding. Otherwise every
                query sees every key.
        """
        return self._once((copies, aligned), lambda: self._starts(copies, aligned))

    def _starts(self, copies: int, aligned: bool) -> tuple[Tensor, Tensor]:
        first_k, end_k = self.rows.repeat_interleave(copies, dim=0).unbind(1)  # (B copies,)
        none, (seqlen_q, seqlen_k) = torch.zeros_like(first_k), self.shape[1:]
        first_q, end_q = none, none + seqlen_q
        if aligned:
            first_query = self.keys - seqlen_q
            end_q = (end_k - first_query).clamp(min=0)
            first_q = (first_k - first_query).clamp(min=0).minimum(end_q)
        ends_q = torch.stack((first_q, first_q, end_q, none + seqlen_q, none + seqlen_q), 1)  # (B copies, 5)
        ends_k = torch.stack((none, first_k, end_k, end_k, none + seqlen_k), 1)
        row = torch.arange(len(first_k), device=first_k.device)[:, None]
        ends = ((ends_q + row * seqlen_q).flatten(), (ends_k + row * seqlen_k).flatten())
        return tuple(torch.cat((none[:1], end)).to(torch.int32) for end in ends)

    def _once(self, key: object, make: Callable) -> Tensor | tuple[Tensor, Tensor]:
        """What `make` makes, for all layers of a forward pass; under torch.compile the graph is shared anyway."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def structure_of(batch: int, seqlen_q: int, seqlen_k: int, first_query: int, function: Callable) -> Structure | str:
    """The structure of a mask without padding, or the reason why the kernel cannot serve it.

    Args:
        first_query: The key that the first query stands at.
    """
    pattern = _recognised(function)
    if pattern is None:
        return "its mask function is none of the causal, bidirectional, sliding-window and packed ones"
    left, right = pattern.get("left"), pattern.get("right")
    keys = min(first_query + seqlen_q, seqlen_k) if right == 0 else seqlen_k
    if (left, right) != (None, None) and first_query + seqlen_q != keys:
        return "its last query does not stand at its last key"
    structure = Structure((batch, seqlen_q, seqlen_k), (left, right), keys)
    if "sequences" not in pattern:
        return structure
    sequences = pattern["sequences"]  # (B, S): which of a row's sequences a token is of
    if seqlen_q != seqlen_k or tuple(sequences.shape) != (batch, seqlen_q):
        return "packed sequences have a cache"
    if is_tracing(sequences):
        return BLIND
    starts = torch.ones_like(sequences, dtype=torch.bool)
    starts[:, 1:] = sequences.diff() != 0
    starts = starts.flatten().nonzero().flatten()
    end = starts.new_tensor([sequences.numel()])
    return replace(structure, cu_seqlens=torch.cat((starts, end)).to(torch.int32))


def with_padding(structure: Structure, attention_mask: Tensor) -> Structure | str:
    """The structure with the padding that `attention_mask` (B, Sk or less) names, from key 0 on."""
    tokens = attention_mask[:, : structure.keys]
    missing = structure.keys - tokens.shape[1]
    if missing:
        tokens = torch.nn.functional.pad(tokens, (0, missing))
    place = torch.arange(structure.keys, device=tokens.device)
    end = torch.where(tokens, place + 1, 0).amax(1)  # (B,)
    first = torch.where(tokens, place, end[:, None]).amin(1)  # (B,)
    gaps = end - first != tokens.sum(1)
    # One look at the device for all questions.
    questions = tokens.logical_not(), first > 0, (end > 0) & (end < structure.keys), gaps
    padded, before, behind, has_gaps = torch.stack([x.any() for x in questions]).tolist()
    if not padded:
        return structure
    if structure.cu_seqlens is not None:
        return "packed sequences have padding"
    if has_gaps:
        return "there is padding between tokens of a row"
    if not before:
        return replace(structure, key_lengths=end.to(torch.int32))
    rows = torch.stack((first, end), 1)
    return replace(structure, rows=rows, spans=tuple(map(tuple, rows.tolist())) if behind else None)


# All closures of one function share its code: by that the parts of a mask function are recognised.
_AND = and_masks(causal_mask_function).__code__
_LEFT = sliding_window_overlay(1).__code__
_BOTH = sliding_window_bidirectional_overlay(1).__code__
_PACKED = packed_sequence_mask_function(None).__code__
_REMAPPED = None
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # since 5.23
    _REMAPPED = masking_utils.remap_positions_for_packed_sequence(None, None).__code__


def _recognised(function: Callable) -> dict | None:
    """The limits left, right and sequences that a mask function of transformers sets; None for other functions."""
    if function is causal_mask_function:
        return {"right": 0}
    if function is bidirectional_mask_function:
        return {}
    code = getattr(function, "__code__", None)
    if code is _LEFT:
        return {"left": _closure(function)["sliding_window"] - 1}
    if code is _BOTH:
        return dict.fromkeys(("left", "right"), _closure(function)["sliding_window"])
    if code is _PACKED:
        return {"sequences": _closure(function)["packed_sequence_mask"]}
    return _intersection(_closure(function)["mask_functions"]) if code is _AND else None


def _intersection(functions: Sequence[Callable]) -> dict | None:
    packed = any(getattr(function, "__code__", None) is _PACKED for function in functions)
    limits = {}
    for function in functions:
        if packed and getattr(function, "__code__", None) is _REMAPPED:
            # Within a packed sequence, positions are as far apart as places are.
            function = _closure(function)["mask_function"]
        pattern = _recognised(function)
        if pattern is None or "sequences" in pattern and "sequences" in limits:
            return None
        for name, limit in pattern.items():
            limits[name] = min(limit, limits[name]) if name in limits else limit
    return limits


def _closure(function: Callable) -> dict:
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}
