"""Decaying means of g and of its size, corrected for their start at zero: Adam, AdamW, Adamax, NAdam, RAdam."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._safe import root
from metacal._typing import Tree
from metacal.optim.algebra import at_least, mix, one_minus_power, plus_decay
from metacal.optim.transformation import (
    DifferentiableTransformation,
    Hyperparameter,
    Multiple,
    at,
    checked,
    checked_pair,
    precision,
    transformation,
)


class AdamState(NamedTuple):
    step: Tensor
    mean: Tree
    square: Tree
    largest: Tree = ()


def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
) -> DifferentiableTransformation:
    """Adam: ``u = -lr m^ / (sqrt(v^) + eps)``, the decaying means of g and g^2 corrected for their start at zero.

    ``m' = beta1 m + (1 - beta1) g``, ``m^ = m' / (1 - beta1^(t+1))``, and v with ``beta2`` and ``g^2``; ``weight_decay w`` is
    added to g first. ``amsgrad`` puts the largest v' so far, ``n' = max(n, v')``, in the place of v'. Keeps two copies of the params,
    with ``amsgrad`` three. Kingma & Ba, 2015, algorithm 1; Reddi et al., 2018 (arXiv 1904.09237), without its bias.

    The root's derivative at ``v = 0`` is taken as 0, which makes that of the whole update right: a coordinate whose gradient was
    always 0 has ``du/dg = -lr / eps`` at its first step. The derivative of the max is that of the case taken, v' at a tie.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = adam(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, decoupled=False)


def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
) -> DifferentiableTransformation:
    """Adam with decoupled weight decay: :func:`adam`'s update without decay, plus ``-lr weight_decay w``.

    Keeps two copies of the params, with ``amsgrad`` three. Its fixed points are not the zeros of the gradient unless
    ``weight_decay=0``: implicit differentiation refuses it otherwise. Loshchilov & Hutter, 2019, algorithm 2.

    >>> optimizer = adamw(lr=0.1, weight_decay=0.1)
    >>> params = {"w": torch.tensor(2.0)}
    >>> updates, state = optimizer.update({"w": torch.tensor(0.0)}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor(-0.0200)

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, decoupled=True)


def _adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    amsgrad: bool,
    decoupled: bool,
) -> DifferentiableTransformation:
    checked("lr", lr), checked_pair("betas", betas, high=1.0), checked("eps", eps), checked("weight_decay", weight_decay)

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdamState) -> tuple[Tree, AdamState]:
        eta, beta1, beta2, epsilon, decay = at(t, lr, *betas, eps, weight_decay)
        if not decoupled:
            g = plus_decay(g, decay, w)
        direction, state = adam_direction(t, g, state, beta1, beta2, epsilon, amsgrad)
        if decoupled:
            direction = plus_decay(direction, decay, w)
        return Multiple(-eta, direction), state

    return transformation(partial(zero_moments, amsgrad=amsgrad), rule)


def zero_moments(params: Tree, step: Tensor, amsgrad: bool = False) -> AdamState:
    """Where the two means start, and the largest second one."""
    return AdamState(step, tree.zeros_like(params), tree.zeros_like(params), tree.zeros_like(params) if amsgrad else ())


def moments(g: Tree, state: AdamState | NAdamState, beta1: Any, beta2: Any) -> tuple[Tree, Tree]:
    """The means of g and g^2, one step on."""
    return mix(beta1, state.mean, g), mix(beta2, state.square, tree.map(torch.square, g))


def adam_direction(t: Tensor, g: Tree, state: AdamState, beta1: Any, beta2: Any, eps: Any, amsgrad: bool = False) -> tuple[Tree, AdamState]:
    """``m^ / (sqrt(v^) + eps)``, and the means."""
    m, v = moments(g, state, beta1, beta2)
    largest = tree.map(at_least, state.largest, v) if amsgrad else ()
    # m^ / (sqrt(v^) + eps) with both corrections drawn to the front, where they are numbers.
    c1, r2 = one_minus_power(beta1, t + 1), one_minus_power(beta2, t + 1).sqrt()
    direction = tree.map(lambda m, v: (r2 / c1) * (m / (root(v) + r2 * eps)), m, largest if amsgrad else v)
    return direction, AdamState(state.step + 1, m, v, largest)


class AdamaxState(NamedTuple):
    step: Tensor
    mean: Tree
    largest: Tree


def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Adamax: ``u = -lr m^ / n'``, ``n' = max(beta2 n, |g| + eps)``: Adam with the largest of the recent gradients.

    m^ as in :func:`adam`; ``weight_decay w`` is added to g first. Keeps two copies of the params. The derivative is that of the
    larger one under the max (their mean at a tie), with slope 0 of |g| at ``g = 0``. Kingma & Ba, 2015, algorithm 2.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = adamax(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked_pair("betas", betas, high=1.0), checked("eps", eps), checked("weight_decay", weight_decay)

    def init(params: Tree, step: Tensor) -> AdamaxState:
        return AdamaxState(step, tree.zeros_like(params), tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdamaxState) -> tuple[Tree, AdamaxState]:
        eta, beta1, beta2, epsilon, decay = at(t, lr, *betas, eps, weight_decay)
        g = plus_decay(g, decay, w)
        m = mix(beta1, state.mean, g)
        n = tree.map(lambda n, g: torch.maximum(beta2 * n, g.abs() + epsilon), state.largest, g)
        rate = eta / one_minus_power(beta1, t + 1)
        return tree.map(lambda m, n: -rate * (m / n), m, n), AdamaxState(state.step + 1, m, n)

    return transformation(init, rule)


class NAdamState(NamedTuple):
    step: Tensor
    mean: Tree
    square: Tree
    mu_product: Tensor


def nadam(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum_decay: Hyperparameter = 4e-3,
    decoupled_weight_decay: bool = False,
) -> DifferentiableTransformation:
    """NAdam, Adam with Nesterov's look-ahead: ``u = -lr (a g + b m') / (sqrt(v^) + eps)``.

    ``a = (1 - mu_n) / (1 - mu_1 .. mu_n)``, ``b = mu_{n+1} / (1 - mu_1 .. mu_{n+1})`` for the step number ``n = t + 1``, with
    ``mu_k = beta1 (1 - 0.96^(k momentum_decay) / 2)``; m' and v^ as in :func:`adam`. ``weight_decay w`` is added to g first, or with
    ``decoupled_weight_decay`` to the direction last. Keeps two copies of the params and a number. Dozat, 2016.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = nadam(lr=0.1, betas=(0.0, 0.999))
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked_pair("betas", betas, high=1.0), checked("eps", eps)
    checked("weight_decay", weight_decay), checked("momentum_decay", momentum_decay)

    def init(params: Tree, step: Tensor) -> NAdamState:
        one = torch.ones((), dtype=precision(params), device=step.device)
        return NAdamState(step, tree.zeros_like(params), tree.zeros_like(params), one)

    def rule(t: Tensor, g: Tree, w: Tree | None, state: NAdamState) -> tuple[Tree, NAdamState]:
        eta, beta1, beta2, epsilon, decay, fade = at(t, lr, *betas, eps, weight_decay, momentum_decay)
        if not decoupled_weight_decay:
            g = plus_decay(g, decay, w)
        m, v = moments(g, state, beta1, beta2)
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * fade)) for k in (t + 1, t + 2))
        product = state.mu_product * mu
        a, b = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
        c2 = one_minus_power(beta2, t + 1)
        direction = tree.map(lambda g, m, v: (a * g + b * m) / (root(v / c2) + epsilon), g, m, v)
        if decoupled_weight_decay:
            direction = plus_decay(direction, decay, w)
        return Multiple(-eta, direction), NAdamState(state.step + 1, m, v, product)

    return transformation(init, rule)


def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
) -> DifferentiableTransformation:
    """RAdam: ``u = -lr m^ r sqrt(1 - beta2^n) / (sqrt(v') + eps)`` once enough gradients were seen, ``-lr m^`` before.

    Enough is ``rho_n > 5``, with the step number ``n = t + 1``, ``rho_n = rho - 2 n beta2^n / (1 - beta2^n)`` and
    ``rho = 2 / (1 - beta2) - 1``; the rectification is ``r^2 = (rho_n - 4) (rho_n - 2) rho / ((rho - 4) (rho - 2) rho_n)``. m^ and v'
    as in :func:`adam`; ``weight_decay w`` is added to g first, or with ``decoupled_weight_decay`` to the direction last. Keeps two
    copies of the params.

    The switch is a jump: the derivative by beta2 is that of the case taken, and does not see that another beta2 switches earlier.
    Liu et al., 2020 (arXiv 1908.03265), algorithm 2.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = radam(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.3000,  0.0500])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    checked("lr", lr), checked_pair("betas", betas, high=1.0), checked("eps", eps), checked("weight_decay", weight_decay)

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdamState) -> tuple[Tree, AdamState]:
        eta, beta1, beta2, epsilon, decay = at(t, lr, *betas, eps, weight_decay)
        if not decoupled_weight_decay:
            g = plus_decay(g, decay, w)
        m, v = moments(g, state, beta1, beta2)
        rectified, factor = _rectification(t + 1, beta2)
        c1 = one_minus_power(beta1, t + 1)

        def of(m: Tensor, v: Tensor) -> Tensor:
            return (m / c1) * torch.where(rectified, factor / (root(v) + epsilon), torch.ones_like(v))

        direction = tree.map(of, m, v)
        if decoupled_weight_decay:
            direction = plus_decay(direction, decay, w)
        return Multiple(-eta, direction), AdamState(state.step + 1, m, v)

    return transformation(zero_moments, rule)


def _rectification(n: Tensor, beta2: Any) -> tuple[Tensor, Tensor]:
    """Whether rho_n > 5, and ``r sqrt(1 - beta2^n)`` (1 where not)."""
    # In float64: rho_n is a small difference of large numbers, and at beta2 = 0.999 it is 4.99 at step 5.
    n = n.to(torch.float64)
    beta2 = beta2 * torch.ones_like(n)
    correction = 1 - beta2**n
    rho = 2 / (1 - beta2) - 1
    rho_n = rho - 2 * n * beta2**n / correction
    rectified = rho_n > 5
    # Where it is not, the roots and quotients have other arguments: theirs may be negative or zero there, and NaN would spread.
    rho, rho_n = torch.where(rectified, rho, 6.0), torch.where(rectified, rho_n, 6.0)
    return rectified, (correction * (rho_n - 4) * (rho_n - 2) * rho / ((rho - 4) * (rho - 2) * rho_n)).sqrt()
