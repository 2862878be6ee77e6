"""BYOL: predict what a slowly moving copy of the network makes of the other view."""

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
class BYOL(SSLObjective):
    """The squared distance between the normalised prediction from one view and the normalised target of another.

    ``|p_a/|p_a| - t_b/|t_b||^2 = 2 - 2 cos(p_a, t_b)``, averaged over samples and ordered pairs a != b. Between 0 and 4;
    for m = 2 *half* of the paper's symmetrised loss, which sums the two directions, and 2 + 2 times the mean of the two
    ``lightly.loss.NegativeCosineSimilarity`` terms.

    The target is a constant in derivatives of every order. It follows the networks once per outer iteration, by
    :func:`metacal.objectives.ema`, never inside an inner step.

    Shapes: reads ``p`` and ``target`` [n, m >= 2, d]. Cost: n m^2 d multiplications.

    Errors:
        ValueError: p or target is missing, or they differ in shape; another number of axes; fewer than two views.

    Source: Grill et al. 2020, arXiv 2006.07733, eq. 2.

    >>> import torch
    >>> from metacal import objectives
    >>> z = torch.randn(4, 1, 8).expand(4, 2, 8)
    >>> round(objectives.BYOL()(objectives.Outputs(z, p=-z, target=z)).item(), 4)  # opposite to the target
    4.0
    """

    heads: ClassVar[tuple[str, ...]] = ("projector", "predictor")
    ema_target: ClassVar[bool] = True

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        p = views("p", outputs.p)
        target = like("target", views("target", outputs.target), "p", p)
        return 2 - 2 * cross_view_cosine(p, target.detach())
