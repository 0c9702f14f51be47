"""The examples, each run as a user runs it on a small piece of its data."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import language_model
import pytest
import torch
from parts.speeches import twin_models
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pynlp.models import Decoder, TransformerConfig

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ROOT / "examples" / "language_model.py"

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
SMALL = ["--context", "64", "--speeches", "6"]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, LANGUAGE_MODEL, *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_language_model_trains_and_writes_what_it_says(tmp_path):
    done = run(*SMALL, "--steps", 25, "--window", 16, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    ours, theirs = results["pynlp"], results["PyTorch"]
    assert len(ours["losses"]) == len(theirs["losses"]) == 25
    assert ours["losses"][-1] < ours["losses"][0] - 0.5
    assert results["largest_relative_difference"]["first_20_steps"] <= 1e-4
    assert ours["held_out_perplexity"] == pytest.approx(theirs["held_out_perplexity"], rel=1e-3)
    assert ours["tokens_per_second"] > 0
    for name in ("pynlp", "PyTorch"):
        row = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{results[name]['held_out_perplexity']:.2f}" in row

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sample.txt").read_text().startswith("Fellow citizens")
    assert not list(tmp_path.glob("*.part*"))
    # The checkpoint is the model the results are about.
    model = Decoder(TransformerConfig(**json.loads((tmp_path / "model.json").read_text())))
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("the United States of America and the people of the United States").ids])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()
    assert loss < math.log(tokenizer.get_vocab_size()) - 1


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "none"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_pytorch_twin_is_the_same_function(positions, window):
    torch.manual_seed(0)
    # Three heads: slopes that are no powers of two.
    config = TransformerConfig(50, embed_dim=36, layers=1, heads=3, positions=positions, window=window)
    model = Decoder(config)
    batch = torch.randint(50, (2, 40))
    expected = model(batch)
    model.blocks[0].attention.attention = twin_models.pytorch_attention
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_saves_the_model(tmp_path):
    command = [sys.executable, LANGUAGE_MODEL, *SMALL, "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        seen = ""
        while "PyTorch tokens/s" not in seen:  # the first step is done
            character = process.stderr.read(1)
            assert character, f"ended early: {seen}"
            seen += character
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted: the model after" in output
    model = Decoder(TransformerConfig(**json.loads((tmp_path / "model.json").read_text())))
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--window", "0"], "--window: expected at least 1, got 0"),
        (["--steps", "-3"], "--steps: expected at least 1, got -3"),
        (["--positions", "sinusoidal"], "--positions: invalid choice: 'sinusoidal'"),
    ],
)
def test_bad_flags_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        language_model.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
