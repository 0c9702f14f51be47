"""Builds the one native extension, `pynlp._C`, from everything under csrc/. The rest is in pyproject.toml.

PYNLP_BUILD_CPP=0 installs without a compiler; every op then runs on the PyTorch reference.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Not -ffast-math: infinities and NaN mean something here. And no -march: the ISA is chosen at run time.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # stable ABI of torch 2.11: the oldest that pyproject.toml allows
]


# The folders of kernels/ are packages of pynlp.kernels; kernels/ itself must be none, see pynlp/kernels/__init__.py.
FAMILIES = find_packages("kernels")


def extension():
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            f"pynlp: torch is needed to build the native extension ({error}): install it first, "
            "or set PYNLP_BUILD_CPP=0 to install without native kernels"
        ) from error
    csrc = Path("csrc")
    return CppExtension(
        "pynlp._C",
        sorted(map(str, csrc.rglob("*.cpp"))),
        depends=sorted(map(str, csrc.rglob("*.h"))),
        include_dirs=[str(csrc.resolve())],
        extra_compile_args={"cxx": COMPILE_FLAGS},
    )


def build_extension():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


commands = {}
extensions = []
if os.environ.get("PYNLP_BUILD_CPP", "1") != "0":
    extensions.append(extension())
    commands["build_ext"] = build_extension()

setup(
    packages=[*find_packages(include=["pynlp*"]), *(f"pynlp.kernels.{family}" for family in FAMILIES)],
    package_dir={f"pynlp.kernels.{family}": f"kernels/{family}" for family in FAMILIES},
    ext_modules=extensions,
    cmdclass=commands,
)
