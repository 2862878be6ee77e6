"""The main job on an embedded data set: TC² against its base method and controls, in a few minutes on a CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from metacal.train import report
from metacal.train.budget import step_bytes
from metacal.train.config import Config, Reading
from metacal.train.experiment import pretrain
from metacal.train.report import Cell, Table
from metacal.train.results import CONFIG
from metacal.train.settings import packaged
from metacal.train.summary import summarise, text_table

_METHODS: dict[str, tuple[Reading, int]] = {  # name: (reading, views)
    "base, 2 views": ("base", 2),
    "base, TC²'s budget": ("matched", 4),
    "tasks, no calibration": ("tasks", 4),
    "TC²": ("paper", 4),
}


def demo(
    *, seed: int = 0, device: str = "auto", steps: int = 200, out: str | Path = "runs/demo", page: str | Path = "report.html"
) -> list[dict[str, Cell]]:
    """Trains four methods on scikit-learn's digits with one seed, prints a table and writes a page; returns the table's rows.

    One seed on 359 test images is a demonstration and not evidence: differences below three points are noise.
    """
    config = packaged("tc2_digits", "--seed", str(seed), "--device", device, "--train.steps", str(steps))
    folder = Path(out)
    _empty(folder)
    rows: list[dict[str, Cell]] = []
    runs: dict[str, Path] = {}
    for name, (reading, views) in _METHODS.items():
        print(f"\n{name}")
        chosen = replace(config, tc2=replace(config.tc2, reading=reading, num_views=views))
        runs[name] = folder / _folder(reading, views)
        rows.append(_row(name, chosen, pretrain(chosen, runs[name])))
    note = (
        f"Seed {seed}, {steps} iterations of batch {config.train.batch_size}; 'base, TC²'s budget' takes as many more as make the encoder "
        "passes of TC². The probe's strength is chosen on validation images; 359 held-out test images, so differences below about three "
        "points are noise. Conflict on random tasks is largely sampling noise: compare it with the re-split of the same batch."
    )
    print("\n" + text_table(rows) + "\n\n" + note)
    table = Table("TC² and its controls on digits", rows, {"linear probe %": "max", "kNN %": "max"}, note)
    intro = ["A self-supervised encoder is trained on 8 x 8 images of handwritten digits without labels, in four ways, and judged frozen."]
    path = report.write(page, summarise(runs, title="TC² on handwritten digits", intro=intro, tables=[table]))
    print(f"\nThe curves and the conflict and transfer matrices are in {path}")
    return rows


def _row(name: str, config: Config, results: dict[str, Any]) -> dict[str, Cell]:
    scores = results["scores"][config.data.name]
    measured = results["measured"]
    return {
        "method": name,
        "linear probe %": round(100 * scores["probe"], 1),
        "kNN %": round(100 * scores["knn"], 1),
        "conflict rate": round(measured["conflict_rate"], 3),
        "re-split": round(measured["resplit_conflict_rate"], 3),
        "steps": results["steps"],
        "encoder images/step": results["images_per_step"],
        "s/step": round(results["seconds_per_step"], 4),
        "peak MB/step": round(step_bytes(config) / 1e6, 1),
    }


def _folder(reading: Reading, views: int) -> str:
    return f"{reading}-{views}-views"


def _empty(folder: Path) -> None:
    """Makes way for a new demo, and for nothing else: only runs of the demo's own names are removed."""
    own = {_folder(*method) for method in _METHODS.values()}
    strangers = [path for path in folder.glob("*") if path.name not in own or not (path / CONFIG).is_file()]
    if strangers:
        raise FileExistsError(f"`out` {folder} holds {strangers[0].name}, which is not a run of the demo. Name another folder.")
    for path in folder.glob("*"):
        shutil.rmtree(path)
