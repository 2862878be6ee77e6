"""What a user writes as an objective, with logs, pieces or a carry, as the one form that is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metacal import _checks, operators
from metacal._typing import Objective, Tree


@dataclass(frozen=True)
class WithAux:
    """An objective that returns ``(loss, dict of named tensors)``: see :func:`with_aux`."""

    objective: Any

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, /) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(params, hparams, batch)


def with_aux(objective: Any) -> WithAux:
    """Marks an objective that returns ``(loss, dict of named tensors to log)``; ``HyperGradient.aux`` carries the outer one's."""
    return WithAux(objective)


@dataclass(frozen=True)
class WithCarry:
    """An outer objective that reads the carry: see :func:`with_carry`."""

    objective: Callable[[Tree, Tree, Tree, Tree], Tensor]


def with_carry(outer: Callable[[Tree, Tree, Tree, Tree], Tensor]) -> WithCarry:
    """Marks an outer objective ``(params, hparams, batch, carry) -> loss`` that also reads the carry which the inner run ends with.

    So a network is judged in evaluation mode, with the running statistics that its training left. Like all of a carry they are
    constants to the hypergradient: what the hparams do to the loss through them is not estimated. To log as well:
    ``with_aux(with_carry(outer))``.

    >>> import torch, metacal
    >>> inner = lambda w, h, b, carry: (((w - h) ** 2).sum(), carry + 1)
    >>> solver = metacal.descent(inner, metacal.optim.sgd(0.25), carry=torch.zeros(()))
    >>> outer = metacal.with_carry(lambda w, h, b, steps: steps * w.sum())
    >>> estimate = metacal.hypergradient(outer, solver, metacal.adjoints.Unrolled())
    >>> h = torch.tensor([1.0])
    >>> estimate(solver.init(torch.zeros(1), h), h, metacal.repeat(None, 2), None).hparams  # w = h (1 - 1/4), after 2 steps
    tensor([1.5000])
    """
    if isinstance(outer, (WithAux, WithCarry)):
        raise TypeError(
            f"`outer` should be a function (params, hparams, batch, carry) -> scalar, got {type(outer).__name__}. To log as well, mark "
            "it the other way round: with_aux(with_carry(outer))."
        )
    return WithCarry(outer)


def value_and_aux(outer: Any, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tensor, dict[str, Tensor]]:
    """The outer objective where a run ended, and what it logs."""
    logs = isinstance(outer, WithAux)
    objective = outer.objective if logs else outer
    if isinstance(objective, WithCarry):
        with _checks.left_alone(carry=carry):
            found = objective.objective(params, hparams, batch, carry)
    else:
        found = objective(params, hparams, batch)
    return _checks.pair("outer", found, "(loss, dict of tensors to log), as with_aux says") if logs else (found, {})


@dataclass(frozen=True)
class Microbatched:
    """An objective evaluated piece by piece: see :func:`microbatched`."""

    objective: Objective
    num_chunks: int

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, /) -> Tensor:
        return torch.stack([self.objective(params, hparams, b) for b in operators.chunks(batch, self.num_chunks)]).mean()


def microbatched(objective: Any, n: int) -> Microbatched:
    """The mean of the objective over ``n`` equal pieces of the batch: gradient accumulation.

    :func:`descent` differentiates it piece by piece, so that only one piece's activations are alive at a time. Right for
    objectives that are means over samples; a contrastive loss or BatchNorm sees smaller batches.
    """
    _checks.whole("n", n)
    if isinstance(objective, WithAux):
        raise TypeError("`objective` should return a scalar, not logs beside it: pieces are averaged. Log from the outer objective.")
    return Microbatched(objective, n)


def as_loss(objective: Any, with_carry: bool) -> operators.Loss:
    """The objective as ``(params, hparams, batch, carry) -> (loss, carry)``."""
    if isinstance(objective, Microbatched):
        return replace(as_loss(objective.objective, with_carry), num_chunks=objective.num_chunks)
    if with_carry:
        if isinstance(objective, WithAux):
            raise ValueError("`objective` with `carry` should return (loss, carry), not logs: log from the outer objective.")
        return operators.Loss(_with_carry(objective))
    if isinstance(objective, WithAux):
        if isinstance(objective.objective, WithCarry):
            raise TypeError(
                "`objective` is marked by with_carry, which is for outer objectives. An inner one gets its carry from descent(carry=...)."
            )
        return operators.Loss(lambda w, h, b, c: (objective(w, h, b)[0], c))
    return operators.Loss(lambda w, h, b, c: (objective(w, h, b), c))


def _with_carry(objective: Callable[[Tree, Tree, Tree, Tree], Any]) -> Callable[[Tree, Tree, Tree, Tree], tuple[Tensor, Tree]]:
    """The objective, whose ``carry`` is a value: steps are taken again from what was saved of it."""

    def pure(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        if torch.compiler.is_compiling():
            return objective(params, hparams, batch, carry)
        with _checks.left_alone(carry=carry):
            value, moved = _checks.pair("objective", objective(params, hparams, batch, carry), "(loss, carry), as it is given a `carry`")
        return value, moved

    return pure
