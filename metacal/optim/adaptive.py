"""Rates per coordinate from the size of past gradients: Adagrad, RMSprop, Adadelta."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._safe import root
from metacal._typing import Tree
from metacal.optim.algebra import mix, plus_decay
from metacal.optim.transformation import DifferentiableTransformation, Hyperparameter, Multiple, at, checked, is_off, transformation


class RMSpropState(NamedTuple):
    step: Tensor
    square: Tree
    mean: Tree
    momentum: Tree


def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
) -> DifferentiableTransformation:
    """RMSprop: ``u = -lr m'``, ``m' = momentum m + g / (sqrt(v') + eps)``, ``v' = alpha v + (1 - alpha) g^2``.

    ``centered`` replaces v' by the variance ``v' - a'^2``, ``a' = alpha a + (1 - alpha) g``; ``weight_decay w`` is added to g
    first. Keeps one copy of the params, one more each for ``centered`` and momentum. Tieleman & Hinton, 2012; Graves, 2013.

    >>> optimizer = rmsprop(lr=0.1, alpha=0.75)
    >>> params = {"w": torch.tensor(2.0)}
    >>> updates, state = optimizer.update({"w": torch.tensor(3.0)}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor(-0.2000)

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked("alpha", alpha), checked("eps", eps)
    checked("weight_decay", weight_decay), checked("momentum", momentum)
    with_momentum = not is_off(momentum)

    def init(params: Tree, step: Tensor) -> RMSpropState:
        zeros = tree.zeros_like
        return RMSpropState(step, zeros(params), zeros(params) if centered else (), zeros(params) if with_momentum else ())

    def rule(t: Tensor, g: Tree, w: Tree | None, state: RMSpropState) -> tuple[Tree, RMSpropState]:
        eta, a, epsilon, decay, mu = at(t, lr, alpha, eps, weight_decay, momentum)
        g = plus_decay(g, decay, w)
        v = tree.map(lambda v, g: a * v + (1 - a) * g * g, state.square, g)
        mean = mix(a, state.mean, g) if centered else ()
        variance = tree.map(lambda v, mean: v - mean * mean, v, mean) if centered else v
        direction = tree.map(lambda g, variance: g / (root(variance) + epsilon), g, variance)
        m = tree.axpy(mu, state.momentum, direction) if with_momentum else ()
        return Multiple(-eta, m if with_momentum else direction), RMSpropState(state.step + 1, v, mean, m)

    return transformation(init, rule)


class AdagradState(NamedTuple):
    step: Tensor
    sum: Tree


def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-10,
) -> DifferentiableTransformation:
    """Adagrad: ``u = -lr / (1 + t lr_decay) g / (sqrt(s') + eps)``, ``s' = s + g^2``.

    ``s`` starts at ``initial_accumulator_value``; ``weight_decay w`` is added to g first. Keeps one copy of the params. Duchi et
    al., 2011.

    >>> optimizer = adagrad(lr=0.1, initial_accumulator_value=16.0)
    >>> params = {"w": torch.tensor(2.0)}
    >>> updates, state = optimizer.update({"w": torch.tensor(3.0)}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor(-0.0600)

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked("lr_decay", lr_decay), checked("weight_decay", weight_decay)
    checked("initial_accumulator_value", initial_accumulator_value), checked("eps", eps)

    def init(params: Tree, step: Tensor) -> AdagradState:
        return AdagradState(step, tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdagradState) -> tuple[Tree, AdagradState]:
        eta, fade, decay, start, epsilon = at(t, lr, lr_decay, weight_decay, initial_accumulator_value, eps)
        g = plus_decay(g, decay, w)
        # The start is added here and not in init, which adjoints do not differentiate.
        s = tree.map(lambda s, g: torch.where(t == 0, start, s) + g * g, state.sum, g)
        rate = eta / (1 + t * fade)
        return tree.map(lambda g, s: -rate * (g / (root(s) + epsilon)), g, s), AdagradState(state.step + 1, s)

    return transformation(init, rule)


class AdadeltaState(NamedTuple):
    step: Tensor
    square: Tree
    delta: Tree


def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Adadelta: ``u = -lr d``, ``d = sqrt(a + eps) / sqrt(v' + eps) g``: steps as large as the recent ones.

    ``v' = rho v + (1 - rho) g^2``, ``a' = rho a + (1 - rho) d^2``; ``weight_decay w`` is added to g first. Keeps two copies of the
    params. Smooth, except that ``eps=0`` divides 0 by 0 at its start. Zeiler, 2012 (arXiv 1212.5701), algorithm 1.

    >>> optimizer = adadelta(rho=0.75, eps=0.25)
    >>> params = {"w": torch.tensor(2.0)}
    >>> updates, state = optimizer.update({"w": torch.tensor(3.0)}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor(-0.9487)

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked("rho", rho, high=1.0), checked("eps", eps), checked("weight_decay", weight_decay)

    def init(params: Tree, step: Tensor) -> AdadeltaState:
        return AdadeltaState(step, tree.zeros_like(params), tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdadeltaState) -> tuple[Tree, AdadeltaState]:
        eta, keep, epsilon, decay = at(t, lr, rho, eps, weight_decay)
        g = plus_decay(g, decay, w)
        v = mix(keep, state.square, tree.map(lambda g: g * g, g))
        d = tree.map(lambda a, v, g: (root(a + epsilon) / root(v + epsilon)) * g, state.delta, v, g)
        a = mix(keep, state.delta, tree.map(lambda d: d * d, d))
        return Multiple(-eta, d), AdadeltaState(state.step + 1, v, a)

    return transformation(init, rule)
