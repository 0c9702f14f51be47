"""The layers of experts: schema, fake, autograd and the public function."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import autocast, check_dtype, check_is_tensor, check_tensor, rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.common.plans import derive, planned
from pynlp.ops.moe.checks import check_activation, check_bias, check_routing, needs_gradients, routed
from pynlp.ops.moe.grouped import matrices_in_place
from pynlp.ops.moe.quantized import Quantized, quantized_mlp
from pynlp.reference.common.dtypes import compute_dtype
from pynlp.reference.moe import mlp as reference
from pynlp.reference.moe.mlp import GATED, is_by_lines

EXPERTS = "Tensor gate_up_proj, Tensor? gate_up_bias, Tensor down_proj, Tensor? down_bias"
ROUTING = "Tensor permutation, Tensor places, Tensor offsets"

define(
    "moe_mlp_forward",
    f"(Tensor x, Tensor top_k_weights, {EXPERTS}, {ROUTING}, int activation, bool interleaved, bool keeps) -> "
    "(Tensor, Tensor)",
    reference,
    triton="moe.mlp",
    dtype_of="x",
)
define(
    "moe_mlp_backward",
    f"(Tensor grad, Tensor x, Tensor top_k_weights, {EXPERTS}, {ROUTING}, Tensor before, int activation, "
    "bool interleaved, bool needs_x, bool needs_gate_up, bool needs_down) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="moe.mlp",
    dtype_of="x",
)


@torch.library.register_fake("pynlp::moe_mlp_forward", lib=LIBRARY)
def _forward_fake(x, top_k_weights, gate_up_proj, gate_up_bias, down_proj, down_bias, permutation, places, *options):
    before = (permutation.shape[0], gate_up_proj.shape[1])
    return x.new_empty(x.shape), x.new_empty(before if options[-1] else (0,))


@torch.library.register_fake("pynlp::moe_mlp_backward", lib=LIBRARY)
def _backward_fake(
    grad, x, top_k_weights, gate_up_proj, gate_up_bias, down_proj, down_bias, permutation, places, offsets, before,
    activation, interleaved, needs_x, needs_gate_up, needs_down,
):  # fmt: skip
    def like(projection, needed):
        experts, outputs, inputs = projection.shape
        by_lines = is_by_lines(projection)
        shape = (experts, outputs, inputs) if by_lines else (experts, inputs, outputs)
        return projection.new_empty(shape if needed else (0,))

    return (
        x.new_empty(x.shape if needs_x else (0,)),
        torch.empty_like(top_k_weights),
        like(gate_up_proj, needs_gate_up),
        x.new_empty((0,) if gate_up_bias is None else gate_up_bias.shape, dtype=compute_dtype(x)),
        like(down_proj, needs_down),
        x.new_empty((0,) if down_bias is None else down_bias.shape, dtype=compute_dtype(x)),
    )


def _setup_context(ctx, inputs, output):
    *tensors, activation, interleaved, _ = inputs
    before = output[1]
    ctx.options = activation, interleaved
    ctx.save_for_backward(*tensors, before)
    ctx.mark_non_differentiable(before)
    ctx.set_materialize_grads(False)


def _backward(ctx, saved, needs, grad, _):
    if grad is None:
        return (None,) * 12
    gate_up_proj, down_proj = saved[2], saved[4]
    x, weights, gate_up, gate_up_bias, down, down_bias = _moe_mlp_backward(
        rows_at_one_stride(grad), *saved, *ctx.options, needs[0], needs[2], needs[4]
    )
    gradients = (
        x,
        weights,
        gate_up if is_by_lines(gate_up_proj) else gate_up.mT,
        gate_up_bias,
        down if is_by_lines(down_proj) else down.mT,
        down_bias,
    )
    return *[x if needed else None for x, needed in zip(gradients, needs, strict=False)], *[None] * 6


_moe_mlp_forward = register_autograd("moe_mlp_forward", _setup_context, _backward)
_moe_mlp_backward = refuse_double_backward("moe_mlp_backward", "pynlp's moe_mlp has")


@planned
def moe_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Quantized,
    down_proj: Tensor | Quantized,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """The weighted sum of what each token's experts make of it: `sum over k of w * down(act(gate_up(x)))`.

    No token is dropped, none is copied, and for backward only x and the values before the activation are kept.

    Args:
        x: `(.., H)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        top_k_index: `(.., top_k)`, int32 or int64: each token's experts, -1 or E for none.
        top_k_weights: `(.., top_k)`: their weights.
        gate_up_proj: `(E, 2 I, H)` of gated activations, gates first; `(E, I, H)` of the others. In x's dtype; copied
            unless one of the last two dimensions is contiguous.
        down_proj: `(E, H, I)`, likewise. Both may be quantized, as tuples of codes and their state, and are constants
            then: of these shapes by `quantize_4bit`, of `(E * outputs, inputs)` by `quantize_int8`.
        activation: "swiglu", `silu(gate) * up`; "swiglu_oai", that of GPT-OSS, with clamps; "gelu", exact; "relu".
        gate_up_bias: `(E, 2 I)` or `(E, I)`.
        down_bias: `(E, H)`.
        interleaved: Gates and what they gate take turns in gate_up_proj, as in GPT-OSS.

    Returns:
        `(.., H)` in x's dtype; 0 for tokens without experts. The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off, or on a CPU top_k_index is out of range; the
            message names it. On a GPU an expert out of range is none.

    Source: Shazeer et al., arXiv 1701.06538; Tan et al., arXiv 2403.08245 (ScatterMoE); Guo et al., arXiv 2512.14080
    (SonicMoE), whose backward needs no results of forward.

    Example:
        >>> import torch
        >>> from pynlp.functional import moe_mlp
        >>> x = torch.randn(10, 64, requires_grad=True)
        >>> top_k_weights, top_k_index = torch.randn(10, 8).softmax(-1).topk(2)
        >>> out = moe_mlp(x, top_k_index, top_k_weights, torch.randn(8, 256, 64), torch.randn(8, 64, 128))
        >>> out.sum().backward()
        >>> out.shape
        torch.Size([10, 64])
    """
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (.., H), got a tensor without dimensions")
    if isinstance(gate_up_proj, tuple) or isinstance(down_proj, tuple):
        return quantized_mlp(
            x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, gate_up_bias, down_bias, interleaved
        )
    kind = check_activation(activation)
    hidden, experts = _checked_shapes(x, gate_up_proj, down_proj, activation)
    check_routing(x, top_k_index, top_k_weights, experts)
    shape = x.shape
    x, gate_up_proj, down_proj = autocast(x, gate_up_proj, down_proj)
    for name, projection in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if projection.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {projection.dtype}")
    gate_up_bias = check_bias("gate_up_bias", gate_up_bias, (experts, gate_up_proj.shape[1]), x)
    down_bias = check_bias("down_bias", down_bias, (experts, hidden), x)
    keeps = needs_gradients(x, top_k_weights, gate_up_proj, gate_up_bias, down_proj, down_bias)
    tokens = routed(x, top_k_index, top_k_weights, experts)
    out, _ = _moe_mlp_forward(
        tokens.x, tokens.top_k_weights, matrices_in_place(gate_up_proj), gate_up_bias, matrices_in_place(down_proj),
        down_bias, *tokens[2:], kind, interleaved, keeps,
    )  # fmt: skip
    return out if len(shape) == 2 else derive(Tensor.view, out, shape)


def _checked_shapes(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str) -> tuple[int, int]:
    """The sizes H and E."""
    hidden = x.shape[-1]
    for name, projection in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_is_tensor(name, projection)
        if projection.dim() != 3:
            raise ValueError(f"{name}: expected three dimensions, got shape {tuple(projection.shape)}")
    experts, _, inner = down_proj.shape
    check_tensor("down_proj", down_proj, x, [(experts, hidden, inner)], of="x")
    outputs = 2 * inner if activation in GATED else inner
    check_tensor("gate_up_proj", gate_up_proj, x, [(experts, outputs, hidden)], of="x")
    return hidden, experts
