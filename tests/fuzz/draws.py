"""What is drawn for every op: sizes, features, how tensors lie in memory, and what a call runs on."""

import contextlib
import dataclasses
import math

import torch
from cases.attention import Case
from hypothesis import strategies
from torch import Tensor

import pynlp
from pynlp import backends

SCORES = 30_000  # of all heads together, so that a case takes milliseconds

dtypes = strategies.sampled_from((torch.float32, torch.bfloat16, torch.float16))
integer_dtypes = strategies.sampled_from((torch.int32, torch.int64))
generator_seeds = strategies.integers(0, 2**16)
dropout_seeds = strategies.integers(-(2**63), 2**63 - 1)
maybe = strategies.none()
# Few, some, and where blocks of queries and keys end.
lengths = (
    strategies.integers(1, 8)
    | strategies.integers(1, 90)
    | strategies.sampled_from((31, 33, 63, 64, 65, 127, 128, 129, 192, 256, 257, 300, 0))
)
dropouts = strategies.sampled_from((0.0, 0.0, 1e-6, 0.1, 0.7, 0.999))
head_dims = strategies.integers(1, 24) | strategies.integers(1, 136) | strategies.integers(137, 256)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What calls run on; everything else is computed by one thread."""

    isa: str
    threads: int

    @contextlib.contextmanager
    def used(self):
        pynlp.set_isa(self.isa)
        torch.set_num_threads(self.threads)
        yield
        torch.set_num_threads(1)


machines = strategies.builds(
    Machine, strategies.sampled_from(backends.available_isas()), strategies.sampled_from((1, 2, 3))
)


@strategies.composite
def features(draw, head_dim: int) -> dict:
    """The fields of Case that all ops share and that do not depend on lengths."""
    far = strategies.sampled_from((2**31 - 1, 2**31, 2**40, 2**62))
    side = maybe | strategies.integers(0, 100) | strategies.integers(0, 8) | far
    rotary_dim = 2 * draw(strategies.just(0) | strategies.integers(0, head_dim // 2))
    return dict(
        causal=draw(strategies.booleans()),
        window=draw(maybe | strategies.tuples(side, side)),
        softmax_scale=draw(maybe | strategies.sampled_from((0.0, -0.3, 0.7, 1e-3, 2.0))),
        softcap=draw(strategies.sampled_from((0.0, 0.0, 1.5, 20.0, 1000.0))),
        alibi=draw(strategies.sampled_from((None, "heads", "batch"))),
        relative=draw(maybe | strategies.sampled_from(((8, 20), (32, 128), (4, 3), (5, 9)))),
        relative_bidirectional=draw(maybe | strategies.booleans()),
        rotary_dim=rotary_dim,
        rotary_interleaved=draw(strategies.booleans()),
        magnitude=draw(strategies.sampled_from((1.0, 1e-3, 5.0, 30.0))),
        sinks=draw(strategies.booleans()),
    )


@strategies.composite
def head_counts(draw, scores: int) -> tuple[int, int]:
    """(heads, kv_heads), few where each has many scores."""
    room = max(1, SCORES // max(1, scores))
    kv_heads = draw(strategies.integers(1, min(3, room)))
    return kv_heads * draw(strategies.integers(1, min(5, max(1, room // kv_heads)))), kv_heads


def rotary_offsets(queries_before: int):
    """Position of key 0, or "ids"; `queries_before` stand before it, at positions from 0 on."""
    first = max(0, queries_before)
    offsets = strategies.integers(first, first + 50)
    return offsets if first else offsets | strategies.just("ids")


@strategies.composite
def padded_cases(draw) -> Case:
    """Batches for `attention` and `attention_weights`; sizes may be 0."""
    seqlen_q, seqlen_k, head_dim = draw(lengths), draw(lengths), draw(head_dims)
    heads, kv_heads = draw(head_counts(seqlen_q * seqlen_k))
    room = SCORES // max(1, seqlen_q * seqlen_k * heads)
    batch = draw(strategies.sampled_from((*(1, 2, 3)[: max(1, room)] * 4, 0)))
    shared = draw(features(head_dim))
    return Case(
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, draw(maybe | head_dims),
        key_lengths=draw(maybe | strategies.tuples(*[strategies.integers(0, seqlen_k)] * batch)),
        rotary_offset=draw(rotary_offsets(seqlen_q - seqlen_k)) if shared["rotary_dim"] else 0,
        dropout_p=draw(dropouts),
        **shared,
    )  # fmt: skip


def one_of_packed(x: Tensor) -> Tensor:
    """x in the middle of three, like k out of one projection of q, k and v."""
    return torch.stack((torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)), dim=-3)[..., 1, :, :]


def with_gaps(x: Tensor) -> Tensor:
    """x with odd gaps between heads, and one before the first."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def every_other_row(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-3)[..., 0, :, :]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def channels_apart(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


def one_head(x: Tensor) -> Tensor:
    """One head in the place of all: stride 0."""
    return x[..., :1, :].expand_as(x)


def one_entry(x: Tensor) -> Tensor:
    """One entry in the place of all, or one row of packed sequences."""
    return x[:1].expand_as(x)


layouts = strategies.sampled_from(
    (torch.clone, one_of_packed, with_gaps, every_other_row, heads_first, channels_apart, one_head, one_entry)
)
