"""Results as a table on the terminal, and as one HTML page with pictures, sortable tables and a conclusion per problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import pictures
from benchmarks.conclusions import conclusion, course_conclusion, ends
from benchmarks.measure import Row
from benchmarks.targets import FOR_THE_RECORD, Results, outcomes, table
from metacal.train import report as pages
from metacal.train.report import Cell, Report, Table
from metacal.train.summary import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PAGE = "results.jsonl", "report.html"
IN_README = ("quadratic", "ridge", "cleaning-mnist-50-samples", "mlp", "conv", "transformer")


def read(folder: str | Path) -> list[Row]:
    """The rows that a run wrote."""
    lines = (Path(folder) / RESULTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def write(folder: str | Path, results: Results) -> Path:
    """Writes ``report.html``, and its two main pictures as ``error.svg`` and ``memory.svg``."""
    folder = Path(folder)
    keys = list(dict.fromkeys(row["key"] for row in table(results, "hypergradients")))
    axes = dict.fromkeys(row["axis"] for row in table(results, "scaling"))
    better = "Left is cheaper, down is nearer to the exact hypergradient of the steps taken."
    figures = [
        ("Error against cost", better, pictures.errors(results, keys)),
        *((f"Growth with the {axis}", "", pictures.growth(results, axis)) for axis in axes),
        *_courses(results),
    ]
    title, extra = "Hypergradients: error, time and memory", f"<style>{_WIDE}</style><script>{_SORT}</script>"
    shown = Report(title, _intro(results, keys), _tables(results, keys), figures=figures, extra=extra)
    page = pages.write(folder / PAGE, shown)
    pictures.save(pictures.errors(results, [key for key in IN_README if key in keys] or keys[:6]), folder / "error.svg")
    pictures.save(pictures.growth(results, "steps", ("peak_bytes",)), folder / "memory.svg")
    return page


def printed(rows: Sequence[Row]) -> str:
    """The rows of one problem, as they stand on the terminal."""
    lines = [_line(row) for row in rows]
    return text_table([{name: cell[:60] if isinstance(cell, str) else cell for name, cell in line.items()} for line in lines])


def printed_targets(results: Results) -> str:
    """The table of targets, for the terminal."""
    return text_table([_target_line(outcome) for outcome in outcomes(results)])


def _courses(results: Results) -> list[tuple[str, str, Figure]]:
    """For every whole problem its scores against wall-clock, and the last against memory."""
    rows = table(results, "courses")
    by_problem = {name: [row for row in rows if row["problem"] == name] for name in dict.fromkeys(row["problem"] for row in rows)}
    note = "Full lines and discs: this library. Right: the end of the courses; those of equal hypergradients end in one place."
    return [(name, f"{course_conclusion(of_it)} {note}", pictures.courses(of_it)) for name, of_it in by_problem.items()]


# --- tables ---


def _tables(results: Results, keys: Sequence[str]) -> list[Table]:
    targets = Table("Targets", [_target_line(outcome) for outcome in outcomes(results)], note="Ratios within this run.")
    problems = [_problem_table(table(results, "hypergradients", key=key)) for key in keys]
    others = [
        Table("MAML, tasks per second", [_line(row) for row in table(results, "tasks")], {"tasks per second": "max"}),
        Table("A step of TC² beside one of its base objective", [_line(row) for row in table(results, "tc2")]),
        Table("Whole problems, at the end of each course", _last_points(results), {"accuracy %": "max", "F1": "max"}),
        Table("Scaling", [{"axis": row["axis"], "at": row["x"], **_line(row)} for row in table(results, "scaling")]),
    ]
    return [targets, *problems, *(shown for shown in others if shown.rows)]


def _problem_table(rows: Sequence[Row]) -> Table:
    name, steps = rows[0]["problem"], rows[0]["num_steps"]
    title = f"{name}: T = {steps}, {rows[0]['num_params']} params, {rows[0]['num_hparams']} hyperparameters"
    lines = [_line(row) for row in rows]
    best = {column: "min" for column in ("error", "seconds", "peak MB") if any(column in line for line in lines)}
    return Table(title, lines, best, conclusion(rows))  # type: ignore[arg-type]


def _line(row: Row) -> dict[str, Cell]:
    line: dict[str, Cell] = {"method": row["method"], "library": row["library"]}
    for column, value in _COLUMNS.items():
        found = value(row)
        if found is not None:
            line[column] = found if isinstance(found, str) else float(f"{found:.4g}")
    return line


_COLUMNS: dict[str, Callable[[Row], Any]] = {
    "error": lambda row: row.get("relative_error"),
    "cosine": lambda row: row.get("cosine"),
    "error to solution": lambda row: row.get("solution_error"),
    "seconds": lambda row: row.get("seconds"),
    "quartiles": lambda row: f"{row['seconds_q25']:.3g} - {row['seconds_q75']:.3g}" if row.get("seconds_q25") else None,
    "/ plain steps": lambda row: row.get("over_plain_steps"),
    "work": lambda row: row.get("work"),
    "peak MB": lambda row: row["peak_bytes"] / 1e6 if row.get("peak_bytes") else None,
    "tasks per second": lambda row: row.get("tasks_per_second"),
    "accuracy %": lambda row: 100 * row["accuracy"] if row.get("accuracy") is not None else None,
    "F1": lambda row: row.get("f1"),
    "remark": lambda row: row.get("unsupported") or row.get("failed") or row.get("warning", "").split(":")[0] or None,
}


def _target_line(outcome: Any) -> dict[str, Cell]:
    value: Cell = None if outcome.value is None else float(f"{outcome.value:.4g}")
    return {
        "case": outcome.case, "quantity": outcome.quantity, "value": value, "target": outcome.target,
        "": outcome.verdict, "methods": outcome.note,
    }  # fmt: skip


def _last_points(results: Results) -> list[dict[str, Cell]]:
    return [
        {
            "problem": row["problem"], "method": row["method"], "library": row["library"], "outer steps": row.get("outer_step"),
            "seconds": None if row.get("seconds") is None else float(f"{row['seconds']:.3g}"),
            "peak MB": row["peak_bytes"] / 1e6 if row.get("peak_bytes") else None,
            "accuracy %": None if row.get("accuracy") is None else round(100 * row["accuracy"], 2), "F1": row.get("f1"),
            "remark": row.get("unsupported") or row.get("failed") or "",
        }
        for row in ends(table(results, "courses"))
    ]  # fmt: skip


def _intro(results: Results, keys: Sequence[str]) -> list[str]:
    environment = next(iter(table(results, "environment")), {})
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items() if version)
    hardware = environment.get("gpu") or f"{environment.get('cpu')}, {environment.get('num_threads')} threads"
    judged = [outcome.verdict for outcome in outcomes(results) if outcome.target != FOR_THE_RECORD]
    problems = {key: table(results, "hypergradients", key=key) for key in keys}
    return [
        f"The {environment.get('size')} suite on {hardware}, {environment.get('started')}, commit {environment.get('git_commit')}, "
        f"{packages}.",
        "Errors are relative to the exact hypergradient of the steps that were taken, in float64. Seconds are medians of runs in which "
        "all methods take turns, with quartiles. Peak is what is allocated at one time beyond what was there before. Work counts the "
        "operations that torch's registry knows, in plain training steps. Every peer is used as its documentation shows.",
        f"Of the targets {judged.count('met')} are met, {judged.count('missed')} missed, {judged.count('not measured')} not measured.",
        *(f"{rows[0]['problem']}. {conclusion(rows)}" for rows in problems.values()),
    ]


_WIDE = ".wide figure { width: 100%; } .wide figcaption { max-width: none; } th { cursor: pointer; }"
_SORT = """
document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) => head.onclick = () => {
  const up = head.dataset.order !== "up";
  table.querySelectorAll("th").forEach(other => delete other.dataset.order);
  head.dataset.order = up ? "up" : "down";
  const body = table.tBodies[0];
  const key = row => { const text = row.cells[column].textContent; const x = parseFloat(text); return isNaN(x) ? text : x; };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))).forEach(row => body.append(row));
}));
"""
