"""The pages of the documentation: all public names have a place and their example, and no link leads nowhere."""

import importlib.util
import re
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from cases.public import NAMES, public

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """A page's anchors, links and pictures, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.text = set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def builder() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(builder, tmp_path_factory) -> dict[str, Page]:
    folder = tmp_path_factory.mktemp("pages")
    builder.build(folder)
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")} | {
        path.name: None for path in folder.iterdir() if path.suffix in (".png", ".js")
    }


def test_every_public_name_has_a_place_and_its_example(pages):
    for module, name in NAMES:
        page = pages[f"{module.replace('.', '/')}.html"]
        thing = public(module)[name]
        assert not name or isinstance(thing, types.ModuleType) or name in page.anchors, (module, name)
        first = re.search(r"^>>> (.*)$", thing.__doc__.partition("Example:\n")[2].replace("    ", ""), re.M)[1]
        assert first in page.text, (module, name)


def test_no_link_leads_nowhere(pages):
    count = 0
    for name, page in pages.items():
        for link in [] if page is None else page.links:
            if re.match("https?:|data:", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (Path("/", name).parent / path).as_posix() if path else f"/{name}"
            parts = []
            for part in target.strip("/").split("/"):
                parts = parts[:-1] if part == ".." else [*parts, part]
            target = "/".join(parts)
            assert target in pages, f"{name}: {link}"
            assert not anchor or anchor in pages[target].anchors, f"{name}: {link}"
            count += 1
    assert count > 300 and pages.keys() >= {"index.html", "coming_from.html", "examples.html", "speedups.png"}


def test_pages_link_to_each_other(pages):
    reached, open_ = set(), ["index.html"]
    while open_:
        name = open_.pop()
        if name not in reached and pages.get(name) is not None:
            reached.add(name)
            here = Path("/", name).parent
            inside = [link.partition("#")[0] for link in pages[name].links if not re.match("https?:|data:|#", link)]
            open_ += [(here / path).resolve().relative_to("/").as_posix() for path in inside]
    assert reached == {name for name, page in pages.items() if page is not None}


def test_a_link_to_another_file_is_refused(builder, tmp_path):
    with pytest.raises(ValueError, match="expected links to pictures and to README.md, .*, got setup.py"):
        builder.linked("[the set-up](setup.py)", ROOT / "README.md", tmp_path)


def test_modules_of_the_reference_are_all_there_are(builder):
    inside = {"kernels", "ops", "reference"}
    folders = {path.parent.name for path in (ROOT / "pynlp").glob("*/__init__.py")} - inside
    assert {f"pynlp.{name}" for name in folders} <= set(builder.MODULES)
