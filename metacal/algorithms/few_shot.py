"""Few-shot meta-learning: an initialisation from which a few steps on a few examples solve a new task.

In all of them ``loss(params, batch)`` is the task's loss, support and query batches have a leading task axis of length K, and
``optimizer`` moves what is learned over tasks. ``adapt`` is what a user does with the result: the inner steps on new support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, linear, optim, tree
from metacal._typing import Tree
from metacal.adjoints import Adjoint, Cotangents, FirstOrder, Implicit, Unrolled
from metacal.adjoints.base import Pullback
from metacal.batches import repeat
from metacal.bilevel import BilevelOptimizer, BilevelState, meta_initialisation
from metacal.estimate import HyperGradient
from metacal.inner import FirstBad, InnerSolver, InnerState, advance, run
from metacal.optim import OptimizerLike
from metacal.solvers import descent, proximal

TaskLoss = Callable[[Tree, Tree], Tensor]
Tasks = Literal["loop", "vmap", "auto"]


class MetaLearner(NamedTuple):
    """A few-shot learner.

    Attributes:
        init: ``init(params) -> BilevelState``.
        step: ``step(state, support, query) -> (BilevelState, HyperGradient)``: one outer step on K tasks.
        adapt: ``adapt(state, support) -> params``: those of every task, with a leading axis K, after the inner steps.
    """

    init: Callable[[Tree], BilevelState]
    step: Callable[[BilevelState, Tree, Tree], tuple[BilevelState, HyperGradient]]
    adapt: Callable[[BilevelState, Tree], Tree]


def maml(
    loss: TaskLoss, lr: float, optimizer: OptimizerLike, *, num_steps: int = 1, adjoint: Adjoint = Unrolled(), tasks: Tasks = "vmap"
) -> MetaLearner:
    """MAML: ``theta'_k = theta - lr grad l_k(theta)``, and theta moves along ``grad_theta mean_k l_k^q(theta'_k)``, exactly.

    Cost of an outer step, per task and in plain steps: ``4 num_steps`` and the query's. Source: Finn et al. 2017 (arXiv
    1703.03400), algorithm 2.

    >>> learner = maml(lambda w, batch: ((w - batch) ** 2).sum(), 0.25, optim.sgd(0.5))
    >>> state = learner.init(torch.zeros(1))
    >>> state, hg = learner.step(state, torch.ones(3, 1), torch.ones(3, 1))  # three equal tasks
    >>> learner.adapt(state, torch.ones(3, 1)).shape
    torch.Size([3, 1])
    """
    return _learner(loss, descent(_inner(loss), optim.sgd(lr)), adjoint, optimizer, num_steps, tasks)


def first_order_maml(loss: TaskLoss, lr: float, optimizer: OptimizerLike, *, num_steps: int = 1, tasks: Tasks = "vmap") -> MetaLearner:
    """FOMAML: MAML whose second derivatives are taken for zero. Finn et al. 2017 (arXiv 1703.03400), section 5.2."""
    return maml(loss, lr, optimizer, num_steps=num_steps, adjoint=FirstOrder(), tasks=tasks)


def reptile(loss: TaskLoss, lr: float, optimizer: OptimizerLike, *, num_steps: int = 5, tasks: Tasks = "vmap") -> MetaLearner:
    """Reptile: theta moves towards the mean of the adapted params; ``optim.sgd(e)`` is ``theta += e (mean_k theta'_k - theta)``.

    The query is read for the reported value only: hand in more support instead. Source: Nichol et al. 2018 (arXiv 1803.02999).
    """
    return _learner(loss, descent(_inner(loss), optim.sgd(lr)), _Displacement(), optimizer, num_steps, tasks)


def imaml(
    loss: TaskLoss,
    lr: float,
    strength: float,
    optimizer: OptimizerLike,
    *,
    num_steps: int = 16,
    solver: linear.LinearSolver = linear.MINRES(5),
    tasks: Tasks = "loop",
) -> MetaLearner:
    """iMAML: the inner problem ``l_k(w) + strength / 2 |w - theta|^2``, differentiated at its solution and not through the steps.

    Memory does not grow with ``num_steps``. Right where the steps reach the solution; ``stats["residual_norm"]`` says how near
    they came. Where they do not, a network's Hessian has negative curvature that a small ``strength`` leaves there: conjugate
    gradients, the paper's solver, stand still on it, which is why ours is MINRES, at the same price. Source: Rajeswaran et al. 2019
    (arXiv 1909.04630).
    """
    tied = proximal(_inner(loss), optim.sgd(lr), strength, anchor=lambda start: start)
    return _learner(loss, tied, Implicit(solver), optimizer, num_steps, tasks)


def meta_sgd(
    loss: TaskLoss, lr: float, optimizer: OptimizerLike, *, num_steps: int = 1, adjoint: Adjoint = Unrolled(), tasks: Tasks = "vmap"
) -> MetaLearner:
    """Meta-SGD: MAML with one learned rate for every parameter, which start at ``lr``. Li et al. 2017 (arXiv 1707.09835)."""

    def rates(params: Tree) -> Tree:
        return tree.map(lambda w: torch.full_like(w, lr), params)

    return _learner(loss, descent(_inner(loss), optim.meta_sgd), adjoint, optimizer, num_steps, tasks, rates)


def anil(
    loss: TaskLoss,
    lr: float,
    optimizer: OptimizerLike,
    *,
    head: Sequence[str],
    num_steps: int = 1,
    adjoint: Adjoint = Unrolled(),
    tasks: Tasks = "vmap",
) -> MetaLearner:
    """ANIL: only the ``head`` adapts to a task; the body is learned over tasks like MAML's initialisation.

    Args:
        head: the names of the params, a dict, that adapt.

    Source: Raghu et al. 2020 (arXiv 1909.09157).
    """

    _checks.whole("num_steps", num_steps)

    def inner(adapting: Tree, body: Tree, batch: Tree, /) -> Tensor:
        return loss({**body, **adapting}, batch)

    solver = descent(inner, optim.sgd(lr))
    bilevel = meta_initialisation(inner, solver, adjoint, optimizer, hparams_optimizer=optimizer, tasks=tasks)

    def init(params: Tree) -> BilevelState:
        missing = [name for name in head if name not in params]
        if missing or not head:
            raise ValueError(f"`head` should name some of the params {sorted(params)}; {missing or 'it'} is not among them.")
        return bilevel.init({n: w for n, w in params.items() if n in head}, {n: w for n, w in params.items() if n not in head})

    def adapt(state: BilevelState, support: Tree) -> Tree:
        adapted = _adapted(solver, state, support, num_steps)
        K = tree.leaves(support)[0].shape[0]
        return {**tree.map(lambda w: w.expand(K, *w.shape), state.hparams), **adapted}

    return MetaLearner(init, _stepping(bilevel, num_steps), adapt)


def accuracy(apply: Callable[[Tree, Tensor], Tensor], params: Tree, query: tuple[Tensor, Tensor]) -> Tensor:
    """The share of right answers of every task, [K]: ``apply(params, x) -> logits``, params and query with a leading axis K."""
    x, y = query
    logits = torch.stack([apply(tree.index(params, k), x[k]) for k in range(len(x))])
    return (logits.argmax(-1) == y).to(torch.float64).mean(-1)


@dataclass(frozen=True)
class _Displacement(Adjoint):
    """Takes the way from the end back to the start for the gradient: Reptile's update is no derivative."""

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        bad = FirstBad()
        final = advance(solver, state, hparams, batches, 0, len(batches), bad)
        way = tree.sub(state.params, final.params)
        return final, lambda ct: Cotangents(way, tree.zeros_like(hparams), {"first_bad_step": bad.step()})


def _inner(loss: TaskLoss) -> Any:
    return lambda params, hparams, batch: loss(params, batch)


def _learner(
    loss: TaskLoss,
    solver: InnerSolver,
    adjoint: Adjoint,
    optimizer: OptimizerLike,
    num_steps: int,
    tasks: Tasks,
    hparams: Callable[[Tree], Tree] | None = None,
) -> MetaLearner:
    _checks.whole("num_steps", num_steps)
    learned = None if hparams is None else optimizer
    bilevel = meta_initialisation(_inner(loss), solver, adjoint, optimizer, hparams_optimizer=learned, tasks=tasks)
    return MetaLearner(
        lambda params: bilevel.init(params, {} if hparams is None else hparams(params)),
        _stepping(bilevel, num_steps),
        lambda state, support: _adapted(solver, state, support, num_steps),
    )


def _stepping(bilevel: BilevelOptimizer, num_steps: int) -> Callable[[BilevelState, Tree, Tree], tuple[BilevelState, HyperGradient]]:
    def step(state: BilevelState, support: Tree, query: Tree) -> tuple[BilevelState, HyperGradient]:
        sizes = {name: {leaf.shape[0] for leaf in tree.leaves(batch)} for name, batch in (("support", support), ("query", query))}
        if len(set.union(*sizes.values())) > 1:
            raise ValueError(f"`support` and `query` should have the same tasks along the first axis of every leaf; they have {sizes}.")
        return bilevel.step(state, repeat(support, num_steps), query)

    return step


def _adapted(solver: InnerSolver, state: BilevelState, support: Tree, num_steps: int) -> Tree:
    """The inner run of every task, one after the other."""
    start = state.inner.params
    hparams = start if solver.anchor is not None else state.hparams
    K = tree.leaves(support)[0].shape[0]
    return tree.stack([run(solver, state.inner, hparams, repeat(tree.index(support, k), num_steps)).params for k in range(K)])
