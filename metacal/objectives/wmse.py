"""W-MSE: whiten every view's batch, then bring the views of a sample together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._cosine import cross_view_cosine
from metacal.objectives._input import share, views


@final
@dataclass(frozen=True)
class WMSE(SSLObjective):
    """The squared distance between the normalised whitened representations of two views.

    For every view by itself, with mean mu and covariance Sigma (divisor n - 1) over samples ::

        v = L^-1 (z - mu),    L L^T = (1 - eps) Sigma + eps I        (Cholesky)
        l(a, b, i) = | v_ia/|v_ia| - v_ib/|v_ib| |^2 = 2 - 2 cos(v_ia, v_ib)

    averaged over samples and pairs of views: whitened batches fill the space, so nothing else keeps from collapse. Agrees with
    ``lightly.loss.WMSELoss`` where its sub-batches are the whole batch.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: m (n d^2 + d^3 / 3) multiplications, m d^2 in memory. The paper takes n >= 2 d (and
    cuts random sub-batches of that size): with n <= d every batch can be whitened perfectly, and the loss sees little but noise.

    Args:
        eps: in [0, 1], shrinks the covariance towards the identity. The paper has none; ours keeps derivatives finite at collapse.

    Errors:
        ValueError: eps outside [0, 1]; eps = 0 with n <= d, where Sigma has no inverse; z of another shape. A covariance that is
            numerically singular gives NaN.

    Source: Ermolov et al. 2021, arXiv 2007.06346.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: nothing is left after centring, and zero has cosine 0 with anything
    >>> round(objectives.WMSE()(objectives.Outputs(same)).item(), 4)
    2.0
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        share("eps", self.eps)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n, _, d = z.shape
        if self.eps == 0 and n <= d:
            raise ValueError(
                f"`outputs.z` should hold more samples than entries to be whitened without shrinkage, got n = {n} and d = {d}. Use a "
                "larger batch, fewer tasks, a smaller projection, or eps > 0."
            )
        centred = (z - z.mean(0)).transpose(0, 1)  # [m, n, d]
        cov = centred.mT @ centred / (n - 1)
        identity = torch.eye(d, dtype=z.dtype, device=z.device)
        # cholesky asks the host whether it succeeded, in every step; cholesky_ex leaves that to us.
        L, failed = torch.linalg.cholesky_ex((1 - self.eps) * cov + self.eps * identity)
        L = torch.where(failed[:, None, None] == 0, L, torch.nan)
        white = torch.linalg.solve_triangular(L, centred.mT, upper=False)  # [m, d, n]
        white = white.permute(2, 0, 1)
        return 2 - 2 * cross_view_cosine(white, white)
