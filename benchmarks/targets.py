"""What the library wants to reach, ratios within one run: each target is one function from the results to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.measure import Row

Results = Sequence[Row]
LIBRARIES = ("higher", "torchopt", "betty")
"""What a user of torch would pick instead; hand-written autograd has targets of its own, and JAX stands outside."""
REPLAY = ("reverse", "mixed", "reverse, compiled", "mixed, compiled", "mixed, CUDA graphs")
SEGMENTS = ("graph, four segments",)
NETWORKS = ("mlp", "conv", "transformer")
FOR_THE_RECORD = "for the record"
RIGHT = 1e-2
"""A peer whose exact hypergradient is further from the truth than this, in float32, is not compared with."""


class Found(NamedTuple):
    """The number that a target is about, None where it was not measured, and which methods it compares."""

    value: float | None
    note: str = ""


class Outcome(NamedTuple):
    case: str
    quantity: str
    value: float | None
    target: str
    met: bool | None
    note: str

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.value is None:
            return "not measured"
        return self.target if self.met is None else "met" if self.met else "missed"


@dataclass(frozen=True)
class Target:
    """A row of the table: ``target(results)`` is its :class:`Outcome`.

    Attributes:
        limit: on a CPU; ``gpu`` on a GPU where it differs.
        at_least: more is better.
    """

    case: str
    quantity: str
    limit: float
    find: Callable[[Results], Found]
    gpu: float | None = None
    at_least: bool = False

    def __call__(self, results: Results) -> Outcome:
        limit = self.gpu if self.gpu is not None and on_gpu(results) else self.limit
        value, note = self.find(results)
        met = None if value is None or math.isnan(limit) else value >= limit if self.at_least else value <= limit
        words = FOR_THE_RECORD if math.isnan(limit) else f"{'≥' if self.at_least else '≤'} {limit:g}"
        return Outcome(self.case, self.quantity, value, words, met, note)


def on_gpu(results: Results) -> bool:
    """Whether the run was on a GPU."""
    return any("cuda" in str(row.get("device", "")) for row in results if row.get("table") == "environment")


def table(results: Results, name: str, **where: object) -> list[Row]:
    """The rows of one table of the results, with these values."""
    return [row for row in results if row.get("table") == name and all(row.get(key) == value for key, value in where.items())]


def network(results: Results, key: str) -> list[Row]:
    """The rows of one of the networks over 50 steps, which the targets are about."""
    return table(results, "hypergradients", key=key, num_steps=50)


def least(rows: Iterable[Row], column: str) -> Row | None:
    """The row with the smallest number in a column."""
    return min((row for row in rows if row.get(column) is not None), key=lambda row: row[column], default=None)


def ours(rows: Iterable[Row], *names: str) -> list[Row]:
    """Of the rows those of this library's methods with these names."""
    return [row for row in rows if row["library"] == "metacal" and row["method"] in names]


def exact_peers(rows: Iterable[Row], libraries: Sequence[str] = LIBRARIES) -> list[Row]:
    """Of the rows those of other libraries that give the exact hypergradient, and do."""
    return [row for row in rows if row["library"] in libraries and right(row)]


def right(row: Row) -> bool:
    """Whether it is called exact, and is."""
    error = row.get("relative_error")
    return row["kind"] == "exact" and error is not None and error <= RIGHT


def ratio(a: Row | None, b: Row | None, column: str) -> Found:
    """``a`` over ``b``."""
    if a is None or b is None or not b[column]:
        return Found(None, "" if a is None else "no peer to compare with")
    return Found(a[column] / b[column], f"{a['method']} / {b['method']}")


def _over_peer(key: str, column: str, names: Sequence[str], libraries: Sequence[str]) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        rows = network(results, key)
        return ratio(least(ours(rows, *names), column), least(exact_peers(rows, libraries), column), column)

    return find


def _replay(results: Results, key: str, names: Sequence[str] = REPLAY) -> Row | None:
    """The fastest way of replay, among those as lean as the target asks where there are such."""
    rows = network(results, key)
    leanest = least(exact_peers(rows, (*LIBRARIES, "autograd")), "peak_bytes")
    candidates = [row for row in ours(rows, *names) if row.get("seconds") is not None and row.get("peak_bytes") is not None]
    lean = [row for row in candidates if leanest and row["peak_bytes"] <= _LEANNESS[key] * leanest["peak_bytes"]]
    return least(lean or candidates, "seconds")


_LEANNESS = {"mlp": 1.0, "conv": 1 / 3, "transformer": 1 / 3}


def _replay_over_peer(key: str, column: str, libraries: Sequence[str], names: Sequence[str]) -> Callable[[Results], Found]:
    return lambda results: ratio(_replay(results, key, names), least(exact_peers(network(results, key), libraries), column), column)


def _auto(key: str) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        rows = network(results, key)
        return ratio(least(ours(rows, "auto"), "peak_bytes"), least(ours(rows, "graph", "mixed"), "peak_bytes"), "peak_bytes")

    return find


def _square_root(results: Results) -> Found:
    """Peak at T = 1000 over ``(2 sqrt T + 2)`` states and gradients and what one step takes."""
    rows = [row for row in table(results, "scaling", axis="steps") if row["method"] == "mixed" and row.get("peak_bytes")]
    at = {row["x"]: row for row in rows}
    if 1000 not in at or 1 not in at:
        return Found(None)
    last = at[1000]
    allowed = (2 * math.sqrt(1000) + 2) * (last["state_bytes"] + last["params_bytes"]) + at[1]["peak_bytes"]
    return Found(last["peak_bytes"] / allowed, f"{last['peak_bytes'] / 1e6:.3g} MB")


def _same_memory(results: Results) -> Found:
    """The T at which the leanest peer takes what ``mixed`` takes for 1000 steps: by a line through its two longest runs."""
    rows = table(results, "scaling", axis="steps")
    limit = next((row.get("peak_bytes") for row in rows if row["method"] == "mixed" and row["x"] == 1000), None)
    reached = []
    for method in sorted({row["method"] for row in rows if row["library"] in (*LIBRARIES, "autograd")}):
        points = sorted((row["x"], row["peak_bytes"]) for row in rows if row["method"] == method and row.get("peak_bytes"))
        if limit and len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:]
            if y1 > y0:
                reached.append((x0 + (limit - y0) * (x1 - x0) / (y1 - y0), method))
    if not reached:
        return Found(None)
    return Found(max(reached)[0], ", ".join(f"{method}: T = {T:.0f}" for T, method in sorted(reached)))


def _over_plain_steps(key: str, pick: Callable[[Results], Row | None]) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        row, plain = pick(results), least((r for r in network(results, key) if r["kind"] == "limit"), "seconds")
        return ratio(row, plain, "seconds")

    return find


def _graph(key: str) -> Callable[[Results], Row | None]:
    return lambda results: least(ours(network(results, key), "graph"), "seconds")


def _roofline(key: str) -> Callable[[Results], Found]:
    """Seconds over those that the counted operations would take at the rate of a large product."""

    def find(results: Results) -> Found:
        rates = [row["flops_per_second"] for row in table(results, "roofline")]
        row = least(ours(network(results, key), "graph", *REPLAY), "seconds")
        if not rates or row is None or not row.get("work"):
            return Found(None)
        return Found(row["seconds"] * rates[0] / (row["work"] * row["step_flops"]), row["method"])

    return find


def _linear(solver: str, library: str) -> Callable[[Results], Found]:
    """The worst ratio of times over all problems on which both ran."""

    def find(results: Results) -> Found:
        ratios = []
        for key in dict.fromkeys(row["key"] for row in table(results, "hypergradients")):
            rows = table(results, "hypergradients", key=key)
            theirs = least((r for r in rows if r["library"] == library and solver in r["method"]), "seconds")
            found = ratio(least(ours(rows, f"{solver} 20"), "seconds"), theirs, "seconds")
            if found.value is not None:
                ratios.append((found.value, key))
        if not ratios:
            return Found(None)
        middle = sorted(ratios)[len(ratios) // 2]
        return Found(max(ratios)[0], f"on {max(ratios)[1]}; the median of {len(ratios)} problems is {middle[0]:.2f}")

    return find


def _textbook(solver: str) -> Callable[[Results], Found]:
    """By how much the error differs from that of the textbook's series by hand, relative to it, where that converges."""

    def find(results: Results) -> Found:
        off = []
        for row in table(results, "hypergradients", method=f"{solver} 20"):
            textbook = table(results, "hypergradients", key=row["key"], method=f"autograd {solver} 20")
            if row.get("relative_error") and textbook and textbook[0].get("relative_error") and row["key"] in _CONVEX:
                off.append((abs(row["relative_error"] / textbook[0]["relative_error"] - 1), row["key"]))
        return Found(max(off)[0], f"on {max(off)[1]}") if off else Found(None)

    return find


_CONVEX = ("quadratic", "ridge", "logistic")


def _tasks(results: Results) -> Found:
    rows = [row for row in table(results, "tasks", num_tasks=32) if "Omniglot" in row["problem"]]
    best = least(ours(rows, "auto"), "seconds")
    theirs = least((row for row in rows if row["library"] == "higher"), "seconds")
    if best is None or theirs is None:
        return Found(None)
    return Found(theirs["seconds"] / best["seconds"], f"{best['method']}: {best['tasks_per_second']:.0f} tasks per second")


def _tc2(results: Results) -> Found:
    rows = {row["method"]: row for row in table(results, "tc2")}
    return ratio(rows.get("TC²"), rows.get("base"), "seconds")


def _cleaned(results: Results) -> list[Row]:
    """Courses on MNIST with half of its labels wrong, a weight per sample; not on the digits that stand in for it."""
    return table(results, "courses", problem="hyper-cleaning, MNIST, 50%, a weight per sample")


def _cleaning(results: Results) -> Found:
    """Our time to the best peer's best accuracy, over its own."""
    rows = _cleaned(results)
    courses = [row for row in rows if row.get("accuracy") is not None and row["library"] != "none"]
    theirs = [row for row in courses if row["library"] not in ("metacal", "autograd")]
    best = max(theirs, key=lambda row: (row["accuracy"], -row["seconds"]), default=None)
    if best is None:
        return Found(None)
    first = least((row for row in courses if row["library"] == "metacal" and row["accuracy"] >= best["accuracy"]), "seconds")
    accuracy = f"{100 * best['accuracy']:.1f}% of {best['method']}"
    if first is None:
        return Found(math.inf, f"{accuracy} was not reached")
    return Found(first["seconds"] / best["seconds"], f"{accuracy} reached by {first['method']}")


def _f1(results: Results) -> Found:
    last = [row for row in _cleaned(results) if row["library"] == "metacal" and row.get("f1") is not None]
    best = max(last, key=lambda row: row["f1"], default=None)
    return Found(None) if best is None else Found(best["f1"], f"{best['method']}, after {best['outer_step']} outer steps")


_NAMES = {"mlp": "MLP", "conv": "conv", "transformer": "transformer"}
_EVERYBODY = (*LIBRARIES, "autograd")


def _exact_targets(key: str) -> list[Target]:
    graph, lean = f"exact, {_NAMES[key]}, graph", round(_LEANNESS[key], 4)
    replays = [
        target
        for case, names in ((f"exact, {_NAMES[key]}, replay", REPLAY), (f"exact, {_NAMES[key]}, {SEGMENTS[0]}", SEGMENTS))
        for target in (
            Target(case, "peak / leanest peer", lean, _replay_over_peer(key, "peak_bytes", _EVERYBODY, names)),
            Target(case, "time / fastest library peer", 1.35, _replay_over_peer(key, "seconds", LIBRARIES, names), gpu=1.0),
        )
    ]
    return [
        Target(graph, "time / fastest library peer", 0.95, _over_peer(key, "seconds", ("graph",), LIBRARIES)),
        Target(graph, "time / hand-written autograd", 1.05, _over_peer(key, "seconds", ("graph",), ("autograd",))),
        Target(graph, "peak / leanest peer", 1.0, _over_peer(key, "peak_bytes", ("graph",), _EVERYBODY)),
        *replays,
        Target(f"exact, {_NAMES[key]}, auto", "peak / better of graph and mixed", 1.1, _auto(key)),
    ]


def _limits(key: str, graph: float, replay: float) -> list[Target]:
    case = f"against the limit, {_NAMES[key]}"
    return [
        Target(case, "graph: time / T plain steps", graph, _over_plain_steps(key, _graph(key))),
        Target(case, "replay: time / T plain steps", replay, _over_plain_steps(key, lambda results: _replay(results, key))),
        Target(case, "time / roofline (GPU)", math.nan, _roofline(key)),
    ]


TARGETS: tuple[Target, ...] = (
    *(target for key in NETWORKS for target in _exact_targets(key)),
    Target("T = 1000, mixed", "peak / (2 √T + 2 states and gradients, and one step)", 1.0, _square_root),
    Target("T = 1000, mixed", "T at which the leanest peer takes as much", math.nan, _same_memory),
    *_limits("mlp", 2.5, 3.6),
    *_limits("conv", 2.1, 3.0),
    *(
        Target(f"{solver}, 20 products", f"time / {library}, the worst of all problems", 0.8, _linear(solver, library))
        for solver in ("Neumann", "CG")
        for library in ("torchopt", "betty")
    ),
    *(
        Target(f"{solver}, 20 products", "error against the textbook's, relative (convex problems)", 0.01, _textbook(solver))
        for solver in ("Neumann", "CG")
    ),
    Target("MAML, 32 Omniglot tasks", "tasks per second / loop with higher", 1.2, _tasks, gpu=4.0, at_least=True),
    Target("TC² step, second order", "time / base SSL step with as many views", 2.0, _tc2),
    Target("hyper-cleaning, 50%", "time to the best peer's accuracy / its time", 0.5, _cleaning),
    Target("hyper-cleaning, 50%", "F1 of finding the wrong labels", math.nan, _f1),
)


def outcomes(results: Results) -> list[Outcome]:
    """Every target, met, missed or not measured."""
    return [target(results) for target in TARGETS]
