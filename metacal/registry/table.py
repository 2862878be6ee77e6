"""The table: all rows, one of them by its code, and its Markdown."""

from __future__ import annotations

import re

from metacal.registry.approximate import APPROXIMATE
from metacal.registry.exact import EXACT
from metacal.registry.implicit import IMPLICIT
from metacal.registry.initialisation import INITIALISATION
from metacal.registry.loops import SINGLE_LOOP
from metacal.registry.row import FAMILIES, Family, Method

METHODS: tuple[Method, ...] = (*EXACT, *APPROXIMATE, *IMPLICIT, *SINGLE_LOOP, *INITIALISATION)

_HEADER = ("method", "estimates", "bias", "cost", "memory", "needs", "reference")


def method(code: str) -> Method:
    """The row with that code.

    Errors: ValueError, with the codes that there are.
    """
    for row in METHODS:
        if row.code == code:
            return row
    raise ValueError(f"`code` should be one of the table's, got {code!r}. There are: {', '.join(row.code for row in METHODS)}.")


def markdown_table(family: Family | None = None) -> str:
    """The methods of a family as a Markdown table; by default all families, each under a line that says what they share.

    >>> print(markdown_table("initialisation").splitlines()[0])
    | method | estimates | bias | cost | memory | needs | reference |
    """
    if family is None:
        return "\n\n".join(f"**{title}.**\n\n{markdown_table(name)}" for name, title in FAMILIES.items())
    if family not in FAMILIES:
        raise ValueError(f"`family` should be one of {', '.join(FAMILIES)}, got {family!r}.")
    chosen = [row for row in METHODS if row.family == family]
    rows = [(f"`{row.code}`", row.estimates, row.bias, row.cost, row.memory, row.needs, row.reference) for row in chosen]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (_HEADER, ["---"] * len(_HEADER), *rows))


BLOCK = re.compile(r"(<!-- methods-table -->\n).*?(\n?<!-- /methods-table -->)", re.DOTALL)


def written(text: str) -> str:
    """``text`` with the table between its markers ``<!-- methods-table -->`` and ``<!-- /methods-table -->``.

    Errors: ValueError unless there is one pair of them.
    """
    if len(BLOCK.findall(text)) != 1:
        raise ValueError("`text` should hold one <!-- methods-table --> and after it one <!-- /methods-table -->, each on a line.")
    return BLOCK.sub(lambda found: f"<!-- methods-table -->\n{markdown_table()}\n<!-- /methods-table -->", text)
