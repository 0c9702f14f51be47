"""The chips that kernels are compiled for: their limits and rates, and launches for them without a GPU."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import triton
from pynlp.kernels.common.launch import Launch, pretend
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.audit.machine_code import MachineCode, usage


@dataclass(frozen=True)
class Chip:
    """Limits that a launch on a chip must keep, and rates that bound a loop (a clock and SM or CU)."""

    target: GPUTarget
    shared_memory: int  # bytes a block may use
    registers: int  # 32-bit registers of an SM; vector registers of an AMD CU's four SIMDs
    warps: int  # resident at most
    tensor_flop: int  # dense 16-bit
    memory: float  # bytes from memory, by the data sheets of A100 80GB, H100 SXM, B200 and MI300X
    tensor_core: str  # the instruction of its tensor cores
    tensor_core_op: str  # a product in Triton's GPU dialect that becomes that instruction
    issue: int = 4  # warp instructions
    special: int = 16  # exp2 and its kind, threads


MMA = r"tt\.dot .*-> tensor<\S+ #mma\d*>"
# 99 KB for sm_80: the same tiles run on sm_86, sm_89 and sm_120, which have no more.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 99 * 1024, 65536, 64, 2048, 13.4, "HMMA", MMA),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 65536, 64, 4096, 14.5, "HGMMA", r"ttng\.warp_group_dot "),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 65536, 64, 8192, 29.0, r"UTC\w*MMA", r"ttng\.tc_gen5_mma "),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 4 * 512 * 64, 32, 2048, 8.3, "v_mfma", MMA),
}
HOPPER, AMPERE, CDNA = ("sm_90", "sm_100"), ("sm_80",), ("gfx942",)
ANY_PRODUCT = r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) "


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
def compiled_launches(chip: str) -> Iterator[list[Launch]]:
    """A list that gets every launch made inside, compiled for the chip; nothing is run."""
    config = triton.runtime.driver
    previous = config._active
    config.set_active(_PretendDriver(chip))
    try:
        with pretend(chip, lambda compiled: not excesses(chip, compiled)) as pretence:
            yield pretence.launches
    finally:
        config._active = previous


def tensor_memory(compiled) -> int:
    """Columns of tensor memory that a kernel uses."""
    return getattr(compiled.metadata, "tmem_size", 0) or 0


def excesses(chip: str, compiled) -> list[str]:
    """What a compiled kernel needs that the chip does not have."""
    _, stack = usage(compiled)
    found = [f"{stack} bytes of stack"] if stack else []
    if compiled.metadata.shared > CHIPS[chip].shared_memory:
        found.append(f"{compiled.metadata.shared} bytes of shared memory")
    if tensor_memory(compiled) > 512:
        found.append(f"{tensor_memory(compiled)} columns of tensor memory")
    return found


def occupancy(chip: str, code: MachineCode, warps: int, columns: int) -> int:
    """Warps that an SM (AMD: a CU) holds at once, of a kernel with so many columns of tensor memory."""
    limits = CHIPS[chip]
    if limits.target.backend == "hip":
        waves = min(8, 512 // max(1, code.registers)) * 4  # four SIMDs of 512 registers a lane
        return min(waves, limits.shared_memory // max(1, code.shared) * warps)
    blocks = min(
        limits.registers // (max(1, (code.registers + 7) // 8 * 8) * 32 * warps),
        limits.shared_memory // max(1, code.shared),
        limits.warps // warps,
        512 // columns if columns else limits.warps,
    )
    return blocks * warps


def multiplying_chip(chip: str, rows: int) -> str:
    """The chip whose instructions multiply so many rows: fewer than wgmma and tcgen05 take are for mma.sync."""
    return "sm_80" if chip in HOPPER and rows < 64 else chip


def missed_products(chip: str, compiled, rows: int) -> list[str]:
    """A complaint about products of so many rows that miss the chip's tensor cores."""
    products, limits = len(re.findall(ANY_PRODUCT, compiled.asm["ttgir"])), CHIPS[multiplying_chip(chip, rows)]
    missed = products - len(re.findall(limits.tensor_core_op, compiled.asm["ttgir"]))
    return [f"{missed} of {products} products miss {limits.tensor_core}"] if missed or not products else []
