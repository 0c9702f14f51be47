"""The layers of quantized experts: schemas, fakes, autograd and what `moe_mlp` does with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from pynlp.ops.common.checks import autocast, check_is_tensor, rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.common.plans import derive
from pynlp.ops.moe.checks import check_activation, check_bias, check_routing, needs_gradients, routed
from pynlp.ops.quantization.formats import QuantState4bit, check_state, tensors_of
from pynlp.ops.quantization.int8 import QuantStateInt8
from pynlp.reference.common.dtypes import compute_dtype
from pynlp.reference.moe import quantized as reference
from pynlp.reference.moe.mlp import GATED

ROUTING = "Tensor permutation, Tensor places, Tensor offsets"
# What holds a projection in a format, and its numbers.
FORMATS = {
    "4bit": (("packed", "absmax", "nested_absmax?", "nested_offset?", "nested_code?"), "blocksize", ", int quant_type"),
    "int8": (("codes", "scale", "zero_point?"), "group", ""),
}
Quantized = tuple[Tensor, QuantState4bit | QuantStateInt8]


def _weights(form: str) -> str:
    names = FORMATS[form][0]

    def projection(prefix: str) -> str:
        return ", ".join(f"Tensor{'?' * name.endswith('?')} {prefix}_{name.rstrip('?')}" for name in names)

    return f"{projection('gate_up')}, Tensor? gate_up_bias, {projection('down')}, Tensor? down_bias"


def _numbers(form: str) -> str:
    _, number, more = FORMATS[form]
    return f"SymInt inner, SymInt gate_up_{number}, SymInt down_{number}{more}, int activation, bool interleaved"


def _op(form: str) -> Callable:
    """Declare both passes in a format; gives the first one for callers in Python."""
    count = len(FORMATS[form][0])
    name, weights, numbers = f"moe_mlp_{form}", _weights(form), _numbers(form)
    places = {"gate_up_bias": 2 + count, "down_bias": 3 + 2 * count}

    define(
        f"{name}_forward",
        f"(Tensor x, Tensor top_k_weights, {weights}, {ROUTING}, {numbers}, bool keeps) -> (Tensor, Tensor)",
        reference,
        triton=None,
        dtype_of="x",
    )
    define(
        f"{name}_backward",
        f"(Tensor grad, Tensor x, Tensor top_k_weights, {weights}, {ROUTING}, Tensor before, {numbers}, bool needs_x) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference,
        triton=None,
        dtype_of="x",
    )

    def forward_fake(x, *arguments):
        permutation, inner = arguments[3 + 2 * count], arguments[6 + 2 * count]
        activation, _, keeps = arguments[-3:]
        outputs = 2 * inner if reference.ACTIVATIONS[activation] in GATED else inner
        return x.new_empty(x.shape), x.new_empty((permutation.shape[0], outputs) if keeps else (0,))

    def backward_fake(grad, x, top_k_weights, *arguments):
        biases = arguments[count], arguments[2 * count + 1]
        shapes = [(0,) if bias is None else bias.shape for bias in biases]
        exact = compute_dtype(x)
        return (
            x.new_empty(x.shape if arguments[-1] else (0,)),
            torch.empty_like(top_k_weights),
            *(x.new_empty(shape, dtype=exact) for shape in shapes),
        )

    torch.library.register_fake(f"pynlp::{name}_forward", forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"pynlp::{name}_backward", backward_fake, lib=LIBRARY)

    def setup_context(ctx, inputs, output):
        tensors = inputs[: 7 + 2 * count]
        ctx.options = inputs[7 + 2 * count : -1]
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, saved, needs, grad, _):
        gradients = [None] * len(needs)
        if grad is None:
            return tuple(gradients)
        results = backward_op(rows_at_one_stride(grad), *saved, *ctx.options, needs[0])
        at = (0, 1, places["gate_up_bias"], places["down_bias"])
        for place, result in zip(at, results, strict=True):
            gradients[place] = result if needs[place] else None
        return tuple(gradients)

    op = register_autograd(f"{name}_forward", setup_context, backward)
    backward_op = refuse_double_backward(f"{name}_backward", "pynlp's moe_mlp has")
    return op


_forward = {form: _op(form) for form in FORMATS}


def quantized_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Quantized,
    down_proj: Quantized,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """`moe_mlp` with both projections in one format."""
    kind = check_activation(activation)
    hidden = x.shape[-1]
    for name, projection in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not (isinstance(projection, tuple) and len(projection) == 2):
            raise TypeError(
                f"{name}: expected a tuple of codes and their state, as the other projection, got "
                f"{type(projection).__name__}"
            )
        check_is_tensor(name, projection[0])
        if projection[0].device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {projection[0].device}")
    states = gate_up_proj[1], down_proj[1]
    if all(isinstance(state, QuantState4bit) for state in states):
        form, (experts, inner), numbers = "4bit", *_checked_4bit(gate_up_proj, down_proj, hidden, activation)
        weights = tensors_of(*gate_up_proj), tensors_of(*down_proj)
    elif all(isinstance(state, QuantStateInt8) for state in states):
        form, (experts, inner), numbers = "int8", *_checked_int8(gate_up_proj, down_proj, hidden, activation)
        weights = [(codes.contiguous(), state.scale, state.zero_point) for codes, state in (gate_up_proj, down_proj)]
    else:
        names = " and ".join(type(state).__name__ for state in states)
        raise TypeError(f"gate_up_proj, down_proj: expected states of one kind, 4 bits or int8, got {names}")
    check_routing(x, top_k_index, top_k_weights, experts)
    (x,) = autocast(x)
    shape = x.shape
    outputs = 2 * inner if activation in GATED else inner
    gate_up_bias = check_bias("gate_up_bias", gate_up_bias, (experts, outputs), x)
    down_bias = check_bias("down_bias", down_bias, (experts, hidden), x)
    keeps = needs_gradients(x, top_k_weights, gate_up_bias, down_bias)
    tokens = routed(x, top_k_index, top_k_weights, experts)
    out, _ = _forward[form](
        tokens.x, tokens.top_k_weights, *weights[0], gate_up_bias, *weights[1], down_bias, *tokens[2:], inner, *numbers,
        kind, interleaved, keeps,
    )  # fmt: skip
    return out if len(shape) == 2 else derive(Tensor.view, out, shape)


def _checked_4bit(gate_up: Quantized, down: Quantized, hidden: int, activation: str) -> tuple:
    """(experts, inner), and the numbers of the op."""
    kinds = [check_state(*projection) for projection in (gate_up, down)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"down_proj: expected quant_type {gate_up[1].quant_type!r} as gate_up_proj's, got {down[1].quant_type!r}"
        )
    shape = down[1].shape
    if len(shape) != 3 or shape[1] != hidden:
        raise ValueError(f"down_proj: expected a state of shape (E, {hidden}, I), got {tuple(shape)}")
    experts, _, inner = shape
    expected = (experts, 2 * inner if activation in GATED else inner, hidden)
    if tuple(gate_up[1].shape) != expected:
        raise ValueError(f"gate_up_proj: expected a state of shape {expected}, got {tuple(gate_up[1].shape)}")
    return (experts, inner), (gate_up[1].blocksize, down[1].blocksize, kinds[0])


def _checked_int8(gate_up: Quantized, down: Quantized, hidden: int, activation: str) -> tuple:
    """(experts, inner), and the numbers of the op."""
    for name, (codes, state) in (("gate_up_proj", gate_up), ("down_proj", down)):
        if codes.dim() != 2 or codes.dtype != torch.int8:
            raise ValueError(
                f"{name}: expected int8 codes of shape (E * outputs, inputs), got {codes.dtype}, {tuple(codes.shape)}"
            )
        if state.minimum is not None:
            raise ValueError(f"{name}: expected a state without minimum")
    rows, inner = down[0].shape
    if hidden == 0 or rows % hidden:
        raise ValueError(f"down_proj: expected codes of {hidden} rows an expert, got {rows} rows")
    experts = rows // hidden
    expected = (experts * (2 * inner if activation in GATED else inner), hidden)
    if tuple(gate_up[0].shape) != expected:
        raise ValueError(f"gate_up_proj: expected codes of shape {expected}, got {tuple(gate_up[0].shape)}")
    return (experts, inner), (gate_up[1].group_size, down[1].group_size)
