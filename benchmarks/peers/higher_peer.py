"""higher: ``innerloop_ctx`` with a graph of the steps, as in its examples."""

from __future__ import annotations

from collections.abc import Callable

import higher

from benchmarks.methods import Method
from benchmarks.peers.shared import Model, fresh, gradient
from benchmarks.problem import Problem
from metacal._typing import Tree


def _unrolled(problem: Problem) -> Callable[[], Tree]:
    model = Model(problem.params)
    optimizer = problem.rule.of_torch(model.parameters())

    def call() -> Tree:
        hparams = fresh(problem.hparams)
        with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
            for batch in problem.batches:
                differentiable.step(functional(problem.inner, hparams, batch))
            return gradient(functional(problem.outer, hparams, problem.outer_batch), hparams)

    return call


METHODS = (Method("higher", "higher", "exact", _unrolled),)
