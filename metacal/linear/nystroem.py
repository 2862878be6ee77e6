"""The Nystroem approximation from a few columns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metacal import _checks, tree
from metacal._typing import Tree
from metacal.linear.base import Inverse, Matvec, Preconditioner, raveled, solved
from metacal.linear.dense import columns


@dataclass(frozen=True)
class Nystroem(Preconditioner):
    """Inverts ``C^T M^-1 C + rho I``, with C some rows of A and M their square block, by Woodbury's identity.

    For symmetric positive semi-definite A of low effective rank. ``rank`` products (``chunk_size`` at a time under vmap), and one for
    the true residual; memory: ``2 rank`` vectors. The rows are drawn without replacement by a generator of their own, seeded with
    ``seed``: equal for equal seeds and sizes, in every lane of a vmap, and nobody else's random numbers change. Bias: that of a
    damping of rho in the span of the rows; what is outside is divided by rho.

    Args:
        rank: the number of rows, at most the number of unknowns.
        rho: added to every eigenvalue, and all that there is where the rows do not reach. By default of the size of the smaller ones
            that they do reach, their harmonic mean times the share left out, ``(1 - rank / n) rank / trace((C C^T)^-1 M)``; at
            least sqrt(eps) times mean(diag M).
        seed: of the draw of the rows.
        chunk_size: so many products at a time; all by default.

    Errors: ValueError if ``rank`` exceeds the number of unknowns.

    Source: Hataya & Yamada 2023, Nystroem method for accurate and scalable implicit differentiation (arXiv 2302.09726), equation 6.

    >>> import torch
    >>> solver = Nystroem(rank=3, rho=0.01)
    >>> solver.solve(lambda v: torch.tensor([1.0, 2.0, 4.0]) * v, torch.ones(3)).value.round(decimals=4)
    tensor([0.9901, 0.4975, 0.2494])
    """

    rank: int
    rho: float | Tensor | None = None
    seed: int = 0
    chunk_size: int | None = None
    polynomial: ClassVar[bool] = True
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("rank", self.rank)
        if self.rho is not None:
            _checks.number("rho", self.rho, "leave it out to have it scaled to the matrix", positive=True)
        if self.chunk_size is not None:
            _checks.whole("chunk_size", self.chunk_size)

    def inverse(self, matvec: Matvec, like: Tree) -> Inverse:
        vector, _, unravel = raveled(matvec, like)
        rows = self.rows(len(vector))
        C = columns(matvec, like, self.chunk_size, rows).mT  # [rank, n]
        M = C[:, rows]
        rho = _scaled_to(C, M) if self.rho is None else self.rho
        # (C^T M^-1 C + rho I)^-1 = (I - C^T (rho M + C C^T)^-1 C) / rho
        core = rho * M + C @ C.mT

        def apply(b: Tree) -> Tree:
            vector = tree.ravel(b)[0]
            return unravel((vector - C.mT @ solved(core, C @ vector)) / rho)

        return Inverse(apply, self.rank)

    def rows(self, dimension: int) -> list[int]:
        """The rows that are read of a matrix of this dimension, in increasing order."""
        if self.rank > dimension:
            raise ValueError(
                f"`rank` should be at most the number of unknowns, {dimension}, got {self.rank}. For so small a system "
                "linear.Dense() is exact and no dearer."
            )
        return sorted(random.Random(self.seed).sample(range(dimension), self.rank))


def _scaled_to(C: Tensor, M: Tensor) -> Tensor:
    """The harmonic mean of the eigenvalues of C^T M^-1 C for the part that it leaves out, and at least sqrt(eps) of M's mean."""
    rank, n = C.shape
    harmonic = rank / solved(C @ C.mT, M).diagonal().sum()
    rho, floor = (n - rank) / n * harmonic, torch.finfo(C.dtype).eps ** 0.5 * M.diagonal().abs().mean()
    return torch.where(rho > floor, rho, floor)
