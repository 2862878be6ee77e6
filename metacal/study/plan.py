"""What a study runs: a YAML file read into a grid of configurations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Settings = Mapping[str, Any]
"""Nested settings, as a configuration's YAML writes them."""


@dataclass(frozen=True)
class Study:
    """A question, and the grid of runs that answers it.

    Args:
        title, question: what the page says first.
        base: the configuration that every run starts from, a packaged name or a path.
        settings: what every run changes in it.
        grid: axes, ``{axis: {name: settings}}``: one run for every combination of names and every seed.
        seeds: of the runs; a comparison pairs runs of one seed.
        split: "validation" to choose settings, "test" to report, once.
        axis, references: the names on this axis are compared with each of these among them.
        notes: paragraphs for the page: what was tried before, how settings were chosen.
        together: train the seeds of one place of the grid in one process, see :func:`metacal.study.together.pretrain_together`.
    """

    title: str
    base: str
    grid: Mapping[str, Mapping[str, Settings]]
    seeds: tuple[int, ...]
    question: str = ""
    settings: Settings = field(default_factory=dict)
    split: Literal["validation", "test"] = "test"
    axis: str = "method"
    references: tuple[str, ...] = ("base",)
    notes: tuple[str, ...] = ()
    together: bool = False

    def __post_init__(self) -> None:
        for axis, names in self.grid.items():
            _require_folders(axis, list(names))
        if self.axis not in self.grid or not set(self.references) <= self.grid[self.axis].keys():
            axes = {axis: list(names) for axis, names in self.grid.items()}
            raise ValueError(
                f"`references` should be names on the grid's axis `{self.axis}`, got {list(self.references)}; the grid has {axes}."
            )
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds or not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"`seeds` should be different whole numbers, at least one; got {list(self.seeds)}.")
        if self.split not in ("validation", "test"):
            raise ValueError(f"`split` should be 'validation' or 'test', got {self.split!r}.")


@dataclass(frozen=True)
class Cell:
    """One run of a study: its place in the grid, its seed and its settings."""

    names: Mapping[str, str]  # axis: name
    seed: int
    settings: Settings

    @property
    def path(self) -> Path:
        """The run's folder within the study's."""
        return Path(*(_slug(name) for name in self.names.values()), f"seed{self.seed}")


def load_study(path: str | Path) -> Study:
    """Reads a study from a YAML file whose keys are the fields of :class:`Study`.

    Errors:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, an unknown or missing key, or a value of another kind.
    """
    from metacal.train.settings import read_yaml

    path = Path(path)
    if not path.is_file():
        beside = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml")))
        there = f" {path.parent} has {beside}." if beside else ""
        raise FileNotFoundError(f"There is no study {path}. It is a YAML file with title, base, grid and seeds.{there}")
    given = read_yaml(path)
    known = {f.name for f in fields(Study)}
    if not isinstance(given, dict) or not {"title", "base", "grid", "seeds"} <= given.keys() <= known:
        keys = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{path} should have the keys title, base, grid, seeds, and may have {sorted(known)}; it has {keys}.")
    for name, kind in (("seeds", list), ("references", list), ("notes", list), ("grid", dict), ("settings", dict)):
        if not isinstance(given.get(name, kind()), kind):
            raise ValueError(f"{path}: `{name}` should be a {kind.__name__}, got {given[name]!r}.")
    if not isinstance(given.get("together", False), bool):
        raise ValueError(f"{path}: `together` should be true or false, got {given['together']!r}.")
    for axis, names in given["grid"].items():
        if not isinstance(names, dict) or not all(isinstance(settings, dict | None) for settings in names.values()):
            raise ValueError(f"{path}: `grid` should hold {{axis: {{name: settings}}}}; on the axis '{axis}' there is {names!r}.")
    places = [given.get("settings", {}), *(settings or {} for names in given["grid"].values() for settings in names.values())]
    if any("seed" in settings for settings in places):
        raise ValueError(f"{path}: `seed` should stand in no settings: every place of the grid runs with each of `seeds`.")
    grid = {axis: {str(name): settings or {} for name, settings in names.items()} for axis, names in given["grid"].items()}
    lists = {name: tuple(given[name]) for name in ("seeds", "references", "notes") if name in given}
    try:
        return Study(**{**given, **lists, "grid": grid})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cells(study: Study) -> list[Cell]:
    """Every run of the grid, seed by seed, so that a study that is stopped has whole seeds first."""
    runs, common = [], merged(_base(study.base), study.settings)
    for seed in study.seeds:
        for names in itertools.product(*study.grid.values()):
            settings: Settings = common
            for axis, name in zip(study.grid, names, strict=True):
                settings = merged(settings, study.grid[axis][name])
            settings = merged(settings, {"seed": seed, "evaluate": {"split": study.split}})
            runs.append(Cell(dict(zip(study.grid, names, strict=True)), seed, settings))
    return runs


def merged(settings: Settings, changes: Settings) -> dict[str, Any]:
    """Settings with changes put over them, group by group; another ``class_path`` replaces its whole group."""
    result = dict(settings)
    for key, value in changes.items():
        old = result.get(key)
        group = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if group and value.get("class_path") in (None, old.get("class_path")) else value  # type: ignore[arg-type,union-attr]
    return result


def _base(name: str) -> Settings:
    from metacal.train.settings import find, read_settings, settings_parser

    try:
        return read_settings(find(name, settings_parser()))
    except ValueError as error:
        raise ValueError(f"`base`: {error}") from error


def _require_folders(axis: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"`grid` should have at least one name on every axis, the axis '{axis}' has none. Leave it out, or name one.")
    folders: dict[str, str] = {}
    for name in names:
        folder = _slug(name)
        if not folder.strip("."):
            raise ValueError(f"`grid`: '{name}' on the axis '{axis}' makes no name of a folder. Use letters or digits.")
        if folder in folders:
            raise ValueError(
                f"`grid`: '{folders[folder]}' and '{name}' on the axis '{axis}' would share the folder '{folder}', and be one run. Let "
                "their letters or digits differ."
            )
        folders[folder] = name


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()
