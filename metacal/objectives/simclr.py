"""SimCLR's normalised temperature-scaled cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from metacal._safe import unit
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._cosine import cross_view_cosine
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import fill_diagonal, mean_over_pairs


@final
@dataclass(frozen=True)
class SimCLR(SSLObjective):
    """NT-Xent: each view should be nearer to another view of its sample than to the other samples' views.

    With s the cosine divided by the temperature, for view a of sample i and its positive, view b ::

        l(a, b, i) = log( sum_j exp s(z_ia, z_jb) + sum_{j != i} exp s(z_ia, z_ja) ) - s(z_ia, z_ib)

    averaged over samples and ordered pairs a != b: 2n - 2 negatives each, and for m = 2 the paper's eq. 1 exactly. For
    m > 2 this is the mean of the two-view loss over all pairs of views, so its scale does not depend on m. Agrees with
    ``lightly.loss.NTXentLoss``.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: (nm)^2 d multiplications, (nm)^2 similarities in memory.

    Args:
        temperature: > 0; a 0-dim tensor makes it a hyperparameter that can be learned.

    Errors:
        ValueError: a temperature that is not positive; z of another shape, fewer than two views or two samples.

    Source: Chen et al. 2020, arXiv 2002.05709.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.ones(4, 2, 8)  # collapsed: every view of every sample alike, so log(2n - 1)
    >>> round(objectives.SimCLR(temperature=0.5)(objectives.Outputs(same)).item(), 4)
    1.9459
    """

    temperature: float | Tensor = 0.5

    def __post_init__(self) -> None:
        weight("temperature", self.temperature, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        n, m, _ = z.shape
        u = unit(z).transpose(0, 1).flatten(0, 1)  # [m n, d]
        s = fill_diagonal(u @ u.T / self.temperature, float("-inf")).reshape(m, n, m, n)  # no view is its own negative
        to_view = s.logsumexp(-1)  # [a, i, b]: log sum_j exp s(z_ia, z_jb), without j = i where b = a
        to_own = to_view.diagonal(dim1=0, dim2=2).T[..., None].expand_as(to_view)
        # logsumexp of two, as logaddexp's second derivative overflows where one term exceeds the other by 89 in float32.
        log_total = torch.stack([to_view, to_own]).logsumexp(0)  # [a, i, b]
        return mean_over_pairs(log_total.mean(1)) - cross_view_cosine(z, z) / self.temperature
