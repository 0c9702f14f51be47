"""Triton's interpreter without what it does again and again to no effect: a third of its time, the same bits.

It patches triton.language at every call of a helper, though the launch around it already did; it computes whether
integers overflow, and asserts it only in debug mode, which is off; it builds a table of all dtypes to look one up.
"""

import dataclasses
import warnings
from types import SimpleNamespace

import triton
from triton import language as tl
from triton.runtime import interpreter

KNOWN = "3.7."  # the version of Triton that this was written for
OWN = SimpleNamespace(patch=interpreter._patch_lang, np_dtype=interpreter._get_np_dtype)
OPTIONS = interpreter.interpreter_builder.options


def hasten() -> None:
    """Changes the interpreter of this process; that of another version stays slow, and a warning says so."""
    if not triton.__version__.startswith(KNOWN) or OPTIONS.debug:
        warnings.warn(f"the interpreter of Triton {triton.__version__} stays slow: {KNOWN}x is known", stacklevel=2)
        return
    interpreter.interpreter_builder.options = dataclasses.replace(OPTIONS, sanitize_overflow=False)
    interpreter._patch_lang = once_a_launch(OWN.patch)
    interpreter._get_np_dtype = once_a_dtype(OWN.np_dtype)


def restore() -> None:
    """The interpreter is Triton's own again."""
    interpreter.interpreter_builder.options = OPTIONS
    interpreter._patch_lang, interpreter._get_np_dtype = OWN.patch, OWN.np_dtype


def once_a_launch(patch_lang):
    """patch_lang that patches both names by which helpers know the language at a launch, and then nothing."""
    both_names = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scopes = []

    def restore():
        while scopes:
            scopes.pop().restore()

    def patch(function):
        if not scopes:
            scopes.append(patch_lang(both_names))
            return SimpleNamespace(restore=restore)
        return SimpleNamespace(restore=lambda: None)

    return patch


def once_a_dtype(np_dtype_of):
    """np_dtype_of that remembers what it gave for a name; not all of Triton's dtypes can be hashed."""
    known = {}

    def np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = np_dtype_of(dtype)
        return known[dtype.name]

    return np_dtype
