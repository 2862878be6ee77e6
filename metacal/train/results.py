"""What a run leaves in its folder for others to read: its settings, its results, and what its report draws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from metacal.evaluate.parts import Split
from metacal.train._files import replacing

CONFIG = "config.yaml"
RESULTS = "results.json"
DRAWINGS = "drawings.json"

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
"""``{data set: {score: number}}``."""

_KEYS: Mapping[Split, str] = {"test": "scores", "validation": "validation_scores"}


def write_results(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Writes results.json in one stroke."""
    with replacing(Path(folder) / RESULTS) as file:
        file.write(json.dumps(nulled(results), indent=2, allow_nan=False).encode())


def read_results(folder: str | Path) -> dict[str, Any]:
    """A run's results.json, with NaN for what it has no number of; ``{}`` if the run is not finished.

    Only a run that has made all its steps, and was judged, says how many: scores alone do not finish it.
    """
    path = Path(folder) / RESULTS
    found = _exchanged(json.loads(path.read_text(encoding="utf-8")), lambda leaf: leaf is None, math.nan) if path.is_file() else {}
    return _by_split(found, Path(folder)) if "steps" in found else {}


def scores_on(results: Mapping[str, Any], split: Split) -> dict[str, dict[str, float]]:
    """The scores that were taken on the images of one split, ``{}`` if none were."""
    found: dict[str, dict[str, float]] = results.get(_KEYS[split], {})
    return found


def with_scores(results: Mapping[str, Any], scores: Scores, split: Split) -> dict[str, Any]:
    """Results with scores added to those on the same split."""
    known = scores_on(results, split)
    return {**results, _KEYS[split]: {**known, **{data: {**known.get(data, {}), **found} for data, found in scores.items()}}}


def nulled(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    return _exchanged(value, lambda leaf: isinstance(leaf, float) and not math.isfinite(leaf), None)


def _exchanged(value: Any, when: Callable[[Any], bool], new: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _exchanged(item, when, new) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exchanged(item, when, new) for item in value]
    return new if when(value) else value


def _by_split(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs that do not name the split they were judged on kept its scores, on whatever images, under "scores"."""
    path = folder / CONFIG
    if "split" in results or not path.is_file() or "  split: validation\n" not in path.read_text(encoding="utf-8"):
        return results
    judged, later = results.pop("scores", {}), scores_on(results, "validation")
    return with_scores(with_scores({**results, "split": "validation"}, judged, "validation"), later, "validation")


def read_drawings(folder: str | Path) -> dict[str, Any]:
    """What :func:`write_drawings` left, ``{}`` if nothing."""
    path = Path(folder) / DRAWINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_drawings(folder: str | Path, drawings: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds, by data set, ``points`` [N][2], ``classes`` [N], ``labels`` and ``accuracy`` (lists), ``method`` and ``split``."""
    with replacing(Path(folder) / DRAWINGS) as file:
        file.write(json.dumps({**read_drawings(folder), **drawings}).encode())
