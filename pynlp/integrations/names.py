"""Errors of `pynlp.functional` in the names of the function that was called."""

import functools
import inspect
import re
from collections.abc import Callable
from types import UnionType
from typing import Union, get_args, get_origin

from torch import Tensor


def in_own_names(**names: str) -> Callable:
    """A decorator: errors of the function, and of what it calls, name its own arguments.

    An error about an argument that is no tensor where one is meant says so, whatever it came to.

    Args:
        names: An argument of what the function calls, and the function's own that it comes from. `rotary cos`, which
            has a space, is written `rotary_cos`.
    """
    spelled = {re.escape(name).replace("_", "[_ ]"): own for name, own in names.items()}
    # The longest first: "rotary cos" is another name than "rotary". No part of a word, nor of a shape's "seqlen_q".
    pattern = re.compile("|".join(rf"\b{name}\b" for name in sorted(spelled, key=len, reverse=True)) or "(?!)")

    def own(match: re.Match) -> str:
        return names[match[0].replace(" ", "_")]

    def decorator(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
                _refuse_other_types(function, args, kwargs)
                text = str(error)
                renamed = pattern.sub(own, text)
                if renamed == text:
                    raise
                raise type(error)(renamed) from None

        return call

    return decorator


def _refuse_other_types(function: Callable, args: tuple, kwargs: dict) -> None:
    """Raise TypeError for an argument that is meant to be a tensor and is of another type."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # Python's own words name the argument
        return
    for name, value in given.items():
        kind = signature.parameters[name].annotation
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if Tensor not in kinds or isinstance(value, kinds):
            continue
        wanted = " or ".join({Tensor: "a tensor", type(None): "None"}.get(kind, kind.__name__) for kind in kinds)
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}") from None
