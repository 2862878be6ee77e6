"""Runs as tables, curves and matrices: what is printed and what a report shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metacal.evaluate.parts import Split
from metacal.train.environment import ENVIRONMENT
from metacal.train.logs import read_metrics
from metacal.train.pictures import Curves, Matrix, Points, Series
from metacal.train.report import Cell, Report, Table, half_width
from metacal.train.results import read_drawings, read_results, scores_on

_MOMENTS = 6  # matrices shown of a run

SCORES = {
    "probe": "linear probe %",
    "knn": "kNN %",
    "knn_200": "kNN, k = 200 %",
    "few_shot_1": "5-way 1-shot %",
    "few_shot_5": "5-way 5-shot %",
    "fine_tune_1": "fine-tuned on 1% %",
    "fine_tune_10": "fine-tuned on 10% %",
    "logme": "LogME",
    "h_score": "H-score",
    "transrate": "TransRate",
    "leep": "LEEP",
    "nce": "NCE",
    "cka": "CKA",
    "rank_me": "RankMe",
    "dimension_std": "deviation per dimension",
}
"""What a score is called where it is shown; in percent where that is said."""

_CURVES = {
    "loss": "training loss (not comparable between methods)",
    "conflict_rate": "conflict rate: share of task pairs with opposed gradients",
    "resplit_conflict_rate": "the same after splitting the same batch again: its sampling noise",
    "uncalibrated_conflict_rate": "the same tasks at the same weights without the calibrator",
    "transfer_to_others": "transfer: how much a step on one task lowers the others' query loss",
    "calibration_loss": "calibrator's outer loss",
    "calibration_error": "share of the representation that calibration drops",
    "hoyer_sparsity": "sparsity of the weights (Hoyer)",
    "online_probe": "linear probe while training, on few labels",
    "online_knn": "nearest neighbours while training",
    "rank_me": "effective number of dimensions while training (RankMe)",
    "dimension_std": "deviation per dimension while training: 0 is a collapse",
}


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Cell]]:
    """One row per run and data set, accuracies in percent."""

    def rounded(found: Mapping[str, float], key: str, factor: int, digits: int) -> Cell:
        return round(factor * found[key], digits) if key in found else None

    return [
        {
            "run": run,
            "data": data,
            "linear probe %": rounded(found, "probe", 100, 2),
            "kNN %": rounded(found, "knn", 100, 2),
            "RankMe": rounded(found, "rank_me", 1, 1),
            "collapsed": _collapsed(found),
        }
        for run, by_data in scores.items()
        for data, found in by_data.items()
    ]


def print_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Prints the table of :func:`score_rows`, and what to say of encoders that have collapsed."""
    notes = dict.fromkeys(note for by_data in scores.values() for note in collapse_notes(by_data))
    print("\n".join([text_table(score_rows(scores)), *notes]))


def score_table(scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Cell]]:
    """One row per score, one column per data set: accuracies in percent, with the interval where a score has one."""
    known = [key for key in SCORES if any(key in found for found in scores.values())]
    rows: list[dict[str, Cell]] = [{"score": SCORES[key], **{data: _score(key, found) for data, found in scores.items()}} for key in known]
    if any("collapsed" in found for found in scores.values()):
        rows.append({"score": "collapsed", **{data: _collapsed(found) for data, found in scores.items()}})
    return rows


def collapse_notes(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What to say of an encoder that has collapsed on a data set."""
    return [
        f"The encoder has collapsed on {data}: its representations point one way or lie on one line (dimension_std "
        f"{found['dimension_std']:.2g}, RankMe {found['rank_me']:.3g}), so its scores say nothing of the method. metrics.jsonl and "
        "the report's dimension_std and rank_me show when it happened, where they were logged."
        for data, found in scores.items()
        if found.get("collapsed")
    ]


def _collapsed(found: Mapping[str, float]) -> Cell:
    return ("yes" if found["collapsed"] else "no") if "collapsed" in found else None


def _score(key: str, found: Mapping[str, float]) -> Cell:
    if key not in found:
        return None
    factor = 100 if SCORES[key].endswith("%") else 1
    value, half_width = factor * found[key], found.get(f"{key}_95")
    return value if half_width is None else (value, factor * half_width)


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
    if isinstance(cell, tuple):
        return f"{cell[0]:.4g} +- {half_width(cell[1])}"
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def summarise(runs: Mapping[str, Path], *, title: str = "metacal runs", intro: Sequence[str] = (), tables: Sequence[Table] = ()) -> Report:
    """A report on runs by name: their scores, curves, and last conflict and transfer matrices."""
    results = {name: read_results(folder) for name, folder in runs.items()}
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    curves = []
    for metric, meaning in _CURVES.items():
        lines = {name: [(row["step"], row[metric]) for row in rows if metric in row] for name, rows in metrics.items()}
        drawn = {name: ([s for s, _ in points], [v for _, v in points]) for name, points in lines.items() if points}
        if drawn:
            curves.append(Curves(metric.replace("_", " "), drawn, note=meaning))
    matrices: list[Matrix | Series] = []
    for name, found in results.items():
        if "cosines" in found:
            matrices.append(
                Matrix(f"{name}: conflict", found["cosines"], x_label="task", y_label="task", note="cosines between the tasks' gradients")
            )
            matrices += _conflict_over_time(name, metrics[name])
            matrices.append(
                Matrix(
                    f"{name}: transfer", found["transfer"], x_label="judged task j", y_label="adapted to task i",
                    note="T(i, j): by how much a step on task i lowers the query loss of task j",
                )
            )  # fmt: skip
    drawings = {name: read_drawings(folder) for name, folder in runs.items()}
    return Report(
        title,
        intro,
        [*tables, *_frozen(results)],
        [*curves, *_label_curves(drawings)],
        matrices,
        _maps(drawings),
        [_provenance(name, folder) for name, folder in runs.items()],
    )


def _frozen(results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Of either split: the runs beside each other, then all scores of those that have more."""
    frozen: list[Table] = []
    more: list[Table] = []
    splits: dict[Split, str] = {"test": "", "validation": " on validation images"}
    for split, images in splits.items():
        scores = {name: by_data for name, found in results.items() if (by_data := scores_on(found, split))}
        sets = {data for by_data in scores.values() for data in by_data}
        best: dict[str, Any] = {"linear probe %": "max", "kNN %": "max"} if len(sets) == 1 else {}  # one set's do not beat another's
        frozen += [Table(f"Frozen encoders{images}", score_rows(scores), best)] if scores else []
        more += [
            Table(f"All scores{images}: {name}", score_table(by_data), note="± is a 95% interval over episodes.")
            for name, by_data in scores.items()
            if any(set(by) - _ALWAYS for by in by_data.values())
        ]
    return [*frozen, *more]


_ALWAYS = {"probe", "probe_validation", "knn", "knn_200", "rank_me", "dimension_std", "collapsed"}
"""What every run is judged by; a run that has more gets a table of its own."""


def _conflict_over_time(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The cosines ``cosine_I_J`` of the log, tasks counted from 1, as a few matrices from first to last."""
    pairs = re.compile(r"cosine_(\d+)_(\d+)")
    found = [(row["step"], {pairs.fullmatch(key): row[key] for key in row if pairs.fullmatch(key)}) for row in rows]
    found = [(step, by_pair) for step, by_pair in found if by_pair]
    if not found:
        return []
    chosen = sorted({round(i) for i in np.linspace(0, len(found) - 1, _MOMENTS)})
    K = max(int(index) for _, by_pair in found for match in by_pair if match for index in match.groups())
    matrices = np.tile(np.eye(K), (len(chosen), 1, 1))
    for matrix, index in zip(matrices, chosen, strict=True):
        for match, value in found[index][1].items():
            if match:
                i, j = int(match[1]) - 1, int(match[2]) - 1
                matrix[i, j] = matrix[j, i] = value
    labels = [f"step {found[index][0] + 1}" for index in chosen]
    return [Series(f"{name}: conflict over time", matrices, labels, note="cosines between the tasks' gradients")]


def _label_curves(drawings: Mapping[str, Mapping[str, Any]]) -> list[Curves]:
    """One panel per data set and split, one line per run."""
    panels = dict.fromkeys((data, by["split"]) for found in drawings.values() for data, by in found.items() if by["labels"])
    return [
        Curves(
            f"{data}: accuracy against labels",
            {
                name: (found[data]["labels"], [100 * a for a in found[data]["accuracy"]])
                for name, found in drawings.items()
                if data in found and found[data]["split"] == split
            },
            x_label="labels",
            y_label="linear probe %",
            note=f"on {split} images",
            log_x=True,
        )
        for data, split in panels
    ]


def _maps(drawings: Mapping[str, Mapping[str, Any]]) -> list[Points]:
    return [
        Points(f"{name}: {data}", by["points"], by["classes"], note=f"{_METHODS[by['method']]} of {by['split']} images, by class")
        for name, found in drawings.items()
        for data, by in found.items()
    ]


_METHODS = {"pca": "PCA", "tsne": "t-SNE"}


def _provenance(name: str, folder: Path) -> str:
    path = folder / ENVIRONMENT
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return f"{name}: " + (", ".join(f"{key} {value}" for key, value in found.items()) or "no environment recorded")
