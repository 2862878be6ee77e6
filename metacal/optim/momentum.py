"""Gradient descent with momentum, and with averaging of the iterates.

Notation, here and in every formula of this package: w parameters, g gradient, t the number of steps taken before, u the update
that is added to w. All are pure, whatever ``inplace`` says, and differentiate by g, w, the state and every hyperparameter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.optim.algebra import at_least, given, plus_decay
from metacal.optim.transformation import DifferentiableTransformation, Hyperparameter, Multiple, at, checked, is_off, transformation


class SGDState(NamedTuple):
    step: Tensor
    momentum: Tree


def sgd(
    lr: Hyperparameter,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Stochastic gradient descent: ``u = -lr m``, ``m' = momentum m + (1 - dampening) (g + weight_decay w)``.

    As in ``torch.optim.SGD`` the first step is not dampened, nor is any where the momentum is the number 0 (a tensor's value is not
    looked at). Nesterov's form moves along ``g + momentum m'``. Keeps one copy of
    the params with momentum, nothing without. Sutskever et al., 2013.

    >>> import torch
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = sgd(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([1.0, -1.0])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, a tensor has dimensions, or ``nesterov`` comes without momentum or with dampening.
    """
    checked("lr", lr), checked("momentum", momentum), checked("weight_decay", weight_decay)
    checked("dampening", dampening, low=-math.inf)
    with_momentum = not is_off(momentum)
    if nesterov and not (with_momentum and (callable(dampening) or isinstance(dampening, Tensor) or is_off(dampening))):
        raise ValueError(
            f"`nesterov` needs a momentum and no dampening, got momentum={momentum} and dampening={dampening}. "
            "Set momentum (0.9 is usual) and leave dampening at 0."
        )

    def init(params: Tree, step: Tensor) -> SGDState:
        return SGDState(step, tree.zeros_like(params) if with_momentum else ())

    def rule(t: Tensor, g: Tree, w: Tree | None, state: SGDState) -> tuple[Tree, SGDState]:
        eta, mu, tau, decay = at(t, lr, momentum, dampening, weight_decay)
        g = plus_decay(g, decay, w)
        if not with_momentum:
            return Multiple(-eta, g), SGDState(state.step + 1, ())
        damped = g if is_off(tau) else tree.scale(1 - tau * t.clamp(max=1), g)  # all of the first gradient
        m = tree.axpy(mu, state.momentum, damped)
        direction = tree.axpy(mu, m, g) if nesterov else m
        return Multiple(-eta, direction), SGDState(state.step + 1, m)

    return transformation(init, rule)


class ASGDState(NamedTuple):
    step: Tensor
    average: Tree


def asgd(
    lr: Hyperparameter = 1e-2,
    lambd: Hyperparameter = 1e-4,
    alpha: Hyperparameter = 0.75,
    t0: Hyperparameter = 1e6,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Averaged gradient descent: ``u = -eta_t (g + (lambd + weight_decay) w)``, ``eta_t = lr / (1 + lambd lr t)^alpha``.

    ``state.average`` is ``a' = a + (w + u - a) / max(1, t - t0)``: the params themselves until step t0, then their mean. It steers
    nothing; keeps that one copy of the params. Its fixed points are not the zeros of the gradient unless both decays are 0. A
    schedule's ``lr(t)`` acts at step t (torch's acts one step later). The derivative by t0 is that of the case taken.
    Polyak & Juditsky, 1992; Bottou, 2010.

    >>> import torch
    >>> params = {"w": torch.tensor(2.0)}
    >>> optimizer = asgd(lr=0.1, lambd=0.0)
    >>> updates, state = optimizer.update({"w": torch.tensor(3.0)}, optimizer.init(params), params=params)
    >>> updates["w"], state.average["w"]
    (tensor(-0.3000), tensor(1.7000))

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked("lambd", lambd), checked("weight_decay", weight_decay)
    checked("alpha", alpha, low=-math.inf), checked("t0", t0, low=-math.inf)

    def init(params: Tree, step: Tensor) -> ASGDState:
        return ASGDState(step, tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: ASGDState) -> tuple[Tree, ASGDState]:
        w = given(w)
        eta, lam, power, start, decay = at(t, lr, lambd, alpha, t0, weight_decay)
        eta = eta / (1 + lam * eta * t) ** power
        u = tree.scale(-eta, plus_decay(plus_decay(g, decay, w), lam, w))
        mu = 1 / at_least(1.0, t - start)
        average = tree.map(lambda a, w, u: a + mu * (w + u - a), state.average, w, u)
        return u, ASGDState(state.step + 1, average)

    return transformation(init, rule)
