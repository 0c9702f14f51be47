"""Every public function and module under all that PyTorch does with functions and modules.

`CALLS` has a call of each; a function or module that is added is missed here, and has a place in all tests once it has
its line.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pynlp.nn
from pynlp import functional as F
from pynlp.ops.common import plans

SIZE, OTHER_SIZES = 7, (11, 13)  # of the dimension that changes; no other one has them
HALVES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """A call of a function of tensors.

    Attributes:
        run: The function; gives a tensor or several.
        tensors: Its arguments.
        gradients: How many of the first arguments have a gradient.
        samples: How many of the first arguments vmap gives sample by sample, by their first dimension.
    """

    run: Callable
    tensors: tuple[Tensor, ...]
    gradients: int = 0
    samples: int = 1


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_tensors(codes, state):
    return codes, *(x for x in state if isinstance(x, Tensor))


def lengths(n):
    return torch.tensor([n, n - 2], dtype=torch.int32)


def calls(n: int) -> dict[str, Call]:
    """A call of each public function, with `n` for a batch or a length."""
    q, k, v = randn(2, n, 4, 8), randn(2, n, 2, 8), randn(2, n, 2, 8)
    slopes, table, cos_sin = F.alibi_slopes(4), randn(8, 4), F.rotary_tables(32, 8)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    caches = randn(2, 24, 2, 8), randn(2, 24, 2, 8) + 1
    x, weight, bias = randn(n, 3, 8), randn(8), randn(8) + 1
    target = (torch.arange(3 * n) % 5).view(n, 3)
    index = torch.arange(2 * n).view(n, 2) * 3 % 6 - 1  # two experts of four, or none
    codes, scales = (torch.arange(32) * 37 % 256).byte().view(32, 1), torch.tensor([120, 121], dtype=torch.uint8)
    return {
        "alibi_slopes": Call(lambda: F.alibi_slopes(n), ()),
        "relative_position_buckets": Call(lambda: F.relative_position_buckets(8, 2 * n, True), ()),
        "rotary_tables": Call(lambda: F.rotary_tables(n, 8), ()),
        "attention": Call(
            lambda q, k, v, slopes, table, lengths, cos, sin: F.attention(
                q, k, v, causal=True, window=(9, 0), alibi_slopes=slopes, relative_bias=table, key_lengths=lengths,
                relative_max_distance=12, rotary=(cos, sin), return_lse=True,
            ),
            (q, k, v, slopes, table, lengths(n), *cos_sin), gradients=5, samples=3,
        ),
        "attention_varlen": Call(
            lambda q, k, v, slopes, starts, cos, sin: F.attention_varlen(
                q, k, v, starts, starts, causal=True, alibi_slopes=slopes, rotary=(cos, sin)
            ),
            (*packed, slopes, starts, *cos_sin), gradients=4, samples=3,
        ),
        "attention_decode": Call(
            lambda q, k, v, k_cache, v_cache, lengths: F.attention_decode(
                q, k_cache.clone(), v_cache.clone(), lengths, k=k, v=v, causal=True, return_lse=True
            ),
            (q, k, v, *caches, lengths(5)), samples=1,  # caches that are written to cannot be samples
        ),
        "attention_weights": Call(
            lambda q, k, lengths, rows: F.attention_weights(q, k, key_lengths=lengths, rows=rows),
            (q, k, lengths(n), torch.tensor([1, 0])), samples=2,
        ),
        "gelu": Call(F.gelu, (x,), gradients=1),
        "relu": Call(F.relu, (x,), gradients=1),
        "swiglu": Call(F.swiglu, (x, x + 1), gradients=2, samples=2),
        "layer_norm": Call(
            lambda x, residual, weight, bias: F.layer_norm(x, weight, bias, residual=residual),
            (x, x + 1, weight, bias), gradients=4, samples=2,
        ),
        "rms_norm": Call(F.rms_norm, (x, weight), gradients=2),
        "linear": Call(F.linear, (x, randn(6, 8), randn(6)), gradients=3),
        "linear_cross_entropy": Call(
            lambda x, weight, bias, target: F.linear_cross_entropy(
                x, weight, target, bias, label_smoothing=0.1, softcap=20.0
            ),
            (x, randn(5, 8), randn(5), target), gradients=3,
        ),
        "quantize_int8": Call(
            lambda x: as_tensors(*F.quantize_int8(x.reshape(-1, 8), scheme="affine")), (x.bfloat16().float(),)
        ),
        "dequantize_int8": Call(
            lambda scale, codes: F.dequantize_int8(codes, F.QuantStateInt8(16, torch.float32, scale.float())),
            (randn(6, 1), codes.view(2, 16)[:1].expand(6, 16).char()),
        ),
        "int8_linear": Call(
            lambda x, bias, codes, zeros: F.int8_linear(
                x, codes, F.QuantStateInt8(8, torch.float32, (zeros.float() + 9) / 1000, zeros), bias
            ),
            (x, bias, codes.view(4, 8).repeat(2, 1).char(), torch.arange(8).char().view(8, 1)), gradients=2,
        ),
        "int8_dynamic_linear": Call(
            lambda x, bias, codes, zeros: F.int8_dynamic_linear(
                x, codes, F.QuantStateInt8(8, torch.float32, (zeros.float() + 9) / 1000, zeros), bias,
                outlier_threshold=1.5,
            ),
            (x, bias, codes.view(4, 8).repeat(2, 1).char(), torch.arange(8).char().view(8, 1)), gradients=2,
        ),
        "quantize_int4": Call(lambda x: as_tensors(*F.quantize_int4(x.reshape(-1, 8))), (x.bfloat16().float(),)),
        "dequantize_int4": Call(
            lambda scale, codes: F.dequantize_int4(codes, F.QuantStateInt4(16, 8, torch.float32, scale.float())),
            (randn(8, 1), codes.view(8, 4)),
        ),
        "int4_linear": Call(
            lambda x, bias, codes, minimum: F.int4_linear(
                x, codes, F.QuantStateInt4(8, 8, torch.float32, minimum.float() / 9, minimum=minimum.float()), bias,
                activations="int8",
            ),
            (x, bias, codes.view(8, 4), randn(8, 1)), gradients=2,
        ),
        "quantize_4bit": Call(lambda x: as_tensors(*F.quantize_4bit(x)), (x.bfloat16().float(),)),
        "dequantize_4bit": Call(
            lambda scales, codes: F.dequantize_4bit(
                codes, F.QuantState4bit("nf4", 32, (8, 8), torch.float32, scales.float())
            ),
            (randn(2), codes),
        ),
        "linear_4bit": Call(
            lambda x, bias, codes, scales: F.linear_4bit(
                x, codes, F.QuantState4bit("mxfp4", 32, (8, 8), torch.float32, scales), bias
            ),
            (x, bias, codes, scales), gradients=2,
        ),
        "moe_dispatch": Call(lambda index: F.moe_dispatch(index, 4), (index,)),
        "grouped_mm": Call(
            lambda x, weight, bias, offsets: F.grouped_mm(x, weight, offsets, bias),
            (randn(n, 8), randn(3, 8, 5), randn(3, 5), torch.tensor([2, 4, n - 1])), gradients=3, samples=3,
        ),
        "moe_mlp": Call(
            lambda x, weights, gate_up, down, bias, index: F.moe_mlp(
                x, index, weights.sigmoid(), gate_up, down, gate_up_bias=bias
            ),
            (randn(n, 8), randn(n, 2), randn(4, 12, 8), randn(4, 8, 6), randn(4, 12), index), gradients=5, samples=5,
        ),
    }  # fmt: skip


class Routed(nn.Module):
    """How much a router's choices weigh, and the experts' loads, of (2, length, 8)."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router((x[..., 0].abs() * 10).long() if isinstance(self.router, pynlp.nn.HashRouter) else x)
        return torch.cat((routing.top_k_weights.sum(-1).flatten(), routing.load))


def modules(**factory) -> dict[str, Callable[[], nn.Module]]:
    """A maker of each public module; all take (2, length, 8)."""
    return {
        "ExpertChoiceRouter": lambda: Routed(pynlp.nn.ExpertChoiceRouter(8, 4, **factory)),
        "FeedForward": lambda: pynlp.nn.FeedForward(8, 16, activation="swiglu", **factory),
        "HashRouter": lambda: Routed(pynlp.nn.HashRouter(4, 1000, **factory)),
        "LatentAttention": lambda: pynlp.nn.LatentAttention(
            8, 2, kv_rank=4, nope_dim=4, rope_dim=4, max_positions=32, **factory
        ),
        "LayerNorm": lambda: pynlp.nn.LayerNorm(8, **factory),
        "Linear": lambda: pynlp.nn.Linear(8, 4, **factory),
        "Linear8bit": lambda: pynlp.nn.Linear8bit(8, 4, scheme="affine", **factory),
        "Linear8bitDynamic": lambda: pynlp.nn.Linear8bitDynamic(8, 4, outlier_threshold=2.0, **factory),
        "LinearInt4": lambda: pynlp.nn.LinearInt4(8, 4, group_size=16, activations="int8", **factory),
        "LoRALinear": lambda: pynlp.nn.LoRALinear(pynlp.nn.Linear(8, 4, **factory), rank=2),
        "Linear4bit": lambda: pynlp.nn.Linear4bit(8, 4, double_quant=True, **factory),
        "MoE": lambda: pynlp.nn.MoE(8, 16, 4, router_aux_loss_coef=0.1, shared_ffn_dim=8, **factory),
        "MultiHeadAttention": lambda: pynlp.nn.MultiHeadAttention(
            8, 2, causal=True, positions="rope", max_positions=32, **factory
        ),
        "RMSNorm": lambda: pynlp.nn.RMSNorm(8, **factory),
        "TopKRouter": lambda: Routed(pynlp.nn.TopKRouter(8, 4, bias_update_rate=0.1, **factory)),
    }


NAMES = sorted(calls(SIZE))
DIFFERENTIABLE = [name for name, call in calls(SIZE).items() if call.gradients]
WITH_TENSORS = [name for name, call in calls(SIZE).items() if call.tensors]
WITH_FLOATS = [name for name, call in calls(SIZE).items() if any(x.is_floating_point() for x in call.tensors)]
MODULES = sorted(modules())


def test_every_public_function_and_module_is_here():
    assert set(NAMES) == {name for name in F.__all__ if not inspect.isclass(getattr(F, name))}
    public = {name: getattr(pynlp.nn, name) for name in pynlp.nn.__all__}
    layers = {name for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    assert set(MODULES) == layers


def outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def total(result) -> Tensor:
    """One value that depends on all that a call gives."""
    return sum((x.float() * (x.numel() + torch.arange(x.numel()).view(x.shape)).cos()).sum() for x in outputs(result))


def with_gradients(call: Call) -> list[Tensor]:
    return [x.clone().requires_grad_(i < call.gradients) for i, x in enumerate(call.tensors)]


def gradients(function: Callable, call: Call) -> tuple[Tensor, ...]:
    tensors = with_gradients(call)
    return torch.autograd.grad(total(function(*tensors)), tensors[: call.gradients])


def assert_same(actual, expected, **tolerance):
    for a, b in zip(outputs(actual), outputs(expected), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))


def mark(tensors: list[Tensor], size: int) -> None:
    for x in tensors:
        for i, extent in enumerate(x.shape):
            if extent in (size, 2 * size):
                torch._dynamo.mark_dynamic(x, i)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dynamic", "marked", "automatic"])
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_compiled_once_for_all_sizes(name, how):
    """In full graphs, forward and backward, with the bits of the call that is not compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run, compilations = calls(SIZE)[name].run, []
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True if how == "dynamic" else None)
    for size in (SIZE, *OTHER_SIZES):
        call = calls(size)[name]
        tensors = with_gradients(call)
        if how == "marked":
            mark(tensors, size)
        result = compiled(*tensors)
        assert_same(result, run(*call.tensors))
        if call.gradients:
            assert_same(torch.autograd.grad(total(result), tensors[: call.gradients]), gradients(run, call))
        compilations.append(counter.frame_count)
    first, *_, last = compilations
    assert last - first <= (1 if how == "automatic" else 0)


def other_values(call: Call, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    tensors = (x + torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in call.tensors)
    return call._replace(tensors=tuple(tensors))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_later_calls(name, dtype):
    """By whatever plan earlier calls leave, on tensors with other values, the bits are those without plans."""
    call = calls(SIZE)[name]
    call = call._replace(tensors=tuple(x.to(dtype) if x.is_floating_point() else x for x in call.tensors))
    for seed in range(4):
        call = other_values(call, seed)
        results = outputs(call.run(*call.tensors)), gradients(call.run, call) if call.gradients else ()
        with plans.off():
            assert_same(results[0], call.run(*call.tensors))
            if call.gradients:
                assert_same(results[1], gradients(call.run, call))


class Program(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *tensors):
        return self.run(*tensors)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_exported_for_all_sizes(name, strict):
    call, dim = calls(SIZE)[name], torch.export.Dim.DYNAMIC
    shapes = [{i: dim for i, extent in enumerate(x.shape) if extent in (SIZE, 2 * SIZE)} for x in call.tensors]
    exported = torch.export.export(Program(call.run), call.tensors, dynamic_shapes=(tuple(shapes),), strict=strict)
    for size in (SIZE, *OTHER_SIZES):
        tensors = calls(size)[name].tensors
        assert_same(exported.module()(*tensors), call.run(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_meta_and_fake_tensors_have_the_shapes(name, dtype):
    call = calls(SIZE)[name]
    call = call._replace(tensors=tuple(x.to(dtype) if x.is_floating_point() else x for x in call.tensors))
    expected = outputs(call.run(*call.tensors))
    results = [outputs(call.run(*(x.to("meta") for x in call.tensors)))]
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(x) for x in call.tensors]
        results.append(outputs(call.run(*fakes)))
    for result in results:
        described = [(x.shape, x.dtype, x.stride()) for x in result]
        assert described == [(x.shape, x.dtype, x.stride()) for x in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_fake_tensors_have_the_shapes(name, dtype):
    call = calls(SIZE)[name]
    call = call._replace(tensors=tuple(x.to(dtype) if x.is_floating_point() else x for x in call.tensors))
    expected = [(x.shape, x.dtype, x.stride()) for x in gradients(call.run, call)]
    mode = FakeTensorMode()
    with mode:
        fakes = call._replace(tensors=tuple(mode.from_tensor(x) for x in call.tensors))
        assert [(x.shape, x.dtype, x.stride()) for x in gradients(call.run, fakes)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_no_fake_tensor_is_kept(name):
    """What is kept for later calls is never made of, or handed to, fake tensors; sizes here are of no other test."""
    call = calls(9)[name]
    for _ in range(2):
        mode = FakeTensorMode()
        with mode:
            fakes = [mode.from_tensor(x) for x in call.tensors]
            call.run(*fakes)
        assert all(type(x) is Tensor for x in outputs(call.run(*call.tensors)))
        if call.gradients:
            gradients(call.run, call)


@pytest.mark.parametrize("dtypes", [(a, b) for a in HALVES for b in HALVES], ids=str)
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_autocast_takes_all_dtypes(name, dtypes):
    """Where a call of one dtype is right, so is, in autocast, one whose first argument has another dtype."""
    call = calls(SIZE)[name]
    first, others = dtypes
    tensors = [x.to(first if i == 0 else others) if x.is_floating_point() else x for i, x in enumerate(call.tensors)]
    tensors = [x.requires_grad_(i < call.gradients) for i, x in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        result = call.run(*tensors)
    assert_same(
        [x.float() for x in outputs(result)], [x.float() for x in outputs(call.run(*call.tensors))], rtol=0.2, atol=0.2
    )
    if call.gradients:
        for x, grad in zip(tensors, torch.autograd.grad(total(result), tensors[: call.gradients]), strict=False):
            assert grad.dtype == x.dtype and grad.isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func(name):
    call = calls(SIZE)[name]
    places = tuple(range(call.gradients))
    expected = gradients(call.run, call)
    assert_same(torch.func.grad(lambda *x: total(call.run(*x)), argnums=places)(*call.tensors), expected)
    value, pull_back = torch.func.vjp(
        lambda *x: total(call.run(*x, *call.tensors[call.gradients :])), *call.tensors[: call.gradients]
    )
    assert_same(pull_back(torch.ones_like(value)), expected)


def batched(call: Call, count: int = 3) -> tuple[list[Tensor], list[int | None]]:
    """The arguments `count` times with other values, and their vmapped dimensions."""
    tensors = [
        torch.stack([x + i for i in range(count)], 1) if place < call.samples else x
        for place, x in enumerate(call.tensors)
    ]
    return tensors, [1 if place < call.samples else None for place in range(len(tensors))]


def sample(tensors: list[Tensor], dims: list[int | None], i: int) -> list[Tensor]:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_vmap(name):
    call = calls(SIZE)[name]
    tensors, dims = batched(call)
    result = outputs(torch.vmap(call.run, in_dims=tuple(dims))(*tensors))
    for i in range(3):
        assert_same([x[i] for x in result], call.run(*sample(tensors, dims, i)), rtol=1e-5, atol=1e-6)
    if call.gradients:
        places = tuple(range(call.gradients))
        grads = torch.vmap(torch.func.grad(lambda *x: total(call.run(*x)), argnums=places), in_dims=tuple(dims))
        for place, grad in enumerate(grads(*tensors)):
            for i in range(3):
                alone = call._replace(tensors=tuple(sample(tensors, dims, i)))
                torch.testing.assert_close(grad[i], gradients(call.run, alone)[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_FLOATS)
def test_forward_mode_gives_the_derivative_or_an_error(name):
    call = calls(SIZE)[name]
    place = [x.is_floating_point() for x in call.tensors].index(True)

    def along(tangent):
        def run(x):
            return total(call.run(*call.tensors[:place], x, *call.tensors[place + 1 :]))

        return torch.func.jvp(run, (call.tensors[place],), (tangent,))[1]

    tangent = torch.ones_like(call.tensors[place])
    try:
        derivative = along(tangent)
    except NotImplementedError as error:
        assert str(error).startswith("pynlp's ")
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(call.tensors[place], tangent)
            with pytest.raises(NotImplementedError, match="pynlp's .* has no (forward-mode )?derivative"):
                call.run(*call.tensors[:place], dual, *call.tensors[place + 1 :])
    else:
        torch.testing.assert_close(derivative, (gradients(call.run, call)[0] * tangent).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_second_derivative_is_lost(name):
    call = calls(SIZE)[name]

    def penalty(*tensors):
        loss = total(call.run(*tensors)).square()  # its derivatives depend on the tensors even where a call is linear
        grad, *_ = torch.autograd.grad(loss, tensors[: call.gradients], create_graph=True)
        return grad.square().sum() + sum(x.sum() for x in tensors[: call.gradients])

    tensors = with_gradients(call)
    if name in ("linear", "relu", "grouped_mm"):  # PyTorch's, which has them, and products of products
        exact = call._replace(tensors=tuple(x.double() if x.is_floating_point() else x for x in call.tensors))
        assert torch.autograd.gradgradcheck(call.run, tuple(with_gradients(exact)), fast_mode=True)
    else:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            penalty(*tensors).backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointing(name, reentrant):
    call = calls(SIZE)[name]
    expected = gradients(call.run, call)
    if reentrant:
        assert_same(reentrant_gradients(call), expected)
    else:
        assert_same(gradients(lambda *x: checkpoint(call.run, *x, use_reentrant=False), call), expected)


def reentrant_gradients(call: Call) -> list[Tensor]:
    """By backward: that kind of checkpoint does not work with torch.autograd.grad."""
    tensors = with_gradients(call)
    checkpoint(lambda *x: total(call.run(*x)), *tensors, use_reentrant=True).backward()
    return [x.grad for x in tensors[: call.gradients]]


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_a_module(name):
    x = randn(2, SIZE, 8)
    module = modules()[name]()
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(other(x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_made_on_the_meta_device(name):
    """It works once its parameters are loaded, and once it was moved by to_empty."""
    x = randn(2, SIZE, 8)
    module = modules()[name]()
    expected = module(x)
    assigned, moved = modules(device="meta")[name](), modules(device="meta")[name]()
    assert assigned(x.to("meta")).shape == expected.shape
    assigned.load_state_dict(module.state_dict(), assign=True)
    moved.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(assigned(x), expected)
    assert_same(moved(x), expected)
