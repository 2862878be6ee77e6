"""What a run leaves in its folder for others to read: its settings, its results, and what its report draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacal.train._files import replacing

CONFIG = "config.yaml"
RESULTS = "results.json"
DRAWINGS = "drawings.json"


def write_results(folder: str | Path, results: dict[str, Any]) -> None:
    """Writes results.json in one stroke."""
    with replacing(Path(folder) / RESULTS) as file:
        file.write(json.dumps(results, indent=2).encode())


def read_results(folder: str | Path) -> dict[str, Any]:
    """A run's results.json, ``{}`` if there is none yet."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_scores(folder: str | Path, results: dict[str, Any], scores: Mapping[str, Mapping[str, float]], split: str) -> None:
    """Adds scores to a run's results.json; those on validation images stand apart from those on test images."""
    key = "scores" if split == "test" else "validation_scores"
    known = results.get(key, {})
    write_results(folder, {**results, key: {**known, **{data: {**known.get(data, {}), **found} for data, found in scores.items()}}})


def read_drawings(folder: str | Path) -> dict[str, Any]:
    """What :func:`write_drawings` left, ``{}`` if nothing."""
    path = Path(folder) / DRAWINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_drawings(folder: str | Path, drawings: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds, by data set, ``points`` [N][2], ``classes`` [N], ``labels`` and ``accuracy`` (lists), ``method`` and ``split``."""
    with replacing(Path(folder) / DRAWINGS) as file:
        file.write(json.dumps({**read_drawings(folder), **drawings}).encode())
