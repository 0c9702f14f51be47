"""The mask of a forward pass as structure, in the terms of `pynlp.functional.attention`, instead of Sq x Sk booleans.

transformers asks for a mask once a forward pass, before the first layer, as a composition of small functions of (batch,
head, query, key). The compositions that the kernel can serve are recognised here; any other one keeps a reason and is
served as a dense mask.

Shapes: B batch, Sq queries, Sk keys, of which a static cache may not have written the last ones yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

NAME = "pynlp"
aten = torch.ops.aten


@dataclass(frozen=True)
class Structure:
    """The keys that queries see. At most one of the last three fields is given.

    Args:
        window: `(left, right)` as in `pynlp.functional.attention`; a causal one has a right of 0.
        keys: Keys from there on are not written yet, and the last query stands before them.
        key_lengths: int32 `(B,)`, where every row's padding is behind its tokens.
        rows: int64 `(B, 2)`, where padding stands before the tokens: the first key of each row and their end.
        cu_seqlens: int32 `(sequences + 1,)`, where packed sequences start in the B rows laid end to end, and their end.
    """

    window: tuple[int | None, int | None]
    keys: int
    key_lengths: Tensor | None = None
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.window[1] == 0

    def to(self, device: torch.device) -> "Structure":
        tensors = {name: getattr(self, name) for name in ("key_lengths", "rows", "cu_seqlens")}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if x is not None})


class Mask(Tensor):
    """A boolean mask `(B, 1, Sq, Sk)` of which only the structure exists; True where a query sees a key.

    It is a tensor because generate() and the models hand it on as one. Any operation on it gets the dense mask.

    Args:
        shape: `(B, 1, Sq, Sk)`.
        device: The device that the dense mask would be on.
        structure: The structure, or the reason why the kernel cannot serve this mask.
        make_dense: Makes the dense mask.
    """

    structure: Structure | None
    reason: str | None

    @staticmethod
    def __new__(cls, shape, device, structure: Structure | str, make_dense: Callable[[], Tensor]):
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.structure, mask.reason = (None, structure) if isinstance(structure, str) else (structure, None)
        mask._make_dense = make_dense
        mask._cu_seqlens = {}
        return mask

    @cached_property
    def dense(self) -> Tensor:
        """The mask as a tensor of Sq x Sk booleans a row."""
        return self._make_dense()

    @cached_property
    def lengths(self) -> Tensor:
        """int32 `(B,)`: the keys of each row, where none of them is padding in front of its tokens."""
        if self.structure.key_lengths is not None:
            return self.structure.key_lengths
        return torch.full(self.shape[:1], self.structure.keys, dtype=torch.int32, device=self.device)

    def refused(self, reason: str) -> "Mask":
        """The same mask with a reason, which is not the mask's, why the kernel cannot serve the call."""
        return Mask(self.shape, self.device, reason, lambda: self.dense)

    def cu_seqlens(self, copies: int, aligned: bool) -> tuple[Tensor, Tensor]:
        """Starts of the sequences of `structure.rows` in rows laid end to end, those of the queries and of the keys.

        Each row is repeated `copies` times. It makes five sequences: queries without keys, keys without queries, the
        queries and keys that belong together, and behind them the first two again. So padding costs no work, and
        nothing has to be moved to get rid of it.

        Args:
            aligned: The last query stands at the last key, and those at padding are padding. Otherwise every query
                sees every key.
        """
        if (copies, aligned) not in self._cu_seqlens:
            first_k, end_k = self.structure.rows.repeat_interleave(copies, dim=0).unbind(1)  # (B copies,)
            none, (seqlen_q, seqlen_k) = torch.zeros_like(first_k), self.shape[2:]
            first_q, end_q = none, none + seqlen_q
            if aligned:
                first_query = self.structure.keys - seqlen_q
                end_q = (end_k - first_query).clamp(min=0)
                first_q = (first_k - first_query).clamp(min=0).minimum(end_q)
            ends_q = torch.stack((first_q, first_q, end_q, none + seqlen_q, none + seqlen_q), 1)  # (B copies, 5)
            ends_k = torch.stack((none, first_k, end_k, end_k, none + seqlen_k), 1)
            row = torch.arange(len(first_k), device=first_k.device)[:, None]
            ends = ((ends_q + row * seqlen_q).flatten(), (ends_k + row * seqlen_k).flatten())
            self._cu_seqlens[copies, aligned] = tuple(torch.cat((none[:1], end)).to(torch.int32) for end in ends)
        return self._cu_seqlens[copies, aligned]

    def __repr__(self, *, tensor_contents=None):
        return f"Mask({tuple(self.shape)}, {self.reason or self.structure})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default):
            return args[0]
        if function is aten._to_copy.default and kwargs.get("dtype", torch.bool) == torch.bool:
            return args[0]._on(kwargs.get("device") or args[0].device)
        args, kwargs = tree_map_only(Mask, lambda mask: mask.dense, (args, kwargs))
        out = function(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype != torch.bool:
            # A model that adds masks to scores, or fills where they are True, means another kind of mask than this.
            # No TypeError: Python would take it for `+` not being defined.
            raise ValueError(
                f"attn_implementation: expected a model that hands its mask on to transformers' AttentionInterface, "
                f"got {NAME!r} for one that calls {function} with it; "
                "pynlp.integrations.transformers.patch(model) knows T5, BLOOM and MPT"
            )
        if isinstance(out, Tensor) and out.dim() == 4:
            return Mask(out.shape, out.device, "the model changed the mask", lambda: out)
        return out

    def _on(self, device) -> "Mask":
        structure = self.reason or self.structure.to(device)
        return Mask(self.shape, device, structure, lambda: self.dense.to(device))


@torch.compiler.disable(reason="what it looks up on the device decides how attention is called")
def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Mask:
    """The mask function to register: transformers calls it once for each kind of layer in a forward pass.

    Args:
        q_offset, kv_offset: Positions of the first query and of the first key.
        mask_function: The keys that are seen, padding aside.
        attention_mask: Boolean `(B, positions)`, False where there is padding; positions beyond it are padding too.
        The others: as in transformers.masking_utils.sdpa_mask.
    """
    # A static cache's own counter has moved on by the time when somebody may ask for the dense mask.
    q_offset = int(q_offset)

    def make_dense() -> Tensor:
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_causal_skip=False,
        )  # fmt: skip

    structure = _structure(batch_size, q_length, kv_length, q_offset - kv_offset, mask_function)
    if isinstance(structure, Structure) and attention_mask is not None:
        structure = _with_padding(structure, attention_mask[:, kv_offset:])
    return Mask((batch_size, 1, q_length, kv_length), torch.device(device), structure, make_dense)


def _structure(batch: int, seqlen_q: int, seqlen_k: int, first_query: int, function: Callable) -> Structure | str:
    """The structure of a mask without padding; `first_query` is the key that the first query stands at."""
    pattern = _recognised(function)
    if pattern is None:
        return "its mask function is none of the causal, bidirectional, sliding-window and packed ones"
    left, right = pattern.get("left"), pattern.get("right")
    keys = min(first_query + seqlen_q, seqlen_k) if right == 0 else seqlen_k
    if (left, right) != (None, None) and first_query + seqlen_q != keys:
        return "its last query does not stand at its last key"
    if "sequences" not in pattern:
        return Structure((left, right), keys)
    sequences = pattern["sequences"]  # (B, S): which of a row's sequences a token is of
    if seqlen_q != seqlen_k or tuple(sequences.shape) != (batch, seqlen_q):
        return "packed sequences have a cache"
    starts = torch.ones_like(sequences, dtype=torch.bool)
    starts[:, 1:] = sequences.diff() != 0
    starts = starts.flatten().nonzero().flatten()
    end = starts.new_tensor([sequences.numel()])
    return Structure((left, right), keys, cu_seqlens=torch.cat((starts, end)).to(torch.int32))


def _with_padding(structure: Structure, attention_mask: Tensor) -> Structure | str:
    """The structure with the padding that `attention_mask` (B, Sk or less) names, from key 0 on."""
    tokens = attention_mask[:, : structure.keys]
    missing = structure.keys - tokens.shape[1]
    if missing:
        tokens = torch.nn.functional.pad(tokens, (0, missing))
    place = torch.arange(structure.keys, device=tokens.device)
    end = torch.where(tokens, place + 1, 0).amax(1)  # (B,)
    first = torch.where(tokens, place, end[:, None]).amin(1)  # (B,)
    gaps = end - first != tokens.sum(1)
    # One look at the device for all three questions.
    padded, shifted, has_gaps = torch.stack((tokens.logical_not().any(), (first > 0).any(), gaps.any())).tolist()
    if not padded:
        return structure
    if structure.cu_seqlens is not None:
        return "packed sequences have padding"
    if has_gaps:
        return "there is padding between tokens of a row"
    if not shifted:
        return replace(structure, key_lengths=end.to(torch.int32))
    return replace(structure, rows=torch.stack((first, end), 1))


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
