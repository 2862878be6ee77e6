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
from metacal import optim, tree
from metacal._fastest import wait
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


def learners(methods: Iterable[Method]) -> dict[str, tuple[str, Learner]]:
    """By name, each with its library; not JAX, which would compile anew with each outer step's weights."""
    others = [m for m in methods if m.library not in ("optax", "jaxopt")]
    rows = [m for m in others if (m.name in OURS if m.library == "metacal" else m.kind in ("exact", "implicit"))]
    found: dict[str, tuple[str, Learner]] = {m.name: (m.library, cold(m)) for m in rows}
    return found | {name: ("metacal", warm(adjoint)) for name, adjoint in WARM.items()}


def run(name: str, corruption: float, methods: Iterable[Method], size: Size, device: torch.device | str = "cpu") -> Iterator[Row]:
    """Rows of every learner over its outer steps: seconds spent learning so far, and how good its weights are.

    Judged by softmax regression trained from the start with those weights, which the clock does not see.
    """
    given = cleaning(name, corruption, "samples", size)
    given = Cleaning(to(given.problem, device), given.corrupted.to(device), tree.to(given.test, device))
    about = {"problem": given.problem.name, "corruption": corruption}
    yield {**about, "method": "no cleaning", "library": "none", "outer_step": 0, "seconds": 0.0, **judge(given, given.problem.hparams)}
    for method, (library, learner) in learners(methods).items():
        row: Row = {**about, "method": method, "library": library}
        try:
            yield from ({**row, **point} for point in _course(given, learner, OUTER_STEPS[size]))
        except Unsupported as reason:
            yield {**row, "unsupported": str(reason)}
        except Exception as failure:
            yield {**row, "failed": failed(failure)}


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
