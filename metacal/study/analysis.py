"""What the finished runs of a study show: means with intervals, and paired tests against the reference."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from metacal.evaluate.intervals import Interval, holm, mean_interval, paired_interval, paired_p_value
from metacal.evaluate.parts import Split
from metacal.study.plan import Cell, Settings, Study, cells
from metacal.train.results import read_results, scores_on
from metacal.train.sampling import trained_on
from metacal.train.settings import config_of
from metacal.train.summary import SCORES

TRANSFER = "transfer probe"
"""The measure that a study is judged by: the mean linear probe over the data sets that were not trained on."""


@dataclass(frozen=True)
class Finding:
    """One place of the grid: every measure of its runs, ``{measure: {seed: value}}``."""

    names: Mapping[str, str]
    values: Mapping[str, Mapping[int, float]]
    folders: Mapping[int, Path]  # of the runs by seed, within the study's

    def interval(self, measure: str) -> Interval | None:
        """Mean and half width of the 95% t-interval over seeds; None with fewer than two seeds."""
        found = list(self.values.get(measure, {}).values())
        return mean_interval(found) if len(found) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """One method against the reference, at one place of the other axes, paired by seed.

    ``p`` is the paired t-test's, ``p_holm`` the same corrected (Holm) for the comparisons of this method in this measure. Where the
    differences are one number up to rounding there is nothing to test: both are NaN, as is the half width, and the family is smaller.
    """

    names: Mapping[str, str]
    measure: str
    difference: Interval
    num_seeds: int
    p: float
    p_holm: float = math.nan

    @property
    def significant(self) -> bool:
        """Whether ``p_holm`` < 0.05, of three seeds or more: two have small p-values where their differences are near by chance alone."""
        return self.num_seeds > 2 and self.p_holm < 0.05


def findings(study: Study, out: str | Path) -> list[Finding]:
    """The finished runs, gathered over seeds; places without any are left out."""
    gathered: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells(study):
        gathered.setdefault(tuple(cell.names.values()), []).append(cell)
    found = []
    for runs in gathered.values():
        values: dict[str, dict[int, float]] = {}
        folders = {}
        for cell in runs:
            results = read_results(Path(out) / cell.path)
            if results:
                folders[cell.seed] = cell.path
                for measure, value in _measures(results, _trained_on(cell.settings), study.split).items():
                    values.setdefault(measure, {})[cell.seed] = value
        if folders:
            found.append(Finding(runs[0].names, values, folders))
    return found


def _trained_on(settings: Settings) -> Collection[str]:
    """The data sets that a run of these settings reads, which may be said by a default or by how its tasks are made."""
    told = {group: {name: settings[group][name]} for group, name in (("data", "name"), ("tc2", "tasks")) if name in settings.get(group, {})}
    return _read_sets(json.dumps(told))


@cache  # parsing takes a tenth of a second, and most of a study's runs are told the same
def _read_sets(told: str) -> Collection[str]:
    return trained_on(config_of(told))


def _measures(results: Mapping[str, Any], own: Collection[str], split: Split) -> dict[str, float]:
    """Scores, the mean probe of the sets that were not trained on, what was measured of conflict, and the cost; accuracies in percent."""
    scores = scores_on(results, split)
    others = [100 * by["probe"] for data, by in scores.items() if data not in own and "probe" in by]
    found: dict[str, float] = {TRANSFER: sum(others) / len(others)} if others else {}
    for data, by in scores.items():
        for score, label in SCORES.items():
            if score in by:
                name = score if score in ("probe", "knn") else label
                found[f"{data} {name}"] = (100 if label.endswith("%") else 1) * by[score]
    found |= results.get("measured", {})
    found["seconds per step"] = results["seconds_per_step"]
    found["encoder images"] = float(results["images_per_step"] * results["steps"])
    found["steps"] = float(results["steps"])
    return {measure: value for measure, value in found.items() if value == value}  # NaN: a run killed while it was judged timed no step


def compare(study: Study, found: Sequence[Finding], measures: Sequence[str], reference: str) -> list[Comparison]:
    """Every method against ``reference`` at every place of the other axes, over the seeds that both have (at least two)."""
    at = {tuple(f.names.values()): f for f in found}
    position = list(study.grid).index(study.axis)
    compared: list[Comparison] = []
    for f in found:
        name = f.names[study.axis]
        place = list(f.names.values())
        place[position] = reference
        other = at.get(tuple(place))
        if name == reference or other is None:
            continue
        for measure in measures:
            a, b = f.values.get(measure, {}), other.values.get(measure, {})
            seeds = sorted(a.keys() & b.keys())
            if len(seeds) > 1:
                xs, ys = [a[s] for s in seeds], [b[s] for s in seeds]
                compared.append(Comparison(f.names, measure, paired_interval(xs, ys), len(seeds), paired_p_value(xs, ys)))
    families: dict[tuple[str, str], list[int]] = {}
    for i, c in enumerate(compared):
        families.setdefault((c.names[study.axis], c.measure), []).append(i)
    for members in families.values():
        for i, p in zip(members, holm([compared[i].p for i in members]), strict=True):
            c = compared[i]
            compared[i] = Comparison(c.names, c.measure, c.difference, c.num_seeds, c.p, p)
    return compared


def overall(study: Study, found: Sequence[Finding], measure: str, reference: str) -> dict[str, Interval]:
    """Every method's paired difference to ``reference`` in the mean over the places of the other axes, by seed.

    Over the seeds that all of these places have, with both methods (at least two): a method without them is left out.
    """
    at: dict[str, list[Mapping[int, float]]] = {}
    for f in found:
        at.setdefault(f.names[study.axis], []).append(f.values.get(measure, {}))
    num_places = math.prod(len(names) for axis, names in study.grid.items() if axis != study.axis)
    differences = {}
    for name, places in at.items():
        both = [*places, *at.get(reference, [])]
        seeds = sorted(set.intersection(*(set(values) for values in both)))
        if name != reference and len(both) == 2 * num_places and len(seeds) > 1:
            means = [[sum(values[seed] for values in of) / num_places for seed in seeds] for of in (places, at[reference])]
            differences[name] = paired_interval(*means)
    return differences


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two measures over runs, each measure first freed of its mean at every place of the other axes.

    ``p`` takes the runs for independent, which runs of one method or seed are not quite: it is too small rather than too large.
    """

    x: str
    y: str
    rho: float
    p: float
    pairs: tuple[tuple[str, float, float], ...]  # (name on the study's axis, x, y) of every run, means taken off


def correlate(study: Study, found: Sequence[Finding], x: str, y: str) -> Correlation | None:
    """How two measures go together over the runs that have both; None with fewer than five, or where one of them never changes."""
    from scipy.stats import spearmanr

    places: dict[tuple[str, ...], list[tuple[str, float, float]]] = {}
    for f in found:
        place = tuple(name for axis, name in f.names.items() if axis != study.axis)
        xs, ys = f.values.get(x, {}), f.values.get(y, {})
        places.setdefault(place, []).extend((f.names[study.axis], xs[seed], ys[seed]) for seed in sorted(xs.keys() & ys.keys()))
    pairs = []
    for runs in places.values():
        if runs:
            mean_x, mean_y = (sum(run[i] for run in runs) / len(runs) for i in (1, 2))  # type: ignore[misc]
            pairs += [(name, a - mean_x, b - mean_y) for name, a, b in runs]
    if len(pairs) < 5 or len({a for _, a, _ in pairs}) < 2 or len({b for _, _, b in pairs}) < 2:
        return None
    result = spearmanr([a for _, a, _ in pairs], [b for _, _, b in pairs])
    return Correlation(x, y, float(result.statistic), float(result.pvalue), tuple(pairs))
