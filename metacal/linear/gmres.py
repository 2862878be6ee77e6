"""Generalised minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metacal import _checks
from metacal._safe import nonzero, wide
from metacal._typing import Tree
from metacal.linear.base import (
    Krylov,
    LinearSolution,
    Matvec,
    accumulated,
    extremes,
    ratio,
    raveled,
    start,
)
from metacal.linear.orthogonal import against


@dataclass(frozen=True)
class GMRES(Krylov):
    """Generalised minimal residuals, for any A: the k-th iterate minimises ``|b - A x|`` over the Krylov space.

    ``num_steps`` products at most. Memory: twice ``num_steps`` vectors, or ``restart``. Exact after n steps; the residual never rises.
    Of a singular system it finds a solution where there is one in the Krylov space, else a least squares solution there.

    Args:
        num_steps: at most so many steps, one product each.
        tolerance: a relative residual that is small enough; the dtype's epsilon by default.
        warm_start: start from the previous solution.
        restart: begin anew after so many steps, to save memory; convergence is then no longer certain. None: never.

    Source: Saad & Schultz 1986, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems.

    >>> import torch
    >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> GMRES(2).solve(lambda v: A @ v, torch.tensor([2.0, 1.0])).value.round(decimals=4)
    tensor([1., 1.])
    """

    restart: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart is not None:
            _checks.whole("restart", self.restart)

    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, r, num_products = start(A, right, x0)
        small = self.threshold(right)
        at = _State(x, r, num_products, (), ~(vector_norm(r) <= small), torch.zeros_like(num_products))
        length = min(self.restart or self.num_steps, len(x))  # the Krylov space is no larger than the whole
        for begin in range(0, self.num_steps, length):
            at = _cycle(A, at, min(length, self.num_steps - begin), small)
        curvature = extremes(torch.stack(at.quotients))
        return LinearSolution(unravel(at.x), vector_norm(at.r) / nonzero(vector_norm(right)), at.num_products, curvature)


class _State(NamedTuple):
    """What one cycle hands to the next."""

    x: Tensor
    r: Tensor
    num_products: Tensor
    quotients: tuple[Tensor, ...]
    live: Tensor
    largest: Tensor  # |A q| of a unit vector: the scale of A


def _cycle(A: Matvec, at: _State, num_steps: int, small: Tensor) -> _State:
    """One Arnoldi process from the residual, and the least squares solution in its basis."""
    x, r, num_products, quotients, live, largest = at
    beta = vector_norm(r)
    one = torch.ones_like(beta)
    basis = (ratio(one, beta) * r)[None]  # [k + 1, n], orthonormal rows
    columns: list[Tensor] = []  # of the Hessenberg matrix: A basis[k] = basis^T columns[k]
    left = one[None]  # left^T (columns so far) = 0, so that the residual norm is beta / |left|
    for k in range(num_steps):
        w = A(basis[k])
        num_products = num_products + live
        largest = torch.maximum(largest, torch.where(live, vector_norm(w), 0.0))
        w, h = against(w, basis)
        quotients = (*quotients, torch.where(live, h[k], torch.nan))
        following = vector_norm(w)
        column = torch.where(live, torch.cat([h, following[None]]), 0.0)
        columns.append(torch.nn.functional.pad(column, (0, num_steps - k - 1)))
        live = live & ~(following <= accumulated(largest))  # the Krylov space is complete
        basis = torch.cat([basis, (ratio(one, following, live) * w)[None]])
        left = torch.cat([left, ratio(-(left @ h), following, live)[None]])
        live = live & ~(beta <= small * vector_norm(left))
    H = torch.stack(columns, 1)  # [num_steps + 1, num_steps]
    target = torch.nn.functional.pad(beta[None], (0, num_steps))
    y = _least_squares(H, target, accumulated(largest))
    return _State(x + y @ basis[:-1], (target - H @ y) @ basis, num_products, quotients, live, largest)


def _least_squares(H: Tensor, target: Tensor, negligible: Tensor) -> Tensor:
    """argmin |H y - target| of a Hessenberg matrix, without the columns that depend on those before them."""
    Q, R = torch.linalg.qr(wide(H))
    dependent = R.diagonal().abs() <= negligible
    R = R + torch.diag(torch.where(dependent, 1.0 - R.diagonal(), 0.0))
    g = torch.where(dependent, 0.0, wide(target) @ Q)
    return torch.linalg.solve_triangular(R, g[:, None], upper=True)[:, 0].to(H.dtype)
