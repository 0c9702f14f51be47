"""The names that pynlp shows, for the tests of their examples and of their pages."""

import importlib
import inspect

MODULES = [
    "pynlp", "pynlp.functional", "pynlp.nn", "pynlp.models", "pynlp.decoding", "pynlp.training",
    "pynlp.quantize", "pynlp.integrations.flash_attn", "pynlp.integrations.transformers",
]  # fmt: skip


def public(module: str) -> dict[str, object]:
    """The functions and classes that a module shows; itself under the empty name."""
    found = importlib.import_module(module)
    names = {name: getattr(found, name) for name in found.__all__}
    return {"": found} | {name: x for name, x in names.items() if inspect.isclass(x) or inspect.isfunction(x)}


WITHOUT = {"Mask"}  # which models are given, and nobody makes
NAMES = [(module, name) for module in MODULES for name in public(module) if name not in WITHOUT]
