"""What is trained on holds nothing of what is measured by, against a comparison of all with all; and subwords."""

import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.translation.corpora import Document
from parts.translation.preparation import NearCopies, load_tokenizer, save_tokenizer, split, train_tokenizer
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"

FINNISH = "valitse avaa tiedosto asiakirja taulukko solu rivi sarake muotoilu kaavio kuva teksti sivu otsikko luettelo"
ENGLISH = "choose open file document table cell row column format chart image text page heading list"


def sentence(words, chance):
    return " ".join(chance.choices(words.split(), k=chance.randint(3, 9))).capitalize() + "."


def changed(text, chance):
    """Nearly the same text, or not so nearly."""
    words = text.split()
    place = chance.randrange(len(words))
    kind = chance.randrange(5)
    if kind == 0:
        words[place] = words[place].upper() + ","
    elif kind == 1:
        words[place] += "n"
    elif kind == 2:
        words.insert(place, str(chance.randrange(100)))
    elif kind == 3:
        del words[place]
    return " ".join(words)


def corpus(documents, sentences):
    """Documents that repeat each other's sentences in a source or a target, or in a block of two, more or less."""
    chance = random.Random(0)
    sources, targets = ([sentence(words, chance) for _ in range(60)] for words in (FINNISH, ENGLISH))
    result = []
    for number in range(documents):
        pairs = []
        for _ in range(sentences):
            source = changed(chance.choice(sources), chance) if chance.random() < 0.2 else sentence(FINNISH, chance)
            target = changed(chance.choice(targets), chance) if chance.random() < 0.2 else sentence(ENGLISH, chance)
            if chance.random() < 0.1:
                source = f"{source} {chance.choice(sources)}"
            pairs.append((source, target))
        pairs += pairs[:1]
        result.append(Document(f"page {number}", pairs, "train" if number % 10 == 0 else None))
    return result


def plain(text):
    """Lower case, one 0 for each number, a space for all that is neither letter nor digit."""
    kept = "".join("0" if c.isdigit() else c if c.isalpha() else " " for c in text.lower())
    while "00" in kept:
        kept = kept.replace("00", "0")
    return " ".join(kept.split())


def similar(a, b):
    a, b = (f" {plain(text)} " for text in (a, b))
    a_grams, b_grams = (set(zip(text, text[1:], text[2:], strict=False)) for text in (a, b))
    return a == b or Fraction(len(a_grams & b_grams), len(a_grams | b_grams)) >= Fraction(4, 5)


def with_sentences(text):
    """The text and, as every sentence here ends with a full stop before a capital, each sentence."""
    return [text, *(f"{piece}." for piece in text.removesuffix(".").split(". "))] if ". " in text else [text]


def copies(pair, others):
    return any(
        similar(a, b)
        for other in others
        for side in (0, 1)
        for a in with_sentences(pair[side])
        for b in with_sentences(other[side])
    )


def test_nothing_of_the_held_out_pairs_is_trained_on(capsys):
    documents = corpus(documents=40, sentences=10)
    train, validation, test, dropped = split(documents, validation=30, test=30)
    home = {pair: {d.name for d in documents if pair in d.pairs} for document in documents for pair in document.pairs}
    held_out_names = {name for pair in test + validation for name in home[pair]}
    assert not held_out_names & {document.name for document in documents if document.part == "train"}
    assert 30 <= len(test) < 40 and 20 < len(validation) < 40

    rest = [pair for document in documents if document.name not in held_out_names for pair in document.pairs]
    unique = list(dict.fromkeys(rest))
    expected = [pair for pair in unique if not copies(pair, test + validation)]
    assert sorted(train) == sorted(expected)
    assert not any(copies(pair, test) for pair in validation)
    assert dropped["train"] == {"duplicates": len(rest) - len(unique), "near_copies": len(unique) - len(expected)}
    assert dropped["train"]["near_copies"] > 20 and dropped["train"]["duplicates"] > 20
    exactly = {text for pair in test + validation for text in pair}
    assert sum(not exactly & set(pair) for pair in set(unique) - set(expected)) > 10  # not by equality alone
    count = dropped["train"]
    assert (
        f"train: {len(train)} pairs; dropped {count['duplicates']} duplicates, {count['near_copies']} near-copies"
        in (capsys.readouterr().out)
    )


def test_duplicates_within_the_test_set_are_dropped():
    documents = [Document(str(i), [(f"sana numero {'abc'[i]} " * 2, f"{'xyz'[i]} word number")] * 3) for i in range(3)]
    train, validation, test, dropped = split(documents, validation=1, test=1)
    assert [len(part) for part in (train, validation, test)] == [1, 1, 1]
    assert dropped == {part: {"duplicates": 2, "near_copies": 0} for part in ("train", "validation", "test")}


@pytest.mark.parametrize(
    "text, copy, expected",
    [
        ("Avaa tiedosto 12.", "avaa TIEDOSTO: 7", True),
        ("abcdefghijklmnopqr", "abcdefghijklmnopqs", True),  # 16 trigrams of 20
        ("abcdefghijklmnopq", "abcdefghijklmnopr", False),  # 15 of 19
        ("abcdefghijklmnopqrst", "abcdefghijklmnopqrst vwxy", True),  # 20 of 25: all that the first has
        ("abcdefghijklmnopqrst", "abcdefghijklmnopqrst vwxyz", False),
        ("Avaa tiedosto.", "Sulje tiedosto.", False),
        ("!", "?", True),
        ("a", "b", False),
    ],
)
def test_near_copies_are_told_to_the_trigram(text, copy, expected):
    assert (copy in NearCopies([text, "Something else"])) is expected
    assert (text in NearCopies([copy, "Something else"])) is expected


@given(st.lists(st.text("ab ", max_size=24), min_size=1, max_size=8), st.text("ab ", max_size=24))
def test_the_index_misses_no_near_copy(texts, text):
    assert (text in NearCopies(texts)) == any(similar(text, other) for other in texts)


def test_held_out_documents_depend_on_names_and_seed_alone():
    documents = corpus(documents=30, sentences=5)
    *parts, _ = split(documents, validation=20, test=20)
    *turned, _ = split(documents[::-1], validation=20, test=20)
    assert [sorted(part) for part in parts] == [sorted(part) for part in turned]
    assert sorted(split(documents, validation=20, test=20, seed=1).test) != sorted(parts[2])


def test_a_split_is_the_same_in_every_process(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for document in corpus(30, 30) for a, b in document.pairs))
    code = (
        "import sys\nfrom parts.translation import corpora, preparation as p\n"
        "parts = p.split(corpora.load_documents(sys.argv[1]), validation=50, test=50)\n"
        "print(parts, p.train_tokenizer(parts.train, 500).to_str())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, path], cwd=EXAMPLES, env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(outputs) == 1 and b"train=" in outputs.pop()


def test_published_parts_are_kept():
    published = [Document(part, [(f"{part} yksi", f"{part} one")], part) for part in ("train", "test", "validation")]
    train, validation, test, _ = split(published)
    assert (train, validation, test) == tuple(
        [(f"{part} yksi", f"{part} one")] for part in ("train", "validation", "test")
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"test": 0}, "test: expected at least 1 pair, got 0"),
        ({"validation": -1, "test": 1}, "validation: expected at least 1 pair, got -1"),
        ({"test": 100}, "test: expected at most the 3 pairs that there are, got 100"),
        ({"test": 1, "validation": 3}, "validation: expected at most the 2 pairs that there are, got 3"),
        ({"test": 1, "validation": 2}, "documents: expected pairs for each part, got none for train"),
    ],
)
def test_too_few_pairs_are_named(options, message):
    documents = [Document(name, [(f"{name} sana", f"{name} word")]) for name in ("aaaa", "kkkk", "tttt")]
    with pytest.raises(ValueError, match=message):
        split(documents, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([pair for document in corpus(20, 20) for pair in document.pairs], vocabulary=400)


@given(st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", ["", " a  b ", "Kärki \t\n 😀 日本 \x00\ufffd", "<s> on <pad></s>", "▁Ġ", "e\u0301é"])
def test_odd_texts_come_back_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([1, *ids, 2, 0, 0]) == text


def test_subwords_are_those_of_both_languages(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 400
    first, *_, again = tokenizer.encode("taulukko row taulukko").ids
    assert first == again and tokenizer.decode([first]) == "taulukko"
    assert [len(tokenizer.encode(word).ids) for word in ("asiakirja", "document")] == [1, 1]


def test_a_tokenizer_is_saved_whole_or_not_at_all(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    for text in ("Avaa taulukko.", "</s> <pad> 日本"):
        assert loaded.encode(text).ids == tokenizer.encode(text).ids
        assert loaded.decode(loaded.encode(text).ids) == text

    class Broken:
        def save(self, name):
            Path(name).write_text("{")
            raise OSError("No space left on device")

    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(Broken(), path)
    assert path.read_bytes() == before
    save_tokenizer(tokenizer, path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_bad_tokenizers_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="missing.json: expected a tokenizer, got: No such file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text(tokenizer.to_str()[:1000])
    with pytest.raises(ValueError, match="half.json: expected a tokenizer, got: .*EOF"):
        load_tokenizer(tmp_path / "half.json")
    other = Tokenizer.from_str(tokenizer.to_str().replace("<pad>", "<unk>"))
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"other.json: expected <pad>, <s>, </s> to be 0, 1 and 2, got \[None, 1, 2\]"):
        load_tokenizer(tmp_path / "other.json")
    with pytest.raises(ValueError, match="vocabulary: expected at least 259, got 258"):
        train_tokenizer([("a", "b")], vocabulary=258)
