"""The SSL problem that every method here solves: tasks, representations, and the calibrated loss of one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metacal import tasks, tree
from metacal._typing import Tree
from metacal.objectives import Outputs, SSLObjective
from metacal.tc2.calibrate import Calibrator, Identity
from metacal.tc2.networks import Network


class Views(NamedTuple):
    """Images of one task, or of several along a leading axis.

    Attributes:
        x: [..., n, m, C, H, W].
        target: what the EMA target network makes of them, [..., n, m, d]; ``()`` where the objective has no target.
    """

    x: Tensor
    target: Tensor | tuple[()] = ()


class Batch(NamedTuple):
    """A batch split into K tasks: support [K, n, m_s, ...], query [K, n, m_q, ...]."""

    support: Views
    query: Views


@dataclass(frozen=True)
class Problem:
    """Which network, objective and calibrator, and how a batch becomes tasks.

    Args:
        where: what is calibrated, the projector's output z or the encoder's output h (then the projector reads h~) [O].
        num_tasks: K; 4 is reported best [S].
        split_by: how a task becomes support and query: half of its views, or half of its samples [O].
        momentum: tau of the EMA target network (BYOL).
    """

    network: Network
    objective: SSLObjective
    calibrator: Calibrator = Identity()
    where: Literal["projector", "encoder"] = "projector"
    num_tasks: int = 4
    split_by: Literal["views", "samples"] = "views"
    momentum: float = 0.99

    @property
    def d(self) -> int:
        """The size of the representation that is calibrated."""
        return self.network.d if self.where == "projector" else self.network.dim

    def represent(self, theta: Tree, x: Tensor) -> Tensor:
        """The representation before calibration: [..., C, H, W] -> [..., d]."""
        h = self.network.encode(theta, x)
        return self.network.project(theta, h) if self.where == "projector" else h

    def represent_tasks(self, theta: Tree, x: Tensor) -> Tensor:
        """The same for tasks [K, n, m, C, H, W], one by one: BatchNorm in a head sees one task, as it does in the task's loss."""
        return torch.stack([self.represent(theta, task) for task in x])

    def loss(self, theta: Tree, phi: Tree, V: Tensor, views: Views) -> Tensor:
        """The calibrated SSL loss l_k of one task."""
        return self.loss_of(theta, phi, V, self.represent(theta, views.x), views.target)

    def loss_of(self, theta: Tree, phi: Tree, V: Tensor, r: Tensor, target: Tensor | tuple[()] = ()) -> Tensor:
        """The same from representations r [n, m, d]: all that the calibrator's own stage needs."""
        z = self._finish(theta, self.calibrator.calibrate(phi, r, V))
        p = None if self.network.predict is None else self.network.predict(theta, z)
        fixed = None if isinstance(target, tuple) else self._finish(theta, self.calibrator.calibrate(phi, target, V)).detach()
        return self.objective(Outputs(z, p, fixed))

    def _finish(self, theta: Tree, calibrated: Tensor) -> Tensor:
        return calibrated if self.where == "projector" else self.network.project(theta, calibrated)

    def init_target(self, theta: Tree) -> Tree:
        """The EMA target network at the start, a copy of encoder and projector; ``()`` where the objective has none."""
        return tree.clone({part: theta[part] for part in ("encoder", "projector")}) if self.objective.ema_target else ()

    def batch(self, views: Tensor, target: Tree) -> Batch:
        """Splits augmented images [N, m, C, H, W] into tasks at random, support and query."""
        support, query = tasks.support_query(tasks.split(views, self.num_tasks), self.split_by)
        if not tree.leaves(target):
            return Batch(Views(support), Views(query))
        return Batch(*(Views(x, self.represent_tasks(target, x).detach()) for x in (support, query)))

    def together(self, views: Tensor, target: Tree) -> Views:
        """Images [N, m, C, H, W] as one task, with the target network's outputs."""
        return Views(views, self.represent(target, views).detach() if tree.leaves(target) else ())


def mean_over_tasks(losses: Tensor) -> Tensor:
    """Means over tasks and not sums, so that K does not change the step size [O]."""
    return losses.mean()


def per_task(fn: Callable[..., Tensor], *stacked: Tree) -> Tensor:
    """``fn`` of every task, [K]: a loop, which on a CPU is as fast as vmap and works for every objective."""
    num_tasks: int = tree.leaves(stacked)[0].shape[0]
    return torch.stack([fn(*(tree.index(s, k) for s in stacked)) for k in range(num_tasks)])
