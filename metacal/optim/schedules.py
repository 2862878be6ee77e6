"""Schedules: values that change with the number of steps taken, for any hyperparameter of :mod:`metacal.optim`.

Called with the number of steps already taken (0 at the first), a 0-dim floating tensor t, they give a 0-dim tensor, as do a
``lambda`` and any other function of it. Their settings are numbers or 0-dim tensors and are differentiated (counts of steps, where
marked so, are plain integers). Behind their end they keep their last value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metacal import _checks
from metacal._safe import nonzero
from metacal.optim.transformation import checked


@dataclass(frozen=True)
class Constant:
    """``value``.

    >>> Constant(0.1)(torch.tensor(7.0))
    tensor(0.1000)
    """

    value: float | Tensor

    def __post_init__(self) -> None:
        checked("value", self.value, low=-math.inf)

    def __call__(self, t: Tensor) -> Tensor:
        return self.value * torch.ones_like(t)


@dataclass(frozen=True)
class Linear:
    """``start + (end - start) min(1, t / num_steps)``: a straight line; with ``start=0`` a warm-up.

    >>> Linear(0.0, 0.1, num_steps=10)(torch.tensor(5.0))
    tensor(0.0500)
    """

    start: float | Tensor
    end: float | Tensor
    num_steps: float | Tensor

    def __post_init__(self) -> None:
        checked("start", self.start, low=-math.inf), checked("end", self.end, low=-math.inf)
        checked("num_steps", self.num_steps, low=1.0)

    def __call__(self, t: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * _share(t, self.num_steps)


@dataclass(frozen=True)
class Cosine:
    """``end + (start - end) (1 + cos(pi min(1, t / num_steps))) / 2``: half a period. Loshchilov & Hutter, 2017 (arXiv 1608.03983).

    >>> Cosine(0.1, num_steps=10)(torch.tensor(5.0))
    tensor(0.0500)
    """

    start: float | Tensor
    num_steps: float | Tensor
    end: float | Tensor = 0.0

    def __post_init__(self) -> None:
        checked("start", self.start, low=-math.inf), checked("end", self.end, low=-math.inf)
        checked("num_steps", self.num_steps, low=1.0)

    def __call__(self, t: Tensor) -> Tensor:
        return self.end + (self.start - self.end) * 0.5 * (1 + torch.cos(math.pi * _share(t, self.num_steps)))


@dataclass(frozen=True)
class WarmupCosine:
    """A straight line from ``start`` to ``peak`` in ``warmup_steps``, then half a cosine down to ``end`` at ``num_steps``.

    >>> [round(float(WarmupCosine(0.1, 10, 30)(torch.tensor(t))), 3) for t in (0.0, 5.0, 10.0, 20.0, 30.0)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    peak: float | Tensor
    warmup_steps: float | Tensor
    num_steps: float | Tensor
    start: float | Tensor = 0.0
    end: float | Tensor = 0.0

    def __post_init__(self) -> None:
        checked("peak", self.peak, low=-math.inf), checked("start", self.start, low=-math.inf), checked("end", self.end, low=-math.inf)
        checked("warmup_steps", self.warmup_steps, low=1.0), checked("num_steps", self.num_steps, low=1.0)
        if not any(isinstance(n, Tensor) for n in (self.warmup_steps, self.num_steps)) and self.num_steps <= self.warmup_steps:
            raise ValueError(
                f"`num_steps` counts the warm-up too: it should exceed warmup_steps={self.warmup_steps}, got {self.num_steps}."
            )

    def __call__(self, t: Tensor) -> Tensor:
        rising = Linear(self.start, self.peak, self.warmup_steps)(t)
        falling = Cosine(self.peak, self.num_steps - self.warmup_steps, self.end)((t - self.warmup_steps).clamp(min=0.0))
        return torch.where(t < self.warmup_steps, rising, falling)


@dataclass(frozen=True)
class Exponential:
    """``start gamma^t``.

    >>> Exponential(0.1, gamma=0.5)(torch.tensor(2.0))
    tensor(0.0250)
    """

    start: float | Tensor
    gamma: float | Tensor

    def __post_init__(self) -> None:
        checked("start", self.start, low=-math.inf), checked("gamma", self.gamma)

    def __call__(self, t: Tensor) -> Tensor:
        return self.start * _power(self.gamma, t)


@dataclass(frozen=True)
class Step:
    """``start gamma^floor(t / every)``; ``every`` is an integer.

    >>> Step(0.1, every=10, gamma=0.5)(torch.tensor(19.0))
    tensor(0.0500)
    """

    start: float | Tensor
    every: int
    gamma: float | Tensor = 0.1

    def __post_init__(self) -> None:
        checked("start", self.start, low=-math.inf), checked("gamma", self.gamma)
        _checks.whole("every", self.every)

    def __call__(self, t: Tensor) -> Tensor:
        return self.start * _power(self.gamma, torch.floor(t / self.every))


@dataclass(frozen=True)
class MultiStep:
    """``start gamma^k`` with k the number of ``milestones`` (integers) that t has reached.

    >>> MultiStep(0.1, milestones=(10, 15), gamma=0.5)(torch.tensor(15.0))
    tensor(0.0250)
    """

    start: float | Tensor
    milestones: tuple[int, ...]
    gamma: float | Tensor = 0.1

    def __post_init__(self) -> None:
        checked("start", self.start, low=-math.inf), checked("gamma", self.gamma)
        for i, milestone in enumerate(self.milestones):
            _checks.whole(f"milestones[{i}]", milestone)

    def __call__(self, t: Tensor) -> Tensor:
        reached = sum(((t >= milestone).to(t.dtype) for milestone in self.milestones), torch.zeros_like(t))
        return self.start * _power(self.gamma, reached)


def _share(t: Tensor, num_steps: float | Tensor) -> Tensor:
    """The part of the way that is done, at most 1."""
    return (t / num_steps).clamp(max=1.0)


def _power(gamma: float | Tensor, n: Tensor) -> Tensor:
    """``gamma^n`` for a count n: the second derivative of ``0^0`` by its base is 0, and not NaN as torch's in reverse mode."""
    return torch.where(n == 0, 1.0, gamma ** nonzero(n))
