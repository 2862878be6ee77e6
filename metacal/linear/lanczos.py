"""The Lanczos method with full orthogonalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metacal._safe import nonzero, wide
from metacal._typing import Tree
from metacal.linear.base import (
    Krylov,
    LinearSolution,
    Matvec,
    accumulated,
    extremes,
    measured,
    ratio,
    raveled,
    rounding,
    solved,
    start,
)
from metacal.linear.orthogonal import against


@dataclass(frozen=True)
class Lanczos(Krylov):
    """Solves in the Lanczos basis V, ``v = |b| V T^-1 e_1``, for symmetric A that may be indefinite.

    The k-th iterate leaves a residual orthogonal to the Krylov space: in exact arithmetic that of conjugate gradients, for positive
    definite A. Full orthogonalisation keeps it so in accumulated arithmetic, at a memory of twice ``num_steps`` vectors; ``num_steps``
    products at most, and one for the residual where A is not known to be symmetric. For indefinite A single iterates may not exist or
    be large, and the one with the smallest residual is returned.
    ``curvature`` holds the extreme Ritz values, the most that the products say about the ends of the spectrum.

    Source: Lanczos 1952; Golub & Van Loan, Matrix Computations, chapter 10 and section 11.3.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, -2.0]))
    >>> Lanczos(2).solve(lambda v: A @ v, torch.ones(2)).value.round(decimals=4)
    tensor([ 1.0000, -0.5000])
    """

    needs_symmetry: ClassVar[bool] = True

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, r, num_products = start(A, right, x0)
        small, beta = self.threshold(right), vector_norm(r)
        one = torch.ones_like(beta)
        basis = (ratio(one, beta) * r)[None]  # [k + 1, n], orthonormal rows
        rows: list[tuple[Tensor, ...]] = []
        live, largest, following = ~(beta <= small), beta - beta, beta - beta
        pivot, forward = one, -beta  # of T = L D L^T, and the solution of L forward = |b| e_1
        for k in range(min(self.num_steps, len(r))):  # the Krylov space is no larger than the whole
            w = A(basis[k])
            num_products = num_products + live
            w, h = against(w, basis)
            alpha, before, following = h[k], following, vector_norm(w)
            largest = torch.maximum(largest, alpha.abs() + following)
            forward = -forward if k == 0 else -before * forward / pivot
            pivot = alpha if k == 0 else alpha - before**2 / pivot
            singular = pivot.abs() <= accumulated(largest)  # so far: there is no iterate in this space
            pivot = torch.where(pivot.abs() <= rounding(largest), rounding(largest), pivot)
            residual = following * (forward / pivot).abs()
            rows.append((live, *(torch.where(live, value, 0.0) for value in (alpha, following)), pivot, residual, singular))
            live = live & ~(following <= accumulated(largest)) & ~(residual <= small)  # <=: the Krylov space is complete
            basis = torch.cat([basis, (ratio(one, following, live) * w)[None]])
        used, alphas, betas, pivots, residuals, singular = (torch.stack(column) for column in zip(*rows, strict=True))
        pivots, residuals = torch.where(singular, 0.0, pivots), torch.where(singular, torch.inf, residuals)
        T = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
        y = _galerkin(T, beta, used & _up_to_the_best(residuals, pivots, used))
        # The residual b - A v in the basis: |b| e_1 - T y, and one component beyond.
        e = torch.cat([beta[None] - T[:1] @ y, -T[1:] @ y, -betas[-1:] * y[-1:]])
        x = x + y @ basis[:-1]
        norm, num_products = measured(A, x, right, vector_norm(e), num_products)
        return LinearSolution(unravel(x), norm / nonzero(vector_norm(right)), num_products, extremes(_ritz_values(T, used)))


def _up_to_the_best(residuals: Tensor, pivots: Tensor, used: Tensor) -> Tensor:
    """The Krylov space of the best iterate: all of it while T is positive definite, else that of the smallest residual."""
    steps = torch.arange(len(residuals), device=residuals.device)
    worth = torch.where(used & ~residuals.isnan(), residuals, torch.inf)
    whole = ((pivots > 0) | ~used).all() | worth.isinf().all()  # the latter: a NaN, which should show
    return steps <= torch.where(whole, len(steps), worth.argmin())


def _galerkin(T: Tensor, beta: Tensor, used: Tensor) -> Tensor:
    """y with ``T y = beta e_1`` in the space that is used, 0 elsewhere."""
    eye = torch.eye(len(T), dtype=T.dtype, device=T.device)
    target = torch.where(used, beta * eye[0], 0.0)
    return solved(torch.where(used[:, None] & used, T, eye), target)


def _ritz_values(T: Tensor, used: Tensor) -> Tensor:
    # The space that is not used repeats the first quotient, which is inside the range. eigvalsh refuses NaNs.
    filled = torch.where(used[:, None] & used, T, torch.diag(T[0, 0].expand(len(T))))
    values = torch.linalg.eigvalsh(wide(torch.nan_to_num(filled, posinf=0.0, neginf=0.0))).to(T.dtype)
    return torch.where(filled.isfinite().all() & used[0], values, torch.nan)
