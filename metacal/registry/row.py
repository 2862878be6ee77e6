"""A row of the table: a method, what it is made with, and what its costs depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

Family = Literal["exact", "approximate", "implicit", "single loop", "initialisation"]
FAMILIES: dict[Family, str] = {
    "exact": "The derivative of the steps that were taken",
    "approximate": "Truncated, sketched and difference estimates of it",
    "implicit": "The derivative of a solution",
    "single loop": "Loops of their own (`metacal.single_loop`), per outer step",
    "initialisation": "Learned initial params, per task",
}

Kind = Literal["exact", "solution", "unbiased", "biased"]
"""Whose derivative a method gives: that of the run; that of the solution, as the linear solve and the steps converge; that of the
run in the mean; or another one."""


class Setting(NamedTuple):
    """What a method is made with: the field that it has no use for is ignored.

    Attributes:
        number: K, n, k, N or C: terms, products, directions, window, rank, pairs of particles, outputs of the network.
        step_size: of a series or of a linear variable; also the radius of zeroth-order methods.
        penalty: lambda of the penalty methods.
        num_batches: inner batches that there are, for those that keep a table.
        module, loss: the network and the loss that K-FAC reads.
        model, outputs_loss: ``(params, hparams, batch) -> outputs`` and ``(outputs, hparams, batch) -> scalar``, for Gauss-Newton.
    """

    number: int = 10
    step_size: float = 0.1
    penalty: float = 10.0
    num_batches: int = 1
    module: nn.Module | None = None
    loss: nn.Module | None = None
    model: Callable[..., Any] | None = None
    outputs_loss: Callable[..., Any] | None = None


class Sizes(NamedTuple):
    """What costs depend on.

    Attributes:
        num_steps: T, inner steps per hypergradient.
        num_params, num_hparams: P and m, scalars.
        params_bytes, state_bytes: of the params, and of params and optimizer state together.
        activation_bytes: peak of one plain training step.
        number: K, n or k, as in :class:`Setting`.
    """

    num_steps: int
    num_params: int
    num_hparams: int
    params_bytes: int
    state_bytes: int
    activation_bytes: int
    number: int = 10


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        code: how one writes it; the row's name.
        make: for adjoints ``make(setting) -> Adjoint``; for the others ``make(outer, solver, optimizer, setting) ->
            BilevelOptimizer``.
        estimates, bias, cost, memory, needs, reference: the columns of the table, Markdown.
        work: the cost as a function, in plain training steps; an upper bound where the text says "at most".
        bytes: the peak memory as a function, an estimate.
        kind: whose derivative it gives.
        initial_params: it estimates the derivative by the initial params.
        path: it sees what only shapes the path (learning rates).
        differentiates: it needs a differentiable inner step.
        symmetric: its linear system needs a symmetric matrix.
        by_hand: it wants the network and its loss apart, which a problem does not show.
        limit: why it cannot serve a problem of these sizes, None where it can.
        batches_per_step: inner batches of one outer step, of T and the setting's number; by default one per inner step.
    """

    code: str
    family: Family
    make: Callable[..., Any]
    estimates: str
    bias: str
    cost: str
    memory: str
    needs: str
    reference: str
    work: Callable[[Sizes], float]
    bytes: Callable[[Sizes], float]
    kind: Kind = "exact"
    initial_params: bool = False
    path: bool = False
    differentiates: bool = True
    symmetric: bool = False
    by_hand: bool = False
    limit: Callable[[Sizes], str | None] = lambda sizes: None
    batches_per_step: Callable[[int, int], int] = lambda T, K: T


def cite(authors: str, *arxiv: str) -> str:
    return f"{authors} ({', '.join(f'[{number}](https://arxiv.org/abs/{number})' for number in arxiv)})"


BOTH, HPARAMS = "hparams, initial params", "hparams"
DISTANCE = "distance to the solution; the reported linear residual"
