"""Part one of the study: whose sentence is it? A transformer encoder, the mean of its features, and two layers."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from parts.common.attention_maps import save_attention_maps
from parts.common.reports import table, write, write_text
from parts.speeches.corpus import PRESIDENTS, Labelled, Study
from parts.speeches.training import Recipe, Trained, train
from parts.speeches.vocabularies import PAD, digest, train_words
from tokenizers import Tokenizer
from torch import Tensor, nn

from pynlp.models import Encoder, TransformerConfig
from pynlp.training import Batches, pad

BLOCK, BATCH = 32, 16  # tokens of a sentence at most, sentences of a batch
LEARNING_RATE = 1e-3
NTH = 10  # every so many sentences of a president one is held out of training
HELD_OUT = "held out"


class Corpus(NamedTuple):
    """Sentences as ids and their labels, of training, held out of it, and test; one to look at; where they are from."""

    tokenizer: Tokenizer
    sentences: dict[str, tuple[list[list[int]], list[int]]]
    sentence: str
    source: str


class SpeechClassifier(nn.Module):
    """Logits `(B, classes)` of token ids `(B, S)`, of which each row has `lengths` `(B,)` and then padding.

    Padding has no part in the mean, and what it is does not matter.
    """

    def __init__(self, config: TransformerConfig, hidden: int = 100, classes: int = len(PRESIDENTS)):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.classifier = nn.Sequential(nn.Linear(config.embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.classifier(mean_of_tokens(self.encoder(tokens, lengths), lengths))

    def features(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens)


def mean_of_tokens(features: Tensor, lengths: Tensor) -> Tensor:
    """The mean `(B, E)` of the first `lengths` `(B,)` features of `(B, S, E)`; 0 where there are none."""
    padding = torch.arange(features.shape[1]) >= lengths[:, None]  # (B, S)
    return features.masked_fill(padding[..., None], 0).sum(1) / lengths.clamp_min(1)[:, None]


def encode_sentences(tokenizer: Tokenizer, pairs: list[Labelled], name: str) -> tuple[list[list[int]], list[int]]:
    """Ids and labels; a sentence that is longer than the model is cut, and one without a word left out."""
    sentences = [tokenizer.encode(sentence).ids for _, sentence in pairs]
    longer, wordless = sum(len(ids) > BLOCK for ids in sentences), sum(not ids for ids in sentences)
    if longer:
        print(f"{name}: of {longer:,} that are longer than {BLOCK} tokens the first {BLOCK} are read")
    if wordless:
        print(f"{name}: {wordless:,} sentences without a word are left out")
    kept = [(ids[:BLOCK], label) for ids, (label, _) in zip(sentences, pairs, strict=True) if ids]
    if not kept:
        raise ValueError(f"{name}: expected a sentence with words, got none")
    return [ids for ids, _ in kept], [label for _, label in kept]


def collate(sentences: list[list[int]], labels: list[int], items: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return *pad([sentences[item] for item in items], PAD), torch.tensor([labels[item] for item in items])


def balanced_loss(weights: Tensor, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    """Each president counts as much as any other, however many sentences there are of him."""
    tokens, lengths, labels = batch
    return F.cross_entropy(model(tokens, lengths), labels, weights, reduction="sum"), len(labels)


@torch.no_grad()
def confusion(model: SpeechClassifier, sentences: list[list[int]], labels: list[int]) -> Tensor:
    """How many sentences of each president (rows) are taken for whose (columns)."""
    training, counts = model.training, torch.zeros(len(PRESIDENTS), len(PRESIDENTS), dtype=torch.int64)
    model.eval()
    for items in torch.arange(len(sentences)).split(256):
        tokens, lengths, truth = collate(sentences, labels, items.tolist())
        counts.index_put_((truth, model(tokens, lengths).argmax(1)), torch.tensor(1), accumulate=True)
    model.train(training)
    return counts


def accuracy(counts: Tensor) -> float:
    return (counts.trace() / counts.sum()).item()


def plot_confusion(counts: Tensor, path: Path) -> None:
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(PRESIDENTS.values())
    axes.imshow((counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy(), vmin=0, vmax=1, cmap="Blues")
    for row, column in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        dark = counts[row, column] > counts[row].sum() / 2
        axes.text(column, row, counts[row, column].item(), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"Test sentences, accuracy {accuracy(counts):.1%}")
    write(path, lambda part: figure.savefig(part, dpi=150))


def hold_out(pairs: list[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """The sentences without every tenth of each president, and these.

    Raises:
        ValueError: there are fewer than ten of each.
    """
    counts, kept, held_out = [0] * len(PRESIDENTS), [], []
    for label, sentence in pairs:
        counts[label] += 1
        (kept if counts[label] % NTH else held_out).append((label, sentence))
    if not held_out:
        raise ValueError(f"training sentences: expected {NTH} or more of a president, got {max(counts)}")
    return kept, held_out


def prepare(study: Study) -> Corpus:
    """A vocabulary of the training texts' words, and the sentences as ids of it.

    Raises:
        ValueError: there are no sentences with words; the message says of what.
    """
    tokenizer = train_words([*study.training, *(sentence for _, sentence in study.sentences)])
    training, held_out = hold_out(study.sentences)
    parts = {"training": training, HELD_OUT: held_out, "test": study.test_sentences}
    sentences = {name: encode_sentences(tokenizer, pairs, f"{name} sentences") for name, pairs in parts.items()}
    return Corpus(tokenizer, sentences, study.test_sentences[0][1], study.source)


def run(corpus: Corpus, recipe: Recipe) -> None:
    config = TransformerConfig(
        corpus.tokenizer.get_vocab_size(), embed_dim=64, layers=4, heads=2, ffn_dim=100, positions="sinusoidal",
        max_positions=BLOCK, norm="layer", activation="relu",
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = SpeechClassifier(config)
    sentences, labels = corpus.sentences["training"]
    counts = torch.tensor(labels).bincount(minlength=len(PRESIDENTS)).clamp_min(1)
    # All count as long as the longest may be, so that a batch has so many sentences whatever their lengths.
    batches = Batches([BLOCK] * len(labels), BATCH * BLOCK, partial(collate, sentences, labels), seed=recipe.seed)
    trained = train(
        model, partial(balanced_loss, counts.sum() / (len(counts) * counts)), batches, recipe,
        evaluate=lambda model: {name: accuracy(confusion(model, *part)) for name, part in corpus.sentences.items()},
        score=lambda values: values[HELD_OUT], score_name="held-out accuracy",
        description={"model": asdict(config), "vocabulary": digest(corpus.tokenizer)},
        learning_rate=LEARNING_RATE,
    )  # fmt: skip
    report(model, corpus, trained, recipe)


def report(model: SpeechClassifier, corpus: Corpus, trained: Trained, recipe: Recipe) -> None:
    counts = confusion(model, *corpus.sentences["test"])
    plot_confusion(counts, recipe.output / "confusion.png")
    layers = save_attention_maps(model, corpus.tokenizer, corpus.sentence, BLOCK, recipe.output, causal=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = list(PRESIDENTS.values())
    recalls = counts.diag() / counts.sum(1).clamp_min(1)
    rows = [[name, *row.tolist(), f"{recall:.1%}"] for name, row, recall in zip(names, counts, recalls, strict=True)]
    steps = ([step, *(f"{value:.1%}" for value in values.values())] for step, values in trained.evaluations.items())
    text = "\n\n".join((
        f"Whose sentence is it? From {corpus.source}; {parameters:,} parameters, {recipe.steps} steps, "
        f"seed {recipe.seed}.",
        f"The result: step {trained.kept}, the best for the held-out sentences. "
        f"Test accuracy {accuracy(counts):.1%}, mean of the presidents {recalls.mean():.1%}; the most frequent one has "
        f"{counts.sum(1).max() / counts.sum():.1%} of the sentences. Rows: true, columns: predicted.",
        table(["", *names, "right"], rows),
        "All steps:",
        table(["accuracy at step", *next(iter(trained.evaluations.values()))], steps),
        f"Rows of the attention add up to 1 in all {layers} layers.",
    ))  # fmt: skip
    write_text(recipe.output / "results.md", text)
    print(f"\n{text}\n\nTables, figures and checkpoints: {recipe.output}")
