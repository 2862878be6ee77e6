"""How costs grow with the steps, the width, the batch, the hyperparameters and the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from benchmarks import few_shot_tasks
from benchmarks.measure import Row, measure
from benchmarks.methods import Method
from benchmarks.problem import Problem, Size, to
from benchmarks.problems.cost import weighted_mlp

MAX_BYTES, MAX_SECONDS = 2e9, 20.0
"""A point is left out where the one before says that it would take more, or longer in the small suite."""


class Axis(NamedTuple):
    """What grows, with the problem at each value."""

    make: Callable[[int], Problem]
    values: dict[Size, tuple[int, ...]]


AXES: dict[str, Axis] = {
    "steps": Axis(
        lambda x: weighted_mlp(x, width=64, batch=32, features=64),
        {"tiny": (1, 4), "small": (1, 10, 100, 1000), "full": (1, 3, 10, 30, 100, 300, 1000)},
    ),
    "width": Axis(
        lambda x: weighted_mlp(20, width=x, batch=32, features=64),
        {"tiny": (4, 8), "small": (16, 64, 256), "full": (16, 64, 256, 1024)},
    ),
    "batch": Axis(
        lambda x: weighted_mlp(20, width=64, batch=x, features=64),
        {"tiny": (1, 4), "small": (1, 30, 1000), "full": (1, 10, 100, 1000, 10_000)},
    ),
    "hyperparameters": Axis(
        lambda x: weighted_mlp(20, width=64, batch=32, features=64, num_weights=x),
        {"tiny": (2, 8), "small": (10, 1000, 100_000), "full": (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)},
    ),
}
LONGEST_OF_PEERS: dict[Size, float] = {"tiny": math.inf, "small": 100, "full": math.inf}
"""Steps: a line through the points before says the rest."""
TASKS: dict[Size, tuple[int, ...]] = {"tiny": (1, 2), "small": (1, 8), "full": (1, 2, 4, 8, 16, 32, 64)}
OURS = ("graph", "mixed", "forward", "CG 20")
ROUNDS: dict[Size, int] = {"tiny": 1, "small": 3, "full": 5}


def chosen(methods: Iterable[Method]) -> list[Method]:
    """Of all methods those whose growth is worth a line."""
    return [m for m in methods if (m.name in OURS if m.library == "metacal" else m.kind == "exact")]


def scaling(methods: Iterable[Method], size: Size, device: torch.device | str = "cpu") -> Iterator[Row]:
    """A row for every axis, value and method; its ``x`` is the value."""
    methods, rounds = list(methods), ROUNDS[size]
    for name, axis in AXES.items():
        points: dict[str, list[Row]] = {m.name: [] for m in chosen(methods)}
        for x in axis.values[size]:
            growing = []
            for method in chosen(methods):
                theirs = name == "steps" and x > LONGEST_OF_PEERS[size] and method.library != "metacal"
                reason = "the line through its points says the rest" if theirs else _too_much(points[method.name], x, size)
                if reason:
                    who = {"method": method.name, "library": method.library, "kind": method.kind}
                    yield {"axis": name, "x": x, **who, "unsupported": f"left out: {reason}"}
                else:
                    growing.append(method)
            for row in measure(to(axis.make(x), device), growing, rounds=rounds, budget=10.0, judged=False):
                row = {"axis": name, "x": x, **row}
                points.setdefault(row["method"], []).append(row)
                yield row
    for x in TASKS[size]:
        for row in few_shot_tasks.throughput(x, methods, size, device, rounds=rounds):
            yield {"axis": "tasks", "x": x, **row}


def _too_much(points: list[Row], x: int, size: Size) -> str | None:
    """Why the next point should not be taken, by how the last two grew; where there is one, in proportion."""
    if not points:
        return None
    if points[-1].get("seconds") is None:
        return "the point before has no time"
    expected = {quantity: _extrapolated(points, quantity, x) for quantity in ("peak_bytes", "seconds")}
    if expected["peak_bytes"] > MAX_BYTES:
        return f"it would take some {expected['peak_bytes'] / 1e9:.1f} GB"
    if size == "small" and expected["seconds"] > MAX_SECONDS:
        return f"it would take some {expected['seconds']:.0f} s"
    return None


def _extrapolated(points: list[Row], quantity: str, x: int) -> float:
    known = [(point["x"], point[quantity]) for point in points[-2:] if point.get(quantity)]
    if not known:
        return 0.0
    power = 1.0
    if len(known) == 2:
        (x0, y0), (x1, y1) = known
        power = max(0.0, math.log(y1 / y0) / math.log(x1 / x0))
    x1, y1 = known[-1]
    return float(y1 * (x / x1) ** power)
