"""Compiles the kernels of decoding and of attention weights for GPUs that are not here.

`python -m benchmarks.audit.decode [--full]`.

Reading the cache bounds them, so beside what benchmarks.audit.attention asks of a kernel, of the loop over keys it
asks that keys and values are loaded 16 bytes a thread and, of the usual cases in bf16, that its instructions can be
issued twice as fast as memory delivers what they work on. In flight are the blocks of keys and values that are on
their way to a multiprocessor, or in use there.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pynlp.kernels.attention import decode_launch as attention_decode
from pynlp.kernels.attention import weights as attention_weights

from benchmarks.audit import machine_code as sass
from benchmarks.audit.attention import (
    ANY_PRODUCT,
    HOPPER,
    TENSOR_CORE,
    TENSOR_CORE_OP,
    Row,
    kind_of,
    occupancy,
    report,
    source_of,
)

# Bytes a clock that memory delivers to each multiprocessor, from data sheets: A100 80GB, H100 SXM, B200, MI300X.
MEMORY = {"sm_80": 13.4, "sm_90": 14.5, "sm_100": 29.0, "gfx942": 8.3}
DECODE = "attention_decode_kernel"
ALL = dict(window=(512, 1), slopes=True, table=True, rotary=True, sinks=True, softcap=30.0)
# Shapes: heads, key heads, head sizes of keys and values; 64 heads on one are 64 rows of a tile.
GROUPED = dict(heads=32, kv_heads=8)
LATENT = dict(heads=128, kv_heads=1, values=512, inside=True)
CASES = {
    "decode": GROUPED,
    "decode, pages of 16": GROUPED | dict(page=16),
    "latent, pages of 64": LATENT | dict(page=64),
    "append, pages of 16": GROUPED | dict(page=16, rotary=True, append=True),
    "weights, causal": dict(heads=16, kv_heads=8, weights=True, window=(-1, 0), tokens=1024),
    # With --full:
    "decode, pages of 256": GROUPED | dict(page=256),
    "decode, no splits": GROUPED | dict(splits=1),
    "decode, unaligned": GROUPED | dict(unaligned=True),
    "decode, all": GROUPED | ALL,
    "decode, all, pages of 16": GROUPED | ALL | dict(page=16),
    "decode, 32 heads on one": dict(heads=32, kv_heads=1, page=16),
    "decode, 64 heads on one": dict(heads=64, kv_heads=1, page=16),
    "4 tokens": GROUPED | dict(tokens=4, window=(-1, 0), page=16),
    "4 tokens, all": GROUPED | ALL | dict(tokens=4, page=16),
    "chunk of 512": GROUPED | dict(tokens=512, window=(-1, 0), page=16),
    "chunk of 512, all": GROUPED | ALL | dict(tokens=512, page=16),
    "latent": LATENT,
    "latent, 4 tokens": LATENT | dict(tokens=4, window=(-1, 0), page=64),
    "latent, separate": LATENT | dict(inside=False, page=64),
    "latent, 16 heads": LATENT | dict(heads=16, page=64),
    "append, interleaved": GROUPED | dict(rotary=True, interleaved=True, append=True, tokens=512),
    "weights, all": dict(heads=16, kv_heads=8, weights=True, ids=True, lengths=True, tokens=1024) | ALL,
}
USUAL = list(CASES)[: list(CASES).index("decode, pages of 256")]
HEADER = (
    "| chip | kernel | D | dtype | features | tile, warps, stages | registers | stack B | shared KB | warps an SM | "
    "KB in flight | B/clock by issue (memory) | verdict |\n" + "|---" * 13 + "|"
)


@dataclass
class DecodeRow(Row):
    """One kernel of one configuration; of the loop over keys what moves."""

    in_flight: float = 0.0  # bytes a multiprocessor
    issue: float = 0.0  # bytes a clock and multiprocessor whose instructions can be issued

    def markdown(self) -> str:
        cells = [
            self.chip, self.kernel, self.head_dim, self.dtype, self.features, self.tile, self.code.registers,
            self.code.stack, self.code.shared // 1024, self.occupancy,
            f"{self.in_flight / 1024:.0f}" if self.in_flight else "-",
            f"{self.issue:.0f} ({MEMORY[self.chip]:.0f})" if self.issue else "-", "; ".join(self.failures) or "ok",
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def launches(chip: str, head_dim: int, dtype: torch.dtype, **features) -> list:
    """What a launcher starts for these features: (kernel name, arguments, compiled kernel)."""
    batch, capacity, tokens = 4, 8192, features.get("tokens", 1)
    heads, kv_heads = features["heads"], features["kv_heads"]

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def optional(name: str, *shape, dtype=torch.float32):
        return tensor(*shape, dtype=dtype) if features.get(name) else None

    def rows(*shape):
        padding = 1 if features.get("unaligned") else 0
        return tensor(*shape[:-1], shape[-1] + padding, dtype=dtype)[..., : shape[-1]]

    page = features.get("page", 0)
    shape = (batch * capacity // page, page) if page else (batch, capacity)
    values = features.get("values", head_dim)
    k_cache = rows(*shape, kv_heads, head_dim)
    v_cache = k_cache[..., head_dim - values :] if features.get("inside") else rows(*shape, kv_heads, values)
    lengths = tensor(batch, dtype=torch.int32)
    block_table = tensor(batch, capacity // page, dtype=torch.int32) if page else None
    cos = optional("rotary", 2 * capacity, head_dim // 2)
    window, softcap = features.get("window", (-1, -1)), features.get("softcap", 0.0)
    biases = (
        optional("sinks", heads), optional("slopes", heads), optional("table", 32, heads),
        optional("table", 257, dtype=torch.int32), cos, cos,
    )  # fmt: skip
    interleaved = features.get("interleaved", False)
    chips = [module.chip_of for module in (attention_decode, attention_weights)]
    attention_decode.chip_of = attention_weights.chip_of = lambda _: chip
    try:
        with sass.compiled_launches(chip) as started:
            if features.get("append"):
                k, v = (rows(batch, tokens, kv_heads, size) for size in (head_dim, values))
                attention_decode.attention_append(
                    k, v, k_cache, v_cache, lengths, block_table, cos, cos, 0, interleaved
                )  # fmt: skip
            elif features.get("weights"):
                q, k = rows(batch, tokens, heads, head_dim), rows(batch, capacity, kv_heads, head_dim)
                attention_weights.attention_weights(
                    q, k, None, None, head_dim**-0.5, *window, softcap, optional("lengths", batch, dtype=torch.int32),
                    None, None, *biases, optional("ids", batch, capacity, dtype=torch.int32), 0, interleaved, 0.0, None,
                )  # fmt: skip
            else:
                attention_decode.attention_decode(
                    rows(batch, tokens, heads, head_dim), k_cache, v_cache, lengths, tokens, block_table,
                    head_dim**-0.5, *window, softcap, *biases, 0, interleaved, features.get("splits", 0),
                )  # fmt: skip
    finally:
        attention_decode.chip_of, attention_weights.chip_of = chips
    return started


def judge(chip: str, name: str, arguments: dict, kernel, head_dim: int, dtype: torch.dtype, case: str) -> DecodeRow:
    limits, code = sass.CHIPS[chip], sass.machine_code(kernel)
    warps = arguments["num_warps"]
    tile = arguments.get("TILE", (arguments.get("BLOCK_M", "-"), arguments.get("BLOCK_N", "-")))
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0) or 0
    row = DecodeRow(
        chip, name.removeprefix("attention_").removesuffix("_kernel"), head_dim, str(dtype).removeprefix("torch."),
        case, f"{tile[0]} x {tile[1]}, {warps}, {kernel.metadata.num_stages}", code,
        occupancy(limits, code, warps, tensor_memory),
    )  # fmt: skip
    row.failures += sass.excesses(chip, kernel)
    wide = not CASES[case].get("unaligned") and head_dim % 16 == 0
    if wide:
        row.failures += narrow_accesses(code.instructions, ("tl.store(p_tile", "tl.store(p_weights"))
    if name not in (DECODE, "attention_weights_kernel"):
        return row

    features = arguments["F"]
    # Multiply-adds, by choice: NVIDIA's tensor cores have no product of fp32.
    multiplies = features.PRECISION == "ieee" and chip != "gfx942"
    if not multiplies:
        row.failures += missed_products(chip, kernel, tile[0])
    if name != DECODE or multiplies:
        return row
    unit = tensor_core_of(chip, tile[0])
    loops = {kind_of(loop): loop for loop in code.loops(TENSOR_CORE[unit])}
    hot = loops.get("masked" if features.EVEN else "unmasked")
    if hot is None:
        row.failures.append("no loop over keys")
        return row
    smallest = (
        tile[1] * (head_dim & -head_dim) * dtype.itemsize // (warps * limits.target.warp_size)
    )  # of a row's pieces
    if wide and smallest >= 16:
        row.failures += narrow_accesses(hot.instructions, ("tl.load(p_x + i_c",))
    channels = features.HEAD_DIM + (features.HEAD_DIM_V if features.INSIDE < 0 else 0)
    block = tile[1] * channels * dtype.itemsize
    row.in_flight = block * buffers(kernel) * row.occupancy / warps
    total = sum(i.opcode not in ("NOP", "s_nop") for i in hot.instructions)
    row.issue = block / (total * warps / limits.issue)
    if case in USUAL and dtype == torch.bfloat16 and tile[0] == 16 and row.issue < 2 * MEMORY[chip]:
        row.failures.append("instructions take half of memory's time")
    return row


def tensor_core_of(chip: str, rows: int) -> str:
    """The chip whose instructions multiply so many rows: fewer than wgmma and tcgen05 take are for mma.sync."""
    return "sm_80" if chip in HOPPER and rows < 64 else chip


def missed_products(chip: str, kernel, rows: int) -> list[str]:
    products, unit = len(re.findall(ANY_PRODUCT, kernel.asm["ttgir"])), tensor_core_of(chip, rows)
    missed = products - len(re.findall(TENSOR_CORE_OP[unit], kernel.asm["ttgir"]))
    return [f"{missed} of {products} products miss {TENSOR_CORE[unit]}"] if missed or not products else []


def buffers(kernel) -> int:
    """Blocks of keys that shared memory holds at once; 1 where they wait in registers."""
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", kernel.asm["ttgir"])
    return max(map(int, found), default=1)


def narrow_accesses(instructions: list[sass.Instruction], sources: tuple[str, ...]) -> list[str]:
    """Accesses of global memory, from these lines, of less than 16 bytes a thread."""
    narrow = [
        i for i in instructions
        if re.match(r"LDG(?!DEPBAR)|STG|(buffer|global|flat)_(load|store)", i.opcode)
        and not re.search("128|x4", i.opcode) and any(text in source_of(i) for text in sources)
    ]  # fmt: skip
    return [f"{len(narrow)} narrow: {narrow[0].opcode} of {source_of(narrow[0]).strip()[:40]}"] if narrow else []


def cases(full: bool) -> Iterator[tuple[str, int, torch.dtype, str]]:
    """(chip, head size of keys, dtype, name of the case)."""
    for chip in sass.CHIPS:
        for name in CASES if full else USUAL:
            if CASES[name].get("values"):
                if full or chip == "sm_90":
                    yield chip, 576, torch.bfloat16, name
            else:
                heads = (64, 80, 128, 256) if full else (128,) if "decode" not in name else (64, 128)
                for head_dim in heads:
                    yield chip, head_dim, torch.bfloat16, name
                if full or (chip == "sm_80" and name == "decode"):
                    yield chip, 128, torch.float32, name


def audit(chip: str, head_dim: int, dtype: torch.dtype, case: str) -> list[DecodeRow]:
    started = launches(chip, head_dim, dtype, **CASES[case])
    return [judge(chip, *launch, head_dim, dtype, case) for launch in started]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every head size, dtype and case")
    parser.add_argument("--chip", choices=tuple(sass.CHIPS), action="append", help="only this chip")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()

    def chosen(chip: str, _: int, __: torch.dtype, name: str) -> bool:
        return (not options.chip or chip in options.chip) and options.only in name

    return report(HEADER, (row for case in cases(options.full) if chosen(*case) for row in audit(*case)))


if __name__ == "__main__":
    sys.exit(main())
