"""Quantized weights beside dense ones and other libraries.

`python -m benchmarks.quantization`.

Weights have 4096 x 4096 values. Products of a few rows take turns over so many weights that each comes from memory, as
in decoding; their rate is in bytes of codes and scales. Others count FLOP/s. Dense peers multiply the same values in
x's dtype; bitsandbytes runs as its Linear4bit does in training (in its fused path, which is bf16 alone, where the CPU
has it). Writes results/quantization.json and quantization.png.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pynlp
from benchmarks import peers
from benchmarks.cases import Case, plot_shares, row, run_cases
from benchmarks.measure import BF16, FP32, PRODUCT_DTYPES, peak_memory
from pynlp.functional import (
    dequantize_4bit,
    dequantize_int4,
    dequantize_int8,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    linear_4bit,
    quantize_4bit,
    quantize_int4,
    quantize_int8,
)

SIZE = 4096
WEIGHTS = 14  # of 9.4 MB: more than caches hold
WIDE = pynlp.get_isa() in ("avx512", "avx512_bf16_vnni")  # the machines that the peers' multiples are asked on


def linear_case(quant_type: str, rows: int, dtype: torch.dtype, share: float, dense: float) -> Case:
    """x weight^T of as many weights as fill the memory, where rows are few, else of two."""
    torch.manual_seed(0)
    few = rows <= 8
    count = WEIGHTS if few else 2
    weights = [quantize_4bit(torch.randn(SIZE, SIZE) / 64, quant_type=quant_type) for _ in range(count)]
    x = torch.randn(rows, SIZE).to(dtype)
    exact = [dequantize_4bit(*weight) for weight in weights[:2]]
    some = [exact[i % 2].to(dtype) for i in range(count)]
    calls = {
        "ours": lambda: [linear_4bit(x, *weight) for weight in weights],
        "dense": lambda: [F.linear(x, weight) for weight in some],
    }
    if quant_type != "mxfp4":
        theirs = [peers.bitsandbytes_state(*weight) for weight in weights]
        calls["bitsandbytes"] = lambda: [peers.bitsandbytes().matmul_4bit(x, *weight) for weight in theirs]
        if dtype == FP32 and peers.installed("onnx", "onnxruntime"):
            nodes = [peers.onnx_nf4(*weight) for weight in weights]
            calls["ONNX Runtime"] = lambda: [node(x) for node in nodes]
    size = sum(x.nbytes for packed, state in weights for x in (packed, state.absmax))
    return Case(
        f"{quant_type}, {rows} rows", dtype, calls,
        lambda: [F.linear(x.double(), weight.double()) for weight in exact],
        {name: dense if name == "dense" else 1.0 for name in calls if name != "ours"},
        checked={
            "ours": lambda: [linear_4bit(x, *weight) for weight in weights[:2]],
            "dense": lambda: [F.linear(x, weight.to(dtype)) for weight in exact],
        },
        share=share if not few or WIDE else 0.0,  # without AVX-512 look-ups bound few rows, not the memory
        **({"bytes": size} if few else {"flop": 2 * rows * SIZE * SIZE * count}),
    )  # fmt: skip


def int8_case(rows: int) -> Case:
    """x weight^T of 8-bit weights with a scale a row, as many as fill the memory where rows are few."""
    torch.manual_seed(0)
    few = rows <= 8
    weights = [quantize_int8(torch.randn(SIZE, SIZE) / 64) for _ in range(8 if few else 2)]
    x, dense = torch.randn(rows, SIZE), [dequantize_int8(*weight) for weight in weights[:2]]
    theirs = [(codes, state.scale.flatten()) for codes, state in weights]
    return Case(
        f"int8, {rows} rows", FP32,
        {
            "ours": lambda: [int8_linear(x, *weight) for weight in weights],
            "dense": lambda: [F.linear(x, dense[i % 2]) for i in range(len(weights))],
            "torch's int8": lambda: [torch.ops.aten._weight_int8pack_mm(x, *weight) for weight in theirs],
        },
        lambda: [F.linear(x.double(), weight.double()) for weight in dense],
        {"dense": 1.0, "torch's int8": 1.0}, share=0.8 if few else 0.75,
        checked={
            "ours": lambda: [int8_linear(x, *weight) for weight in weights[:2]],
            "dense": lambda: [F.linear(x, weight) for weight in dense],
        },
        **({"bytes": len(weights) * SIZE * SIZE} if few else {"flop": 2 * rows * SIZE * SIZE * len(weights)}),
    )  # fmt: skip


def int4_case(rows: int, group: int, activations: str | None) -> Case:
    """x weight^T of 4-bit weights with a scale and a zero point a group; PyTorch's packed op has no 8-bit x."""
    torch.manual_seed(0)
    few = rows <= 8
    weights = [quantize_int4(torch.randn(SIZE, SIZE) / 64, group_size=group) for _ in range(WEIGHTS if few else 2)]
    x, dense = torch.randn(rows, SIZE), [dequantize_int4(*weight) for weight in weights[:2]]
    theirs = [peers.torch_int4(*weight) for weight in weights]

    def ours(weights) -> list[Tensor]:
        return [int4_linear(x, *weight, activations=activations) for weight in weights]

    calls = {
        "ours": lambda: ours(weights),
        "dense": lambda: [F.linear(x, dense[i % 2]) for i in range(len(weights))],
        "torch's int4": lambda: [call(x) for call in theirs],
    }
    if peers.installed("onnx", "onnxruntime"):
        nodes = [peers.onnx_int4(*weight, 4 if activations else 1) for weight in weights]
        calls["ONNX Runtime"] = lambda: [node(x) for node in nodes]
    size = sum(x.nbytes for codes, state in weights for x in (codes, state.scale, state.zero_point))
    return Case(
        f"int4 groups of {group}, {rows} rows{', x in 8 bits' if activations else ''}", FP32, calls,
        lambda: [F.linear(x.double(), weight.double()) for weight in dense],
        {name: 1.0 for name in calls if name != "ours"}, share=(0.8 if WIDE or activations else 0.0) if few else 0.75,
        checked={
            "ours": lambda: ours(weights[:2]),
            # The error of a row in 8 bits is that of its rounding.
            "dense": lambda: [F.linear(in_8_bits(x) if activations else x, weight) for weight in dense],
        },
        **({"bytes": size} if few else {"flop": 2 * rows * SIZE * SIZE * len(weights)}),
    )  # fmt: skip


def in_8_bits(x: Tensor) -> Tensor:
    codes, state = quantize_int8(x, granularity="group", group_size=32)
    return dequantize_int8(codes, state)


def dynamic_case(rows: int) -> Case:
    """Weights and rows of x in 8 bits, beside PyTorch's dynamically quantized layer (fbgemm)."""
    torch.manual_seed(0)
    weights = [quantize_int8(torch.randn(SIZE, SIZE) / 64) for _ in range(2)]
    x, dense = torch.randn(rows, SIZE), [dequantize_int8(*weight) for weight in weights]
    layers = [peers.fbgemm(weight) for weight in dense]
    calls = {
        "ours": lambda: [int8_dynamic_linear(x, *weight) for weight in weights],
        "dense": lambda: [F.linear(x, weight) for weight in dense],
        "fbgemm": lambda: [layer(x) for layer in layers],
    }
    if peers.installed("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        others = [peers.torchao_linear(weight, Int8DynamicActivationInt8WeightConfig()) for weight in dense]
        calls["torchao"] = lambda: [layer(x) for layer in others]
    return Case(
        f"int8, {rows} rows, x in 8 bits", FP32, calls,
        lambda: [F.linear(x.double(), weight.double()) for weight in dense],
        {name: (1.3 if WIDE else 1.2) if name == "fbgemm" else 1.0 for name in calls if name != "ours"}, share=0.75,
        checked={name: calls[name] for name in ("ours", "fbgemm")},
        flop=4 * rows * SIZE * SIZE, products=torch.int8,
    )  # fmt: skip


def training_case(dtype: torch.dtype) -> Case:
    """Forward and the gradient of x, of 128 rows."""
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(SIZE, SIZE) / 64)
    x, grad = torch.randn(128, SIZE).to(dtype), torch.randn(128, SIZE).to(dtype)
    weight = dequantize_4bit(packed, state)
    theirs, dense = peers.bitsandbytes_state(packed, state), weight.to(dtype)

    def both(function: Callable, x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = function(x)
        y.backward(grad)
        return [y.detach(), x.grad]

    calls = {
        "ours": lambda: both(lambda x: linear_4bit(x, packed, state), x, grad),
        "dense": lambda: both(lambda x: F.linear(x, dense), x, grad),
        "bitsandbytes": lambda: both(lambda x: peers.bitsandbytes().matmul_4bit(x, *theirs), x, grad),
    }
    return Case(
        "nf4, 128 rows, forward and backward", dtype, calls,
        lambda: both(lambda x: F.linear(x, weight.double()), x.double(), grad.double()),
        {"dense": 1.8 if WIDE else 1.0, "bitsandbytes": 3.0 if WIDE else 1.0},
        flop=4 * 128 * SIZE * SIZE,
    )  # fmt: skip


def quantize_case() -> Case:
    torch.manual_seed(0)
    x = torch.randn(SIZE, SIZE)
    expected = quantize_4bit(x[:64])  # bytes, whose error must be 0

    def theirs(x: Tensor) -> list[Tensor]:
        packed, state = peers.bitsandbytes().functional.quantize_4bit(x, quant_type="nf4")
        return [packed, state.absmax]

    def ours(x: Tensor) -> list[Tensor]:
        packed, state = quantize_4bit(x)
        return [packed, state.absmax]

    return Case(
        "quantize to nf4", FP32, {"ours": lambda: ours(x), "bitsandbytes": lambda: theirs(x)},
        lambda: [expected[0].double(), expected[1].absmax.double()],
        {"bitsandbytes": 40.0 if WIDE else 1.0},
        checked={"ours": lambda: ours(x[:64]), "bitsandbytes": lambda: theirs(x[:64])},
        bytes=4.5625 * x.numel(),
    )  # fmt: skip


def dequantize_case() -> Case:
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(SIZE, SIZE))
    theirs = peers.bitsandbytes_state(packed, state)
    return Case(
        "dequantize nf4", FP32,
        {
            "ours": lambda: [dequantize_4bit(packed, state)],
            "bitsandbytes": lambda: [peers.bitsandbytes().functional.dequantize_4bit(packed, theirs[1])],
        },
        lambda: [torch.ops.pynlp.dequantize_4bit_reference(
            packed, state.absmax, None, None, None, SIZE * SIZE, 64, 0, torch.float64
        ).view(SIZE, SIZE)],
        {"bitsandbytes": 1.0}, share=0.6, bytes=4.5625 * SIZE * SIZE,
    )  # fmt: skip


def resident(options: str) -> float:
    """Bytes a weight that stay in memory of layers made from dense ones, which are freed."""
    script = f"""
import torch
from pynlp.nn import Linear4bit
def layers(count):
    return [Linear4bit.from_linear(torch.nn.Linear(4096, 4096, bias=False){options}) for _ in range(count)]
first = layers(1)  # what is allocated once, and a dense weight's place
def measured():
    return layers(16)
"""
    return peak_memory(script) / (16 * SIZE * SIZE)


def memory() -> list[dict]:
    lines = []
    for name, options, asked in (("nf4", "", 0.57), ("nf4, double quantization", ", double_quant=True", 0.53)):
        measured = resident(options)
        lines.append({
            "layer": name, "bytes a weight, one dense weight beside": f"{measured:.3f}",
            "asked": f"<= {asked} and 1/16 of a dense weight", "met": "yes" if measured <= asked + 4 / 16 else "NO",
        })  # fmt: skip
    return lines


FEW, MANY = (1, 8), (64, 256)
CASES = {
    **{
        f"nf4 {rows} {dtype}": lambda *, rows=rows, dtype=dtype: linear_case(
            "nf4", rows, dtype, 0.8, {FP32: 10.0 if WIDE else 2.5, BF16: 4.0}[dtype] if rows == 1 else 1.0
        )
        for dtype in PRODUCT_DTYPES
        for rows in FEW
    },
    **{
        f"nf4 {rows} {dtype}": lambda *, rows=rows, dtype=dtype: linear_case(
            "nf4",
            rows,
            dtype,
            0.75 if rows == 64 else 0.85,
            (2.4 if rows == 64 else 2.2) if WIDE and dtype == FP32 else 1.0,
        )
        for dtype in PRODUCT_DTYPES
        for rows in MANY
    },
    "int8 1": lambda: int8_case(1),
    "int8 64": lambda: int8_case(64),
    "int8 dynamic 64": lambda: dynamic_case(64),
    "int8 dynamic 256": lambda: dynamic_case(256),
    "int4 1": lambda: int4_case(1, 128, None),
    "int4 1 activations": lambda: int4_case(1, 128, "int8"),
    "int4 1 activations 32": lambda: int4_case(1, 32, "int8"),
    "int4 64": lambda: int4_case(64, 128, None),
    "mxfp4 1": lambda: linear_case("mxfp4", 1, FP32, 0.8, 10.0 if WIDE else 2.5),
    "mxfp4 64": lambda: linear_case("mxfp4", 64, FP32, 0.75, 2.4 if WIDE else 1.0),
    **{f"training {dtype}": lambda *, dtype=dtype: training_case(dtype) for dtype in PRODUCT_DTYPES},
    "quantize": quantize_case,
    "dequantize": dequantize_case,
}


def main() -> None:
    label = "% of the machine's peak: read bandwidth, FLOP/s for products of many rows"
    plots = {
        "quantization": lambda tables: plot_shares(tables["cases"], "4-bit weights: how near the machine's peak", label)
    }
    run_cases("quantization", __doc__, {"cases": (CASES, row)}, {"memory": memory}, plots)


if __name__ == "__main__":
    main()
