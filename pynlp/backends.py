"""Which back ends are there, and why one is not."""

import importlib.util
import warnings
from functools import lru_cache


@lru_cache(maxsize=1)
def triton_missing_reason() -> str | None:
    """None if Triton can be imported, else why not."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
