"""The machine code of compiled Triton kernels, NVIDIA's and AMD's: instructions, their source lines, and loops."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def usage(kernel) -> tuple[int, int]:
    """Registers a thread, and its bytes of spills and local arrays."""
    if "cubin" not in kernel.asm:
        keys = ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (int(re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])[1]) for key in keys)
        return registers, stack
    text = _run_on_cubin(kernel, "cuobjdump", "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _run_on_cubin(kernel, program: str, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [BINARIES / program, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Instruction:
    address: int
    opcode: str
    text: str
    line: tuple[str, int] | None  # path and number of a line of the Python source
    target: int | None = None  # of a branch


@dataclass
class Loop:
    instructions: list[Instruction]

    def total(self) -> int:
        return work(self.instructions)

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)


@dataclass
class MachineCode:
    instructions: list[Instruction]
    registers: int
    stack: int  # bytes of spills and local arrays a thread
    shared: int

    def loops(self, containing: str) -> list[Loop]:
        """The innermost loops among those that have an instruction of this pattern."""
        index = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        spans = []
        # Behind the end of the program lie the slow paths of barrier waits, which jump back without being loops.
        end = next((i for i, x in enumerate(self.instructions) if x.opcode in ("EXIT", "s_endpgm")), 0)
        for i, instruction in enumerate(self.instructions):
            if instruction.target is not None and instruction.target <= instruction.address:
                if i > end >= index[instruction.target]:
                    continue
                spans.append((index[instruction.target], i))
        loops = [(span, Loop(self.instructions[span[0] : span[1] + 1])) for span in spans]
        loops = [(span, loop) for span, loop in loops if loop.count(containing)]
        inner = []
        for span, loop in loops:
            if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o, _ in loops):
                inner.append(loop)
        return inner


def work(instructions: list[Instruction]) -> int:
    """How many instructions do something."""
    return sum(i.opcode not in ("NOP", "s_nop") for i in instructions)


def machine_code(kernel) -> MachineCode:
    if "cubin" in kernel.asm:
        return _nvidia(kernel)
    return _amd(kernel)


def _nvidia(kernel) -> MachineCode:
    listing = _run_on_cubin(kernel, "nvdisasm", "-g", "-c")
    instructions, labels, line, pending = [], {}, None, []
    for text in listing.splitlines():
        if match := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            line = (match[1], int(match[2]))
        elif match := re.match(r"\s*(\.L_x_\d+):", text):
            pending.append(match[1])
        elif match := re.match(r"\s*/\*([0-9a-f]+)\*/\s+\{?\s*(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?);", text):
            instruction = Instruction(int(match[1], 16), match[2], match[0].strip(), line)
            labels |= {label: instruction.address for label in pending}
            pending.clear()
            instructions.append(instruction)
    for instruction in instructions:
        if instruction.opcode.startswith("BRA") and (match := re.search(r"(\.L_x_\d+)", instruction.text)):
            instruction.target = labels.get(match[1])
    return MachineCode(instructions, *usage(kernel), kernel.metadata.shared)


def _amd(kernel) -> MachineCode:
    listing = kernel.asm["amdgcn"]
    files = {
        number: f"{folder}/{name}"
        for number, folder, name in re.findall(r'\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]+)"', listing)
    }
    instructions, labels, line = [], {}, None
    for address, text in enumerate(listing.splitlines()):
        text = text.split(";")[0].strip()
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            line = (files.get(match[1], ""), int(match[2]))
        elif match := re.match(r"(\.L\w+):", text):
            labels[match[1]] = address + 1
        elif match := re.match(r"([a-z]\w+)\s*(.*)", text):
            instructions.append(Instruction(address, match[1], text, line))
    addresses = [instruction.address for instruction in instructions]
    for instruction in instructions:
        if re.match(r"s_c?branch", instruction.opcode) and (label := labels.get(instruction.text.split()[-1])):
            instruction.target = next(a for a in addresses if a >= label)
    return MachineCode(instructions, *usage(kernel), kernel.metadata.shared)
