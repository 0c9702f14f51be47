"""Which back ends are there, why one is not, and which instruction set the native CPU code uses."""

import importlib
import os
import platform
import warnings
from functools import cache
from types import ModuleType

import torch

from pynlp.ops.common.library import LIBRARY

# Each level with the CPU features that it adds; a CPU is on a level if it has one of them.
ISA_FEATURES = {
    "portable": (),
    "avx2": ("avx2", "avx_vnni"),
    "avx512": ("avx512",),
    "avx512_bf16_vnni": ("avx512_bf16", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
}

_native: ModuleType | None = None
_isa: str | None = None  # the level in use, as the native code has it
_native_missing_reason: str | None = "pynlp._C was not loaded yet"


def load_native() -> None:
    """Load `pynlp._C`, which registers the CPU kernels; without it the reference serves, and warns that it does."""
    global _native, _isa, _native_missing_reason
    level = os.environ.get("PYNLP_ISA")
    if level is not None and level not in ISA_FEATURES:
        raise ValueError(f"environment variable PYNLP_ISA: expected one of {', '.join(ISA_FEATURES)}, got {level!r}")
    try:
        _native = importlib.import_module("pynlp._C")
    except ModuleNotFoundError:
        _native_missing_reason = "extension not built (installed with PYNLP_BUILD_CPP=0, or run from a bare checkout)"
    except (ImportError, OSError, RuntimeError) as error:
        _native_missing_reason = f"extension does not load: {error}"
    else:
        _native_missing_reason = None
        _isa = _native.isa().name
        if level is not None:
            _set_isa("environment variable PYNLP_ISA", level)
        return
    for op in _op_names():
        LIBRARY.impl(op, _reference_with_warning(op), "CPU")


def native() -> ModuleType:
    """`pynlp._C`; RuntimeError with the reason where it is missing."""
    if _native is None:
        raise RuntimeError(f"pynlp's native code is missing: {_native_missing_reason}")
    return _native


def native_missing_reason() -> str | None:
    """None if the native extension is loaded, else why not."""
    return _native_missing_reason


@cache
def triton_missing_reason() -> str | None:
    """None if Triton can be imported, else why not."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "Triton is not installed"
    except ImportError as error:
        return f"Triton does not load: {error}"
    return None


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def available_isas() -> list[str]:
    """The levels that this CPU has and the extension can use, lowest first; empty without the extension."""
    if _native is None:
        return []
    found = _native.detected_features()
    return [level for level, features in ISA_FEATURES.items() if not features or any(found[f] for f in features)]


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bf16; without them these take far longer than fp32's.

    On CPUs PyTorch's own then take a hundred times as long, as on most before Intel's Sapphire Rapids and AMD's Zen 4.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _native is not None and _native.detected_features()["avx512_bf16"]


def get_isa() -> str | None:
    """The level of instruction sets that the native CPU kernels use; None without the extension."""
    return _isa


def set_isa(level: str) -> None:
    """Let the native CPU kernels use no instruction set above `level` from now on, in the whole process.

    Levels: portable, avx2, avx512, avx512_bf16_vnni. The environment variable PYNLP_ISA sets it at import.

    Raises:
        ValueError: no such level, or the CPU lacks it.
        RuntimeError: the native extension is missing.
    """
    if level not in ISA_FEATURES:
        raise ValueError(f"level: expected one of {', '.join(ISA_FEATURES)}, got {level!r}")
    native()
    _set_isa("level", level)


def info() -> dict:
    """Versions, devices, the instruction set in use, and for each op the back end that serves it and why."""
    return {
        "pynlp": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_missing_reason() or importlib.import_module("triton").__version__,
        "devices": ["cpu", *(f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "isa": {
            "available": available_isas(),
            "in use": get_isa() or f"none: {_native_missing_reason}",
        },
        "back ends": {op: {"cpu": _cpu_back_end(op), "cuda": _cuda_back_end()} for op in _op_names()},
    }


def _version() -> str:
    import pynlp

    return pynlp.__version__


def _set_isa(source: str, level: str) -> None:
    global _isa
    available = available_isas()
    if level not in available:
        raise ValueError(f"{source}: expected a level of this CPU, {' or '.join(available)}, got {level!r}")
    _native.set_isa(_native.Isa.__members__[level])
    _isa = _native.isa().name


def _op_names() -> list[str]:
    """The ops defined in the library, without the twins that always run the reference."""
    names = (
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pynlp::")
    )
    return sorted({name for name in names if not name.endswith("_reference")})


def _reference_with_warning(op: str):
    reference = getattr(torch.ops.pynlp, f"{op}_reference")

    def kernel(*arguments):
        if arguments[0].dtype != torch.float64:  # there the reference is the only back end
            warn_once(f"pynlp runs on the slow PyTorch reference on the CPU: {_native_missing_reason}")
        return reference(*arguments)

    return kernel


def _cpu_back_end(op: str) -> str:
    if _native is None:
        return f"reference: {_native_missing_reason}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{op}", "CPU"):
        return "reference: no native kernel"
    return f"native ({get_isa()})"


def _cuda_back_end() -> str:
    if not torch.cuda.is_available():
        return "none: " + ("no GPU found" if torch.backends.cuda.is_built() else "torch is built without GPU support")
    reason = triton_missing_reason()
    return f"reference: {reason}" if reason else f"triton {importlib.import_module('triton').__version__}"
