"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metacal import _checks, tree
from metacal._typing import Tree
from metacal.linear.base import (
    LinearSolution,
    LinearSolver,
    Matvec,
    extremes,
    ratio,
    raveled,
    rayleigh,
    relative,
    start,
)
from metacal.linear.signs import signs

SAFETY = 1.1
"""Power iterations underestimate; the series bears a factor of two."""


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series ``v_K = a sum_{k=0..K} (I - a A)^k b``.

    K products; memory: seven vectors. The error is ``(I - a A)^{K+1} A^-1 b``: it shrinks by ``max |1 - a eig(A)|`` per term and
    grows without bound when ``a`` exceeds ``2 / max eig(A)``. K = 0 is ``a`` times the identity. v_K is returned whatever its
    residual; the reported residual is that of ``v_{K-1}``, which costs nothing: the true one would take another product.

    With ``step_size=None``, a = 1 / (1.1 |A|), the norm estimated by ``power_steps`` power iterations (a product each) from
    fixed random signs, which have every direction in them, also those that b hardly has. A symmetric A is assumed.

    Under ``Implicit(..., stochastic=True)`` each product reads another batch, and v_K is unbiased for the series of the mean matrix
    if the batches are independent draws.

    Source: Lorraine, Vicol & Duvenaud 2020 (arXiv 1911.02590), equation 4; stochastic: Ji, Yang & Liang 2021 (arXiv 2010.07962),
    algorithm 2.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 2.0]))
    >>> Neumann(num_steps=100, step_size=0.5).solve(lambda v: A @ v, torch.ones(2)).value
    tensor([1.0000, 0.5000])
    """

    num_steps: int
    step_size: float | Tensor | None = None
    warm_start: bool = False
    power_steps: int = 8
    polynomial: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("num_steps", self.num_steps, at_least=0)
        _checks.whole("power_steps", self.power_steps)
        if self.step_size is not None:
            _checks.number("step_size", self.step_size, "take it below 2 / the largest eigenvalue, or None to estimate it", positive=True)

    def solve(self, matvec: Matvec, b: Tree, x0: Tree | None = None) -> LinearSolution:
        right, A, unravel = raveled(matvec, b)
        x, term, num_products = start(A, right, x0)
        quotients = [right.new_full((), torch.nan)]
        step_size = self.step_size
        if step_size is None:
            norm, quotients = self._norm(A, tree.ravel(signs(b, 1)[0])[0])
            step_size, num_products = ratio(torch.ones_like(norm), SAFETY * norm), num_products + self.power_steps
        total = term
        for _ in range(self.num_steps):
            product = A(term)
            quotients.append(rayleigh(term, product))
            term = term - step_size * product  # (I - a A)^k b
            total = total + term
        value, num_products = x + step_size * total, num_products + self.num_steps
        return LinearSolution(unravel(value), relative(term, right), num_products, extremes(torch.stack(quotients)))

    def _norm(self, A: Matvec, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """|A| by power iterations from v, and the Rayleigh quotients on the way."""
        norm, quotients = tree.norm(v), []
        for _ in range(self.power_steps):
            v = ratio(torch.ones_like(norm), norm) * v
            product = A(v)
            quotients.append(rayleigh(v, product))
            v, norm = product, tree.norm(product)
        return norm, quotients

    def trouble(self, residual_norm: float, num_products: float, curvature_min: float, curvature_max: float) -> str | None:
        if self.step_size is not None and float(self.step_size) * curvature_max >= 2:
            return (
                f"the Neumann series diverges: `step_size` = {float(self.step_size):.3g} should be below 2 / the largest eigenvalue, and "
                "stats['curvature_max'] is above that. Every further term makes the hypergradient worse. Take a smaller step, or "
                "step_size=None to have it estimated."
            )
        return super().trouble(residual_norm, num_products, curvature_min, curvature_max)
