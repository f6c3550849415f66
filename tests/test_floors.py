"""The house has floors: what a module imports lies on its own floor or below, and no circle of modules exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: From the roof down to the ground. A name is a module or a package of gssf_triton, "" the package itself.
FLOORS = (
    {"", "__main__", "autotune", "command", "integrations", "nn", "training", "viz"},
    {"attention", "data", "losses", "metrics", "region_word", "retrieval", "similarity"},
    {"backend", "checks", "once", "operators", "precision", "processes", "remembered", "streaming", "tracing"},
    {"kernels"},
    {"console", "constants", "metric", "optional", "progress", "slices", "storage"},
)
#: Of the ground floor, what kernels may import: the metric's two weights and numbers, not files and consoles.
BELOW_KERNELS = {"constants", "metric"}
#: The only importer of the tuner: `import gssf_triton` registers it at the hook in kernels/choice.py.
IMPORTS_AUTOTUNE = {""}
#: What may be imported inside a function: a library that may be missing, or that is slow to import and rarely needed.
OPTIONAL = {
    "matplotlib": "extras command, data and viz",
    "PIL": "extras command and data",
    "platformdirs": "missing where the package is used from a clone",
    "tqdm": "extras command and data",
    "triton": "missing on most machines without a GPU",
}

#: Modules that import by a name that is known at run time only.
DYNAMIC = {
    "autotune.rehearsal": "a recorded launch names its kernel's module",
    "command.sheet": "a sheet's format decides what draws it",
    "kernels": "importing a kernel imports Triton, so `kernels.fold` does it at first use",
    "optional": "libraries of the extras",
}

Sources = dict[str, str]


def sources() -> Sources:
    """The source of each module by its name below gssf_triton: "losses" is losses/__init__.py."""
    found = {}
    # `rglob` does not follow links: the two linked folders are searched where they lie.
    for folder, prefix in (
        (ROOT / "gssf_triton", ()),
        (ROOT / "kernels", ("kernels",)),
        (ROOT / "autotune", ("autotune",)),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def floor(module: str) -> int | None:
    """0 is the ground; None for a module without a floor."""
    names = [len(FLOORS) - 1 - level for level, names in enumerate(FLOORS) if module.partition(".")[0] in names]
    return names[0] if names else None


class Import:
    """One name that a module imports: of the package (`ours`, below gssf_triton) or of a library."""

    def __init__(self, module: str, line: int, ours: str | None, library: str | None, function: str | None) -> None:
        self.module, self.line, self.ours, self.library, self.function = module, line, ours, library, function

    def __str__(self) -> str:
        name = lambda module: f"gssf_triton.{module}".rstrip(".")  # noqa: E731
        what = self.library if self.ours is None else name(self.ours)
        inside = f" inside {self.function}" if self.function else ""
        return f"{name(self.module)}, line {self.line}: imports {what}{inside}"


def _statements(node: ast.AST, function: str | None = None) -> Iterator[tuple[ast.Import | ast.ImportFrom, str | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, function
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from _statements(child, inner)


def imports(module: str, source: str, modules: Sources) -> Iterator[Import]:
    for statement, function in _statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert not statement.level, f"{module}: imports are absolute"
            base = str(statement.module)
            below = base.removeprefix("gssf_triton").lstrip(".")
            # `from package import module` is an import of the module, any other name one of the package.
            names = [
                f"{base}.{alias.name}" if f"{below}.{alias.name}".lstrip(".") in modules else base
                for alias in statement.names
            ]
        for name in dict.fromkeys(names):
            root, _, rest = name.partition(".")
            ours = rest if root == "gssf_triton" else None
            yield Import(module, statement.lineno, ours, None if ours is not None else root, function)


def graph(modules: Sources) -> list[Import]:
    return [found for module, source in modules.items() for found in imports(module, source, modules)]


def faulty_arrows(modules: Sources) -> list[str]:
    """Imports of a higher floor, of what kernels may not know, and of the tuner."""
    faults = []
    for found in graph(modules):
        if found.ours is None:
            continue
        above, below = floor(found.module), floor(found.ours)
        assert above is not None and below is not None, f"FLOORS lacks {found.module} or {found.ours}"
        source, target = found.module.partition(".")[0], found.ours.partition(".")[0]
        if below > above:
            faults.append(f"{found}: an arrow up")
        elif source == "kernels" and target not in {"kernels", *BELOW_KERNELS}:
            faults.append(f"{found}: kernels import {', '.join(sorted(BELOW_KERNELS))} alone")
        elif target == "autotune" and source not in {"autotune", *IMPORTS_AUTOTUNE}:
            faults.append(f"{found}: only `import gssf_triton` imports the tuner")
    return faults


def circles(modules: Sources) -> list[list[str]]:
    """Groups of modules that reach each other by imports (Tarjan's strongly connected components)."""
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for found in graph(modules):
        if found.ours is not None and found.ours != found.module:
            arrows[found.module].add(found.ours)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(arrows[module]):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                groups.append(sorted(stack[at:]))
            del stack[at:]

    for module in modules:
        if module not in index:
            visit(module)
    return groups


def needs_triton(modules: Sources) -> set[str]:
    """Kernels' modules whose import imports Triton."""
    found = graph(modules)
    needing = {each.module for each in found if each.library == "triton" and each.function is None}
    size = -1
    while size != len(needing):
        size = len(needing)
        needing |= {each.module for each in found if each.ours in needing and each.function is None}
    return {module for module in needing if module.startswith("kernels.")}


def hidden_imports(modules: Sources) -> list[str]:
    """Imports inside functions, but for optional libraries and for kernels that import Triton."""
    launched = needs_triton(modules)
    return [
        str(found)
        for found in graph(modules)
        if found.function and not (found.library in OPTIONAL if found.ours is None else found.ours in launched)
    ]


@pytest.fixture(scope="module")
def package() -> Sources:
    return sources()


def test_the_drawing_shows_the_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^(?:roof|features|shared|kernels|ground) +(.*)$", page, re.MULTILINE)
    assert [set(re.findall(r"[a-z_]+", line.partition(" .")[0])) for line in drawn] == [
        floor - {"", "__main__"} for floor in FLOORS
    ]


def test_arrows_point_down(package: Sources) -> None:
    assert not faulty_arrows(package)


def test_no_circle(package: Sources) -> None:
    assert not circles(package)


def test_imports_stand_at_the_top(package: Sources) -> None:
    assert not hidden_imports(package)


def dynamic_importers(modules: Sources) -> set[str]:
    """Modules that use `importlib.import_module` or `__import__`."""

    def name(node: ast.AST) -> object:
        return getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)

    return {
        module
        for module, source in modules.items()
        if any(name(node) in ("import_module", "__import__") for node in ast.walk(ast.parse(source)))
    }


def test_few_imports_are_dynamic(package: Sources) -> None:
    assert dynamic_importers(package) == set(DYNAMIC)


def test_every_optional_library_is_imported_so(package: Sources) -> None:
    assert {found.library for found in graph(package) if found.function} >= set(OPTIONAL)


PLANTED = {
    "": "from gssf_triton import nn\nimport gssf_triton.autotune",
    "nn": "from gssf_triton.losses.info_nce import info_nce",
    "autotune": "from gssf_triton.kernels import choice",
    "losses": "",
    "losses.info_nce": "from gssf_triton.kernels import stream\ndef f():\n    from gssf_triton.kernels import fold",
    "kernels.choice": "import gssf_triton.metric",
    "kernels.stream": "from gssf_triton.kernels.choice import choose",
    "kernels.fold": "import triton.language as tl",
    "metric": "import torch",
    "storage": "def f():\n    from platformdirs import user_cache_dir",
}


def test_a_sound_house_has_no_fault() -> None:
    assert faulty_arrows(PLANTED) == circles(PLANTED) == hidden_imports(PLANTED) == []


@pytest.mark.parametrize(
    "module, line, fault",
    [
        ("kernels.stream", "from gssf_triton.losses.info_nce import info_nce", "an arrow up"),
        ("kernels.stream", "from gssf_triton import storage", "kernels import constants, metric alone"),
        ("metric", "def f():\n    import gssf_triton.kernels.choice", "an arrow up"),
        ("nn", "import gssf_triton.autotune", "only `import gssf_triton` imports the tuner"),
    ],
)
def test_a_faulty_arrow_is_found(module: str, line: str, fault: str) -> None:
    (found,) = faulty_arrows(PLANTED | {module: f"{PLANTED[module]}\n{line}"})
    assert found.startswith(f"gssf_triton.{module}, line ") and found.endswith(fault)


def test_a_circle_is_found() -> None:
    planted = PLANTED | {"kernels.choice": "def f():\n    import gssf_triton.kernels.stream"}
    assert circles(planted) == [["kernels.choice", "kernels.stream"]]


@pytest.mark.parametrize(
    "line", ["import numpy", "from gssf_triton.kernels import choice", "from gssf_triton.losses import info_nce"]
)
def test_a_hidden_import_is_found(line: str) -> None:
    (found,) = hidden_imports(PLANTED | {"nn": f"class C:\n    def method(self):\n        {line}"})
    assert found.endswith("inside method")


@pytest.mark.parametrize(
    "source", ["importlib.import_module('x')", "from importlib import import_module as get", "f = __import__"]
)
def test_a_dynamic_import_is_found(source: str) -> None:
    assert dynamic_importers({"nn": source, "losses": "import importlib"}) == {"nn"}
