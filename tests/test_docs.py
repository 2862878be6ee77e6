"""The README and the pages under docs/: their Python runs and prints what it says, their links and names lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest
import torch

from metacal.cli import _parser
from metacal.train.settings import configurations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number, content) of the fenced blocks in a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def promised(source: str) -> list[str]:
    """What a block says that it prints: the comment behind each ``print``, one per line of output."""
    return [comment or "" for comment in re.findall(r"^\s*print\(.*?\)(?:  # (.*))?$", source, re.MULTILINE)]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_run_and_print_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace per page, in the order of reading."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks((ROOT / name).read_text(encoding="utf-8"), "python"):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            # Leading newlines: a traceback shows the line of the page.
            exec(compile("\n" * (line - 1) + source, str(ROOT / name), "exec"), namespace)
        assert output.getvalue().splitlines() == promised(source), f"the block at {name}:{line}"


def test_there_are_blocks_and_they_promise_something() -> None:
    sources = {page.name: [source for _, source in blocks(page.read_text(encoding="utf-8"), "python")] for page in PAGES}
    assert len(sources["README.md"]) >= 3
    assert all(any(promised(source) for source in found) for found in sources.values() if found)


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_dotted_names_exist(name: str) -> None:
    text = without_code((ROOT / name).read_text(encoding="utf-8"))
    for dotted in {found for code in re.findall(r"`([^`]+)`", text) for found in re.findall(r"\bmetacal(?:\.[A-Za-z_]\w*)+", code)}:
        assert exists(dotted), f"{name} mentions {dotted}"


def exists(dotted: str) -> bool:
    """Whether it is a module, or an attribute (of an attribute ...) of one."""
    modules, *rest = dotted.split(".")
    value: object = importlib.import_module(modules)
    for part in rest:
        modules = f"{modules}.{part}"
        if not hasattr(value, part):
            try:
                importlib.import_module(modules)
            except ModuleNotFoundError:
                return False
        value = getattr(value, part)
    return True


def shell_lines() -> list[tuple[str, str]]:
    return [
        (page.name, line.split("#")[0].strip())
        for page in PAGES
        for language in ("sh", "bash")
        for _, block in blocks(page.read_text(encoding="utf-8"), language)
        for line in block.splitlines()
    ]


def test_shell_lines_name_packaged_configurations_and_known_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `metacal ...` line is one that the parser takes."""
    from metacal.train.settings import packaged, to_yaml

    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(to_yaml(packaged("tc2_digits")), encoding="utf-8")
    checked = 0
    for page, line in shell_lines():
        command = re.sub(r"^(\w+=\S+ )*(\S*/)?metacal ", "", line)
        if command == line or "--print_config" in line or "--help" in line:
            continue
        given = command.split()
        if given[0] == "pretrain":
            config = given[1]
            if "/" in config or config.endswith(".yaml"):
                given[1:2] = ["--config", "my.yaml"]
            else:
                assert config in configurations(), f"{page}: {line}"
                given[1:2] = []
        parser = _parser()
        parser.instantiate(parser.parse_args(given))  # SystemExit on what it does not know
        checked += 1
    assert checked >= 5


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line.split()[1] for _, line in shell_lines() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_the_transfer_table_has_its_place() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- transfer-table -->") == text.count("<!-- /transfer-table -->") == 1
    assert text.index("<!-- transfer-table -->") < text.index("<!-- /transfer-table -->")
