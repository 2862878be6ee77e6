"""Stabilised biconjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metacal import tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.linear.base import Best, Krylov, LinearSolution, Matvec, extremes, ratio, raveled, rayleigh, rounding, start


@dataclass(frozen=True)
class BiCGSTAB(Krylov):
    """Stabilised biconjugate gradients, for any A, without its transpose and in the memory of nine vectors.

    Two products per step: ``2 num_steps`` at most. No iterate is optimal and the residual may rise on the way, so the best one is
    returned; exact after n steps in exact arithmetic. A lane whose recurrence breaks down stands still.

    Source: van der Vorst 1992, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> BiCGSTAB(2).solve(lambda v: A @ v, torch.tensor([3.0, 1.0])).value.round(decimals=4)
    tensor([1., 1.])
    """

    products_per_step: ClassVar[int] = 2

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, r, num_products = start(A, right, x0)
        shadow, p, norm = r, r, vector_norm(r)
        rho = tree.vdot(shadow, r)
        best, small, quotients = Best(x, norm), self.threshold(right), []
        live, largest, size = torch.ones_like(norm, dtype=torch.bool), torch.zeros_like(norm), vector_norm(right)

        def meant(x: Tensor) -> Tensor:
            # In a singular system x may run away until a product with it is all rounding.
            return ~(rounding(largest * vector_norm(x)) > size)

        for _ in range(self.num_steps):
            live = live & ~(norm <= small)
            Ap = A(p)
            num_products = num_products + live
            quotients.append(torch.where(live, rayleigh(p, Ap), torch.nan))
            largest = torch.maximum(largest, ratio(vector_norm(Ap), vector_norm(p)))
            against = tree.vdot(shadow, Ap)
            live = live & ~(rho == 0) & ~(against == 0)
            live = live & meant(x + ratio(rho, against, live) * p)
            alpha = ratio(rho, against, live)
            x = x + alpha * p
            r = r - alpha * Ap
            norm = vector_norm(r)
            best = best.or_better(x, norm)
            live = live & ~(norm <= small)
            Ar = A(r)
            num_products = num_products + live
            quotients.append(torch.where(live, rayleigh(r, Ar), torch.nan))
            omega = ratio(tree.vdot(Ar, r), tree.vdot(Ar, Ar), live)
            live = live & meant(x + omega * r)
            omega = torch.where(live, omega, 0.0)
            x = x + omega * r
            r = r - omega * Ar
            norm = vector_norm(r)
            best = best.or_better(x, norm)
            live = live & ~(omega == 0)
            previous, rho = rho, tree.vdot(shadow, r)
            beta = ratio(rho * alpha, previous * omega, live)
            p = r + beta * (p - omega * Ap)
        return LinearSolution(unravel(best.value), best.residual / nonzero(size), num_products, extremes(torch.stack(quotients)))
