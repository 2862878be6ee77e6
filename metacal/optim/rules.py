"""Optimizers, each written as its published formula, with ``torch.optim``'s names, defaults and numbers.

Notation: w parameters, g gradient, t the number of steps taken before, u the update that is added to w. All are pure, whatever
``inplace`` says, cost a few elementwise operations, and differentiate by g, w, the state and every hyperparameter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.optim.transformation import DifferentiableTransformation, Hyperparameter, at, checked, is_off, transformation


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

    As in ``torch.optim.SGD`` the first step is not dampened. Nesterov's form moves along ``g + momentum m'``. Keeps one copy of
    the params with momentum, nothing without. Sutskever et al., 2013.

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
        g = _plus_decay(g, decay, w)
        if not with_momentum:
            return tree.scale(-eta, g), SGDState(state.step + 1, ())
        keep = 1 - tau * t.clamp(max=1)  # all of the first gradient
        m = tree.map(lambda m, g: mu * m + keep * g, state.momentum, g)
        direction = tree.axpy(mu, m, g) if nesterov else m
        return tree.scale(-eta, direction), SGDState(state.step + 1, m)

    return transformation(init, rule)


class AdamState(NamedTuple):
    step: Tensor
    mean: Tree
    square: Tree


def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> DifferentiableTransformation:
    """Adam: ``u = -lr m^ / (sqrt(v^) + eps)``, the decaying means of g and g^2 corrected for their start at zero.

    ``m' = beta1 m + (1 - beta1) g``, ``m^ = m' / (1 - beta1^(t+1))``, and v with ``beta2`` and ``g^2``; ``weight_decay w`` is
    added to g first. Keeps two copies of the params. Kingma & Ba, 2015, algorithm 1.

    The root's derivative at ``v = 0`` is taken as 0, which makes that of the whole update right: a coordinate whose gradient was
    always 0 has ``du/dg = -lr / eps`` at its first step.

    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = adam(lr=0.1)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([-0.1000,  0.1000])

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=False)


def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
) -> DifferentiableTransformation:
    """Adam with decoupled weight decay: :func:`adam`'s update without decay, plus ``-lr weight_decay w``.

    Its fixed points are not the zeros of the gradient unless ``weight_decay=0``: implicit differentiation refuses it otherwise.
    Loshchilov & Hutter, 2019, algorithm 2.

    >>> optimizer = adamw(lr=0.1, weight_decay=0.1)
    >>> params = {"w": torch.tensor(2.0)}
    >>> updates, state = optimizer.update({"w": torch.tensor(0.0)}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor(-0.0200)

    Errors:
        ValueError: a number is out of range, or a tensor has dimensions.
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=True)


def _adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    decoupled: bool,
) -> DifferentiableTransformation:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"`betas` should be a pair (beta1, beta2), got {betas!r}. Pass for instance betas=(0.9, 0.999).")
    checked("lr", lr), checked("eps", eps), checked("weight_decay", weight_decay)
    checked("betas[0]", betas[0], high=1.0), checked("betas[1]", betas[1], high=1.0)

    def init(params: Tree, step: Tensor) -> AdamState:
        return AdamState(step, tree.zeros_like(params), tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdamState) -> tuple[Tree, AdamState]:
        eta, beta1, beta2, epsilon, decay = at(t, lr, *betas, eps, weight_decay)
        if not decoupled:
            g = _plus_decay(g, decay, w)
        m = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, g)
        v = tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, g)
        c1, c2 = _one_minus_power(beta1, t + 1), _one_minus_power(beta2, t + 1)
        direction = tree.map(lambda m, v: (m / c1) / (_sqrt(v / c2) + epsilon), m, v)
        if decoupled:
            direction = _plus_decay(direction, decay, w)
        return tree.scale(-eta, direction), AdamState(state.step + 1, m, v)

    return transformation(init, rule)


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
        g = _plus_decay(g, decay, w)
        v = tree.map(lambda v, g: a * v + (1 - a) * g * g, state.square, g)
        mean = tree.map(lambda mean, g: a * mean + (1 - a) * g, state.mean, g) if centered else ()
        variance = tree.map(lambda v, mean: v - mean * mean, v, mean) if centered else v
        direction = tree.map(lambda g, variance: g / (_sqrt(variance) + epsilon), g, variance)
        m = tree.axpy(mu, state.momentum, direction) if with_momentum else ()
        return tree.scale(-eta, m if with_momentum else direction), RMSpropState(state.step + 1, v, mean, m)

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
        (start,) = at(step, initial_accumulator_value)
        return AdagradState(step, tree.map(lambda p: (torch.zeros_like(p) + start).to(p.dtype), params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: AdagradState) -> tuple[Tree, AdagradState]:
        eta, fade, decay, epsilon = at(t, lr, lr_decay, weight_decay, eps)
        g = _plus_decay(g, decay, w)
        s = tree.map(lambda s, g: s + g * g, state.sum, g)
        rate = eta / (1 + t * fade)
        return tree.map(lambda g, s: -rate * (g / (_sqrt(s) + epsilon)), g, s), AdagradState(state.step + 1, s)

    return transformation(init, rule)


class ClipState(NamedTuple):
    step: Tensor


def clip_by_global_norm(max_norm: Hyperparameter) -> DifferentiableTransformation:
    """Scales the gradient by ``min(1, max_norm / (|g| + 1e-6))``, |g| over all leaves: ``torch.nn.utils.clip_grad_norm_``.

    The coefficient is differentiated too, unlike in ``torchopt.clip_grad_norm``. Put it before an optimizer in :func:`chain`.

    >>> optimizer = clip_by_global_norm(1.0)
    >>> updates, _ = optimizer.update({"w": torch.tensor([3.0, 4.0])}, optimizer.init({"w": torch.zeros(2)}))
    >>> updates["w"]
    tensor([0.6000, 0.8000])

    Errors:
        ValueError: ``max_norm`` is negative, or a tensor with dimensions.
    """
    checked("max_norm", max_norm)

    def rule(t: Tensor, g: Tree, w: Tree | None, state: ClipState) -> tuple[Tree, ClipState]:
        (limit,) = at(t, max_norm)
        coefficient = (limit / (tree.norm(g) + 1e-6)).clamp(max=1.0)
        return tree.scale(coefficient, g), ClipState(state.step + 1)

    return transformation(lambda params, step: ClipState(step), rule)


def _plus_decay(x: Tree, decay: Any, w: Tree | None) -> Tree:
    """``x + decay w``."""
    if is_off(decay):
        return x
    if w is None:
        raise ValueError("`params` should be given to an optimizer with weight decay: update(grads, state, params=params).")
    return tree.axpy(decay, w, x)


def _one_minus_power(beta: Any, n: Tensor) -> Tensor:
    """``1 - beta^n``; for a number without the cancellation, which costs float32 five digits in Adam's first steps."""
    if isinstance(beta, Tensor):
        return 1 - beta**n
    return -torch.expm1(n * math.log(beta)) if beta else torch.ones_like(n)


def _sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0 instead of infinity (which a following 0 turns into NaN). A NaN stays NaN."""
    at_zero = x == 0
    return torch.where(at_zero, torch.zeros_like(x), torch.where(at_zero, torch.ones_like(x), x).sqrt())
