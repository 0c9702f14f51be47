"""Layers of quantized experts: against the values of their weights in fp64, both ways, and few rows and many."""

import pytest
import torch
from cases.pairs import every_pair
from torch import Tensor

from benchmarks.measure import peak_memory
from pynlp.functional import (
    QuantState4bit,
    dequantize_4bit,
    dequantize_int8,
    moe_mlp,
    quantize_4bit,
    quantize_int8,
)
from pynlp.ops.moe.dispatch import dispatched
from pynlp.ops.quantization.formats import tensors_of
from pynlp.reference.moe.mlp import ACTIVATIONS, GATED

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {
    "nf4": dict(quant_type="nf4"),
    "nf4, nested": dict(quant_type="nf4", double_quant=True),
    "mxfp4": dict(quant_type="mxfp4"),
    "int8": dict(granularity="channel"),
    "int8, affine": dict(granularity="channel", scheme="affine"),
    "int8, groups": dict(granularity="group", group_size=16),
}
# T, E, K, H, I: few rows an expert and many; whole blocks; lines that begin inside of blocks and bytes; nothing.
SHAPES = [(7, 4, 2, 64, 32), (100, 8, 2, 33, 21), (300, 3, 2, 64, 130), (1, 4, 2, 64, 40), (16, 64, 6, 96, 40),
          (0, 2, 1, 4, 4)]  # fmt: skip


def quantized(weight: Tensor, form: str):
    """Codes and state of (E, outputs, inputs), and its values in fp64."""
    if form.startswith("int8"):
        pair = quantize_int8(weight.flatten(0, 1), **FORMATS[form])
        return pair, dequantize_int8(*pair, dtype=torch.float64).view(weight.shape)
    pair = quantize_4bit(weight, **FORMATS[form])
    return pair, dequantize_4bit(*pair, dtype=torch.float64)


def case(shape, form, activation="swiglu", biased=False):
    """Tokens, their experts and weights, both projections as they are and their values, and the biases."""
    tokens, experts, top_k, hidden, inner = shape
    outputs = 2 * inner if activation in GATED else inner
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    index = torch.randint(-1, experts + 1, (tokens, top_k))
    gate_up, exact_gate_up = quantized(torch.randn(experts, outputs, hidden) / hidden**0.5, form)
    down, exact_down = quantized(torch.randn(experts, hidden, inner) / inner**0.5, form)
    biases = [torch.randn(experts, outputs), torch.randn(experts, hidden)] if biased else [None, None]
    return x, index, weights, (gate_up, down), (exact_gate_up, exact_down), biases


def outcome(x, index, weights, projections, biases, dtype, **options) -> list[Tensor]:
    """The output, and the gradients of x, the weights and the biases."""
    x = x.to(dtype).requires_grad_()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [None if t is None else t.to(exact).requires_grad_() for t in (weights, *biases)]
    y = moe_mlp(x, index, leaves[0], *projections, gate_up_bias=leaves[1], down_bias=leaves[2], **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    wanted = [t for t in (x, *leaves) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@pytest.mark.every_isa
@every_pair(
    shape=SHAPES, form=list(FORMATS), activation=ACTIVATIONS, interleaved=[False, True], biased=[False, True],
    dtype=DTYPES,
)  # fmt: skip
def test_output_and_gradients(shape, form, activation, interleaved, biased, dtype, isa):
    """Errors are a few roundings: of fp32, and of x's dtype where values are kept in it between the products."""
    x, index, weights, projections, exact, biases = case(shape, form, activation, biased)
    x = x.to(dtype).float()
    options = dict(activation=activation, interleaved=interleaved)
    ours = outcome(x, index, weights, projections, biases, dtype, **options)
    expected = outcome(x, index, weights, exact, biases, torch.float64, **options)
    with torch.no_grad():
        alone = moe_mlp(
            x.to(dtype), index, weights, *projections, gate_up_bias=biases[0], down_bias=biases[1], **options
        )
    assert torch.equal(alone, ours[0])
    for one, another in zip(ours, expected, strict=True):
        assert one.shape == another.shape
        if one.numel():
            unit = 4 * torch.finfo(dtype).eps + 2e-5
            size = another.abs().max().clamp_min(1.0)
            assert (one.double() - another).abs().max() <= unit * size


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_threads_and_runs(form, isa):
    x, index, weights, projections, _, biases = case((400, 5, 3, 64, 96), form, biased=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [outcome(x, index, weights, projections, biases, torch.float32) for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    batched = moe_mlp(x.view(4, 100, 64), index.view(4, 100, 3), weights.view(4, 100, 3), *projections,
                      gate_up_bias=biases[0], down_bias=biases[1])  # fmt: skip
    assert torch.equal(batched.view(400, 64), results[0][0])


def test_gpt_oss_blocks_run_as_they_are():
    """Packed as in its checkpoints: blocks (E, 2 I, H / 32, 16) of bytes and exponents (E, 2 I, H / 32)."""
    experts, hidden, inner = 4, 64, 32
    blocks = [torch.randint(256, (experts, n, k // 32, 16), dtype=torch.uint8) for n, k in ((64, 64), (64, 32))]
    scales = [torch.randint(120, 126, (experts, n, k // 32), dtype=torch.uint8) for n, k in ((64, 64), (64, 32))]
    projections = [
        (codes.view(-1, 1), QuantState4bit("mxfp4", 32, (experts, n, k), torch.bfloat16, exponents.flatten()))
        for codes, exponents, (n, k) in zip(blocks, scales, ((2 * inner, hidden), (hidden, inner)), strict=True)
    ]
    x, index, weights = torch.randn(20, hidden), torch.randint(experts, (20, 2)), torch.rand(20, 2)
    options = dict(activation="swiglu_oai", interleaved=True)
    dense = [dequantize_4bit(*projection, dtype=torch.float32) for projection in projections]
    ours = outcome(x, index, weights, projections, [None, None], torch.float32, **options)
    for one, another in zip(
        ours, outcome(x, index, weights, dense, [None, None], torch.float32, **options), strict=True
    ):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-4)


def test_opcheck():
    x, index, weights, (gate_up, down), _, _ = case((6, 3, 2, 32, 32), "nf4")
    _, offsets, permutation, places = dispatched(index, 3)
    x.requires_grad_()
    arguments = (weights, *tensors_of(*gate_up), None, *tensors_of(*down), None, permutation, places, offsets)
    torch.library.opcheck(torch.ops.pynlp.moe_mlp_4bit_forward, (x, *arguments, 32, 64, 64, 0, 2, False, True))
    x, index, weights, (gate_up, down), _, _ = case((6, 3, 2, 32, 32), "int8")
    of = [(codes, state.scale, state.zero_point) for codes, state in (gate_up, down)]
    arguments = (weights.requires_grad_(), *of[0], None, *of[1], None, permutation, places, offsets)
    torch.library.opcheck(torch.ops.pynlp.moe_mlp_int8_forward, (x, *arguments, 32, 32, 32, 2, False, True))


@pytest.mark.slow
def test_no_dense_copy_is_made():
    """Neither forward nor backward: 64 experts of 16 MB in fp32, of which all have tokens."""
    added = peak_memory("""
import torch
from pynlp.functional import moe_mlp, quantize_4bit
gate_up, down = (quantize_4bit(torch.randn(64, *shape)) for shape in ((4096, 512), (512, 2048)))
x, index, weights = torch.randn(512, 512), torch.randint(64, (512, 2)), torch.rand(512, 2)
def measured():
    leaf = x.clone().requires_grad_()
    moe_mlp(leaf, index, weights, gate_up, down).sum().backward()
    return leaf
""")
    assert added < 120e6, f"{added / 1e6:.0f} MB; the dense weights have 805 MB"


def test_errors():
    x, index, weights, (gate_up, down), (dense, _), _ = case((9, 4, 2, 32, 32), "nf4")
    int8 = [quantize_int8(torch.randn(rows, 32), granularity="channel") for rows in (256, 128)]

    def refused(error, match, first=gate_up, second=down, **options):
        with pytest.raises(error, match=match):
            moe_mlp(x, index, weights, first, second, **options)

    refused(
        TypeError,
        "gate_up_proj: expected a tuple of codes and their state, as the other projection, got Tensor",
        first=dense,
    )
    refused(TypeError, "expected states of one kind, 4 bits or int8, got QuantState4bit and QuantStateInt8",
            second=int8[1])  # fmt: skip
    refused(ValueError, r"gate_up_proj: expected a state of shape \(4, 32, 32\), got \(4, 64, 32\)", activation="relu")
    refused(
        ValueError, r"down_proj: expected a state of shape \(E, 32, I\)", second=quantize_4bit(torch.randn(4, 31, 32))
    )
    refused(ValueError, "down_proj: expected quant_type 'nf4' as gate_up_proj's, got 'fp4'",
            second=quantize_4bit(torch.randn(4, 32, 32), quant_type="fp4"))  # fmt: skip
    refused(ValueError, r"gate_up_proj: expected codes of shape \(128, 32\), got \(256, 32\)", *int8, activation="relu")
    refused(ValueError, "down_proj: expected codes of 32 rows an expert, got 100 rows", int8[0],
            quantize_int8(torch.randn(100, 32)))  # fmt: skip
