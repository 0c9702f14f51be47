"""Weights in integers of 8 and 4 bits: products with them, rounding, making them and reading them.

A kernel fails on spills, on shared or tensor memory beyond the chip's, on a product that misses the chip's tensor
cores, on reads of codes in the hot loop of less than 16 bytes a thread, and on more instructions a weight than the bars
allow.

n/w = non-tensor instructions of the hot loop a weight and thread; of kernels without products, all instructions.
"""

from collections.abc import Iterator

import torch
from pynlp.kernels.common.launch import Launch
from pynlp.kernels.quantization import integer_linear, integers, rounded_linear

from benchmarks.audit.chips import CDNA, CHIPS, compiled_launches, missed_products, multiplying_chip
from benchmarks.audit.machine_code import work
from benchmarks.audit.quantization import SUMS, cases_of_products, narrow_loads
from benchmarks.audit.report import Markers, Row, row_of

FIGURES = ("n/w", "scaled")
CASES = {
    "int8": dict(bits=8),
    "int8, affine, groups of 128": dict(bits=8, affine=True, group=128, bias=True),
    "int4": dict(bits=4, group=128, affine=True),
    # With --full:
    "int8, affine, tensor": dict(bits=8, affine=True, group=0),
    "int8, minima, groups of 64": dict(bits=8, minimum=True, group=64),
    "int8, groups of 32": dict(bits=8, group=32, bias=True),
    "int8, ragged": dict(bits=8, columns=4001, outputs=4001, bias=True),
    "int8, wide and short": dict(bits=8, columns=1088, outputs=16384),
    "int8, unaligned": dict(bits=8, unaligned=True),
    "int4, symmetric": dict(bits=4, bias=True),
    "int4, minima, groups of 32": dict(bits=4, minimum=True, group=32, half=True),
    "int4, groups of 48": dict(bits=4, affine=True, group=48, columns=4032),
    "int4, ragged": dict(bits=4, columns=4001, outputs=50257),
}
USUAL = list(CASES)[:3]
# n/w of products in bf16 and fp16 with a scale of each row, or of 128 columns and zeros: (chip, bits, what is scaled,
# rows of a tile) -> bar.
BARS = {
    ("sm_80", 8, "rows", 16): 3.0,
    ("sm_80", 8, "rows", 64): 3.6,
    ("sm_80", 8, "blocks", 16): 4.0,
    ("sm_80", 8, "blocks", 64): 5.8,
    ("sm_80", 4, "blocks", 16): 3.1,
    ("sm_80", 4, "blocks", 64): 4.8,
    ("sm_90", 8, "rows", 16): 3.0,
    ("sm_90", 8, "rows", 64): 3.0,
    ("sm_90", 8, "blocks", 16): 4.0,
    ("sm_90", 8, "blocks", 64): 4.4,
    ("sm_90", 4, "blocks", 16): 3.1,
    ("sm_90", 4, "blocks", 64): 3.5,
}
FEW_BAR = 5.4  # of one row; gfx942 has none
PRODUCTS = {"integer_linear_kernel", "integer_linear_backward_kernel", "integer_few_kernel", "rounded_linear_kernel"}
CODES = Markers({"quantization/integer_codes.py": ("tl.load(p_tile + (o_n * pitch + o_byte)",)})
THRESHOLD = 6.0


def launches(chip: str, rows: int, dtype: torch.dtype, features: dict) -> list[Launch]:
    """The launches of products with `rows` rows, forward, backward and rounded; of none, of making and reading."""
    outputs, columns = features.get("outputs", 4096), features.get("columns", 4096)
    bits, affine, group = features["bits"], features.get("affine", False), features.get("group", columns)

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(columns):
        padding = 1 if features.get("unaligned") else 0
        return tensor(rows, columns + padding, dtype=dtype)[:, :columns]

    codes = tensor(outputs, columns if bits == 8 else -(-columns // 2), dtype=torch.int8 if bits == 8 else torch.uint8)
    shape = (outputs, -(-columns // group)) if group else (1, 1)
    half = torch.float16 if features.get("half") else torch.float32
    zero = tensor(*shape, dtype=torch.int8) if affine else None
    minimum = tensor(*shape, dtype=half) if features.get("minimum") else None
    weight = codes, tensor(*shape, dtype=half), zero, minimum
    bias, own = tensor(outputs) if features.get("bias") else None, group or columns
    with compiled_launches(chip) as started:
        if rows == 0:
            integers.quantize_integers(tensor(outputs, columns, dtype=dtype), bits, affine, group)
            integers.dequantize_integers(*weight, columns, own, dtype)
        else:
            integer_linear.integer_linear(matrix(columns), *weight, bias, own)
            integer_linear.integer_linear_backward(matrix(outputs), *weight, columns, own)
            rounded_linear.dynamic_integer_linear(matrix(columns), *weight, bias, own, 0, THRESHOLD)
    return started


def judge(chip: str, start: Launch, rows: int, dtype: torch.dtype, case: str) -> Row:
    limits, arguments = CHIPS[chip], start.arguments
    lanes = arguments["num_warps"] * limits.target.warp_size
    if start.kernel not in PRODUCTS:
        sizes = {name: value for name, value in arguments.items() if name.isupper() and type(value) is int}
        row = row_of(chip, start, tuple(list(sizes.values())[-2:] + ["-", "-"])[:2], rows, dtype, case)
        row.figures = (str(work(row.code.instructions)), "-")
        return row
    features = arguments["F"]
    tile = features.BLOCK_N, features.BLOCK_K
    row = row_of(chip, start, tile, rows, dtype, f"{case}, {features.BLOCK_M} rows")
    pattern = SUMS
    if start.kernel != "integer_few_kernel":
        pattern = CHIPS[multiplying_chip(chip, features.BLOCK_M)].tensor_core
        by_mma_sync = start.kernel == "rounded_linear_kernel" and chip == "sm_100"  # Triton has no tcgen05 of integers
        if start.kernel == "rounded_linear_kernel":
            pattern = "IMMA" if by_mma_sync else pattern.replace("HMMA", "IMMA").replace("HGMMA", "IGMMA")
        if not by_mma_sync and (features.PRECISION != "ieee" or chip == "gfx942"):
            row.failures += missed_products(chip, start.compiled, features.BLOCK_M)
    loops = row.code.loops(pattern)
    if not loops:
        row.failures.append(f"no loop with {pattern}")
        return row
    # That of outliers reads codes one by one.
    hot = [loop for loop in loops if any(map(CODES.match, loop.instructions))] or loops
    loop = max(hot, key=lambda loop: loop.total())
    products = 0 if pattern is SUMS else loop.count(pattern)
    density = (loop.total() - products) / (tile[0] * tile[1] / lanes)
    row.figures = (f"{density:.2f}", features.SCALED)
    if features.UNIT * features.W.BITS == 128 and features.WIDTH * features.W.BITS >= 128:
        row.failures += narrow_loads(loop.instructions, CODES)
    usual = dtype.itemsize == 2 and features.UNIT * features.W.BITS == 128 and features.ALIGN >= 8
    bar = None
    if usual and start.kernel == "integer_few_kernel" and chip not in CDNA:
        bar = FEW_BAR
    elif usual and start.kernel == "integer_linear_kernel":
        bar = BARS.get((chip, features.W.BITS, features.SCALED, features.BLOCK_M))
    if bar is not None and density > bar:
        row.failures.append(f"{density:.2f} n/w, bar {bar}")
    return row


def cases(_: str, full: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    """(rows, dtype, name of the case), alike on every chip."""
    return cases_of_products(CASES, USUAL, full)


def audit(chip: str, rows: int, dtype: torch.dtype, case: str) -> list[Row]:
    return [judge(chip, start, rows, dtype, case) for start in launches(chip, rows, dtype, CASES[case])]
