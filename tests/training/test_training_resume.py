"""Training that is interrupted, killed or given more steps goes on as if nothing had happened, to the bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.training import VOCABULARY, LanguageModel, loss, make_batches, make_config, make_sentences, read_csv
from torch import nn

from pynlp.training import Interrupted, Trainer, WarmupInverseSquareRoot, latest

ROOT = Path(__file__).parents[2]
RESUMED = dict(batches_per_step=2, ema_decay=0.9, save_every=7, validate_every=5, keep_last=2)


pytestmark = pytest.mark.usefixtures("one_thread_and_pythons_ctrl_c")


def resumable(folder, collate=None, **changes):
    """A trainer with all that has a state: dropout, accumulation, a moving average, a score that draws numbers."""
    batches = make_batches(make_sentences(60))
    batches.collate = collate or batches.collate
    config = make_config(**{**RESUMED, **changes})
    validation = make_batches(make_sentences(20, seed=1))

    def score(model):
        return random.random() + torch.rand(()).item()

    return Trainer(LanguageModel(dropout=0.3), loss, config, batches, folder, validation=validation, score=score)


def interrupting(sentences, at_batch):
    """A collate that is where Ctrl-C comes, in the batch of that number."""
    plain, count = make_batches(sentences).collate, iter(range(10**6))

    def collate(items):
        if next(count) == at_batch:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(items)

    return collate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trainer after all its steps without an interruption."""
    torch.set_num_threads(1)
    trainer = resumable(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("at_batch", [0, 22, 37])
def test_ctrl_c_saves_and_resuming_changes_no_bit(tmp_path, capsys, whole, at_batch):
    """In the first step, and in the middle of epochs of nine batches."""
    assert len(whole.training.epoch(0)) == 9

    with pytest.raises(Interrupted) as error:
        resumable(tmp_path, interrupting(make_sentences(60), at_batch)).train()
    assert error.value.code == 130 and error.value.checkpoint == latest(tmp_path)
    assert 0 < len(read_csv(tmp_path)) < 30
    assert f"Interrupted: all of it is saved in {error.value.checkpoint}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    random.seed(77)
    torch.manual_seed(77)  # of no avail
    parts = resumable(tmp_path)
    assert parts.train(resume=True) == whole.progress
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(parts.ema.state_dict(), whole.ema.state_dict(), rtol=0, atol=0)
    logs = [[{**row, "seconds": None} for row in read_csv(folder)] for folder in (whole.folder, tmp_path)]
    assert logs[0] == logs[1] and len(logs[0]) == 30


def test_a_kill_between_checkpoints_loses_only_the_steps_behind_the_last(tmp_path, whole):
    def power_cut(items):
        if next(count) == 42:
            raise RuntimeError("power cut")  # nothing is saved on it, as on a kill
        return plain(items)

    plain, count = make_batches(make_sentences(60)).collate, iter(range(10**6))
    with pytest.raises(RuntimeError, match="power cut"):
        resumable(tmp_path, power_cut).train()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("99,7,1.2")  # a line that was not finished
    assert len(read_csv(tmp_path)) > int(latest(tmp_path).name.removeprefix("step-"))
    parts = resumable(tmp_path)
    parts.train(resume=True)
    assert [row["loss"] for row in read_csv(tmp_path)] == [row["loss"] for row in read_csv(whole.folder)]
    assert [int(row["step"]) for row in read_csv(tmp_path)] == list(range(1, 31))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def collate(items):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(items)

    plain = make_batches(make_sentences(60)).collate
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, collate).train()
    assert read_csv(tmp_path) == [] and latest(tmp_path) is None


def test_a_script_that_is_interrupted_ends_with_130(tmp_path):
    script = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(Path(__file__).parent)!r}]
from test_training_resume import interrupting, make_sentences, resumable
resumable(Path({str(tmp_path)!r}), interrupting(make_sentences(60), 3)).train()
print("goes on")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, done.stderr
    assert "Interrupted: all of it is saved in" in done.stderr
    assert "goes on" not in done.stdout and "Traceback" not in done.stderr


def test_more_steps_may_be_asked_for_later(tmp_path, whole):
    resumable(tmp_path, steps=12).train()
    assert resumable(tmp_path).train(resume=True).step == 30
    assert [row["loss"] for row in read_csv(tmp_path)] == [row["loss"] for row in read_csv(whole.folder)]


def test_validation_leaves_no_trace_in_training(tmp_path, whole):
    never = resumable(tmp_path, validate_every=1000)
    never.train()
    torch.testing.assert_close(never.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_the_seed_decides_what_is_dropped(tmp_path, whole):
    losses = []
    for seed in (0, 1):
        torch.manual_seed(5)  # of no avail
        resumable(tmp_path / str(seed), seed=seed, steps=3).train()
        losses.append([row["loss"] for row in read_csv(tmp_path / str(seed))])
    expected = [row["loss"] for row in read_csv(whole.folder)[:3]]
    assert losses[0] == expected and not set(losses[1]) & set(expected)


def test_another_configuration_is_refused_by_name(tmp_path):
    resumable(tmp_path, steps=3).train()
    with pytest.raises(ValueError) as error:
        resumable(tmp_path, learning_rate=0.5, ema_decay=None, keep_last=1).train(resume=True)
    assert "training.ema_decay was 0.9 and is None; training.learning_rate was 0.02 and is 0.5" in str(error.value)
    assert "keep_last" not in str(error.value)
    with pytest.raises(
        ValueError, match="training.schedule.floor was 0.1 and is None.*'WarmupCosine' and is 'WarmupInv"
    ):
        resumable(tmp_path, schedule=WarmupInverseSquareRoot(5)).train(resume=True)

    config = make_config(3, **RESUMED)
    other = make_batches(make_sentences(61))
    with pytest.raises(
        ValueError, match="data.items was 60 and is 61; data.lengths was .*; description.heads was None"
    ):
        Trainer(LanguageModel(), loss, config, other, tmp_path, description={"heads": 2}).train(resume=True)
    wider = LanguageModel()
    wider.output = nn.Linear(16, VOCABULARY + 1)
    with pytest.raises(ValueError, match="(?s)model: expected the one whose weights are in.*output.weight"):
        Trainer(wider, loss, config, make_batches(make_sentences(60)), tmp_path).train(resume=True)


def test_nothing_is_overwritten_and_nothing_resumed_from_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: expected a checkpoint in .*, got none"):
        resumable(tmp_path).train(resume=True)
    resumable(tmp_path, steps=2).train()
    before = read_csv(tmp_path)
    with pytest.raises(
        FileExistsError, match="folder: expected one without checkpoints, or resume=True, got .*step-00"
    ):
        resumable(tmp_path, steps=2).train()
    assert read_csv(tmp_path) == before
