"""Errors for arguments that other libraries have and ours do not: they say what to write instead."""

import functools
import inspect
from collections.abc import Callable


def hint(**instead: str) -> Callable:
    """Makes a call with a foreign argument fail with a TypeError that says what to write instead.

    Args:
        instead: By the foreign name; by `more`, of arguments by position beyond those that there are.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            try:
                return function(*arguments, **options)
            except TypeError as error:
                message = _hint(function, instead, arguments, options)
                if message is None:
                    raise
                raise TypeError(message) from error

        return call

    return decorate


def _hint(function: Callable, instead: dict[str, str], arguments: tuple, options: dict) -> str | None:
    """The message for a call that the function's signature does not allow; None if there is none to give."""
    signature = inspect.signature(function)
    places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = function.__qualname__.removesuffix(".forward")
    if len(arguments) > len(places):
        taken = ", ".join(p.name for p in places if p.name != "self")
        return f"{name}: expected no argument by position but {taken}; {instead['more']}" if "more" in instead else None
    for foreign in options:
        if foreign not in signature.parameters and foreign in instead:
            return f"{foreign}: {name} has no such argument; {instead[foreign]}"
    return None
