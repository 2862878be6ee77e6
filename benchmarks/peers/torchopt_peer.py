"""torchopt: its differentiable optimizer of a module, its functional one, and its implicit gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor

from benchmarks.methods import Method
from benchmarks.peers.shared import PRODUCTS, Model, fresh, gradient
from benchmarks.problem import Problem, Rule
from metacal._typing import Tree


def _transformation(rule: Rule) -> Any:
    return torchopt.adam(rule.lr) if rule.kind == "adam" else torchopt.sgd(rule.lr, momentum=rule.momentum)


def _meta_optimizer(problem: Problem) -> Callable[[], Tree]:
    """One module and one optimizer, put back to where they started after each use."""
    rule, net = problem.rule, Model(problem.params)
    optimizer = torchopt.MetaAdam(net, rule.lr) if rule.kind == "adam" else torchopt.MetaSGD(net, rule.lr, momentum=rule.momentum)
    net_start, optimizer_start = (torchopt.extract_state_dict(x, by="reference") for x in (net, optimizer))

    def call() -> Tree:
        hparams = fresh(problem.hparams)
        for batch in problem.batches:
            optimizer.step(net(problem.inner, hparams, batch))
        found = gradient(net(problem.outer, hparams, problem.outer_batch), hparams)
        torchopt.recover_state_dict(net, net_start)
        torchopt.recover_state_dict(optimizer, optimizer_start)
        return found

    return call


def _functional(problem: Problem) -> Callable[[], Tree]:
    names = list(problem.params)

    def call() -> Tree:
        hparams, params = fresh(problem.hparams), tuple(fresh(problem.params).values())
        optimizer = torchopt.FuncOptimizer(_transformation(problem.rule))
        for batch in problem.batches:
            params = optimizer.step(problem.inner(dict(zip(names, params, strict=True)), hparams, batch), params)
        return gradient(problem.outer(dict(zip(names, params, strict=True)), hparams, problem.outer_batch), hparams)

    return call


def _implicit(solver: Callable[[Problem], Any]) -> Callable[[Problem], Callable[[], Tree]]:
    """``custom_root`` of a plain training loop: it takes tuples of tensors, not dicts."""

    def prepare(problem: Problem) -> Callable[[], Tree]:
        names, hnames = list(problem.params), list(problem.hparams)

        def objective(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...], batch: Tree) -> Tensor:
            return problem.inner(dict(zip(names, params, strict=True)), dict(zip(hnames, hparams, strict=True)), batch)

        def optimality(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.func.grad(objective)(params, hparams, problem.batches[-1])

        @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solver(problem))
        def run(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            optimizer = _transformation(problem.rule)
            state = optimizer.init(params)
            with torch.enable_grad():
                for batch in problem.batches:
                    grads = torch.autograd.grad(objective(params, hparams, batch), params)
                    updates, state = optimizer.update(grads, state, params=params, inplace=True)
                    params = torchopt.apply_updates(params, updates, inplace=True)
            return params

        def call() -> Tree:
            hparams = fresh(problem.hparams)
            start = tuple(tensor.clone().requires_grad_() for tensor in problem.params.values())  # trained in place
            params = dict(zip(names, run(start, tuple(hparams.values())), strict=True))
            with warnings.catch_warnings():  # it calls the deprecated functorch.vjp
                warnings.simplefilter("ignore", FutureWarning)
                return gradient(problem.outer(params, hparams, problem.outer_batch), hparams)

        return call

    return prepare


def _cg(problem: Problem) -> Any:
    # Its default tolerance, 1e-5, would stop before the products that every row here may use.
    tolerance = max(torch.finfo(tensor.dtype).eps for tensor in problem.params.values())
    return torchopt.linear_solve.solve_cg(maxiter=PRODUCTS, rtol=tolerance)


def _neumann(problem: Problem) -> Any:
    return torchopt.linear_solve.solve_inv(ns=True, maxiter=PRODUCTS, alpha=problem.step_size)


METHODS = (
    Method("torchopt MetaOptimizer", "torchopt", "exact", _meta_optimizer),
    Method("torchopt functional", "torchopt", "exact", _functional),
    Method("torchopt Neumann 20", "torchopt", "implicit", _implicit(_neumann)),
    Method("torchopt CG 20", "torchopt", "implicit", _implicit(_cg)),
)
