"""The layers of quantized experts in PyTorch: the default back end and the oracle of the fused ones."""

from torch import Tensor

from pynlp.reference.common.dtypes import compute_dtype
from pynlp.reference.moe.mlp import ACTIVATIONS, GATED, moe_mlp_backward, moe_mlp_forward
from pynlp.reference.quantization.formats import dequantize_4bit
from pynlp.reference.quantization.integers import dequantize_integers


def moe_mlp_4bit_forward(
    x: Tensor,  # (T, H)
    top_k_weights: Tensor,  # (T, K)
    gate_up_packed: Tensor,  # uint8: E times I or 2 I rows of H values, and what they mean: see formats.dequantize_4bit
    gate_up_absmax: Tensor,
    gate_up_nested_absmax: Tensor | None,
    gate_up_nested_offset: Tensor | None,
    gate_up_nested_code: Tensor | None,
    gate_up_bias: Tensor | None,
    down_packed: Tensor,  # E times H rows of I values
    down_absmax: Tensor,
    down_nested_absmax: Tensor | None,
    down_nested_offset: Tensor | None,
    down_nested_code: Tensor | None,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    inner: int,  # I
    gate_up_blocksize: int,
    down_blocksize: int,
    quant_type: int,
    activation: int,
    interleaved: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The results of mlp.moe_mlp_forward with the weights' values."""
    gate_up = gate_up_packed, gate_up_absmax, gate_up_nested_absmax, gate_up_nested_offset, gate_up_nested_code
    down = down_packed, down_absmax, down_nested_absmax, down_nested_offset, down_nested_code
    sizes = _sizes(x, offsets, inner, activation)
    gate_up, down = _of_4_bits(x, sizes, gate_up, gate_up_blocksize, down, down_blocksize, quant_type)
    routing = permutation, places, offsets
    options = activation, interleaved, keeps
    return moe_mlp_forward(x, top_k_weights, gate_up, gate_up_bias, down, down_bias, *routing, *options)


def moe_mlp_4bit_backward(
    grad: Tensor,  # (T, H)
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_packed: Tensor,
    gate_up_absmax: Tensor,
    gate_up_nested_absmax: Tensor | None,
    gate_up_nested_offset: Tensor | None,
    gate_up_nested_code: Tensor | None,
    gate_up_bias: Tensor | None,
    down_packed: Tensor,
    down_absmax: Tensor,
    down_nested_absmax: Tensor | None,
    down_nested_offset: Tensor | None,
    down_nested_code: Tensor | None,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    before: Tensor,
    inner: int,
    gate_up_blocksize: int,
    down_blocksize: int,
    quant_type: int,
    activation: int,
    interleaved: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the tokens' weights and both biases; nothing for what is not there or not needed."""
    gate_up = gate_up_packed, gate_up_absmax, gate_up_nested_absmax, gate_up_nested_offset, gate_up_nested_code
    down = down_packed, down_absmax, down_nested_absmax, down_nested_offset, down_nested_code
    sizes = _sizes(x, offsets, inner, activation)
    gate_up, down = _of_4_bits(x, sizes, gate_up, gate_up_blocksize, down, down_blocksize, quant_type)
    weights = gate_up, gate_up_bias, down, down_bias
    return _gradients(grad, x, top_k_weights, weights, (permutation, places, offsets), before, activation, interleaved,
                      needs_x)  # fmt: skip


def moe_mlp_int8_forward(
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_codes: Tensor,  # int8 (E times I or 2 I, H), and what they mean: see integers.dequantize_integers
    gate_up_scale: Tensor,
    gate_up_zero_point: Tensor | None,
    gate_up_bias: Tensor | None,
    down_codes: Tensor,  # (E times H, I)
    down_scale: Tensor,
    down_zero_point: Tensor | None,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    inner: int,
    gate_up_group: int,
    down_group: int,
    activation: int,
    interleaved: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The results of mlp.moe_mlp_forward with the weights' values."""
    sizes = _sizes(x, offsets, inner, activation)
    gate_up, down = _of_8_bits(
        x, sizes, (gate_up_codes, gate_up_scale, gate_up_zero_point, gate_up_group),
        (down_codes, down_scale, down_zero_point, down_group),
    )  # fmt: skip
    routing = permutation, places, offsets
    options = activation, interleaved, keeps
    return moe_mlp_forward(x, top_k_weights, gate_up, gate_up_bias, down, down_bias, *routing, *options)


def moe_mlp_int8_backward(
    grad: Tensor,
    x: Tensor,
    top_k_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero_point: Tensor | None,
    gate_up_bias: Tensor | None,
    down_codes: Tensor,
    down_scale: Tensor,
    down_zero_point: Tensor | None,
    down_bias: Tensor | None,
    permutation: Tensor,
    places: Tensor,
    offsets: Tensor,
    before: Tensor,
    inner: int,
    gate_up_group: int,
    down_group: int,
    activation: int,
    interleaved: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the tokens' weights and both biases; nothing for what is not there or not needed."""
    sizes = _sizes(x, offsets, inner, activation)
    gate_up, down = _of_8_bits(
        x, sizes, (gate_up_codes, gate_up_scale, gate_up_zero_point, gate_up_group),
        (down_codes, down_scale, down_zero_point, down_group),
    )  # fmt: skip
    weights = gate_up, gate_up_bias, down, down_bias
    return _gradients(grad, x, top_k_weights, weights, (permutation, places, offsets), before, activation, interleaved,
                      needs_x)  # fmt: skip


def _sizes(
    x: Tensor, offsets: Tensor, inner: int, activation: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of both weights."""
    outputs = 2 * inner if ACTIVATIONS[activation] in GATED else inner
    experts, hidden = len(offsets), x.shape[1]
    return (experts, outputs, hidden), (experts, hidden, inner)


def _of_4_bits(
    x: Tensor, sizes: tuple, gate_up: tuple, gate_up_blocksize: int, down: tuple, down_blocksize: int, quant_type: int
) -> tuple[Tensor, Tensor]:
    def values(weight: tuple, shape: tuple[int, int, int], blocksize: int) -> Tensor:
        count = shape[0] * shape[1] * shape[2]
        return dequantize_4bit(*weight, count, blocksize, quant_type, compute_dtype(x)).view(shape)

    return values(gate_up, sizes[0], gate_up_blocksize), values(down, sizes[1], down_blocksize)


def _of_8_bits(x: Tensor, sizes: tuple, gate_up: tuple, down: tuple) -> tuple[Tensor, Tensor]:
    def values(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, shape: tuple[int, int, int]) -> Tensor:
        return dequantize_integers(codes, scale, zeros, None, shape[2], group, compute_dtype(x)).view(shape)

    return values(*gate_up, sizes[0]), values(*down, sizes[1])


def _gradients(
    grad: Tensor,
    x: Tensor,
    top_k_weights: Tensor,
    weights: tuple,
    routing: tuple,
    before: Tensor,
    activation: int,
    interleaved: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = activation, interleaved, needs_x, False, False
    results = moe_mlp_backward(grad, x, top_k_weights, *weights, *routing, before, *options)
    return results[0], results[1], results[3], results[5]
