"""Calls of which one argument is spoiled: refused by an error that names an argument, before any memory is written."""

import dataclasses
import inspect
import math
import re

import pytest
import torch
from fuzz import draws
from fuzz.decode import memory
from hypothesis import strategies
from torch import Tensor

from pynlp import functional


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of a tensor can be wrong."""

    dtypes: tuple[torch.dtype, ...]
    dimensions: tuple[int, ...]  # whose size has to fit
    values: tuple[int, ...] = ()  # out of range
    ranks: tuple[int, ...] = (-1, 1)
    devices: tuple[str, ...] = ("meta",)
    strides: bool = False


def rows(*dimensions, **others):
    return Kind((torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64), dimensions, **others)


def biases(*dimensions, ranks=(-1, 1)):
    return Kind((torch.int32, torch.bool, torch.complex64), dimensions, ranks=ranks)


def integers(*dimensions, largest):
    return Kind((torch.float32, torch.int16, torch.bool), dimensions, (-1, largest + 1, -(2**31), 2**31 - 1))


# What is wrong with a tensor, or values that a scalar may not have. A q on the meta device is left out: whether
# autocast is on for it is more than PyTorch can say.
SHARED = {
    "sinks": biases(0),
    "alibi_slopes": biases(0, 1, ranks=(1,)),
    "relative_bias": biases(1),
    "relative_max_distance": (2, 0, -7),
    "rotary cos": biases(0, 1),
    "rotary sin": biases(0, 1),
    "softcap": (-1.0, -1e-30, math.nan, -math.inf),
    "window": ((-1, None), (None, -2), (3, -(2**40))),
}
DROPOUT = {
    "dropout_p": (-0.1, 1.0, 1.5, math.nan, math.inf),
    "seed": Kind((torch.float32, torch.int32), (0,), ranks=()),
}
SPOILED = {
    "attention": SHARED
    | DROPOUT
    | {
        "q": rows(0, 2, 3, devices=()),
        "k": rows(0, 1, 2, 3),
        "v": rows(0, 1, 2),
        "key_lengths": integers(0, largest=7),
        "rotary_offset": integers(0, 1, largest=8),
    },
    "attention_varlen": SHARED
    | DROPOUT
    | {
        "q": rows(0, 1, 2, devices=()),
        "k": rows(0, 1, 2),
        "v": rows(0, 1),
        "cu_seqlens_q": integers(0, largest=9),
        "cu_seqlens_k": integers(0, largest=11),
        "max_seqlen_q": (4, 0, -1),
        "max_seqlen_k": (6, 0, -1),
        "rotary_offset": (-1, 3, 2**31, -(2**62)),
    },
    "attention_decode": SHARED
    | {
        "q": rows(0, 2, 3, devices=()),
        "k_cache": rows(0, 1, 2, 3, strides=True),
        "v_cache": rows(0, 1, 2, 3, strides=True),
        "k": rows(0, 1, 2, 3),
        "v": rows(0, 1, 2, 3),
        "cache_lengths": integers(0, largest=9),
        "block_table": integers(0, largest=4),
        "num_splits": (0, -1, -(2**62)),
        "rotary_offset": (-9, 3, 2**31, -(2**62)),
    },
    "attention_weights": SHARED
    | {
        "q": rows(0, 2, 3, devices=()),
        "k": rows(0, 3),
        "rows": integers(largest=4),
        "lse": biases(0, 1, 2),
        "key_lengths": integers(0, largest=7),
        "rotary_offset": integers(0, 1, largest=8),
    },
}
# Those of a group come and go together.
GROUPS = (
    ("rotary cos", "rotary sin", "rotary_offset"),
    ("relative_bias", "relative_max_distance"),
    ("dropout_p", "seed"),
    *((name,) for name in ("sinks", "alibi_slopes", "softcap", "window", "key_lengths", "block_table")),
    *((name,) for name in ("max_seqlen_q", "max_seqlen_k", "num_splits", "rows", "lse")),
)


def good_arguments(function: str, integer: torch.dtype, paged: bool) -> dict:
    """All that the function takes."""

    def whole(*values):
        return torch.tensor(values, dtype=integer)

    shared = {
        "sinks": torch.randn(4),
        "alibi_slopes": torch.rand(2, 4),
        "relative_bias": torch.randn(8, 4),
        "relative_max_distance": 20,
        "rotary cos": torch.rand(9, 3),
        "rotary sin": torch.rand(9, 3),
        "rotary_offset": 0,
        "softcap": 2.0,
        "window": (5, 1),
    }
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([7])}
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)
    padded = {"q": q, "k": k, "key_lengths": whole(7, 3), "rotary_offset": torch.randint(9, (2, 7)).to(integer)}
    if function == "attention":
        return shared | dropout | padded | {"v": v}
    if function == "attention_weights":
        return shared | padded | {"rows": whole(4, 0, 2), "lse": torch.randn(2, 4, 5)}
    if function == "attention_varlen":
        rows = {"q": torch.randn(9, 4, 8), "k": torch.randn(11, 2, 8), "v": torch.randn(11, 2, 6)}
        cu_seqlens = {"cu_seqlens_q": whole(0, 4, 9), "cu_seqlens_k": whole(0, 4, 11)}
        return shared | dropout | rows | cu_seqlens | {"max_seqlen_q": 5, "max_seqlen_k": 7}
    cache = (5, 4) if paged else (2, 9)
    return shared | {
        "q": torch.randn(2, 1, 4, 8),
        "k_cache": torch.zeros(*cache, 2, 8),
        "v_cache": torch.zeros(*cache, 2, 6),
        "k": torch.randn(2, 3, 2, 8),
        "v": torch.randn(2, 3, 2, 6),
        "cache_lengths": whole(6, 6),
        "num_splits": 2,
    } | ({"block_table": torch.tensor([[4, 0, 2], [1, 3, 2]], dtype=integer)} if paged else {})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BadCall:
    function: str
    argument: str
    fault: str
    detail: object
    without: frozenset  # other arguments
    integer: torch.dtype
    paged: bool
    seed: int

    def arguments(self) -> tuple[dict, dict]:
        """The good ones and the bad ones."""
        torch.manual_seed(self.seed)
        good = good_arguments(self.function, self.integer, self.paged)
        good = {name: x for name, x in good.items() if name not in self.without}
        return good, good | {self.argument: self.spoiled(good[self.argument])}

    def spoiled(self, x: object) -> object:
        match self.fault:
            case "value of a scalar":
                return self.detail
            case "dtype" | "device":
                return x.to(self.detail)
            case "rank":
                return x[None] if self.detail > 0 else x[0]
            case "one more":
                return torch.cat((x, x.narrow(self.detail, 0, 1)), dim=self.detail)
            case "one less":
                return x.narrow(self.detail, 0, x.shape[self.detail] - 1)
            case "strides":
                return draws.channels_apart(x)
            case "value":
                value, place = self.detail
                x = x.clone()
                x.view(-1)[place % x.numel()] = value
                return x


def faults(kind) -> strategies.SearchStrategy:
    """(fault, detail)"""
    if isinstance(kind, tuple):
        return strategies.tuples(strategies.just("value of a scalar"), strategies.sampled_from(kind))
    possible = {"dtype": kind.dtypes, "device": kind.devices, "rank": kind.ranks}
    possible |= {"one more": kind.dimensions, "one less": kind.dimensions, "strides": ("channels",) * kind.strides}
    choices = [
        strategies.tuples(strategies.just(fault), strategies.sampled_from(details))
        for fault, details in possible.items()
        if details
    ]
    if kind.values:
        values = strategies.tuples(strategies.sampled_from(kind.values), strategies.integers(0, 20))
        choices.append(strategies.tuples(strategies.just("value"), values))
    return strategies.one_of(choices)


@strategies.composite
def bad_calls(draw) -> BadCall:
    function = draw(strategies.sampled_from(sorted(SPOILED)))
    argument = draw(strategies.sampled_from(sorted(SPOILED[function])))
    fault, detail = draw(faults(SPOILED[function][argument]))
    others = [group for group in GROUPS if argument not in group]
    without = draw(strategies.lists(strategies.sampled_from(others), unique=True))
    paged = argument == "block_table" or draw(strategies.booleans())
    # Without a block table a cache of pages is one of another batch.
    without = frozenset(name for group in without for name in group if name != "block_table")
    return BadCall(
        function, argument, fault, detail, without, draw(draws.integer_dtypes), paged, draw(draws.generator_seeds)
    )


def call(name: str, arguments: dict) -> Tensor:
    arguments = dict(arguments)
    if "rotary cos" in arguments:
        arguments["rotary"] = (arguments.pop("rotary cos"), arguments.pop("rotary sin"))
    return getattr(functional, name)(**arguments)


def check_refused(bad: BadCall) -> None:
    good, spoiled = bad.arguments()
    assert call(bad.function, good).isfinite().all()
    caches = [good[name] for name in ("k_cache", "v_cache") if name in good]
    caches += [spoiled[name] for name in ("k_cache", "v_cache") if bad.argument == name and bad.detail != "meta"]
    before = [memory(cache).clone() for cache in caches]
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as refusal:
        call(bad.function, spoiled)
    names = inspect.signature(getattr(functional, bad.function)).parameters
    assert re.match(rf"({'|'.join(names)})( cos| sin)?: expected ", str(refusal.value)), refusal.value
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(memory(cache), old), "a cache was written before the call was refused"
