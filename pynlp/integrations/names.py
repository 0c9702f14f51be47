"""Errors of `pynlp.functional` in the names of the function that was called."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

from torch import Tensor

# What an annotation allows, and its name in a message.
KINDS = {
    Tensor: (Tensor, "a tensor"),
    float: (Real, "a number"),
    int: (Integral, "an int"),
    bool: (Integral, "a bool"),
    Sequence: ((Sequence, Tensor), "(left, right)"),
    NoneType: (NoneType, "None"),
}


def in_own_names(**names: str) -> Callable:
    """A decorator: errors of the function, and of what it calls, name its own arguments.

    An error of a call with an argument of a type that its annotation does not allow is about that.

    Args:
        names: An argument of what the function calls, and the function's own that it comes from; `rotary_cos` stands
            for "rotary cos", too.
    """
    # The longest first: "rotary cos" is another name than "rotary".
    words = (re.escape(name).replace("_", "[_ ]") for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"\b({'|'.join(words)})\b") if names else re.compile("(?!)")

    def own(found: re.Match) -> str:
        return names[found[0].replace(" ", "_")]

    def decorator(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                _refuse_other_types(function, args, kwargs)
                renamed = pattern.sub(own, str(error))
                if type(error) not in (ValueError, TypeError, NotImplementedError) or renamed == str(error):
                    raise
                raise type(error)(renamed) from None

        return call

    return decorator


def _refuse_other_types(function: Callable, args: tuple, kwargs: dict) -> None:
    """Raise TypeError for an argument of a type that its annotation does not allow, of those in KINDS."""
    parameters = inspect.signature(function).parameters
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # Python's own words name the argument
        return
    for name, value in given.items():
        annotation = parameters[name].annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        kinds = [get_origin(kind) or kind for kind in kinds]
        if not all(kind in KINDS for kind in kinds) or any(isinstance(value, KINDS[kind][0]) for kind in kinds):
            continue
        wanted = " or ".join(KINDS[kind][1] for kind in kinds)
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}") from None
