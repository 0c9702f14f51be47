"""Facts of an installation: versions, devices, and the back end that serves each op."""

import importlib
import platform

import torch

from pynlp import backends
from pynlp.ops.common.library import OPS
from pynlp.version import __version__


def info() -> dict:
    """Versions, devices, the instruction set in use, and for each op the back end that serves it and why.

    Example:
        >>> import pynlp
        >>> served_by = pynlp.info()["back ends"]["attention_forward"]
        >>> sorted(served_by)
        ['cpu', 'cuda']
    """
    return {
        "pynlp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": backends.triton_missing_reason() or importlib.import_module("triton").__version__,
        "devices": ["cpu", *(f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "isa": {
            "available": backends.available_isas(),
            "in use": backends.get_isa() or f"none: {backends.native_missing_reason()}",
        },
        "back ends": {name: {"cpu": _on_cpu(name), "cuda": _on_cuda(op.triton)} for name, op in sorted(OPS.items())},
    }


def _on_cpu(name: str) -> str:
    reason = backends.native_missing_reason()
    if reason is not None:
        return f"reference: {reason}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{name}", "CPU"):
        return "reference: no native kernel"
    return f"native ({backends.get_isa()})"


def _on_cuda(triton: str | None) -> str:
    if not torch.cuda.is_available():
        return "none: " + ("no GPU found" if torch.backends.cuda.is_built() else "torch is built without GPU support")
    if triton is None:
        return "reference: no Triton kernel"
    reason = backends.triton_missing_reason()
    return f"reference: {reason}" if reason else f"triton {importlib.import_module('triton').__version__}"
