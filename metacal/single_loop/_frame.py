"""What the algorithms share: how batches are read, how settings are checked, and the frame around a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, derivatives, optim
from metacal._typing import Tree
from metacal.adjoints.implicit import refuse_moving_fixed_points
from metacal.batches import constant, listed
from metacal.bilevel import BilevelOptimizer, BilevelState, framed
from metacal.estimate import HyperGradient
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter, at, checked, precision
from metacal.single_loop._objectives import Outer


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
    transformation = optim.resolve(optimizer, ())

    def init(params: Tree, hparams: Tree) -> BilevelState:
        inner = solver.init(params, hparams)
        _checks.one_device(params=params, hparams=hparams)
        refuse_moving_fixed_points(solver, params, hparams)
        moved = (params, hparams) if joint else hparams
        return BilevelState(inner, hparams, transformation.init(moved), start(inner, hparams), torch.tensor(0))

    def step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        _checks.batches(inner_batches)
        if not derivatives.transforming():
            constant("outer_batch", outer_batch)
        bad = FirstBad()
        inner, adjoint, direction, outer, stats = move(state, listed(inner_batches), outer_batch, bad)
        variables = (inner.params, state.hparams) if joint else state.hparams
        variables, opt_state = optim.moved(transformation, direction, state.opt_state, variables)
        inner, hparams = (inner._replace(params=variables[0]), variables[1]) if joint else (inner, variables)
        bad.look(max(len(inner_batches) - 1, 0), (inner.params, adjoint, direction, hparams))
        stats = {"first_bad_step": bad.step()} | stats
        hg = HyperGradient(outer.value, direction[1] if joint else direction, (), inner, stats, outer.aux)
        return BilevelState(inner, hparams, opt_state, adjoint, state.step + 1), hg

    return framed(init, step)


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
    return at(state.step.to(precision(state.hparams)), *hyperparameters)
