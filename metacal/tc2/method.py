"""Training methods as (init, step) pairs, all of one type, so that a comparison changes nothing but the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metacal import _random, derivatives, optim, tree
from metacal._typing import Tree
from metacal.objectives import ema
from metacal.optim import GradientTransformation
from metacal.tc2.calibrate import Identity
from metacal.tc2.conflict import pcgrad
from metacal.tc2.problem import Problem


class MethodState(NamedTuple):
    """All that training changes.

    Attributes:
        theta, theta_opt: the network and its optimizer's state.
        phi, phi_opt: the calibrator and its optimizer's state; ``{}`` and ``()`` where there is nothing to train.
        target: the EMA target network, ``()`` where the objective has none; it moves once per iteration.
        step: iterations done, an int64 tensor.
        carry: the objective's state (a queue, a centre), ``()`` where it has none; it moves once per iteration.
    """

    theta: Tree
    theta_opt: Tree
    phi: Tree
    phi_opt: Tree
    target: Tree
    step: Tensor
    carry: Tree = ()


class Method(NamedTuple):
    """``init() -> MethodState``; ``step(state, views [N, m, C, H, W]) -> (MethodState, metrics)``, metrics 0-dim tensors."""

    init: Callable[[], MethodState]
    step: Callable[[MethodState, Tensor], tuple[MethodState, dict[str, Tensor]]]


def initial(problem: Problem, optimizer: GradientTransformation, calibrator_optimizer: GradientTransformation | None = None) -> MethodState:
    """The state before the first iteration; the calibrator draws from torch's default generator."""
    theta = tree.clone(problem.network.params)
    like = tree.leaves(theta)[0]
    phi = tree.to(problem.calibrator.init(problem.d, dtype=like.dtype), like.device)
    phi_opt = calibrator_optimizer.init(phi) if calibrator_optimizer is not None and tree.leaves(phi) else ()
    carry = tree.to(problem.objective.init_carry(problem.network.d), like.device)
    return MethodState(theta, optimizer.init(theta), phi, phi_opt, problem.init_target(theta), torch.tensor(0), carry)


def present(problem: Problem, state: MethodState) -> Problem:
    """The problem of the iteration at hand, with its target network and the objective's state."""
    return replace(problem, carry=state.carry, target=state.target)


def ended(problem: Problem, state: MethodState) -> MethodState:
    """The end of an iteration: the target follows, the count goes up."""
    target = state.target
    if tree.leaves(target):
        target = ema(target, {part: state.theta[part] for part in target}, problem.momentum)
    return state._replace(target=target, step=state.step + 1)


def base(problem: Problem, optimizer: GradientTransformation) -> Method:
    """The SSL objective alone, on the whole batch with all its views (controls 1 and 2, by the number of views)."""
    plain = replace(problem, calibrator=Identity(), statistics="task")  # there is one task, and it is the batch
    nothing = torch.zeros(())  # the identity reads no factors

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        batch, now = plain.together(views, state.target), present(plain, state)
        loss, _, (gradient,) = derivatives.value_and_grad(lambda theta: (now.loss(theta, {}, nothing, batch), None), state.theta)
        state = state._replace(carry=now.next_carry(state.theta, {}, nothing, tree.map(lambda x: x[None], batch)))
        theta, theta_opt = optim.moved(optimizer, gradient, state.theta_opt, state.theta)
        return ended(problem, state._replace(theta=theta, theta_opt=theta_opt)), {"loss": loss}

    return Method(lambda: initial(problem, optimizer), step)


def project_conflicts(problem: Problem, optimizer: GradientTransformation, surgery: Callable[[list[Tree]], Tree] = pcgrad) -> Method:
    """K tasks whose conflicting gradients are combined by surgery instead of calibrated (control 8).

    Args:
        surgery: from the K tasks' gradients to one: :func:`metacal.tc2.conflict.pcgrad`, :func:`metacal.tc2.conflict.upgrad`, or
            none, ``metacal.tree.mean``: what splitting alone does.
    """
    plain, nothing = replace(problem, calibrator=Identity()), torch.zeros(())

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        batch, now = problem.whole(problem.split(views, state.theta), state.target), present(plain, state)
        losses, gradients = [], []
        for k in range(problem.num_tasks):
            loss, _, (gradient,) = derivatives.value_and_grad(
                lambda theta, k=k: (now.loss(theta, {}, nothing, tree.index(batch, k)), None), state.theta
            )
            losses.append(loss)
            gradients.append(gradient)
        state = state._replace(carry=now.next_carry(state.theta, {}, nothing, batch))
        with _random.apart():  # an order that is drawn is no draw of the views that follow: methods differ in surgery alone
            combined = surgery(gradients)
        theta, theta_opt = optim.moved(optimizer, combined, state.theta_opt, state.theta)
        return ended(problem, state._replace(theta=theta, theta_opt=theta_opt)), {"loss": torch.stack(losses).mean()}

    return Method(lambda: initial(problem, optimizer), step)
