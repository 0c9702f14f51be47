"""The Triton kernels; in a checkout they lie in the top-level folder `kernels/`, in a wheel here."""

from pathlib import Path

if not Path(__file__).with_name("common").exists():
    __path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
