"""The examples in the docstrings run, each public name has one, and configurations name all their fields."""

import dataclasses
import doctest
import inspect
import re
from types import ModuleType

import pytest
from cases.public import NAMES, public


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}".rstrip(".") for module, name in NAMES])
def test_example(module, name, tmp_path, monkeypatch, one_thread_and_pythons_ctrl_c):
    monkeypatch.chdir(tmp_path)  # "results" is written there
    thing = public(module)[name]
    text = inspect.getdoc(thing)
    assert text and "Example:\n" in text, "no example"
    test = doctest.DocTestParser().get_doctest(text, {}, name or module, module, 0)
    assert test.examples, "no example"
    failures = []
    doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_a_wrong_example_is_seen():
    failures = []
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", "", 0)
    doctest.DocTestRunner().run(test, out=failures.append)
    assert failures


@pytest.mark.parametrize(
    ("module", "name"), [pair for pair in NAMES if not isinstance(public(pair[0])[pair[1]], ModuleType)]
)
def test_dataclasses_name_all_their_fields(module, name):
    thing = public(module)[name]
    if not dataclasses.is_dataclass(thing):
        return
    attributes = inspect.getdoc(thing).partition("Attributes:")[2]
    named = {word for line in re.findall(r"^    (\w+(?:, \w+)*):", attributes, re.M) for word in line.split(", ")}
    assert {field.name for field in dataclasses.fields(thing)} <= named
