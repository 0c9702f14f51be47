"""State of the back ends: the native CPU code and its instruction set, Triton, and why one is missing."""

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import torch

# Each level with the CPU features that it adds; a CPU is on a level if it has one of them.
ISA_FEATURES = {
    "portable": (),
    "avx2": ("avx2", "avx_vnni"),
    "avx512": ("avx512",),
    "avx512_bf16_vnni": ("avx512_bf16", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
}

_native: ModuleType | None = None
_isa: str | None = None  # the level in use
_native_missing_reason: str | None = "pynlp._C was not loaded yet"


def load_native() -> None:
    """Load `pynlp._C`, which registers the CPU kernels; where that fails, `native_missing_reason` says why.

    Raises:
        ValueError: PYNLP_ISA in the environment is no level, or none of this CPU.
    """
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


def native() -> ModuleType:
    """`pynlp._C`; RuntimeError with the reason where it is missing."""
    if _native is None:
        raise RuntimeError(f"pynlp's native code is missing: {_native_missing_reason}")
    return _native


def native_missing_reason() -> str | None:
    """The reason why the native extension is not loaded; None if it is."""
    return _native_missing_reason


@cache
def triton_missing_reason() -> str | None:
    """The reason why Triton cannot be imported; None if it can."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "Triton is not installed"
    except ImportError as error:
        return f"Triton does not load: {error}"
    return None


@cache
def warn_once(message: str) -> None:
    """Warn with this message, in this process for the first and last time."""
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

    Example:
        >>> import torch
        >>> import pynlp
        >>> dtype = torch.bfloat16 if pynlp.has_bf16(torch.device("cpu")) else torch.float32
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _native is not None and _native.detected_features()["avx512_bf16"]


def get_isa() -> str | None:
    """The level of instruction sets that the native CPU kernels use; None without the extension.

    Example:
        >>> import pynlp
        >>> pynlp.get_isa() in (None, "portable", "avx2", "avx512", "avx512_bf16_vnni")
        True
    """
    return _isa


def set_isa(level: str) -> None:
    """Let the native CPU kernels use no instruction set above `level` from now on, in the whole process.

    Levels: portable, avx2, avx512, avx512_bf16_vnni. The environment variable PYNLP_ISA sets it at import.

    Raises:
        ValueError: no such level, or the CPU lacks it.
        RuntimeError: the native extension is missing.

    Example:
        >>> import pynlp
        >>> pynlp.set_isa("portable")
        >>> pynlp.get_isa()
        'portable'
    """
    if level not in ISA_FEATURES:
        raise ValueError(f"level: expected one of {', '.join(ISA_FEATURES)}, got {level!r}")
    native()
    _set_isa("level", level)


def _set_isa(source: str, level: str) -> None:
    global _isa
    available = available_isas()
    if level not in available:
        raise ValueError(f"{source}: expected a level of this CPU, {' or '.join(available)}, got {level!r}")
    _native.set_isa(_native.Isa.__members__[level])
    _isa = _native.isa().name
