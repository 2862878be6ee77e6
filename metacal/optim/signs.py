"""Steps along the sign of the gradient: Rprop and Lion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.optim.algebra import at_least, at_most, mix, plus_decay, sign
from metacal.optim.transformation import (
    DifferentiableTransformation,
    Hyperparameter,
    Multiple,
    at,
    checked,
    checked_pair,
    is_off,
    transformation,
)


class RpropState(NamedTuple):
    step: Tensor
    previous: Tree
    step_size: Tree


def rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50.0),
) -> DifferentiableTransformation:
    """Resilient propagation: ``u = -s' sign(g)``, where each coordinate's s grows while the sign of g stays and shrinks when it turns.

    ``s' = s etas[1]`` where g and the last g agree in sign, ``s etas[0]`` where they differ (g then counts as 0, here and at the next
    step), s where one is 0; clamped to ``step_sizes``. s starts at ``lr`` (at the first update; a
    fresh state holds 0). For full batches. Keeps two copies of the params.

    Piecewise constant in g: the derivative by g and by the params inside it is 0, which is the true one almost everywhere, and a
    hypergradient through this optimizer sees only what comes through ``lr``, ``etas`` and ``step_sizes`` (at a clamp: through the
    bound) and the start. What shapes the objective gets 0. Riedmiller & Braun, 1993.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = rprop(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> optimizer.update({"w": torch.tensor([2.0, 0.5])}, state, params=params)[0]["w"]
    tensor([-0.1200, -0.0000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked_pair("step_sizes", step_sizes)
    checked_pair("etas", etas), checked("etas[0]", etas[0], high=1.0), checked("etas[1]", etas[1], low=1.0)

    def init(params: Tree, step: Tensor) -> RpropState:
        return RpropState(step, tree.zeros_like(params), tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: RpropState) -> tuple[Tree, RpropState]:
        first, shrink, grow, smallest, largest = at(t, lr, *etas, *step_sizes)

        def resized(s: Tensor, agreement: Tensor) -> Tensor:
            s = torch.where(t == 0, first, s)  # here and not in init, which adjoints do not differentiate
            s = torch.where(agreement > 0, grow * s, torch.where(agreement < 0, shrink * s, torch.where(agreement.isnan(), agreement, s)))
            return at_most(largest, at_least(smallest, s))

        agreement = tree.map(torch.mul, g, state.previous)
        s = tree.map(resized, state.step_size, agreement)
        g = tree.map(lambda g, agreement: torch.where(agreement < 0, 0.0, g), g, agreement)
        return tree.map(lambda s, g: -s * sign(g), s, g), RpropState(state.step + 1, g, s)

    return transformation(init, rule)


class LionState(NamedTuple):
    step: Tensor
    mean: Tree


def lion(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    smoothing: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Lion: ``u = -lr (sign(c) + weight_decay w)``, ``c = beta1 m + (1 - beta1) g``, ``m' = beta2 m + (1 - beta2) g``.

    The sign's derivative is 0, the true one almost everywhere: a hypergradient through it sees ``lr``, ``weight_decay`` and the
    start, and 0 for whatever shapes the objective and for the betas. ``smoothing=s`` puts ``tanh(c / s)`` in the sign's place, which has
    a derivative; the two differ by at most ``2 exp(-2 |c| / s)``. Its scale is the gradient's: take s as large as the coordinates of
    c that may count as undecided. A tensor or a schedule for s must stay positive.

    Keeps one copy of the params. Its fixed points are not the zeros of the gradient unless ``weight_decay=0``. Chen et al., 2023
    (arXiv 2302.06675), algorithm 2.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = lion(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked_pair("betas", betas, high=1.0)
    checked("weight_decay", weight_decay), checked("smoothing", smoothing)

    def init(params: Tree, step: Tensor) -> LionState:
        return LionState(step, tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: LionState) -> tuple[Tree, LionState]:
        eta, beta1, beta2, decay, width = at(t, lr, *betas, weight_decay, smoothing)
        c = mix(beta1, state.mean, g)
        direction = tree.map(sign if is_off(width) else lambda c: torch.tanh(c / width), c)
        return Multiple(-eta, plus_decay(direction, decay, w)), LionState(state.step + 1, mix(beta2, state.mean, g))

    return transformation(init, rule)
