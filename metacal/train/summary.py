"""Runs as tables, curves and matrices: what is printed and what a report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metacal.train.experiment import RESULTS, write_results
from metacal.train.logs import read_metrics
from metacal.train.report import Cell, Curves, Matrix, Report, Table

_CURVES = {
    "loss": "training loss (not comparable between methods)",
    "conflict_rate": "conflict rate: share of task pairs with opposed gradients",
    "resplit_conflict_rate": "the same after splitting the same batch again: its sampling noise",
    "transfer_to_others": "transfer: how much a step on one task lowers the others' query loss",
    "calibration_loss": "calibrator's outer loss",
    "calibration_error": "share of the representation that calibration drops",
    "hoyer_sparsity": "sparsity of the weights (Hoyer)",
}


def read_results(folder: str | Path) -> dict[str, Any]:
    """A run's results.json, ``{}`` if there is none yet."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_scores(folder: str | Path, results: dict[str, Any], scores: Mapping[str, Mapping[str, float]], split: str) -> None:
    """Adds scores to a run's results.json; those on validation images stand apart from those on test images."""
    key = "scores" if split == "test" else "validation_scores"
    write_results(folder, {**results, key: {**results.get(key, {}), **scores}})


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Cell]]:
    """One row per run and data set, accuracies in percent."""
    return [
        {
            "run": run,
            "data": data,
            "linear probe %": round(100 * found["probe"], 2),
            "kNN %": round(100 * found["knn"], 2),
            "RankMe": round(found["rank_me"], 1),
            "collapsed": "yes" if found["collapsed"] else "no",
        }
        for run, by_data in scores.items()
        for data, found in by_data.items()
    ]


def print_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Prints the table of :func:`score_rows`."""
    print(text_table(score_rows(scores)))


def text_table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Rows as aligned text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in [columns, *cells]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(cell: Cell) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def summarise(runs: Mapping[str, Path], *, title: str = "metacal runs", intro: Sequence[str] = (), tables: Sequence[Table] = ()) -> Report:
    """A report on runs by name: their scores, curves, and last conflict and transfer matrices."""
    results = {name: read_results(folder) for name, folder in runs.items()}
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    scores = {name: found["scores"] for name, found in results.items() if "scores" in found}
    sets = {data for found in scores.values() for data in found}
    best: dict[str, Any] = {"linear probe %": "max", "kNN %": "max"} if len(sets) == 1 else {}  # one set's scores do not beat another's
    curves = []
    for metric, meaning in _CURVES.items():
        lines = {name: [(row["step"], row[metric]) for row in rows if metric in row] for name, rows in metrics.items()}
        drawn = {name: ([s for s, _ in points], [v for _, v in points]) for name, points in lines.items() if points}
        if drawn:
            curves.append(Curves(metric.replace("_", " "), drawn, note=meaning))
    matrices = []
    for name, found in results.items():
        if "cosines" in found:
            matrices.append(
                Matrix(f"{name}: conflict", found["cosines"], x_label="task", y_label="task", note="cosines between the tasks' gradients")
            )
            matrices.append(
                Matrix(
                    f"{name}: transfer", found["transfer"], x_label="judged task j", y_label="adapted to task i",
                    note="T(i, j): by how much a step on task i lowers the query loss of task j",
                )
            )  # fmt: skip
    return Report(
        title,
        intro,
        [*tables, Table("Frozen encoders", score_rows(scores), best)],
        curves,
        matrices,
        [_provenance(name, folder) for name, folder in runs.items()],
    )


def _provenance(name: str, folder: Path) -> str:
    path = folder / "environment.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return f"{name}: " + (", ".join(f"{key} {value}" for key, value in found.items()) or "no environment recorded")
