"""The benchmarks: every problem's hypergradient against an independent one, every method, and what may not get worse.

Deterministic measures only (errors, operations, allocated bytes), at the tiniest sizes: no time is asserted anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as suite
from benchmarks import conclusions, courses, measure, report, scaling, targets
from benchmarks.__main__ import main
from benchmarks.methods import METHODS, Method, Unsupported
from benchmarks.problem import Problem, Rule, astype, with_steps
from benchmarks.problems import PROBLEMS, data
from benchmarks.problems.hyper_cleaning import corrupt
from benchmarks.problems.scores import f1
from metacal import registry, tree
from problems import F64, Tree, close, ravel, relative_error, unravel

# Of the hyper-cleaning problems, which are alike at this size, two.
KEYS = [key for key in PROBLEMS if not key.startswith("cleaning") or key in ("cleaning-mnist-50-samples", "cleaning-mnist-50-network")]
EXACT = [name for name, row in METHODS.items() if row.kind == "exact"]


@pytest.fixture(autouse=True)
def _without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny problems are the same wherever the tests run."""
    monkeypatch.delenv("METACAL_DATA", raising=False)


@cache
def tiny(key: str) -> Problem:
    """In float64."""
    return astype(PROBLEMS[key].make("tiny"), F64)


def trained(p: Problem, hparams: Tree) -> Tree:
    """The inner run once more, from the formulas of torch.optim."""
    w = {name: x.clone() for name, x in p.params.items()}
    m, v = ({name: torch.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for t, batch in enumerate(p.batches, 1):
        leaves = {name: x.detach().requires_grad_() for name, x in w.items()}
        grads = dict(zip(leaves, torch.autograd.grad(p.inner(leaves, hparams, batch), list(leaves.values())), strict=True))
        for name, g in grads.items():
            if p.rule.kind == "adam":
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
                step = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            else:
                m[name] = step = p.rule.momentum * m[name] + g
            w[name] = w[name] - p.rule.lr * step
    return w


@pytest.mark.parametrize("key", KEYS)
def test_the_oracle_is_the_derivative_of_the_run(key: str) -> None:
    """Along a random direction, by central differences of a loop of its own; the run moves, and so does the outer value."""
    p, step = tiny(key), 1e-7 if key == "tc2-encoder" else 1e-6  # there the loss is rough: batch statistics of few samples
    found = measure.oracle(p)
    assert found.keys() == p.hparams.keys()
    at = ravel(p.hparams)
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    direction = direction / direction.norm() + ravel(found) / ravel(found).norm()  # not at a right angle to it

    def value(distance: float) -> float:
        h = unravel(p.hparams, at + distance * direction)
        return float(p.outer(trained(p, h), h, p.outer_batch))

    numeric = (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)
    assert math.isfinite(numeric)
    assert abs(numeric) > 1e-8
    assert float(ravel(found) @ direction) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("key", [key for key in KEYS if PROBLEMS[key].make("tiny").exact is not None])
def test_the_closed_form_is_the_limit_of_the_oracle(key: str) -> None:
    p = tiny(key)
    assert p.exact is not None
    close(measure.oracle(with_steps(p, 600)), p.exact(), 1e-8)


def test_there_are_closed_forms() -> None:
    assert {key for key in PROBLEMS if PROBLEMS[key].make("tiny").exact is not None} == {"quadratic", "ridge"}


COMPILED = ("reverse, compiled", "mixed, compiled", "mixed, CUDA graphs")
OF_NETWORKS = ("K-FAC", "CG 20, Gauss-Newton")


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # of the diagonal, which stands for all of the matrix
@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*COMPILED, *OF_NETWORKS, "mixed, offloaded")])
def test_every_method_of_ours_runs(name: str) -> None:
    """Exact ones are exact; the others give finite numbers of the hparams' shapes."""
    p = tiny("ridge")
    found = METHODS[name].prepare(p)()
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in p.hparams.items()}
    assert bool(torch.isfinite(ravel(found)).all())
    error = relative_error(found, measure.oracle(p))
    assert error <= 1e-10 if name in EXACT else 1e-6 <= error <= 2


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # the Hessian is not definite, and CG says so
def test_gauss_newton_wants_the_network_apart() -> None:
    p = tiny("distillation")
    model, loss = p.parts or pytest.fail("the objective should be given in its parts")
    for batch in p.batches:
        assert torch.equal(loss(model(p.params, p.hparams, batch), p.hparams, batch), p.inner(p.params, p.hparams, batch))
    found = METHODS["CG 20, Gauss-Newton"].prepare(p)()
    assert bool(torch.isfinite(ravel(found)).all())
    assert relative_error(found, METHODS["CG 20"].prepare(p)()) > 1e-6  # another matrix than the Hessian
    for name in OF_NETWORKS:
        with pytest.raises(Unsupported, match=r"outputs|functions"):
            METHODS[name].prepare(tiny("ridge"))


def test_a_method_refuses_what_is_too_large() -> None:
    p = tiny("quadratic")
    for name in COMPILED:
        with pytest.raises(Unsupported, match="compiling"):
            METHODS[name].prepare(p)
    with pytest.raises(Unsupported, match="CUDA device"):
        METHODS["mixed, CUDA graphs"].prepare(replace(p, compile=True))
    with pytest.raises(Unsupported, match="host's memory"):
        METHODS["mixed, offloaded"].prepare(p)
    many = replace(p, hparams={"h": torch.zeros(1000, 1, dtype=F64)})
    wide = replace(p, params={"head": torch.zeros(3000, 1), "tail": p.params["tail"]})
    for name, large in (("forward", many), ("dense", wide)):
        with pytest.raises(Unsupported, match=r"1000 hparams|3003 rows"):
            METHODS[name].prepare(large)


# Bounds of work in plain gradients of a step, from counting them once; the outer objective is a step's work too.
MOST_WORK = {
    "graph": lambda T: 3.3 * T + 1.5, "graph, four segments": lambda T: 4.3 * T + 1.5,
    "reverse": lambda T: 4.3 * T + 1.5, "mixed": lambda T: 5.3 * T + 1.5,
    "mixed, every state": lambda T: 4.3 * T + 1.5, "window 10": lambda T: T + 4.3 * min(T, 10) + 1.5,
    "Neumann 20": lambda T: T + 2.2 * 20 + 6.5, "CG 20": lambda T: T + 2.2 * 20 + 6.5, "T1-T2": lambda T: T + 6.5,
    "first order": lambda T: T + 1.5,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # CG stops early where the Hessian is not definite
@pytest.mark.parametrize("key", ["mlp", "conv"])
def test_work_does_not_grow(key: str) -> None:
    p = tiny(key)
    unit = measure.work(measure.one_step(p))
    for name, most in MOST_WORK.items():
        spent = measure.work(METHODS[name].prepare(p)) / unit
        assert p.num_steps <= spent <= most(p.num_steps), f"{name}: {spent:.1f} steps of work"


def test_allocated_bytes_do_not_grow() -> None:
    """On a long run of a small network: replay keeps sqrt(2 T) states, a graph all, segments in between, and auto the smaller."""
    from benchmarks.problems.cost import weighted_mlp

    p = astype(weighted_mlp(36, width=32, batch=4, features=32, num_weights=8), F64)
    names = ("graph", "graph, four segments", "reverse", "mixed", "auto", "T1-T2")
    peak = {name: measure.peak_bytes(METHODS[name].prepare(p)) for name in names}
    params = tree.num_bytes(p.params)
    state = 2 * params  # with the momentum
    assert peak["mixed"] <= (math.sqrt(2 * 36) + 5) * state
    assert peak["graph, four segments"] <= 4 * state + 9 / 36 * peak["graph"] + 8 * params
    assert peak["reverse"] <= peak["mixed"]
    assert peak["graph"] >= 24 * params  # each step's weights
    assert peak["auto"] <= 1.1 * min(peak["graph"], peak["mixed"])
    assert peak["T1-T2"] <= 12 * params


def test_a_row_says_what_happened() -> None:
    """Errors, costs, refusals, failures and warnings; the plain steps are the last row."""

    def refuse(problem: Problem) -> Callable[[], Tree]:
        raise Unsupported("not today")

    def fail(problem: Problem) -> Callable[[], Tree]:
        raise ZeroDivisionError("of no\nuse")

    def halved(problem: Problem) -> Callable[[], Tree]:
        call = METHODS["graph"].prepare(problem)
        return lambda: tree.scale(0.5, call())

    p = tiny("quadratic")
    methods = [METHODS["graph"], Method("half", "other", "exact", halved), Method("r", "other", "exact", refuse)]
    rows = list(measure.measure(p, [*methods, Method("f", "other", "implicit", fail)], rounds=2))
    graph, half, refused, failed, plain = rows
    assert graph["relative_error"] <= 1e-12
    assert graph["cosine"] == pytest.approx(1)
    assert half["relative_error"] == pytest.approx(0.5)
    assert half["solution_error"] > 0
    assert refused["unsupported"] == "not today"
    assert failed["failed"] == "ZeroDivisionError: of no use"
    assert (plain["library"], plain["kind"], plain["over_plain_steps"]) == ("torch", "limit", 1.0)
    assert graph["work"] >= p.num_steps
    assert graph["peak_bytes"] > 0
    assert graph["rounds"] == 2
    assert graph["seconds_q25"] <= graph["seconds"] <= graph["seconds_q75"]
    assert graph["state_bytes"] == graph["params_bytes"] == 48


def test_calls_take_turns() -> None:
    seen: list[str] = []
    seconds = measure.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=9, budget=0.0)  # type: ignore[misc]
    rounds = [seen[i : i + 2] for i in range(0, len(seen), 2)]  # three whatever the budget
    assert [sorted(turns) for turns in rounds] == [["a", "b"]] * 3
    assert ["a", "b"] in rounds
    assert ["b", "a"] in rounds  # nobody is always the first
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_collections_between_calls_look_at_nothing_older() -> None:
    """What imports and compilers left is frozen while calls are timed, and not afterwards, not even after a call that raised."""
    import gc

    frozen: list[int] = []
    measure.interleaved({"a": lambda: frozen.append(gc.get_freeze_count())}, rounds=2)
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError):
        measure.interleaved({"a": lambda: 1 / 0}, rounds=1)
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()


def test_a_call_that_raises_takes_no_further_turns() -> None:
    rows: dict[str, measure.Row] = {"a": {}, "b": {}}
    turns = iter(range(9))

    def fails_later() -> None:
        if next(turns) == 2:
            raise RuntimeError("out of\n paper")

    seconds = measure.interleaved({"a": fails_later, "b": dict}, rounds=4, on_failure=measure.noting(rows))
    assert list(seconds) == ["b"]
    assert len(seconds["b"]) == 4
    assert rows == {"a": {"failed": "RuntimeError: out of paper"}, "b": {}}

    def again() -> None:
        raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="paper"):
        measure.interleaved({"a": again}, rounds=1)


def test_a_point_is_left_out_by_how_costs_grow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"x": x, "seconds": s, "peak_bytes": b} for x, s, b in ((1, 1.0, 1e6), (10, 1.1, 1e8))]
    assert scaling._too_much(points, 100, "small") == "it would take some 10.0 GB"
    flat = [{**point, "peak_bytes": 1e6} for point in points]
    assert scaling._too_much(flat, 10_000, "small") is None
    assert scaling._too_much(flat[:1], 100, "small") == "it would take some 100 s"
    monkeypatch.setattr(scaling, "AXES", {"width": scaling.AXES["width"]})
    monkeypatch.setattr(scaling, "TASKS", {"tiny": ()})
    monkeypatch.setattr(scaling, "MAX_BYTES", 1)
    rows = list(scaling.scaling([METHODS["graph"]], "tiny"))
    assert ["unsupported" in row for row in rows if row["method"] == "graph"] == [False, True]


def test_a_problem_changes_its_type_and_its_steps() -> None:
    p = PROBLEMS["learning-rates"].make("tiny")
    precise = astype(p, F64)
    assert precise.batches[0][0].dtype == precise.outer_batch[0].dtype == precise.params["0.weight"].dtype == F64
    assert precise.batches[0][1].dtype == torch.int64
    longer = with_steps(p, 2 * p.num_steps + 1)
    assert longer.batches[-1] is p.batches[0]
    repeated = astype(PROBLEMS["quadratic"].make("tiny"), torch.float32)
    assert repeated.batches[0] is repeated.batches[-1], "a batch that is used at every step is held once"
    with pytest.raises(ValueError, match="num_steps"):
        with_steps(p, 0)


@pytest.mark.parametrize(("rule", "steps"), [(Rule("sgd", 0.1), 3), (Rule("sgd", 0.1, 0.9), 3), (Rule("adam", 0.1), 3)])
def test_a_rule_is_torchs_optimizer(rule: Rule, steps: int) -> None:
    """And the plain steps are what they are called: they end where ours do."""
    p = with_steps(replace(tiny("ridge"), rule=rule), steps)
    seen: list[Tensor] = []

    def watched(w: Tree, h: Tree, b: Tree) -> Any:
        seen.append(w["weight"].detach().clone())
        return p.inner(w, h, b)

    measure.plain_steps(replace(p, inner=watched))()
    assert len(seen) == steps
    close(seen[-1], trained(replace(p, batches=p.batches[:-1]), p.hparams)["weight"], 1e-12)


def test_labels_are_corrupted_and_found() -> None:
    labels = torch.arange(1000) % 10
    corrupted, wrong = corrupt(labels, 0.3)
    assert int(corrupted.sum()) == 300
    assert torch.equal(wrong != labels, corrupted)
    assert f1(torch.where(corrupted, -1.0, 1.0), corrupted) == 1
    assert f1(torch.ones(1000), corrupted) == 0
    assert f1(-torch.ones(1000), corrupted) == pytest.approx(2 * 0.3 / 1.3)


def test_text_comes_with_python() -> None:
    assert len(data.prose()) > 300_000
    assert len(data.code()) > 300_000
    assert max(data.prose()) < 128


def test_peers_take_the_longest_courses_no_further_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "AXES", {"steps": scaling.AXES["steps"]})
    monkeypatch.setattr(scaling, "TASKS", {"tiny": ()})
    monkeypatch.setattr(scaling, "LONGEST_OF_PEERS", {"tiny": 1})
    rows = list(scaling.scaling([*METHODS.values(), Method("theirs", "higher", "exact", METHODS["graph"].prepare)], "tiny"))
    taken = {x: {row["method"] for row in rows if row["x"] == x and "unsupported" not in row} for x in (1, 4)}
    assert {"graph", "mixed", "theirs"} <= taken[1]
    assert {"graph", "mixed", "plain steps"} <= taken[4]
    assert "theirs" not in taken[4]
    assert [row["unsupported"] for row in rows if row["method"] == "theirs" and row["x"] == 4] == [
        "left out: the line through its points says the rest"
    ]


def test_a_method_that_compiles_anew_with_each_step_learns_no_weights() -> None:
    made = [Method(library, library, "exact", METHODS["graph"].prepare) for library in ("optax", "jaxopt", "higher")]
    goal = tiny("distillation").goal
    assert goal is not None
    names = courses.learners([*METHODS.values(), *made], "tiny", goal)
    assert "higher" in names
    assert not {"optax", "jaxopt"} & set(names)


def adam_by_torch(p: Problem, num_outer: int, *, goes_on: bool = False) -> Tree:
    """The hparams after outer steps of torch's Adam on the oracle's hypergradients, each from the start or from where the last ended."""
    assert p.goal is not None
    h = {name: x.clone().requires_grad_() for name, x in p.hparams.items()}
    optimizer = torch.optim.Adam(h.values(), p.goal.lr)
    for _ in range(num_outer):
        p = replace(p, hparams={name: x.detach().clone() for name, x in h.items()})
        for name, gradient in measure.oracle(p).items():
            h[name].grad = gradient
        optimizer.step()
        if goes_on:
            p = replace(p, params=trained(p, p.hparams))
    return {name: x.detach() for name, x in h.items()}


@pytest.mark.parametrize("key", ["cleaning-mnist-50-samples", "learning-rates"])
def test_a_learner_is_adam_on_hypergradients(key: str) -> None:
    p = tiny(key)
    assert p.goal is not None
    steps = courses.cold(METHODS["graph"])(p, p.goal)
    found = [next(steps) for _ in range(3)][-1]
    close(ravel(found), ravel(adam_by_torch(p, 3)), 1e-9)


def test_a_warm_start_goes_on() -> None:
    """From where the last steps ended, along the batches in a circle: five of them, and ten steps."""
    p = tiny("logistic")
    x, y = p.batches[0]
    batches = [(x[i::5], y[i::5]) for i in range(5)]
    p = replace(p, batches=batches, rule=Rule("sgd", 0.1))  # momentum would be carried on, too
    assert p.goal is not None
    steps = courses.warm(courses.Unrolled(mode="graph"))(p, p.goal)
    found = [next(steps) for _ in range(3)][-1]
    close(ravel(found), ravel(adam_by_torch(with_steps(p, courses.WARM_STEPS), 3, goes_on=True)), 1e-9)


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")
@pytest.mark.parametrize("key", ["distillation", "cleaning-mnist-50-samples"])
def test_whole_problems_are_judged_along_their_courses(key: str) -> None:
    """Every learner takes its turns, from hparams that are the problem's own; what restarts has no warm learners."""
    p = with_steps(PROBLEMS[key].make("tiny"), 2)
    before, *rows = courses.courses(p, METHODS.values(), "tiny")
    assert p.goal is not None
    assert before["method"] == "nothing learned"
    assert 0 <= before["accuracy"] <= 1
    names = list(courses.learners(METHODS.values(), "tiny", p.goal))
    assert [row["method"] for row in rows[: len(names)]] == names  # in turns
    assert ("10 steps, warm start, graph" in names) == any("saba" in name for name in names) == (key != "distillation")
    assert not [row for row in rows if "failed" in row or "unsupported" in row]
    assert [row["outer_step"] for row in rows] == [1] * len(names) + [2] * len(names)
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"`problem` should have a goal.*quadratic"):
        next(courses.courses(tiny("quadratic"), METHODS.values(), "tiny"))


def test_an_algorithm_with_a_table_is_told_which_batch_it_sees() -> None:
    p = tiny("language")
    p = replace(p, batches=[p.batches[i] for i in (0, 1, 0, 2)])
    (saba,) = (row for row in registry.METHODS if row.code.startswith("saba"))
    told: list[tuple[int, Tree]] = []

    def listening(*made: Any) -> Any:
        bilevel = saba.make(*made)
        return bilevel._replace(step=lambda state, batches, judged: told.extend(batches) or bilevel.step(state, batches, judged))

    assert p.goal is not None
    h = next(courses.single_loop(replace(saba, make=listening))(p, p.goal))
    assert [index for index, _ in told[:: len(told) // 4]] == [0, 1, 0, 2]
    assert all(batch is p.batches[(0, 1, 3)[index]] for index, batch in told)
    assert not torch.equal(h["logits"], p.hparams["logits"])
    assert courses.judge(p, p.goal, h).keys() == {"accuracy", "f1"}


def test_learning_makes_whole_problems_better() -> None:
    """On digits: the images distilled in twenty outer steps teach more than noise, the weights of half-wrong labels more than none."""
    for key, gain in (("distillation", 0.2), ("cleaning-mnist-50-samples", 0.02)):
        p = PROBLEMS[key].make("small")
        assert p.goal is not None
        steps = courses.cold(METHODS["graph"])(p, p.goal)
        h = [next(steps) for _ in range(20)][-1]
        assert courses.judge(p, p.goal, h)["accuracy"] > courses.judge(p, p.goal, p.hparams)["accuracy"] + gain


def test_what_the_small_suite_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems and methods that only ``--every`` has, or the full suite."""

    def named(problem: Problem, methods: Any, **_: object) -> Any:
        return ({"problem": problem.name, "method": m.name, "library": m.library, "kind": m.kind} for m in methods)

    monkeypatch.setattr(suite, "measure", named)

    def measured(size: Any, only: list[str], **options: bool) -> set[tuple[str, str]]:
        rows = suite.run(size, only, torch.device("cpu"), **options)
        return {(row["key"], row["method"]) for row in rows if row["table"] == "hypergradients"}

    small, every = measured("small", ["hypergradients"]), measured("small", ["hypergradients"], every=True)
    assert {key for key, _ in small} == {key for key, row in PROBLEMS.items() if row.small}
    assert {method for _, method in every} - {method for _, method in small} == {name for name, m in METHODS.items() if not m.small}
    assert {key for key, _ in every} == set(PROBLEMS)
    assert {key for key, _ in measured("small", ["logistic"])} == {"logistic"}
    assert measured("tiny", ["hypergradients"]) == every


def test_whole_problems_are_those_with_a_goal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def started(problem: Problem, methods: Any, size: Any) -> Any:
        for step, accuracy in ((1, 0.25), (2, 0.5)):
            yield {
                "problem": problem.name,
                "method": "graph",
                "library": "metacal",
                "outer_step": step,
                "seconds": 0.5,
                "accuracy": accuracy,
            }

    monkeypatch.setattr(suite, "courses", started)
    rows = [row for row in suite.run("small", ["courses"], torch.device("cpu")) if row["table"] == "courses"]
    small = ("cleaning-mnist-50-samples", "distillation", "learning-rates")
    assert [row["problem"] for row in rows] == [PROBLEMS[key].make("small").name for key in small for _ in range(2)]
    printed = capsys.readouterr().out
    assert all(f"{key}, from start to end" in printed for key in small)
    assert printed.count("graph (metacal) ends highest, at 50.0%") == 3
    every = suite.run("small", ["courses"], torch.device("cpu"), every=True)
    names = {row["problem"] for row in every if row["table"] == "courses"}
    assert names == {p.name for p in (row.make("small") for row in PROBLEMS.values()) if p.goal is not None}


def fabricated() -> list[dict[str, Any]]:
    """Results of a run that never was: ratios are easy to read off."""
    device = {"table": "environment", "device": "cpu", "size": "tiny", "packages": {"torch": "2"}, "cpu": "none"}
    about = {"table": "hypergradients", "problem": "cost, MLP", "key": "mlp", "num_steps": 50, "num_params": 9, "num_hparams": 3}
    cost = {"relative_error": 1e-6, "cosine": 1.0, "work": 2.0, "step_flops": 10}
    rows = [
        {"method": "graph", "library": "metacal", "kind": "exact", "seconds": 2.0, "peak_bytes": 100.0},
        {"method": "mixed", "library": "metacal", "kind": "exact", "seconds": 4.0, "peak_bytes": 50.0},
        {"method": "reverse", "library": "metacal", "kind": "exact", "seconds": 3.0, "peak_bytes": 90.0},
        {"method": "auto", "library": "metacal", "kind": "exact", "seconds": 4.0, "peak_bytes": 60.0},
        {"method": "higher", "library": "higher", "kind": "exact", "seconds": 4.0, "peak_bytes": 80.0},
        {"method": "autograd", "library": "autograd", "kind": "exact", "seconds": 1.6, "peak_bytes": 200.0},
        {"method": "liar", "library": "betty", "kind": "exact", "seconds": 0.1, "peak_bytes": 1.0, "relative_error": 0.5},
        {"method": "CG 20", "library": "metacal", "kind": "implicit", "seconds": 1.0, "peak_bytes": 9.0, "relative_error": 0.1},
        {"method": "torchopt CG 20", "library": "torchopt", "kind": "implicit", "seconds": 4.0, "peak_bytes": 9.0, "relative_error": 0.1},
        {"method": "plain steps", "library": "torch", "kind": "limit", "seconds": 1.0, "relative_error": None},
        {"method": "gone", "library": "jaxopt", "kind": "exact", "unsupported": "not installed", "relative_error": None, "work": None},
    ]
    steps = [
        {"table": "scaling", "axis": "steps", "x": x, "method": method, "library": library, "kind": "exact", "seconds": 1.0 * x,
         "peak_bytes": float(peak), "state_bytes": 2, "params_bytes": 1}
        for method, library, x, peak in (
            ("mixed", "metacal", 1, 10), ("mixed", "metacal", 1000, 100), ("higher", "higher", 10, 20), ("higher", "higher", 20, 30),
        )
    ]  # fmt: skip
    course = [
        {"table": "courses", "problem": "hyper-cleaning, MNIST, 50%, a weight per sample", "method": method, "library": library,
         "outer_step": n, "seconds": seconds, "accuracy": accuracy, "f1": 0.5}
        for method, library, n, seconds, accuracy in (
            ("higher", "higher", 1, 1.0, 0.6), ("higher", "higher", 2, 2.0, 0.8),
            ("graph", "metacal", 1, 0.5, 0.7), ("graph", "metacal", 2, 1.0, 0.8),
        )
    ]  # fmt: skip
    tc2 = [{"table": "tc2", "problem": "SimCLR", "method": m, "library": "metacal", "seconds": s} for m, s in (("base", 1.0), ("TC²", 2.5))]
    return [device, *({**about, **cost, **row} for row in rows), *steps, *course, *tc2]


def test_targets_are_computed_from_the_results() -> None:
    found = {(o.case, o.quantity): o for o in targets.outcomes(fabricated())}

    def value(case: str, quantity: str) -> tuple[float | None, str]:
        (outcome,) = (o for (c, q), o in found.items() if c == case and q.startswith(quantity))
        return outcome.value, outcome.verdict

    assert value("exact, MLP, graph", "time / fastest library") == (0.5, "met")  # the liar is not compared with
    assert value("exact, MLP, graph", "time / hand-written") == (1.25, "missed")
    assert value("exact, MLP, graph", "peak") == (1.25, "missed")
    assert value("exact, MLP, replay", "peak") == (50 / 80, "met")
    assert value("exact, MLP, replay", "time") == (1.0, "met")  # mixed: reverse is faster and not as lean
    assert value("exact, MLP, graph, four segments", "time") == (None, "not measured")
    assert value("exact, MLP, auto", "peak") == (1.2, "missed")
    assert value("against the limit, MLP", "graph") == (2.0, "met")
    assert value("against the limit, MLP", "replay") == (4.0, "missed")
    assert value("exact, conv, graph", "time / fastest library") == (None, "not measured")
    assert value("CG, 20 products", "time / torchopt") == (0.25, "met")
    assert value("CG, 20 products", "time / betty") == (None, "not measured")
    assert value("T = 1000, mixed", "peak")[0] == pytest.approx(100 / ((2 * math.sqrt(1000) + 2) * 3 + 10))
    assert value("T = 1000, mixed", "T at which") == (90.0, "for the record")
    assert value("TC² step, second order", "time") == (2.5, "missed")
    assert value("hyper-cleaning, 50%", "time") == (0.5, "met")
    assert value("hyper-cleaning, 50%", "F1") == (0.5, "for the record")
    assert value("MAML, 32 Omniglot tasks", "tasks") == (None, "not measured")


def test_what_stands_in_for_missing_data_meets_no_target() -> None:
    """MAML is about Omniglot and hyper-cleaning about MNIST; digits are something else."""
    names = ("MAML, 32 Omniglot tasks", "hyper-cleaning, 50%")
    for data_set, measured in (("Omniglot", True), ("digits", False)):
        tasks = [
            {"table": "tasks", "problem": f"MAML, {data_set}", "num_tasks": 32, "method": method, "library": library, "seconds": seconds,
             "tasks_per_second": 32 / seconds}
            for method, library, seconds in (("auto", "metacal", 1.0), ("higher", "higher", 3.0))
        ]  # fmt: skip
        results = [
            row if row["table"] != "courses" or measured else row | {"problem": row["problem"].replace("MNIST", "digits")}
            for row in fabricated()
        ]
        found = [o.value is not None for o in targets.outcomes([*results, *tasks]) if o.case in names]
        assert found == [measured] * 3


def test_a_gpu_has_its_own_limits() -> None:
    results = [{"table": "environment", "device": "cuda:0"}, *fabricated()[1:]]
    (outcome,) = (o for o in targets.outcomes(results) if o.case == "exact, MLP, replay" and o.quantity.startswith("time"))
    assert outcome.target == "≤ 1"


def test_the_conclusion_is_what_the_numbers_say() -> None:
    said = conclusions.conclusion(targets.table(fabricated(), "hypergradients", key="mlp"))
    assert "autograd is the fastest, 1.6 s" in said
    assert "mixed (metacal) is the leanest, 5e-05 MB, in 4 s." in said
    assert "autograd is 1.25 times as fast as graph (metacal)." in said
    assert "off by 10% in 0.62 of the time" in said
    assert "Called exact, and not: liar (50% off)." in said


def test_the_conclusion_of_a_course_is_who_came_there_first() -> None:
    rows = targets.table(fabricated(), "courses")
    assert conclusions.course_conclusion(rows) == (
        "graph (metacal) ends highest, at 80.0% after 1 s; graph (metacal) was the first within half a point of that, after 1 s."
    )
    start = {"method": "nothing learned", "library": "none", "outer_step": 0, "seconds": 0.0, "accuracy": 0.4}
    sooner = {**rows[-1], "method": "autograd", "library": "autograd", "seconds": 0.25, "accuracy": 0.796}
    said = conclusions.course_conclusion([start, *rows, sooner, {"problem": "p", "method": "gone", "library": "x", "failed": "no"}])
    assert "at 80.0% (40.0% before) after 1 s; autograd was the first" in said
    assert conclusions.course_conclusion([start]) == "Nothing ran."


def test_the_page_needs_nothing_else_and_sorts(tmp_path: Path) -> None:
    results = fabricated()
    page = report.write(tmp_path, results).read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # errors, growth with the steps, the courses of a whole problem
    assert "http" not in page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")
    assert page.count("<script>") == 1
    assert "not installed" in page
    assert "missed" in page
    for name in ("error.svg", "memory.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_results_are_read_again(tmp_path: Path) -> None:
    (tmp_path / report.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in fabricated()), encoding="utf-8")
    assert report.read(tmp_path) == fabricated()
    assert "not measured" in report.printed_targets(fabricated())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for every method and the plain steps: numbers, or a reason."""
    main(["tiny", "--only", "quadratic", "--out", str(tmp_path)])
    environment, *rows = report.read(tmp_path)
    assert environment["table"] == "environment"
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert {row["method"] for row in rows} >= {*METHODS, "plain steps", "autograd"}
    for row in rows:
        measured = row.get("seconds") is not None and (row["kind"] == "limit" or row["relative_error"] is not None)
        assert measured != bool(row.get("unsupported") or row.get("failed")), row
    assert (tmp_path / report.PAGE).exists()
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "is the fastest" in printed
    with pytest.raises(SystemExit):
        main(["tiny", "--out", str(tmp_path)])
    assert "has results already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["small", "--only", "nonsense"])
