"""Two processes under torchrun train as one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases.training import LanguageModel, loss, make_batches, make_config, make_sentences, read_csv
from safetensors.torch import load_file

from pynlp.training import Interrupted, Trainer, latest, process_group

ROOT = Path(__file__).parents[2]
SENTENCES = make_sentences(60)


def make_trainer(folder, seed=0, steps=16, **options):
    validation = make_batches(make_sentences(20, seed=1), max_tokens=20)
    config = make_config(steps, batches_per_step=4, ema_decay=0.8, validate_every=4, save_every=100, clip_norm=0.4)
    return Trainer(LanguageModel(seed=seed), loss, config, make_batches(SENTENCES), folder, validation=validation)


def train_in_two_processes(folder):
    """What each of them runs."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    make_trainer(folder / "two", seed=rank).train()  # the second one's weights are replaced by the first one's
    make_trainer(folder / "begun by one").train(resume=True)

    trainer, count = make_trainer(folder / "interrupted"), iter(range(1000))
    collate = trainer.training.collate

    def interrupting(items):
        if rank == 1 and next(count) == 9:
            os.kill(os.getpid(), signal.SIGINT)  # which the other does not see
        return collate(items)

    trainer.training.collate = interrupting
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted):
        trainer.train()
    assert 0 < trainer.progress.step < 16
    make_trainer(folder / "interrupted").train(resume=True)
    with pytest.raises(ValueError, match="batches_per_step: expected a multiple of the 2 processes, got 3"):
        Trainer(LanguageModel(), loss, make_config(batches_per_step=3), make_batches(SENTENCES), folder)


def test_two_processes_train_as_one(tmp_path):
    """Among the steps are some with one batch, for which the second process has none."""
    torch.set_num_threads(1)
    alone = make_trainer(tmp_path / "one")
    assert alone.train().epoch >= 2
    assert {len(alone.training.epoch(epoch)) % 4 for epoch in range(3)} == {1}
    make_trainer(tmp_path / "begun by one", steps=7).train()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = read_csv(tmp_path / "one")
    for name in ("two", "begun by one", "interrupted"):
        rows = read_csv(tmp_path / name)
        for column in ("step", "epoch", "tokens"):
            assert [row[column] for row in rows] == [row[column] for row in expected]
        for column in ("loss", "gradient_norm"):
            assert [float(row[column]) for row in rows] == pytest.approx([float(row[column]) for row in expected], 1e-5)
        assert float(rows[-1]["validation_loss"]) == pytest.approx(float(expected[-1]["validation_loss"]), rel=1e-5)
        for file in ("model.safetensors", "ema.safetensors"):
            theirs, ours = (load_file(latest(tmp_path / folder) / file) for folder in ("one", name))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # The first process alone says what is done: once for each of the four trainings.
    assert done.stdout.count("parameters to train on") == 4
    assert done.stdout.count("step 16: validation_loss") == 3
    assert done.stderr.count(" 0/16 ") == 2 and "Interrupted: all of it is saved in" in done.stderr


if __name__ == "__main__":
    with process_group() as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        train_in_two_processes(Path(sys.argv[1]))
