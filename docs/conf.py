"""Builds the pages as a site: `pip install -e '.[docs]' && sphinx-build -W docs build/docs`."""

from pathlib import Path
from typing import Any

project = "metacal"
author = "The metacal authors"
extensions = ["myst_parser"]
html_theme = "furo"
myst_heading_anchors = 3  # links to headings, as GitHub has them

_PAGES = sorted(page.stem for page in Path(__file__).parent.glob("*.md") if page.stem != "index")
_CONTENTS = "\n".join(["", "```{toctree}", ":hidden:", "", *_PAGES, "```", ""])


def _add_contents(app: Any, name: str, source: list[str]) -> None:
    # Sphinx wants a directive that plain markdown does not have; this way the pages stay readable anywhere.
    if name == "index":
        source[0] += _CONTENTS


def setup(app: Any) -> None:
    app.connect("source-read", _add_contents)
