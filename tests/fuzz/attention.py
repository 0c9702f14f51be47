"""One drawn call of `attention`, `attention_varlen` or `attention_weights`, held against eager attention."""

import dataclasses
import functools
import itertools

import torch
from cases.attention import Case, eager_attention, make_inputs
from fuzz import draws
from fuzz.criterion import answers, assert_accurate
from hypothesis import strategies
from torch import Tensor

from pynlp.functional import attention, attention_varlen, attention_weights

NAMES = ("q", "k", "v", "sinks", "alibi_slopes", "relative_bias")


@dataclasses.dataclass(frozen=True)
class Call:
    case: Case
    dtype: torch.dtype
    machine: draws.Machine
    seed: int
    dropout_seed: int
    layouts: tuple  # of q, k, v and the incoming gradient
    integers: torch.dtype  # of lengths and position ids
    low_biases: bool  # sinks, slopes and table in q's dtype
    wanted: frozenset  # what gets a gradient, if it is there
    used: str  # of the results, by what comes afterwards

    def inputs(self) -> tuple[dict, dict]:
        """What make_inputs gives, in the layouts and dtypes that were drawn."""
        tensors, options = make_inputs(self.case, self.dtype, self.seed)
        for name, layout in zip("qkv", self.layouts, strict=False):
            tensors[name] = layout(tensors[name])
        if self.low_biases:
            tensors = {name: x.to(self.dtype) for name, x in tensors.items()}
        for name in ("key_lengths", "rotary_offset"):
            if isinstance(options.get(name), Tensor):
                options[name] = options[name].to(self.integers)
        return tensors, options | ({"seed": self.dropout_seed} if self.case.dropout_p else {})

    def run(self, function, tensors: dict, options: dict, *more) -> dict[str, Tensor]:
        """The answers on the drawn machine, which are those of one thread, and of the plan that a call leaves."""
        with self.machine.used():
            results = answers(function, tensors, options, *more)
        with dataclasses.replace(self.machine, threads=1).used():
            expected = answers(function, tensors, options, *more)
            planned = answers(function, tensors, options, *more)
        for name, x in results.items():
            assert torch.equal(x, expected[name]), f"{name} differs with {self.machine.threads} threads"
            assert torch.equal(x, planned[name]), f"{name} differs by a plan"
        return results

    def check(self, function, oracle, tensors: dict, options: dict) -> None:
        """(out, lse) of both functions, and gradients."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        *rows, heads, _ = tensors["q"].shape
        weight_out = torch.randn(*rows, heads, tensors["v"].shape[-1], generator=generator)
        weight_lse = torch.randn(*rows[:-1], heads, rows[-1], generator=generator)
        weights = (
            self.layouts[3](weight_out.to(self.dtype)) if "out" in self.used else None,
            weight_lse if "lse" in self.used else None,
        )
        wanted = [name for name in NAMES if name in self.wanted and name in tensors]
        results = self.run(function, tensors, options, wanted, weights)
        assert_accurate(results, oracle, tensors, options, wanted, weights)


calls = functools.partial(
    strategies.builds,
    dtype=draws.dtypes,
    machine=draws.machines,
    seed=draws.generator_seeds,
    dropout_seed=draws.dropout_seeds,
    layouts=strategies.tuples(*[draws.layouts] * 4),
    integers=draws.integer_dtypes,
    low_biases=strategies.booleans(),
    wanted=strategies.just(frozenset(NAMES)) | strategies.frozensets(strategies.sampled_from(NAMES)),
    used=strategies.sampled_from(("out and lse", "out", "lse")),
)
padded_calls = calls(Call, case=draws.padded_cases())


def check_attention(call: Call) -> None:
    def function(**arguments):
        result = attention(**arguments, return_lse="lse" in call.used)
        return result if "lse" in call.used else (result, None)

    call.check(function, eager_attention, *call.inputs())


@dataclasses.dataclass(frozen=True)
class PackedCall(Call):
    """Its case is of all sequences together."""

    sequences: tuple[tuple[int, int], ...]  # queries and keys of each
    longest_given: bool

    def inputs(self) -> tuple[dict, dict]:
        tensors, options = super().inputs()
        tensors |= {name: tensors[name][0] for name in "qkv"}
        if self.case.alibi == "batch":
            factors = torch.arange(1, len(self.sequences) + 1)[:, None]
            tensors["alibi_slopes"] = (tensors["alibi_slopes"] * factors).to(tensors["alibi_slopes"].dtype)
        if isinstance(options.get("rotary_offset"), Tensor):
            options["rotary_offset"] = options["rotary_offset"][0]
        for i, side in enumerate("qk"):
            counts = [sequence[i] for sequence in self.sequences]
            options[f"cu_seqlens_{side}"] = torch.tensor([0, *itertools.accumulate(counts)], dtype=self.integers)
            options[f"max_seqlen_{side}"] = max(counts, default=0) if self.longest_given else None
        return tensors, options


@strategies.composite
def packed_calls(draw) -> PackedCall:
    sequences = tuple(draw(strategies.lists(strategies.tuples(draws.lengths, draws.lengths), max_size=5)))
    head_dim = draw(draws.head_dims)
    heads, kv_heads = draw(draws.head_counts(sum(queries * keys for queries, keys in sequences)))
    features = draw(draws.features(head_dim))
    most_missing = max((queries - keys for queries, keys in sequences), default=0)  # queries before the first key
    case = Case(
        1, *(sum(sequence[i] for sequence in sequences) for i in (0, 1)), heads, kv_heads, head_dim,
        draw(draws.maybe | draws.head_dims),
        rotary_offset=draw(draws.rotary_offsets(most_missing)) if features["rotary_dim"] else 0,
        dropout_p=draw(draws.dropouts), **features,
    )  # fmt: skip
    return draw(
        calls(
            PackedCall,
            case=strategies.just(case),
            sequences=strategies.just(sequences),
            longest_given=strategies.booleans(),
        )
    )


def check_attention_varlen(call: PackedCall) -> None:
    def function(**arguments):
        result = attention_varlen(**arguments, return_lse="lse" in call.used)
        return result if "lse" in call.used else (result, None)

    call.check(function, eager_packed, *call.inputs())


def eager_packed(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, alibi_slopes=None, rotary_offset=0,
    **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each sequence by itself."""
    outs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32))]
    for number in range(len(cu_seqlens_q) - 1):
        # Dropout counts by a sequence's number: that of the last of as many copies.
        copies = number + 1 if options.get("dropout_p") else 1
        queries, keys = (slice(cu[number], cu[number + 1]) for cu in (cu_seqlens_q, cu_seqlens_k))
        rows = (x.expand(copies, *x.shape) for x in (q[queries], k[keys], v[keys]))
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            options["alibi_slopes"] = alibi_slopes[number].expand(copies, -1)
        else:
            options["alibi_slopes"] = alibi_slopes
        if isinstance(rotary_offset, Tensor):
            options["rotary_offset"] = rotary_offset[keys].expand(copies, -1)
        else:
            options["rotary_offset"] = rotary_offset
        out, lse = eager_attention(*rows, **options)
        outs.append(out[-1])
        lses.append(lse[-1])
    return torch.cat(outs), torch.cat(lses, dim=1)


@dataclasses.dataclass(frozen=True)
class WeightsCall(Call):
    rows: tuple[int, ...] | None
    lse_given: bool


@strategies.composite
def weights_calls(draw) -> WeightsCall:
    case = dataclasses.replace(draw(draws.padded_cases()), dropout_p=0.0)
    some = strategies.lists(strategies.integers(0, max(0, case.seqlen_q - 1)), max_size=9 if case.seqlen_q else 0)
    rows = draw(draws.maybe | some.map(tuple))
    return draw(
        calls(
            WeightsCall,
            case=strategies.just(case),
            rows=strategies.just(rows),
            lse_given=strategies.booleans(),
        )
    )


def check_attention_weights(call: WeightsCall) -> None:
    tensors, options = call.inputs()
    if call.rows is not None:
        options["rows"] = torch.tensor(call.rows, dtype=call.integers)
    if call.lse_given:
        with call.machine.used():
            _, options["lse"] = attention(**tensors, **options_of_attention(options), return_lse=True)
    del tensors["v"]

    def function(**arguments):
        return attention_weights(**arguments), None

    results = call.run(function, tensors, options, (), ())
    # Whatever the dtype of q and k, their weights are computed in fp32.
    assert_accurate(results, eager_weights, {name: x.float() for name, x in tensors.items()}, options)


def options_of_attention(options: dict) -> dict:
    return {name: x for name, x in options.items() if name not in ("rows", "lse")}


def eager_weights(q, k, *, rows=None, lse=None, **options) -> tuple[Tensor, Tensor]:
    """Unit vectors as values give the weights. By a given lse they are too large by as much as it is too small."""
    keys = k.shape[1]
    unit = torch.eye(keys, dtype=q.dtype)[None, :, None].expand(q.shape[0], -1, k.shape[2], -1)
    weights, true_lse = eager_attention(q, k, unit, **options)
    weights = weights.transpose(1, 2)  # (B, H, Sq, Sk)
    if lse is not None:
        weights = weights * (true_lse - lse).nan_to_num(nan=0.0).exp()[..., None]  # -inf where nothing is seen
    return weights if rows is None else weights[:, :, rows.long()], true_lse
