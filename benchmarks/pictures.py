"""The pictures of a run's results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Row
from benchmarks.targets import Results, table
from metacal.train.pictures import LINES, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-16  # where an error of zero is drawn
NAMED = ("graph", "mixed", "forward", "CG 20", "Neumann 20", "first order")  # of the points; all names would cover each other


def _colours(results: Results) -> dict[str, str]:
    libraries = dict.fromkeys(("metacal", *(row["library"] for row in results if row.get("library") not in (None, "torch", "none"))))
    return {library: LINES[i % len(LINES)] for i, library in enumerate(libraries)}


_MARKERS = {"exact": "o", "implicit": "s", "approximate": "^", "first order": "v"}


def errors(results: Results, keys: Sequence[str]) -> Figure:
    """Error against cost, a panel for every problem."""
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


def growth(results: Results, axis: str, quantities: Sequence[str] = tuple(_QUANTITIES)) -> Figure:
    """Costs as one axis of the scaling grows, a panel for every quantity, a line for every method."""
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


def courses(rows: Sequence[Row]) -> Figure:
    """The scores of one whole problem against wall-clock, and the last against memory."""
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


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG that is the same for the same figure."""
    from matplotlib import rc_context

    with rc_context({**RC, "svg.fonttype": "path", "svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", facecolor="white", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
