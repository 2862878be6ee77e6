"""What an adjoint promises: the scalar function whose derivative its hypergradient is, whatever way it takes to get there.

Nothing here differentiates a run. Each function is made of plain steps, the outer objective and the residual, all with one
realisation of noise, so that central differences of it are independent of every adjoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import _random, adjoints, derivatives, linear, tree
from metacal._objective import value_and_aux
from metacal._typing import Tree
from metacal.adjoints import Adjoint
from metacal.adjoints.base import chosen
from metacal.adjoints.equation import Theta
from metacal.inner import InnerSolver, InnerState, advance
from metacal.linear.operator import residual

Value = Callable[[Tree, Tree], float]
"""(initial params, hparams) -> a number."""


class Promise(NamedTuple):
    """``value``'s derivative is what the method computes.

    ``bias`` says how that differs from the derivative of the steps taken, "" where it does not. ``slack`` is the relative error
    that belongs to the method even so. ``linear_residual`` is that of the linear system, measured; NaN where there is none.
    Rounding of ``value`` is relative to ``scale`` where that is larger than the value. ``defined`` is False for an adjoint of one's
    own, which is held to the derivative of the steps taken.
    """

    value: Value
    bias: str = ""
    slack: float = 0.0
    linear_residual: float = math.nan
    scale: float = 0.0
    defined: bool = True


class _Point(NamedTuple):
    """A state along the run, and the noise that comes next."""

    state: InnerState
    noise: _random.Noise


@dataclass(frozen=True)
class Replay:
    """One problem, run as often as one likes from the same state, with the same noise."""

    outer: Any
    solver: InnerSolver
    state: InnerState
    hparams: Tree
    batches: Sequence[Tree]
    outer_batch: Tree
    noise: _random.Noise

    @cached_property
    def carry(self) -> Tree:
        """What the outer objective reads of it: that of the run as it is, which is a constant to a hypergradient."""
        return self._end().state.carry

    def run(self, params: Tree, hparams: Tree) -> float:
        """The outer value after all the steps."""
        end = self._advance(_Point(self.state._replace(params=params), self.noise), hparams, 0)
        return self._judge(end, end.state.params, hparams)

    def last(self, window: int) -> Value:
        """As :meth:`run`, with all but the last ``window`` steps frozen."""
        first = max(0, len(self.batches) - window)
        middle = self._advance(_Point(self.state, self.noise), self.hparams, 0, first)

        def value(params: Tree, hparams: Tree) -> float:
            end = self._advance(middle, hparams, first)
            return self._judge(end, end.state.params, hparams)

        return value

    def identity(self) -> Value:
        """The outer value where the run is frozen and the final params move as the initial ones do."""
        end = self._end()
        return lambda params, hparams: self._judge(end, tree.add(end.state.params, tree.sub(params, self.state.params)), hparams)

    def lagrangian(self, v: Tree, batches: Sequence[Tree]) -> Value:
        """``outer(w, h) - <v, F(w, h)>`` at the final params w: its derivative by h is ``outer_h - F_h^T v``."""
        end = self._end()
        theta = Theta(end.state.params, self.hparams, end.state.carry, batches)

        def value(params: Tree, hparams: Tree) -> float:
            residual = self._residual(theta.params, hparams, theta, end.noise)
            return self._judge(end, end.state.params, hparams) - float(tree.vdot(v, residual))

        return value

    def finite_difference(self, v: Tree, radius: float | Tensor, batches: Sequence[Tree]) -> Promise:
        """``outer(w, h) - (L(w + eps v, h) - L(w - eps v, h)) / (2 eps)`` at the final params w, ``eps = radius / |v|``."""
        end, descent = self._end(), self.solver.descent
        assert descent is not None
        size = float(tree.norm(v))
        eps = float(radius) / (size or 1.0)
        self._judge(end, end.state.params, self.hparams)
        noise = _random.noise(end.state.params)  # both sides see what comes after the outer objective

        def loss(s: float, hparams: Tree) -> float:
            _random.restore(noise)
            w = tree.axpy(s, v, end.state.params)
            return math.fsum(float(descent.objective(w, hparams, b, end.state.carry)[0]) for b in batches) / len(batches)

        def value(params: Tree, hparams: Tree) -> float:
            return self._judge(end, end.state.params, hparams) - (loss(eps, hparams) - loss(-eps, hparams)) / (2 * eps)

        bias = "it takes the last step alone, its second-order product by a difference of finite radius"
        return Promise(value, bias, scale=abs(loss(0.0, self.hparams)) / eps)

    def through_the_last_update(self, ct: Tree) -> Tree:
        """``D ct`` with ``D = -(d update / d gradient)^T`` of the last step."""
        descent, last = self.solver.descent, len(self.batches) - 1
        assert descent is not None
        before = self._advance(_Point(self.state, self.noise), self.hparams, 0, last)
        w, s = before.state.params, before.state.opt_state
        _random.restore(before.noise)
        g, _ = descent.gradient(w, self.hparams, self.batches[last], before.state.carry)
        pull = derivatives.func_vjp(lambda g: descent.update(g, w, s, self.hparams)[0], g)[1]
        return tree.scale(-1.0, pull(ct)[0])

    def cotangent(self) -> Tree:
        """``d outer / d w`` at the final params."""
        end = self._end()
        _random.restore(end.noise)
        outer = lambda w: value_and_aux(self.outer, w, self.hparams, self.outer_batch, end.state.carry)  # noqa: E731
        return derivatives.value_and_grad(outer, end.state.params, name="outer")[2][0]

    def system(self, adjoint: adjoints.Implicit) -> tuple[linear.LinearMap, linear.LinearMap]:
        """The matrix of an implicit method at the final params, and the one that its products sample.

        ``F_w^T + damping I`` by plain derivatives of the residual; an operator that is an approximation of it is taken as it is.
        """
        end = self._end()
        batches = chosen(adjoint.select, self.batches)
        theta = Theta(end.state.params, self.hparams, end.state.carry, batches)
        samples = [self._matrix(adjoint, theta._replace(batches=[b]), end.noise) for b in batches]
        mean = _mean(samples)
        if not adjoint.stochastic:
            return mean, mean
        turns = itertools.cycle(samples)
        return mean, linear.LinearMap(lambda v: next(turns)(v), lambda v: next(turns).transpose(v), theta)

    def _matrix(self, adjoint: adjoints.Implicit, theta: Theta, noise: _random.Noise) -> linear.LinearMap:
        damped = lambda A: lambda v: tree.axpy(adjoint.damping, v, A(v))  # noqa: E731
        w, h = theta.params, theta.hparams
        _random.restore(noise)
        if isinstance(adjoint.operator, (linear.Hessian, linear.Jacobian)):
            residual = lambda w: self._residual(w, h, theta, noise)  # noqa: E731
            pull = derivatives.func_vjp(residual, w)[1]
            A = linear.LinearMap(lambda v: pull(v)[0], lambda v: derivatives.func_jvp(residual, (w,), (v,)))
        else:
            A = adjoint.operator.matrix(self.solver, w, h, theta.batches[0], theta.carry)
        return linear.LinearMap(damped(A), damped(A.transpose), theta)

    def _end(self) -> _Point:
        return self._advance(_Point(self.state, self.noise), self.hparams, 0)

    def _advance(self, start: _Point, hparams: Tree, begin: int, end: int | None = None) -> _Point:
        _random.restore(start.noise)
        state = advance(self.solver, start.state, hparams, self.batches, begin, len(self.batches) if end is None else end)
        state = tree.detach(state)
        return _Point(state, _random.noise(state.params))

    def _judge(self, end: _Point, params: Tree, hparams: Tree) -> float:
        carry = self.carry  # may take the steps, which draw
        _random.restore(end.noise)
        return float(value_and_aux(self.outer, params, hparams, self.outer_batch, carry)[0])

    def _residual(self, params: Tree, hparams: Tree, theta: Theta, noise: _random.Noise) -> Tree:
        """F, the mean over ``theta.batches``, with the carry at the end of the run."""
        _random.restore(noise)
        return tree.mean([residual(self.solver, params, hparams, batch, theta.carry) for batch in theta.batches])


def promise(adjoint: Adjoint, replay: Replay) -> Promise:
    """What ``adjoint`` promises for the run; one that is not known here is held to the derivative of the run itself."""
    match adjoint:
        case adjoints.Unrolled(window=int() as window) if window < len(replay.batches):
            return Promise(replay.last(window), f"the steps before the last {window} are left out")
        case adjoints.FirstOrder():
            return Promise(replay.identity(), "the run is taken for the identity: all that is of second order is left out")
        case adjoints.Implicit():
            return _implicit(adjoint, replay)
        case adjoints.FiniteDifference():
            v = tree.scale(adjoint.step_size, replay.cotangent())
            return replay.finite_difference(v, adjoint.radius, chosen(adjoint.select, replay.batches))
        case adjoints.SAMA():
            v = replay.through_the_last_update(replay.cotangent())
            return replay.finite_difference(v, adjoint.radius, chosen(adjoint.select, replay.batches))
        case adjoints.ZerothOrder():
            return Promise(replay.run, slack=0.05)  # O(radius^2), of a run that is smooth at that scale
        case adjoints.Unrolled() | adjoints.Forward() | adjoints.ForwardSketch():
            return Promise(replay.run)
        case _:
            return Promise(replay.run, defined=False)


RANDOM = (adjoints.ForwardSketch, adjoints.ZerothOrder)
"""What draws directions of its own."""


def _implicit(adjoint: adjoints.Implicit, replay: Replay) -> Promise:
    (A, sampled), ct = replay.system(adjoint), replay.cotangent()
    v = adjoint.solver.solve(sampled, ct).value
    # Products are computed here in another way than by the method: iterations on an ill-conditioned system then part.
    shaken = [adjoint.solver.solve(_shaken(replay.system(adjoint)[1], seed), ct).value for seed in range(3)]
    slack = 10 * max(float(tree.norm(tree.sub(v, other))) for other in shaken) / (float(tree.norm(v)) or 1.0)
    value, bias = replay.lagrangian(v, chosen(adjoint.select, replay.batches)), "it is the derivative of a solution, not of the steps"
    if not isinstance(adjoint.operator, (linear.Hessian, linear.Jacobian)):
        bias += f", and inverts another matrix than the Hessian ({type(adjoint.operator).__name__})"
    if isinstance(adjoint.solver, linear.Identity):
        return Promise(value, f"{bias}, and takes the Hessian for the identity")
    return Promise(value, bias, slack=slack, linear_residual=float(tree.norm(tree.sub(A(v), ct)) / tree.norm(ct)))


def _shaken(A: linear.LinearMap, seed: int) -> linear.LinearMap:
    """A with products that are off by some units of rounding."""
    generator = torch.Generator().manual_seed(seed)

    def off(Av: Tree) -> Tree:
        size = 64 * tree.norm(Av)
        return tree.map(lambda x: x + size * torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator).to(x), Av)

    return linear.LinearMap(lambda v: off(A(v)), lambda v: off(A.transpose(v)), A.at)


def _mean(maps: Sequence[linear.LinearMap]) -> linear.LinearMap:
    everything = maps[0].at._replace(batches=[b for A in maps for b in A.at.batches])
    return linear.LinearMap(lambda v: tree.mean([A(v) for A in maps]), lambda v: tree.mean([A.transpose(v) for A in maps]), everything)
