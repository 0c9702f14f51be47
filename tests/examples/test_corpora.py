"""Fetching and reading parallel corpora: small ones made here, and the real one from Debian where it can be had."""

import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from parts.translation import corpora
from parts.translation.corpora import Document, load_documents

EXAMPLES = Path(__file__).parents[2] / "examples"

FINNISH_PAGE = """<html><head><title>Otsikko tässä</title></head><body><p dir="auto">Ilman tunnusta oleva teksti</p>
<h2 id="hd_1" dir="auto"><a href="fi/x.html">Sijainti
   ja koko</a></h2>
<div><p id="par_2" class="paragraph">Paina <span class="switchinline"><span hidden="true" class="MAC">joko <span
class="keycode">Komento</span></span><span hidden="true"><span class="keycode">Ctrl</span></span></span>+A nyt.
Sitten valitse <b>Q&amp;A &lt;uusi&gt;</b>.</p></div>
<p class="paragraph" id="par_3">Ensimmäinen lause tässä. Toinen lause tässä.</p>
<p id="par_4">Opens a new window here.</p>
<p id="par_5">Tätä ei ole englanniksi.</p>
<p id="bm_6">Kirjanmerkki ei kuulu joukkoon.</p>
<p id="par_7">yksi rivi<br>toinen rivi</p>
</body></html>"""
ENGLISH_PAGE = """<html><head><title>A title here</title></head><body><p dir="auto">Text without an id</p>
<p id="par_2" class="paragraph">Now press <span class="switchinline"><span hidden="true" class="MAC">Command</span><span
hidden="true">Ctrl</span></span>+A. Then choose <b>Q&amp;A &lt;new&gt;</b>.</p>
<h2 id="hd_1" dir="auto">Position and size</h2>
<p id="par_3">A first sentence and a second one.</p>
<p id="par_4">Opens a new window here!</p>
<p id="bm_6">A bookmark does not belong.</p>
<p id="par_7">one line<br/>another line</p>
</body></html>"""
STRINGS = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n",
    "menu|file\x04_Open file": "Avaa t~iedosto",
    "Save all": "Save all",
    "Close": "Sulje",
    "%1 file deleted\0%1 files deleted": "%1 tiedosto poistettu\0%1 tiedostoa poistettu",
    "Value of %FILE_NAME": "Arvo %FILE_NAME on",
}
LIBREOFFICE = [
    Document("sw.mo", [("%1 tiedosto poistettu", "%1 file deleted"), ("Arvo %FILE_NAME on", "Value of %FILE_NAME"),
                       ("Avaa tiedosto", "Open file")], "train"),
    Document("text/swriter/a.html", [
        ("Sijainti ja koko", "Position and size"),
        ("Paina Ctrl+A nyt.", "Now press Ctrl+A."),
        ("Sitten valitse Q&A <uusi>.", "Then choose Q&A <new>."),
        ("Ensimmäinen lause tässä. Toinen lause tässä.", "A first sentence and a second one."),
        ("yksi rivi toinen rivi", "one line another line"),
    ]),
]  # fmt: skip


def mo(strings):
    """The bytes of a compiled catalogue, as the manual of gettext describes them."""
    keys, values = ([text.encode() for text in side] for side in zip(*sorted(strings.items()), strict=True))
    count, tables, texts = len(keys), b"", b""
    start = 28 + 16 * count
    for text in keys + values:
        tables += struct.pack("<2I", len(text), start + len(texts))
        texts += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, start) + tables + texts


def program(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pynlp"


@pytest.fixture
def debian(tmp_path, monkeypatch, cache):
    """A small LibreOffice behind an apt-get and a dpkg of our own; the folder with these two and their log."""
    contents, programs = tmp_path / "contents", tmp_path / "programs"
    help_, resource = contents / "usr/share/libreoffice/help", "usr/lib/libreoffice/program/resource/fi/LC_MESSAGES"
    for language, page in (("fi", FINNISH_PAGE), ("en-US", ENGLISH_PAGE)):
        (help_ / language / "text/swriter").mkdir(parents=True)
        (help_ / language / "text/swriter/a.html").write_text(page, encoding="utf-8")
        (help_ / language / "noscript.html").write_text(page, encoding="utf-8")
    (help_ / "fi/text/only_finnish.html").write_text(FINNISH_PAGE, encoding="utf-8")
    (contents / resource).mkdir(parents=True)
    (contents / resource / "sw.mo").write_bytes(mo(STRINGS))
    program(programs / "apt-get", f'echo "$@" >> {programs}/log; shift; for name; do touch "$name"_1_all.deb; done')
    program(programs / "dpkg", f'test -f "$2" && cp -r {contents}/. "$3"')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return programs


def test_libreoffice_is_aligned_cleaned_and_cut_into_sentences(debian, cache):
    assert load_documents("libreoffice") == LIBREOFFICE
    assert not list(cache.rglob("*.deb"))
    (turned,) = [d for d in load_documents("libreoffice", source="en", target="fi") if d.part is None]
    assert turned.pairs == [(english, finnish) for finnish, english in LIBREOFFICE[1].pairs]


def test_what_is_in_the_cache_is_not_fetched_again(debian):
    load_documents("libreoffice")
    load_documents("libreoffice")
    assert (debian / "log").read_text() == f"download {' '.join(corpora.DEBIAN_PACKAGES)}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL to send")
def test_a_killed_extraction_leaves_nothing_that_is_taken_for_a_corpus(debian, cache):
    good = (debian / "dpkg").read_text().partition("\n")[2]
    program(debian / "dpkg", f"{good}\nkill -9 $PPID")
    command = [sys.executable, "-c", "from parts.translation import corpora; corpora.load_documents('libreoffice')"]
    done = subprocess.run(command, cwd=EXAMPLES, env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert list(cache.rglob("*.html")) and not (cache / "libreoffice").exists()
    program(debian / "dpkg", good)
    assert load_documents("libreoffice") == LIBREOFFICE


def test_a_failed_fetch_says_what_to_do_and_leaves_nothing(debian, cache):
    program(debian / "apt-get", 'echo "E: Unable to locate package x" >&2; exit 100')
    with pytest.raises(SystemExit, match="apt-get download .*failed with 'E: Unable to locate.*`apt-get update`"):
        load_documents("libreoffice")
    program(debian / "apt-get", "touch a.deb")
    program(debian / "dpkg", "mkdir usr; exit 2")
    with pytest.raises(SystemExit, match="dpkg -x .*a.deb .*: failed with 'exit status 2'"):
        load_documents("libreoffice")
    assert list(cache.iterdir()) == []


def test_a_system_without_apt_is_told_so(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get: expected this program to be installed.*Debian or Ubuntu.*homeassis"):
        load_documents("libreoffice")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("_File", "File"),
        ("F~ormat", "Format"),
        ("HT_ML Source", "HTML Source"),
        ("HTM_L", "HTML"),
        ("Hex _#:", "Hex #:"),
        ("NORM_JAKAUMA.KÄÄNT", "NORM_JAKAUMA.KÄÄNT"),
        ("Adding %EXTENSION_NAME", "Adding %EXTENSION_NAME"),
        ("Automatic _underline_", "Automatic _underline_"),
        ("enter a tilde (~) before", "enter a tilde (~) before"),
        ("a _ b", "a _ b"),
    ],
)
def test_accelerator_marks_are_stripped_and_names_are_not(text, expected):
    assert corpora.without_accelerator(text) == expected


@pytest.mark.parametrize(
    "source, target, expected",
    [
        ("Yksi on. Kaksi on!", "One is. Two is!", [("Yksi on.", "One is."), ("Kaksi on!", "Two is!")]),
        ("Onko? Älä\n mene.", "Is it?  Do not go.", [("Onko?", "Is it?"), ("Älä mene.", "Do not go.")]),
        ("Yksi. Kaksi. Kolme.", "One. Two and three.", [("Yksi. Kaksi. Kolme.", "One. Two and three.")]),
        ("Versio 7.4 on, esim. uusi.", "Version 7.4 is, e.g. new.", [("Versio 7.4 on, esim. uusi.",
                                                                     "Version 7.4 is, e.g. new.")]),
        ("Solut B10 ... B14.", "Cells B10 ... B14.", [("Solut B10 ... B14.", "Cells B10 ... B14.")]),
        ('Sanoi. "Mene (pois)."', 'Said. "Go (away)."', [("Sanoi.", "Said."), ('"Mene (pois)."', '"Go (away)."')]),
    ],
)  # fmt: skip
def test_sentences_are_cut_where_both_sides_have_as_many(source, target, expected):
    assert corpora.sentences(source, target) == expected


@pytest.mark.parametrize(
    "source, target, expected",
    [
        ("Avaa tiedosto", "Open file", True),
        ("Tiedosto", "The file", False),
        ("Arvo 3", "The value", False),
        ("Kaksi sanaa", "Two words", True),
        ("Kaksi sanaa", "a " + "b" * 31, True),
        ("Kaksi sanaa", "a " + "b" * 32, False),
        ("OK nyt " * 40, "all good " * 40, True),
        ("OK nyt " * 41, "all good " * 41, False),
        ("Save the file 2", "save the file: 3.", False),
    ],
)
def test_kept_are_translated_pairs_of_like_length(source, target, expected):
    assert corpora.kept((source, target)) is expected


def test_homeassistant_pairs_leaves_of_the_same_path(cache):
    wheel = cache / "homeassistant-2024.3.3" / "homeassistant-2024.3.3-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    finnish = {"config": {"step": {"user": {"title": "Lisää uusi laite", "only": "Vain suomeksi tämä"}}},
               "title": "Home Assistant Cloud", "state": "Päällä nyt"}  # fmt: skip
    english = {"title": "Home Assistant Cloud", "config": {"step": {"user": {"title": "Add a new device"}}},
               "state": "On now"}  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as file:
        for name, texts in {"lamp/translations/fi": finnish, "lamp/translations/en": english, "cup/translations/fi":
                            finnish, "same/translations/fi": {"a": "Is one"}, "same/translations/en": {"a": "Is one"},
                            "lamp/strings": english}.items():  # fmt: skip
            file.writestr(f"homeassistant/components/{name}.json", json.dumps(texts))
    expected = [("Lisää uusi laite", "Add a new device"), ("Päällä nyt", "On now")]
    assert load_documents("homeassistant") == [Document("lamp", expected)]


def test_homeassistant_out_of_reach_is_said(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="homeassistant==2024.3.3: failed with 'ERROR: No matching.*comes from PyPI"):
        load_documents("homeassistant")
    assert list(cache.iterdir()) == []


def test_opus_keeps_its_own_parts(monkeypatch):
    rows = [{"translation": {"en": "Hi  there", "fi": "Hei vain"}}, {"translation": {"en": "Hi", "fi": "Hei"}}]
    empty = {"translation": {"en": " ", "fi": "Hei"}}
    published = {("Helsinki-NLP/opus-100", "en-fi"): {"test": [*rows, empty], "train": rows}}
    datasets = types.SimpleNamespace(load_dataset=lambda *arguments: published[arguments])
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert load_documents("opus-100", source="en", target="fi") == [
        Document("test", [("Hi there", "Hei vain"), ("Hi", "Hei")], "test"),
        Document("train", [("Hi there", "Hei vain")], "train"),
    ]


def test_opus_out_of_reach_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="datasets: expected this package to be installed.*pip install datasets"):
        load_documents("opus-100")

    def load_dataset(*arguments):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SystemExit, match="opus-100: expected to reach it, got: Couldn't reach the Hub.*a way to the"):
        load_documents("opus-100")


def test_a_tsv_and_two_files_are_read_alike(tmp_path, capsys):
    lines = [f"lause {i}\tsentence {i}" for i in range(120)]
    lines[1], lines[2], lines[60], lines[61] = "", "\tonly a target", "a\u2028b \x85c\td  e ", "sama\tsama"
    tsv, source, target = (tmp_path / name for name in ("pairs.tsv", "text.fi", "text.en"))
    tsv.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    columns = [line.split("\t") if line else ["", ""] for line in lines]
    for path, side in ((source, 0), (target, 1)):
        path.write_text("".join(f"{column[side]}\n" for column in columns), encoding="utf-8", newline="\n")

    documents = load_documents(tsv)
    assert capsys.readouterr().out == f"{tsv}: 2 pairs with an empty side are left out\n"
    assert load_documents(str(source), str(target)) == documents
    assert capsys.readouterr().out == f"{source}, {target}: 2 pairs with an empty side are left out\n"
    assert [(document.name, len(document.pairs)) for document in documents] == [
        ("line 1", 48), ("line 51", 50), ("line 101", 20),
    ]  # fmt: skip
    assert documents[0].pairs[:2] == [("lause 0", "sentence 0"), ("lause 3", "sentence 3")]
    assert documents[1].pairs[10:12] == [("a b c", "d e"), ("sama", "sama")]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.tsv": b"a\tb\nc d\n"}, "a.tsv, line 2: expected source TAB target, got 0 tabs"),
        ({"a.tsv": b"a\tb\tc\n"}, "a.tsv, line 1: expected source TAB target, got 2 tabs"),
        ({"a.tsv": b"a\tb\nc\td\n\xe4\xe4\te\n"}, "a.tsv, line 3: expected UTF-8, got byte 0xe4"),
        ({"a.tsv": b""}, "a.tsv: expected a pair of sentences, got 0 empty ones"),
        ({"a.tsv": b"\n\n"}, "a.tsv: expected a pair of sentences, got 2 empty ones"),
        ({"a.tsv": None}, "corpus: expected libreoffice, homeassistant, opus-100, a file that is there or two of them"),
        ({"a.fi": b"a\nb\n", "a.en": b"c\n"}, "a.en: expected as many lines in both, got 2 and 1"),
        ({"a.fi": b"a\n", "a.en": b"\xff\xfec\0"}, "a.en, line 1: expected UTF-8, got byte 0xff"),
        ({"a.fi": b"a\n", "a.en": None}, "a.en: expected a file to read, got: No such file"),
        ({"a.fi": b"a\n", "a.en": b"b\n", "a.sv": b"c\n"}, "corpus: expected libreoffice.* two of them, got"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(*(tmp_path / name for name in files))


@pytest.mark.parametrize("source, target", [("fi", "fi"), ("sv", "en")])
def test_other_languages_are_refused(source, target):
    with pytest.raises(ValueError, match=f"source, target: expected fi and en, one each, got '{source}' and"):
        load_documents("libreoffice", source=source, target=target)


def test_the_real_libreoffice():
    try:
        folder = corpora.fetch("libreoffice", corpora.fetch_libreoffice)
    except SystemExit as error:
        pytest.skip(f"needs the Debian packages of LibreOffice: {error}")
    documents = load_documents("libreoffice")
    pairs = {pair for document in documents for pair in document.pairs}
    assert ("Sijainti ja koko", "Position and Size") in pairs
    assert not any(finnish.lower() == english.lower() for finnish, english in pairs)
    assert not any(re.search(r"\w~|~\w", text) for pair in pairs for text in pair)
    with gzip.open(folder / "usr/share/doc/libreoffice-help-fi/changelog.Debian.gz", "rt") as changelog:
        version = changelog.readline()
    if "7.4.7" in version:  # what the top of corpora.py says
        assert len(pairs) == 29_684
        assert sum(all(len(corpora.WORD.findall(text)) >= 3 for text in pair) for pair in pairs) == 22_965
