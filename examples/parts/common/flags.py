"""The command line: what is no such number, or no folder to write to, is refused before anything is done."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

MOST_MINUTES = 1e6
MOST_SEED = 2**32 - 1


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser, described by a script's docstring. Options that are not given are not in its result."""
    usage, rest = doc.split("\n\n", 1)
    return argparse.ArgumentParser(
        description=usage,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number of at least `least` and, if so given, at most `most`; an argparse type."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least or most is not None and value > most:
            limit = "" if most is None or value < least else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"expected at least {least}{limit}, got {text}")
        return value

    return parse


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number(text)


def minutes(text: str) -> float:
    if not 0 < number(text) <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most {MOST_MINUTES:.0f}, got {text}")
    return number(text)


def probability(text: str) -> float:
    """A number above 0, at most 1."""
    if not 0 < number(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return number(text)


def share(text: str) -> float:
    """A number of at least 0, less than 1."""
    if not 0 <= number(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 0 and less than 1, got {text}")
    return number(text)


seed = integer(0, MOST_SEED)


def check_output(folder: Path) -> None:
    """Refuses a folder that cannot be written to, or not be made, and makes none.

    Raises:
        ValueError: the message names --output and says why.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = "File exists" if not there.is_dir() else "Permission denied" if not os.access(there, os.W_OK) else None
    if reason is not None:
        raise ValueError(f"--output: expected a folder to write to, got {folder}: {there}: {reason}")
