"""Results as a table on the terminal, and as one HTML page with pictures, sortable tables and a conclusion per problem."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Row
from benchmarks.targets import FOR_THE_RECORD, Results, least, outcomes, right, table
from metacal.train import report as pages
from metacal.train.pictures import LINES, RC
from metacal.train.report import Cell, Report, Table
from metacal.train.summary import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS, PAGE = "results.jsonl", "report.html"
_NEAR = 0.5  # further off than this an estimate is none of the number
FLOOR = 1e-16  # where an error of zero is drawn
NAMED = ("graph", "mixed", "forward", "CG 20", "Neumann 20", "first order")  # of the points; all names would cover each other
IN_README = ("quadratic", "ridge", "cleaning-mnist-50-samples", "mlp", "conv", "transformer")


def read(folder: str | Path) -> list[Row]:
    """The rows that a run wrote."""
    lines = (Path(folder) / RESULTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def write(folder: str | Path, results: Results) -> Path:
    """Writes ``report.html``, and its two main pictures as ``error.svg`` and ``memory.svg``."""
    folder = Path(folder)
    keys = list(dict.fromkeys(row["key"] for row in table(results, "hypergradients")))
    figures = [
        ("Error against cost", "Left is cheaper, down is nearer to the exact hypergradient of the steps taken.", _errors(results, keys)),
        *_growth(results),
        *_courses(results),
    ]
    title, extra = "Hypergradients: error, time and memory", f"<style>{_WIDE}</style><script>{_SORT}</script>"
    shown = Report(title, _intro(results, keys), _tables(results, keys), figures=figures, extra=extra)
    page = pages.write(folder / PAGE, shown)
    _save(_errors(results, [key for key in IN_README if key in keys] or keys[:6]), folder / "error.svg")
    _save(_memory(results), folder / "memory.svg")
    return page


def printed(rows: Sequence[Row]) -> str:
    """The rows of one problem, as they stand on the terminal."""
    lines = [_line(row) for row in rows]
    return text_table([{name: cell[:60] if isinstance(cell, str) else cell for name, cell in line.items()} for line in lines])


def printed_targets(results: Results) -> str:
    """The table of targets, for the terminal."""
    return text_table([_target_line(outcome) for outcome in outcomes(results)])


def conclusion(rows: Sequence[Row]) -> str:
    """What the numbers of one problem say, in a sentence or three."""
    ran = [row for row in rows if row.get("seconds") is not None and row["kind"] != "limit"]
    if not ran:
        return "Nothing ran."
    exact = [row for row in ran if right(row)]
    said = []
    fastest, leanest = least(exact, "seconds"), least(exact, "peak_bytes")
    if fastest and leanest:
        said.append(
            f"Exact: {_who(fastest)} is the fastest, {fastest['seconds']:.3g} s{_over(fastest)}; {_who(leanest)} is the leanest, "
            f"{leanest['peak_bytes'] / 1e6:.3g} MB, in {leanest['seconds']:.3g} s."
        )
    peer, own = (least((r for r in exact if (r["library"] == "metacal") == mine), "seconds") for mine in (False, True))
    if peer and own:
        faster = own["seconds"] <= peer["seconds"]
        share = max(own["seconds"], peer["seconds"]) / min(own["seconds"], peer["seconds"])
        first, second = (own, peer) if faster else (peer, own)
        said.append(f"{_who(first)} is {share:.2f} times as fast as {_who(second)}.")
    cheaper = [r for r in ran if r["kind"] != "exact" and fastest and r["seconds"] < fastest["seconds"]]
    near = least(cheaper, "relative_error")
    if near and fastest:
        share, off = near["seconds"] / fastest["seconds"], _percent(near["relative_error"])
        if near["relative_error"] <= _NEAR:
            said.append(f"Of what is cheaper than that, {_who(near)} is the nearest: off by {off} in {share:.2f} of the time.")
        else:
            said.append(f"Nothing cheaper is near: {_who(near)} is off by {off}.")
    elif fastest:
        said.append("Nothing approximate was cheaper.")
    solved = [r for r in ran if r["kind"] == "implicit" and r.get("solution_error") is not None]
    best = least(solved, "solution_error")
    if best:
        said.append(f"Against the solution's own hypergradient {_who(best)} is the nearest, {_percent(best['solution_error'])} off.")
    wrong = [f"{_who(row)} ({_percent(row.get('relative_error'))} off)" for row in ran if row["kind"] == "exact" and not right(row)]
    if wrong:
        said.append(f"Called exact, and not: {', '.join(wrong)}.")
    return " ".join(said)


def ends(rows: Iterable[Row]) -> list[Row]:
    """Of every course the last row."""
    return list({(row["problem"], row["method"]): row for row in rows}.values())


NEAR_BEST = 0.005  # of accuracy: less than what another draw of the test data would change


def course_conclusion(rows: Sequence[Row]) -> str:
    """Who learned most on one whole problem, and who came near that first."""
    learned = [row for row in rows if row.get("accuracy") is not None and row["outer_step"]]
    if not learned:
        return "Nothing ran."
    best = max(ends(learned), key=lambda row: (row["accuracy"], -row["seconds"]))
    first = min((row for row in learned if row["accuracy"] >= best["accuracy"] - NEAR_BEST), key=lambda row: row["seconds"])
    before = next((f" ({100 * row['accuracy']:.1f}% before)" for row in rows if row["library"] == "none"), "")
    return (
        f"{_who(best)} ends highest, at {100 * best['accuracy']:.1f}%{before} after {best['seconds']:.3g} s; {_who(first)} was the first "
        f"within half a point of that, after {first['seconds']:.3g} s."
    )


def _who(row: Row) -> str:
    return f"{row['method']} ({row['library']})" if row["library"] == "metacal" else str(row["method"])


def _over(row: Row) -> str:
    return f" or {row['over_plain_steps']:.2f} times the plain steps" if row.get("over_plain_steps") else ""


def _percent(x: float | None) -> str:
    if x is None:
        return "an unknown amount"
    return f"{100 * x:.2g}%" if 1e-4 <= x < 10 else f"{x:.1e}"


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


# --- pictures ---


def _colours(results: Results) -> dict[str, str]:
    libraries = dict.fromkeys(("metacal", *(row["library"] for row in results if row.get("library") not in (None, "torch", "none"))))
    return {library: LINES[i % len(LINES)] for i, library in enumerate(libraries)}


_MARKERS = {"exact": "o", "implicit": "s", "approximate": "^", "first order": "v"}


def _errors(results: Results, keys: Sequence[str]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(keys)))
    lines = max(1, math.ceil(len(keys) / columns))
    colours = _colours(results)
    with rc_context(RC):
        figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.5), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, key in zip(panels, keys, strict=False):
            _error_panel(axes, table(results, "hypergradients", key=key), colours)
        for axes in panels[len(keys) :]:
            axes.set_visible(False)
        _legend(figure, colours, _MARKERS)
    return figure


def _error_panel(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    over = any(row.get("over_plain_steps") for row in rows)
    for row in rows:
        error, cost = row.get("relative_error"), row.get("over_plain_steps" if over else "seconds")
        if error is None or cost is None:
            continue
        place = cost, max(error, FLOOR)
        axes.scatter(*place, s=22, color=colours[row["library"]], marker=_MARKERS[row["kind"]], alpha=0.85, linewidths=0)
        if row["library"] == "metacal" and row["method"] in NAMED:
            axes.annotate(row["method"], place, xytext=(3, 3), textcoords="offset points", fontsize=6.5)
    axes.set(xscale="log", yscale="log", xlabel="time / T plain steps" if over else "seconds", ylabel="relative error")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(rows[0]["problem"], fontsize="small")
    axes.grid(alpha=0.25)


def _legend(figure: Figure, colours: dict[str, str], markers: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=colour, marker="o", linestyle="", label=library) for library, colour in colours.items()]
    entries += [Line2D([], [], color="#777777", marker=marker, linestyle="", label=kind) for kind, marker in markers.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), frameon=False, fontsize="small")


_QUANTITIES = {"seconds": "seconds", "peak_bytes": "peak, bytes"}


def _growth(results: Results) -> list[tuple[str, str, Figure]]:
    rows = table(results, "scaling")
    axes = dict.fromkeys(row["axis"] for row in rows)
    return [(f"Growth with the {axis}", "", _growth_figure(results, axis, tuple(_QUANTITIES))) for axis in axes]


def _memory(results: Results) -> Figure:
    return _growth_figure(results, "steps", ("peak_bytes",))


def _growth_figure(results: Results, axis: str, quantities: Sequence[str]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, colours = table(results, "scaling", axis=axis), _colours(results)
    styles = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
    with rc_context(RC):
        figure = Figure(figsize=(5.6 * len(quantities), 4.2), layout="constrained")
        for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
            used: dict[str, int] = {}
            for method in dict.fromkeys(row["method"] for row in rows):
                points = [(row["x"], row[quantity]) for row in rows if row["method"] == method and row.get(quantity)]
                if not points:
                    continue
                library = next(row["library"] for row in rows if row["method"] == method)
                style = styles[used.get(library, 0) % len(styles)]
                used[library] = used.get(library, 0) + 1
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, linestyle=style, marker="o", markersize=3, color=colours.get(library, "#777777"), label=method)
            axes.set(xscale="log", yscale="log", xlabel="T, inner steps" if axis == "steps" else axis, ylabel=_QUANTITIES[quantity])
            axes.grid(alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


_SCORES = {"accuracy": "test accuracy", "f1": "F1"}


def _courses(results: Results) -> list[tuple[str, str, Figure]]:
    """For every whole problem its scores against wall-clock, and the last against memory."""
    rows = table(results, "courses")
    by_problem = {name: [row for row in rows if row["problem"] == name] for name in dict.fromkeys(row["problem"] for row in rows)}
    note = "Full lines and discs: this library. Right: the end of the courses; those of equal hypergradients end in one place."
    return [(name, f"{course_conclusion(of_it)} {note}", _course_figure(of_it)) for name, of_it in by_problem.items()]


def _course_figure(rows: Sequence[Row]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scores = [score for score in _SCORES if any(row.get(score) is not None for row in rows)]
    with rc_context(RC):
        figure = Figure(figsize=(4.8 * (1 + len(scores)), 4.2), layout="constrained")
        *over_time, over_memory = figure.subplots(1, 1 + len(scores))
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            course = [row for row in rows if row["method"] == method and row.get("accuracy") is not None and row["outer_step"]]
            if not course:
                continue
            own, last = course[0]["library"] == "metacal", course[-1]
            look: dict[str, Any] = {"color": LINES[i % len(LINES)], "label": method}
            for axes, score in zip(over_time, scores, strict=True):
                seconds = [row["seconds"] for row in course]
                axes.plot(seconds, [row[score] for row in course], "-" if own else "--", linewidth=1.4, **look)
            if last.get("peak_bytes"):
                over_memory.plot(last["peak_bytes"] / 1e6, last["accuracy"], "o" if own else "x", **look)
        for axes, score in zip(over_time, scores, strict=True):
            axes.set(xlabel="seconds of learning", ylabel=_SCORES[score])
        over_memory.set(xlabel="peak, MB", ylabel=_SCORES["accuracy"])
        for axes in (*over_time, over_memory):
            axes.set_xscale("log")
            axes.grid(alpha=0.25)
        handles, labels = over_time[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({**RC, "svg.fonttype": "path", "svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", facecolor="white", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


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
