"""Betty: an engine with two problems, run for one outer step; what its outer problem finds in ``.grad`` is the hypergradient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.logging.logger_base import get_logger
from betty.problems import ImplicitProblem, IterativeProblem

from benchmarks.methods import Method, Unsupported
from benchmarks.peers.shared import PRODUCTS, Model, Tensors
from benchmarks.problem import Problem
from metacal._typing import Tree

get_logger().setLevel(logging.WARNING)  # it tells of every engine that starts


class _Outer(ImplicitProblem):
    """A batch is an objective and its data: betty hands each problem the other by the other's name."""

    found: Tensors

    def training_step(self, batch: Any) -> Any:
        objective, data = batch
        return self.inner.module(objective, self.module.tensors(), data)

    def grad_callback(self) -> None:
        tensors = self.module.tensors()
        self.found = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors.items()}

    def custom_optimizer_step(self) -> None:
        """Stays: the next hypergradient is at the same hparams."""


class _Inner(ImplicitProblem):
    def training_step(self, batch: Any) -> Any:
        objective, data = batch
        return self.module(objective, self.outer.module.tensors(), data)

    def on_inner_loop_start(self) -> None:
        with torch.no_grad():
            for name, parameter in self.module.tensors().items():
                parameter.copy_(self.cfg[name])
        self.optimizer.state.clear()


class _Unrolled(IterativeProblem):
    def training_step(self, batch: Any) -> Any:
        objective, data = batch
        return self.fmodule(self.params, self.buffers, objective, self.outer.module.tensors(), data)

    def on_inner_loop_start(self) -> None:
        self.params = tuple(x.detach().clone().requires_grad_() for x in self.cfg.values())


def _run(problem: Problem, inner: type[ImplicitProblem | IterativeProblem], config: Config, outer_config: Config) -> Callable[[], Tree]:
    """An engine that starts over with every call: T inner steps, and one of the outer problem, which stays where it is."""
    params, hparams = Model(problem.params), Model(problem.hparams)
    lower = inner(
        "inner",
        config,
        params,
        problem.rule.of_torch(params.parameters()),
        train_data_loader=[(problem.inner, batch) for batch in problem.batches],
        extra_config=problem.params,
    )
    upper = _Outer(
        "outer",
        outer_config,
        hparams,
        torch.optim.SGD(hparams.parameters(), lr=0.0),
        train_data_loader=[(problem.outer, problem.outer_batch)],
    )
    strategy = "gpu" if problem.device.type == "cuda" else "cpu"
    settings = EngineConfig(train_iters=problem.num_steps, strategy=strategy)
    engine = Engine([upper, lower], settings, {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}})

    def call() -> Tree:
        engine.run()
        found, upper.found = upper.found, {}
        return found

    return call


def _implicit(**settings: Any) -> Callable[[Problem], Callable[[], Tree]]:
    def prepare(problem: Problem) -> Callable[[], Tree]:
        config = Config(unroll_steps=problem.num_steps, neumann_alpha=problem.step_size, **settings)
        # The direct and the indirect gradient are taken one after the other through the same graph.
        return _run(problem, _Inner, config, Config(retain_graph=True))

    return prepare


def _unrolled(problem: Problem) -> Callable[[], Tree]:
    try:
        return _run(problem, _Unrolled, Config(unroll_steps=problem.num_steps), Config(first_order=False))
    except Exception as error:
        raise Unsupported(f"betty's IterativeProblem does not start: {type(error).__name__}: {error}") from error


METHODS = (
    Method("betty unrolled", "betty", "exact", _unrolled),
    Method("betty Neumann 20", "betty", "implicit", _implicit(type="neumann", neumann_iterations=PRODUCTS)),
    Method("betty CG 20", "betty", "implicit", _implicit(type="cg", cg_iterations=PRODUCTS)),
    Method("betty DARTS", "betty", "approximate", _implicit(type="darts")),
)
