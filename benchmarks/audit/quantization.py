"""4-bit weights: products with them, making them and reading them.

A kernel fails on spills, on shared or tensor memory beyond the chip's, on a product that misses the chip's tensor
cores, on reads of codes in the hot loop of less than 16 bytes a thread, and on more instructions a weight than the bars
allow.

n/w = non-tensor instructions of the hot loop a weight and thread; of kernels without a loop, instructions a value. The
rates are those at which codes could be decoded if instructions alone counted, and if look-ups in shared memory alone
did, in bytes a clock and SM; beside them memory's.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from pynlp.kernels.common.launch import Launch
from pynlp.kernels.quantization import formats, linear
from pynlp.kernels.quantization.linear_configs import DENSE_ROWS

from benchmarks.audit.chips import CDNA, CHIPS, compiled_launches, missed_products, multiplying_chip
from benchmarks.audit.machine_code import Instruction, work
from benchmarks.audit.report import Markers, Row, row_of, source_of

FIGURES = ("n/w", "B/clock by issue, look-ups (memory)")
CASES = {
    "nf4": dict(kind="nf4"),
    "nf4, nested": dict(kind="nf4", nested=True, bias=True),
    "mxfp4": dict(kind="mxfp4", blocksize=32),
    # With --full:
    "fp4, blocks of 4096": dict(kind="fp4", blocksize=4096),
    "nf4, blocks of 32": dict(kind="nf4", blocksize=32, bias=True),
    "nf4, blocks of 128": dict(kind="nf4", blocksize=128),
    "nf4, ragged": dict(kind="nf4", columns=4000, outputs=4001, bias=True),
    "nf4, odd": dict(kind="nf4", nested=True, columns=4001, outputs=50257),
    "nf4, wide and short": dict(kind="nf4", columns=1088, outputs=16384),
    "nf4, unaligned": dict(kind="nf4", unaligned=True),
}
USUAL = list(CASES)[: list(CASES).index("fp4, blocks of 4096")]
# n/w of NF4's products in bf16 and fp16 where weights have whole blocks and x rows of 16 bytes: kernel -> rows of a
# tile up to -> bar. On NVIDIA's chips: gfx942 rounds to bf16 by four instructions a value.
BARS = {"linear_kernel": {64: 5.0, 128: 6.6}}
NESTED = 0.5  # more for scales that are quantized, too
# Turns of shared memory that a warp's look-up of 32 bytes takes, by the size of a pair: the most bytes of a turn that
# meet in one bank, on average over the codes of normally distributed weights.
TURNS = {4: 3.25, 8: 6.14}
KERNELS = {"linear_kernel", "linear_backward_kernel", "linear_few_kernel"}
# Where codes are read; the loop of few rows, which has no tensor-core product.
CODES = Markers({"quantization/codes.py": ("tl.load(p_tile + o_byte",)})
SUMS = r"FFMA|FMUL|v_(pk_)?(fma|mul)"


def launches(chip: str, rows: int, dtype: torch.dtype, features: dict) -> list[Launch]:
    """The launches of a product with `rows` rows, forward and backward; of no rows, of making and reading a weight."""
    outputs, columns = features.get("outputs", 4096), features.get("columns", 4096)
    blocksize, nested = features.get("blocksize", 64), features.get("nested", False)

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(columns):
        padding = 1 if features.get("unaligned") else 0
        return tensor(rows, columns + padding, dtype=dtype)[:, :columns]

    kind = formats.KINDS.index(features["kind"])
    count = outputs * columns
    blocks = -(-count // blocksize)
    byte = nested or features["kind"] == "mxfp4"
    weight = [
        tensor((count + 1) // 2, 1, dtype=torch.uint8),
        tensor(blocks, dtype=torch.uint8 if byte else torch.float32),
    ]
    weight += [tensor(-(-blocks // 256)), tensor(), tensor(256)] if nested else [None] * 3
    bias = tensor(outputs) if features.get("bias") else None
    with compiled_launches(chip) as started:
        if rows == 0:
            formats.quantize_4bit(tensor(outputs, columns, dtype=dtype), blocksize, kind)
            formats.dequantize_4bit(*weight, count, blocksize, kind, dtype)
        else:
            linear.linear_4bit(matrix(columns), *weight, bias, outputs, blocksize, kind)
            linear.linear_4bit_backward(matrix(outputs), *weight, columns, blocksize, kind)
    return started


def judge(chip: str, start: Launch, rows: int, dtype: torch.dtype, case: str) -> Row:
    limits, arguments = CHIPS[chip], start.arguments
    if start.kernel not in KERNELS:
        row = row_of(chip, start, _shape(start), rows, dtype, case)
        values = _values(start) / (arguments["num_warps"] * limits.target.warp_size)
        row.figures = (f"{work(row.code.instructions) / values:.1f}", "-")
        return row
    features = arguments["F"]
    tile = features.BLOCK_N, features.BLOCK_K
    row = row_of(chip, start, tile, rows, dtype, f"{case}, {features.BLOCK_M} rows")
    pattern = SUMS
    if start.kernel != "linear_few_kernel":
        pattern = CHIPS[multiplying_chip(chip, features.BLOCK_M)].tensor_core
        if features.PRECISION != "ieee" or chip == "gfx942":
            row.failures += missed_products(chip, start.compiled, features.BLOCK_M)
    loops = row.code.loops(pattern)
    if not loops:
        row.failures.append(f"no loop with {pattern}")
        return row
    loop = max(loops, key=lambda loop: loop.total())
    weights = tile[0] * tile[1] / (arguments["num_warps"] * limits.target.warp_size)
    products = 0 if pattern is SUMS else loop.count(pattern)
    density = (loop.total() - products) / weights
    rate = limits.issue * limits.target.warp_size / density / 2
    lookups = 32 / TURNS[4 if features.NARROW else 8]
    row.figures = (f"{density:.2f}", f"{rate:.1f}, {lookups:.1f} ({limits.memory})")
    if features.UNIT > 1:
        row.failures += narrow_loads(loop.instructions, CODES)
    usual = dtype.itemsize == 2 and features.UNIT > 1 and features.ALIGN >= 8 and features.KIND == "nf4"
    for most, bar in BARS.get(start.kernel, {}).items():
        if usual and chip not in CDNA and features.BLOCK_M <= most:
            bar += NESTED * features.NESTED
            row.failures += [f"{density:.2f} n/w, bar {bar}"] if density > bar else []
            break
    return row


def narrow_loads(instructions: list[Instruction], codes: Markers) -> list[str]:
    """A complaint about loads of codes, which markers tell, of less than 16 bytes a thread."""
    loads = [
        i for i in instructions if codes.match(i) and re.match(r"LDG(?!DEPBAR)|(buffer|global|flat)_load", i.opcode)
    ]
    narrow = [i for i in loads if not re.search("128|x4", i.opcode)]
    if not loads:
        return ["no loads of codes in the loop"]
    return [f"{len(narrow)} narrow loads ({narrow[0].opcode} of {source_of(narrow[0])[1][:40]})"] if narrow else []


def _shape(start: Launch) -> tuple:
    names = [name for name in ("BLOCKS", "BLOCKSIZE", "GROUPS", "BLOCK") if name in start.arguments]
    sizes = [start.arguments[name] for name in names]
    return {"quantize_kernel": (sizes[0], sizes[-1])}.get(start.kernel, (sizes[-1], "-"))


def _values(start: Launch) -> int:
    """How many values a program makes."""
    arguments = start.arguments
    if start.kernel == "quantize_kernel":
        return arguments["BLOCKS"] * arguments["BLOCKSIZE"]
    return arguments["GROUPS"] * 32 if start.kernel == "dequantize_kernel" else arguments["BLOCK"]


def cases(_: str, full: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    """(rows, dtype, name of the case), alike on every chip."""
    return cases_of_products(CASES, USUAL, full)


def cases_of_products(names: Iterable[str], usual: list[str], full: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    """All names, rows and dtypes; if not full the usual ones in bf16, and the first in fp32."""
    for rows in (0, 1, 2, 16, 32, 64, DENSE_ROWS - 1, DENSE_ROWS) if full else (0, 1, 16, 64):
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16,):
            for case in names if full else usual:
                yield rows, dtype, case
    if not full:
        yield 64, torch.float32, usual[0]


def audit(chip: str, rows: int, dtype: torch.dtype, case: str) -> list[Row]:
    return [judge(chip, start, rows, dtype, case) for start in launches(chip, rows, dtype, CASES[case])]
