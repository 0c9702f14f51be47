"""The study and the preset, each run as a user runs it on a small slice of the real speeches."""

import csv
import re
import signal

import language_model
import pytest
import torch
from parts.speeches import (
    byte_pair_model,
    position_comparison,
)
from parts.speeches import language_model as speech_model
from parts.speeches.corpus import PRESIDENTS, load_speeches, load_study

from pynlp.training import latest

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The study's six files, with the beginnings of the real ones."""
    study, folder = load_study(), tmp_path_factory.mktemp("study")
    (folder / "train_LM.txt").write_text("\n".join(text[:6000] for text in study.training[::5]))
    for name, texts in study.tests.items():
        (folder / f"test_LM_{name}.txt").write_text(texts[0][:3000])
    for name, pairs in (("train", study.sentences[::20]), ("test", study.test_sentences[::15])):
        (folder / f"{name}_CLS.tsv").write_text("".join(f"{label}\t{sentence}\n" for label, sentence in pairs))
    return folder


def run(part, folder, output, *arguments):
    language_model.main(["--part", part, "--data-dir", str(folder), "--output", str(output), *map(str, arguments)])


def evaluations(output):
    with open(output / "evaluations.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def rows_of(report, first):
    """The cells of the table whose header begins with `first`."""
    lines = report[report.index(f"| {first}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kept_of(report, history, name, best):
    """The evaluation of the step that the report calls the result, which is the best of all."""
    step = int(re.search(r"The result: step (\d+)", report)[1])
    [kept] = [row for row in history if row["step"] == step]
    assert kept[name] == best(row[name] for row in history)
    return kept


@pytest.mark.slow
def test_part_one_learns_and_reports(folder, tmp_path, capsys):
    run("one", folder, tmp_path, "--steps", 150)
    report = (tmp_path / "results.md").read_text()
    assert report.strip() in capsys.readouterr().out
    history = evaluations(tmp_path)
    assert [row["step"] for row in history] == [100, 150]
    assert history[-1]["training"] > 0.6
    confusion = [list(map(int, row[1:4])) for row in rows_of(report, " " * len("George H. W. Bush"))]
    total = sum(map(sum, confusion))
    right = sum(confusion[i][i] for i in range(3))
    tested = (folder / "test_CLS.tsv").read_text().splitlines()
    assert [sum(row) for row in confusion] == [sum(line[0] == str(label) for line in tested) for label in range(3)]
    assert (
        right / total == pytest.approx(kept_of(report, history, "held out", max)["test"])
        and f"Test accuracy {right / total:.1%}" in report
    )
    images = sorted(path.name for path in tmp_path.glob("*.png"))
    assert images == [*(f"attention_map_{i}.png" for i in range(1, 5)), "confusion.png", "loss.png"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in images)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_part_two_learns_and_reports(folder, tmp_path, capsys):
    run("two", folder, tmp_path, "--steps", 120, "--prompt", "We zebras")
    said = capsys.readouterr().out
    assert "no training text and read as <unk>: ['zebras']" in said
    report, history = (tmp_path / "results.md").read_text(), evaluations(tmp_path)
    assert [row["step"] for row in history] == [50, 100, 120]
    tokenizer = speech_model.prepare(load_study(folder)).tokenizer
    assert history[-1]["training"] < tokenizer.get_vocab_size() / 4
    shown = rows_of(report, "perplexity at step")
    assert [float(cell) for cell in shown[-1]] == [
        pytest.approx(history[-1][name], abs=0.06) for name in ("step", "training", "held out", *PRESIDENTS)
    ]
    kept = kept_of(report, history, "held out", min)
    assert [cell for cell in rows_of(report, "perplexity ")[0][1:]] == [f"{v:.1f}" for v in list(kept.values())[1:]]
    sample = (tmp_path / "sample.txt").read_text()
    assert sample.startswith("We <unk> ")
    assert len(tokenizer.encode(sample.replace("<unk>", "unknown")).ids) == speech_model.BLOCK
    for name in ("perplexity.png", *(f"attention_map_{i}.png" for i in range(1, 5))):
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.slow
def test_part_three_compares_positions(folder, tmp_path, monkeypatch):
    run("three", folder, tmp_path, "--steps", 4)
    report = (tmp_path / "results.md").read_text()
    lengths = report.index("That of all tests together")
    seeds, longer = rows_of(report, "positions"), rows_of(report[lengths:], "positions")
    assert [row[0] for row in seeds] == [row[0] for row in longer] == list(position_comparison.POSITIONS)
    for row in (*seeds, *longer):
        beyond = row in longer and row[0] == "learned"  # its table ends there
        assert (row[2:] == ["n/a"] * 3) == beyond
        figures = row[1:2] if beyond else row[1:]
        assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for cell in figures)
    assert re.search(r"ALiBi (holds|does not hold): at 8 times", report)
    assert (tmp_path / "lengths.png").read_bytes().startswith(PNG)
    assert (tmp_path / "attention_map_4.png").exists()
    # All is there already: nothing is trained again, and the figures are the same.
    monkeypatch.setattr(speech_model, "next_token_loss", None)
    run("three", folder, tmp_path, "--steps", 4, "--resume")
    assert (tmp_path / "results.md").read_text() == report


@pytest.mark.slow
def test_the_preset_trains_on_the_past(tmp_path, monkeypatch):
    slice_of = {name: text[:3000] for name, text in load_speeches().items() if name[:4] >= "2004"}
    monkeypatch.setattr(byte_pair_model, "load_speeches", lambda: slice_of)
    monkeypatch.setattr(byte_pair_model, "BLOCK", 64)
    corpus, test_bytes = byte_pair_model.prepare(slice_of)
    past = [text for name, text in slice_of.items() if name[:4] <= "2008"]
    tokens = {name: sum(map(len, getattr(corpus, name))) for name in ("training", "held_out")}
    assert sum(tokens.values()) == sum(len(corpus.tokenizer.encode(text).ids) + 1 for text in past)
    assert 0.03 < tokens["held_out"] / tokens["training"] < 0.08 and len(corpus.tests["after 2008"]) == 14
    assert test_bytes == sum(len(text.encode()) for name, text in slice_of.items() if name[:4] > "2008")
    monkeypatch.setattr(byte_pair_model, "SAMPLED", 20)
    language_model.main(["--preset", "small", "--steps", "3", "--output", str(tmp_path), "--prompt", "The state of"])
    report = (tmp_path / "results.md").read_text()
    perplexity, bits = map(float, re.search(r"after 2008 is ([\d.]+), which is ([\d.]+) bits", report).groups())
    assert 1 < perplexity < corpus.tokenizer.get_vocab_size() * 1.2 and 1 < bits < 8
    assert (tmp_path / "sample.txt").read_text().startswith("The state of")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_and_pythons_ctrl_c")
def test_ctrl_c_saves_and_resuming_gives_the_same_to_the_bit(folder, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("two", folder, whole, "--steps", 8)
    loss, calls = speech_model.next_token_loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as context, pytest.raises(SystemExit) as stop:
        context.setattr(speech_model, "next_token_loss", interrupted)
        run("two", folder, parts, "--steps", 8)
    assert stop.value.code == 130 and len(calls) == 3
    assert "To go on: the same command with --resume" in capsys.readouterr().err
    run("two", folder, parts, "--steps", 8, "--resume")
    for name in ("evaluations.csv", "results.md", "sample.txt"):
        assert (parts / name).read_text() == (whole / name).read_text(), name
    weights = [(latest(path) / "model.safetensors").read_bytes() for path in (whole, parts)]
    assert weights[0] == weights[1]
    # Resumed again it has nothing to train, and samples from the prompt.
    run("two", folder, parts, "--steps", 8, "--resume", "--prompt", "Our country", "--top-k", 1)
    assert (parts / "sample.txt").read_text().startswith("Our country")


def test_ctrl_c_behind_the_training_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(speech_model, "report_model", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("two", folder, tmp_path, "--steps", 2)
    assert stop.value.code == 130 and latest(tmp_path).name == "step-00000002"
    assert f"what was trained is in {tmp_path}; go on with --resume" in capsys.readouterr().err


@pytest.mark.slow
def test_other_checkpoints_are_not_mixed_up(folder, tmp_path):
    with pytest.raises(SystemExit, match="--resume: expected a checkpoint in .*, got none"):
        run("one", folder, tmp_path, "--steps", 2, "--resume")
    with pytest.raises(SystemExit, match="--resume: expected a checkpoint in a folder of .*, got none"):
        run("three", folder, tmp_path, "--steps", 2, "--resume")
    run("two", folder, tmp_path, "--steps", 2)
    before = (latest(tmp_path) / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="--output: expected a folder without checkpoints, .*--resume"):
        run("two", folder, tmp_path, "--steps", 2)
    with pytest.raises(SystemExit, match="--resume: .*training.seed was 0 and is 1"):
        run("two", folder, tmp_path, "--steps", 2, "--resume", "--seed", 1)
    with pytest.raises(SystemExit, match="--resume: .*description.model"):
        run("one", folder, tmp_path, "--steps", 2, "--resume")
    with pytest.raises(SystemExit, match="--resume: .*description.vocabulary"):
        language_model.main(["--part", "two", "--output", str(tmp_path), "--steps", "2", "--resume"])
    assert (latest(tmp_path) / "model.safetensors").read_bytes() == before
    (tmp_path / "alibi-0" / "step-00000002").mkdir(parents=True)
    with pytest.raises(SystemExit, match="--output: expected folders without checkpoints, got .*alibi-0"):
        run("three", folder, tmp_path, "--steps", 2)


def test_bad_data_and_prompts_end_before_training(folder, tmp_path):
    with pytest.raises(
        SystemExit, match="--data-dir: .*none: expected the six files of the study, got none named train_LM"
    ):
        run("two", tmp_path / "none", tmp_path / "results")
    assert not (tmp_path / "results").exists()
    short = tmp_path / "short"
    short.mkdir()
    for path in folder.iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    (short / "train_LM.txt").write_text("Too short a text.")
    with pytest.raises(SystemExit, match="--data-dir: training text: expected 660 tokens or more, got 5"):
        run("three", short, tmp_path)
    (short / "train_LM.txt").write_bytes((folder / "train_LM.txt").read_bytes())
    (short / "test_LM_hbush.txt").write_text("One")
    with pytest.raises(SystemExit, match="--data-dir: test hbush text: expected 2 tokens or more, got 1"):
        run("two", short, tmp_path)
    with pytest.raises(SystemExit, match="--prompt: expected 1 to 31 tokens, got 0 of '  '"):
        run("two", folder, tmp_path, "--prompt", "  ")
    with pytest.raises(SystemExit, match="--prompt: expected 1 to 31 tokens, got 40 of"):
        run("two", folder, tmp_path, "--prompt", "war " * 40)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--output: expected a folder to write to, got .*file: File exists"):
        run("two", folder, tmp_path / "file")
    assert not list(tmp_path.glob("**/step-*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--part", "four"], "argument --part: invalid choice: 'four'"),
        (["--part", "one", "--preset", "small"], "argument --preset: not allowed with argument --part"),
        (
            ["--part", "one", "--prompt", "We"],
            "--prompt: expected an option of --part one, which takes --steps, --seed",
        ),
        (["--part", "two", "--window", "3"], "--window: expected an option of --part two"),
        (["--preset", "small", "--data-dir", "x"], "--data-dir: expected an option of --preset small"),
        (["--resume"], "--resume: expected an option of the comparison of implementations"),
        (["--part", "two", "--top-p", "1.5"], "--top-p: expected more than 0 and at most 1, got 1.5"),
        (["--part", "two", "--top-k", "0"], "--top-k: expected at least 1, got 0"),
        (["--part", "two", "--temperature", "0"], "--temperature: expected a finite number above 0, got 0"),
        (["--part", "two", "--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--part", "two", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--part", "two", "--temperature", "nan"], "--temperature: expected a finite number above 0, got nan"),
        (["--part", "two", "--top-p", "nan"], "--top-p: expected more than 0 and at most 1, got nan"),
        (["--speeches", "1"], "--speeches: expected at least 2, got 1"),
        (["--learning-rate", "-1"], "--learning-rate: expected a finite number above 0, got -1"),
        (["--learning-rate", "nan"], "--learning-rate: expected a finite number above 0, got nan"),
        (["--batch", "many"], "--batch: expected a whole number, got 'many'"),
    ],
)
def test_wrong_combinations_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        language_model.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
