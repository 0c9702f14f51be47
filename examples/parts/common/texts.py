"""Reading text files."""

from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; ValueError names the file, and the line that is not UTF-8."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # splitlines() would see ends in the midst of text
    except OSError as error:
        raise ValueError(f"{path}: expected a file to read, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: expected UTF-8, got byte {error.object[error.start]:#x}") from None
    return lines if lines[-1] else lines[:-1]
