"""Parallel Finnish and English text: fetched into a cache once, and read as documents of pairs of sentences.

    documents = load_documents("libreoffice")

What a corpus is called, what it holds and what is kept of it, counting different pairs:

- `libreoffice`: LibreOffice's help and the texts of its user interface, from three Debian packages (5.5 MB, MPL-2.0).
  Of version 7.4.7 29,684 pairs are kept, of which 22,965 have three words or more in both languages. A document is a
  page of the help or a part of the interface; the latter is for training alone, as most of it are labels.
- `homeassistant`: texts of Home Assistant's user interface, from a wheel of PyPI (35 MB, Apache-2.0). Of 13,178
  translated strings, many of them labels of one word, 11,848 pairs are kept. A document is a component.
- `opus-100`: a million sentences of all kinds from the Hugging Face hub, with validation and test sets of their own.
- a file of yours, `source TAB target` a line, or two files with a sentence a line: all that is not empty is kept.

Texts are cut into sentences where both languages have as many. A pair is kept if both sides have 2 to 80 words, if
neither is more than three times as long as the other, and if they differ by more than letter case, numbers and
punctuation: what does not is not translated.
"""

import gettext
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from parts.common.fetching import fetch, run
from parts.common.texts import read_lines
from tqdm import tqdm

DEBIAN_PACKAGES = ("libreoffice-help-fi", "libreoffice-help-en-us", "libreoffice-l10n-fi")
HOME_ASSISTANT = "homeassistant==2024.3.3"
LINES_OF_A_DOCUMENT = 50  # of a file, which does not say where its documents end
WORDS, LENGTH_RATIO = range(2, 81), 3

# Of the help: tag, id, content.
BLOCK = re.compile(r'<(p|h[1-6])\b[^>]*\bid="((?:par|hd)_[^"]*)"[^>]*>(.*?)</\1>', re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\.\.)\s+(?=[\"'(“”]?[A-ZÅÄÖ])")
WORD = re.compile(r"\w*[^\W\d_]\w*")  # with a letter
# The letter behind it is the key to press; it is not one in the names of functions and of placeholders: NORM_JAKAUMA.
ACCELERATOR = re.compile(r"~(?=\w)|_(?=\S)(?!(?<=[A-ZÅÄÖ]{3}_)[A-ZÅÄÖ]{3})")

Pair = tuple[str, str]


class Document(NamedTuple):
    """Sentences that belong together.

    Attributes:
        name: Of the file or component, or where in the file it begins.
        pairs: (source, target) of each sentence.
        part: "train", "validation" or "test" where a corpus says so; None where `split` may choose.
    """

    name: str
    pairs: list[Pair]
    part: str | None = None


def load_documents(*corpus: str | Path, source: str = "fi", target: str = "en") -> list[Document]:
    """The documents of a corpus by its name, of a file with a tab in each line, or of a file for each language.

    Args:
        corpus: "libreoffice", "homeassistant", "opus-100", or one or two paths: source first.
        source, target: "fi" and "en", or the other way round. Files are taken as they are.

    Raises:
        ValueError: an argument or a file is not as expected; the message names it, and the line.
        SystemExit: a corpus cannot be fetched; the message says what to do.
    """
    if {source, target} != {"fi", "en"}:
        raise ValueError(f"source, target: expected fi and en, one each, got {source!r} and {target!r}")
    if len(corpus) == 1 and corpus[0] in CORPORA:
        documents = CORPORA[corpus[0]]()
        if source == "en":
            documents = [document._replace(pairs=[(en, fi) for fi, en in document.pairs]) for document in documents]
    elif len(corpus) == 1 and Path(corpus[0]).exists():
        documents = read_tsv(Path(corpus[0]))
    elif len(corpus) == 2:
        documents = read_text_files(Path(corpus[0]), Path(corpus[1]))
    else:
        names = " ".join(map(str, corpus))
        raise ValueError(f"corpus: expected {', '.join(CORPORA)}, a file that is there or two of them, got {names!r}")
    return [document for document in documents if document.pairs]


def load_libreoffice() -> list[Document]:
    """(Finnish, English) of the help and of the user interface."""
    folder = fetch("libreoffice", fetch_libreoffice) / "usr"
    finnish, english = (folder / "share/libreoffice/help" / language for language in ("fi", "en-US"))
    interface = sorted(folder.glob("lib/libreoffice/program/resource/fi/LC_MESSAGES/*.mo"))
    documents = [document(path.name, read_mo(path), part="train") for path in interface]
    for path in tqdm(sorted(finnish.glob("text/**/*.html")), "Reading the help", unit="page", leave=False):
        name = path.relative_to(finnish)
        if (english / name).exists():
            texts, translated = read_help(path), read_help(english / name)
            documents.append(document(str(name), [(texts[key], translated[key]) for key in texts if key in translated]))
    return documents


def fetch_libreoffice(folder: Path) -> None:
    print(f"Fetching {', '.join(DEBIAN_PACKAGES)} (5.5 MB)", flush=True)
    advice = "This corpus comes from Debian or Ubuntu (after `apt-get update`); `homeassistant` from anywhere."
    run(["apt-get", "download", *DEBIAN_PACKAGES], folder, advice)
    for package in folder.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(folder)], folder, advice)
        package.unlink()


def read_help(path: Path) -> dict[str, str]:
    """The texts of a page's paragraphs and headings by their id."""
    return {key: text_of(html) for _, key, html in BLOCK.findall(path.read_text(encoding="utf-8"))}


def text_of(html: str) -> str:
    parser = BlockParser()
    parser.feed(html)
    parser.close()
    return "".join(parser.pieces)


class BlockParser(HTMLParser):
    """Collects the text of a block in `pieces`.

    Some texts have variants for other systems and programs, hidden spans one after another in a span. Only the last
    one is kept, which is the default where there is one.
    """

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []
        self.spans: list[int] = []  # how many pieces there were before each span that is open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.pieces.append(" ")
        elif tag == "span":
            if "hidden" in dict(attributes) and self.spans:
                del self.pieces[self.spans[-1] :]
            self.spans.append(len(self.pieces))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.spans:
            self.spans.pop()


def read_mo(path: Path) -> list[Pair]:
    """(translation, original) of each string, without the marks of accelerator keys; of plurals the singular."""
    with path.open("rb") as file:
        catalog = gettext.GNUTranslations(file)._catalog  # there is no public way to all strings
    pairs = []
    for key, translation in catalog.items():
        original, plural = key if isinstance(key, tuple) else (key, 0)
        if original and plural == 0:
            original = original.rpartition("\x04")[2]  # behind its context
            pairs.append((without_accelerator(translation), without_accelerator(original)))
    return pairs


def without_accelerator(text: str) -> str:
    return ACCELERATOR.sub("", text) if len(re.findall("[~_]", text)) == 1 else text


def load_homeassistant() -> list[Document]:
    """(Finnish, English) of the user interface."""
    (path,) = fetch(HOME_ASSISTANT.replace("==", "-"), fetch_homeassistant).glob("*.whl")
    documents = []
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        for name in sorted(names):
            finnish = re.fullmatch(r"homeassistant/components/(\w+)/translations/fi\.json", name)
            english = name.replace("fi.json", "en.json")
            if finnish and english in names:
                texts, translated = (dict(flatten(json.loads(wheel.read(file)))) for file in (name, english))
                pairs = [(texts[key], translated[key]) for key in texts if key in translated]
                documents.append(document(finnish[1], pairs))
    return documents


def fetch_homeassistant(folder: Path) -> None:
    print(f"Fetching {HOME_ASSISTANT} (35 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", HOME_ASSISTANT]
    run(command, folder, "This corpus comes from PyPI, by pip.")


def flatten(tree: dict, *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The leaves of nested dictionaries with their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, *path, key)
        else:
            yield (*path, key), value


def load_opus() -> list[Document]:
    """(Finnish, English), a document a part. Its validation and test sets are as published: only not empty."""
    print("Loading Helsinki-NLP/opus-100 from the Hugging Face hub", flush=True)
    advice = "opus-100 needs `pip install datasets` and a way to the Hugging Face hub; the other corpora do not."
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(f"datasets: expected this package to be installed, got none. {advice}") from None
    try:
        parts = load_dataset("Helsinki-NLP/opus-100", "en-fi")
    except OSError as error:
        raise SystemExit(f"Helsinki-NLP/opus-100: expected to reach it, got: {error}. {advice}") from None
    documents = []
    for part, rows in parts.items():
        pairs = [tuple(" ".join(row["translation"][side].split()) for side in ("fi", "en")) for row in rows]
        good = kept if part == "train" else all
        documents.append(Document(part, [pair for pair in pairs if good(pair)], part))
    return documents


CORPORA = {"libreoffice": load_libreoffice, "homeassistant": load_homeassistant, "opus-100": load_opus}


def document(name: str, blocks: Iterable[Pair], part: str | None = None) -> Document:
    return Document(name, [pair for block in blocks for pair in sentences(*block) if kept(pair)], part)


def sentences(source: str, target: str) -> list[Pair]:
    """The pairs of sentences of two blocks, or the blocks where they have not the same number of sentences."""
    source, target = " ".join(source.split()), " ".join(target.split())
    pieces = SENTENCE_END.split(source), SENTENCE_END.split(target)
    return list(zip(*pieces, strict=True)) if len(pieces[0]) == len(pieces[1]) else [(source, target)]


def kept(pair: Pair) -> bool:
    """Whether a model learns translation from it: see the top of this file."""
    short, long = sorted(map(len, pair))
    counts = [len(WORD.findall(text)) for text in pair]
    translated = normalise(pair[0]) != normalise(pair[1])
    return translated and all(count in WORDS for count in counts) and long <= LENGTH_RATIO * short


def normalise(text: str) -> str:
    """Lower case without punctuation, every number 0."""
    return " ".join(re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text.lower())).split())


def read_tsv(path: Path) -> list[Document]:
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if len(columns) != 2 and line.strip():
            raise ValueError(f"{path}, line {number}: expected source TAB target, got {len(columns) - 1} tabs")
        pairs.append(tuple(columns) if len(columns) == 2 else ("", ""))
    return documents_of_lines(str(path), pairs)


def read_text_files(source: Path, target: Path) -> list[Document]:
    lines = read_lines(source), read_lines(target)
    if len(lines[0]) != len(lines[1]):
        counts = " and ".join(f"{len(side):,}" for side in lines)
        raise ValueError(f"{source}, {target}: expected as many lines in both, got {counts}")
    return documents_of_lines(f"{source}, {target}", list(zip(*lines, strict=True)))


def documents_of_lines(name: str, pairs: list[Pair]) -> list[Document]:
    """Documents of some lines each; pairs with an empty side are left out."""
    pairs = [(" ".join(source.split()), " ".join(target.split())) for source, target in pairs]
    empty = sum(not all(pair) for pair in pairs)
    if empty == len(pairs):
        raise ValueError(f"{name}: expected a pair of sentences, got {empty} empty ones")
    if empty:
        print(f"{name}: {empty:,} pairs with an empty side are left out")
    return [
        Document(f"line {start + 1}", [pair for pair in pairs[start : start + LINES_OF_A_DOCUMENT] if all(pair)])
        for start in range(0, len(pairs), LINES_OF_A_DOCUMENT)
    ]
