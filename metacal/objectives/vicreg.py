"""VICReg: variance, invariance, covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import fill_diagonal


@final
@dataclass(frozen=True)
class VICReg(SSLObjective):
    """Views of a sample agree, every entry varies over samples, and entries are uncorrelated.

    For views a and b, with Cov the covariance over samples (divisor n - 1) ::

        invariance * mean (z_a - z_b)^2
        + variance * mean_c [ relu(1 - std_c(z_a)) + relu(1 - std_c(z_b)) ] / 2         std = sqrt(var + eps)
        + covariance * [ sum_{c != e} Cov_ce(z_a)^2 + sum_{c != e} Cov_ce(z_b)^2 ] / d

    averaged over unordered pairs of views. The scales are those of the authors' code and of ``lightly.loss.VICRegLoss``:
    the paper's eq. 6 neither divides the invariance by d nor halves the variance term.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: n m d^2 multiplications, m d^2 covariances in memory.

    Args:
        invariance, variance, covariance: weights >= 0, numbers or 0-dim tensors.
        eps: > 0; keeps the standard deviation's derivatives finite where an entry does not vary.

    Errors:
        ValueError: a negative weight; z of another shape, fewer than two views or two samples.

    Source: Bardes et al. 2022, arXiv 2105.04906.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: only the variance term is left, 25 (1 - sqrt(eps))
    >>> round(objectives.VICReg(25, 25, 1)(objectives.Outputs(same)).item(), 4)
    24.75
    """

    invariance: float | Tensor = 25.0
    variance: float | Tensor = 25.0
    covariance: float | Tensor = 1.0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        weight("invariance", self.invariance)
        weight("variance", self.variance)
        weight("covariance", self.covariance)
        weight("eps", self.eps, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n, m, d = z.shape
        # The mean over pairs of |z_a - z_b|^2 is twice the variance over views (divisor m - 1).
        disagreement = 2 * z.var(dim=1).mean()
        std = (z.var(dim=0) + self.eps).sqrt()  # [m, d]
        collapse = (1 - std).relu().mean()
        centred = z - z.mean(0)
        cov = torch.einsum("nac,nae->ace", centred, centred) / (n - 1)  # [m, d, d]
        redundancy = 2 * fill_diagonal(cov, 0.0).square().sum() / (m * d)  # a pair has two views: twice the mean over views
        return self.invariance * disagreement + self.variance * collapse + self.covariance * redundancy
