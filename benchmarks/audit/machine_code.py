"""Compiles Triton kernels for GPUs that are not here, through their launchers, and reads the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import triton
from pynlp.kernels.common import launch as choice
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
    """A list that gets (kernel name, launch arguments, compiled kernel) of every launch made inside; nothing is run.

    Launchers that look whether a kernel fits the device are told whether it fits the chip.
    """
    launches = []
    run = JITFunction.run
    config = triton.runtime.driver

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            names = dict(zip(self.arg_names, args, strict=False)) | kwargs
            launches.append((self.__name__, names, kernel))
        return kernel

    previous, fits = config._active, choice.fits
    config.set_active(_PretendDriver(chip))
    JITFunction.run = compile_only
    choice.fits = lambda kernel: not excesses(chip, kernel)
    try:
        yield launches
    finally:
        JITFunction.run = run
        choice.fits = fits
        config._active = previous


def excesses(chip: str, kernel) -> list[str]:
    """What a compiled kernel needs that the chip does not have."""
    _, stack = usage(kernel)
    shared, tensor_memory = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
    found = [f"{stack} bytes of stack"] if stack else []
    if shared > CHIPS[chip].shared_memory:
        found.append(f"{shared} bytes of shared memory")
    if tensor_memory > 512:
        found.append(f"{tensor_memory} columns of tensor memory")
    return found


def usage(kernel) -> tuple[int, int]:
    """Registers, and bytes of spills and local arrays a thread."""
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
    listing = _run_on_cubin(kernel, "nvdisasm", "-g", "-c")
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
    return MachineCode(instructions, *usage(kernel), kernel.metadata.shared)


def _amd(kernel) -> MachineCode:
    listing = kernel.asm["amdgcn"]
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
    return MachineCode(instructions, *usage(kernel), kernel.metadata.shared)
