"""Checkpoints: whole or not there, whatever happens while one is written."""

import json
import multiprocessing
import os
import random
import resource
import time
from errno import EFBIG, ENOSPC

import pytest
import torch
from torch import nn

from pynlp.training import average_weights, best, checkpoints, latest, load_weights


class Tied(nn.Module):
    """An embedding that is the output projection as well."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7)
        self.output.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        self.calls += 1
        return self.output(self.embedding(tokens))


def trained(model, steps):
    """An optimizer that has done some steps on the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
    return optimizer


def state(best_step=None):
    return {"progress": {"best_step": best_step}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_model_optimizer_and_average_come_back_to_the_bit(tmp_path):
    model, average = Tied(), Tied()
    optimizer = trained(model, 3)
    path = checkpoints.save(tmp_path, 12, {**state(), "more": [1, 0.1]}, model, optimizer, average)
    assert path == tmp_path / "step-00000012" and names(tmp_path) == [path.name]
    assert checkpoints.read_state(path)["more"] == [1, 0.1]

    torch.manual_seed(1)
    model_2, average_2 = Tied(), Tied()
    optimizer_2 = torch.optim.AdamW(model_2.parameters(), lr=0.1)
    checkpoints.load(path, model_2, optimizer_2, average_2)
    assert model_2.output.weight is model_2.embedding.weight and model_2.calls == 3
    torch.testing.assert_close(model_2.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(average_2.state_dict(), average.state_dict(), rtol=0, atol=0)
    for done, done_2 in zip(optimizer.state.values(), optimizer_2.state.values(), strict=True):
        torch.testing.assert_close(done_2, done, rtol=0, atol=0)

    load_weights(path, model_2)  # what is wanted of a finished training
    torch.testing.assert_close(model_2.state_dict(), average.state_dict(), rtol=0, atol=0)


def test_the_average_of_checkpoints(tmp_path):
    paths, weights = [], []
    for step in range(1, 4):
        model = Tied()
        paths.append(checkpoints.save(tmp_path, step, state(), model, trained(model, step)))
        weights.append(model.embedding.weight.detach().clone())
    average_weights(paths[1:], model)
    torch.testing.assert_close(model.embedding.weight.detach(), (weights[1] + weights[2]) / 2)
    assert model.output.weight is model.embedding.weight and model.calls == 3
    with pytest.raises(ValueError, match="paths: expected at least one checkpoint, got none"):
        average_weights([], model)


def test_another_models_weights_are_refused_by_name(tmp_path):
    path = checkpoints.save(tmp_path, 1, state(), nn.Linear(3, 2), trained(Tied(), 1))
    with pytest.raises(ValueError, match="(?s)model: expected the one whose weights are in .*embedding.weight"):
        load_weights(path, Tied())
    with pytest.raises(ValueError, match="(?s)model: expected the one.*size mismatch for weight"):
        load_weights(path, nn.Linear(4, 2))


def test_the_last_and_the_best_are_kept(tmp_path):
    model = Tied()
    optimizer = trained(model, 1)
    for step in range(1, 8):
        checkpoints.save(tmp_path, step, state(best_step=2), model, optimizer)
        checkpoints.keep_only(tmp_path, step, 2, best_step=2 if step >= 2 else None)
    assert names(tmp_path) == ["step-00000002", "step-00000006", "step-00000007"]
    assert latest(tmp_path).name == "step-00000007" and best(tmp_path).name == "step-00000002"
    assert latest(tmp_path / "nowhere") is None and best(tmp_path / "nowhere") is None


def test_what_is_deleted_half_has_no_checkpoints_name(tmp_path, monkeypatch):
    model = Tied()
    optimizer = trained(model, 1)
    for step in (1, 2):
        checkpoints.save(tmp_path, step, state(), model, optimizer)

    def killed(path):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.keep_only(tmp_path, 2, 1, None)
    assert [path.name for path in checkpoints.all_checkpoints(tmp_path)] == ["step-00000002"]
    checkpoints.save(tmp_path, 3, state(), model, optimizer)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def damage_by_truncation(path):
    os.truncate(path / "optimizer.safetensors", 100)


def damage_by_loss(path):
    (path / "model.safetensors").unlink()


def damage_by_state(path):
    (path / "state.json").write_text('{"files": {')


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_loss, damage_by_state])
def test_a_damaged_checkpoint_is_left_out_and_replaced(tmp_path, damage):
    model = Tied()
    optimizer = trained(model, 1)
    for step in (5, 10):
        checkpoints.save(tmp_path, step, state(), model, optimizer)
    damage(tmp_path / "step-00000010")
    with pytest.warns(UserWarning, match="step-00000010: left out, for it is damaged"):
        assert latest(tmp_path).name == "step-00000005"

    # Training goes on from step 5: the damaged one must not count among the last.
    checkpoints.save(tmp_path, 7, state(), model, optimizer)
    checkpoints.keep_only(tmp_path, 7, 1, None)
    assert names(tmp_path) == ["step-00000007", "step-00000010"]
    checkpoints.save(tmp_path, 10, state(), model, optimizer)
    assert latest(tmp_path).name == "step-00000010" and names(tmp_path) == ["step-00000007", "step-00000010"]


@pytest.mark.parametrize("writer", ["save_model", "save_file"])
def test_a_full_disk_is_reported_and_harms_nothing(tmp_path, monkeypatch, writer):
    model = Tied()
    optimizer = trained(model, 1)
    first = checkpoints.save(tmp_path, 1, state(), model, optimizer)

    def full(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, writer, full)
    with pytest.raises(OSError, match="step-00000002 could not be written, earlier .* No space left") as error:
        checkpoints.save(tmp_path, 2, state(), model, optimizer)
    assert error.value.errno == ENOSPC
    assert names(tmp_path) == [first.name] and latest(tmp_path) == first
    load_weights(first, Tied())


def test_a_write_that_fails_within_safetensors_is_reported_too(tmp_path):
    small, large = Tied(), nn.Linear(200, 200)
    first = checkpoints.save(tmp_path, 1, state(), small, trained(small, 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"step-00000002 could not be written.*{EFBIG}"):
            checkpoints.save(tmp_path, 2, state(), large, torch.optim.AdamW(large.parameters()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [first.name] and latest(tmp_path) == first


def save_for_ever(folder, first):
    """Checkpoints whose weights all are their step, one after another, until killed."""
    torch.set_num_threads(1)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(first, 10**8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": parameter.clone()}
        checkpoints.save(folder, step, {**state(), "step": step}, model, optimizer, model)
        checkpoints.keep_only(folder, step, 2, None)


@pytest.mark.filterwarnings("error")
def test_kill_9_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pynlp.training", "pytest"])  # what takes long to import
    draw = random.Random(0)
    folder = tmp_path / "run"
    step, partly = 0, 0
    for _ in range(30):
        process = context.Process(target=save_for_ever, args=(folder, step + 1))
        process.start()
        while not checkpoints.path_of(folder, step + 1).exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        partly += any(path.name.endswith(".partial") for path in folder.iterdir())

        path = latest(folder)  # the newest: of a damaged one it would warn
        before, step = step, checkpoints.read_state(path)["step"]
        assert step > before and path == checkpoints.path_of(folder, step)
        model, average = nn.Linear(64, 64), nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoints.load(path, model, optimizer, average)
        for parameter in (*model.parameters(), *average.parameters()):
            assert (parameter == step).all()
        assert all((values["exp_avg"] == step).all() for values in optimizer.state.values())
        for there in checkpoints.all_checkpoints(folder):  # the older ones, too
            checkpoints.load(there, nn.Linear(64, 64), optimizer, nn.Linear(64, 64))
    assert partly > 5  # it was killed in the middle of writing or deleting
    checkpoints.save(folder, step + 1, state(), model, optimizer)
    assert not [name for name in names(folder) if name.endswith(".partial")]
    assert json.loads((path / "state.json").read_text())["step"] == step
