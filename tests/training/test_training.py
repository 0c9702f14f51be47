"""The trainer: its steps beside a plain loop, validation, the log and errors. See test_training_resume.py as well."""

import math
import sys
import types
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from cases.training import END, START, LanguageModel, loss, make_batches, make_config, make_sentences, read_csv
from matplotlib.figure import Figure

from pynlp.training import IGNORED, Trainer, WarmupCosine, best, latest, load_weights, teacher_forcing


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plain_training(model, sentences, batches, config):
    """What the trainer should do, the slow and obvious way: all items of a step in one batch, the mean of their loss.

    Yields of each step the loss, the gradient's norm, and the moving average of the weights after it.
    """
    decayed = torch.optim.AdamW(
        [p for p in model.parameters() if p.dim() > 1], betas=config.betas, weight_decay=config.weight_decay
    )
    others = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], betas=config.betas, weight_decay=0.0)
    averages = None
    step, epoch = 0, 0
    while True:
        order = batches.epoch(epoch)
        for start in range(0, len(order), config.batches_per_step):
            items = [item for batch in order[start : start + config.batches_per_step] for item in batch]
            inputs, targets, _ = teacher_forcing([sentences[item] for item in items], START, END, padding=0)
            mean = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            gradients = torch.autograd.grad(mean, list(model.parameters()))
            norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient * min(1.0, config.clip_norm / (norm + 1e-6))  # as torch has it
            for optimizer in (decayed, others):
                optimizer.param_groups[0]["lr"] = config.learning_rate * config.schedule(step)
                optimizer.step()
            now = [parameter.detach().clone() for parameter in model.parameters()]
            if averages is None:
                averages = now
            else:
                averages = [0.8 * old + 0.2 * new for old, new in zip(averages, now, strict=True)]
            step += 1
            yield mean.item(), norm, averages
        epoch += 1


def test_accumulated_batches_train_as_one_batch_does(tmp_path):
    """Clipping, decay of the matrices, schedule and moving average included; over several epochs, in fp64."""
    sentences = make_sentences(50)
    batches = make_batches(sentences)
    assert len(batches.epoch(0)) % 3  # so that the last step of an epoch has fewer
    config = make_config(batches_per_step=3, weight_decay=0.5, clip_norm=0.4, ema_decay=0.8)
    model, expected = LanguageModel(dtype=torch.float64), LanguageModel(dtype=torch.float64)
    trainer = Trainer(model, loss, config, batches, tmp_path)
    progress = trainer.train()
    rows = read_csv(tmp_path)
    assert progress.step == len(rows) == 30 and progress.epoch >= 2
    means, norms, averages = zip(*islice(plain_training(expected, sentences, batches, config), 30), strict=True)
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-9)
    assert [float(row["gradient_norm"]) for row in rows] == pytest.approx(norms, rel=1e-9)
    assert min(norms) < 0.4 < max(norms)  # some were clipped and some were not
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(list(trainer.ema.module.parameters()), averages[-1], rtol=1e-8, atol=1e-10)
    # Each epoch that is over has seen every token once.
    for epoch in range(progress.epoch):
        assert sum(int(row["tokens"]) for row in rows if int(row["epoch"]) == epoch) == sum(map(sum, batches.lengths))
    assert [float(row["learning_rate"]) for row in rows] == [0.02 * config.schedule(step) for step in range(30)]


def test_it_learns_and_writes_what_it_says(tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.write_bytes(b"plot")))
    sentences, held_out = make_sentences(200), make_sentences(50, seed=1)
    model = LanguageModel()
    config = make_config(100, schedule=WarmupCosine(10, 100), validate_every=20)
    validation = make_batches(held_out)
    progress = Trainer(model, loss, config, make_batches(sentences, 100), tmp_path, validation=validation).train()
    rows = read_csv(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 101))
    first, last = (sum(float(row["loss"]) for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert first > 2.2 and last < 1.5

    validated = {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}
    assert list(validated) == [20, 40, 60, 80, 100]
    # Of one sentence after another: a mean over tokens, in which padding does not count.
    inputs = [torch.tensor([[START, *sentence]]) for sentence in held_out]
    targets = torch.tensor([token for sentence in held_out for token in (*sentence, END)])
    with torch.no_grad():
        expected = F.cross_entropy(torch.cat([model(row)[0] for row in inputs]), targets).item()
    assert validated[100] == pytest.approx(expected, rel=1e-5)
    assert (progress.best, progress.best_step) == (min(validated.values()), min(validated, key=validated.get))

    printed = capsys.readouterr()
    efficiency = sum(map(sum, make_batches(sentences, 100).lengths)) / sum(
        len(batch) * max(len(sentences[item]) + 1 for item in batch) for batch in make_batches(sentences, 100).epoch(0)
    )
    assert f"429 parameters to train on 200 items, {efficiency:.0%} of whose batches' tokens" in printed.out
    assert f"step 100: validation_loss {validated[100]:.4g}" in printed.out
    assert (
        "100/100" in printed.err and "tokens/s=" in printed.err and f"loss={float(rows[-1]['loss']):.3f}" in printed.err
    )

    assert (tmp_path / "loss.png").read_bytes() == b"plot" and not list(tmp_path.glob("*part*"))
    trained, tested, best = figures[-1].axes[0].lines
    assert list(best.get_xdata()) == [progress.best_step] * 2
    assert list(trained.get_ydata()) == [float(row["loss"]) for row in rows]
    assert dict(zip(tested.get_xdata(), tested.get_ydata(), strict=True)) == validated


def test_the_plot_is_a_picture(tmp_path):
    batches = make_batches(make_sentences(20))
    Trainer(
        LanguageModel(), loss, make_config(3), batches, tmp_path, validation=batches, score=lambda model: 1.0
    ).train()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def scored(folder, scores, **changes):
    batches = make_batches(make_sentences(60))
    scores = iter(scores)
    config = make_config(validate_every=2, save_every=1000, keep_last=1, **changes)
    return Trainer(LanguageModel(), loss, config, batches, folder, score=lambda model: next(scores))


def test_patience_counts_validations_and_the_best_is_kept(tmp_path):
    trainer = scored(tmp_path, [0.1, 0.5, 0.4, 0.5, 0.3, 0.9], patience=3)
    progress = trainer.train()
    assert (progress.step, progress.best, progress.best_step) == (10, 0.5, 4)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000010"]
    assert best(tmp_path).name == "step-00000004"
    assert [row["score"] for row in read_csv(tmp_path) if row["score"]] == ["0.1", "0.5", "0.4", "0.5", "0.3"]
    assert scored(tmp_path, [], patience=3).train(resume=True).step == 10  # over is over
    assert scored(tmp_path, [0.9], patience=4, steps=12).train(resume=True).best_step == 12


def test_without_a_score_the_lowest_validation_loss_is_best(tmp_path):
    sentences = make_sentences(60)
    validation = make_batches([[5, 6]] * 4)  # which the sentences do not teach
    config = make_config(validate_every=1, keep_last=1, learning_rate=0.1)
    trainer = Trainer(LanguageModel(), loss, config, make_batches(sentences), tmp_path, validation=validation)
    progress = trainer.train()
    losses = [float(row["validation_loss"]) for row in read_csv(tmp_path)]
    assert progress.best == min(losses) and progress.best_step == 1 + losses.index(min(losses)) < 30
    model = LanguageModel(seed=1)
    load_weights(best(tmp_path), model)
    with torch.no_grad():
        total, tokens = loss(model, validation.collate([0, 1, 2, 3]))
    assert (total / tokens).item() == pytest.approx(min(losses), rel=1e-6)


def test_what_is_validated_is_the_moving_average_without_dropout(tmp_path):
    seen = []

    def score(model):
        seen.append((model.training, [parameter.clone() for parameter in model.parameters()]))
        return 1.0

    batches = make_batches(make_sentences(60))
    config = make_config(4, ema_decay=0.8)
    trainer = Trainer(LanguageModel(dropout=0.5), loss, config, batches, tmp_path, validation=batches, score=score)
    trainer.train()
    ((training, parameters),) = seen
    assert not training
    torch.testing.assert_close(parameters, list(trainer.ema.module.parameters()), rtol=0, atol=0)
    assert not torch.equal(parameters[0], trainer.model.embedding.weight)
    model = LanguageModel().eval()
    load_weights(latest(tmp_path), model)
    with torch.no_grad():
        sums = [sum(pair) for pair in zip(*(loss(model, batches.collate(b)) for b in batches.epoch(0)), strict=True)]
    assert float(read_csv(tmp_path)[-1]["validation_loss"]) == pytest.approx((sums[0] / sums[1]).item(), rel=1e-6)


def test_bf16_is_autocast(tmp_path):
    batches = make_batches(make_sentences(60))
    first = batches.collate(batches.epoch(0)[0])
    losses = {}
    for bf16 in (False, True):
        model = LanguageModel()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total, tokens = loss(model, first)
        folder = tmp_path / str(bf16)
        Trainer(model, loss, make_config(1, bf16=bf16), batches, folder).train()
        losses[bf16] = float(read_csv(folder)[0]["loss"])
        assert losses[bf16] == pytest.approx((total / tokens).item(), rel=1e-7)
        assert model.output.weight.dtype == torch.float32
    assert 0 < abs(losses[True] - losses[False]) < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, bad):
    def broken(model, batch):
        total, tokens = loss(model, batch)
        return total * (bad if next(count) == 2 else 1), tokens

    count = iter(range(100))
    model = LanguageModel()
    trainer = Trainer(model, broken, make_config(save_every=1), make_batches(make_sentences(60)), tmp_path)
    with pytest.raises(FloatingPointError, match=f"loss: expected a finite sum .*got {bad} over .* in step 3"):
        trainer.train()
    saved = LanguageModel(seed=1)
    load_weights(latest(tmp_path), saved)
    assert latest(tmp_path).name == "step-00000002"
    torch.testing.assert_close(model.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    def broken(model, batch):
        total, tokens = loss(model, batch)
        zero = (model.output.bias * 0).sum()
        return total + zero.sqrt(), tokens  # 0, whose slope is infinite

    model = LanguageModel()
    with pytest.raises(FloatingPointError, match="loss: expected a finite gradient, got nan in step 1"):
        Trainer(model, broken, make_config(), make_batches(make_sentences(60)), tmp_path).train()
    torch.testing.assert_close(model.state_dict(), LanguageModel().state_dict(), rtol=0, atol=0)


def test_a_loss_of_another_kind_is_named(tmp_path):
    batches = make_batches(make_sentences(60))
    with pytest.raises(TypeError, match="loss: expected to return a sum and a number, got Tensor"):
        Trainer(LanguageModel(), lambda model, batch: loss(model, batch)[0], make_config(), batches, tmp_path).train()


@pytest.mark.parametrize("name", ["steps", "batches_per_step", "validate_every", "save_every", "keep_last", "patience"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        make_config(**{name: 0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
        ({"clip_norm": math.nan}, "clip_norm: expected more than 0, got nan"),
        ({"ema_decay": 1.0}, "ema_decay: expected more than 0 and less than 1, or None, got 1.0"),
    ],
)
def test_rates_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_what_cannot_be_trained_is_named(tmp_path):
    batches = make_batches(make_sentences(9))
    with pytest.raises(ValueError, match="patience: expected validation batches or a score to count by, got neither"):
        Trainer(LanguageModel(), loss, make_config(patience=3), batches, tmp_path)
    with pytest.raises(ValueError, match="model: expected parameters that require gradients, got none"):
        Trainer(LanguageModel().requires_grad_(False), loss, make_config(), batches, tmp_path)


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(LanguageModel(), loss, make_config(), make_batches(make_sentences(9)), tmp_path, tensorboard=True)
    with pytest.raises(ImportError, match="tensorboard: expected it to be installed: .* -m pip install tensorboard"):
        trainer.train()


def test_tensorboard_is_given_what_the_log_has(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "tensorboard" and purge_step == 1

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    batches = make_batches(make_sentences(9))
    Trainer(LanguageModel(), loss, make_config(2), batches, tmp_path, validation=batches, tensorboard=True).train()
    assert written.pop() == "closed"
    for row in read_csv(tmp_path):
        for name, value in row.items():
            if value and name != "step":
                assert (int(row["step"]), name, float(value)) in written
    assert len(written) == 2 * 6 + 1
