"""A study as a page to read, and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from metacal.study.analysis import TRANSFER, Comparison, Correlation, Finding, compare, correlate, findings, overall
from metacal.study.plan import Settings, Study, cells
from metacal.study.runner import finished
from metacal.train import report
from metacal.train._files import replacing
from metacal.train.pictures import Intervals, Points, draw_intervals
from metacal.train.report import Cell, Report, Table
from metacal.train.results import read_results, scores_on
from metacal.train.summary import SCORES, collapse_notes

_COSTS = ("encoder images", "seconds per step")
_CONFLICT = (
    "conflict_rate",
    "conflict_severity",
    "resplit_conflict_rate",
    "resplit_conflict_severity",
    "uncalibrated_conflict_rate",
    "uncalibrated_conflict_severity",
    "transfer_to_others",
)
_CONFLICT_NOTE = (
    "After the last step. Rate: share of pairs of tasks with opposed gradients; severity: mean of min(cosine, 0). resplit: the same batch "
    "dealt again at random, the sampling noise of any deal. uncalibrated: the same tasks at the same weights without the calibrator."
)


def scores(found: Sequence[Finding]) -> list[str]:
    """The accuracies that some run has, the one that a study is judged by first."""
    return list(dict.fromkeys(m for f in found for m in f.values if m.endswith((" probe", " knn"))))


def others(found: Sequence[Finding]) -> list[str]:
    """What else some run was judged by."""
    return list(dict.fromkeys(m for f in found for m in f.values if m.endswith(tuple(f" {label}" for label in SCORES.values()))))


def differences(study: Study, found: Sequence[Finding], reference: str, measure: str) -> Intervals:
    """Every method's paired difference to one of them in one measure, at every place of the grid."""
    series: dict[str, dict[str, tuple[float, float]]] = {}
    for c in compare(study, found, [measure], reference):
        place = ", ".join(name for axis, name in c.names.items() if axis != study.axis) or measure
        series.setdefault(c.names[study.axis], {})[place] = (c.difference.mean, c.difference.half_width)
    if len(study.grid) > 1:
        for name, difference in overall(study, found, measure, reference).items():
            series[name]["mean of all"] = (difference.mean, difference.half_width)
    return Intervals(
        f"Against '{reference}'",
        series,
        f"difference in {measure}, points",
        note="Paired by seed; bars are 95% t-intervals of one comparison alone.",
    )


def page(study: Study, out: str | Path, path: str | Path | None = None) -> Path:
    """Writes ``study.html`` in the study's folder: the question, what was run, what came out, and where every figure comes from."""
    out = Path(out)
    found = findings(study, out)
    plan = cells(study)
    missing = [cell for cell in plan if not finished(out, cell)]
    run = f"{len(plan) - len(missing)} of {len(plan)} runs are finished: " + ", ".join(
        f"{len(names)} on axis '{axis}' ({', '.join(names)})" for axis, names in study.grid.items()
    )
    folders = [folder for f in found for folder in f.folders.values()]
    collapsed = [f"{folder}: {note}" for folder in folders for note in collapse_notes(scores_on(read_results(out / folder), study.split))]
    intro = [text for text in (study.question, f"{run}; seeds {', '.join(map(str, study.seeds))}; judged on {study.split} images.") if text]
    tables = [
        Table(
            "Every place of the grid",
            [_row(f, [*scores(found), *_COSTS]) for f in found],
            note="Accuracies in percent: mean ± half width of the 95% t-interval over seeds. Transfer probe: the mean linear probe of "
            "the data sets that were not trained on.",
        ),
        Table("Other scores", [_row(f, others(found)) for f in found], note="Accuracies in percent, as above."),
        Table("What was run", _settings(study), note="Settings that no row names are those of the base configuration and the defaults."),
        Table("Conflict between tasks", [_row(f, _CONFLICT) for f in found if _CONFLICT[0] in f.values], note=_CONFLICT_NOTE),
    ]
    tables += [
        Table(
            f"Against '{reference}', paired by seed",
            [_comparison_row(c) for c in compare(study, found, scores(found), reference)],
            note="Difference in points ± half width of its 95% interval. p: paired t-test; Holm: corrected for the comparisons of one "
            "method in one score. –: the same difference with every seed, which cannot be tested. Two seeds hardly can be.",
        )
        for reference in study.references
    ]
    judged_by = scores(found)[:1]
    correlated = [c for x in _CONFLICT[:2] for y in judged_by if (c := correlate(study, found, x, y)) is not None]
    drawn = [differences(study, found, reference, score) for reference in study.references for score in judged_by]
    ranks = [measure for measure in others(found) if measure.endswith(SCORES["rank_me"])]
    every = ["steps", *scores(found), *ranks, _CONFLICT[0], "seconds per step"]
    tables.append(
        Table(
            "Every run",
            [{"run": str(path), **{m: f.values.get(m, {}).get(seed) for m in every}} for f in found for seed, path in f.folders.items()],
            note=f"The folder {out.name} has one folder for each run, with its config.yaml, metrics.jsonl, results.json and log.txt.",
        )
    )
    footnotes = [
        *study.notes,
        *collapsed,
        *(f"{cell.path}: not finished" for cell in missing),
    ]
    shown = Report(
        study.title,
        intro,
        tables,
        intervals=[panel for panel in drawn if panel.series],
        maps=[_scatter(c) for c in correlated],
        footnotes=footnotes,
    )
    return report.write(path or out / "study.html", shown)


def _settings(study: Study) -> list[dict[str, Cell]]:
    """Every setting that the study writes, one per row, with the place of the grid that has it."""
    everywhere = {"base": study.base, **_flat(study.settings)}
    rows: list[dict[str, Cell]] = [{"where": "every run", "setting": name, "value": value} for name, value in everywhere.items()]
    for axis, names in study.grid.items():
        for name, settings in names.items():
            rows += [{"where": f"{axis}: {name}", "setting": key, "value": value} for key, value in _flat(settings).items()]
    return rows


def _flat(settings: Settings, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: str(value)}
    return found


def picture(study: Study, out: str | Path) -> Path | None:
    """Writes ``study.png``, the differences to the first reference in the first score; None without any."""
    found = findings(study, out)
    shown = differences(study, found, study.references[0], (scores(found) or [TRANSFER])[0])
    if not shown.series:
        return None
    with replacing(Path(out) / "study.png") as file:
        draw_intervals(shown).savefig(file, format="png", dpi=130, facecolor="white")
    return Path(out) / "study.png"


def _row(f: Finding, measures: Sequence[str]) -> dict[str, Cell]:
    row: dict[str, Cell] = {**f.names, "seeds": len(f.folders)}
    for measure in measures:
        interval = f.interval(measure)
        values = list(f.values.get(measure, {}).values())
        row[measure] = tuple(interval) if interval is not None else values[0] if values else None  # type: ignore[assignment]
    return row


def _scatter(c: Correlation) -> Points:
    return Points(
        f"{c.y} against {c.x}",
        [(x, y) for _, x, y in c.pairs],
        [name for name, _, _ in c.pairs],
        note=f"Every run, means over the place of the grid taken off; Spearman's rank correlation {c.rho:+.2f} over {len(c.pairs)} runs "
        f"(p = {c.p:.2g} if runs were independent).",
        x_label=c.x,
        y_label=f"{c.y}, points",
    )


def _comparison_row(c: Comparison) -> dict[str, Cell]:
    difference = (c.difference.mean, c.difference.half_width)
    p = {name: None if math.isnan(value) else value for name, value in (("p", c.p), ("Holm", c.p_holm))}
    return {**c.names, "score": c.measure, "difference": difference, "seeds": c.num_seeds, **p}


def markdown(study: Study, out: str | Path) -> str:
    """The scores, and their differences to each reference, as Markdown tables."""
    found = findings(study, out)
    names = list(study.grid)
    measures = scores(found)
    lines = _header([*names, "seeds", *measures])
    for f in found:
        cells_ = [_plain(_row(f, measures)[m]) for m in measures]
        lines.append("| " + " | ".join([*f.names.values(), str(len(f.folders)), *cells_]) + " |")
    for reference in study.references:
        lines += ["", f"Difference to '{reference}' in points, paired by seed (* where Holm's p < 0.05, of three seeds or more):", ""]
        compared = compare(study, found, measures, reference)
        lines += _header([*names, *measures])
        for place in dict.fromkeys(tuple(c.names.values()) for c in compared):
            here = {c.measure: c for c in compared if tuple(c.names.values()) == place}
            lines.append("| " + " | ".join([*place, *(_difference(here.get(m)) for m in measures)]) + " |")
    return "\n".join(lines) + "\n"


def _difference(c: Comparison | None) -> str:
    if c is None:
        return "–"
    half_width = "–" if math.isnan(c.difference.half_width) else f"{c.difference.half_width:.1f}"
    return f"{c.difference.mean:+.1f} ± {half_width}" + ("*" if c.significant else "")


def _header(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]


def _plain(cell: Cell) -> str:
    if cell is None or isinstance(cell, str):
        return cell or "–"
    return f"{cell[0]:.1f} ± {cell[1]:.1f}" if isinstance(cell, tuple) else f"{cell:.1f}"
