"""What a report draws - curves, matrices, points, intervals - and how each is drawn, by matplotlib as SVG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in place of the page's text colour, which an inline SVG can refer to and matplotlib cannot.
INK = "#010203"
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")  # Okabe and Ito, for all eyes
RC = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Curves:
    """One panel of lines: ``{name: (steps, values)}``; ``log_x`` for what is measured at a few places of many magnitudes."""

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str = "step"
    y_label: str = ""
    note: str = ""
    log_x: bool = False


@dataclass(frozen=True)
class Matrix:
    """A K x K matrix, drawn with zero in the middle of its colours; ``rows`` and ``columns`` label it (default 1 ... K)."""

    title: str
    values: npt.ArrayLike  # [K, K]; a CPU tensor too
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    x_label: str = ""
    y_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Matrices [T, K, K] side by side, in one scale of colours: one matrix over time."""

    title: str
    values: npt.ArrayLike
    labels: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Points:
    """Points [N, 2] on a plane, coloured by the class of each, [N]; beyond 20 classes colours repeat.

    Without labels the axes have no marks, as those of a map have no meaning.
    """

    title: str
    points: npt.ArrayLike
    classes: Sequence[int] | Sequence[str]
    note: str = ""
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class Intervals:
    """Means with their intervals, a row for each place and a colour for each series: ``{series: {place: (mean, half width)}}``."""

    title: str
    series: Mapping[str, Mapping[str, tuple[float, float]]]
    x_label: str = ""
    note: str = ""


def draw_curves(curves: Curves) -> Figure:
    """The picture of :class:`Curves`: every line in a colour of its own."""
    from matplotlib import rc_context  # slow to import, and only here needed
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (steps, values)) in enumerate(curves.lines.items()):
            marker = "o" if len(steps) == 1 or curves.log_x else None
            label = f" {name}" if name.startswith("_") else name  # matplotlib leaves such names out of the legend
            axes.plot(steps, values, marker=marker, label=label, color=LINES[i % len(LINES)], linewidth=1.6)
        axes.set(xlabel=curves.x_label, ylabel=curves.y_label, xscale="log" if curves.log_x else "linear")
        if curves.log_x:
            places = sorted({float(x) for steps, _ in curves.lines.values() for x in steps})
            axes.set_xticks(places, [f"{x:g}" for x in places], fontsize="small")
            axes.minorticks_off()
        axes.grid(alpha=0.25)
        if curves.lines:
            axes.legend(frameon=False, fontsize="small")
    return figure


def draw_matrix(matrix: Matrix) -> Figure:
    """The picture of :class:`Matrix`: its entries as colours and numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = np.asarray(matrix.values, dtype=float)
    if values.ndim != 2:
        raise ValueError(f"`values` of the matrix '{matrix.title}' should have two dimensions, got shape {values.shape}.")
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    num_rows, num_columns = values.shape
    with rc_context({**RC, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(1.6 + 0.5 * num_columns, 1.2 + 0.5 * num_rows), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest)
        figure.colorbar(image, shrink=0.8).outline.set_visible(False)
        axes.set(xlabel=matrix.x_label, ylabel=matrix.y_label)
        axes.set_xticks(range(num_columns), matrix.columns or [str(i + 1) for i in range(num_columns)])
        axes.set_yticks(range(num_rows), matrix.rows or [str(i + 1) for i in range(num_rows)])
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * largest else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize="small", color=color if np.isfinite(value) else INK)
    return figure


def draw_series(series: Series) -> Figure:
    """The picture of :class:`Series`: one panel for each matrix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = np.asarray(series.values, dtype=float)
    if values.ndim != 3 or len(values) != len(series.labels) or not len(values):
        raise ValueError(
            f"`values` of the series '{series.title}' should be [T, K, K], one matrix for each of its {len(series.labels)} labels; got "
            f"shape {values.shape}."
        )
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    with rc_context({**RC, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(0.9 + 1.5 * len(values), 1.8), layout="constrained")
        panels = figure.subplots(1, len(values), squeeze=False)[0]
        for axes, matrix, label in zip(panels, values, series.labels, strict=True):
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
            axes.set_title(label, fontsize="small")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(image, ax=list(panels), shrink=0.8).outline.set_visible(False)
    return figure


def draw_points(shown: Points) -> Figure:
    """The picture of :class:`Points`: every class in a colour of its own."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    points, classes = np.asarray(shown.points, dtype=float), np.asarray(shown.classes)
    if points.ndim != 2 or points.shape[1] != 2 or classes.shape != points.shape[:1]:
        raise ValueError(
            f"`points` of the map '{shown.title}' should be [N, 2] with one class each; got shapes {points.shape} and {classes.shape}."
        )
    names = np.unique(classes)
    with rc_context(RC):
        figure = Figure(figsize=(5.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            x, y = points[classes == name].T
            axes.scatter(
                x, y, s=9, color=colormaps["tab10" if len(names) <= 10 else "tab20"](i % 20), label=str(name), linewidths=0, alpha=0.8
            )
        axes.set(xlabel=shown.x_label, ylabel=shown.y_label)
        if not (shown.x_label or shown.y_label):
            axes.set_xticks([])
            axes.set_yticks([])
        if len(names) <= 20:
            axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    return figure


def draw_intervals(shown: Intervals) -> Figure:
    """The picture of :class:`Intervals`: the places from top to bottom, the series side by side, a line at zero."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(place for values in shown.series.values() for place in values))
    with rc_context(RC):
        figure = Figure(figsize=(6.4, 1.1 + 0.19 * len(places) * (len(shown.series) + 1)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0.0, color=INK, linewidth=0.8)
        for i, (name, values) in enumerate(shown.series.items()):
            height = [places.index(place) + 0.8 * ((i + 0.5) / len(shown.series) - 0.5) for place in values]
            means, halves = zip(*values.values(), strict=True) if values else ((), ())
            axes.errorbar(means, height, xerr=halves, fmt="o", markersize=4, linewidth=1.4, color=LINES[i % len(LINES)], label=name)
        axes.set_yticks(range(len(places)), places)
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xlabel(shown.x_label)
        axes.grid(alpha=0.25, axis="x")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element whose ink is the text colour of the page; ``name`` is another one for each picture of a page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The salt makes the ids that clip paths refer to the same on every run and different in each picture.
    with rc_context({**RC, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # groups' names, which would repeat from picture to picture
    return svg.replace(INK, "currentColor")
