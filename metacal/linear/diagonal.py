"""The diagonal of a matrix from a few products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metacal import _checks, tree
from metacal._typing import Tree
from metacal.linear.base import Inverse, Matvec, Preconditioner
from metacal.linear.signs import signs


@dataclass(frozen=True)
class Diagonal(Preconditioner):
    """Divides by the diagonal of A, estimated as the mean of ``z * (A z)`` over random signs z.

    ``num_probes`` products. The estimate is unbiased, exact in one probe for diagonal A; its variance is the sum of the squares
    of the row's other entries, over ``num_probes``, so it serves matrices whose diagonal is large in each row. Absolute values,
    and at least sqrt(eps) of their mean, keep it positive. The signs come from a generator of their own, seeded with ``seed``:
    equal in every lane of a vmap, and nobody else's random numbers change.

    As a solver of its own it neglects what is off the diagonal; one more product for the true residual.

    Source: Bekas, Kokiopoulou & Saad 2007, An estimator for the diagonal of a matrix; Hutchinson 1990.

    >>> import torch
    >>> Diagonal(1).solve(lambda v: torch.tensor([2.0, 4.0]) * v, torch.ones(2)).value
    tensor([0.5000, 0.2500])
    """

    num_probes: int
    seed: int = 0
    polynomial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("num_probes", self.num_probes)

    def inverse(self, matvec: Matvec, like: Tree) -> Inverse:
        d = self.estimate(matvec, like)
        size = tree.map(torch.abs, d)
        mean = sum(x.sum() for x in tree.leaves(size)) / tree.num_elements(size)
        floor = torch.finfo(mean.dtype).eps ** 0.5 * mean
        # Written so that a NaN stays.
        positive = tree.map(lambda x: torch.where(x <= floor, floor, x), size)
        return Inverse(lambda b: tree.map(torch.div, b, positive), self.num_probes)

    def estimate(self, matvec: Matvec, like: Tree) -> Tree:
        """The diagonal of A, a tree like ``like``."""
        total = tree.zeros_like(like)
        for z in signs(like, self.num_probes, self.seed):
            total = tree.add(total, tree.map(torch.mul, z, matvec(z)))
        return tree.scale(1 / self.num_probes, total)
