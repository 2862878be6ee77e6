"""The matrices that implicit differentiation inverts, and the mixed products that go with them.

``inner`` is the inner problem (``metacal.InnerSolver``): its ``residual(params, hparams, batch)`` is F, and where that is the gradient
of its objective, ``stationarity.objective`` is the loss L with F = dL/dw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metacal import derivatives, operators
from metacal._typing import Tree
from metacal.linear.base import LinearMap, symmetric


class Operator(ABC):
    """A choice of the matrix A = F_w^T, exact or approximate; ``F_h^T v`` is exact in every case."""

    def is_symmetric(self, inner: Any) -> bool:
        """Whether A is known to be symmetric. Where it is not, solvers that rely on it measure and say what they cannot infer."""
        return False

    @abstractmethod
    def matrix(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> LinearMap:
        """``v -> F_w^T v`` and, as its transpose, ``v -> F_w v``."""

    def mixed(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree, v: Tree) -> Tree:
        """``F_h^T v``. Work: two to three gradients."""
        if inner.stationarity is None:
            return _pulled_to_hparams(inner, params, hparams, batch, carry, v)
        return inner.stationarity.products(params, hparams, batch, carry, v)[1]


@dataclass(frozen=True)
class Hessian(Operator):
    """A = d2 L / dw2 of the inner objective, by backward passes through one recorded gradient (one to two gradients each).

    An inner problem whose residual is no gradient (a fixed point) has the :class:`Jacobian` of it instead.
    """

    def is_symmetric(self, inner: Any) -> bool:
        return inner.stationarity is not None

    def matrix(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> LinearMap:
        if inner.stationarity is None:
            return Jacobian().matrix(inner, params, hparams, batch, carry)
        return symmetric(inner.stationarity.linearised(params, hparams, batch, carry).hessian)


@dataclass(frozen=True)
class GaussNewton(Operator):
    """A = J^T H_out J: the Hessian without the curvature of the network, positive semi-definite for a convex loss.

    With ``outputs = model(params, hparams, batch)`` and the inner objective ``loss(outputs, hparams, batch)``, J is the derivative
    of the outputs by the params and H_out the second derivative of the loss by the outputs. Terms of the inner objective that are
    not in ``loss`` (weight decay) are not in A: return the params among the outputs, or use ``damping``.

    Cost of a product: one forward-mode pass, one backward pass of the model (three gradients at most); memory: one recorded forward
    pass of the model. Bias: A is not F_w, unless the model is linear in the params or the loss is stationary
    in the outputs.

    Source: Schraudolph 2002; Martens 2010.

    >>> import torch, metacal
    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([1.0, 0.0])
    >>> operator = GaussNewton(lambda w, h, b: x @ w, lambda z, h, b: ((z - y) ** 2).sum() / 2)
    >>> operator.matrix(None, torch.zeros(2), None, None, ())(torch.tensor([1.0, 0.0]))  # the first column of x^T x
    tensor([2., 2.])
    """

    model: Callable[[Tree, Tree, Tree], Tree]
    loss: Callable[[Tree, Tree, Tree], Tensor]

    def __post_init__(self) -> None:
        for name, fn, arguments in (("model", self.model, "params"), ("loss", self.loss, "outputs")):
            if not callable(fn):
                raise TypeError(f"`{name}` should be a function ({arguments}, hparams, batch), got {type(fn).__name__}.")

    def is_symmetric(self, inner: Any) -> bool:
        return True

    def matrix(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> LinearMap:
        loss = operators.Loss(lambda outputs, h, b, c: (self.loss(outputs, h, b), c))

        def model(w: Tree) -> Tree:
            return self.model(w, hparams, batch)

        outputs, pull = derivatives.func_vjp(model, params)
        at = outputs, hparams, batch, ()
        recorded = operators.linearised(loss, *at)
        H_out = recorded.hessian if recorded else lambda d: operators.hessian_product(loss, *at, d)

        def product(v: Tree) -> Tree:
            return pull(H_out(derivatives.func_jvp(model, (params,), (v,))))[0]

        return symmetric(product)


@dataclass(frozen=True)
class Jacobian(Operator):
    """A = (d residual / dw)^T of any inner problem, by one recorded residual and a backward pass per product."""

    def is_symmetric(self, inner: Any) -> bool:
        return inner.stationarity is not None  # then it is the Hessian, computed in another way

    def matrix(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> LinearMap:
        def F(w: Tree) -> Tree:
            return residual(inner, w, hparams, batch, carry)

        pull = derivatives.func_vjp(F, params)[1]
        return LinearMap(lambda v: pull(v)[0], lambda v: derivatives.func_jvp(F, (params,), (v,)))

    def mixed(self, inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree, v: Tree) -> Tree:
        return _pulled_to_hparams(inner, params, hparams, batch, carry, v)


def residual(inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> Tree:
    """F(w, h). Where it is a gradient, with the carry at which it was taken: ``inner.residual`` knows that of the start only."""
    if inner.stationarity is None:
        return inner.residual(params, hparams, batch)
    return inner.stationarity.gradient(params, hparams, batch, carry)[0]


def _pulled_to_hparams(inner: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree, v: Tree) -> Tree:
    return derivatives.func_vjp(lambda h: residual(inner, params, h, batch, carry), hparams)[1](v)[0]
