"""Barlow Twins: the cross-correlation of two views should be the identity."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import final

import torch
from torch import Tensor

from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import fill_diagonal


@final
@dataclass(frozen=True)
class BarlowTwins(SSLObjective):
    """Each entry correlates fully with itself across views, and not at all with the others.

    With C the correlation over samples between the entries of views a and b ::

        scale * [ sum_c (1 - C_cc)^2 + lambd * sum_{c != e} C_ce^2 ]

    averaged over unordered pairs of views (swapping a and b transposes C, and changes nothing). Entries are standardised
    as BatchNorm does, with the biased variance + eps. Equals ``scale`` times ``lightly.loss.BarlowTwinsLoss``.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: n d^2 multiplications and d^2 correlations in memory per pair of views.

    Args:
        lambd: weight >= 0 of the off-diagonal, a number or a 0-dim tensor.
        scale: weight >= 0 of the whole; published CIFAR code uses 0.1, the paper 1.
        eps: > 0; keeps derivatives finite where an entry does not vary.

    Errors:
        ValueError: a negative weight; z of another shape, fewer than two views or two samples.

    Source: Zbontar et al. 2021, arXiv 2103.03230, eq. 1 and algorithm 1.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: C = 0, which costs scale * d
    >>> round(objectives.BarlowTwins(scale=0.1)(objectives.Outputs(same)).item(), 4)
    0.8
    """

    lambd: float | Tensor = 5e-3
    scale: float | Tensor = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        weight("lambd", self.lambd)
        weight("scale", self.scale)
        weight("eps", self.eps, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n, m, _ = z.shape
        standard = (z - z.mean(0)) * (z.var(0, correction=0) + self.eps).rsqrt()

        def pair(a: int, b: int) -> Tensor:
            c = standard[:, a].T @ standard[:, b] / n  # [d, d]
            return (1 - c.diagonal()).square().sum() + self.lambd * fill_diagonal(c, 0.0).square().sum()

        return self.scale * torch.stack([pair(a, b) for a, b in combinations(range(m), 2)]).mean()
