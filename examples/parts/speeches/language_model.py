"""Part two of the study: a causal language model of three presidents' speeches, and its perplexity on others of each.

Part three and the preset take their windows of documents, training and sampling from here.
"""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from parts.common.attention_maps import save_attention_maps
from parts.common.figures import plain_logarithmic
from parts.common.reports import quote, table, write, write_text
from parts.speeches.corpus import PRESIDENTS, Study
from parts.speeches.perplexity import perplexity
from parts.speeches.training import Recipe, Trained, train
from parts.speeches.vocabularies import END, PAD, UNKNOWN, digest, encode_documents, train_words, unknown_words
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

from pynlp.decoding import sample
from pynlp.functional import linear_cross_entropy
from pynlp.models import Decoder, TransformerConfig
from pynlp.training import Batches

BLOCK, BATCH = 32, 16  # tokens of a window, windows of a batch
LEARNING_RATE = 2e-3
PIECE, NTH = 10, 20  # windows of a piece of text, at most; every so many pieces one is held out
HELD_OUT = "held out"


class Corpus(NamedTuple):
    """Texts as token ids.

    Attributes:
        training: Documents to train on.
        held_out: Pieces between them, by which the step to keep is chosen.
        known: Documents of training whose perplexity is told.
        tests: Others, by name.
        sentence: One of a test, to look at.
        source: Where the texts are from.
    """

    tokenizer: Tokenizer | ByteLevelBPETokenizer
    training: list[Tensor]
    held_out: list[Tensor]
    known: list[Tensor]
    tests: dict[str, list[Tensor]]
    sentence: str
    source: str


class Sampling(NamedTuple):
    """How a text is sampled; see `pynlp.decoding.sample`."""

    prompt: str
    top_k: int | None
    top_p: float | None
    temperature: float
    seed: int


def prepare(study: Study) -> Corpus:
    """A vocabulary of the training texts' words, and the ids of all texts.

    Raises:
        ValueError: a text is too short; the message names it.
    """
    tokenizer = train_words([*study.training, *(sentence for _, sentence in study.sentences)])
    training = encode_documents(tokenizer, study.training)
    tests = {name: encode_documents(tokenizer, texts) for name, texts in study.tests.items()}
    for name, documents in tests.items():
        longest = max(map(len, documents), default=0)
        if longest < 2:
            raise ValueError(f"test {name} text: expected 2 tokens or more, got {longest}")
    training, held_out = hold_out(training, BLOCK)
    return Corpus(tokenizer, training, held_out, training, tests, study.test_sentences[0][1], study.source)


def hold_out(documents: list[Tensor], length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Documents without every twentieth piece, what is left in one as one where it was, and these pieces.

    Args:
        length: Tokens of a window of training. A piece has `PIECE` of them, or fewer where there is little text.

    Raises:
        ValueError: there is not enough text for twenty pieces.
    """
    total, least = sum(map(len, documents)), length + 1
    size = min(PIECE * length, total // NTH)
    kept, held_out, count = [], [], 0
    for document in documents:
        rest = []
        for piece in document.split(max(size, 1)):
            count += len(piece) >= least
            if count % NTH == 0 and len(piece) >= least:
                held_out.append(piece)
                kept.append(rest)
                rest = []
            else:
                rest.append(piece)
        kept.append(rest)
    kept = [torch.cat(pieces) for pieces in kept if pieces]
    if not held_out or max(map(len, kept)) < least:
        raise ValueError(f"training text: expected {NTH * least} tokens or more, got {total}")
    return kept, held_out


class Windows:
    """All windows of so many tokens and the next in documents: inputs and targets `(B, length)` of some of them.

    Args:
        apart: Tokens from the beginning of one window to that of the next.
    """

    def __init__(self, documents: list[Tensor], length: int, apart: int = 1):
        self.stream, self.length = torch.cat(documents), length
        ends = torch.tensor([len(document) for document in documents]).cumsum(0).tolist()
        starts = [end - len(document) for end, document in zip(ends, documents, strict=True)]
        self.starts = torch.cat([torch.arange(a, max(a, b - length), apart) for a, b in zip(starts, ends, strict=True)])

    def __len__(self) -> int:
        return len(self.starts)

    def __call__(self, items: list[int]) -> tuple[Tensor, Tensor]:
        rows = self.stream[self.starts[items][:, None] + torch.arange(self.length + 1)]
        return rows[:, :-1], rows[:, 1:]


def make_model(vocabulary: int, positions: str, seed: int) -> Decoder:
    """The study's model. It can read eight times the length of training; with "learned" positions only that length."""
    torch.manual_seed(seed)
    return Decoder(TransformerConfig(
        vocabulary, embed_dim=64, layers=4, heads=2, ffn_dim=100, positions=positions, norm="layer", activation="relu",
        max_positions=BLOCK if positions == "learned" else 8 * BLOCK, tied_embeddings=False,
    ))  # fmt: skip


def next_token_loss(model: Decoder, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    inputs, targets = (x.to(model.output_weight.device) for x in batch)
    loss = linear_cross_entropy(model.features(inputs), model.output_weight, targets, reduction="sum")
    return loss, targets.numel()


def perplexities(corpus: Corpus, length: int, brief: bool, model: Decoder) -> dict[str, float]:
    """Perplexity of what is held out and, unless `brief`, of training and each test, in windows without overlap."""
    parts = {HELD_OUT: corpus.held_out}
    if not brief:
        parts = {"training": corpus.known, **parts, **corpus.tests}
    return {name: perplexity(model, documents, length) for name, documents in parts.items()}


def train_model(
    model: Decoder,
    corpus: Corpus,
    recipe: Recipe,
    *,
    length: int = BLOCK,
    batch: int = BATCH,
    apart: int = 1,
    learning_rate: float = LEARNING_RATE,
    every: int = 50,
    brief: bool = False,
    bf16: bool = False,
) -> Trained:
    """Trains the model on windows of `length` tokens, `batch` a step, and tells perplexities as `perplexities` does."""
    windows = Windows(corpus.training, length, apart)
    batches = Batches([length] * len(windows), length * batch, windows, seed=recipe.seed)
    return train(
        model, next_token_loss, batches, recipe, every=every, learning_rate=learning_rate, bf16=bf16,
        evaluate=partial(perplexities, corpus, length, brief),
        score=lambda values: -values[HELD_OUT], score_name="minus the held-out perplexity",
        description={"model": asdict(model.config), "vocabulary": digest(corpus.tokenizer)},
    )  # fmt: skip


def encode_prompt(tokenizer: Tokenizer | ByteLevelBPETokenizer, prompt: str, most: int) -> list[int]:
    """The prompt's token ids; checked before training, so that a mistake costs nothing.

    Raises:
        SystemExit: there are none, or more than `most`.
    """
    ids = tokenizer.encode(prompt).ids
    if not 1 <= len(ids) <= most:
        raise SystemExit(f"--prompt: expected 1 to {most} tokens, got {len(ids)} of {prompt!r}")
    if tokenizer.token_to_id(END) is None and UNKNOWN in ids:
        print(f"--prompt: these words are in no training text and read as <unk>: {unknown_words(tokenizer, prompt)}")
    return ids


def sample_text(model: Decoder, corpus: Corpus, sampling: Sampling, length: int, folder: Path) -> str:
    """A continuation of the prompt, of up to so many tokens with it; written to sample.txt."""
    tokenizer = corpus.tokenizer
    prompt = tokenizer.encode(sampling.prompt).ids
    end = tokenizer.token_to_id(END)
    model.eval()
    [[hypothesis]] = sample(
        model.decoding_state(1, length), torch.tensor([prompt], device=model.output_weight.device),
        end=PAD if end is None else end, max_length=length - len(prompt),
        top_k=sampling.top_k, top_p=sampling.top_p, temperature=sampling.temperature, seed=sampling.seed,
    )  # fmt: skip
    text = tokenizer.decode([*prompt, *hypothesis.tokens], skip_special_tokens=False)
    if end is None:  # words, with spaces between them
        text = re.sub(r" ([.,;:!?%])", r"\1", text)
    write_text(folder / "sample.txt", text)
    return text


def perplexity_tables(trained: Trained) -> str:
    """The result, of the kept step, and all steps."""
    names = list(next(iter(trained.evaluations.values())))
    rows = [[step, *(f"{values[name]:.1f}" for name in names)] for step, values in trained.evaluations.items()]
    kept = [row for row in rows if row[0] == trained.kept]
    return "\n\n".join((
        f"The result: step {trained.kept}, which foretells best what was held out of the training text.",
        table(["perplexity", *names], [["kept", *row[1:]] for row in kept]),
        "All steps:",
        table(["perplexity at step", *names], rows),
    ))  # fmt: skip


def plot_perplexity(trained: Trained, path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = list(trained.evaluations)
    for name in next(iter(trained.evaluations.values())):
        values = [row[name] for row in trained.evaluations.values()]
        style = {"training": "o--", HELD_OUT: "s-."}.get(name, "o-")
        axes.plot(steps, values, style, ms=3, label=PRESIDENTS.get(name, name))
    axes.axvline(trained.kept, color="black", ls=":", label=f"kept: step {trained.kept}")
    axes.set(xlabel="step", ylabel="perplexity", title="Perplexity of training text, held-out text and tests")
    plain_logarithmic(axes.yaxis)
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    write(path, lambda part: figure.savefig(part, dpi=150))


def unknown_shares(corpus: Corpus) -> str:
    shares = {name: (torch.cat(texts) == UNKNOWN).float().mean().item() for name, texts in corpus.tests.items()}
    return ", ".join(f"{share:.1%} ({name})" for name, share in shares.items())


def report_model(
    model: Decoder, corpus: Corpus, trained: Trained, sampling: Sampling, length: int, out: Path
) -> list[str]:
    """Figures of a word model into the folder `out`, and paragraphs on it; `length` tokens are sampled."""
    plot_perplexity(trained, out / "perplexity.png")
    layers = save_attention_maps(model, corpus.tokenizer, corpus.sentence, BLOCK, out, causal=True)
    text = sample_text(model, corpus, sampling, length, out)
    return [
        perplexity_tables(trained),
        f"Windows of {BLOCK} words; words that are in no training text: {unknown_shares(corpus)}. In all {layers} "
        "layers rows of the attention add up to 1, and nothing attends ahead.",
        quote(text),
    ]


def run(corpus: Corpus, recipe: Recipe, sampling: Sampling) -> None:
    encode_prompt(corpus.tokenizer, sampling.prompt, BLOCK - 1)
    model = make_model(corpus.tokenizer.get_vocab_size(), "sinusoidal", recipe.seed)
    trained = train_model(model, corpus, recipe)
    report = "\n\n".join((
        f"A causal language model, from {corpus.source}; {model.parameter_count():,} parameters, {recipe.steps} steps, "
        f"seed {recipe.seed}.",
        # No longer than what it is trained with: positions behind that mean nothing to it.
        *report_model(model, corpus, trained, sampling, BLOCK, recipe.output),
    ))  # fmt: skip
    write_text(recipe.output / "results.md", report)
    print(f"\n{report}\n\nTables, figures and checkpoints: {recipe.output}")
