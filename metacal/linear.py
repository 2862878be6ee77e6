"""Linear solvers for the systems of implicit differentiation, and the operators that they invert.

A solver needs nothing but products ``v -> A v`` with trees. None of them synchronises with the host inside its loop; each
reports its residual and the number of products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree

Matvec = Callable[[Tree], Tree]


class LinearSolution(NamedTuple):
    """``value`` solves ``A value = b`` up to ``residual_norm = |A value - b| / |b|``, at the price of ``num_products``."""

    value: Tree
    residual_norm: Tensor
    num_products: Tensor


class LinearSolver(ABC):
    """Solves ``A v = b`` from products with A.

    Attributes:
        polynomial: the solution is a fixed polynomial in A times b, so differentiating the solver's own operations
            differentiates the estimate. Others are differentiated by ``dv = A^-1 (db - dA v)``.
        warm_start: start from the solution of the previous call (through an adjoint's ``memory``).
    """

    polynomial: ClassVar[bool] = False
    warm_start: bool = False

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """Solves ``matvec(v) = b``, starting from ``x0`` (one more product) or from zero."""


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series ``v_K = a sum_{k=0..K} (I - a A)^k b``.

    K products. The error is ``(I - a A)^{K+1} A^-1 b``: it shrinks by ``max |1 - a eig(A)|`` per term and grows without bound
    when ``a`` exceeds ``2 / max eig(A)``. K = 0 is ``a`` times the identity. The reported residual is that of ``v_{K-1}``,
    which costs nothing: the true one would take another product.

    Source: Lorraine, Vicol & Duvenaud 2020 (arXiv 1911.02590), equation 4.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 2.0]))
    >>> Neumann(num_steps=100, step_size=0.5).solve(lambda v: A @ v, torch.ones(2)).value
    tensor([1.0000, 0.5000])
    """

    num_steps: int
    step_size: float | Tensor
    warm_start: bool = False
    polynomial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_steps("num_steps", self.num_steps, at_least=0)
        if not isinstance(self.step_size, Tensor) and not self.step_size > 0:
            raise ValueError(f"`step_size` should be positive (and below 2 / the largest eigenvalue), got {self.step_size}.")

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        term = b if x0 is None else tree.sub(b, matvec(x0))
        total = term
        for _ in range(self.num_steps):
            term = tree.axpy(-self.step_size, matvec(term), term)  # (I - a A)^k b
            total = tree.add(total, term)
        value = tree.scale(self.step_size, total)
        if x0 is not None:
            value = tree.add(x0, value)
        return LinearSolution(value, _relative(term, b), _count(self.num_steps + (x0 is not None), b))


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, for symmetric positive definite A.

    At most ``num_steps`` products, exact after as many steps as A has distinct eigenvalues; the error in the A-norm shrinks by
    ``(sqrt(k)-1)/(sqrt(k)+1)`` per step for condition number k. A lane that has converged to ``tolerance`` (relative; default:
    the dtype's epsilon), or that meets a direction of non-positive curvature, stands still: its residual says how far it came.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright, algorithm 5.2.
    """

    num_steps: int
    tolerance: float | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        _check_steps("num_steps", self.num_steps, at_least=1)

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        x = tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else tree.sub(b, matvec(x0))
        p, rr, bb = r, tree.vdot(r, r), tree.vdot(b, b)
        tolerance = torch.finfo(bb.dtype).eps if self.tolerance is None else self.tolerance
        products = _count(x0 is not None, b)
        for _ in range(self.num_steps):
            Ap = matvec(p)
            pAp = tree.vdot(p, Ap)
            # A NaN is not "converged": every comparison is written so that it goes on and shows in the residual.
            stop = (rr <= tolerance**2 * bb) | (pAp <= 0)
            alpha = torch.where(stop, 0.0, rr / torch.where(stop, 1.0, pAp))
            x = tree.axpy(alpha, p, x)
            r = tree.axpy(-alpha, Ap, r)
            rr, previous = tree.vdot(r, r), rr
            beta = torch.where(stop, 0.0, rr / torch.where(stop, 1.0, previous))
            p = tree.axpy(beta, p, r)
            products = products + torch.where(stop, 0.0, 1.0)
        return LinearSolution(x, _relative(r, b), products)


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Builds A column by column and solves by LU: exact, for a few thousand unknowns at most.

    n products (``chunk_size`` at a time under vmap), n^2 memory, n^3 work.
    """

    chunk_size: int | None = None
    polynomial: ClassVar[bool] = True  # torch.linalg.solve has derivatives of every order

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        vector, unravel = tree.ravel(b)
        basis = torch.eye(vector.numel(), dtype=vector.dtype, device=vector.device)
        # randomness="same": one realisation of noise for the whole matrix.
        columns = torch.func.vmap(lambda e: tree.ravel(matvec(unravel(e)))[0], randomness="same", chunk_size=self.chunk_size)(basis)
        x = torch.linalg.solve(columns.mT, vector)
        residual = _relative(columns.mT @ x - vector, vector)
        return LinearSolution(unravel(x), residual, _count(vector.numel(), b))


@dataclass(frozen=True)
class Identity(LinearSolver):
    """``v = b``: one-step truncation (T1-T2). No products; the bias is ``(I - A^-1) b``.

    Source: Luketina et al. 2016 (arXiv 1511.06727).
    """

    polynomial: ClassVar[bool] = True

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        return LinearSolution(b, torch.full_like(tree.norm(b), torch.nan), _count(0, b))


def _relative(residual: Tree, b: Tree) -> Tensor:
    size = tree.norm(b)
    return tree.norm(residual) / torch.where(size == 0, torch.ones_like(size), size)


def _count(n: int, like: Tree) -> Tensor:
    return torch.full_like(tree.vdot(like, like).detach(), float(n))


def _check_steps(name: str, value: int, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"`{name}` should be an integer >= {at_least}, got {value!r}.")


@dataclass(frozen=True)
class Hessian:
    """A = d2 L / dw2 of the inner objective, by forward-over-reverse products (three gradients each)."""


@dataclass(frozen=True)
class Jacobian:
    """A = (d residual / dw)^T of any solver, by one recorded residual and a backward pass per product."""


Operator = Hessian | Jacobian


def last(batches: Sequence[Any]) -> Sequence[Any]:
    """The last batch defines the system."""
    return [batches[len(batches) - 1]]


def every(batches: Sequence[Any]) -> Sequence[Any]:
    """The mean over all the batches defines the system."""
    return batches
