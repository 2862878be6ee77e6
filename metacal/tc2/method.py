"""Training methods as (init, step) pairs, all of one type, so that a comparison changes nothing but the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metacal import operators, tasks, tree
from metacal._typing import Tree
from metacal.objectives import ema
from metacal.optim import GradientTransformation, apply_updates
from metacal.tc2.calibrate import Identity
from metacal.tc2.conflict import pcgrad
from metacal.tc2.problem import Problem, Views


class MethodState(NamedTuple):
    """All that training changes.

    Attributes:
        theta, theta_opt: the network and its optimizer's state.
        phi, phi_opt: the calibrator and its optimizer's state; ``{}`` and ``()`` where there is nothing to train.
        target: the EMA target network, ``()`` where the objective has none; it moves once per iteration.
        step: iterations done, an int64 tensor.
    """

    theta: Tree
    theta_opt: Tree
    phi: Tree
    phi_opt: Tree
    target: Tree
    step: Tensor


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
    return MethodState(theta, optimizer.init(theta), phi, phi_opt, problem.init_target(theta), torch.tensor(0))


def moved(problem: Problem, state: MethodState) -> MethodState:
    """The end of an iteration: the target follows, the count goes up."""
    target = state.target
    if tree.leaves(target):
        target = ema(target, {part: state.theta[part] for part in target}, problem.momentum)
    return state._replace(target=target, step=state.step + 1)


def descend(optimizer: GradientTransformation, gradient: Tree, params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
    """One step of a torchopt-style optimizer: ``(params, opt_state)``."""
    updates, opt_state = optimizer.update(gradient, opt_state, params=params, inplace=False)
    return apply_updates(params, updates), opt_state


def base(problem: Problem, optimizer: GradientTransformation) -> Method:
    """The SSL objective alone, on the whole batch with all its views (controls 1 and 2, by the number of views)."""
    plain = _uncalibrated(problem)

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        batch = problem.together(views, state.target)
        loss, _, (gradient,) = operators.value_and_grad(lambda theta: (plain(theta, batch), None), state.theta)
        theta, theta_opt = descend(optimizer, gradient, state.theta, state.theta_opt)
        return moved(problem, state._replace(theta=theta, theta_opt=theta_opt)), {"loss": loss}

    return Method(lambda: initial(problem, optimizer), step)


def project_conflicts(problem: Problem, optimizer: GradientTransformation) -> Method:
    """K tasks whose conflicting gradients are projected instead of calibrated (control 8; Yu et al. 2020)."""
    plain = _uncalibrated(problem)

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        losses, gradients = [], []
        for x in tasks.split(views, problem.num_tasks):
            task = problem.together(x, state.target)
            loss, _, (gradient,) = operators.value_and_grad(lambda theta, task=task: (plain(theta, task), None), state.theta)
            losses.append(loss)
            gradients.append(gradient)
        theta, theta_opt = descend(optimizer, pcgrad(gradients), state.theta, state.theta_opt)
        return moved(problem, state._replace(theta=theta, theta_opt=theta_opt)), {"loss": torch.stack(losses).mean()}

    return Method(lambda: initial(problem, optimizer), step)


def _uncalibrated(problem: Problem) -> Callable[[Tree, Views], Tensor]:
    identity = Problem(problem.network, problem.objective, Identity(), problem.where)
    nothing = torch.zeros(())  # the identity reads no factors
    return lambda theta, views: identity.loss(theta, {}, nothing, views)
