"""What attention promises as an operator: opcheck, gradcheck, compilation, autocast, checkpoints, and its errors."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from cases.attention import Case, evaluate, fused_attention, make_inputs
from pynlp.kernels.attention import decode_launch, launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pynlp import backends
from pynlp.functional import attention, relative_position_buckets
from pynlp.reference.attention.attention import Options

RICH = Case(
    2, 9, 13, 4, 2, 8, 6, causal=True, window=(5, None), softmax_scale=0.3, softcap=2.0, key_lengths=(13, 6),
    alibi="batch", relative=(8, 10), rotary_dim=4, rotary_offset="ids", sinks=True, dropout_p=0.25,
)  # fmt: skip


def test_native_kernels_are_loaded():
    assert backends.native_missing_reason() is None
    for op in ("attention_forward", "attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{op}", "CPU"), op


def schema_of(op: str, first: int, last: int | None = None) -> list[tuple[str, str]]:
    """Names and types of an op's arguments."""
    arguments = getattr(torch.ops.pynlp, op).default._schema.arguments[first:last]
    return [(argument.name, str(argument.type)) for argument in arguments]


def test_every_back_end_has_the_options_of_the_schema():
    options = schema_of("attention_forward", 3)
    assert options == schema_of("attention_backward", 7, -3) == schema_of("attention_weights", 4)
    types = {"float": float, "int": int, "bool": bool, "Optional[Tensor]": torch.Tensor | None}
    for mirrored, schema in (
        (Options, options),
        (launch.Options, options),
        (decode_launch.DecodeOptions, schema_of("attention_decode", 4)),
    ):
        assert list(mirrored.__annotations__.items()) == [(name, types[kind]) for name, kind in schema]


def test_the_native_code_has_the_options_of_the_schema():
    source = (Path(__file__).parents[2] / "csrc/bindings/attention.cpp").read_text()
    fields = re.search(r"struct Options \{(.*?)\};", source, re.DOTALL).group(1)
    types = {"float": "double", "int": "int64_t", "bool": "bool", "Optional[Tensor]": "MaybeTensor"}
    declared = [
        (name, kind) for kind, names in re.findall(r"(\w+) ([\w, \n]+);", fields) for name in re.split(r",\s*", names)
    ]
    assert declared == [(name, types[kind]) for name, kind in schema_of("attention_forward", 3)]


def op_arguments(dtype=torch.float32, rich=True, seqlen_q=5, requires_grad=True):
    """Arguments of torch.ops.pynlp.attention_forward."""
    statistics = torch.promote_types(dtype, torch.float32)
    tensors = {
        "q": torch.randn(2, seqlen_q, 4, 8, dtype=dtype),
        "k": torch.randn(2, 7, 2, 8, dtype=dtype),
        "v": torch.randn(2, 7, 2, 6, dtype=dtype),
        "alibi_slopes": torch.rand(4, dtype=statistics),
        "relative_bias": torch.randn(8, 4, dtype=statistics),
        "sinks": torch.randn(4, dtype=statistics),
    }
    q, k, v, slopes, table, sinks = (x.requires_grad_(requires_grad) for x in tensors.values())
    nothing = None, None
    if not rich:
        return q, k, v, 0.5, -1, -1, 0.0, None, *nothing, None, *nothing, *nothing, *nothing, 0, False, 0.0, None
    angles = torch.rand(7, 2, dtype=statistics)
    positions = torch.randint(0, 7, (2, 7), dtype=torch.int32)
    lengths = torch.tensor([7, 0], dtype=torch.int32)
    buckets = relative_position_buckets(8, 10, True)
    biases = (sinks, slopes, table, buckets)
    rotary = (angles.cos(), angles.sin(), positions, 0, True)
    return q, k, v, 0.5, 3, 0, 2.0, lengths, *nothing, *biases, *rotary, 0.3, torch.tensor([5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("seqlen_q", [5, 0])
def test_opcheck(dtype, rich, seqlen_q):
    arguments = op_arguments(dtype, rich, seqlen_q)
    assert set(torch.library.opcheck(torch.ops.pynlp.attention_forward.default, arguments).values()) == {"SUCCESS"}

    arguments = op_arguments(dtype, rich, seqlen_q, requires_grad=False)
    out, lse = torch.ops.pynlp.attention_forward(*arguments)
    for grad_lse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), grad_lse, *arguments[:3], out, lse, *arguments[3:], rich, rich, rich)
        results = torch.library.opcheck(torch.ops.pynlp.attention_backward.default, backward)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 4, 2, 1, 4),
        Case(2, 4, 3, 2, 2, 3, causal=True, alibi="heads", softcap=1.5),
        Case(1, 3, 5, 4, 2, 4, window=(1, 1), relative=(4, 3), rotary_dim=4, rotary_offset="ids"),
        Case(2, 3, 3, 2, 1, 6, alibi="batch", key_lengths=(3, 1), rotary_dim=4, rotary_interleaved=True),
        Case(2, 4, 3, 2, 1, 3, 5, causal=True, sinks=True, dropout_p=0.4),
    ],
    ids=str,
)
def test_gradcheck(case):
    tensors, options = make_inputs(case, torch.float64)
    tensors = {name: x.double().requires_grad_() for name, x in tensors.items()}

    def function(*values):
        out, lse = fused_attention(**dict(zip(tensors, values, strict=True)), **options)
        return out, lse.nan_to_num(neginf=0.0)  # a query that sees nothing

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    """One graph for all lengths, and the bits of the eager call."""
    torch._dynamo.reset()
    compilations = CompileCounterWithBackend(backend)
    compiled = torch.compile(fused_attention, fullgraph=True, dynamic=True, backend=compilations)
    for seqlen_q, seqlen_k in ((9, 13), (12, 31), (20, 20)):
        sizes = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k, key_lengths=None, rotary_offset=0)
        case = dataclasses.replace(RICH, **sizes)
        tensors, options = make_inputs(case, torch.float32)
        results = evaluate(compiled, tensors, options)
        for name, expected in evaluate(fused_attention, tensors, options).items():
            torch.testing.assert_close(results[name], expected, rtol=0, atol=0 if backend == "aot_eager" else 1e-6)
    assert compilations.frame_count <= 2  # at most once more, when the first lengths turn out not to be constant


def test_compile_checks_values_at_run_time():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 5, 2, 4)
    compiled(q, q, q, key_lengths=torch.tensor([5, 2]))
    with pytest.raises(RuntimeError, match="key_lengths: expected values in range"):
        compiled(q, q, q, key_lengths=torch.tensor([5, 6]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    tensors, options = make_inputs(RICH, torch.float32)
    with torch.autocast("cpu", dtype):
        results = evaluate(fused_attention, tensors, options)
    low = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in tensors.items()}
    expected = evaluate(fused_attention, low, options)
    assert results["out"].dtype == dtype and results["lse"].dtype == torch.float32
    for name in expected:
        assert torch.equal(results[name].float(), expected[name].float()), name
    assert all(results[f"gradient of {name}"].dtype == torch.float32 for name in tensors)


def test_autocast_leaves_fp64_alone():
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, q, q), attention(q.clone(), q, q)) and attention(q, q, q).dtype == q.dtype


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    tensors, options = make_inputs(RICH, torch.float32)

    def checkpointed(**arguments):
        names = list(tensors)
        rest = {name: x for name, x in arguments.items() if name not in names}
        function = lambda *values: fused_attention(**dict(zip(names, values, strict=True)), **rest)  # noqa: E731
        return checkpoint(function, *(arguments[name] for name in names), use_reentrant=use_reentrant)

    results = evaluate(checkpointed, tensors, options)
    for name, expected in evaluate(fused_attention, tensors, options).items():
        assert torch.equal(results[name], expected), name


def test_only_what_needs_a_gradient_gets_one():
    tensors, options = make_inputs(RICH, torch.float32)
    every = evaluate(fused_attention, tensors, options)
    for wanted in tensors:
        leaves = {name: x.detach().requires_grad_(name == wanted) for name, x in tensors.items()}
        out, lse = fused_attention(**leaves, **options)
        weights = torch.randn_like(out), torch.zeros_like(lse)
        torch.autograd.backward((out, lse), weights)
        assert [name for name, x in leaves.items() if x.grad is not None] == [wanted]
        assert leaves[wanted].grad.shape == every[f"gradient of {wanted}"].shape
        alone = leaves[wanted].grad
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        torch.autograd.backward(fused_attention(**leaves, **options), weights)
        assert torch.equal(alone, leaves[wanted].grad), wanted


def test_gradient_of_lse_alone():
    """out may be left unused; the gradient is then that of logsumexp."""
    q, k = torch.randn(2, 1, 6, 2, 4, dtype=torch.float64).unbind()
    q.requires_grad_()
    _, lse = attention(q, k, k, softmax_scale=1.0, return_lse=True)
    (gradient,) = torch.autograd.grad(lse.sum(), q)
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), dim=-1)
    torch.testing.assert_close(gradient, torch.einsum("bhqk,bkhd->bqhd", weights, k).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_backward_is_refused(dtype):
    q = torch.randn(1, 3, 2, 4, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


def test_inference_mode_and_later_training():
    """Tables cached in inference mode serve a later backward."""
    table = torch.randn(6, 2)
    q = torch.randn(1, 5, 2, 4)
    with torch.inference_mode():
        first = attention(q, q, q, relative_bias=table, relative_max_distance=77)
    q.requires_grad_()
    second = attention(q, q, q, relative_bias=table, relative_max_distance=77)
    second.sum().backward()
    assert torch.equal(first, second) and q.grad.isfinite().all()


def test_inputs_are_not_written():
    tensors, options = make_inputs(RICH, torch.float32)
    before = copy.deepcopy((tensors, options))
    evaluate(fused_attention, tensors, options)
    for x, y in zip(before[0].values(), tensors.values(), strict=True):
        assert torch.equal(x, y)
    for name, value in before[1].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, options[name]), name


def random(*shape, **options):
    return torch.randn(shape, **options)


COS = torch.ones(7, 4)
# The change to q (2, 5, 4, 8), k and v (2, 7, 2, 8), the error, and what its message says in order.
REFUSED = {
    "q's rank": (dict(q=random(5, 4, 8)), ValueError, "q: expected 4 dimensions .*got \\(5, 4, 8\\)"),
    "k's rank": (dict(k=random(2, 7, 2, 8, 1)), ValueError, "k: expected 4 dimensions .*got \\(2, 7, 2, 8, 1\\)"),
    "v's rank": (dict(v=random(2, 7, 16)), ValueError, "v: expected 4 dimensions .*got \\(2, 7, 16\\)"),
    "q's dtype": (
        dict(q=torch.ones(2, 5, 4, 8, dtype=torch.int64)),
        TypeError,
        "q: expected dtype float32.*torch.int64",
    ),
    "k's dtype": (dict(k=random(2, 7, 2, 8).bfloat16()), TypeError, "k: expected q's dtype .*float32, got .*bfloat16"),
    "v's dtype": (dict(v=random(2, 7, 2, 8).double()), TypeError, "v: expected q's dtype .*float32, got .*float64"),
    "k's device": (dict(k=random(2, 7, 2, 8, device="meta")), ValueError, "k: expected q's device cpu, got meta"),
    "v's device": (dict(v=random(2, 7, 2, 8, device="meta")), ValueError, "v: expected q's device cpu, got meta"),
    "batch": (dict(k=random(3, 7, 2, 8)), ValueError, "k: expected shape \\(2, .*, 8\\).*got \\(3, 7, 2, 8\\)"),
    "head_dim of k": (dict(k=random(2, 7, 2, 4)), ValueError, "k: expected shape .*got \\(2, 7, 2, 4\\)"),
    "large head_dim of v": (dict(v=random(2, 7, 2, 257)), ValueError, "v: expected a head_dim of 1 to 256, got 257"),
    "v unlike k": (
        dict(v=random(2, 6, 2, 8)),
        ValueError,
        "v: expected the shape of k \\(2, 7, 2, 8\\) but for head_dim, got \\(2, 6, 2, 8\\)",
    ),
    "heads": (
        dict(k=random(2, 7, 3, 8), v=random(2, 7, 3, 8)),
        ValueError,
        "k: expected a number of heads that divides q's 4, got 3",
    ),
    "no kv heads": (dict(k=random(2, 7, 0, 8), v=random(2, 7, 0, 8)), ValueError, "k: .*divides q's 4, got 0"),
    "large head_dim": (
        dict(q=random(2, 5, 4, 257), k=random(2, 7, 2, 257), v=random(2, 7, 2, 257)),
        ValueError,
        "q: expected a head_dim of 1 to 256, got 257",
    ),
    "no head_dim": (
        dict(q=random(2, 5, 4, 0), k=random(2, 7, 2, 0), v=random(2, 7, 2, 0)),
        ValueError,
        "q: expected a head_dim of 1 to 256, got 0",
    ),
    "left window": (dict(window=(-1, 0)), ValueError, "window: expected left >= 0 or None .*got -1"),
    "right window": (dict(window=(None, -3)), ValueError, "window: expected right >= 0 or None .*got -3"),
    "sinks' shape": (dict(sinks=random(2)), ValueError, "sinks: expected shape \\(4,\\), got \\(2,\\)"),
    "dropout of all": (dict(dropout_p=1.0), ValueError, "dropout_p: expected at least 0 and less than 1, got 1.0"),
    "negative dropout": (dict(dropout_p=-0.1), ValueError, "dropout_p: expected at least 0 .*got -0.1"),
    "seed's shape": (
        dict(dropout_p=0.1, seed=torch.tensor([1, 2])),
        ValueError,
        "seed: expected an int or one int64 value, got shape \\(2,\\)",
    ),
    "seed's dtype": (dict(dropout_p=0.1, seed=torch.tensor(1.0)), ValueError, "seed: .*one int64 value.*float32"),
    "seed's device": (
        dict(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int64, device="meta")),
        ValueError,
        "seed: expected q's device cpu, got meta",
    ),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap: expected 0 .*got -1.0"),
    "scale of nan": (dict(softmax_scale=math.nan), ValueError, "softmax_scale: expected a finite number, got nan"),
    "causal in words": (dict(causal="no"), TypeError, "causal: expected True or False, got 'no'"),
    "lengths' shape": (
        dict(key_lengths=torch.tensor([7])),
        ValueError,
        "key_lengths: expected shape \\(2,\\), got \\(1,\\)",
    ),
    "lengths' dtype": (dict(key_lengths=torch.ones(2)), TypeError, "key_lengths: expected dtype int32.*float32"),
    "lengths' device": (
        dict(key_lengths=torch.ones(2, dtype=torch.int32, device="meta")),
        ValueError,
        "key_lengths: expected q's device cpu, got meta",
    ),
    "long key": (
        dict(key_lengths=torch.tensor([7, 8])),
        ValueError,
        "key_lengths: expected values of 0 to 7, got 7 to 8",
    ),
    "negative key": (dict(key_lengths=torch.tensor([-1, 7])), ValueError, "key_lengths: .* 0 to 7, got -1 to 7"),
    "slopes' shape": (
        dict(alibi_slopes=random(2)),
        ValueError,
        "alibi_slopes: expected shape \\(4,\\) or \\(2, 4\\), got \\(2,\\)",
    ),
    "slopes' dtype": (
        dict(alibi_slopes=torch.ones(4, dtype=torch.int32)),
        TypeError,
        "alibi_slopes: expected a floating-point dtype, got torch.int32",
    ),
    "slopes' device": (dict(alibi_slopes=random(4, device="meta")), ValueError, "alibi_slopes: .*device cpu, got meta"),
    "table's rank": (dict(relative_bias=random(32)), ValueError, "relative_bias: expected shape .*4\\), got \\(32,\\)"),
    "table's heads": (dict(relative_bias=random(32, 2)), ValueError, "relative_bias: .*\\(32, 4\\), got \\(32, 2\\)"),
    "few buckets": (dict(relative_bias=random(2, 4)), ValueError, "relative_bias: expected at least 4 buckets, got 2"),
    "distance": (
        dict(relative_bias=random(32, 4), relative_max_distance=8),
        ValueError,
        "relative_max_distance: expected more than 8, got 8",
    ),
    "cos's rank": (dict(rotary=(COS[0], COS[0])), ValueError, "rotary: expected cos of shape .*got \\(4,\\)"),
    "wide cos": (
        dict(rotary=(torch.ones(7, 5),) * 2),
        ValueError,
        "rotary: .*rotary_dim <= head_dim 8, got \\(7, 5\\)",
    ),
    "sin unlike cos": (
        dict(rotary=(COS, COS[:6])),
        ValueError,
        "rotary sin: expected shape \\(7, 4\\), got \\(6, 4\\)",
    ),
    "few positions": (dict(rotary=(COS[:6], COS[:6])), ValueError, "rotary: expected tables of at least 7 .*got 6"),
    "offset too far": (
        dict(rotary=(COS, COS), rotary_offset=2),
        ValueError,
        "rotary: expected tables of at least 9 positions \\(rotary_offset 2 \\+ 7 keys\\), got 7",
    ),
    "negative offset": (dict(rotary=(COS, COS), rotary_offset=-1), ValueError, "rotary_offset: .*below 0, got -1"),
    "queries before 0": (
        dict(q=random(2, 9, 4, 8), rotary=(COS, COS)),
        ValueError,
        "rotary_offset: expected no position below 0, got -2",
    ),
    "ids' shape": (
        dict(rotary=(COS, COS), rotary_offset=torch.zeros(7, dtype=torch.int32)),
        ValueError,
        "rotary_offset: expected an int or position ids of shape \\(2, 7\\), got \\(7,\\)",
    ),
    "ids' dtype": (
        dict(rotary=(COS, COS), rotary_offset=torch.zeros(2, 7)),
        TypeError,
        "rotary_offset: expected dtype int32 or int64, got torch.float32",
    ),
    "ids' range": (
        dict(rotary=(COS, COS), rotary_offset=torch.full((2, 7), 7)),
        ValueError,
        "rotary_offset: expected values of 0 to 6, got 7 to 7",
    ),
    "ids of few keys": (
        dict(q=random(2, 9, 4, 8), rotary=(COS, COS), rotary_offset=torch.zeros(2, 7, dtype=torch.int32)),
        ValueError,
        "rotary_offset: position ids need seqlen_q <= seqlen_k, got 9 > 7",
    ),
    "offset alone": (dict(rotary_offset=3), ValueError, "rotary_offset: expected rotary=.*got rotary=None"),
    "trained cos": (
        dict(rotary=(torch.ones(7, 4, requires_grad=True), COS)),
        ValueError,
        "rotary cos: expected a table that needs no gradient, got requires_grad=True",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_bad_arguments(refused):
    arguments = dict(q=random(2, 5, 4, 8), k=random(2, 7, 2, 8), v=random(2, 7, 2, 8))
    change, error, message = REFUSED[refused]
    attention(**arguments)
    with pytest.raises(error, match=message):
        attention(**arguments | change)
