"""DCL: contrastive learning without the positive pair in the denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from metacal._safe import unit
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import mean_over_pairs


@final
@dataclass(frozen=True)
class DCL(SSLObjective):
    """Decoupled contrastive learning: SimCLR's loss with the positive taken out of the normalisation.

    With s the cosine divided by the temperature, for view a of sample i and its positive, view b ::

        l(a, b, i) = log sum_{j != i} [ exp s(z_ia, z_jb) + exp s(z_ia, z_ja) ] - w_iab s(z_ia, z_ib)

    averaged over samples and ordered pairs a != b. Without the positive the gradient does not vanish with small batches, which is
    what tasks of n = N / K samples are. w = 1, or with ``sigma`` the paper's weights of hard positives, constants in derivatives of
    every order ::

        w_iab = 2 - n softmax_i( cos(z_ia, z_ib) / sigma )

    Agrees with ``lightly.loss.DCLLoss`` and ``DCLWLoss``.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: (nm)^2 d multiplications, (nm)^2 similarities in memory.

    Args:
        temperature: > 0, a number or a 0-dim tensor.
        sigma: > 0, the concentration of the weights; None for none.

    Errors:
        ValueError: a temperature or sigma that is not positive; z of another shape, fewer than two views or two samples.

    Source: Yeh et al. 2022, arXiv 2110.06848 (DCL and DCLW).

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: log(2n - 2)
    >>> round(objectives.DCL(temperature=0.1)(objectives.Outputs(same)).item(), 4)
    1.7918
    """

    temperature: float | Tensor = 0.1
    sigma: float | None = None

    def __post_init__(self) -> None:
        weight("temperature", self.temperature, positive=True)
        if self.sigma is not None:
            weight("sigma", self.sigma, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n = z.shape[0]
        cosines = torch.einsum("iad,jbd->aibj", unit(z), unit(z))
        same_sample = torch.eye(n, dtype=torch.bool, device=z.device)[:, None, :]
        to_view = (cosines / self.temperature).masked_fill(same_sample, float("-inf")).logsumexp(-1)  # [a, i, b]
        to_own = to_view.diagonal(dim1=0, dim2=2).T[..., None].expand_as(to_view)
        log_total = torch.stack([to_view, to_own]).logsumexp(0)
        positive = cosines.diagonal(dim1=1, dim2=3).transpose(1, 2)  # [a, b, i] -> [a, i, b]
        w = 1 if self.sigma is None else 2 - n * (positive.detach() / self.sigma).softmax(1)
        return mean_over_pairs((log_total - w * positive / self.temperature).mean(1))
