"""What is benchmarked: a bi-level problem as plain values, which every library can be given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from metacal import optim, tree
from metacal._typing import Objective, Tree
from metacal.optim import GradientTransformation

Size = Literal["tiny", "small", "full"]
"""Of a problem: for tests, for a suite of minutes on two cores, and for the record."""


@dataclass(frozen=True)
class Rule:
    """The inner optimizer, as a value that every library's own can be built from; betas and eps are torch's defaults."""

    kind: Literal["sgd", "adam"]
    lr: float
    momentum: float = 0.0

    def ours(self) -> GradientTransformation:
        """As one of :mod:`metacal.optim`."""
        if self.kind == "adam":
            return optim.adam(self.lr)
        return optim.sgd(self.lr, momentum=self.momentum)

    def of_torch(self, parameters: Iterable[Tensor], *, foreach: bool | None = None) -> torch.optim.Optimizer:
        """As one of ``torch.optim``."""
        if self.kind == "adam":
            return torch.optim.Adam(parameters, self.lr, foreach=foreach)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, foreach=foreach)


@dataclass(frozen=True)
class Goal:
    """What the hparams are learned for, where that is more than the outer objective.

    Attributes:
        scores: ``(params, hparams, test) -> {"accuracy": ...}``: how good the params are that were trained with these hparams, and the
            hparams themselves; larger is better.
        test: data that neither objective sees.
        lr: of Adam on the hparams.
        restarts: every outer step has to train from the start, because it is the T steps from there that are learned; otherwise a
            learner may go on from where its last outer step ended.
    """

    scores: Callable[[Tree, Tree, Tree], dict[str, float]]
    test: Tree
    lr: float
    restarts: bool = True


@dataclass(frozen=True)
class Problem:
    """A bi-level problem: T inner steps from ``params``, one per batch, then the outer objective.

    The hypergradient wanted is that of ``outer(w_T, hparams, outer_batch)`` by the hparams. Objectives close over no floating
    tensors, so that a problem can change its dtype and its device, and they draw no random numbers.

    Attributes:
        inner, outer: ``(params, hparams, batch) -> scalar``.
        params, hparams: flat dicts of tensors.
        batches: T inner batches; the linear system of implicit methods is that of the last one.
        exact: the hypergradient at the inner *solution* where it is known in closed form, in float64.
        step_size: of a Neumann series, below ``2 / largest eigenvalue`` of the inner Hessian.
        compile: compiled methods take part. On a CPU they compile for tens of seconds.
        parts: the inner objective as ``(params, hparams, batch) -> outputs`` and ``(outputs, hparams, batch) -> scalar``,
            where it is no more than that: what Gauss-Newton products want.
        goal: what it is all for, where something is learned.
    """

    name: str
    inner: Objective
    outer: Objective
    params: Tree
    hparams: Tree
    batches: Sequence[Tree]
    outer_batch: Tree
    rule: Rule
    exact: Callable[[], Tree] | None = None
    step_size: float = 0.1
    compile: bool = False
    parts: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    goal: Goal | None = None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.batches)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = tree.leaves(self.params)[0].device
        return device


def astype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem in another floating-point type; integer leaves keep theirs."""
    return _mapped(problem, dtype)


def to(problem: Problem, device: torch.device | str) -> Problem:
    """The same problem on another device."""
    return _mapped(problem, torch.device(device))


def with_steps(problem: Problem, num_steps: int) -> Problem:
    """The same problem with another T: its batches again and again, or the first of them."""
    if num_steps < 1:
        raise ValueError(f"`num_steps` should be at least 1, got {num_steps}.")
    batches = [problem.batches[t % len(problem.batches)] for t in range(num_steps)]
    return replace(problem, batches=batches)


def _mapped(problem: Problem, target: torch.dtype | torch.device) -> Problem:
    # A batch that is used at several steps stays one.
    moved = {id(batch): batch for batch in problem.batches}
    moved = {key: tree.to(batch, target) for key, batch in moved.items()}
    params, hparams, outer_batch = tree.to((problem.params, problem.hparams, problem.outer_batch), target)
    batches = [moved[id(batch)] for batch in problem.batches]
    goal = problem.goal and replace(problem.goal, test=tree.to(problem.goal.test, target))
    return replace(problem, params=params, hparams=hparams, batches=batches, outer_batch=outer_batch, goal=goal)
