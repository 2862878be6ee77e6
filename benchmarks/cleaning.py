"""Hyper-cleaning from start to end: accuracy, and F1 of finding the wrong labels, against wall-clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import metacal
from benchmarks.measure import Row, failed, peaked
from benchmarks.methods import Method, Unsupported
from benchmarks.problem import Problem, Size, to
from benchmarks.problems.hyper_cleaning import Cleaning, cleaning, f1
from metacal import optim, registry, tree
from metacal._device import wait
from metacal._typing import Tree
from metacal.adjoints import Implicit, Unrolled
from metacal.linear import CG

OUTER_STEPS: dict[Size, int] = {"tiny": 2, "small": 20, "full": 200}
RATE, WARM_STEPS = 0.3, 10
Learner = Callable[[Problem], Iterator[Tree]]
"""``learner(problem)`` yields the hparams after each outer step, without end."""


def cold(method: Method) -> Learner:
    """Adam on the method's hypergradient; every outer step trains from the start, as any library's method can."""

    def learn(problem: Problem) -> Iterator[Tree]:
        h, optimizer = problem.hparams, optim.adam(RATE)
        state = optimizer.init(h)
        while True:
            gradient = method.prepare(replace(problem, hparams=h))()
            h, state = optim.moved(optimizer, gradient, state, h)
            yield h

    return learn


def warm(adjoint: metacal.Adjoint) -> Learner:
    """Adam on hypergradients of a few steps each, which go on from where the last ones ended."""

    def learn(problem: Problem) -> Iterator[Tree]:
        solver = metacal.descent(problem.inner, problem.rule.ours())
        bilevel = metacal.nested(problem.outer, solver, adjoint, optim.adam(RATE))
        state = bilevel.init(problem.params, problem.hparams)
        while True:
            state, _ = bilevel.step(state, problem.batches[:WARM_STEPS], problem.outer_batch)
            yield state.hparams

    return learn


WARM: dict[str, metacal.Adjoint] = {
    f"{WARM_STEPS} steps, warm start, graph": Unrolled(mode="graph"),
    f"{WARM_STEPS} steps, warm start, CG 5": Implicit(CG(5)),
}
OURS = ("graph", "mixed", "CG 20", "Neumann 20", "T1-T2")


def single_loop(row: registry.Method) -> Learner:
    """Adam on the estimates of an algorithm that moves params, linear variable and hparams together, T of its steps for an outer step."""

    def learn(problem: Problem) -> Iterator[Tree]:
        setting = registry.Setting(number=2, step_size=problem.step_size)
        solver = metacal.descent(problem.inner, problem.rule.ours())
        bilevel = row.make(problem.outer, solver, optim.adam(RATE / problem.num_steps), setting)
        indexed = "index" in row.needs
        batch, judged = problem.batches[0], problem.outer_batch
        batches = [(0, batch) if indexed else batch] * row.batches_per_step(2, setting.number)
        state = bilevel.init(problem.params, problem.hparams)
        while True:
            for _ in problem.batches:
                state, _ = bilevel.step(state, batches, (0, judged) if indexed else judged)
            yield state.hparams

    return learn


def learners(methods: Iterable[Method], size: Size) -> dict[str, tuple[str, Learner]]:
    """By name, each with its library; not JAX, which would compile anew with each outer step's weights."""
    others = [m for m in methods if m.library not in ("optax", "jaxopt")]
    rows = [m for m in others if (m.name in OURS if m.library == "metacal" else m.kind in ("exact", "implicit"))]
    found: dict[str, tuple[str, Learner]] = {m.name: (m.library, cold(m)) for m in rows}
    found |= {name: ("metacal", warm(adjoint)) for name, adjoint in WARM.items()}
    if size == "small":
        return found
    return found | {row.code: ("metacal", single_loop(row)) for row in registry.METHODS if row.family == "single loop"}


def run(name: str, corruption: float, methods: Iterable[Method], size: Size, device: torch.device | str = "cpu") -> Iterator[Row]:
    """Rows of every learner over its outer steps, which they take in turn: seconds spent learning so far, and how good its weights are.

    Judged by softmax regression trained from the start with those weights, which the clock does not see.
    """
    given = cleaning(name, corruption, "samples", size)
    given = Cleaning(to(given.problem, device), given.corrupted.to(device), tree.to(given.test, device))
    about, found = {"problem": given.problem.name, "corruption": corruption}, learners(methods, size)
    yield {**about, "method": "no cleaning", "library": "none", "outer_step": 0, "seconds": 0.0, **judge(given, given.problem.hparams)}
    rows: dict[str, Row] = {name: {**about, "method": name, "library": library} for name, (library, _) in found.items()}
    courses = {name: _course(given, learner, OUTER_STEPS[size]) for name, (_, learner) in found.items()}
    while courses:  # a step of each in turn, so that a machine that slows down does so for all
        for name in list(courses):
            try:
                yield rows[name] | next(courses[name])
                continue
            except StopIteration:
                pass
            except Unsupported as reason:
                yield rows[name] | {"unsupported": str(reason)}
            except Exception as failure:
                yield rows[name] | {"failed": failed(failure)}
            del courses[name]


def _course(given: Cleaning, learner: Learner, outer_steps: int) -> Iterator[Row]:
    rounds = learner(given.problem)
    next(rounds)  # warms up
    largest = peaked(lambda: next(rounds), given.problem.device)[1] or None
    steps, seconds = learner(given.problem), 0.0
    for done in range(1, outer_steps + 1):
        began = time.perf_counter()
        h = next(steps)
        wait(given.problem.device)
        seconds += time.perf_counter() - began
        if done <= 10 or done % 5 == 0 or done == outer_steps:
            yield {"outer_step": done, "seconds": seconds, "peak_bytes": largest, **judge(given, h)}


def judge(given: Cleaning, h: Tree) -> Row:
    """Accuracy on the test images of what is trained with these weights, and F1 of the weights."""
    problem = given.problem
    solver = metacal.descent(problem.inner, problem.rule.ours())
    params = metacal.run(solver, solver.init(problem.params, h), h, problem.batches).params
    x, y = given.test
    predicted: Tensor = (x @ params["weight"] + params["bias"]).argmax(1)
    return {"accuracy": float((predicted == y).double().mean()), "f1": f1(h["logits"], given.corrupted)}
