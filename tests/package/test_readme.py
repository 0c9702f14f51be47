"""Every command and code block of the README and of the page for newcomers runs; so do the commands of the figures."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pynlp import functional
from pynlp.ops.attention import checks, decode
from pynlp.ops.common.library import OPS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMING = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "benchmarks" / "FIGURES.md").read_text(encoding="utf-8")
TABLE = re.compile(r"^\| (`.*`) \| (.*) \| (.*) \| (.*) \| (yes|no) \| (yes|no) \| (?:(.*) )?\|$", re.MULTILINE)
OP_OF = {
    "attention": "attention_forward", "attention_varlen": "attention_forward", "layer_norm": "norm_forward",
    "rms_norm": "norm_forward", "gelu": "activation_forward", "relu": "activation_forward",
    "swiglu": "activation_forward", "int8_linear": "integer_linear", "int4_linear": "integer_linear",
    "int8_dynamic_linear": "dynamic_integer_linear", "quantize_int8": "quantize_integers",
    "quantize_int4": "quantize_integers", "dequantize_int8": "dequantize_integers",
    "dequantize_int4": "dequantize_integers", "moe_mlp": "moe_mlp_forward",
}  # fmt: skip


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def inline_commands() -> set[str]:
    return set(re.findall(r"`((?:make|python|pip|PYNLP_\w+=\S+) [^`]+)`", README + FIGURES))


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.mark.parametrize("code", blocks("python") + blocks("python", COMING))
def test_python_block(code, tmp_path, monkeypatch, capsys, one_thread_and_pythons_ctrl_c):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed == (blocks("text")[0] if "print(" in code else "")


def test_the_table_of_ops_is_true():
    rows = [(re.findall(r"`(\w+)`", names), *facts) for names, *facts in TABLE.findall(README)]
    tables = {"alibi_slopes", "relative_position_buckets", "rotary_tables", "QuantState4bit"}
    tables |= {"QuantStateInt4", "QuantStateInt8"}
    assert sorted(name for names, *_ in rows for name in names) == sorted(set(functional.__all__) - tables)
    for names, cpu, gpu, dtypes, backward, _, limits in rows:
        for name in names:
            op = OP_OF.get(name, name)
            native = torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{op}", "CPU")
            assert (cpu == "native") == native and (gpu == "Triton") == (OPS[op].triton is not None), name
            gradient = torch._C._dispatch_has_kernel_for_dispatch_key(f"pynlp::{op}", "Autograd")
            assert (backward == "yes") == (gradient or name == "linear"), name  # it leaves those to PyTorch
            if name.startswith("attention"):
                most = decode.MAX_HEAD_DIM if name == "attention_decode" else checks.MAX_HEAD_DIM
                assert f"head_dim up to {most}" in limits
            assert dtypes == ("as PyTorch's" if name == "linear" else "fp32, bf16, fp16")


def test_the_picture_of_figures_has_the_tables_rows(tmp_path):
    speedups = runpy.run_path(str(ROOT / "docs" / "speedups.py"))
    assert len(speedups["ROW"].findall(README)) == 7
    speedups["draw"](README, tmp_path / "speedups.png")
    assert (tmp_path / "speedups.png").stat().st_size > 10_000


def test_packages_of_the_extras():
    """What pynlp.training imports, and what the benchmarks of transformers' models import, an extra brings."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = re.findall(r"^(\w+) = (\[.*?\])(?: *#[^\n]*)?$", section, re.MULTILINE | re.DOTALL)
    extras = {name: ast.literal_eval(requirements) for name, requirements in found}
    assert {requirement.split(">")[0] for requirement in extras["training"]} == {"matplotlib", "safetensors", "tqdm"}
    assert extras["bench"] == ["bitsandbytes>=0.45", "pynlp-kernels[training,transformers]"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    wanted = {re.split(r"[>;\[]", requirement)[0] for extra in extras.values() for requirement in extra}
    assert wanted - {"pynlp-kernels", "tensorboard", *(name.split(">")[0] for name in extras["peers"])} <= pinned


def test_every_block_has_a_known_language():
    fences = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert fences[0::2] == [language for language in fences[0::2] if language in ("python", "sh", "text")]
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
    elif command == ". .venv/bin/activate":
        assert "-m venv .venv" in (ROOT / "Makefile").read_text()
    else:  # with a compiler: tests/package/test_build.py builds that wheel
        assert command == "pip install --no-build-isolation ."
