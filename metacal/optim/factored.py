"""Second moments of a matrix kept as one row and one column: Adafactor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._safe import root
from metacal._typing import Tree
from metacal.optim.algebra import at_least, at_most, given, plus_decay
from metacal.optim.transformation import DifferentiableTransformation, Hyperparameter, at, checked, transformation


class AdafactorState(NamedTuple):
    step: Tensor
    square: Tree


def adafactor(
    lr: Hyperparameter = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Adafactor: ``u = -alpha r / max(1, rms(r) / d) - lr weight_decay w``, ``r = g / sqrt(max(v, eps[0]^2))``.

    ``alpha = max(eps[1], rms(w)) min(lr, 1 / sqrt(n))``, ``n = t + 1``, rms the root of the mean square over a tensor (leaf). v is the
    mean of g^2 with weight ``n^beta2_decay`` for the newest. Of tensors with two and more dimensions only its means over the last
    axis (R) and over the one before it (C) are kept, and ``v = R C / max(mean(R), eps[0])``: R + C numbers for an R x C matrix. Of
    others it is kept whole. ``eps[0]=None`` is the machine epsilon of each leaf's type.

    The max, min and clipping are piecewise: the derivative is that of the case taken, and 0 for a root at 0 (``rms(w)`` at
    ``w = 0``). Where ``v < eps[0]^2`` the slope ``du/dg`` is ``alpha / eps[0]``. Its fixed points are not the zeros of the gradient
    unless ``weight_decay=0``. Shazeer & Stern, 2018 (arXiv 1804.04235), algorithm 4 and 5, with ``torch.optim.Adafactor``'s changes.

    >>> params = {"w": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}
    >>> optimizer = adafactor(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([[3.0, -3.0], [1.0, -1.0]])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([[-0.1000,  0.1000],
            [-0.1000,  0.1000]])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions; at the first update without ``params``.
    """
    checked("lr", lr), checked("d", d, low=1.0), checked("weight_decay", weight_decay)
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise TypeError(f"`eps` should be a pair (of which the first may be None), got {eps!r}. Pass for instance eps=(1e-16, 1e-3).")
    checked("eps[0]", 0.0 if eps[0] is None else eps[0]), checked("eps[1]", eps[1])
    checked("beta2_decay", beta2_decay, low=-math.inf)
    if isinstance(beta2_decay, (int, float)) and beta2_decay > 0:
        raise ValueError(
            f"`beta2_decay` should be at most 0, got {beta2_decay}: it is the power of the step count that weighs the newest g^2."
        )

    def init(params: Tree, step: Tensor) -> AdafactorState:
        return AdafactorState(step, tree.map(lambda p: _means(torch.zeros_like(p)), params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdafactorState) -> tuple[Tree, AdafactorState]:
        w, n = given(w), t + 1
        eta, power, threshold, decay, eps2 = at(t, lr, beta2_decay, d, weight_decay, eps[1])
        newest = n**power

        def means(g: Tensor, old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple((1 - newest) * old + newest * new for old, new in zip(old, _means(g * g), strict=True))

        def update(g: Tensor, w: Tensor, means: tuple[Tensor, ...]) -> Tensor:
            (eps1,) = (torch.finfo(g.dtype).eps,) if eps[0] is None else at(t, eps[0])
            v = means[0]
            if len(means) == 2:
                v = v * means[1] / at_least(eps1, _mean(v, -2))
            r = g / at_least(eps1 * eps1, v).sqrt()
            alpha = at_least(eps2, _rms(w)) * at_most(eta, n**-0.5)
            return -alpha * r / at_least(1.0, _rms(r) / threshold)

        square = tree.map(means, g, state.square)
        return plus_decay(tree.map(update, g, w, square), -eta * decay, w), AdafactorState(state.step + 1, square)

    return transformation(init, rule)


def _means(square: Tensor) -> tuple[Tensor, ...]:
    """Of a tensor [..., R, C] its means [..., R, 1] and [..., 1, C]; a vector or a scalar as it is."""
    return (_mean(square, -1), _mean(square, -2)) if square.ndim > 1 else (square,)


def _rms(x: Tensor) -> Tensor:
    return root(_mean(x * x))


def _mean(x: Tensor, axis: int | None = None) -> Tensor:
    """The mean, over an axis that is kept or over all. That of no numbers is 0, for a NaN would reach the derivatives of the others."""
    return (x.mean if x.numel() else x.sum)(axis, keepdim=axis is not None)
