"""Compiles the kernels of norms, activations and the loss for GPUs that are not here.

`python -m benchmarks.audit.layers [--full]`.

Memory bounds them, so beside spills a kernel fails on accesses of less than 16 bytes a thread, where rows allow these,
and if its instructions, of the loop over rows where there is one, cannot be issued at the bar's share of the rate at
which memory delivers what they work on.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pynlp.kernels.layers import activation, loss, norm

from benchmarks.audit import machine_code as sass
from benchmarks.audit.attention import Row, occupancy, report
from benchmarks.audit.decode import MEMORY

# Layer norms are centred; "wide" residuals are fp32.
CASES = {
    "layer norm": dict(centred=True),
    "layer norm, residual, dropout": dict(centred=True, residual=True, dropout=0.1),
    "rms norm": dict(),
    "rms norm, residual": dict(residual=True),
    "rms norm, fp32 residual, dropout": dict(residual=True, wide=True, dropout=0.1),
    "layer norm, unaligned": dict(centred=True, residual=True, dropout=0.1, unaligned=True),
    "gelu": dict(kind="gelu"),
    "gelu, dropout": dict(kind="gelu", dropout=0.1),
    "relu, dropout": dict(kind="relu", dropout=0.1),
    "swiglu": dict(kind="swiglu", up=True),
    "swiglu, packed, dropout": dict(kind="swiglu", dropout=0.1),
    "swiglu, unaligned": dict(kind="swiglu", dropout=0.1, unaligned=True),
    "loss": dict(loss=dict(label_smoothing=0.0, softcap=0.0, z_loss=0.0)),
    "loss, smoothing, softcap, z": dict(loss=dict(label_smoothing=0.1, softcap=30.0, z_loss=1e-4)),
}
HEADER = (
    "| chip | kernel | D | dtype | features | rows x columns, warps | registers | stack B | shared B | warps an SM | "
    "instructions | B/clock by issue (memory) | verdict |\n" + "|---" * 13 + "|"
)
SOURCES = {path.name: path.read_text().splitlines() for path in Path(norm.__file__).parent.glob("*.py")}
# Lines that may read and write in pieces, one number a row or little a program, and those that read a cache.
NARROW = ("p_seed", "p_mean", "p_rstd", "_sums + o_sum", "p_target", "p_scale", "p_losses")
CACHED = ("evict_last",)
LOAD = r"LDG(?!DEPBAR)|(buffer|global|flat)_load"
ACCESS = rf"{LOAD}|STG|(buffer|global|flat)_store"
# Memory of sm_100 is twice as fast as that of the others. There dropout, 12 instructions a value, takes longer than a
# read and a write of 16 bits, and so does the error function with its 30 on any chip.
BARS = {"norm": 0.9, "relu": 0.8, "swiglu": 0.7, "gelu": 0.33, "loss": 0.3}


@dataclass
class LayerRow(Row):
    """One kernel of one configuration, and how fast it could work if memory were no bound."""

    instructions: int = 0  # a thread's, of the loop over rows or of all there are
    issue: float = 0.0  # bytes a clock and multiprocessor whose instructions can be issued

    def markdown(self) -> str:
        cells = [
            self.chip, self.kernel, self.head_dim, self.dtype, self.features, self.tile, self.code.registers,
            self.code.stack, self.code.shared, self.occupancy, self.instructions,
            f"{self.issue:.0f} ({MEMORY[self.chip]:.0f})", "; ".join(self.failures) or "ok",
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def launches(chip: str, columns: int, dtype: torch.dtype, features: dict) -> list:
    """What the launchers start, forward and backward: (kernel name, arguments, compiled kernel)."""

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(size=columns, dtype=dtype):
        padding = 1 if features.get("unaligned") else 0
        return tensor(4096, size + padding, dtype=dtype)[:, :size]

    dropout = features.get("dropout", 0.0)
    seed = tensor(1, dtype=torch.int64) if dropout else None
    with sass.compiled_launches(chip) as started:
        if "kind" in features:
            up = rows() if features.get("up") else None
            x = rows(2 * columns if features["kind"] == "swiglu" and up is None else columns)
            options = (activation.KINDS.index(features["kind"]), dropout, seed)
            activation.activation_forward(x, up, *options)
            activation.activation_backward(rows(), x, up, *options)
        elif "loss" in features:  # columns are the vocabulary
            x, weight, bias = tensor(512, 64, dtype=dtype), tensor(columns, 64, dtype=dtype), tensor(columns)
            target, scale = tensor(512, dtype=torch.int64), tensor(512)
            options = dict(ignore_index=-100, **features["loss"])
            loss.linear_cross_entropy(x, weight, bias, target, scale, True, True, True, **options)
        else:
            centred, weight = features.get("centred", False), tensor(columns)
            bias = weight if centred else None
            residual = (
                rows(dtype=torch.float32 if features.get("wide") else dtype) if features.get("residual") else None
            )
            _, new, mean, rstd = norm.norm_forward(rows(), residual, weight, bias, centred, 1e-5, dropout, seed)
            new = new if new.numel() else rows()
            grad_new = None if residual is None else new
            norm.norm_backward(rows(), grad_new, new, weight, mean, rstd, centred, dropout, seed, centred)
    return started


def judge(chip: str, name: str, arguments: dict, kernel, columns: int, dtype: torch.dtype, case: str) -> LayerRow:
    limits, code, warps = sass.CHIPS[chip], sass.machine_code(kernel), arguments["num_warps"]
    features = arguments["F"]
    if isinstance(features, loss.Features):
        tile, align, bar = f"1 x {features.BLOCK}", math.gcd(16, features.V), BARS["loss"]
    else:
        tile, align = f"{features.ROWS} x {features.BLOCK_D}", features.ALIGN
        bar = BARS["norm" if name.startswith("norm") else features.KIND]
    row = LayerRow(
        chip, name.removesuffix("_kernel"), columns, str(dtype).removeprefix("torch."), case,
        f"{tile}, {warps}", code, occupancy(limits, code, warps, 0),
    )  # fmt: skip
    row.failures += sass.excesses(chip, kernel)
    hot = hot_path(code)
    row.instructions = sum(i.opcode not in ("NOP", "s_nop") for i in hot)
    row.issue = moved_bytes(hot) * limits.target.warp_size / (row.instructions / limits.issue)
    if align * dtype.itemsize >= 16:
        row.failures += narrow_accesses(code.instructions)
        if row.issue < bar * MEMORY[chip]:
            row.failures.append(f"{row.issue / MEMORY[chip]:.2f} of memory's rate, bar {bar}")
    return row


def hot_path(code: sass.MachineCode) -> list[sass.Instruction]:
    """The loop with most instructions that reads memory, or all of a kernel without one."""
    loops = code.loops(LOAD)
    return max((loop.instructions for loop in loops), key=len, default=code.instructions)


def access_bytes(instruction: sass.Instruction) -> int:
    """Bytes of global memory that a thread reads or writes."""
    if not re.match(ACCESS, instruction.opcode):
        return 0
    if width := re.search(r"\.(64|128)\b|dwordx(\d)", instruction.opcode):
        return int(width[1]) // 8 if width[1] else 4 * int(width[2])
    return 2 if re.search(r"U16|short", instruction.opcode) else 4


def source_of(instruction: sass.Instruction) -> str:
    """The Python line an instruction comes from."""
    name, number = instruction.line or ("", 0)
    return SOURCES[name][number - 1].strip() if name in SOURCES else ""


def narrow_accesses(instructions: list[sass.Instruction]) -> list[str]:
    narrow = [
        i for i in instructions
        if 0 < access_bytes(i) < 16 and not any(text in source_of(i) for text in NARROW + CACHED)
    ]  # fmt: skip
    # Of 16 values a thread several would be narrow; a single one is the seed, where the compiler has lost its line.
    return [f"{len(narrow)} narrow: {narrow[0].opcode} of {source_of(narrow[0])[:40]}"] if len(narrow) > 1 else []


def moved_bytes(instructions: list[sass.Instruction]) -> int:
    """Of what lies in memory only."""
    return sum(access_bytes(i) for i in instructions if not any(text in source_of(i) for text in NARROW + CACHED))


def cases(full: bool) -> Iterator[tuple[str, int, torch.dtype, str]]:
    """(chip, columns, dtype, name of the case)."""
    for chip in sass.CHIPS:
        for columns in (20, 64, 256, 768, 1000, 4096, 8192, 12000, 16384, 32768) if full else (768, 4096):
            for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
                for case in CASES:
                    yield chip, columns, dtype, case


def audit(chip: str, columns: int, dtype: torch.dtype, case: str) -> list[LayerRow]:
    return [judge(chip, *launch, columns, dtype, case) for launch in launches(chip, columns, dtype, CASES[case])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every number of columns and dtype")
    parser.add_argument("--chip", choices=tuple(sass.CHIPS), action="append", help="only this chip")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()

    def chosen(chip: str, _: int, __: torch.dtype, case: str) -> bool:
        return (not options.chip or chip in options.chip) and options.only in case

    return report(HEADER, (row for case in cases(options.full) if chosen(*case) for row in audit(*case)))


if __name__ == "__main__":
    sys.exit(main())
