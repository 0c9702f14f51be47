"""The accuracy that drawn cases are held to: that of cases/attention.py, without the luck of small tensors.

Our error against fp64 is at most twice (gradients: three times) that of PyTorch's own path in the same dtype; the
largest single error, more a matter of luck, has twice that room. On top comes half a unit in the last place, what
rounding the exact result may cost.

Among thousands of cases some are so small that the few roundings of PyTorch's path nearly cancel out. Where ours is
above the limit, three things are looked at that it is entitled to. One is what PyTorch's path in the same dtype misses
by on inputs close to these, of which not all are lucky. One is what rounding to fp32, in which ours computes, may cost:
several runs of the oracle, each step of which is off by up to half a unit in the last place. The last is what keeping
little of the forward pass costs the gradients (see cases/attention.py), the lse being off as those runs say, and by its
rounding.
"""

import math
from collections.abc import Callable, Iterable

import torch
from cases.attention import errors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = torch.finfo(torch.float32).eps / 2  # what a rounding to fp32 may cost
RUNS = 8
# From csrc/simd/math.h: the relative error of the exponential in bf16, all to one side; and 2 ** -126, below which a
# weight may be 0, with room for what weights are multiplied by.
EXPONENTIAL_BF16 = 1.04e-4
FLUSHED = 1e-35

aten = torch.ops.aten
# Operations that round their result; those that add products or terms up, by rounding as they go; all others copy.
ROUNDING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.exp.default, aten.tanh.default}
SUMMING = {aten.bmm.default, aten.sum.dim_IntList, aten.sum.default}


class Rounded(TorchDispatchMode):
    """Arithmetic in fp64 that is off as if it were in fp32 and rounded another way: by a random part of UNIT."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def random(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(-UNIT, UNIT, generator=self.generator)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float64:
            return result
        if function in ROUNDING:
            return result + result * self.random(result)
        if function in SUMMING:
            products = function is aten.bmm.default
            terms = arguments[0].shape[-1] if products else arguments[0].numel() / max(1, result.numel())
            # Of what there is after each term: either a part of the result, or what has not yet cancelled out.
            sizes = function(*(x.abs() if isinstance(x, Tensor) else x for x in arguments), **(options or {}))
            return result + torch.hypot(sizes, math.sqrt(terms / 3) * result) * self.random(result)
        if function is aten.logsumexp.default:
            terms = arguments[0].shape[-1]
            return result + (result.abs() + math.sqrt(terms / 3)) * self.random(result)
        if function is aten._softmax.default:
            terms = arguments[0].shape[-1]
            row = math.sqrt(terms / 3) * self.random(result.sum(-1, keepdim=True))
            return result + result * (self.random(result) + row)
        if function is aten._softmax_backward_data.default:  # weights * (gradients - their weighted sum)
            gradients, weights = arguments[:2]
            sizes = weights * (gradients.abs() + (gradients.abs() * weights).sum(-1, keepdim=True))
            return result + sizes * self.random(result)
        if function is aten.tanh_backward.default:  # gradient * (1 - result ** 2)
            return result + arguments[0] * self.random(result)
        return result


def answers(function: Callable, tensors: dict[str, Tensor], options: dict, wanted: Iterable[str], weights) -> dict:
    """out, lse and, of a weighting of them (None: not used), the gradients of the wanted tensors, by name."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    results = function(**leaves, **options)
    named = {name: x.detach() for name, x in zip(("out", "lse"), results, strict=True) if x is not None}
    return named | gradients(results, {name: leaves[name] for name in wanted}, weights)


def gradients(results: tuple[Tensor, Tensor], leaves: dict[str, Tensor], weights) -> dict[str, Tensor]:
    """The gradients of those results that are used; the graph is kept."""
    if not leaves:
        return {}
    # Where only v is wanted, eager PyTorch's lse is no part of any graph.
    used = [(x, w) for x, w in zip(results, weights, strict=True) if w is not None and x.requires_grad]
    values = torch.autograd.grad(
        [x for x, _ in used],
        list(leaves.values()),
        [w.to(x.dtype) for x, w in used],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"gradient of {name}": x for name, x in zip(leaves, values, strict=True)}


def assert_accurate(
    results: dict[str, Tensor],
    oracle: Callable,
    tensors: dict[str, Tensor],
    options: dict,
    wanted: Iterable[str] = (),
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """`results` are as near to `oracle`, a function of tensors that gives (out, lse), as they may be expected to be."""
    exact = {name: x.double() for name, x in tensors.items()}
    expected = answers(oracle, exact, options, wanted, weights)
    peer = answers(oracle, tensors, options, wanted, weights)
    for name, value in results.items():
        assert value.shape == expected[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        assert value.dtype == peer[name].dtype, f"{name}: {value.dtype}, not {peer[name].dtype}"
    missed = {name: errors(x, expected[name]) for name, x in peer.items()}
    if not above(results, expected, missed, {}):
        return
    runs = [rounded_answers(oracle, exact, options, wanted, weights, seed) for seed in range(RUNS)]
    for run in runs:
        missed = {name: tuple(map(max, missed[name], errors(x, expected[name]))) for name, x in run.items()}
    close = [errors_close_by(oracle, tensors, options, wanted, weights, seed) for seed in range(RUNS)]
    for name, own in missed.items():
        missed[name] = tuple(max(e, root_mean_square(run[name][i] for run in close)) for i, e in enumerate(own))
    kept = {}
    if wanted:
        kept = cost_of_keeping(oracle, exact, options, wanted, weights, runs, tensors["q"].dtype)
    if tensors["q"].dtype == torch.bfloat16:
        kept["lse"] = (EXPONENTIAL_BF16 / 2, EXPONENTIAL_BF16 / 2)
    messages = above(results, expected, missed, kept)
    assert not messages, "\n".join(messages)


def above(results: dict, expected: dict, missed: dict, kept: dict) -> list[str]:
    """Which errors are above what those of others, and of what is kept, allow."""
    messages = []
    for name, value in results.items():
        factor = 3 if name.startswith("gradient") else 2
        exact = expected[name].masked_fill(expected[name].isinf(), 0.0)
        sizes = errors(exact, torch.zeros_like(exact))
        ours, costs = errors(value, expected[name]), kept.get(name, (0.0, 0.0))
        for i, (measure, room) in enumerate((("largest", 2 * factor), ("rms", factor))):
            rounding = torch.finfo(value.dtype).eps / 2 * sizes[i] + smallest(value.dtype) + FLUSHED
            if not ours[i] <= room * (missed[name][i] + costs[i]) + rounding:
                messages.append(
                    f"{name}: {measure} error {ours[i]:.3g}, expected at most {room} x ({missed[name][i]:.3g} + "
                    f"{costs[i]:.3g}) + {rounding:.3g}"
                )
    return messages


def errors_close_by(oracle, tensors: dict[str, Tensor], options: dict, wanted, weights, seed: int) -> dict:
    """Errors of PyTorch's path on inputs a few percent off: as large as on these, but rounded otherwise."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: (x * (1 + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64))).to(x.dtype)
        for name, x in tensors.items()
    }
    expected = answers(oracle, {name: x.double() for name, x in moved.items()}, options, wanted, weights)
    peer = answers(oracle, moved, options, wanted, weights)
    return {name: errors(x, expected[name]) for name, x in peer.items()}


def root_mean_square(values: Iterable[float]) -> float:
    values = list(values)
    return math.sqrt(sum(x**2 for x in values) / len(values))


def rounded_answers(oracle, exact: dict[str, Tensor], options: dict, wanted, weights, seed: int) -> dict[str, Tensor]:
    """The oracle's, each step rounded. Ours computes in base 2: scale and biases are rounded twice for that."""
    generator = torch.Generator().manual_seed(seed)
    rounded = Rounded(generator)
    scale = options["softmax_scale"]
    scale = torch.tensor(exact["q"].shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float64)
    scale = (scale + 2 * scale * rounded.random(scale)).item()
    tensors = {name: x if name in "qkv" else x + 2 * x * rounded.random(x) for name, x in exact.items()}
    with rounded:
        return answers(oracle, tensors, options | {"softmax_scale": scale}, wanted, weights)


def cost_of_keeping(oracle, exact: dict, options: dict, wanted, weights, runs: list[dict], dtype: torch.dtype) -> dict:
    """How far off gradients are, as `errors` says, because of what is kept of the forward pass.

    Backward computes the weights again, and rounds otherwise. To it the lse, and out, are off by as much as the runs of
    the oracle differ, and by their own rounding. The one scales all that comes from a query; the other, and the
    rounding of its product with the incoming gradient, acts as a gradient of the lse does.
    """
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in exact.items()}
    results = oracle(**leaves, **options)
    out, lse = (x.detach() for x in results)
    weight_out, weight_lse = (
        torch.zeros_like(x) if weight is None else weight.double()
        for x, weight in zip((out, lse), weights, strict=True)
    )
    product = (weight_out * out).transpose(-3, -2)  # (.., H, Sq, Dv)
    of_out = torch.finfo(dtype).eps * product.norm(dim=-1) + 2 * UNIT * product.abs().sum(-1)
    of_out += smallest(dtype) * weight_out.abs().sum(-1).transpose(-2, -1)
    of_out += spread([(weight_out * run["out"]).sum(-1).transpose(-2, -1) for run in runs])
    of_lse = 2 * UNIT * lse.nan_to_num(neginf=0.0).abs() + (EXPONENTIAL_BF16 if dtype == torch.bfloat16 else 0)
    of_lse += spread([run["lse"].nan_to_num(neginf=0.0) for run in runs])
    costs = {f"gradient of {name}": [] for name in wanted}
    generator = torch.Generator().manual_seed(0)
    for run in range(RUNS):
        # To either side; and once all to one, as the exponential is, and queries that see the same.
        sides = torch.randn(2, *lse.shape, generator=generator, dtype=torch.float64).sign() if run else (1.0, 1.0)
        off, delta_off = sides[0] * of_lse, sides[1] * of_out
        changed = (weight_out * off.transpose(-2, -1)[..., None], weight_lse * off + delta_off)
        changes = gradients(results, {name: leaves[name] for name in wanted}, changed)
        for name, change in changes.items():
            costs[name].append(errors(change, torch.zeros_like(change)))
    return {name: tuple(map(root_mean_square, zip(*each, strict=True))) for name, each in costs.items()}


def spread(tensors: list[Tensor]) -> Tensor:
    """Between the largest and the smallest of each value."""
    values = torch.stack(tensors)
    return values.amax(0) - values.amin(0)


def smallest(dtype: torch.dtype) -> float:
    """Half of the smallest step from 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
