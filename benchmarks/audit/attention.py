"""Compiles every kernel of attention for GPUs that are not here and judges the machine code.

`python -m benchmarks.audit.attention [--full]`.

The launchers themselves are called on tensors without data, so what is compiled is what they would launch. A kernel
fails on spills, on shared or tensor memory beyond the chip's, on a product that misses the chip's tensor cores, on
narrow loads or masks in the loop over unmasked blocks, and on more instructions a score than the bars below allow.

n/s = non-tensor instructions of the loop a score and thread. The bounds are the tensor cores' share of the loop's
cycles if nothing overlaps and if everything does: they rank variants, they are not measurements.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from pynlp.kernels.attention import launch as attention

from benchmarks.audit import machine_code as sass

CHIPS = tuple(sass.CHIPS)
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "gfx942": "v_mfma"}
# Products in Triton's GPU dialect that reach the tensor cores of the chip.
TENSOR_CORE_OP = {
    "sm_80": r"tt\.dot .*-> tensor<\S+ #mma\d*>",
    "sm_90": r"ttng\.warp_group_dot ",
    "sm_100": r"ttng\.tc_gen5_mma ",
    "gfx942": r"tt\.dot .*-> tensor<\S+ #mma\d*>",
}
ANY_PRODUCT = r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) "

FEATURES = {
    "full": dict(window=(-1, -1)),
    "causal": dict(),
    "causal, ALiBi": dict(slopes=True),
    "causal, T5": dict(table=True),
    "causal, RoPE": dict(rotary=1.0),
    "window, lengths": dict(window=(512, 64), lengths=True),
    "ALiBi": dict(window=(-1, -1), slopes=True),
    "T5": dict(window=(-1, -1), table=True),
    "causal, sinks": dict(sinks=True),
    "causal, dropout": dict(dropout=0.1),
    "causal, varlen": dict(packed=True),
    "causal, softcap": dict(softcap=30.0),
    "causal, GPT-NeoX RoPE 1/4": dict(rotary=0.25),
    "causal, interleaved RoPE, ids": dict(rotary=1.0, interleaved=True, ids=True),
    "causal, lengths, unaligned": dict(lengths=True, unaligned=True),
    "window, ALiBi, T5": dict(window=(512, 64), slopes=True, table=True),
    "causal, values of half": dict(values=0.5),
    "window, all": dict(
        window=(512, 64), lengths=True, slopes=True, table=True, rotary=1.0, softcap=30.0, interleaved=True, ids=True
    ),
    "varlen, all": dict(
        window=(512, 64), packed=True, sinks=True, slopes=True, table=True, rotary=1.0, softcap=30.0, dropout=0.1
    ),
}
# n/s of the loop without mask, bf16, forward: (chips, features, head size) -> bar. Sinks and packed sequences are free.
HOPPER, AMPERE, CDNA = ("sm_90", "sm_100"), ("sm_80",), ("gfx942",)
FREE = {
    (HOPPER, 64): 7.2,
    (HOPPER, 128): 7.8,
    (AMPERE, 64): 8.2,
    (AMPERE, 128): 12.0,
    (CDNA, 64): 12.5,
    (CDNA, 128): 15.0,
}
BARS = {
    (HOPPER, "causal, ALiBi", 64): 8.2,
    (HOPPER, "causal, ALiBi", 128): 8.8,
    (HOPPER, "causal, T5", 64): 10.5,
    (HOPPER, "causal, T5", 128): 11.0,
    (HOPPER, "causal, dropout", 64): 19.5,
    (HOPPER, "causal, dropout", 128): 19.5,
    (AMPERE, "causal, dropout", 64): 23.0,
    (AMPERE, "causal, dropout", 128): 26.0,
    (CDNA, "causal, dropout", 64): 26.0,
    (CDNA, "causal, dropout", 128): 29.0,
}
for _name in ("causal", "causal, sinks", "causal, varlen"):
    BARS |= {(chips, _name, head_dim): bar for (chips, head_dim), bar in FREE.items()}
# Products over the channels of q and k, and over those of v and out.
PRODUCTS = {
    "attention_forward_kernel": (1, 1),
    "attention_backward_queries_kernel": (2, 1),
    "attention_backward_keys_kernel": (2, 2),
}
# What the hot loops may read in pieces: T5's line, position ids, slopes, a row's statistics.
NARROW_LOADS = ("p_line + base", "p_line + side", "p_positions", "p_slopes", "p_pivot", "p_delta")
# Lines that select or compare without being a mask.
SELECTING = ("tl.dot(", "2.0 / (", "tl.gather(", "m_upper", "tl.load(p_block", "kept_weights")
SOURCES = {path.name: path.read_text().splitlines() for path in Path(attention.__file__).parent.glob("attention*.py")}


@dataclass
class Row:
    """One kernel of one configuration."""

    chip: str
    kernel: str
    head_dim: int
    dtype: str
    features: str
    tile: str
    code: sass.MachineCode
    occupancy: int
    loops: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # kind -> n/s, bounds
    failures: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        loops = {kind: self.loops.get(kind) for kind in ("unmasked", "near")}
        density = " / ".join(f"{loop[0]:.1f}" for loop in loops.values() if loop) or "-"
        hot = loops["unmasked"] or loops["near"]
        bound = f"{hot[1]:.0%} - {hot[2]:.0%}" if hot else "-"
        cells = [
            self.chip, self.kernel, self.head_dim, self.dtype, self.features, self.tile, self.code.registers,
            self.code.stack, self.code.shared // 1024, self.occupancy, density, bound, "; ".join(self.failures) or "ok",
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


HEADER = (
    "| chip | kernel | D | dtype | features | tile, warps, stages | registers | stack B | shared KB | warps an SM | "
    "n/s unmasked / near | tensor share, none - full overlap | verdict |\n" + "|---" * 13 + "|"
)


def attention_launches(chip: str, head_dim: int, dtype: torch.dtype, backward: bool, **features) -> list:
    """What the attention launchers start for these features: (kernel name, arguments, compiled kernel)."""
    batch, seqlen, heads = 4, 4096, 16
    packed = features.get("packed", False)
    sequences = 64 if packed else batch
    if packed:
        batch, seqlen = 1, batch * seqlen

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def optional(name: str, *shape, dtype=torch.float32):
        return tensor(*shape, dtype=dtype) if features.get(name) else None

    padding = 1 if features.get("unaligned") else 0
    head_dim_v = int(head_dim * features.get("values", 1.0))
    q, k, v, out = (
        tensor(batch, seqlen, h, size + padding, dtype=dtype)[..., :size]
        for h, size in ((heads, head_dim), (heads // 2, head_dim), (heads // 2, head_dim_v), (heads, head_dim_v))
    )
    cos = optional("rotary", 2 * seqlen, max(1, int(head_dim * features.get("rotary", 0)) // 2))
    left, right = features.get("window", (-1, 0))
    options = attention.Options(
        softmax_scale=head_dim**-0.5,
        window_left=left,
        window_right=right,
        softcap=features.get("softcap", 0.0),
        key_lengths=optional("lengths", sequences, dtype=torch.int32),
        cu_seqlens_q=optional("packed", sequences + 1, dtype=torch.int32),
        cu_seqlens_k=optional("packed", sequences + 1, dtype=torch.int32),
        sinks=optional("sinks", heads),
        alibi_slopes=optional("slopes", heads),
        relative_bias=optional("table", 32, heads),
        relative_buckets=optional("table", 257, dtype=torch.int32),
        rotary_cos=cos,
        rotary_sin=cos,
        rotary_positions=optional("ids", batch, seqlen, dtype=torch.int32),
        rotary_offset=0,
        rotary_interleaved=features.get("interleaved", False),
        dropout_p=features.get("dropout", 0.0),
        dropout_seed=optional("dropout", 1, dtype=torch.int64),
    )
    chip_of = attention.chip_of
    attention.chip_of = lambda _: chip
    try:
        with sass.compiled_launches(chip) as launches:
            if backward:
                needs = [x is not None for x in (options.alibi_slopes, options.relative_bias, options.sinks)]
                lse = tensor(batch, heads, seqlen)
                attention.attention_backward(out, lse, q, k, v, out, lse, *options, *needs)
            else:
                attention.attention_forward(q, k, v, *options)
    finally:
        attention.chip_of = chip_of
    return launches


def kind_of(loop: sass.Loop) -> str:
    """Which of a kernel's loops this is, by the source lines its instructions come from."""
    lines = Counter()  # text -> instructions; a single one may have been merged with another loop's
    for (name, number), count in loop.lines.items():
        if name in SOURCES:
            lines[SOURCES[name][number - 1].strip()] += count

    def has(text: str) -> bool:
        return sum(count for line, count in lines.items() if text in line) > 2

    if has("* 0.0 == 0.0") or has('"nan"'):
        return "careful"
    if has("m_pair"):
        return "masked"
    return "near" if has("tl.abs(b_key") or has("p_line + base") else "unmasked"


def judge(chip: str, name: str, arguments: dict, kernel, head_dim: int, dtype: torch.dtype, features: str) -> Row:
    limits, code = sass.CHIPS[chip], sass.machine_code(kernel)
    warps, width = arguments["num_warps"], limits.target.warp_size
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0) or 0
    tile = arguments["TILE"][:2] if "TILE" in arguments else (arguments.get("BLOCK_M", "-"), "-")
    row = Row(
        chip, name.removeprefix("attention_").removesuffix("_kernel"), head_dim, str(dtype).removeprefix("torch."),
        features, f"{tile[0]} x {tile[1]}, {warps}, {kernel.metadata.num_stages}", code,
        occupancy(limits, code, warps, tensor_memory),
    )  # fmt: skip
    row.failures += sass.excesses(chip, kernel)
    fail = row.failures.append
    if name not in PRODUCTS:
        return row

    products = len(re.findall(ANY_PRODUCT, kernel.asm["ttgir"]))
    if arguments["F"].PRECISION == "ieee" and chip != "gfx942":
        return row  # multiply-adds, by choice: these chips have no tensor-core product of fp32
    # Products of fewer rows than wgmma and tcgen05 take are for mma.sync.
    rows = tile[1] if name == "attention_backward_keys_kernel" else tile[0]
    unit = "sm_80" if chip in HOPPER and rows < 64 else chip
    missed = products - len(re.findall(TENSOR_CORE_OP[unit], kernel.asm["ttgir"]))
    if missed or not products:
        fail(f"{missed} of {products} products miss {TENSOR_CORE[unit]}")
    scores = tile[0] * tile[1] / (warps * width)
    head_dim_v, block = arguments["F"].HEAD_DIM_V, arguments["F"].BLOCK_D
    channels = sum(
        count * triton.cdiv(size, block) * block
        for count, size in zip(PRODUCTS[name], (head_dim, head_dim_v), strict=True)
    )
    # Programs of packed sequences may end early; what jumps back from behind the last end waits for a barrier.
    end = max(i.address for i in code.instructions if i.opcode in ("EXIT", "s_endpgm"))
    for loop in code.loops(TENSOR_CORE[unit]):
        kind = kind_of(loop)
        if loop.instructions[-1].address > end or kind not in ("unmasked", "near"):
            continue
        total = sum(i.opcode not in ("NOP", "s_nop") for i in loop.instructions)
        density = (total - loop.count(TENSOR_CORE[unit])) / scores
        flop = 2 * tile[0] * tile[1] * channels * (1 if dtype.itemsize == 2 else 6)
        row.loops[kind] = (density, *bounds(limits, loop, flop, total, warps))
        for problem in narrow_loads(loop, arguments, warps * width, dtype.itemsize) + masks(chip, loop, scores):
            fail(f"{kind} loop: {problem}")
    if "unmasked" not in row.loops:
        fail("no loop without masks")
    if dtype == torch.bfloat16 and name == "attention_forward_kernel":
        for (chips, which, size), bar in BARS.items():
            if chip in chips and which == features and size == head_dim:
                worst = max((density for density, *_ in row.loops.values()), default=0.0)
                if worst > bar:
                    fail(f"{worst:.2f} n/s, bar {bar}")
    return row


def occupancy(limits: sass.Chip, code: sass.MachineCode, warps: int, tensor_memory: int) -> int:
    """Warps an SM (AMD: a CU) holds at once."""
    if limits.target.backend == "hip":
        waves = min(8, 512 // max(1, code.registers)) * 4  # four SIMDs of 512 registers a lane
        return min(waves, limits.shared_memory // max(1, code.shared) * warps)
    blocks = min(
        limits.registers // (max(1, (code.registers + 7) // 8 * 8) * 32 * warps),
        limits.shared_memory // max(1, code.shared),
        limits.warps // warps,
        512 // tensor_memory if tensor_memory else limits.warps,
    )
    return blocks * warps


def bounds(limits: sass.Chip, loop: sass.Loop, flop: float, instructions: int, warps: int) -> tuple[float, float]:
    """The tensor cores' share of an iteration's cycles, if nothing overlaps and if everything does."""
    lanes = limits.target.warp_size * warps
    cycles = [
        flop / limits.tensor_flop,
        instructions * warps / limits.issue,
        loop.count(r"MUFU|v_(exp|rcp|log)") * lanes / limits.special,
        shared_memory_bytes(loop) * lanes / 128,
    ]
    return cycles[0] / sum(cycles), cycles[0] / max(cycles)


def shared_memory_bytes(loop: sass.Loop) -> int:
    """Bytes a thread moves between registers and shared memory in an iteration."""
    total = 0
    for instruction in loop.instructions:
        if re.match(r"LDS|STS|ds_read|ds_write", instruction.opcode) and not instruction.opcode.startswith("LDSM"):
            width = re.search(r"\.(64|128)|_b(32|64|128)", instruction.opcode)
            total += int(next(group for group in width.groups() if group)) // 8 if width else 4
        elif instruction.opcode.startswith(("LDSM", "STSM")):
            total += 16 if instruction.opcode.endswith((".4", "x4")) or ".4" in instruction.opcode else 8
    return total


def source_of(instruction: sass.Instruction) -> str:
    """The Python line an instruction comes from."""
    name, number = instruction.line or ("", 0)
    return SOURCES[name][number - 1] if name in SOURCES else ""


def narrow_loads(loop: sass.Loop, arguments: dict, threads: int, item_size: int) -> list[str]:
    """Global loads of less than 16 bytes a thread, where the tensors' alignment and the tile's size allow 16."""
    aligned = 16 // item_size
    strides = [value for key, value in arguments.items() if re.fullmatch(r"stride_[qkvg][bsh]", key)]
    features, tile = arguments["F"], arguments["TILE"]
    piece = min(features.BLOCK_HALF, features.BLOCK_D) if features.HALF else features.BLOCK_D
    smallest = min(tile.BLOCK_M, tile.BLOCK_N) * piece * item_size // threads
    if any(x % aligned for x in (*strides, features.HEAD_DIM, features.HALF)) or smallest < 16:
        return []
    narrow = []
    for instruction in loop.instructions:
        is_load = re.match(r"LDG(?!DEPBAR)|(buffer|global|flat)_load", instruction.opcode)
        if not is_load or re.search("128|x4", instruction.opcode):
            continue
        source = source_of(instruction)
        if not any(allowed in source for allowed in NARROW_LOADS):
            narrow.append(f"{instruction.opcode} of {source.strip()[:40]}")
    return [f"{len(narrow)} narrow loads ({narrow[0]})"] if narrow else []


def masks(chip: str, loop: sass.Loop, scores: float) -> list[str]:
    """Selections and comparisons: a mask would take one of each a score."""
    if chip == "gfx942":
        return []  # exp2 itself compares and selects there
    count = 0
    for instruction in loop.instructions:
        file, source = (instruction.line or ("", 0))[0], source_of(instruction)
        # Splitting fp32 into TF32, dividing, summing diagonals, heads that fill no power of two, and dropout select.
        exempt = any(text in source for text in SELECTING) or file == "attention_dropout.py"
        count += bool(re.match(r"FSEL|SEL|ISETP", instruction.opcode)) and not exempt
    return [f"{count} selections and comparisons"] if count > scores / 2 + 16 else []


def cases(full: bool):
    """(chip, head size, dtype, backward, name of the features); without `full` forward where it has a bar, and some
    backward."""
    for chip in CHIPS:
        for head_dim in (16, 64, 80, 128, 256) if full else (64, 128):
            for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
                for name in FEATURES:
                    if full or any(chip in c and n == name and d == head_dim for c, n, d in BARS):
                        yield chip, head_dim, dtype, False, name
                    usual = ("causal", "causal, sinks", "causal, dropout", "causal, varlen")
                    chosen = name in usual[: 4 if chip == "sm_90" else 1]
                    if full or (chosen and head_dim == (128 if chip in HOPPER else 64)):
                        yield chip, head_dim, dtype, True, name


def audit(chip: str, head_dim: int, dtype: torch.dtype, backward: bool, features: str) -> list[Row]:
    launches = attention_launches(chip, head_dim, dtype, backward, **FEATURES[features])
    return [judge(chip, *launch, head_dim, dtype, features) for launch in launches]


def report(header: str, rows: Iterable[Row]) -> int:
    """Prints the rows as they come, and how many failed; the exit status."""
    print(header, flush=True)
    failed = total = 0
    for row in rows:
        total += 1
        failed += bool(row.failures)
        print(row.markdown(), flush=True)
    print(f"\n{total} kernels, {failed} failed", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every head size, dtype and combination of features")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip")
    parser.add_argument("--only", default="", help="only features whose name contains this")
    parser.add_argument("--head-dim", type=int, action="append")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    options = parser.parse_args()

    def chosen(chip: str, head_dim: int, dtype: torch.dtype, _: bool, features: str) -> bool:
        return (
            (not options.chip or chip in options.chip)
            and options.only in features
            and (not options.head_dim or head_dim in options.head_dim)
            and (not options.dtype or str(dtype) == f"torch.{options.dtype}")
        )

    return report(HEADER, (row for case in cases(options.full) if chosen(*case) for row in audit(*case)))


if __name__ == "__main__":
    sys.exit(main())
