"""Running the inner problem: solvers are three pure functions, and a run is one step per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metacal import _checks, derivatives, operators, tree
from metacal._objective import as_loss
from metacal._typing import Tree
from metacal.batches import read


class InnerState(NamedTuple):
    """What an inner step changes.

    ``carry`` holds what changes along the way and is never differentiated (BatchNorm statistics, EMA targets, queues).
    """

    params: Tree
    opt_state: Tree
    carry: Tree = ()


StateCotangent: TypeAlias = "tuple[Tree, list[Tensor]]"
"""A cotangent of the params, and of the floating leaves of the optimizer state."""


class _Parts(NamedTuple):
    objective: operators.Loss
    gradient: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    products: Callable[[Tree, Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    update: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    linearised: Callable[[Tree, Tree, Tree, Tree], operators.Linearised]
    step: Callable[[InnerState, Tree, Tree], tuple[InnerState, Tree]]
    pullback: Callable[[InnerState, Tree, Tree, Tree, StateCotangent], tuple[StateCotangent, Tree]]


class Descent(_Parts):
    """The parts of a gradient-based step, for the adjoints that take it apart: four that say what it is, and three that follow.

    ``gradient(params, hparams, batch, carry) -> (grads, carry)``;
    ``products(params, hparams, batch, carry, d) -> (H_ww d, H_hw d)``, and ``linearised(params, hparams, batch, carry)``, which has
    the gradient and each product by itself, from one recorded gradient where there can be one;
    ``update(grads, params, opt_state, hparams) -> (params, opt_state)``, cheap and usually elementwise;
    ``step(state, hparams, batch) -> (state, grads)``, and with what it returns ``pullback(state, grads, hparams, batch, ct) ->
    (ct, d_hparams)``: the transposed Jacobian of the step that began at ``state``, on a :data:`StateCotangent`.
    """

    __slots__ = ()

    def __new__(
        cls, objective: Any, gradient: Any, products: Any, update: Any, linearised: Any = None, step: Any = None, pullback: Any = None
    ) -> Descent:
        objective = objective if isinstance(objective, operators.Loss) else as_loss(objective, with_carry=False)
        linearised = linearised_of(gradient, products) if linearised is None else linearised
        step = step_of(gradient, update) if step is None else step
        pullback = pullback_of(products, update) if pullback is None else pullback
        return super().__new__(cls, objective, gradient, products, update, linearised, step, pullback)

    def _replace(self, **parts: Any) -> Descent:
        """With other parts; those that follow from the four, and are not given, follow from the new ones."""
        four = {name: getattr(self, name) for name in ("objective", "gradient", "products", "update")}
        return Descent(**(self._asdict() if parts.keys().isdisjoint(four) else four) | parts)


# What follows are functions and no partials: what is compiled is a copy of their code.
def linearised_of(gradient: Any, products: Any, product: Any = None) -> Callable[[Tree, Tree, Tree, Tree], operators.Linearised]:
    """Each part afresh; ``product`` is that of the Hessian alone, where that is cheaper than both."""

    def linearised(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> operators.Linearised:
        at = params, hparams, batch, carry
        return operators.Linearised(
            lambda: gradient(*at)[0],
            (lambda direction: products(*at, direction)[0]) if product is None else lambda direction: product(*at, direction),
            lambda direction: products(*at, direction)[1],
        )

    return linearised


def step_of(gradient: Any, update: Any) -> Callable[[InnerState, Tree, Tree], tuple[InnerState, Tree]]:
    def step(state: InnerState, hparams: Tree, batch: Tree) -> tuple[InnerState, Tree]:
        grads, moved = gradient(state.params, hparams, batch, state.carry)
        params, opt_state = update(grads, state.params, state.opt_state, hparams)
        return InnerState(params, opt_state, moved), grads

    return step


def pullback_of(products: Any, update: Any) -> Callable[[InnerState, Tree, Tree, Tree, StateCotangent], tuple[StateCotangent, Tree]]:
    def pullback(state: InnerState, grads: Tree, hparams: Tree, batch: Tree, ct: StateCotangent) -> tuple[StateCotangent, Tree]:
        # w', s' = U(g(w, h), w, s, h): (g_bar, w_bar, s_bar, h_bar) = U^T ct, and g is symmetric in w.
        floating, combine = tree.partition(state.opt_state)

        def updated(g: Tree, w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
            w, s = update(g, w, combine(s), h)
            return w, tree.partition(s)[0]

        # The update's graph is gone before the products need room.
        g_bar, w_bar, s_bar, h_bar = derivatives.vjp(updated, grads, state.params, floating, hparams)[1](ct)
        H_ww, H_hw = products(state.params, hparams, batch, state.carry, g_bar)
        return (tree.add(w_bar, H_ww), s_bar), tree.add(h_bar, H_hw)

    return pullback


class InnerSolver(NamedTuple):
    """A way to run an inner problem: ``init(params, hparams)``, ``step(state, hparams, batch)``, and
    ``residual(params, hparams, batch)``, a tree like the params that is zero at a solution.

    ``descent`` is there when the step is one of a gradient (by hand: ``step=DescentStep(descent)``); ``anchor(hparams)`` when the
    solution is tied to a point (:func:`metacal.proximal`).
    """

    init: Callable[[Tree, Tree], InnerState]
    step: Callable[[InnerState, Tree, Tree], InnerState]
    residual: Callable[[Tree, Tree, Tree], Tree]
    descent: Descent | None = None
    anchor: Callable[[Tree], Tree] | None = None

    @property
    def taken_apart(self) -> Descent | None:
        """The parts that the step is made of: None where it is another, as one that somebody wrapped."""
        return self.descent if isinstance(self.step, DescentStep) and self.step.descent is self.descent else None

    @property
    def stationarity(self) -> Descent | None:
        """The parts whose gradient the residual is: None where the equation of a solution is another."""
        return self.descent if isinstance(self.residual, Gradient) and self.residual.descent is self.descent else None


@dataclass(frozen=True)
class DescentStep:
    """The step that a :class:`Descent` makes; a solver that has another, say a projection after it, is not taken apart."""

    descent: Descent

    def __call__(self, state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
        after: InnerState = self.descent.step(state, hparams, batch)[0]
        return after


def rest(state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
    """No step: the params are where they belong."""
    return state


@dataclass(frozen=True, eq=False)
class Gradient:
    """The residual of a :class:`Descent`, at the first value of the carry."""

    descent: Descent
    carry: Tree

    def __call__(self, params: Tree, hparams: Tree, batch: Tree) -> Tree:
        return self.descent.gradient(params, hparams, batch, self.carry)[0]


def run(solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree]) -> InnerState:
    """Runs one inner step per batch.

    ``batches`` is a sequence. It may be lazy: replay reads it again, and finds torch's generators as they were, so that augmentation
    where a batch is read is drawn again as it was. (A linear system's batches are read at another time, and drawn anew.) Work: one
    step per batch; memory: one state.
    """
    _checks.batches(batches)
    return advance(solver, state, hparams, batches, 0, len(batches))


_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""Where the sum of finite params overflows."""


class FirstBad:
    """Finds the step after which the params first hold a NaN or an infinity, without asking the host."""

    def __init__(self) -> None:
        self._looked: list[tuple[int, Tensor]] = []

    def look(self, t: int, params: Tree) -> None:
        """Looks at the params after step ``t``."""
        if leaves := tree.leaves(params):
            self._looked.append((t, reduce(torch.add, [leaf.detach().sum(dtype=_WIDER.get(leaf.dtype)) for leaf in leaves])))

    def step(self) -> Tensor:
        """The first bad step, or -1."""
        if not self._looked:
            return torch.tensor(-1)
        steps, sums = zip(*self._looked, strict=True)
        found = torch.stack(sums)
        after = torch.where(found.isfinite(), max(steps) + 1, torch.tensor(steps, device=found.device)).amin()
        return torch.where(after > max(steps), -1, after)


def advance(
    solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], begin: int, end: int, bad: FirstBad | None = None
) -> InnerState:
    """Steps ``begin`` to ``end`` of a run, watched by ``bad``."""
    for t, batch in enumerate(read(batches, begin, end), begin):
        state = solver.step(state, hparams, batch)
        if bad is not None:
            bad.look(t, state.params)
    return state
