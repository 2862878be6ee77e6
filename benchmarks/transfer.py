"""Transfer of TC² and its controls, over seeds: pretrain on Fashion-MNIST, judge frozen on Fashion-MNIST, MNIST and Omniglot.

    METACAL_DATA=... python benchmarks/transfer.py --out runs/transfer --seeds 3

Runs that are finished are skipped and interrupted ones resumed, so the command can be repeated. Writes table.md: means over seeds
with 95% t-intervals, and differences to the matched budget paired by seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from metacal.evaluate import mean_interval, paired_interval
from metacal.train.experiment import pretrain
from metacal.train.settings import packaged

METHODS = {
    "base, 2 views": "base_fashion_mnist",
    "base, TC²'s budget": "matched_fashion_mnist",
    "tasks, no calibration": "tasks_fashion_mnist",
    "TC² (paper)": "tc2_fashion_mnist",
    "TC² (lookahead)": "lookahead_fashion_mnist",
    "PCA calibration": "pca_fashion_mnist",
    "PCGrad": "pcgrad_fashion_mnist",
    "one task, calibrated": "one_task_fashion_mnist",
}
REFERENCE = "base, TC²'s budget"
SETS = ("fashion_mnist", "mnist", "omniglot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    for seed in range(given.seeds):
        for method in given.methods:
            folder = given.out / f"{METHODS[method]}-seed{seed}"
            if not (folder / "results.json").is_file():
                print(f"{method}, seed {seed}", flush=True)
                pretrain(packaged(METHODS[method], "--seed", str(seed)), folder, resume=True, progress=False)
    (given.out / "table.md").write_text(table(given.out, given.seeds), encoding="utf-8")
    print(table(given.out, given.seeds))


def table(out: Path, seeds: int) -> str:
    """A Markdown table of the finished methods."""
    runs = {}
    for method, name in METHODS.items():
        folders = [out / f"{name}-seed{seed}" / "results.json" for seed in range(seeds)]
        if all(path.is_file() for path in folders):
            runs[method] = [json.loads(path.read_text(encoding="utf-8")) for path in folders]
    scores = [f"{name} {score}" for name in SETS for score in ("probe", "kNN")]
    head = ["method", *scores, "conflict", "re-split", "images/step", "steps", "s/step"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method, found in runs.items():
        cells = [method]
        for name in SETS:
            for score in ("probe", "knn"):
                mean, half = mean_interval([100 * run["scores"][name][score] for run in found])
                cells.append(f"{mean:.1f} ± {half:.1f}")
        for measure in ("conflict_rate", "resplit_conflict_rate"):
            mean, half = mean_interval([run["measured"][measure] for run in found])
            cells.append(f"{mean:.2f} ± {half:.2f}")
        cells += [str(found[0]["images_per_step"]), str(found[0]["steps"]), f"{min(run['seconds_per_step'] for run in found):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Difference to “{REFERENCE}”, linear probe in points, paired by seed:", "", "| method | " + " | ".join(SETS) + " |"]
    lines.append("|" + " --- |" * (1 + len(SETS)))
    for method, found in runs.items():
        if method != REFERENCE and REFERENCE in runs:
            pairs = [
                paired_interval(
                    [100 * run["scores"][name]["probe"] for run in found], [100 * run["scores"][name]["probe"] for run in runs[REFERENCE]]
                )
                for name in SETS
            ]
            lines.append(f"| {method} | " + " | ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in pairs) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
