"""Compiles Triton kernels for GPUs that are not here, through their launchers, and reads the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """Limits a launch on a chip must keep, and rates that bound a loop (a clock and SM or CU)."""

    target: GPUTarget
    shared_memory: int  # bytes a block may use
    registers: int  # 32-bit registers an SM holds, of an AMD CU vector registers of its four SIMDs
    warps: int  # resident at most
    tensor_flop: int  # dense 16-bit
    issue: int  # warp instructions
    special: int  # exp2 and its kind, threads


# 100 KB for sm_80: the same tiles run on sm_86, sm_89 and sm_120, which have no more.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 99 * 1024, 65536, 64, 2048, 4, 16),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 65536, 64, 4096, 4, 16),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 65536, 64, 8192, 4, 16),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 4 * 512 * 64, 32, 2048, 4, 16),
}


class _PretendDriver(DriverBase):
    """Answers the compiler's questions about the current device for a chip that is not here."""

    def __init__(self, chip: str):
        super().__init__()
        self.index = list(CHIPS).index(chip)
        self.target = CHIPS[chip].target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.index

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


@contextmanager
def compiled_launches(chip: str):
    """A list that gets (kernel name, launch arguments, compiled kernel) of every launch made inside; nothing is run."""
    launches = []
    run = JITFunction.run
    config = triton.runtime.driver

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append((self.__name__, names, kernel))

    previous = config._active
    config.set_active(_PretendDriver(chip))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        config._active = previous


@dataclass
class Instruction:
    address: int
    opcode: str
    text: str
    line: tuple[str, int] | None  # of the Python source
    target: int | None = None  # of a branch


@dataclass
class Loop:
    instructions: list[Instruction]
    lines: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.lines = Counter(i.line for i in self.instructions if i.line)

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)


@dataclass
class MachineCode:
    instructions: list[Instruction]
    registers: int
    stack: int  # bytes of spills and local arrays a thread
    shared: int

    def loops(self, containing: str) -> list[Loop]:
        """Innermost loops with an instruction that matches."""
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


def machine_code(kernel) -> MachineCode:
    if "cubin" in kernel.asm:
        return _nvidia(kernel)
    return _amd(kernel)


def _nvidia(kernel) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [BINARIES / "nvdisasm", "-g", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))
    instructions, labels, line, pending = [], {}, None, []
    for text in listing.splitlines():
        if match := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            line = (Path(match[1]).name, int(match[2]))
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
    return MachineCode(instructions, registers, stack, kernel.metadata.shared)


def _amd(kernel) -> MachineCode:
    listing = kernel.asm["amdgcn"]
    keys = ("vgpr_count", "private_segment_fixed_size")
    number = {key: int(re.search(rf"\.{key}:\s+(\d+)", listing)[1]) for key in keys}
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', listing))
    instructions, labels, line = [], {}, None
    for address, text in enumerate(listing.splitlines()):
        text = text.split(";")[0].strip()
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            line = (Path(files.get(match[1], "")).name, int(match[2]))
        elif match := re.match(r"(\.L\w+):", text):
            labels[match[1]] = address + 1
        elif match := re.match(r"([a-z]\w+)\s*(.*)", text):
            instructions.append(Instruction(address, match[1], text, line))
    addresses = [instruction.address for instruction in instructions]
    for instruction in instructions:
        if re.match(r"s_c?branch", instruction.opcode) and (label := labels.get(instruction.text.split()[-1])):
            instruction.target = next(a for a in addresses if a >= label)
    return MachineCode(instructions, number["vgpr_count"], number["private_segment_fixed_size"], kernel.metadata.shared)
