"""Corpora and models that are fetched once, into a cache."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def fetch(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache's folder of that name. `fill` gets a temporary one, so that the folder is there whole or not at all."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pynlp" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f"{name}.part") as temporary:
            filled = Path(temporary) / name
            filled.mkdir()
            fill(filled)
            try:
                filled.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder


def run(command: list[str], folder: Path, advice: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]}: expected this program to be installed, got none. {advice}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]
        raise SystemExit(f"{' '.join(command)}: failed with {reason!r}. {advice}") from None
