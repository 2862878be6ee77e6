"""The minimal residual method for symmetric matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.linalg import vector_norm

from metacal import tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.linear.base import Best, Krylov, LinearSolution, Matvec, accumulated, extremes, measured, ratio, raveled, start


@dataclass(frozen=True)
class MINRES(Krylov):
    """Minimal residuals, for symmetric A that may be indefinite: the k-th iterate minimises ``|b - A x|`` over the Krylov space.

    ``num_steps`` products at most, and one for the residual where A is not known to be symmetric. Memory: twelve vectors. For
    positive definite A the residual shrinks by ``(sqrt(k)-1)/(sqrt(k)+1)`` per step for condition number k; for indefinite A with a
    spectrum symmetric about 0, by ``(k-1)/(k+1)`` per two steps. Of a singular system without a solution it finds a least squares solution.

    Source: Paige & Saunders 1975, Solution of sparse indefinite systems of linear equations.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, -2.0]))
    >>> MINRES(2).solve(lambda v: A @ v, torch.ones(2)).value.round(decimals=4)
    tensor([ 1.0000, -0.5000])
    """

    needs_symmetry: ClassVar[bool] = True

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, r, num_products = start(A, right, x0)
        beta = vector_norm(r)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        v, v_before = ratio(one, beta) * r, torch.zeros_like(r)  # Lanczos vectors
        w = w_before = torch.zeros_like(r)  # directions of the update
        c, s, c_before, s_before = one, zero, one, zero  # the last two rotations
        phi = beta  # |phi| is the residual norm
        beta = zero
        best, small = Best(x, phi), self.threshold(right)
        quotients = []  # <v, A v> of unit vectors
        largest, live = zero, torch.ones_like(phi, dtype=torch.bool)
        for _ in range(self.num_steps):
            live = live & ~(phi.abs() <= small)
            Av = A(v)
            num_products = num_products + live
            # A v_k = beta_k v_{k-1} + alpha v_k + beta_{k+1} v_{k+1}
            alpha = tree.vdot(v, Av)
            quotients.append(torch.where(live, alpha, torch.nan))
            u = Av - beta * v_before - alpha * v
            following = vector_norm(u)
            largest = torch.maximum(largest, alpha.abs() + following)
            # The new column (beta, alpha, following) of the tridiagonal matrix, rotated to (epsilon, delta, gamma)
            epsilon, rotated = s_before * beta, c_before * beta
            delta, gamma_bar = c * rotated + s * alpha, c * alpha - s * rotated
            gamma = torch.hypot(gamma_bar, following)
            live = live & ~(gamma <= accumulated(largest))  # the rest of b is out of the range of A
            c_before, s_before, c, s = c, s, ratio(gamma_bar, gamma, live), ratio(following, gamma, live)
            w_before, w = w, ratio(one, gamma, live) * (v - epsilon * w_before - delta * w)
            x = x + c * phi * w
            phi = torch.where(live, -s * phi, phi)
            live = live & ~(following <= accumulated(largest))  # the Krylov space is complete
            v_before, v, beta = v, ratio(one, following) * u, following
            best = best.or_better(x, phi.abs())
        norm, num_products = measured(A, best.value, right, best.residual, num_products)
        return LinearSolution(unravel(best.value), norm / nonzero(vector_norm(right)), num_products, extremes(torch.stack(quotients)))
