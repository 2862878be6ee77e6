"""What a linear solver is, and the few formulas that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metacal import _checks, derivatives, tree
from metacal._safe import nonzero, wide
from metacal._typing import Tree

Matvec = Callable[[Tree], Tree]
"""``v -> A v``: a :class:`LinearMap`, or any function (then a solver that needs the transpose derives it)."""


@dataclass(frozen=True)
class LinearMap:
    """``v -> A v``, with its transpose.

    Attributes:
        apply, transpose: ``v -> A v`` and ``v -> A^T v``.
        at: where A was taken, with ``params``, ``hparams`` and ``batches``, for solvers that ask for more than products.
        is_symmetric: whether A is known to be symmetric; a solver that relies on it measures what it cannot infer otherwise.
    """

    apply: Callable[[Tree], Tree]
    transpose: Callable[[Tree], Tree]
    at: Any = None
    is_symmetric: bool = False

    def __call__(self, v: Tree) -> Tree:
        return self.apply(v)


def symmetric(apply: Callable[[Tree], Tree]) -> LinearMap:
    """The map of a symmetric A."""
    return LinearMap(apply, apply, is_symmetric=True)


class LinearSolution(NamedTuple):
    """``value`` solves ``A value = b`` up to ``residual_norm = |A value - b| / |b|``, at the price of ``num_products``.

    ``curvature`` is the lowest and the highest Rayleigh quotient ``<p, A p> / <p, p>`` met along the way, [2]: bounds from inside
    on the spectrum of a symmetric A. NaN, or None, where none was met.
    """

    value: Tree
    residual_norm: Tensor
    num_products: Tensor
    curvature: Tensor | None = None


class UnreliableHypergradient(UserWarning):
    """The linear system behind a hypergradient was not solved, for a reason that more steps do not cure."""


class LinearSolver(ABC):
    """Solves ``A v = b`` from products with A. Trees in, trees out.

    A subclass needs :meth:`solve` alone. It must not ask the host for a value inside its loop: under ``torch.func.vmap`` each lane
    is frozen with ``torch.where`` when it is done.

    Attributes:
        polynomial: differentiating the solver's own operations differentiates the estimate (a polynomial of fixed degree in A, a
            dense factorization). Others are differentiated by ``dv = A^-1 (db - dA v)``.
        stochastic: another sample of A may answer each product.
        needs_symmetry: what it finds solves ``A v = b`` for symmetric A only.
        warm_start: start from the solution of the previous call (through an adjoint's ``memory``).
    """

    polynomial: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False
    warm_start: bool = False

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """Solves ``matvec(v) = b``, starting from ``x0`` (one more product) or from zero."""

    def trouble(self, residual_norm: float, num_products: float, curvature_min: float, curvature_max: float) -> str | None:
        """What the numbers of a solution say against the hypergradient, in words; None if nothing but time would improve it."""
        if not isfinite(residual_norm):
            return (
                "the linear system has no finite solution: its matrix is singular, or a product with it overflows. The hypergradient "
                "is not finite either. Add `damping`, or use linear.MINRES or linear.GMRES, which leave out what has no solution."
            )
        if residual_norm > 1.1:  # by more than a series that has hardly begun
            return (
                "stats['linear_residual'] > 1: the solution of the linear system leaves a larger residual than zero does, so that the "
                "indirect part of the hypergradient may be worse than none. Give the solver more steps, add `damping`, or use another."
            )
        return None


@dataclass(frozen=True)
class Krylov(LinearSolver):
    """A solver whose k-th iterate is the best, in its own sense, of the space spanned by b, A b, ..., A^{k-1} b.

    A lane that has reached ``tolerance`` (relative; the dtype's epsilon by default) or cannot go on stands still. The best iterate is
    returned: with the smallest residual, or for the methods that minimise the energy of a definite matrix the last. Its residual is
    the one that the recurrence carries, or where that holds for symmetric A alone and A is not known to be (see :func:`symmetric`)
    that of one more product.
    """

    num_steps: int
    tolerance: float | None = None
    warm_start: bool = False
    products_per_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _checks.whole("num_steps", self.num_steps)
        if self.tolerance is not None:
            _checks.number("tolerance", self.tolerance, "leave it out for the dtype's epsilon")

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """Solves ``matvec(v) = b``, starting from ``x0`` (one more product) or from zero."""
        # Scaled to size one, of which no square overflows or vanishes: b may come from a run that diverged, or in half precision.
        size = magnitude(b)
        scaled = [None if x is None else tree.map(lambda leaf: leaf / size, x) for x in (b, x0)]
        solution = self.iterate(matvec, *scaled)
        return solution._replace(value=tree.map(lambda leaf: leaf * size, solution.value))

    @abstractmethod
    def iterate(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """:meth:`solve` for a b of size one."""

    def threshold(self, b: Tree) -> Tensor:
        """The norm of a residual that is small enough."""
        return vector_norm(b) * (torch.finfo(b.dtype).eps if self.tolerance is None else self.tolerance)

    def trouble(self, residual_norm: float, num_products: float, curvature_min: float, curvature_max: float) -> str | None:
        stopped = num_products < self.num_steps * self.products_per_step
        if stopped and residual_norm > max(1e-3, self.tolerance or 0.0):
            return (
                f"{type(self).__name__} stopped after stats['num_products'] products with a residual far from zero, and more steps "
                "would not move it: the matrix is singular and b is not in its range, or the recurrence broke down. The hypergradient "
                "lacks what was not solved for. Add `damping`, or use linear.GMRES or linear.Dense to tell the two apart."
            )
        return super().trouble(residual_norm, num_products, curvature_min, curvature_max)


class Inverse(NamedTuple):
    """``apply(b)``, approximately ``A^-1 b``, and the products that it took to build."""

    apply: Callable[[Tree], Tree]
    num_products: int


class Preconditioner(LinearSolver):
    """A solver that is one fixed linear map, so that it can also precondition another: ``CG(20, preconditioner=...)``."""

    @abstractmethod
    def inverse(self, matvec: Matvec, like: Tree) -> Inverse:
        """Builds the approximate inverse of A for vectors like ``like``."""

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        """``inverse`` applied to b; one more product for the true residual. ``x0`` plays no part."""
        built = self.inverse(matvec, b)
        v = built.apply(b)
        Av = matvec(v)
        quotient = rayleigh(tree.ravel(v)[0], tree.ravel(Av)[0])
        return LinearSolution(v, relative(tree.sub(b, Av), b), count(built.num_products + 1, b), extremes(quotient[None]))


def magnitude(b: Tree) -> Tensor:
    """The power of two next to the largest number in b, 1 for zeros: a constant, by which one divides without rounding."""
    sizes = [vector_norm(leaf.detach(), torch.inf) for leaf in tree.leaves(b) if leaf.numel()]
    return nonzero(torch.exp2(torch.stack(sizes).amax().log2().floor())) if sizes else torch.ones(())


def start(A: Matvec, b: Tensor, x0: Tree | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first iterate, its residual, and the products that this took; b and A are raveled."""
    if x0 is None:
        return torch.zeros_like(b), b, count(0, b)
    x = tree.ravel(x0)[0]
    return x, b - A(x), count(1, b)


def transposable(matvec: Matvec, like: Tree) -> tuple[LinearMap, int]:
    """A with its transpose, and the products spent on deriving that: one where ``matvec`` is a plain function."""
    if isinstance(matvec, LinearMap):
        return matvec, 0
    pull = derivatives.func_vjp(matvec, like)[1]  # linear: recorded anywhere, it is the transpose everywhere
    return LinearMap(matvec, lambda v: pull(v)[0]), 1


def raveled(matvec: Matvec, like: Tree) -> tuple[Tensor, Matvec, Callable[[Tensor], Tree]]:
    """``like`` as one vector [n], A as a map of such vectors, and the way back to trees.

    A solver's own arithmetic is then a few operations on one tensor, however many leaves the tree has.
    """
    vector, unravel = tree.ravel(like)

    def on_vectors(product: Matvec) -> Matvec:
        return lambda v: tree.ravel(product(unravel(v)))[0]

    if isinstance(matvec, LinearMap):
        return vector, LinearMap(on_vectors(matvec.apply), on_vectors(matvec.transpose), is_symmetric=matvec.is_symmetric), unravel
    return vector, on_vectors(matvec), unravel


def measured(A: Matvec, x: Tensor, b: Tensor, carried: Tensor, num_products: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of ``b - A x`` and the products: ``carried`` by a recurrence that is right for symmetric A, else one more."""
    if isinstance(A, LinearMap) and A.is_symmetric:
        return carried, num_products
    return vector_norm(b - A(x)), num_products + 1


class Best(NamedTuple):
    """The iterate with the smallest residual so far."""

    value: Tensor
    residual: Tensor

    def or_better(self, value: Tensor, residual: Tensor) -> Best:
        # Written so that a NaN is taken, and shows.
        take = ~(residual >= self.residual)
        return Best(torch.where(take, value, self.value), torch.where(take, residual, self.residual))


def ratio(a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    """``a / b`` where ``valid`` (by default: where b is not 0), else 0."""
    valid = b != 0 if valid is None else valid
    return torch.where(valid, a / torch.where(valid, b, 1.0), 0.0)


def rayleigh(p: Tensor, Ap: Tensor) -> Tensor:
    """``<p, A p> / <p, p>`` of vectors, NaN for a zero p. A diagnostic: nothing is differentiated through it."""
    p, Ap = p.detach(), Ap.detach()
    return (p * Ap).sum() / (p * p).sum()  # torch.dot rounds in another way under vmap


def extremes(quotients: Tensor) -> Tensor:
    """The lowest and the highest of some Rayleigh quotients [n], as [2]; a NaN counts only where there is nothing else.

    A diagnostic: nothing is differentiated through it.
    """
    unknown = quotients.isnan()
    ends = torch.stack([torch.where(unknown, torch.inf, quotients).amin(), torch.where(unknown, -torch.inf, quotients).amax()])
    return torch.where(unknown.all(), torch.nan, ends).detach()


def rounding(size: Tensor) -> Tensor:
    """What cannot be told from zero in one product of numbers of this size."""
    return 10 * torch.finfo(size.dtype).eps * size


def accumulated(size: Tensor) -> Tensor:
    """What cannot be told from zero at the end of a recurrence among numbers of this size."""
    return torch.finfo(size.dtype).eps ** 0.75 * size


def relative(residual: Tree, b: Tree) -> Tensor:
    """``|residual| / |b|``, and 0 / 0 = 0."""
    size = magnitude(b)
    residual, b = (tree.map(lambda leaf: leaf / size, x) for x in (residual, b))
    return tree.norm(residual) / nonzero(tree.norm(b))


def solved(A: Tensor, b: Tensor) -> Tensor:
    """``A^-1 b`` for a matrix A and a vector or matrix b, NaN where A is singular.

    By two functions: the tangent of ``torch.linalg.solve`` has a wrong derivative (seen with torch 2.14).
    """
    # The _ex variant neither asks the host whether it worked nor raises for one lane of many.
    LU, pivots, info = torch.linalg.lu_factor_ex(wide(A))
    x = torch.linalg.lu_solve(LU, pivots, wide(b[:, None] if b.ndim == 1 else b)).reshape(b.shape)
    return torch.where(info == 0, x, torch.nan).to(b.dtype)


def count(n: int, like: Tree) -> Tensor:
    """A number of products as a 0-dim tensor beside ``like``."""
    return torch.full_like(tree.vdot(like, like).detach(), float(n))
