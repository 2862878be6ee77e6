"""Whole problems from start to end: what was learned, judged on data that nobody saw, against wall-clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice

import metacal
from benchmarks.measure import Row, failed, peaked
from benchmarks.methods import Method, Unsupported
from benchmarks.problem import Goal, Problem, Size
from metacal import optim, registry
from metacal._device import wait
from metacal._typing import Tree
from metacal.adjoints import Implicit, Unrolled
from metacal.linear import CG

OUTER_STEPS: dict[Size, int] = {"tiny": 2, "small": 20, "full": 200}
WARM_STEPS = 10
Learner = Callable[[Problem, Goal], Iterator[Tree]]
"""``learner(problem, goal)`` yields the hparams after each outer step, without end."""


def cold(method: Method) -> Learner:
    """Adam on the method's hypergradient; every outer step trains from the start, as any library's method can."""

    def learn(problem: Problem, goal: Goal) -> Iterator[Tree]:
        h, optimizer = problem.hparams, optim.adam(goal.lr)
        state = optimizer.init(h)
        while True:
            gradient = method.prepare(replace(problem, hparams=h))()
            h, state = optim.moved(optimizer, gradient, state, h)
            yield h

    return learn


def warm(adjoint: metacal.Adjoint) -> Learner:
    """Adam on hypergradients of a few steps each, which go on from where the last ones ended."""

    def learn(problem: Problem, goal: Goal) -> Iterator[Tree]:
        solver = metacal.descent(problem.inner, problem.rule.ours())
        bilevel = metacal.nested(problem.outer, solver, adjoint, optim.adam(goal.lr))
        state, batches = bilevel.init(problem.params, problem.hparams), cycle(problem.batches)
        while True:
            state, _ = bilevel.step(state, list(islice(batches, WARM_STEPS)), problem.outer_batch)
            yield state.hparams

    return learn


WARM: dict[str, metacal.Adjoint] = {
    f"{WARM_STEPS} steps, warm start, graph": Unrolled(mode="graph"),
    f"{WARM_STEPS} steps, warm start, CG 5": Implicit(CG(5)),
}
OURS = ("graph", "mixed", "CG 20", "Neumann 20", "T1-T2")


def single_loop(row: registry.Method) -> Learner:
    """Adam on the estimates of an algorithm that moves params, linear variable and hparams together, T of its steps for an outer step."""

    def learn(problem: Problem, goal: Goal) -> Iterator[Tree]:
        number = {key: i for i, key in enumerate(dict.fromkeys(map(id, problem.batches)))}
        setting = registry.Setting(number=2, step_size=problem.step_size, num_batches=len(number))
        solver = metacal.descent(problem.inner, problem.rule.ours())
        bilevel = row.make(problem.outer, solver, optim.adam(goal.lr / problem.num_steps), setting)
        batches_per_step = row.batches_per_step(2, setting.number)
        state, judged = bilevel.init(problem.params, problem.hparams), problem.outer_batch
        while True:
            for batch in problem.batches:
                if "index" in row.needs:
                    state, _ = bilevel.step(state, [(number[id(batch)], batch)] * batches_per_step, (0, judged))
                else:
                    state, _ = bilevel.step(state, [batch] * batches_per_step, judged)
            yield state.hparams

    return learn


def learners(methods: Iterable[Method], size: Size, goal: Goal) -> dict[str, tuple[str, Learner]]:
    """By name, each with its library; not JAX, which would compile anew with each outer step's weights."""
    others = [m for m in methods if m.library not in ("optax", "jaxopt")]
    rows = [m for m in others if (m.name in OURS if m.library == "metacal" else m.kind in ("exact", "implicit"))]
    found: dict[str, tuple[str, Learner]] = {m.name: (m.library, cold(m)) for m in rows}
    if goal.restarts:
        return found
    found |= {name: ("metacal", warm(adjoint)) for name, adjoint in WARM.items()}
    if size == "small":
        return found
    return found | {row.code: ("metacal", single_loop(row)) for row in registry.METHODS if row.family == "single loop"}


def courses(problem: Problem, methods: Iterable[Method], size: Size) -> Iterator[Row]:
    """Rows of every learner over its outer steps, which they take in turn: seconds spent learning so far, and the goal's scores.

    Judged by what is trained from the start with the hparams learned so far, which the clock does not see.
    """
    if (goal := problem.goal) is None:
        raise ValueError(f"`problem` should have a goal to judge by; {problem.name} has none.")
    about, found = {"problem": problem.name}, learners(methods, size, goal)
    yield about | {"method": "nothing learned", "library": "none", "outer_step": 0, "seconds": 0.0, **judge(problem, goal, problem.hparams)}
    rows: dict[str, Row] = {name: {**about, "method": name, "library": library} for name, (library, _) in found.items()}
    running = {name: _course(problem, goal, learner, OUTER_STEPS[size]) for name, (_, learner) in found.items()}
    while running:  # a step of each in turn, so that a machine that slows down does so for all
        for name in list(running):
            try:
                yield rows[name] | next(running[name])
                continue
            except StopIteration:
                pass
            except Unsupported as reason:
                yield rows[name] | {"unsupported": str(reason)}
            except Exception as failure:
                yield rows[name] | {"failed": failed(failure)}
            del running[name]


def _course(problem: Problem, goal: Goal, learner: Learner, outer_steps: int) -> Iterator[Row]:
    rounds = learner(problem, goal)
    next(rounds)  # warms up
    largest = peaked(lambda: next(rounds), problem.device)[1] or None
    steps, seconds = learner(problem, goal), 0.0
    for done in range(1, outer_steps + 1):
        began = time.perf_counter()
        h = next(steps)
        wait(problem.device)
        seconds += time.perf_counter() - began
        if done <= 10 or done % 5 == 0 or done == outer_steps:
            yield {"outer_step": done, "seconds": seconds, "peak_bytes": largest, **judge(problem, goal, h)}


def judge(problem: Problem, goal: Goal, h: Tree) -> dict[str, float]:
    """The goal's scores of what these hparams train."""
    solver = metacal.descent(problem.inner, problem.rule.ours())
    return goal.scores(metacal.run(solver, solver.init(problem.params, h), h, problem.batches).params, h, goal.test)
