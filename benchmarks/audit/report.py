"""What an audit finds: a line for each kernel, and the marks by which it knows the lines of the kernels' sources."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pynlp.kernels.common import launch

from benchmarks.audit.chips import excesses, occupancy, tensor_memory
from benchmarks.audit.machine_code import Instruction, Loop, MachineCode, machine_code

KERNELS = Path(launch.__file__).resolve().parents[1]


@functools.cache
def source_lines(path: str) -> list[str]:
    """The lines of a file below kernels/, e.g. attention/forward.py; none where there is no such file."""
    file = KERNELS / path
    return file.read_text().splitlines() if path and file.exists() else []


def source_of(instruction: Instruction) -> tuple[str, str]:
    """The file below kernels/ and the line that an instruction comes from; empty where it comes from elsewhere."""
    path, number = instruction.line or ("", 0)
    path = path.rpartition("/kernels/")[2]  # a cached kernel may come from another checkout
    lines = source_lines(path)
    return (path, lines[number - 1].strip()) if lines else ("", "")


class Markers:
    """Pieces of source text, by file, that tell which lines of the kernels an instruction comes from.

    Each must occur in its file: a kernel whose names change would otherwise be judged by other rules in silence.
    """

    def __init__(self, texts: dict[str, tuple[str, ...]]):
        self.texts = texts
        for path, markers in texts.items():
            for text in markers:
                if not any(text in line for line in source_lines(path)):
                    raise ValueError(f"markers: expected {text!r} in kernels/{path}, which has no such line")

    def match(self, instruction: Instruction) -> bool:
        path, line = source_of(instruction)
        return any(text in line for text in self.texts.get(path, ()))


def kind_of(loop: Loop, kinds: dict[str, Markers]) -> str:
    """The first kind whose markers match instructions of the loop; "unmasked" where none does."""
    for kind, markers in kinds.items():
        if sum(map(markers.match, loop.instructions)) > 2:  # a single one may have been merged with another loop's
            return kind
    return "unmasked"


@dataclass
class Row:
    """One kernel of one case."""

    chip: str
    kernel: str
    size: int  # channels of a head, or columns
    dtype: str
    case: str
    tile: str
    code: MachineCode
    occupancy: int
    figures: tuple[str, str] = ("-", "-")  # what the family measures besides
    failures: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        cells = (
            self.chip, self.kernel, self.size, self.dtype, self.case, self.tile, self.code.registers, self.code.stack,
            self.code.shared, self.occupancy, *self.figures, "; ".join(self.failures) or "ok",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def row_of(chip: str, start: launch.Launch, tile: tuple, size: int, dtype: torch.dtype, case: str) -> Row:
    """The row of a compiled launch, which fails if the chip lacks what the kernel needs."""
    code, warps = machine_code(start.compiled), start.arguments["num_warps"]
    return Row(
        chip, start.kernel.removeprefix("attention_").removesuffix("_kernel"), size, str(dtype).removeprefix("torch."),
        case, f"{tile[0]} x {tile[1]}, {warps}, {start.compiled.metadata.num_stages}", code,
        occupancy(chip, code, warps, tensor_memory(start.compiled)), failures=excesses(chip, start.compiled),
    )  # fmt: skip


def report(figures: tuple[str, str], rows: Iterable[Row]) -> int:
    """Prints the rows as they come, and how many failed; returns how many."""
    columns = (
        "chip", "kernel", "D", "dtype", "case", "tile, warps, stages", "registers", "stack B", "shared B",
        "warps an SM", *figures, "verdict",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    failed = total = 0
    for row in rows:
        total += 1
        failed += bool(row.failures)
        print(row.markdown(), flush=True)
    print(f"\n{total} kernels, {failed} failed", flush=True)
    return failed
