"""The equation F(w, h) = 0 that a solution satisfies, its linear systems and its root, each differentiable in every order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metacal import _random, derivatives, linear, operators, tree
from metacal._typing import Tree
from metacal.inner import InnerSolver
from metacal.linear.base import relative
from metacal.linear.operator import residual
from metacal.linear.signs import signs


class Theta(NamedTuple):
    """Everything that F and its derivatives depend on."""

    params: Tree
    hparams: Tree
    carry: Tree
    batches: Sequence[Tree]
    damping: float | Tensor = 0.0


@dataclass(frozen=True)
class Equation:
    """F is the residual of an inner solver, the mean over ``theta.batches``, with one realisation of noise throughout.

    ``stochastic``: each product with the matrix reads the next of the batches, in a circle, instead of their mean.
    """

    inner: InnerSolver
    operator: linear.Operator
    noise: _random.Noise
    stochastic: bool = False
    parts: operators.Linearised | None = None

    def at(self, theta: Theta) -> Equation:
        """The same, for ``theta`` alone and not to be differentiated: all of its parts are of one gradient, where there is one."""
        descent = self.inner.stationarity
        if descent is None or len(theta.batches) > 1 or not isinstance(self.operator, linear.Hessian):
            return self
        _random.restore(self.noise)
        return replace(self, parts=descent.linearised(theta.params, theta.hparams, theta.batches[0], theta.carry))

    def residual(self, theta: Theta) -> Tree:
        """F(w, h)."""
        if self.parts is not None:
            return self._mean([self.parts], lambda parts: parts.gradient())
        params, hparams, carry, batches, _ = theta
        return self._mean(batches, lambda batch: residual(self.inner, params, hparams, batch, carry))

    def matrix(self, theta: Theta) -> linear.LinearMap:
        """``v -> (F_w^T + damping I) v``, with its transpose."""
        if self.stochastic:
            each = (self._mean_matrix(theta._replace(batches=[batch])) for batch in itertools.cycle(theta.batches))
            A = linear.LinearMap(lambda v: next(each)(v), lambda v: next(each).transpose(v))
        else:
            A = self._mean_matrix(theta)
        return linear.LinearMap(_damped(A.apply, theta.damping), _damped(A.transpose, theta.damping), theta, self.is_symmetric)

    @property
    def is_symmetric(self) -> bool:
        """Whether A is known to be symmetric."""
        return self.operator.is_symmetric(self.inner)

    def asymmetry(self, theta: Theta) -> Tensor:
        """``|A z - A^T z| / |A z|`` for some signs z: two products."""
        A, z = self.matrix(theta), signs(theta.params, 1)[0]
        Az = A(z)
        return relative(tree.sub(Az, A.transpose(z)), Az)

    def pull_hparams(self, theta: Theta, v: Tree) -> Tree:
        """``F_h^T v``."""
        if self.parts is not None:
            return self._mean([self.parts], lambda parts: parts.mixed(v))
        params, hparams, carry, *_ = theta
        return self._mean(theta.batches, lambda batch: self.operator.mixed(self.inner, params, hparams, batch, carry, v))

    def _mean_matrix(self, theta: Theta) -> linear.LinearMap:
        if self.parts is not None:
            return linear.symmetric(lambda v: self._mean([self.parts], lambda parts: parts.hessian(v)))
        params, hparams, carry, batches, _ = theta

        def matrix(batch: Tree) -> linear.LinearMap:
            return self.operator.matrix(self.inner, params, hparams, batch, carry)

        if len(batches) == 1:
            _random.restore(self.noise)
            recorded = matrix(batches[0])
            return linear.LinearMap(
                lambda v: self._mean(batches, lambda _: recorded(v)), lambda v: self._mean(batches, lambda _: recorded.transpose(v))
            )

        def term(batch: Tree, product: Callable[[linear.LinearMap], Tree]) -> Tree:
            # Each product records one batch after the other, and sees the noise that its batch was recorded with.
            before = _random.noise(params)
            A = matrix(batch)
            after = _random.noise(params)
            _random.restore(before)
            found = product(A)
            if _random.same_or(before, after) is after:  # recorded with noise, of which the product may have drawn none
                _random.restore(after)
            return found

        return linear.LinearMap(
            lambda v: self._mean(batches, lambda batch: term(batch, lambda A: A(v))),
            lambda v: self._mean(batches, lambda batch: term(batch, lambda A: A.transpose(v))),
        )

    def _mean(self, batches: Sequence[Any], term: Callable[[Any], Tree]) -> Tree:
        _random.restore(self.noise)
        return tree.mean([term(batch) for batch in batches])


def _damped(product: linear.Matvec, damping: float | Tensor) -> linear.Matvec:
    if not isinstance(damping, Tensor) and damping == 0:
        return product
    return lambda v: tree.axpy(damping, v, product(v))


@dataclass(frozen=True)
class _Call:
    """What the autograd Functions below carry beside their tensors."""

    solver: linear.LinearSolver
    equation: Equation
    combine: Callable[[Sequence[Tensor]], Any]  # the flat tensors -> the arguments
    transpose: bool = True

    def matvec(self, theta: Theta) -> linear.LinearMap:
        A = self.equation.matrix(theta)
        return A if self.transpose else linear.LinearMap(A.transpose, A.apply, theta, A.is_symmetric)

    def solve(self, theta: Theta, b: Tree, x0: Tree | None) -> linear.LinearSolution:
        solution = self.solver.solve(self.matvec(theta), b, x0)
        if solution.curvature is None:
            unknown = torch.full_like(solution.residual_norm, torch.nan)
            solution = solution._replace(curvature=torch.stack([unknown, unknown]))
        return solution


def solve_linear(
    solver: linear.LinearSolver, equation: Equation, theta: Theta, b: Tree, x0: Tree | None = None, *, transpose: bool = True
) -> linear.LinearSolution:
    """Solves ``A v = b`` with A = F_w^T + damping I (or its transpose).

    Where somebody may differentiate it, by ``dv = A^-1 (db - dA v)`` and not through the iterations of the solver: those
    stop at a solution of this A only.
    """
    flat, combine = tree.partition((theta, b, x0), tree.is_tensor)
    call = _Call(solver, equation, combine, transpose)
    if solver.polynomial or not derivatives.attached(theta, b):
        return call.solve(theta, b, x0)
    *v, residual_norm, num_products, curvature = _LinearSolve.apply(call, *flat)
    # Not marked as non-differentiable in the Function: under vmap its jvp rule would be refused.
    numbers = tree.detach((residual_norm, num_products, curvature))
    return linear.LinearSolution(tree.unflatten(tree.structure(b), v), *numbers)


class _LinearSolve(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *flat: Tensor) -> tuple[Tensor, ...]:
        v, residual_norm, num_products, curvature = call.solve(*call.combine(flat))
        assert curvature is not None  # call.solve fills it in
        return (*derivatives.in_every_lane(tree.leaves(v), flat), residual_norm, num_products, curvature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, output[:-3])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        call, _, (theta, b, x0), found = _saved(ctx)
        v, ct = (tree.unflatten(tree.structure(b), xs) for xs in (found, derivatives.alive(cotangents[:-3])))
        # u = A^-T ct; db = u, d theta = -(d(A v)/d theta)^T u
        u = solve_linear(call.solver, call.equation, theta, ct, transpose=not call.transpose).value
        floating, combine = tree.partition(theta)
        d_theta = derivatives.func_vjp(lambda *xs: call.matvec(combine(xs))(v), *floating)[1](tree.scale(-1.0, u))
        return None, *_in_place_of(theta, d_theta), *tree.leaves(u), *(None for _ in tree.leaves(x0))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        _refuse_levels_below()
        call, flat, (theta, b, _x0), found = _saved(ctx)
        v = tree.unflatten(tree.structure(b), found)
        moved = [torch.zeros_like(x) if d is None else d for x, d in zip(flat, tangents, strict=True)]
        d_theta, d_b, _d_x0 = call.combine(moved)
        floating, combine = tree.partition(theta)
        d_floating = tree.partition(d_theta)[0]
        dA_v = derivatives.func_jvp(lambda *xs: call.matvec(combine(xs))(v), tuple(floating), tuple(d_floating))
        d_v = solve_linear(call.solver, call.equation, theta, tree.sub(d_b, dA_v), transpose=call.transpose).value
        still = found[0].new_zeros(())  # the numbers
        return (*tree.leaves(d_v), still, still, torch.stack([still, still]))


def root(solver: linear.LinearSolver, equation: Equation, theta: Theta) -> Tree:
    """``theta.params``, a root of F, as a function of the hparams and the batches (not of the params that were found)."""
    flat, combine = tree.partition(theta, tree.is_tensor)
    return tree.unflatten(tree.structure(theta.params), list(_Root.apply(_Call(solver, equation, combine), *flat)))


class _Root(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(derivatives.in_every_lane(tree.leaves(call.combine(flat).params), flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        call, _, found, w = _saved(ctx)
        # At its own output, so that this backward is again a function of the hparams: dh = -F_h^T F_w^-T ct.
        theta = found._replace(params=tree.unflatten(tree.structure(found.params), w))
        ct = tree.unflatten(tree.structure(found.params), derivatives.alive(cotangents))
        v = solve_linear(call.solver, call.equation, theta, ct).value
        floating, combine = tree.partition((theta.hparams, theta.batches))
        rest = derivatives.func_vjp(lambda *xs: call.equation.residual(_with(theta, combine(xs))), *floating)[1](tree.scale(-1.0, v))
        d_rest = _in_place_of((theta.hparams, theta.batches), rest)
        n = len(tree.leaves(theta.hparams))
        of_params, of_carry, of_damping = (
            [None] * len(tree.partition(value, tree.is_tensor)[0]) for value in (theta.params, theta.carry, theta.damping)
        )
        return None, *of_params, *d_rest[:n], *of_carry, *d_rest[n:], *of_damping

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        _refuse_levels_below()
        call, flat, found, w = _saved(ctx)
        theta = found._replace(params=tree.unflatten(tree.structure(found.params), w))
        moved = call.combine([torch.zeros_like(x) if d is None else d for x, d in zip(flat, tangents, strict=True)])
        floating, combine = tree.partition((theta.hparams, theta.batches))
        d_rest = tree.partition((moved.hparams, moved.batches))[0]
        # F_w dw + F_h dh = 0
        dF = derivatives.func_jvp(lambda *xs: call.equation.residual(_with(theta, combine(xs))), tuple(floating), tuple(d_rest))
        return tuple(tree.leaves(solve_linear(call.solver, call.equation, theta, tree.scale(-1.0, dF), transpose=False).value))


def _with(theta: Theta, rest: tuple[Tree, Sequence[Tree]]) -> Theta:
    return theta._replace(hparams=rest[0], batches=rest[1])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.call, *flat = inputs
    ctx.num_outputs = len(output)
    ctx.save_for_backward(*output, *flat)
    ctx.save_for_forward(*output, *flat)


def _saved(ctx: Any) -> tuple[_Call, list[Tensor], Any, list[Tensor]]:
    saved = derivatives.alive(ctx.saved_tensors)
    outputs, flat = saved[: ctx.num_outputs], saved[ctx.num_outputs :]
    return ctx.call, flat, ctx.call.combine(flat), outputs


def _refuse_levels_below() -> None:
    if derivatives.forward_levels() > 1:
        raise RuntimeError(
            "Implicit has no rule for two levels that go forward (jvp of jvp, jacfwd of jacfwd, jvp of hessian). Let all but one of them "
            "go backward: jacfwd(jacrev(f)), jacrev(jacfwd(f)), hessian(f), jacrev(hessian(f)); or use Unrolled()."
        )


def _in_place_of(value: Tree, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The cotangents of a tree's floating leaves, with None for the other tensors."""
    given = iter(cotangents)
    return [next(given) if tree.is_floating(leaf) else None for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]
