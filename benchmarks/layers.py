"""Norms, activations, the loss and linear layers beside PyTorch's operators.

`python -m benchmarks.layers`.

A case is set up once, its errors against fp64 decide whether its speed is printed, and all implementations take turns.
Norms, activations and the loss run forward and backward, in the sizes of a training step: 4096 tokens, 256 channels,
1024 inside a feed-forward, vocabularies of 8,000 and 32,000. Linear layers run forward alone, on few rows and so many
weights that each comes from memory, as in decoding. Rates count the bytes that must be read and written once, and their
peak is the read bandwidth; products count FLOP/s. Writes results/layers.json and layers.png.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, plot_shares, row, run_cases
from benchmarks.measure import BF16, FP32, PRODUCT_DTYPES, peak_memory
from pynlp.functional import gelu, layer_norm, linear, linear_cross_entropy, relu, rms_norm, swiglu
from pynlp.reference.common.random import dropped_parts, keeps

TOKENS, CHANNELS, INNER = 4096, 256, 1024
SEED = 1


def with_gradients(function: Callable, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The results of a function, and the gradients of all its tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = function(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    weights = [w.to(x.dtype) for w, x in zip(weights, results, strict=True)]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, weights))


def eager_dropout(x: Tensor, dropout_p: float) -> Tensor:
    """Dropout of the same values that ours drops."""
    if not dropout_p:
        return x
    kept = keeps(torch.tensor([SEED]), dropout_p, x.shape[0], x.shape[1])
    return x * kept / (1 - dropped_parts(dropout_p) / 65536)


def elementwise_case(name, dtype, ours, theirs, tensors, weights, passes, dropout_p, asked) -> Case:
    """`theirs(dropout, *tensors)` with PyTorch's dropout as the peer, with ours as the oracle."""
    calls = {
        "ours": lambda: with_gradients(ours, tensors, weights),
        "eager": lambda: with_gradients(lambda *t: theirs(lambda x: F.dropout(x, dropout_p), *t), tensors, weights),
    }

    def oracle() -> list[Tensor]:
        exact = [x.double() for x in tensors]
        return with_gradients(lambda *t: theirs(lambda x: eager_dropout(x, dropout_p), *t), exact, weights)

    return Case(
        name + (f", dropout {dropout_p}" if dropout_p else ""), dtype, calls, oracle, {"eager": asked},
        bytes=passes * tensors[0].numel() * dtype.itemsize,
        checked={"ours": calls["ours"]} if dropout_p else None,  # PyTorch drops other values
    )  # fmt: skip


def norm_case(kind: str, dtype: torch.dtype, residual: bool, dropout_p: float) -> Case:
    torch.manual_seed(0)
    x, r, weight_y, weight_new = (torch.randn(TOKENS, CHANNELS).to(dtype) for _ in range(4))
    weight, bias = torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
    parameters = [weight, bias] if kind == "layer norm" else [weight]
    size = len(parameters)

    def norm(x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        parameters = [p.to(x.dtype) for p in parameters]
        shape = (CHANNELS,)
        return F.layer_norm(x, shape, *parameters) if kind == "layer norm" else F.rms_norm(x, shape, *parameters, 1e-6)

    def ours(x: Tensor, *rest: Tensor):
        fused = layer_norm if kind == "layer norm" else rms_norm
        return fused(x, *rest[:size], residual=rest[size] if residual else None, dropout_p=dropout_p, seed=SEED)

    def theirs(dropout: Callable, x: Tensor, *rest: Tensor):
        new = dropout(x)
        new = rest[size] + new if residual else new
        y = norm(new, rest[:size])
        return (y, new) if residual else y

    # Forward reads x and the residual and writes y and the sum; backward reads that and the gradients, and writes two.
    passes = (4 + 3 + (2 if dropout_p else 1)) if residual else 2 + 3
    return elementwise_case(
        kind + (", residual" if residual else ""), dtype, ours, theirs,
        [x, *parameters, *([r] if residual else [])], [weight_y, weight_new] if residual else [weight_y],
        passes, dropout_p, 4.0 if dropout_p else 1.5,
    )  # fmt: skip


def gate_case(kind: str, dtype: torch.dtype, dropout_p: float) -> Case:
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, INNER).to(dtype), torch.randn(TOKENS, INNER).to(dtype)
    fused = {"gelu": gelu, "relu": relu, "swiglu": swiglu}[kind]

    def theirs(dropout: Callable, x: Tensor) -> Tensor:
        if kind != "swiglu":
            return dropout(getattr(F, kind)(x))
        gate, up = x.chunk(2, dim=-1)
        return dropout(F.silu(gate) * up)

    return elementwise_case(
        kind, dtype, lambda x: fused(x, dropout_p=dropout_p, seed=SEED), theirs, [x],
        [weight[:, : INNER // 2] if kind == "swiglu" else weight],
        4 if kind == "swiglu" else 5, dropout_p, 4.0 if dropout_p else 1.5,
    )  # fmt: skip


def loss_case(vocabulary: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS).to(dtype)
    weight = (torch.randn(vocabulary, CHANNELS) * CHANNELS**-0.5).to(dtype)
    target = torch.randint(vocabulary, (TOKENS,))

    def both(function: Callable, *tensors: Tensor) -> list[Tensor]:
        return with_gradients(function, list(tensors), [torch.tensor(1.0)])

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, label_smoothing=0.1)

    def autocast(x: Tensor, weight: Tensor) -> Tensor:  # which takes the logits to fp32
        return F.cross_entropy(F.linear(x, weight).float(), target, label_smoothing=0.1)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, label_smoothing=0.1)

    calls = {"ours": lambda: both(ours, x, weight), "eager": lambda: both(eager, x, weight)}
    if dtype == BF16:
        calls["eager, fp32 logits"] = lambda: both(autocast, x, weight)
    return Case(
        f"linear + cross-entropy, {vocabulary}", dtype, calls, lambda: both(eager, x.double(), weight.double()),
        dict.fromkeys((name for name in calls if name != "ours"), 1.3), flop=6 * TOKENS * CHANNELS * vocabulary,
    )  # fmt: skip


def linear_case(rows: int) -> Case:
    torch.manual_seed(0)
    x, weights = torch.randn(rows, 1024), torch.randn(24, 1024, 1024) / 32
    work = {"bytes": 4 * weights.numel()} if rows < 32 else {"flop": 2 * rows * weights.numel()}
    return Case(
        f"linear, {rows} rows, 24 weights of 1024 x 1024", FP32,
        {"ours": lambda: [linear(x, w) for w in weights], "eager": lambda: [F.linear(x, w) for w in weights]},
        lambda: [F.linear(x.double(), w.double()) for w in weights], {"eager": 1.0}, **work,
    )  # fmt: skip


def loss_memory(vocabulary: int, dtype: torch.dtype) -> dict:
    """Peak memory of forward and backward, in MiB."""
    script = f"""
import torch, torch.nn.functional as F
from pynlp.functional import linear_cross_entropy
x = torch.randn({TOKENS}, {CHANNELS}, dtype={dtype}, requires_grad=True)
weight = torch.randn({vocabulary}, {CHANNELS}, dtype={dtype}, requires_grad=True)
target = torch.randint({vocabulary}, ({TOKENS},))
linear_cross_entropy(x[:300], weight[:300], target[:300] % 300).backward()
F.cross_entropy(F.linear(x[:300], weight[:300]), target[:300] % 300).backward()
x.grad = weight.grad = None
def measured():
"""
    ours = peak_memory(script + "    linear_cross_entropy(x, weight, target).backward()\n") / 2**20
    eager = peak_memory(script + "    F.cross_entropy(F.linear(x, weight), target).backward()\n") / 2**20
    return {
        "linear + cross-entropy": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "MiB": f"{ours:.0f}",
        "eager MiB": f"{eager:.0f}",
        "eager / ours": f"{eager / ours:.1f}",
        "asked": ">= 4",
        "met": "yes" if eager >= 4 * ours else "NO",
    }


def loss_memories() -> list[dict]:
    return [loss_memory(vocabulary, dtype) for dtype in PRODUCT_DTYPES for vocabulary in (8000, 32000)]


CASES = {
    **{
        f"{kind} {residual} {dropout_p} {dtype}": lambda *, kind=kind, dtype=dtype, residual=residual, p=dropout_p: (
            norm_case(kind, dtype, residual == "residual", p)
        )
        for dtype in (FP32, BF16)
        for kind in ("layer norm", "rms norm")
        for residual, dropout_p in (("alone", 0.0), ("residual", 0.0), ("residual", 0.2))
    },
    **{
        f"{kind} {dropout_p} {dtype}": lambda *, kind=kind, dtype=dtype, p=dropout_p: gate_case(kind, dtype, p)
        for dtype in (FP32, BF16)
        for kind in ("gelu", "relu", "swiglu")
        for dropout_p in (0.0, 0.2)
    },
    **{
        f"loss {vocabulary} {dtype}": lambda *, vocabulary=vocabulary, dtype=dtype: loss_case(vocabulary, dtype)
        for dtype in PRODUCT_DTYPES
        for vocabulary in (8000, 32000)
    },
    **{f"linear {rows}": lambda *, rows=rows: linear_case(rows) for rows in (1, 8, 32, 160)},
}


def main() -> None:
    label = "% of the machine's peak: read bandwidth, FLOP/s for products"
    plots = {"layers": lambda tables: plot_shares(tables["cases"], "Layers: how near the machine's peak", label)}
    run_cases("layers", __doc__, {"cases": (CASES, row)}, {"memory": loss_memories}, plots)


if __name__ == "__main__":
    main()
