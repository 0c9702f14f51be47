"""Layers of experts drawn from all sizes, layouts and routings: near those in fp64, both ways, by plans and without."""

import dataclasses

import torch
from fuzz.draws import Machine, dtypes, generator_seeds, lengths, machines
from hypothesis import strategies
from torch import Tensor

from pynlp.functional import grouped_mm, moe_mlp
from pynlp.reference.moe.mlp import ACTIVATIONS, GATED


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer of experts, and a product of its tokens, cut into groups, with one of its weights."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    activation: str
    interleaved: bool
    by_lines: bool
    bias: bool
    skew: float  # 0: all experts alike; more: the first ones get most
    dtype: torch.dtype
    gap: int  # between rows and lines
    seed: int
    machine: Machine


@strategies.composite
def calls(draw) -> Call:
    return Call(
        draw(strategies.integers(0, 20) | lengths),
        draw(strategies.integers(1, 9) | strategies.sampled_from((40, 130))),
        draw(strategies.integers(0, 4)),
        draw(lengths),
        draw(lengths),
        draw(strategies.sampled_from(ACTIVATIONS)),
        draw(strategies.booleans()),
        draw(strategies.booleans()),
        draw(strategies.booleans()),
        draw(strategies.sampled_from((0.0, 0.0, 2.0, 20.0))),
        draw(dtypes),
        draw(strategies.integers(0, 3)),
        draw(generator_seeds),
        draw(machines),
    )


def check_moe(call: Call) -> None:
    generator = torch.Generator().manual_seed(call.seed)

    def randn(*shape: int) -> Tensor:
        """Rows with a gap between them."""
        return torch.randn(*shape[:-1], shape[-1] + call.gap, generator=generator)[..., : shape[-1]]

    def projection(outputs: int, inputs: int) -> Tensor:
        scale = max(1, inputs) ** -0.5
        if call.by_lines:
            return (randn(call.experts, outputs, inputs) * scale).to(call.dtype)
        return (randn(call.experts, inputs, outputs) * scale).to(call.dtype).mT

    # Where values before the activation are rounded, they may come to the other side of GPT-OSS's limits.
    size = 0.2 if call.activation == "swiglu_oai" and call.dtype != torch.float32 else 2.0
    outputs = 2 * call.inner if call.activation in GATED else call.inner
    tensors = {
        "x": (size * randn(call.tokens, call.hidden)).to(call.dtype),
        "top_k_weights": randn(call.tokens, call.top_k).sigmoid(),
        "gate_up_proj": projection(outputs, call.hidden),
        "down_proj": projection(call.hidden, call.inner),
    }
    if call.bias:
        tensors |= {"gate_up_bias": randn(call.experts, outputs), "down_bias": randn(call.experts, call.hidden)}
    likely = torch.linspace(0, -call.skew, call.experts + 1)
    noise = -torch.log(-torch.log(torch.rand(call.tokens, call.top_k, call.experts + 1, generator=generator)))
    index = (likely + noise).argmax(-1)  # the last one is none
    grad = randn(call.tokens, call.hidden).to(call.dtype)
    offsets = torch.randint(call.tokens + 1, (call.experts,), generator=generator).sort().values

    def layer(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in tensors.items()}
        x = leaves["x"]
        out = moe_mlp(**leaves, top_k_index=index, activation=call.activation, interleaved=call.interleaved)
        product = grouped_mm(x, leaves["gate_up_proj"].mT, offsets, leaves.get("gate_up_bias"))
        with torch.no_grad():
            alone = moe_mlp(**leaves, top_k_index=index, activation=call.activation, interleaved=call.interleaved)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        of_product = torch.autograd.grad(product, (x, leaves["gate_up_proj"]), torch.ones_like(product))
        return [out.detach(), alone, product.detach(), *gradients, *of_product]

    with call.machine.used():
        results = layer(None)
        again = layer(None)
    assert all(map(torch.equal, results, again))
    names = ["out", "alone", "product", *tensors, "x of product", "weight of product"]
    for name, ours, exact in zip(names, results, layer(torch.float64), strict=True):
        assert_near(name, ours, exact, call.dtype)


def assert_near(name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The largest error is a few roundings of the largest values: of fp32, and where values were rounded to `dtype`."""
    assert ours.shape == exact.shape, name
    if ours.numel():
        unit = 2 * torch.finfo(dtype).eps + 2e-5
        size = exact.abs().max().clamp_min(1.0)  # terms are about 1, and may cancel out
        assert (ours.double() - exact).abs().max() <= 4 * unit * size + torch.finfo(ours.dtype).smallest_normal, name
