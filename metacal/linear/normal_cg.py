"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.linalg import vector_norm

from metacal import tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.linear.base import (
    Best,
    Krylov,
    LinearSolution,
    Matvec,
    extremes,
    ratio,
    raveled,
    rayleigh,
    rounding,
    start,
    transposable,
)


@dataclass(frozen=True)
class NormalCG(Krylov):
    """Conjugate gradients on ``A^T A v = A^T b`` (CGNR), for any A, also non-symmetric and singular.

    The k-th iterate minimises the residual over span(A^T b, (A^T A) A^T b, ...); of a singular system without a solution it finds
    the least squares solution. Two products per step, one with A and one with A^T: ``2 num_steps`` at most, and one more where A is
    a plain function, whose transpose is derived. Memory: nine vectors. Slow where A is ill-conditioned: the condition number is
    squared.

    Source: Hestenes & Stiefel 1952, section 10; Saad, Iterative Methods for Sparse Linear Systems, algorithm 8.4.

    >>> import torch
    >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> NormalCG(2).solve(lambda v: A @ v, torch.tensor([2.0, 1.0])).value.round(decimals=4)
    tensor([1., 1.])
    """

    products_per_step: ClassVar[int] = 2

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, product, unravel = raveled(matvec, b)
        A, spent = transposable(product, right)
        x, r, num_products = start(A, right, x0)
        num_products = num_products + spent
        p, norm = torch.zeros_like(r), vector_norm(r)
        previous = largest = torch.zeros_like(norm)
        best, small, quotients = Best(x, norm), self.threshold(right), []
        live = torch.ones_like(norm, dtype=torch.bool)
        for _ in range(self.num_steps):
            live = live & ~(norm <= small)
            s = A.transpose(r)
            ss = tree.vdot(s, s)
            num_products = num_products + live
            live = live & ~(ss <= rounding(largest * norm) ** 2)  # a least squares solution
            p = s + ratio(ss, previous) * p
            Ap = A(p)
            size = tree.vdot(Ap, Ap)
            num_products = num_products + live
            largest = torch.maximum(largest, ratio(size, tree.vdot(p, p)).sqrt())
            quotients.append(torch.where(live, rayleigh(p, Ap), torch.nan))
            alpha, previous = ratio(ss, size, live & ~(size <= 0)), ss
            x = x + alpha * p
            r = r - alpha * Ap
            norm = vector_norm(r)
            best = best.or_better(x, norm)
        residual_norm = best.residual / nonzero(vector_norm(right))
        return LinearSolution(unravel(best.value), residual_norm, num_products, extremes(torch.stack(quotients)))
