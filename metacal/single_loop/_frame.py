"""What the algorithms share: the two objectives and their derivatives, how batches are read, and the frame around a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, _random, derivatives, optim, tree
from metacal._typing import Tree
from metacal.adjoints.implicit import refuse_moving_fixed_points
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import HyperGradient, value_and_aux
from metacal.estimate import share as share
from metacal.inner import Descent, FirstBad, InnerSolver, InnerState, constant, listed
from metacal.linear.base import count as count
from metacal.linear.base import relative as relative
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter, at, checked


class Outer(NamedTuple):
    """The outer objective f at a point: ``params`` is f_w, ``hparams`` f_h."""

    value: Tensor
    aux: dict[str, Tensor]
    params: Tree
    hparams: Tree


class Linear(NamedTuple):
    """The inner gradient and the products with one direction v, of one batch: ``Hv = g_ww v``, ``Jv = g_hw v``."""

    gradient: Tree
    carry: Tree
    Hv: Tree
    Jv: Tree


class Inner(NamedTuple):
    """The inner objective g at a point, with both gradients of one backward pass."""

    value: Tensor
    params: Tree
    hparams: Tree
    carry: Tree


@dataclass(frozen=True)
class Problem:
    """The inner objective g and the outer one f as a step sees them."""

    objective: Any
    descent: Descent

    def outer(self, w: Tree, h: Tree, batch: Tree) -> Outer:
        """f with its two gradients. Work: one gradient."""
        value, aux, (f_w, f_h) = derivatives.value_and_grad(lambda w, h: value_and_aux(self.objective, w, h, batch), w, h, name="outer")
        return Outer(value, aux, f_w, f_h)

    def outer_params(self, w: Tree, h: Tree, batch: Tree) -> Tree:
        """f_w alone. Work: one gradient."""
        return derivatives.value_and_grad(lambda w: value_and_aux(self.objective, w, h, batch), w, constants=h, name="outer")[2][0]

    def inner(self, state: InnerState, h: Tree, batch: Tree) -> Inner:
        """g with its two gradients. Work: one gradient."""
        loss, carry = self.descent.objective, state.carry
        found: list[Any] = []
        for piece in loss.pieces(batch):
            value, carry, (g_w, g_h) = derivatives.value_and_grad(
                lambda w, h, b=piece, c=carry: loss.fn(w, h, b, c), state.params, h, name="objective"
            )
            found.append((value, g_w, g_h))
        value, g_w, g_h = tree.mean(found)
        return Inner(value, g_w, g_h, tree.detach(carry))

    def linear(self, state: InnerState, h: Tree, batch: Tree, v: Tree) -> Linear:
        """g_w and both products with v, on one realisation of noise. Work: one gradient and one product."""
        noise = _random.noise(state.params)
        gradient, carry = self.descent.gradient(state.params, h, batch, state.carry)
        _random.restore(noise)
        return Linear(gradient, carry, *self.descent.products(state.params, h, batch, state.carry, v))

    def products(self, state: InnerState, h: Tree, batch: Tree, v: Tree) -> tuple[Tree, Tree]:
        """``(g_ww v, g_hw v)``. Work: one product."""
        return self.descent.products(state.params, h, batch, state.carry, v)

    def hessian(self, state: InnerState, h: Tree, batch: Tree, v: Tree) -> Tree:
        """``g_ww v`` alone. Work: one product."""
        return self.descent.hessian(state.params, h, batch, state.carry)(v)

    def follow(self, state: InnerState, h: Tree, direction: Tree, carry: Tree) -> InnerState:
        """The inner optimizer's step along a direction."""
        return InnerState(*self.descent.update(direction, state.params, state.opt_state, h), carry)

    def descend(self, state: InnerState, h: Tree, batches: Sequence[Tree], bad: FirstBad) -> tuple[InnerState, Tree]:
        """One inner step per batch; also the last gradient. Work: one gradient each."""
        gradient = tree.zeros_like(state.params)
        for t, batch in enumerate(batches):
            gradient, carry = self.descent.gradient(state.params, h, batch, state.carry)
            state = self.follow(state, h, gradient, carry)
            bad.look(t, state.params)
        return state, gradient


class Move(NamedTuple):
    """What an algorithm makes of a state.

    Attributes:
        inner: the next inner state.
        adjoint: the next auxiliary variables.
        direction: what the outer optimizer follows: a hypergradient or, where it moves both, a pair for (params, hparams).
        outer: the outer objective where its gradient was taken.
        stats: what was found on the way.
    """

    inner: InnerState
    adjoint: Tree
    direction: Tree
    outer: Outer
    stats: dict[str, Tensor]


Step = Callable[[BilevelState, Sequence[Tree], Tree, FirstBad], Move]


def algorithm(
    solver: InnerSolver, optimizer: OptimizerLike, start: Callable[[InnerState, Tree], Tree], move: Step, *, joint: bool = False
) -> BilevelOptimizer:
    """Frames ``move`` as a :class:`metacal.BilevelOptimizer`; ``start(inner, hparams)`` are the first auxiliary variables.

    With ``joint`` the outer optimizer moves the pair (params, hparams).
    """
    optim.resolve(optimizer, ())

    def init(params: Tree, hparams: Tree) -> BilevelState:
        inner = solver.init(params, hparams)
        _checks.one_device(params=params, hparams=hparams)
        refuse_moving_fixed_points(solver, params, hparams)
        moved = (params, hparams) if joint else hparams
        return BilevelState(inner, hparams, optim.resolve(optimizer, ()).init(moved), start(inner, hparams), torch.tensor(0))

    def step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        if not isinstance(state, BilevelState):
            raise TypeError(f"`state` should be a BilevelState, got {type(state).__name__}. Make one with init(params, hparams).")
        _checks.batches(inner_batches)
        if not derivatives.transforming():
            constant("outer_batch", outer_batch)
            state = tree.detach(state)
        bad = FirstBad()
        inner, adjoint, direction, outer, stats = move(state, listed(inner_batches), outer_batch, bad)
        variables = (inner.params, state.hparams) if joint else state.hparams
        variables, opt_state = optim.moved(optim.resolve(optimizer, ()), direction, state.opt_state, variables)
        inner, hparams = (inner._replace(params=variables[0]), variables[1]) if joint else (inner, variables)
        bad.look(max(len(inner_batches) - 1, 0), (inner.params, adjoint, direction, hparams))
        stats = {"first_bad_step": bad.step()} | stats
        hg = HyperGradient(outer.value, direction[1] if joint else direction, (), inner, stats, outer.aux)
        result = BilevelState(inner, hparams, opt_state, adjoint, state.step + 1), hg
        released: tuple[BilevelState, HyperGradient] = derivatives.released(result, derivatives.transforming())
        return released

    return BilevelOptimizer(init, step)


def problem(outer: Any, solver: InnerSolver) -> Problem:
    """The two objectives, if the inner steps are those of a gradient."""
    if not isinstance(solver, InnerSolver):
        raise TypeError(f"`solver` should be an InnerSolver such as metacal.descent(inner, optim.sgd(0.1)), got {type(solver).__name__}.")
    if solver.descent is None:
        raise ValueError(
            "`solver` should have a `descent`: these algorithms take a step apart into a gradient and an update. A fixed_point solver has "
            "none; use metacal.descent(objective, optimizer), or metacal.nested with adjoints.Implicit."
        )
    return Problem(outer, solver.descent)


def layout(batches: Sequence[Tree], *parts: tuple[str, int | None]) -> list[Sequence[Tree]]:
    """Cuts the inner batches into named parts of given lengths; ``None`` (in the first place) is what is left, at least one."""
    fixed = sum(length for _, length in parts if length is not None)
    is_open = parts[0][1] is None
    if len(batches) < fixed + 1 if is_open else len(batches) != fixed:
        order = ", then ".join(f"{'one' if n is None else n} {name}" for name, n in parts if n != 0)
        wanted = f"at least {fixed + 1}" if is_open else f"{fixed}"
        raise ValueError(
            f"`inner_batches` should hold {wanted} batch{'es' if wanted != '1' else ''}, in this order: {order}. Got {len(batches)}. "
            f"For the same batch throughout pass metacal.repeat(batch, {fixed + is_open})."
        )
    cut: list[Sequence[Tree]] = []
    rest = list(batches)
    for _, length in reversed(parts):
        keep = 0 if length is None else len(rest) - length
        cut.append(rest[keep:])
        rest = rest[:keep]
    return cut[::-1]


def positive(name: str, value: Hyperparameter) -> None:
    """Raises unless a hyperparameter is a number above 0, a 0-dim tensor or a schedule."""
    if isinstance(value, (int, float)) and not float(value) > 0:
        raise ValueError(f"`{name}` should be positive, got {value}.")
    checked(name, value)


def fraction(name: str, value: Hyperparameter) -> None:
    """Raises unless a hyperparameter is a number in (0, 1], a 0-dim tensor or a schedule."""
    positive(name, value)
    if isinstance(value, (int, float)) and float(value) > 1:
        raise ValueError(f"`{name}` should be at most 1, got {value}: it is the weight of the new estimate.")


def now(state: BilevelState, *hyperparameters: Hyperparameter) -> tuple[Any, ...]:
    """The hyperparameters' values at this outer step: schedules are given the number of outer steps taken."""
    precision = torch.float32
    for leaf in tree.leaves(state.hparams):
        precision = torch.promote_types(precision, leaf.dtype)
    return at(state.step.to(precision), *hyperparameters)
