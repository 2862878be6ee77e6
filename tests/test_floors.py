"""The floors of the house: a file imports only from lower floors, and `import metacal` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "metacal"

# From the ground up. A name is a file of metacal/ or a folder (every file in it); what shares a line may not import each
# other, except inside one folder, where imports must not run in a circle.
FLOORS = (
    ("_typing", "_safe", "_dropout", "_lifeline"),
    ("tree",),
    ("_ambient", "_checks", "_random", "_device"),
    ("modules",),
    ("_fastest", "derivatives", "optim", "tasks", "objectives", "nets"),
    ("operators", "batches"),
    ("linear", "_compile", "_objective"),
    ("inner",),
    ("solvers",),
    ("adjoints",),
    ("estimate",),
    ("bilevel",),
    ("single_loop",),
    ("registry",),
    ("algorithms", "tc2"),
    ("data", "diagnostics"),
    ("evaluate",),
    ("train",),
    ("study", "demo"),
    ("cli",),
    ("__main__",),
    ("__init__",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
HEAVY = ("kornia", "sklearn", "tensorboard", "jsonargparse", "matplotlib")


def files(package: Path) -> dict[str, Path]:
    """Every file by its dotted name within the package; a folder's `__init__` has the folder's name."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The files of the package that a file imports, also lazily or for type checking only."""

    def resolve(dotted: str) -> str:
        """`tree.map` is in `tree`; what is no file's name lives in the package's `__init__`."""
        parts = dotted.split(".") if dotted else []
        while parts and ".".join(parts) not in known:
            parts.pop()
        return ".".join(parts) or "__init__"

    is_package = path.name == "__init__.py"
    here = [] if name == "__init__" else name.split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            level = node.level - is_package
            origin = "metacal." + ".".join(here[: len(here) - level]) if node.level else ""
            module = ".".join(part for part in (origin.rstrip("."), node.module) if part)
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {resolve(t.removeprefix("metacal").lstrip(".")) for t in targets if t.split(".")[0] == "metacal"}
    return found - {name}


def violations(package: Path) -> list[str]:
    paths = files(package)
    graph = {name: imports(name, path, set(paths)) for name, path in paths.items()}
    complaints = []
    for name, targets in sorted(graph.items()):
        unit = name.split(".")[0]
        if unit not in FLOOR_OF:
            complaints.append(f"{name} has no floor")
            continue
        for target in sorted(targets):
            other = target.split(".")[0]
            if other != unit and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[unit]:
                complaints.append(f"{name} imports {target}, which is not on a lower floor")
    return complaints + [f"{name} imports itself through {via}" for name, via in _circles(graph)]


def _circles(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    # A folder's __init__ gathers its files; a file inside that needs a sibling names it, so circles are real ones.
    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting.extend(new)
        return found

    return [(name, via) for name in sorted(graph) for via in sorted(graph[name]) if name in reached(via)]


def test_files_import_from_lower_floors_only() -> None:
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("files_written", "complaint"),
    [
        ({"tree.py": "from metacal.inner import run"}, "tree imports inner, which is not on a lower floor"),
        ({"tree.py": "def f():\n    import metacal.inner"}, "tree imports inner, which is not on a lower floor"),
        ({"tree.py": "from . import inner"}, "tree imports inner, which is not on a lower floor"),
        ({"tree.py": "from metacal import solve"}, "tree imports __init__, which is not on a lower floor"),
        ({"data/mnist.py": "from ..diagnostics import work"}, "data.mnist imports diagnostics, which is not on a lower floor"),
        ({"attic.py": ""}, "attic has no floor"),
        ({"tc2/a.py": "from metacal.tc2.b import x", "tc2/b.py": "from metacal.tc2.a import y"}, "tc2.a imports itself through tc2.b"),
        ({"inner.py": "import torch\nfrom metacal import tree\nfrom ._typing import Tree"}, None),
        ({"tc2/__init__.py": "from metacal.tc2.a import x", "tc2/a.py": "from .b import x", "tc2/b.py": "x = 1"}, None),
    ],
)
def test_the_rule_sees_what_it_should(tmp_path: Path, files_written: dict[str, str], complaint: str | None) -> None:
    for name in ("__init__.py", "_typing.py", "tree.py", "inner.py", "diagnostics.py"):
        (tmp_path / name).write_text("")
    for name, text in files_written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = violations(tmp_path)
    assert found[:1] == ([complaint] if complaint else [])


def test_the_top_only_re_exports() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    assert ast.get_docstring(ast.Module(body, [])), "the package needs a docstring"
    assert [ast.unparse(node) for node in body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom))] == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    probe = f"import sys, metacal; print(*[m for m in ('torch', 'torchopt', *{HEAVY!r}) if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["torch", "torchopt"]
