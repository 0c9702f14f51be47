"""What a run leaves in its folder: files that are there whole or not at all, Markdown tables, values by step."""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def write(path: Path, save: Callable[[Path], object]) -> None:
    """All of the file or nothing of it."""
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")
    save(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    write(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown, columns aligned for the eye; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    rule = " | ".join("-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def quote(text: str) -> str:
    """A text of any number of lines as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


class History:
    """Values at some steps, in a CSV file that a resumed training goes on with; no step is in it twice.

    Attributes:
        rows: The values of each step by name.
    """

    def __init__(self, path: Path, *, resume: bool):
        self.path, self.rows = path, {}
        if resume and path.exists():
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            self.rows = {int(row.pop("step")): {name: float(value) for name, value in row.items()} for row in rows}

    def add(self, step: int, values: dict[str, float]) -> None:
        """What was known of this step or later ones is replaced."""
        self.rows = {earlier: row for earlier, row in self.rows.items() if earlier < step} | {step: values}
        lines = [["step", *values], *([number, *row.values()] for number, row in self.rows.items())]
        write_text(self.path, "\n".join(",".join(map(str, line)) for line in lines))
