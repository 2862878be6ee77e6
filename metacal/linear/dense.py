"""The matrix itself, column by column, and a direct solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metacal import _checks
from metacal._safe import wide
from metacal._typing import Tree
from metacal.linear.base import Inverse, LinearSolution, Matvec, Preconditioner, count, extremes, raveled, relative, solved


@dataclass(frozen=True)
class Dense(Preconditioner):
    """Builds A column by column and factorises it: exact, for a few thousand unknowns at most.

    n products (``chunk_size`` at a time under vmap), n^2 memory, n^3 work. ``curvature`` is the range of A's diagonal.

    Args:
        factorization: "lu" for any A; "cholesky", half the work, for a symmetric positive definite one: any other gives NaN.
        chunk_size: so many columns at a time; all of them by default.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> Dense().solve(lambda v: A @ v, torch.tensor([3.0, 1.0])).value
    tensor([1., 1.])
    """

    factorization: Literal["lu", "cholesky"] = "lu"
    chunk_size: int | None = None
    polynomial: ClassVar[bool] = True  # the factorisations have derivatives of every order

    def __post_init__(self) -> None:
        if self.factorization not in ("lu", "cholesky"):
            raise ValueError(f"`factorization` should be 'lu' or 'cholesky', got {self.factorization!r}.")
        if self.chunk_size is not None:
            _checks.whole("chunk_size", self.chunk_size)

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """The exact solution; the residual takes no product. ``x0`` plays no part."""
        vector, _, unravel = raveled(matvec, b)
        A = columns(matvec, b, self.chunk_size)
        x = self._factorized(A, vector)
        return LinearSolution(unravel(x), relative(A @ x - vector, vector), count(len(vector), b), extremes(A.detach().diagonal()))

    def inverse(self, matvec: Matvec, like: Tree) -> Inverse:
        vector, _, unravel = raveled(matvec, like)
        A = columns(matvec, like, self.chunk_size)
        return Inverse(lambda b: unravel(self._factorized(A, raveled(matvec, b)[0])), len(vector))

    def _factorized(self, A: Tensor, b: Tensor) -> Tensor:
        if self.factorization == "lu":
            return solved(A, b)
        L, info = torch.linalg.cholesky_ex(wide(A))  # neither asks the host whether it worked nor raises for one lane of many
        L = torch.where(info == 0, L, torch.nan)
        return torch.cholesky_solve(wide(b)[:, None], L)[:, 0].to(b.dtype)

    def trouble(self, residual_norm: float, num_products: float, curvature_min: float, curvature_max: float) -> str | None:
        if self.factorization == "cholesky" and not residual_norm < 1e-3:
            return (
                "the matrix has no Cholesky factor: it is not positive definite, so the params are no minimum of the inner objective, "
                "and the hypergradient is not finite. Train the inner problem further, add `damping`, take "
                "operator=linear.GaussNewton(...), or linear.Dense(factorization='lu')."
            )
        if not residual_norm < 1e-3:
            return (
                "the matrix is singular to working precision: a direct solver leaves stats['linear_residual'] far from zero, and the "
                "hypergradient is rounding. Add `damping`, or use linear.MINRES or linear.GMRES, which leave out what has no solution."
            )
        return None


def columns(matvec: Matvec, like: Tree, chunk_size: int | None, which: list[int] | None = None) -> Tensor:
    """``A[:, which]``, all columns by default: [n, number of columns], a product each."""
    vector, A, _ = raveled(matvec, like)
    positions = torch.arange(len(vector), device=vector.device)
    wanted = positions if which is None else torch.tensor(which, device=vector.device)
    basis = (wanted[:, None] == positions).to(vector.dtype)
    # randomness="same": one realisation of noise for the whole matrix.
    return torch.func.vmap(A, randomness="same", chunk_size=chunk_size)(basis).mT
