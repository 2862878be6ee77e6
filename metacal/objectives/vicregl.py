"""VICRegL's loss on whole images: VICReg with global and local crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from metacal import _checks
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives.vicreg import VICReg


@final
@dataclass(frozen=True)
class VICRegL(SSLObjective):
    """The global part of VICRegL: every view agrees with the global ones; each varies, and has uncorrelated entries.

    The first G of the m views are global crops, the others local ones. With Cov the covariance over samples (divisor n - 1) ::

        invariance * mean_{a <= G, b != a} mean (z_a - z_b)^2
        + variance * mean_{a, c} relu(1 - std_c(z_a))                std = sqrt(var + eps)
        + covariance * mean_a sum_{c != e} Cov_ce(z_a)^2 / d

    Local views are never compared with each other. With all views global it is VICReg at half the weight of covariance, which
    averages over the views here instead of adding two. Agrees with the global part of ``lightly.loss.VICRegLLoss``. What VICRegL
    adds, the matching of feature maps by place and by value (its weight is 1 - alpha), is not here: representations are vectors.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: n m d (d + G) multiplications, m d^2 covariances and G m n d differences in memory.

    Args:
        invariance, variance, covariance: weights >= 0, numbers or 0-dim tensors.
        num_global: G, the global views, which come first; None for all.
        eps: > 0; keeps the standard deviation's derivatives finite where an entry does not vary.

    Errors:
        ValueError: a negative weight; more global views than views; z of another shape, fewer than two views or two samples.

    Source: Bardes et al. 2022, arXiv 2210.01571.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 6, 8)  # collapsed: only the variance term is left, 25 (1 - sqrt(eps))
    >>> round(objectives.VICRegL(num_global=2)(objectives.Outputs(same)).item(), 4)
    24.75
    """

    invariance: float | Tensor = 25.0
    variance: float | Tensor = 25.0
    covariance: float | Tensor = 1.0
    num_global: int | None = None
    eps: float = 1e-4

    def __post_init__(self) -> None:
        weight("invariance", self.invariance)
        weight("variance", self.variance)
        weight("covariance", self.covariance)
        weight("eps", self.eps, positive=True)
        if self.num_global is not None:
            _checks.whole("num_global", self.num_global)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n, m, d = z.shape
        G = m if self.num_global is None else self.num_global
        if m < G:
            raise ValueError(f"`outputs.z` should hold the num_global = {G} global views and the local ones, got m = {m} views.")
        distances = (z[:, :G, None] - z[:, None]).square().sum((0, -1)) / (n * d)  # [G, m], zero from a view to itself
        spread = VICReg(0.0, self.variance, self.covariance / 2, self.eps)
        return self.invariance * distances.sum() / (G * (m - 1)) + spread(outputs)
