"""Every command and code block of the README runs, and the commands of the page of figures."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "benchmarks" / "FIGURES.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def inline_commands() -> set[str]:
    return set(re.findall(r"`((?:make|python|pip|PYNLP_\w+=\S+) [^`]+)`", README + FIGURES))


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_block_has_a_known_language():
    fences = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert fences[0::2] == [language for language in fences[0::2] if language in ("python", "sh")]
    assert set(fences[1::2]) == {""}


def python(words, monkeypatch):
    """Runs a script or a module in this process, which has imported torch already, to its end without an error."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", words[words[0] == "-m" :])
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end


@pytest.mark.parametrize(
    "command", sorted({line for block in blocks("sh") for line in block.splitlines()} | inline_commands())
)
def test_command(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "make":  # what the targets run is tested on its own; here, that make knows them
        run = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout, run.stderr
    elif words[0] == "python":
        long = words[1].startswith("examples") or words[2].startswith("benchmarks")
        python([*words[1:], "--help"] if long else words[1:], monkeypatch)
        assert capsys.readouterr().out
    elif words[0].startswith("PYNLP_BUILD_CPP=0"):
        site = ["--no-deps", "--no-index", "--target", str(tmp_path)]
        environment = os.environ | dict([words[0].split("=")])
        run = subprocess.run([sys.executable, "-m", *words[1:], *site], cwd=ROOT, env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr
        assert (tmp_path / "pynlp" / "kernels" / "attention" / "launch.py").exists()
    else:  # with a compiler: tests/package/test_build.py builds that wheel
        assert command == "pip install --no-build-isolation ."
