"""The parts the speeches' models are made of: perplexity, windows, pooling, attention maps, tables, values by step."""

import math

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from parts.common.attention_maps import check_weights, recorded_weights
from parts.common.figures import plain_logarithmic
from parts.common.reports import History, quote, table
from parts.speeches import classifier as speech_classifier
from parts.speeches import language_model as speech_model
from parts.speeches import position_comparison, training
from parts.speeches.classifier import SpeechClassifier, confusion, mean_of_tokens
from parts.speeches.language_model import Windows, make_model
from parts.speeches.perplexity import negative_log_likelihood, perplexity, windows
from parts.translation.figures import attention_map

from pynlp.models import Decoder, TransformerConfig
from pynlp.training import IGNORED, Batches


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def decoder(positions="rope", **options) -> Decoder:
    config = dict(embed_dim=16, layers=2, heads=2, ffn_dim=20, positions=positions, max_positions=64) | options
    model = Decoder(TransformerConfig(50, **config))
    with torch.no_grad():  # so that what a token sees matters
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 37])
@pytest.mark.parametrize("length, stride", [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_windows_have_every_target_once_behind_what_precedes_it(tokens, length, stride):
    document = torch.arange(100, 100 + tokens)
    inputs, targets = windows(document, length, stride)
    counted = targets != IGNORED
    assert targets[counted].tolist() == document[1:].tolist()
    assert (targets == inputs + 1)[counted].all() and (inputs[:, 1:] == inputs[:, :-1] + 1).all()
    # Each target behind the first window's is given at least length - stride others before the last one.
    given = counted.nonzero()[:, 1] + 1
    assert given.tolist()[:length] == list(range(1, min(length, tokens - 1) + 1))
    assert (given[length:] > length - stride).all()


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "sinusoidal"])
def test_perplexity_with_stride_1_is_the_exact_likelihood_of_each_token(positions):
    model, length = decoder(positions).double(), 8
    documents = [torch.randint(50, (n,)) for n in (29, 5, 1, 8)]
    exact = []
    with torch.no_grad():
        for document in documents:
            for i in range(1, len(document)):
                context = document[max(0, i - length) : i]
                exact.append(-model(context[None])[0, -1].log_softmax(-1)[document[i]].item())
    nats, count = negative_log_likelihood(model, documents, length, stride=1)
    assert count == len(exact) == 28 + 4 + 7
    assert nats == pytest.approx(sum(exact), rel=1e-9)
    assert perplexity(model, documents, length, stride=1) == pytest.approx(math.exp(sum(exact) / count), rel=1e-9)
    # The contexts matter, so a stride that were ignored would be seen.
    assert abs(perplexity(model, documents, length) / math.exp(sum(exact) / count) - 1) > 1e-3


def test_perplexity_does_not_depend_on_what_is_computed_at_once(monkeypatch):
    model, documents = decoder(), [torch.randint(50, (200,))]
    at_once = perplexity(model, documents, 8, 2)
    monkeypatch.setattr("parts.speeches.perplexity.TOKENS_AT_ONCE", 24)
    assert perplexity(model, documents, 8, 2) == pytest.approx(at_once, rel=1e-6)


def test_perplexity_is_without_dropout_and_leaves_the_mode():
    model, documents = decoder(dropout=0.5).train(), [torch.randint(50, (40,))]
    first = perplexity(model, documents, 8)
    assert model.training and perplexity(model, documents, 8) == first
    assert perplexity(model.eval(), documents, 8) == first and not model.training


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_skip_tokens_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride: expected 1 to length=8, got {stride}"):
        perplexity(decoder(), [torch.arange(20)], 8, stride)
    with pytest.raises(ValueError, match="documents: expected one with 2 tokens or more, got none"):
        perplexity(decoder(), [torch.arange(1)], 8)


def test_training_windows_stay_within_a_document():
    documents = [torch.arange(10), torch.arange(100, 104), torch.arange(200, 206)]
    collate = Windows(documents, 5)
    inputs, targets = collate(list(range(len(collate))))
    assert inputs[:, 0].tolist() == [0, 1, 2, 3, 4, 200]
    assert torch.equal(inputs + 1, targets) and (inputs[:, 1:] == inputs[:, :-1] + 1).all()
    assert Windows(documents, 5, apart=2).starts.tolist() == [0, 2, 4, 14]


@pytest.mark.parametrize("positions", position_comparison.POSITIONS)
def test_the_models_of_the_study_see_nothing_ahead(positions):
    model = make_model(60, positions, seed=3).eval()
    tokens = torch.randint(60, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 60
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-6)
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-4


@pytest.fixture
def classifier():
    config = TransformerConfig(40, 16, 2, 2, ffn_dim=20, positions="sinusoidal", max_positions=32)
    return SpeechClassifier(config).eval()


@torch.no_grad()
def test_padding_has_no_part_in_a_classification(classifier):
    tokens, lengths = torch.randint(2, 40, (3, 9)), torch.tensor([9, 4, 1])
    expected = classifier(tokens, lengths)
    changed = tokens.clone()
    changed[1, 4:], changed[2, 1:] = 7, 0
    torch.testing.assert_close(classifier(changed, lengths), expected)
    longer = torch.nn.functional.pad(tokens, (0, 6), value=5)
    torch.testing.assert_close(classifier(longer, lengths), expected)
    alone = torch.cat([classifier(row[None, :n], n[None]) for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(alone, expected)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 40
    assert (classifier(changed, lengths) - expected).abs().max() > 1e-4


def test_the_mean_is_of_tokens_alone():
    features = torch.tensor([[[1.0], [3.0], [float("nan")]], [[2.0], [4.0], [9.0]]])
    assert mean_of_tokens(features, torch.tensor([2, 3])).tolist() == [[2.0], [5.0]]


def test_confusion_counts_rows_by_truth(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "forward", lambda tokens, lengths: torch.eye(3)[tokens[:, 0] % 3])
    counts = confusion(classifier, [[0], [1], [4, 9], [2], [0]], [0, 0, 1, 2, 2])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", "learned"])
@torch.no_grad()
def test_recorded_weights_are_those_that_the_layers_used(positions):
    model, used = decoder(positions, layers=3), []
    tokens = torch.randint(50, (2, 11))
    with recorded_weights(model) as weights:
        expected = model.features(tokens)
    assert len(weights) == 3
    for layer in weights:
        check_weights(layer, causal=True)
    # The same weights times the values give the same features.
    recorded = iter(weights)

    def attend(q, k, v, **options):
        used.append(options["causal"])
        return torch.einsum("bhqk,bkhd->bqhd", next(recorded), v)

    for block in model.blocks:
        block.attention.attention = attend
    torch.testing.assert_close(model.features(tokens), expected, rtol=1e-4, atol=1e-4)
    assert used == [True] * 3 and len(weights) == 3  # nothing is recorded any more


def test_weights_that_are_off_are_refused():
    good = torch.tril(torch.ones(2, 1, 4, 4))
    good = good / good.sum(-1, keepdim=True)
    check_weights(good, causal=True)
    ahead = good.clone()
    ahead[1, 0, 1, :3] = 1 / 3
    check_weights(ahead, causal=False)
    with pytest.raises(ValueError, match="got token 1 on 2 in head 0 of row 1"):
        check_weights(ahead, causal=True)
    with pytest.raises(ValueError, match="add up to 1, got one that is off by 1.0e-01"):
        check_weights(good * 0.9, causal=True)
    with pytest.raises(ValueError, match="off by nan"):
        check_weights(good * float("nan"), causal=True)
    padded = torch.tensor([[[[1.0, 0, 0], [0.5, 0.2, 0.3], [0, 0, 1.0]]]])
    check_weights(padded, causal=False)
    with pytest.raises(ValueError, match="none on padding, got token 1 on 2 in head 0 of row 0"):
        check_weights(padded, causal=False, lengths=torch.tensor([2]))


def test_tables_are_markdown():
    assert table(["step", "train"], [[100, "5.25"], [1000, "5"]]) == (
        "| step | train |\n| ---- | ----: |\n| 100  |  5.25 |\n| 1000 |     5 |"
    )


def test_a_quotation_keeps_its_lines():
    assert quote("a\n\nb") == "> a\n>\n> b"


def test_history_goes_on_and_has_no_step_twice(tmp_path):
    path = tmp_path / "values.csv"
    history = History(path, resume=False)
    for step in (100, 200, 300):
        history.add(step, {"training": step / 7, "test": 1.0})
    resumed = History(path, resume=True)
    assert resumed.rows == history.rows
    resumed.add(200, {"training": 5.0, "test": 2.0})
    assert path.read_text() == f"step,training,test\n100,{100 / 7},1.0\n200,5.0,2.0\n"
    assert History(path, resume=False).rows == {}


def test_the_verdict_follows_the_figures():
    def found(*values):
        return [{position_comparison.times(f): v for f, v in zip((1, 2, 4, 8), values, strict=True)}]

    results = {
        "alibi": found(100, 99, 98, 104),
        "learned": found(100, None, None, None),
        "rope": found(50, 60, 70, 100),
    }
    said = position_comparison.verdict(results)
    assert "ALiBi holds: at 8 times the length its perplexity is 1.040 times" in said and "rope 2.00;" in said
    assert position_comparison.verdict(results | {"alibi": found(100, 99, 98, 106)}).startswith("ALiBi does not hold")
    learned = [found(value, None, None, None)[0] for value in (1.0, 2.0, 3.0)]
    row = position_comparison.compare({"learned": learned}, ["1x (32)", "8x (256)"]).splitlines()[-1]
    assert row.split() == "| learned | 2.0 ± 1.0 | n/a |".split()


def test_every_twentieth_piece_is_held_out_and_no_token_lost():
    documents = [torch.arange(0, 2000), torch.arange(2000, 2010), torch.arange(2010, 10000)]
    kept, held_out = speech_model.hold_out(documents, 8)
    assert torch.equal(torch.cat([*kept, *held_out]).sort().values, torch.arange(10000))
    assert [len(piece) for piece in held_out] == [80] * 6 and held_out[0].tolist() == list(range(1520, 1600))
    for piece in (*kept, *held_out):  # a document's, and as it stood there
        assert torch.equal(piece, torch.arange(piece[0], piece[0] + len(piece)))
    short, (piece,) = speech_model.hold_out([torch.arange(180)], 8)
    assert len(piece) == 9 and len(short) == 1
    with pytest.raises(ValueError, match="training text: expected 180 tokens or more, got 179"):
        speech_model.hold_out([torch.arange(179)], 8)


def test_every_tenth_sentence_of_each_president_is_held_out():
    pairs = [(label, f"{label} {number}") for number in range(25) for label in range(3)]
    kept, held_out = speech_classifier.hold_out(pairs)
    assert held_out == [(label, f"{label} {number}") for number in (9, 19) for label in range(3)]
    assert sorted(kept + held_out) == sorted(pairs)
    with pytest.raises(ValueError, match="training sentences: expected 10 or more of a president, got 9"):
        speech_classifier.hold_out(pairs[:27])


@pytest.mark.usefixtures("one_thread_and_pythons_ctrl_c")
def test_the_model_of_the_best_step_is_kept_and_told(tmp_path, capsys):
    model, seen = torch.nn.Linear(1, 1), []
    scores = iter([0.1, 0.9, 0.5])

    def evaluate(model):
        seen.append(model.weight.item())
        return {"training": 1.0 + len(seen), "held out": next(scores)}

    def loss(model, items):
        return model(torch.ones(len(items), 1)).sum(), len(items)

    batches, recipe = Batches([1] * 8, 4, lambda items: items), training.Recipe(6, 0, False, tmp_path)
    trained = training.train(
        model, loss, batches, recipe, evaluate=evaluate, score=lambda values: values["held out"],
        score_name="held-out accuracy", description={}, learning_rate=0.1, every=2,
    )  # fmt: skip
    assert trained.kept == 4 and list(trained.evaluations) == [2, 4, 6]
    assert len(set(seen)) == 3 and model.weight.item() == seen[1]
    assert "step 4: held-out accuracy 0.9 (best)" in capsys.readouterr().out


def test_ticks_of_a_logarithmic_axis_are_plain():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [90, 700])
    plain_logarithmic(axes.yaxis)
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels() if 90 <= label.get_position()[1] <= 700] == [
        "100", "200", "300", "500",
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [3, 500])
def test_a_map_of_a_long_translation_is_a_picture_one_can_look_at(tokens, tmp_path):
    words = [f"word{i}" for i in range(tokens)]
    attention_map(words[:10], words, torch.rand(tokens, min(10, tokens)), tmp_path / "map.png")
    assert matplotlib.image.imread(tmp_path / "map.png").shape[0] < 1800
