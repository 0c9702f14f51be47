"""The rules of the house, each a function of the tree's root that gives one line for every place which breaks it.

Rooms, from the ground up: kernels, reference, `_C`, what is loaded (backends) and the version; probes; ops; functional
and info; nn; models and what stands beside them; the package and its command. A module imports from its own room and
from lower ones.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LEVELS = (
    ("kernels", "reference", "_C", "backends", "version"),
    ("probes",),
    ("ops",),
    ("functional", "info"),
    ("nn",),
    ("models", "decoding", "training", "quantize"),
    ("integrations",),
    ("__init__",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FAMILY_ROOMS = ("kernels", "reference", "ops", "csrc")  # in which families have folders
SHARED = {"common", "targets", "simd", "gemm", "probes"}  # folders there that no family owns, and that know none
ALLOWED = {("moe", "quantization")}  # of families: MoE uses the number formats
SOURCES = ("pynlp", "kernels", "csrc", "benchmarks", "examples", "tests")
LINES, MODULES, ARGUMENTS = 500, 15, 30
RIDDLES = re.compile(r"(Of|As|With|Those|That)\b")


def sources(root: Path, *suffixes: str, folders=SOURCES) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*") if path.suffix in suffixes)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules(root: Path) -> dict[str, Path]:
    """The files by the names under which they are imported; a package by that of its folder."""
    found = {}
    for path in sources(root, ".py", folders=("pynlp", "kernels", "benchmarks", "examples")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] == "kernels":
            parts = ("pynlp", *parts)
        elif parts[0] == "examples":  # in the import path
            parts = parts[1:]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(root: Path, name: str) -> list[tuple[int, str]]:
    """(line, module) of each module of the house that this one imports, anywhere in its code."""
    known, path, found = modules(root), modules(root)[name], []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            wanted = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        found += [(node.lineno, module) for module in dict.fromkeys(wanted) if module in known]
    return found


def room_of(module: str) -> str:
    """The part of pynlp that a module is in."""
    return (module.split(".") + ["__init__"])[1]


def downward(root: Path) -> Iterator[str]:
    """Imports lead into the own room or a lower one; back ends, which are on the ground, so never import each other."""
    for name, path in modules(root).items():
        inside = name.split(".")[0] == "pynlp"
        for line, module in imports(root, name):
            where = f"{path.relative_to(root)}:{line}: imports {module}"
            if not inside:
                continue
            if module.split(".")[0] != "pynlp":
                yield f"{where}, which is outside pynlp"
                continue
            rooms = room_of(name), room_of(module)
            unknown = [room for room in rooms if room not in LEVEL]
            if unknown:
                yield f"{where}: no level is known for {unknown[0]}"
            elif rooms[0] != rooms[1] and LEVEL[rooms[1]] >= LEVEL[rooms[0]]:
                yield f"{where}, which is not below {rooms[0]}"


def families_apart(root: Path) -> Iterator[str]:
    """No family imports or includes another, but MoE the number formats; what all share knows no family."""
    for name, path in modules(root).items():
        own = name.split(".")[1:]
        for line, module in imports(root, name):
            other = module.split(".")[1:]
            if len(own) > 1 and len(other) > 1 and own[0] in FAMILY_ROOMS and other[0] in FAMILY_ROOMS:
                yield from _apart(own[1], other[1], f"{path.relative_to(root)}:{line}: imports {module}")
    csrc = root / "csrc"
    for path in sources(root, ".h", ".cpp", folders=("csrc",)):
        own = path.relative_to(csrc).parts[0]
        for line, include in _includes(path):
            target = (path.parent / include).resolve()
            if own != "bindings" and target.is_relative_to(csrc.resolve()):
                other = target.relative_to(csrc.resolve()).parts[0]
                yield from _apart(own, other, f"{path.relative_to(root)}:{line}: includes {include}")


def _includes(path: Path) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if found := re.match(r'\s*#\s*include\s*[<"]([^>"]+)', text):
            yield line, found[1]


def _apart(own: str, other: str, where: str) -> Iterator[str]:
    if own != other and other not in SHARED and (own, other) not in ALLOWED:
        yield f"{where}, {'of a family' if own in SHARED else 'of another family'}"


def torch_in_bindings_only(root: Path) -> Iterator[str]:
    """Native code beside csrc/bindings knows neither torch nor Python."""
    for path in sources(root, ".h", ".cpp", folders=("csrc",)):
        for line, include in _includes(path):
            if path.parent.name != "bindings" and re.match("torch/|ATen/|c10/|pybind11/|Python.h", include):
                yield f"{path.relative_to(root)}:{line}: includes {include}"


def no_circles(root: Path) -> Iterator[str]:
    """No module imports itself by way of others, at any level of its code."""
    graph = {name: sorted({module for _, module in imports(root, name)}) for name in modules(root)}
    done = set()

    def visit(name, way):
        if name in way:
            yield " -> ".join([*way[way.index(name) :], name])
        elif name not in done:
            for module in graph[name]:
                yield from visit(module, [*way, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def scripts_apart(root: Path) -> Iterator[str]:
    """What is run as a script is imported by no other module."""
    scripts = {name for name, path in modules(root).items() if re.search(r"^if __name__ ==", path.read_text(), re.M)}
    for name, path in modules(root).items():
        for line, module in imports(root, name):
            if module in scripts and module != name:
                yield f"{path.relative_to(root)}:{line}: imports the script {module}"


def short_files(root: Path) -> Iterator[str]:
    for path in sources(root, ".py", ".h", ".cpp"):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > LINES:
            yield f"{path.relative_to(root)}: {count} lines, at most {LINES}"


def small_folders(root: Path) -> Iterator[str]:
    """A header and its source are one module."""
    files = {path.with_suffix("") for path in sources(root, ".py", ".h", ".cpp")}
    files = [path for path in files if path.name not in ("__init__", "__main__")]
    for folder in sorted({path.parent for path in files}):
        count = sum(path.parent == folder for path in files)
        if count > MODULES:
            yield f"{folder.relative_to(root)}: {count} modules, at most {MODULES}"


def short_signatures(root: Path) -> Iterator[str]:
    """The arguments of functions that Triton compiles, constants too."""
    for path in sources(root, ".py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and any(
                re.fullmatch(r"(triton\.)?jit", ast.unparse(getattr(d, "func", d))) for d in node.decorator_list
            ):
                a = node.args
                count = len(a.posonlyargs + a.args + a.kwonlyargs)
                if count > ARGUMENTS:
                    yield f"{path.relative_to(root)}:{node.lineno}: {node.name} has {count} arguments"


def kernels_is_no_package(root: Path) -> Iterator[str]:
    """The Hugging Face package `kernels` is looked up by that name; the families' folders are packages."""
    if (root / "kernels/__init__.py").exists():
        yield "kernels/__init__.py: makes a package of the folder"
    for folder in sorted({path.parent for path in sources(root, ".py", folders=("kernels",))} - {root / "kernels"}):
        if not (folder / "__init__.py").exists():
            yield f"{folder.relative_to(root)}: has no __init__.py"


def plain_docstrings(root: Path) -> Iterator[str]:
    """A docstring begins with a noun or a verb, and can be read without the signature."""
    for path in sources(root, ".py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if RIDDLES.match(text):
                    yield f"{path.relative_to(root)}:{node.body[0].lineno}: {text.splitlines()[0]}"


RULES = (
    downward, families_apart, torch_in_bindings_only, no_circles, scripts_apart, short_files, small_folders,
    short_signatures, kernels_is_no_package, plain_docstrings,
)  # fmt: skip
