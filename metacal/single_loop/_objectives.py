"""The two objectives of a bi-level problem and their derivatives, as a step sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from metacal import _random, derivatives, tree
from metacal._objective import value_and_aux
from metacal._typing import Tree
from metacal.inner import Descent, FirstBad, InnerSolver, InnerState


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
class Objectives:
    """The inner objective g and the outer one f as a step sees them."""

    objective: Any
    descent: Descent

    def outer(self, state: InnerState, h: Tree, batch: Tree) -> Outer:
        """f with its two gradients. Work: one gradient."""
        value, aux, (f_w, f_h) = derivatives.value_and_grad(self._outer(state, batch), state.params, h, name="outer")
        return Outer(value, aux, f_w, f_h)

    def outer_params(self, state: InnerState, h: Tree, batch: Tree) -> Tree:
        """f_w alone. Work: one gradient."""
        f = self._outer(state, batch)
        return derivatives.value_and_grad(lambda w: f(w, h), state.params, constants=h, name="outer")[2][0]

    def _outer(self, state: InnerState, batch: Tree) -> Callable[[Tree, Tree], tuple[Tensor, dict[str, Tensor]]]:
        return lambda w, h: value_and_aux(self.objective, w, h, batch, state.carry)

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
        return self.descent.linearised(state.params, h, batch, state.carry).hessian(v)

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


def objectives(outer: Any, solver: InnerSolver) -> Objectives:
    """The two objectives, if the inner steps are those of a gradient."""
    if not isinstance(solver, InnerSolver):
        raise TypeError(f"`solver` should be an InnerSolver such as metacal.descent(inner, optim.sgd(0.1)), got {type(solver).__name__}.")
    if solver.descent is None:
        raise ValueError(
            "`solver` should have a `descent`: these algorithms take a step apart into a gradient and an update. A fixed_point solver has "
            "none; use metacal.descent(objective, optimizer), or metacal.nested with adjoints.Implicit."
        )
    if solver.taken_apart is None:
        raise ValueError(
            "`solver` should take the step that its descent makes, which these algorithms take apart; this one's is another (one that "
            "was wrapped). Put what wraps it into the optimizer, or use metacal.nested with adjoints.Unrolled."
        )
    return Objectives(outer, solver.descent)
