"""A report as one HTML file that needs nothing else: tables, curves and matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from metacal.train._files import replacing
from metacal.train.pictures import (
    Curves,
    Intervals,
    Matrix,
    Points,
    Series,
    draw_curves,
    draw_intervals,
    draw_matrix,
    draw_points,
    draw_series,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell: TypeAlias = "str | float | int | tuple[float, float] | None"
"""A number, a text, ``(mean, half-width of its interval)``, or None for what was not measured."""


@dataclass(frozen=True)
class Table:
    """Rows that map column names to cells; ``best`` says which columns are better high (``"max"``) or low (``"min"``)."""

    title: str
    rows: Sequence[Mapping[str, Cell]]
    best: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`write` lays out: each entry of ``intro`` and ``footnotes`` is a paragraph of plain text.

    ``figures`` are (title, note, figure) of matplotlib, as wide as they need to be and above the tables; ``extra`` is HTML for the
    end of the page, styles and scripts, which is taken as it is.
    """

    title: str
    intro: Sequence[str] = ()
    tables: Sequence[Table] = ()
    curves: Sequence[Curves] = ()
    matrices: Sequence[Matrix | Series] = ()
    maps: Sequence[Points] = ()
    footnotes: Sequence[str] = ()
    intervals: Sequence[Intervals] = ()
    figures: Sequence[tuple[str, str, Figure]] = ()
    extra: str = ""


def write(path: str | Path, report: Report) -> Path:
    """Writes the report as one HTML file without scripts or references to other files, readable in light and dark.

    Errors:
        ValueError: ``best`` names a column that no row has, or a matrix, a series or a map has another shape than its own.

    >>> import tempfile
    >>> table = Table("Probe", [{"method": "base", "accuracy": 0.91}, {"method": "TC²", "accuracy": 0.93}], {"accuracy": "max"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write(folder + "/report.html", Report("Digits", ["Two methods."], [table]))
    ...     '<td class="number best">0.93</td>' in path.read_text(encoding="utf-8")
    True
    """
    path = Path(path)
    page = _page(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _page(report: Report) -> str:
    wide = [_picture(title, note, figure, f"figure-{i}") for i, (title, note, figure) in enumerate(report.figures)]
    panels = [_picture(c.title, c.note, draw_intervals(c), f"intervals-{i}") for i, c in enumerate(report.intervals)]
    panels += [_picture(c.title, c.note, draw_curves(c), f"curves-{i}") for i, c in enumerate(report.curves)]
    matrices = [
        _picture(m.title, m.note, draw_series(m) if isinstance(m, Series) else draw_matrix(m), f"matrix-{i}")
        for i, m in enumerate(report.matrices)
    ]
    maps = [_picture(m.title, m.note, draw_points(m), f"map-{i}") for i, m in enumerate(report.maps)]
    sections = [
        "".join(f"<p>{escape(text)}</p>" for text in report.intro),
        f'<div class="panels wide">{"".join(wide)}</div>' if wide else "",
        "".join(_table(table) for table in report.tables),
        f'<div class="panels">{"".join(panels)}</div>' if panels else "",
        f'<div class="panels">{"".join(matrices)}</div>' if matrices else "",
        f'<div class="panels">{"".join(maps)}</div>' if maps else "",
        "<footer>" + "".join(f"<p>{escape(text)}</p>" for text in report.footnotes) + "</footer>" if report.footnotes else "",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(report.title)}</h1>\n" + "\n".join(filter(None, sections)) + f"\n</main>{report.extra}</body></html>\n"
    )


def _picture(title: str, note: str, figure: Figure, name: str) -> str:
    caption = f"<figcaption><strong>{escape(title)}</strong>{' ' + escape(note) if note else ''}</figcaption>"
    return f"<figure>{caption}{svg(figure, name)}</figure>"


# --- tables ---


def _table(table: Table) -> str:
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    unknown = [name for name in table.best if name not in columns]
    if unknown and table.rows:
        raise ValueError(f"`best` of the table '{table.title}' names '{unknown[0]}', which is no column: {', '.join(columns)}.")
    winners = {name: _winner(table, name) for name in table.best}
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(name), winners.get(name)) for name in columns) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    )


def _winner(table: Table, column: str) -> float | None:
    values = [value for row in table.rows if math.isfinite(value := _number(row.get(column)))]
    return (max if table.best[column] == "max" else min)(values, default=None)


def _number(cell: Cell) -> float:
    if isinstance(cell, tuple):
        return float(cell[0])
    return math.nan if cell is None or isinstance(cell, str) else float(cell)


def _cell(cell: Cell, winner: float | None) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    best = " best" if winner is not None and _number(cell) == winner else ""
    return f'<td class="number{best}">{_text(cell)}</td>'


def _text(cell: float | int | tuple[float, float] | None) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, tuple):
        return f"{cell[0]:.4g} ± {half_width(cell[1])}"
    return str(cell) if isinstance(cell, int) else f"{cell:.4g}"


def half_width(value: float) -> str:
    """Two digits, whole numbers from 100, and a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --rule: #dfe4ea; --best: #e3f3ea; --mark: #0b6b3a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #14181e; --rule: #2c343f; --best: #163626; --mark: #7fe0ab; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; border-bottom: 1px solid var(--rule); text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.number { text-align: right; }
.best { background: var(--best); color: var(--mark); font-weight: 700; }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: 2.2rem; }
figure { margin: 0; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption, .note, footer { color: var(--soft); font-size: .9rem; }
figcaption { max-width: 30rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); }
"""
