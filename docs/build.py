"""The documentation as web pages: the reference, made from the docstrings, and the texts of the repository.

`python docs/build.py [folder]`, by default into build/docs.
"""

import os
import re
import shutil
import sys
import textwrap
import warnings
from pathlib import Path

import pdoc
from pdoc import doc, render

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "pynlp", "pynlp.functional", "pynlp.nn", "pynlp.models", "pynlp.decoding", "pynlp.training", "pynlp.quantize",
    "pynlp.integrations", "pynlp.integrations.flash_attn", "pynlp.integrations.transformers",
    "pynlp.integrations.bitsandbytes", "pynlp.probes",
)  # fmt: skip
PAGES = {  # text, the page that it becomes, and its title
    "README.md": ("index.html", "Overview"),
    "docs/coming_from.md": ("coming_from.html", "Coming from other libraries"),
    "examples/README.md": ("examples.html", "Examples"),
    "benchmarks/FIGURES.md": ("figures.html", "Figures"),
}


def build(folder: Path) -> None:
    """Write all pages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Cannot determine where", UserWarning)  # methods that torch makes
    render.configure(docformat="google", show_source=False, template_directory=ROOT / "docs" / "templates")
    modules = {name: doc.Module.from_name(name) for name in MODULES}
    render.env.filters["fenced"] = fenced
    render.env.globals["version"] = modules["pynlp"].obj.__version__
    for name, module in modules.items():
        # Those that are imported on first use are in no __all__.
        module.submodules = [other for child, other in modules.items() if child.rpartition(".")[0] == name]
        write(folder / f"{name.replace('.', '/')}.html", render.html_module(module, modules))
    write(folder / "search.js", render.search_index(modules))
    for source, (page, title) in PAGES.items():
        text = linked((ROOT / source).read_text(encoding="utf-8"), ROOT / source, folder)
        pages = [(name, link) for link, name in PAGES.values()]
        template = render.env.get_template("page.html.jinja2")
        write(folder / page, template.render(text=text, title=title, pages=pages, all_modules=modules))


def fenced(docstring: str) -> str:
    """A docstring whose example is a block of code, which pdoc loses in a section."""
    text, heading, example = docstring.partition("Example:\n")
    return f"{text}###### Example:\n```pycon\n{textwrap.dedent(example).strip()}\n```\n" if heading else text


def linked(text: str, source: Path, folder: Path) -> str:
    """A text with links to the pages instead of the files; pictures are copied beside them.

    Raises:
        ValueError: a link leads to a file that is neither.
    """

    def link(found: re.Match) -> str:
        path, anchor = found[1], found[2] or ""
        target = (source.parent / path).resolve()
        if (name := os.path.relpath(target, ROOT)) in PAGES:
            return f"]({PAGES[name][0]}{anchor})"
        if target.suffix != ".png":
            raise ValueError(f"{source}: expected links to pictures and to {', '.join(PAGES)}, got {path}")
        shutil.copy(target, folder)
        return f"]({target.name})"

    return re.sub(r"\]\(([^:)#]+)(#[^)]*)?\)", link, text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs")
    build(target)
    print(f"{target / 'index.html'} (pdoc {pdoc.__version__})")
