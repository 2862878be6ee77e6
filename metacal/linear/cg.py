"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metacal import tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.linear.base import (
    Krylov,
    LinearSolution,
    Matvec,
    Preconditioner,
    extremes,
    raveled,
    rounding,
    start,
)


@dataclass(frozen=True)
class CG(Krylov):
    """Conjugate gradients, for symmetric positive definite A: the k-th iterate minimises the energy ``<x, A x>/2 - <b, x>``.

    ``num_steps`` products at most, and those of ``x0`` and of the preconditioner. Memory: seven vectors. Exact after as many steps as
    A has distinct eigenvalues; the error in the A-norm shrinks by ``(sqrt(k)-1)/(sqrt(k)+1)`` per step for condition number k (of
    ``P A`` with a preconditioner P). Each iterate is better than those before it in that norm, so the last is returned, though the
    residual may rise on the way, above 1 too. A lane that meets a direction of non-positive curvature, to rounding, stands still
    there: ``curvature`` says so.

    Args:
        num_steps: at most so many steps, one product each.
        tolerance: a relative residual that is small enough; the dtype's epsilon by default.
        warm_start: start from the previous solution.
        preconditioner: a symmetric positive definite approximation of the inverse, such as ``Diagonal(4)``.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright, algorithms 5.2 and 5.3.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> CG(2).solve(lambda v: A @ v, torch.tensor([3.0, 4.0])).value.round(decimals=4)
    tensor([1., 1.])
    """

    preconditioner: Preconditioner | None = None
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(
                f"`preconditioner` should be one fixed linear map such as linear.Diagonal(4), got {type(self.preconditioner).__name__}."
            )

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, r, num_products = start(A, right, x0)
        precondition = lambda r: r  # noqa: E731
        if self.preconditioner is not None:
            inverse = self.preconditioner.inverse(matvec, b)
            precondition = lambda r: tree.ravel(inverse.apply(unravel(r)))[0]  # noqa: E731
            num_products = num_products + inverse.num_products
        p = z = precondition(r)
        rz, norm = tree.vdot(r, z), vector_norm(r)
        small, live = self.threshold(right), torch.ones_like(norm, dtype=torch.bool)
        zero = highest = torch.zeros_like(norm)
        met: list[tuple[Tensor, Tensor, Tensor]] = []  # Rayleigh quotients, which of them are flat, and which lanes were under way
        for _ in range(self.num_steps):
            # A NaN is not "converged": every comparison is written so that it goes on and shows in the residual.
            live = live & ~(norm <= small)
            Ap = A(p)
            pAp = (p * Ap).sum()
            num_products = num_products + live
            quotient = pAp / (p * p).sum()
            highest = torch.fmax(highest, quotient.abs())
            flat = quotient <= rounding(highest)
            met.append((quotient, flat, live))
            live = live & ~(flat | (rz <= 0))
            alpha = torch.where(live, rz / pAp, zero)
            x = x + alpha * p
            r = r - alpha * Ap
            z = precondition(r)
            previous, rz, norm = rz, (r * z).sum(), vector_norm(r)
            p = z + torch.where(live, rz / previous, zero) * p
        quotients, flats, lives = (torch.stack(column) for column in zip(*met, strict=True))
        quotients = torch.where(lives, torch.where(flats, quotients.clamp(max=0.0), quotients), torch.nan)
        return LinearSolution(unravel(x), norm / nonzero(vector_norm(right)), num_products, extremes(quotients))

    def trouble(self, residual_norm: float, num_products: float, curvature_min: float, curvature_max: float) -> str | None:
        if curvature_min <= 0:
            return (
                "conjugate gradients met a direction of non-positive curvature and stopped there (stats['curvature_min'] <= 0): the "
                "matrix is not positive definite, so the params are no minimum of the inner objective, and the hypergradient is only "
                "partly solved for. Train the inner problem further, add `damping` above -curvature_min, take "
                "operator=linear.GaussNewton(...), or a solver for indefinite matrices such as linear.MINRES."
            )
        # Positive curvature all the way: the energy fell, whatever the residual did.
        return super().trouble(min(residual_norm, 1.0), num_products, curvature_min, curvature_max)
