"""A GPU that is not there: the launchers run up to the driver's door, and results are memory as it comes.

Kernels are compiled for sm_90 and everything but the driver's own work is real, Triton's C launcher and its TMA
descriptors included. Not in it: the driver's launch, torch.cuda's look-ups of device and stream, the caching allocator.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("standin.c")


def build(folder: Path) -> None:
    """Compile the stand-in for libcuda.so.1 into a folder."""
    from triton.backends.nvidia import driver

    include = Path(driver.__file__).parent / "include"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-w", "-I", str(include), str(SOURCE)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")], check=True)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="pynlp-standin-")


@functools.cache
def driver():
    """Triton's driver for NVIDIA over the stand-in, which stays in the process."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    if "TRITON_INTERPRET" in os.environ:
        raise RuntimeError("the stand-in needs compiled kernels: unset TRITON_INTERPRET")
    folder = Path(_folder().name)
    build(folder)
    triton.knobs.nvidia.libcuda_path = str(folder)

    class StandIn(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    return StandIn()


@contextmanager
def gpu() -> Iterator[None]:
    """Lets the Triton launchers serve CPU tensors, as if they lay on an H100; results are memory as it comes."""
    import triton
    from pynlp.kernels.common import launch

    from pynlp.ops.common import library, plans

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver())
    scratch = torch.library.Library("pynlp", "FRAGMENT")
    for name, op in library.OPS.items():
        if op.triton is not None:
            scratch.impl(name, library._gpu_kernel(name, op), "CPU", allow_override=True)
    chip, launch.chip_of_cpu = launch.chip_of_cpu, "sm_90"
    plans.triton_serves_cpu = True
    try:
        yield
    finally:
        plans.triton_serves_cpu = False
        launch.chip_of_cpu = chip
        scratch._destroy()
        triton.runtime.driver._active = before
