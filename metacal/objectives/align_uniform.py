"""Alignment and uniformity on the hypersphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from metacal._safe import unit
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import fill_diagonal


@final
@dataclass(frozen=True)
class AlignUniform(SSLObjective):
    """Views of a sample are near on the unit sphere, and samples are spread over it.

    With u = z / |z| ::

        alignment * mean_i |u_ia - u_ib|^2
        + uniformity * [ U(u_a) + U(u_b) ] / 2        U(u) = log mean_{i != j} exp(-t |u_i - u_j|^2)

    averaged over pairs of views: the paper's two losses with alpha = 2, uniformity as the mean over views. U is what
    :func:`metacal.evaluate.uniformity` reports for t = 2: 0 at collapse, about -4 for many samples spread evenly.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: m n^2 d multiplications, m n^2 distances in memory.

    Args:
        alignment, uniformity: weights >= 0, numbers or 0-dim tensors.
        t: > 0, a number or a 0-dim tensor; larger looks at nearer neighbours.

    Errors:
        ValueError: a negative weight; z of another shape, fewer than two views or two samples.

    Source: Wang and Isola 2020, arXiv 2005.10242.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: aligned, and as far from uniform as can be
    >>> round(objectives.AlignUniform()(objectives.Outputs(same)).item(), 4) + 0.0
    0.0
    """

    alignment: float | Tensor = 1.0
    uniformity: float | Tensor = 1.0
    t: float | Tensor = 2.0

    def __post_init__(self) -> None:
        weight("alignment", self.alignment)
        weight("uniformity", self.uniformity)
        weight("t", self.t, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        u = unit(views("z", outputs.z, min_samples=2))
        n = u.shape[0]
        # The mean over pairs of |u_a - u_b|^2 is twice the variance over views (divisor m - 1).
        apart = 2 * u.var(dim=1).sum(-1).mean()
        by_view = u.transpose(0, 1)  # [m, n, d]
        squares = by_view.square().sum(-1)
        distances = squares[:, :, None] + squares[:, None, :] - 2 * by_view @ by_view.mT  # [m, n, n]
        log_sum = fill_diagonal(-self.t * distances, float("-inf")).logsumexp((-1, -2))
        return self.alignment * apart + self.uniformity * (log_sum - math.log(n * (n - 1))).mean()
