"""Mixtures of experts beside PyTorch's and transformers' experts.

`python -m benchmarks.moe`.

Experts get uneven shares of the tokens, as routers give them. Peers are torch.nn.functional.grouped_mm, a loop of
products, and transformers' three implementations of experts, with the same weights. The share of a dense product says
how much of the time of one product by torch with as many FLOP ours takes. Writes results/moe.json and moe.png.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pynlp
from benchmarks.cases import Case, plot_shares, row, run_cases
from benchmarks.measure import FP32, PRODUCT_DTYPES, round_times
from pynlp.functional import dequantize_4bit, grouped_mm, moe_mlp, quantize_4bit
from pynlp.ops.moe.dispatch import dispatched

TOKENS, HIDDEN, INNER = 2048, 512, 1024
# Multiples of peers are asked for on machines whose PyTorch is as slow in fp32 as on Zen 5; elsewhere to be ahead.
WIDE = pynlp.get_isa() in ("avx512", "avx512_bf16_vnni")


def choices(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Uneven experts of tokens, and their weights: a share grows with the expert's number, up to the fourfold."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator) + torch.linspace(0, 1.4, experts)
    weights, index = logits.softmax(-1).topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def product_case(dtype: torch.dtype) -> Case:
    """E=8, M=2048, K=512, N=1024."""
    torch.manual_seed(0)
    experts = 8
    index, _ = choices(TOKENS, experts, 1)
    offsets = torch.bincount(index.flatten(), minlength=experts).cumsum(0).int()
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    weight = (torch.randn(experts, 2 * INNER // 2, HIDDEN) / HIDDEN**0.5).to(dtype).mT  # as linear layers have it
    ends = offsets.tolist()

    def loop(x: Tensor, weight: Tensor) -> Tensor:
        starts = [0, *ends[:-1]]
        return torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))])

    calls = {
        "ours": lambda: [grouped_mm(x, weight, offsets)],
        "torch's grouped_mm": lambda: [F.grouped_mm(x, weight, offs=offsets)],
        "loop": lambda: [loop(x, weight)],
        "one dense product": lambda: [x @ weight[0]],
    }
    bound = 2.0 if WIDE and dtype == FP32 else 1.0
    return Case(
        "grouped_mm", dtype, calls, lambda: [loop(x.double(), weight.double())],
        {"torch's grouped_mm": bound, "loop": bound}, share=0.75 if dtype == FP32 else 0.8,
        flop=2 * TOKENS * HIDDEN * weight.shape[2],
        checked={name: calls[name] for name in ("ours", "torch's grouped_mm", "loop")},
    )  # fmt: skip


class Experts:
    """Weights, and the ways to run them: ours, and transformers' Mixtral experts, which share the weights."""

    def __init__(self, experts: int, inner: int, dtype: torch.dtype):
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

        torch.manual_seed(0)
        config = MixtralConfig(num_local_experts=experts, hidden_size=HIDDEN, intermediate_size=inner)
        self.module = MixtralExperts(config).to(dtype)
        for weight in self.module.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.module.gate_up_proj, self.module.down_proj

    def ours(self, x: Tensor, index: Tensor, top_k_weights: Tensor) -> Tensor:
        return moe_mlp(x, index, top_k_weights, *self.weights)

    def transformers(self, name: str) -> Callable:
        def run(x: Tensor, index: Tensor, top_k_weights: Tensor) -> Tensor:
            self.module.config._experts_implementation = name
            return self.module(x, index, top_k_weights.to(x.dtype))

        return run

    def oracle(self, x: Tensor, index: Tensor, top_k_weights: Tensor) -> Tensor:
        """By a loop, in x's dtype."""
        out = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(*self.weights, strict=True)):
            token, place = (index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up.to(x.dtype)).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down.to(x.dtype)) * top_k_weights[token, place, None].to(x.dtype)
            out = out.index_add(0, token, y)
        return out


PEERS = {"transformers eager": "eager", "transformers grouped": "grouped_mm"}


def mlp_case(
    name: str, tokens: int, experts: int, top_k: int, inner: int, dtype: torch.dtype, backward: bool, bound: float
) -> Case:
    """The layer of experts, forward or both ways; batched experts copy weights for each token, and are for few."""
    model = Experts(experts, inner, dtype)
    index, top_k_weights = choices(tokens, experts, top_k)
    x, grad = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
    peers = PEERS | ({"transformers batched": "batched_mm"} if tokens <= 16 else {})
    for weight in model.weights:
        weight.requires_grad_(backward)

    def both(function: Callable, x: Tensor, grad: Tensor) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [function(x, index, top_k_weights)]
        x, own = x.detach().requires_grad_(), top_k_weights.detach().requires_grad_()
        y = function(x, index, own)
        return [y.detach(), *torch.autograd.grad(y, (x, own, *model.weights), grad)]

    calls = {"ours": lambda: both(model.ours, x, grad)}
    calls |= {peer: lambda key=key: both(model.transformers(key), x, grad) for peer, key in peers.items()}
    rows = tokens * top_k
    weights = sum(weight.nbytes // experts for weight in model.weights)
    few = tokens <= 16
    size = {"bytes": len(index.unique()) * weights} if few else {
        "flop": 2 * 3 * rows * HIDDEN * inner * (3 if backward else 1)
    }  # fmt: skip
    return Case(
        name, dtype, calls, lambda: both(model.oracle, x.double(), grad.double()), dict.fromkeys(peers, bound),
        share=0.75 if few else 0.0, slack=3.0, **size,
    )  # fmt: skip


def layer(backward: bool, dtype: torch.dtype) -> Case:
    name = "8 experts, 2 a token" + (", both ways" if backward else "")
    bound = (2.0 if dtype == FP32 else 1.2) if WIDE else 1.0
    return mlp_case(name, TOKENS, 8, 2, INNER, dtype, backward, bound)


def fine_grained(dtype: torch.dtype) -> Case:
    bound = (2.5 if dtype == FP32 else 1.5) if WIDE else 1.0
    return mlp_case("64 experts, 6 a token, both ways", TOKENS, 64, 6, 256, dtype, True, bound)


def decode(tokens: int, dtype: torch.dtype) -> Case:
    """64 experts with 6 a token, weights of so many layers in turn that they come from memory."""
    return mlp_case(f"64 experts, 6 a token, {tokens} tokens", tokens, 64, 6, 256, dtype, False, 3.0 if WIDE else 1.0)


def quantized(tokens: int, dtype: torch.dtype) -> Case:
    """Experts in NF4 beside the same in `dtype`: 16 times 4096 x 1024 and 1024 x 2048, 2 a token."""
    torch.manual_seed(0)
    dense = [torch.randn(16, *shape) / shape[1] ** 0.5 for shape in ((4096, 1024), (1024, 2048))]
    projections = [quantize_4bit(weight) for weight in dense]
    dense = [dequantize_4bit(*projection).to(dtype) for projection in projections]
    index, weights = choices(tokens, 16, 2)
    x = torch.randn(tokens, 1024).to(dtype)
    exact = [weight.double() for weight in dense]
    calls = {
        "ours": torch.no_grad()(lambda: [moe_mlp(x, index, weights, *projections)]),
        "not quantized": torch.no_grad()(lambda: [moe_mlp(x, index, weights, *dense)]),
    }
    size = {"flop": 2 * 3 * tokens * 2 * 1024 * 2048}
    if tokens == 1:
        size = {"bytes": 2 * sum(x.nbytes for packed, state in projections for x in (packed, state.absmax)) / 16}
    return Case(
        f"NF4 experts, {tokens} tokens", dtype, calls, lambda: [moe_mlp(x.double(), index, weights, *exact)],
        {"not quantized": 3.0 if tokens == 1 else 1.0}, slack=3.0, **size,
    )  # fmt: skip


def growth() -> list[dict]:
    """The time of 8192 tokens with 2 experts each out of 8 to 256: the FLOP are the same."""
    calls, lines = {}, []
    for experts in (8, 16, 32, 64, 128, 256):
        model = Experts(experts, INNER // 2, FP32)
        index, weights = choices(8192, experts, 2)
        x = torch.randn(8192, HIDDEN)
        calls[experts] = torch.no_grad()(lambda m=model, x=x, i=index, w=weights: m.ours(x, i, w))
    times = round_times(calls, 8.0)
    first = times[8]
    for experts, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        lines.append({
            "experts": experts, "ms": f"{min(own) * 1e3:.1f}", "time / that of 8": f"{ratio:.2f}", "asked": "<= 1.50",
            "met": "yes" if ratio <= 1.5 else "NO",
        })  # fmt: skip
    return lines


def parts() -> list[dict]:
    """What dispatch and combination take of the layer of 8 experts: the time of the layer with experts of width 0."""
    model = Experts(8, INNER, FP32)
    index, weights = choices(TOKENS, 8, 2)
    x = torch.randn(TOKENS, HIDDEN)
    gate_up, down = (weight.detach() for weight in model.weights)
    empty = gate_up[:, :0], down[:, :, :0]
    with torch.no_grad():
        times = round_times({
            "layer": lambda: moe_mlp(x, index, weights, gate_up, down),
            "dispatch": lambda: dispatched(index, 8),
            "dispatch and combination": lambda: moe_mlp(x, index, weights, *empty),
        }, 3.0)  # fmt: skip
    whole = times["layer"]
    return [
        {
            "part": name, "ms": f"{min(own) * 1e3:.2f}",
            "share": f"{statistics.median(a / b for a, b in zip(own, whole, strict=True)):.1%}",
            "asked": "<= 8 %" if "combination" in name else "",
        }
        for name, own in times.items()
    ]  # fmt: skip


CASES = {
    **{f"grouped_mm {dtype}": lambda *, dtype=dtype: product_case(dtype) for dtype in PRODUCT_DTYPES},
    **{
        f"mlp {'backward' if backward else 'forward'} {dtype}": lambda *, b=backward, d=dtype: layer(b, d)
        for dtype in PRODUCT_DTYPES
        for backward in (False, True)
    },
    **{f"fine {dtype}": lambda *, dtype=dtype: fine_grained(dtype) for dtype in PRODUCT_DTYPES},
    **{f"decode {tokens}": lambda *, tokens=tokens: decode(tokens, torch.bfloat16) for tokens in (1, 4, 16)},
    **{"nf4 1": lambda: quantized(1, torch.bfloat16)},
    **{f"nf4 fp32 {tokens}": lambda *, tokens=tokens: quantized(tokens, FP32) for tokens in (1, 512)},
    **{f"decode fp32 {tokens}": lambda *, tokens=tokens: decode(tokens, FP32) for tokens in (1, 4, 16)},
}


def main() -> None:
    label = "% of the machine's peak: FLOP/s, or read bandwidth for few tokens"
    plots = {
        "moe": lambda tables: plot_shares(tables["cases"], "Mixtures of experts: how near the machine's peak", label)
    }
    run_cases("moe", __doc__, {"cases": (CASES, row)}, {"growth": growth, "parts": parts}, plots)


if __name__ == "__main__":
    main()
