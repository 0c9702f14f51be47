"""The layers of experts: against fp64 and a plain loop, in all layouts, and tokens without experts."""

import pytest
import torch
import torch.nn.functional as F
from cases.layers import assert_as_accurate
from cases.pairs import every_pair
from torch import Tensor

from pynlp.functional import moe_mlp
from pynlp.ops.moe.dispatch import dispatched
from pynlp.reference.moe.mlp import ACTIVATIONS, GATED

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, E, K, H, I: a few rows an expert and many; odd sizes; all experts; one expert; more than a chunk of rows; nothing.
SHAPES = [
    (7, 4, 2, 16, 8), (100, 8, 2, 33, 21), (300, 3, 2, 64, 130), (1300, 2, 1, 48, 32), (1, 4, 2, 64, 40),
    (16, 64, 6, 96, 40), (50, 5, 5, 7, 3), (40, 1, 1, 20, 24), (0, 2, 1, 4, 4), (6, 2, 0, 4, 4), (5, 2, 2, 3, 0),
]  # fmt: skip


def eager(x, top_k_weights, gate_up_proj, down_proj, *biases, index, activation="swiglu", interleaved=False) -> Tensor:
    """A loop over experts, products in x's dtype."""
    out = x.new_zeros(x.shape, dtype=top_k_weights.dtype) + 0 * (x.sum() + top_k_weights.sum())
    for expert in range(len(down_proj)):
        token, place = (index == expert).nonzero(as_tuple=True)
        before = x[token] @ gate_up_proj[expert].T
        if biases:
            before = (before + biases[0][expert]).to(x.dtype)
        y = act(before, activation, interleaved) @ down_proj[expert].T
        if biases:
            y = (y + biases[1][expert]).to(x.dtype)
        out = out.index_add(0, token, y * top_k_weights[token, place][:, None])
    return out.to(x.dtype)


def act(before, activation, interleaved):
    if activation not in GATED:
        return getattr(F, activation)(before)
    gate, up = (before[:, ::2], before[:, 1::2]) if interleaved else before.chunk(2, 1)
    if activation == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def case(shape, dtype=torch.float32, activation="swiglu", by_lines=True, biased=False):
    """The tensors by name, and the experts."""
    tokens, experts, top_k, hidden, inner = shape
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def projection(outputs, inputs):
        weight = randn(experts, outputs, inputs) / max(1, inputs) ** 0.5
        return weight.to(dtype) if by_lines else weight.mT.contiguous().to(dtype).mT

    outputs = 2 * inner if activation in GATED else inner
    tensors = {
        "x": 3 * randn(tokens, hidden).to(dtype),
        "top_k_weights": randn(tokens, top_k).sigmoid(),
        "gate_up_proj": projection(outputs, hidden),
        "down_proj": projection(hidden, inner),
    }
    if biased:
        tensors |= {"gate_up_bias": randn(experts, outputs), "down_bias": randn(experts, hidden)}
    return tensors, torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)


def ours(index, **options):
    def run(x, top_k_weights, gate_up_proj, down_proj, gate_up_bias=None, down_bias=None):
        biases = dict(gate_up_bias=gate_up_bias, down_bias=down_bias)
        return moe_mlp(x, index, top_k_weights, gate_up_proj, down_proj, **biases, **options)

    return run


@pytest.mark.every_isa
@every_pair(
    shape=SHAPES, dtype=DTYPES, activation=ACTIVATIONS, by_lines=[True, False], biased=[False, True],
    interleaved=[False, True],
)  # fmt: skip
def test_output_and_gradients(shape, dtype, activation, by_lines, biased, interleaved, isa):
    tensors, index = case(shape, dtype, activation, by_lines, biased)
    options = dict(activation=activation, interleaved=interleaved)
    assert_as_accurate(ours(index, **options), lambda **t: eager(*t.values(), index=index, **options), tensors)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_gradients_and_by_few_rows(shape, isa):
    """What keeps nothing for backward, and what reads each weight once for few rows, gives the same values."""
    tensors, index = case(shape, biased=True)
    run = ours(index)
    for dtype in DTYPES:
        given = {name: x.to(dtype) if x.dim() != 2 or name == "x" else x for name, x in tensors.items()}
        with torch.no_grad():
            alone = run(**given)
        trained = run(**{name: x.clone().requires_grad_() for name, x in given.items()})
        assert torch.equal(alone, trained)
        exact = run(**{name: x.double() for name, x in given.items()})
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            alone.double(), exact, rtol=2 * eps, atol=4 * eps * (1 + exact.abs().max().item()) if exact.numel() else 0
        )


def test_the_same_expert_twice():
    tensors, _ = case((30, 3, 2, 16, 24))
    index = torch.randint(3, (30, 1)).expand(30, 2)
    run = ours(index)
    once = {**tensors, "top_k_weights": tensors["top_k_weights"].sum(1, keepdim=True)}
    torch.testing.assert_close(run(**tensors), ours(index[:, :1])(**once))
    assert_as_accurate(run, lambda **t: eager(*t.values(), index=index), tensors)


@pytest.mark.parametrize("sentinel", ["-1", "E"])
def test_slots_without_an_expert(sentinel):
    """They are not computed, and poison nothing: tokens without any give 0 and get 0, also where they are NaN."""
    tensors, index = case((90, 4, 2, 24, 16), biased=True)
    index = index.clamp(0, 3)
    index[1::3] = 4 if sentinel == "E" else -1
    index[2::3, 0] = 4 if sentinel == "E" else -1
    tensors["x"][1::3] = torch.nan
    tensors["top_k_weights"][2::3, 0] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = ours(index)(**leaves)
    assert out.isfinite().all() and (out[1::3] == 0).all() and (out[2::3] != 0).any()
    grad = torch.randn_like(out)
    grad[1::3] = torch.nan
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["x"][1::3] == 0).all() and (grads["top_k_weights"][2::3, 0] == 0).all()


def test_experts_without_tokens_get_exactly_0():
    tensors, index = case((50, 6, 2, 24, 16), biased=True)
    index = torch.where(index % 2 == 0, index, 0)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    grads = torch.autograd.grad(ours(index)(**leaves).square().sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        if name not in ("x", "top_k_weights"):
            assert (grad[[1, 3, 5]] == 0).all() and (grad[0] != 0).any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 4, 2, 40, 24), (700, 5, 3, 70, 90)], ids=str)
def test_threads_runs_and_strides(shape, dtype, isa):
    tensors, index = case(shape, dtype, biased=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = ours(index)(**leaves)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

    def strided(x):
        wide = torch.full((*(2 * size + 1 for size in x.shape[:-1]), x.shape[-1] + 5), torch.nan, dtype=x.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape[:-1])][..., 3 : 3 + x.shape[-1]]
        view.copy_(x)
        return view

    with torch.no_grad():
        given = {name: strided(x) for name, x in tensors.items()}
        assert torch.equal(ours(strided(index.float()).long())(**given), results[0][0])
        x, weights = (tensors[name].unflatten(0, (1, -1)) for name in ("x", "top_k_weights"))
        batched = ours(index[None])(**{**tensors, "x": x, "top_k_weights": weights})
        assert torch.equal(batched[0], results[0][0])


def test_frozen_weights_and_a_second_backward():
    tensors, index = case((50, 4, 2, 24, 16), biased=True)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = ours(index)(**leaves)
    first, again = (torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for needed in leaves:
        some = {name: x.detach().requires_grad_(name == needed) for name, x in leaves.items()}
        (grad,) = torch.autograd.grad(ours(index)(**some).sum(), some[needed])
        assert torch.equal(grad, first[list(leaves).index(needed)]), needed


def test_what_is_kept_for_backward():
    """x, the values before the activation, and the routing; nothing of size T x K x H."""
    tensors, index = case((256, 8, 4, 64, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(index)(**{name: x.requires_grad_() for name, x in tensors.items()})
    weights = {tensors[name].data_ptr() for name in ("gate_up_proj", "down_proj")}
    size = sum(x.nbytes for x in {x.data_ptr(): x for x in kept if x.data_ptr() not in weights}.values())
    assert size <= 4 * (256 * 64 + 256 * 4 * 2 * 16 + 4 * 256 * 4 + 8)


def test_gradcheck_and_opcheck():
    for activation in ACTIVATIONS:
        tensors, index = case((6, 3, 2, 4, 3), activation=activation, biased=True)
        exact = [x.double().requires_grad_() for x in tensors.values()]
        assert torch.autograd.gradcheck(ours(index, activation=activation), exact)
    *_, offsets, permutation, places = dispatched(index, 3)
    tensors, _ = case((6, 3, 2, 4, 3), biased=True)
    x, weights, gate_up, down, gate_up_bias, down_bias = (t.requires_grad_() for t in tensors.values())
    arguments = (weights, gate_up, gate_up_bias, down, down_bias, permutation, places, offsets)
    torch.library.opcheck(torch.ops.pynlp.moe_mlp_forward, (x, *arguments, 2, False, True))
    before = torch.ops.pynlp.moe_mlp_forward(x, *arguments, 2, False, True)[1]
    tensors = [t.detach() for t in (x, *arguments, before)]
    torch.library.opcheck(torch.ops.pynlp.moe_mlp_backward, (torch.randn(6, 4), *tensors, 2, False, True, True, True))


def test_autocast():
    tensors, index = case((20, 3, 2, 16, 24))
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(index)(**leaves)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


def test_errors():
    tensors, index = case((9, 4, 2, 6, 8), biased=True)

    def refused(error, match, index=index, **changes):
        options = {name: changes.pop(name) for name in ("activation", "interleaved") if name in changes}
        with pytest.raises(error, match=match):
            ours(index, **options)(**{**tensors, **changes})

    refused(ValueError, "activation: expected one of 'gelu', .*got 'silu'", activation="silu")
    refused(ValueError, "top_k_index: expected experts from 0 to 3, or -1 or 4 .*got .* 9", index=index + 5)
    refused(ValueError, r"top_k_index: expected shape \(9, top_k\), got \(8, 2\)", index=index[:8])
    refused(ValueError, r"top_k_weights: expected shape \(9, 2\), got \(9, 1\)",
            top_k_weights=tensors["top_k_weights"][:, :1])  # fmt: skip
    refused(ValueError, r"gate_up_proj: expected shape \(4, 16, 6\), got \(4, 15, 6\)",
            gate_up_proj=tensors["gate_up_proj"][:, :15])  # fmt: skip
    refused(ValueError, r"gate_up_proj: expected shape \(4, 8, 6\), got \(4, 16, 6\)", activation="relu")
    refused(
        ValueError, r"down_proj: expected shape \(4, 6, 8\), got \(4, 5, 8\)", down_proj=tensors["down_proj"][:, :5]
    )
    refused(ValueError, r"down_proj: expected three dimensions, got shape \(6, 8\)", down_proj=tensors["down_proj"][0])
    refused(TypeError, "down_proj: expected x's dtype torch.float32, got torch.float16",
            down_proj=tensors["down_proj"].half())  # fmt: skip
    refused(ValueError, r"gate_up_bias: expected shape \(4, 16\), got \(16,\)",
            gate_up_bias=tensors["gate_up_bias"][0])  # fmt: skip
    refused(TypeError, "x: expected dtype float32", x=tensors["x"].int())
    with pytest.raises(NotImplementedError, match="pynlp's moe_mlp has no second derivative"):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        (grad,) = torch.autograd.grad(ours(index)(**leaves).sum(), leaves["x"], create_graph=True)
        grad.sum().backward()
