"""SimSiam: predict the other view, and do not differentiate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._cosine import cross_view_cosine
from metacal.objectives._input import like, views


@final
@dataclass(frozen=True)
class SimSiam(SSLObjective):
    """The negative cosine between the prediction from one view and the representation of another.

    ``- cos(p_a, stop(z_b))``, averaged over samples and ordered pairs a != b: for m = 2 the paper's eq. 4, and the mean of
    the two ``lightly.loss.NegativeCosineSimilarity`` terms. Between -1 and 1.

    ``stop`` makes z_b a constant in derivatives of *every* order, so the inner Hessian is symmetric, as mixed-mode and
    implicit hypergradients need. The price: the gradient field is not the gradient of any function, and its true Jacobian
    has the term d(gradient)/d(z_b) that is left out. A hypergradient through steps on this loss therefore does not equal
    central differences of the whole run; it is the one that holds the targets fixed.

    Shapes: reads ``z`` and ``p`` [n, m >= 2, d]. Cost: n m^2 d multiplications.

    Errors:
        ValueError: p is missing or differs from z in shape; another number of axes; fewer than two views.

    Source: Chen and He 2021, arXiv 2011.10566.

    >>> import torch
    >>> from metacal import objectives
    >>> z = torch.randn(4, 1, 8).expand(4, 2, 8)  # equal views, predicted exactly
    >>> round(objectives.SimSiam()(objectives.Outputs(z, p=3 * z)).item(), 4)
    -1.0
    """

    heads: ClassVar[tuple[str, ...]] = ("projector", "predictor")

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        p = views("p", outputs.p)
        z = like("z", outputs.z, "p", p)
        return -cross_view_cosine(p, z.detach())
