"""The translation example on a small piece of its corpus: every sub-command, as a user calls it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import translation
from parts.translation import corpora, translator
from parts.translation.corpora import load_documents
from parts.translation.preparation import BEGIN, END, load_tokenizer
from parts.translation.stock_transformer import StockTransformer
from parts.translation.subword_sampling import VARIANTS, load_segmentations
from parts.translation.translator import Options, Translator, load_options, read_pairs
from safetensors.torch import load_file

from pynlp.training import Interrupted, latest
from pynlp.training.checkpoints import read_state
from pynlp.training.log import read_log

EXAMPLES = Path(__file__).parents[2] / "examples"

TINY = ["--dim", "32", "--layers", "1", "--heads", "2", "--vocabulary", "500", "--max-tokens", "1000"]


pytestmark = pytest.mark.usefixtures("one_thread_and_pythons_ctrl_c")


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """Short sentences of LibreOffice's help, which are soon translated, as `source TAB target` lines."""
    try:
        corpora.fetch("libreoffice", corpora.fetch_libreoffice)
    except SystemExit as error:
        pytest.skip(f"needs the Debian packages of LibreOffice: {error}")
    pairs = [pair for document in load_documents("libreoffice") if document.part is None for pair in document.pairs]
    path = tmp_path_factory.mktemp("corpus") / "help.tsv"
    translator.write_pairs(path, [pair for pair in pairs if max(map(len, pair)) < 80][:600])
    return path


@pytest.fixture(scope="module")
def trained(tsv, tmp_path_factory):
    """A folder with a model of a few steps; what it says means nothing."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    run("train", "--corpus", tsv, "--steps", 6, *TINY, folder=folder)
    return folder


def run(command, *words, folder):
    translation.main([command, "--output", str(folder), *map(str, words)])


@pytest.mark.slow
def test_overfits_a_hundred_pairs(tsv, tmp_path, capsys):
    sizes = ["--dim", 128, "--layers", 2, "--max-tokens", 2000, "--learning-rate", 3e-3]
    run("train", "--corpus", tsv, "--overfit", 100, "--steps", 180, *sizes, folder=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["BLEU"] > 90 and scores["sentences"] == len(read_pairs(tmp_path / "test.tsv")) == 100
    assert "nrefs:1|case:mixed" in scores["BLEU signature"]
    printed = capsys.readouterr().out
    assert f"BLEU {scores['BLEU']:.2f}" in printed and printed.count("reference:") == 5
    for name in ("loss.png", "cross_attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (source, reference), *_ = read_pairs(tmp_path / "test.tsv")
    run("translate", source, folder=tmp_path)
    assert capsys.readouterr().out == f"{reference}\n"


def test_no_held_out_pair_is_trained_on(trained):
    parts = [set(read_pairs(trained / f"{name}.tsv")) for name in ("train", "validation", "test")]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))


def test_segmentations_of_many_epochs_say_the_same_and_differ(tsv, trained, tmp_path, monkeypatch):
    assert not (trained / "target.safetensors").exists()
    monkeypatch.setattr(translation, "FEW_EPOCHS", 0)
    translation.prepare(tmp_path, Options(corpus=(str(tsv),), steps=1, vocabulary=500), torch.device("cpu"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    texts = [target for _, target in read_pairs(tmp_path / "train.tsv")]
    variants = load_segmentations(tmp_path / "target.safetensors")
    assert len(variants) == VARIANTS
    assert all(tokenizer.decode_batch(rows) == texts for rows in variants)
    assert variants[0] != variants[1]


def test_translates_an_argument_a_file_and_lines_as_they_come(trained, tmp_path, capsys):
    texts = ["Napsauta taulukkoa.", "", "Tiedosto on tallennettu. Ääkköset 語 eivät ole ennestään tuttuja."]
    expected = Translator.load(trained, "cpu").translate(texts, method="greedy")
    assert expected[1] == ""
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    run("translate", "--method", "greedy", "--file", tmp_path / "in.txt", folder=trained)
    assert capsys.readouterr().out.split("\n")[:3] == expected
    run("translate", "--method", "greedy", texts[0], folder=trained)
    assert capsys.readouterr().out == f"{expected[0]}\n"

    command = [sys.executable, EXAMPLES / "translation.py", "translate", "--method", "greedy", "--output", trained]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for text, output in zip(texts, expected, strict=True):  # each before the next is sent
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert process.stdout.readline().decode() == f"{output}\n"
        process.stdin.close()
        assert process.wait() == 0


def test_an_empty_file_has_no_translation_and_a_byte_order_mark_is_no_text(trained, tmp_path, capsys, monkeypatch):
    path, text = tmp_path / "in.txt", "Tiedosto on tallennettu."
    [expected] = Translator.load(trained, "cpu").translate([text], method="greedy")
    for content, lines in [
        (b"", []), (b"\xef\xbb\xbf", []), (b"\n", [""]), (f"\ufeff{text}\r\n".encode(), [expected]),
        (f"{text}\n\n".encode(), [expected, ""]),
    ]:  # fmt: skip
        path.write_bytes(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        for words in (["--file", path], []):
            run("translate", "--method", "greedy", *words, folder=trained)
            assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines), (content, words)


def test_ways_to_decode(trained):
    model = Translator.load(trained, "cpu")
    texts = [source for source, _ in read_pairs(trained / "test.tsv")[:5]]
    assert model.translate(texts, method="beam", beam_size=1) == model.translate(texts, method="greedy")
    assert model.translate(texts, method="top-k", top_k=1) == model.translate(texts, method="greedy")
    assert model.translate(texts, batch=2) == model.translate(texts)
    with pytest.raises(ValueError, match="method: expected one of greedy, beam, top-k, got 'best'"):
        model.translate(texts, method="best")


def test_long_texts_are_translated_in_pieces(trained, capsys):
    model = Translator.load(trained, "cpu")
    text = " ".join(source for source, _ in read_pairs(trained / "train.tsv")[:40])
    pieces = list(model.pieces(text))
    assert len(pieces) > 1 and max(map(len, pieces)) < translator.LONGEST // 2
    assert " ".join(model.tokenizer.decode(piece) for piece in pieces).split() == text.split()
    word = "ä" * 2000  # nowhere to cut between words
    assert sum(map(len, model.pieces(word))) == len(model.tokenizer.encode(word).ids)
    model.translate(["Tiedosto", text], method="greedy")
    assert f"text 2 has {sum(map(len, pieces))} tokens: translated in {len(pieces)} pieces" in capsys.readouterr().err


def test_cross_attention(trained):
    source, target, weights = Translator.load(trained, "cpu").cross_attention("Kaikki tiedostot", "All files")
    assert weights.shape == (len(target), len(source)) and source[-1] == target[-1] == "</s>"
    assert "".join(source[:-1]).strip().replace(" ", "") == "Kaikkitiedostot"
    torch.testing.assert_close(weights.sum(1), torch.ones(len(target)))


@pytest.mark.slow
def test_evaluate_and_compare(tsv, tmp_path, capsys):
    run("compare", "--corpus", tsv, "--steps", 2, *TINY, folder=tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["positions", "decoding", "BLEU", "chrF", "tokens/s"]
    expected = {(positions, way) for positions in translation.COMPARED for way in ("greedy", "beam 5", "top-k")}
    assert len(rows) == 12 and {(positions, way) for positions, way, *_ in rows} == expected
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [load_options(tmp_path / name).positions for name in translation.COMPARED] == list(translation.COMPARED)
    capsys.readouterr()
    run("evaluate", "--method", "greedy", folder=tmp_path / "alibi")
    [score] = [float(row[2]) for row in rows if row[:2] == ["alibi", "greedy"]]
    assert f"BLEU {score:.2f}  nrefs:1" in capsys.readouterr().out


def test_minutes_become_steps(tsv, tmp_path, capsys):
    run("train", "--corpus", tsv, "--minutes", 0.01, *TINY, folder=tmp_path)
    said = capsys.readouterr().out
    assert "s a step" in said and said.index("BLEU ") < said.index("reference:")
    assert load_options(tmp_path).steps == len((tmp_path / "log.csv").read_text().splitlines()) - 1 >= 20


def test_the_minutes_are_of_steps_and_validations(tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "seconds_per_step", lambda *arguments: 0.5)
    monkeypatch.setattr(translation, "seconds_per_validation", lambda *arguments: 20.0)
    parts = dict.fromkeys(("train", "validation"), [("kissa", "cat")])
    for minutes, steps in [(10, (600 - 6 * 20) / 0.5), (2.5, (150 - 6 * 20) / 0.5), (1, 20)]:
        options = Options(minutes=minutes)
        assert translation.planned_steps(options, Bytes(), parts, torch.device("cpu")) == steps


class Bytes:
    """A tokenizer of bytes."""

    def encode_batch(self, texts):
        return [Ids([*text.encode()]) for text in texts]


class Ids(NamedTuple):
    ids: list[int]


@pytest.mark.slow
@pytest.mark.parametrize("has_bf16", [True, False])
def test_trains_in_bf16_where_there_are_instructions_for_it(has_bf16, tsv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(translation, "has_bf16", lambda device: has_bf16)
    run("train", "--corpus", tsv, "--steps", 2, *TINY, folder=tmp_path)
    assert f"training in {'bf16' if has_bf16 else 'fp32'}" in capsys.readouterr().out
    assert load_options(tmp_path).bf16 == read_state(latest(tmp_path))["description"]["training"]["bf16"] == has_bf16
    monkeypatch.setattr(translation, "has_bf16", lambda device: not has_bf16)  # continued on another machine
    run("train", "--resume", folder=tmp_path)


def test_baseline(tsv, tmp_path):
    run("train", "--corpus", tsv, "--steps", 3, "--baseline", *TINY, folder=tmp_path)
    model = Translator.load(tmp_path, "cpu").model
    assert isinstance(model, StockTransformer) and (tmp_path / "scores.json").exists()
    assert not any("pynlp" in type(module).__module__ for module in model.modules())
    # Token by token, with rows that change places, what it says of the whole.
    source, lengths = torch.tensor([[5, 6, 7, END], [8, END, 0, 0]]), torch.tensor([4, 2])
    target = torch.tensor([[BEGIN, 9, 10, 11], [BEGIN, 12, 13, 14]])
    with torch.no_grad():
        logits = model.features(source, lengths, target) @ model.output_weight.T
    state = model.decoding_state(source, lengths, 10)
    torch.testing.assert_close(state.step(target[:, :2]), logits[:, 1])
    state.select(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(state.step(target[[1, 0, 1], 2:3]), logits[[1, 0, 1], 2])


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_resuming_changes_no_bit(tsv, tmp_path, capsys, monkeypatch):
    """Dropout, segmentations and the order of batches included."""
    monkeypatch.setattr(translation, "FEW_EPOCHS", 0)
    options = translator.Options(
        corpus=(str(tsv),), steps=9, dim=32, layers=1, heads=2, vocabulary=500, max_tokens=1000, dropout=0.3
    )
    translation.prepare(tmp_path / "whole", options, torch.device("cpu"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    run("train", "--resume", folder=tmp_path / "whole")  # also a training that never began

    batches = iter(range(100))
    plain = translation.collate

    def interrupting(*arguments):
        if next(batches) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(translation, "collate", interrupting)
    with pytest.raises(Interrupted):
        run("train", "--resume", folder=tmp_path / "parts")
    assert f"train --resume --output {tmp_path / 'parts'}" in capsys.readouterr().err
    done = len((tmp_path / "parts" / "log.csv").read_text().splitlines()) - 1
    assert 0 < done < 9
    run("train", "--resume", folder=tmp_path / "parts")
    whole, parts = (load_file(latest(tmp_path / name) / "model.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_under_torchrun(tsv, trained, tmp_path, capsys):
    """They take two batches a step, and one of them reports."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["train", "--output", tmp_path / "two", "--corpus", tsv, "--steps", 6, *TINY]
    command = [*launcher, EXAMPLES / "translation.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("reference:") == 5
    two, one = ([row["tokens"] for row in read_log(folder / "log.csv")] for folder in (tmp_path / "two", trained))
    assert len(two) == len(one) == 6 and sum(two) > 1.5 * sum(one)
    scores = json.loads((tmp_path / "two" / "scores.json").read_text())
    run("evaluate", folder=tmp_path / "two")
    assert f"BLEU {scores['BLEU']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "options.json: expected the options of a trained model, got.*No such file"),
        (["train", "--resume"], "options.json: expected the options of a trained model"),
        (["train", "--corpus", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_what_is_not_there(words, message, tmp_path):
    with pytest.raises(SystemExit, match=f"translation.py {words[0]}: .*{message}"):
        run(*words, folder=tmp_path / "empty")


def test_what_does_not_fit(tsv, trained, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--output: expected a folder without a model, or --resume, got"):
        run("train", "--corpus", tsv, folder=trained)
    with pytest.raises(SystemExit, match="--dim: expected 32, as .*options.json has it, got 64"):
        run("train", "--resume", "--dim", 64, folder=trained)
    with pytest.raises(SystemExit, match="text: expected a text or --file, got both"):
        run("translate", "text", "--file", tsv, folder=trained)
    other = shutil.copytree(trained, tmp_path / "other")
    options = json.loads((other / "options.json").read_text())
    (other / "options.json").write_text(json.dumps(options | {"layers": 2}))
    with pytest.raises(SystemExit, match="model: expected the one whose weights are in .*, got another"):
        run("translate", "Tiedosto", folder=other)
    (other / "options.json").write_text(json.dumps(options | {"colour": 2}))
    with pytest.raises(SystemExit, match="options.json: expected the options of a trained model, got: .*colour"):
        run("translate", "Tiedosto", folder=other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--minutes", "-1"], "--minutes: expected more than 0 and at most 1000000, got -1"),
        (["train", "--minutes", "nan"], "--minutes: expected more than 0"),
        (["train", "--minutes", "1e308"], "--minutes: expected more than 0"),
        (["train", "--minutes", "ten"], "--minutes: expected a number, got 'ten'"),
        (["train", "--minutes", "1", "--steps", "2"], "--steps: not allowed with argument --minutes"),
        (["compare", "--minutes", "1", "--steps", "2"], "--steps: not allowed with argument --minutes"),
        (["train", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["train", "--steps", "1.5"], "--steps: expected a whole number, got '1.5'"),
        (["train", "--learning-rate", "-1"], "--learning-rate: expected a finite number above 0, got -1"),
        (["train", "--learning-rate", "inf"], "--learning-rate: expected a finite number above 0, got inf"),
        (["train", "--dropout", "1"], "--dropout: expected at least 0 and less than 1, got 1"),
        (["train", "--dropout", "nan"], "--dropout: expected at least 0 and less than 1, got nan"),
        (["train", "--vocabulary", "258"], "--vocabulary: expected at least 259, got 258"),
        (["train", "--max-tokens", "3"], "--max-tokens: expected at least 4, got 3"),
        (["train", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["train", "--seed", str(2**64)], "--seed: expected at least 0 and at most"),
        (["train", "--overfit", "0"], "--overfit: expected at least 1, got 0"),
        *(
            (["compare", f"--{name}", "0"], f"--{name}: expected at least 1, got 0")
            for name in ("dim", "layers", "heads")
        ),
        (["translate", "--beam-size", "0"], "--beam-size: expected at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words, folder=tmp_path / "new")
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--dim", 32, "--heads", 7], "--heads: expected a divisor of --dim 32, got 7"),
        (["train", "--dim", 32, "--heads", 7, "--baseline"], "--heads: expected a divisor of --dim 32, got 7"),
        (
            ["train", "--dim", 36, "--heads", 4],
            "--dim: expected an even number a head with --positions rope, got 36 / 4",
        ),
        (
            ["train", "--dim", 33, "--heads", 3, "--positions", "sinusoidal"],
            "--dim: expected an even number with --pos",
        ),
        (["train", "--dim", 1024, "--heads", 2], "--heads: expected at least 4 with --dim 1024, got 2"),
        (["compare", "--dim", 36, "--heads", 4], "--dim: expected an even number a head with --positions rope"),
        (
            ["train", "--max-tokens", 4],
            "--max-tokens: expected at least [0-9]+, for the shortest pair of the train set",
        ),
        (["train", "--corpus", "."], r"--corpus: \.: expected a file to read, got: Is a directory"),
        (["train", "--corpus", "a", "b", "c"], "--corpus: expected libreoffice"),
        (["translate", "--file", "."], r"--file: expected a file to read, got \.: Is a directory"),
        (["translate", "--file", "nowhere"], "--file: expected a file to read, got nowhere: No such file"),
    ],
)
def test_what_makes_no_model_is_refused_before_anything_is_written(words, message, tsv, tmp_path):
    words = [*words, "--corpus", tsv] if words[0] != "translate" and "--corpus" not in words else words
    with pytest.raises(SystemExit, match=f"translation.py {words[0]}: {message}"):
        run(*words, folder=tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_is_not_installed(tsv, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--output: expected a folder to write to, got .*: File exists"):
        run("train", "--corpus", tsv, folder=tmp_path / "file")
    monkeypatch.setattr(translation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--tensorboard: expected its package to be installed, got none"):
        run("train", "--corpus", tsv, "--tensorboard", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_learning_rate_that_is_too_high_is_named(tsv, tmp_path):
    with pytest.raises(SystemExit, match="--learning-rate: expected a lower one: loss: expected a finite"):
        run("train", "--corpus", tsv, "--steps", 30, "--learning-rate", 1e30, *TINY, folder=tmp_path)


def test_the_help_is_whole_and_tells_each_default():
    parser = translation.parser()
    assert translation.__doc__.strip() in parser.format_help()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    defaults = flags_and_defaults(commands.choices["train"])
    for name in ("dim", "layers", "heads", "vocabulary", "max_tokens", "seed", "dropout", "learning_rate", "positions"):
        assert defaults[name] == str(getattr(Options(), name))
    assert "source TAB target" in commands.choices["train"].format_help()
    for command in commands.choices.values():
        flags_and_defaults(command)


def flags_and_defaults(parser):
    """The defaults that the help tells, by option; all options have help, and those that take a value a default."""
    found = {}
    for action in parser._actions:
        assert action.help, action.dest
        if action.nargs != 0:
            found[action.dest] = re.search(r"\(default: (.*)\)$", action.help)[1]
    return found


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_bytes_that_are_no_utf8(way, trained, tmp_path, monkeypatch):
    content = b"Tiedosto\nkahva" + b"\xe4\n"
    (tmp_path / "in.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    words = ["--file", tmp_path / "in.txt"] if way == "file" else []
    with pytest.raises(SystemExit, match="line 2: expected UTF-8, got byte 0xe4 at place 6"):
        run("translate", *words, "--method", "greedy", folder=trained)


def test_texts_too_long_to_train_on_are_left_out(tsv, tmp_path, capsys):
    run("train", "--corpus", tsv, "--minutes", 0.001, *TINY, "--max-tokens", 60, folder=tmp_path)
    said = re.findall(r"(\w+).tsv: (\d+) pairs of more than 29 tokens are left out", capsys.readouterr().out)
    tokenizer = load_tokenizer(tmp_path / translator.TOKENIZER)

    def too_long(pair):
        return max(len(tokenizer.encode(text).ids) for text in pair) > 29

    parts = ("train", "validation")
    assert said == [(part, str(sum(map(too_long, read_pairs(tmp_path / f"{part}.tsv"))))) for part in parts]


def test_batches_are_of_texts_that_are_short_enough():
    options = translator.Options(max_tokens=40)
    data = translation.batches([[[5] * 30, [5] * 4]], [[[6] * 3, [6] * 4]], options)
    assert len(data.lengths) == 1
    source, lengths, target, labels = data.collate([0])
    assert source.tolist() == [[5, 5, 5, 5, END]] and lengths.tolist() == [5]
    assert target.tolist() == [[BEGIN, 6, 6, 6, 6]] and labels.tolist() == [[6, 6, 6, 6, END]]
