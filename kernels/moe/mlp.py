"""The layers of experts, forward and backward: launchers.

Arguments and results are those of the functions of the same names in the reference.
"""

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..common.integers import cdiv, tile_width
from ..common.launch import launch
from .blocks import GroupedFeatures
from .configs import Config
from .grouped import bias_gradient, is_by_lines, programs, start_grouped, start_product, weight_gradient
from .mlp_kernels import (
    bias_share_kernel,
    combine_kernel,
    down_backward_kernel,
    gate_up_kernel,
    weights_gradient_kernel,
)

ACTIVATIONS = ("gelu", "relu", "swiglu", "swiglu_oai")
COMBINED = 2048  # values of a program


def moe_mlp_forward(
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    activation: int,
    interleaved: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token's experts, and what backward needs."""
    experts, outputs, hidden = gate_up_proj.shape
    inner, slots, top_k = down_proj.shape[2], permutation.shape[0], top_k_weights.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = torch.empty((slots, outputs) if keeps else (0,), dtype=x.dtype, device=x.device)
    if slots == 0 or experts == 0:
        return out.zero_(), before.zero_()
    values = torch.empty((slots, inner), dtype=x.dtype, device=x.device)

    def start(own: tuple, config: Config, features: GroupedFeatures, **options) -> CompiledKernel | None:
        return launch(
            gate_up_kernel, (programs(slots, experts, inner, config, keeps),), *own, gate_up_bias, before, values,
            offsets, slots, hidden, inner, experts, features, **options,
        )  # fmt: skip

    if inner:
        name = ACTIVATIONS[activation]
        is_gated = outputs == 2 * inner
        start_grouped(
            "gated" if is_gated else "product", start, x, permutation, top_k, gate_up_proj, slots, inner,
            ACTIVATION=name, INTERLEAVED=is_gated and interleaved, HAS_BIAS=gate_up_bias is not None, KEEPS=keeps,
            TAIL=keeps,
        )  # fmt: skip
    results = torch.empty((slots, hidden), dtype=x.dtype, device=x.device)
    start_product(values, None, 1, down_proj, offsets, down_bias, results)
    _combine(results, top_k_weights, places, out)
    return out, before


def moe_mlp_backward(
    grad: Tensor,
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    before: Tensor,
    activation: int,
    interleaved: bool,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six arguments of forward."""
    experts, outputs, hidden = gate_up_proj.shape
    inner, slots, top_k = down_proj.shape[2], permutation.shape[0], top_k_weights.shape[1]

    def empty(*shape, dtype=x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    exact = torch.float32
    grad_x = empty(*(x.shape if needs_x else (0,)))
    grad_weights = empty(*top_k_weights.shape, dtype=exact)
    grad_gate_up_bias = empty(*((0,) if gate_up_bias is None else gate_up_bias.shape), dtype=exact)
    grad_down_bias = empty(*((0,) if down_bias is None else down_bias.shape), dtype=exact)
    grad_before, values = empty(slots, outputs), empty(slots, inner)
    if slots and experts:
        _start_activation_backward(
            grad, top_k_weights, down_proj, down_bias, permutation, places, offsets, before, grad_before, values,
            grad_weights, ACTIVATIONS[activation], interleaved,
        )  # fmt: skip
    else:
        grad_weights.zero_()
    if gate_up_bias is not None:
        bias_gradient(grad_before, None, None, 1, offsets, grad_gate_up_bias)
    if down_bias is not None:
        bias_gradient(grad, permutation, top_k_weights, top_k, offsets, grad_down_bias)
    grad_gate_up = grad_down = empty(0)
    if needs_gate_up:
        sides = (grad_before, x), (False, True)
        grad_gate_up = _weight_gradient(gate_up_proj, *sides, permutation, top_k, offsets)
    if needs_down:
        grad_down = _weight_gradient(down_proj, (grad, values), (True, False), permutation, top_k, offsets)
    if needs_x:
        rows = empty(slots, hidden)
        if experts:
            start_product(grad_before, None, 1, gate_up_proj.mT, offsets, None, rows)
        _combine(rows, None, places, grad_x)
    return grad_x, grad_weights, grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias


def _start_activation_backward(
    grad: Tensor,
    top_k_weights: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    before: Tensor,
    grad_before: Tensor,
    values: Tensor,
    grad_weights: Tensor,
    activation: str,
    interleaved: bool,
) -> None:
    """Fills grad_before (slots, outputs), values (slots, I), the weighted activations, and grad_weights."""
    experts, hidden, inner = down_proj.shape
    slots, top_k = permutation.shape[0], top_k_weights.shape[1]
    shares = None

    def start(own: tuple, config: Config, features: GroupedFeatures, **options) -> CompiledKernel | None:
        nonlocal shares
        count = cdiv(inner, config.block_n) + (down_bias is not None)
        shares = torch.empty((slots, count), dtype=torch.float32, device=grad.device)
        compiled = launch(
            down_backward_kernel, (programs(slots, experts, inner, config),), *own, top_k_weights, before, grad_before,
            values, shares, offsets, slots, hidden, inner, experts, count, features, **options,
        )  # fmt: skip
        if compiled is None and down_bias is not None:
            launch(
                bias_share_kernel, (programs(slots, experts, 1, config),), own[0], down_bias, shares, offsets, slots,
                hidden, experts, count, features, num_warps=config.num_warps,
            )  # fmt: skip
        return compiled

    start_grouped(
        "gated", start, grad, permutation, top_k, down_proj.mT, slots, inner, "backward", ACTIVATION=activation,
        INTERLEAVED=interleaved and grad_before.shape[1] == 2 * inner,
    )  # fmt: skip
    block = 128
    launch(
        weights_gradient_kernel, (cdiv(slots, block),), shares, places, grad_weights, slots, shares.shape[1],
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def _weight_gradient(
    weight: Tensor,
    sides: tuple[Tensor, Tensor],
    gathered: tuple[bool, bool],
    permutation: Tensor,
    top_k: int,
    offsets: Tensor,
) -> Tensor:
    """The gradient of (E, outputs, inputs) in its order of memory, of the sides of outputs and inputs."""
    if not is_by_lines(weight):
        sides, gathered = sides[::-1], gathered[::-1]
    return weight_gradient(*sides, permutation, gathered, top_k, offsets)


def _combine(rows: Tensor, weights: Tensor | None, places: Tensor, out: Tensor) -> None:
    """out = the sum of each token's rows, weighted or not."""
    if out.numel() == 0:
        return
    tokens, columns = out.shape
    block_n = min(512, tile_width(columns))
    block_m = COMBINED // block_n
    launch(
        combine_kernel, (cdiv(tokens, block_m) * cdiv(columns, block_n),), rows, weights, places, out, tokens, columns,
        places.shape[1], WEIGHTED=weights is not None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
