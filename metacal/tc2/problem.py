"""The SSL problem that every method here solves: tasks, representations, and the calibrated loss of one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from metacal import _checks, tasks, tree
from metacal._typing import Tree
from metacal.objectives import Outputs, SSLObjective
from metacal.tc2.calibrate import Calibrator, Identity
from metacal.tc2.networks import Network

Where = Literal["projector", "encoder"]
SplitBy = Literal["views", "samples"]
Deal = Literal["random", "given", "clusters"]
Statistics = Literal["task", "batch"]


class Views(NamedTuple):
    """Images of one task, or of several along a leading axis.

    Attributes:
        x: [..., n, m, C, H, W].
        target: what the EMA target network makes of them, [..., n, m, d]; where the network has a decoder the images themselves, with
            their masks; ``()`` where the objective has no target.
        task: the task's number, an integer [...]; ``()`` where all tasks have one objective.

    Where the heads' statistics are the whole batch's, the other tasks' samples follow the task's own: N in place of n.
    """

    x: Tensor
    target: Tensor | tuple[()] = ()
    task: Tensor | tuple[()] = ()


class Batch(NamedTuple):
    """A batch split into K tasks: support [K, n, m_s, ...], query [K, n, m_q, ...]."""

    support: Views
    query: Views


@final
@dataclass(frozen=True)
class PerTask(SSLObjective):
    """Another objective for every task, on one network with the heads that any of them wants [O].

    The mean over tasks adds losses as they are: bring them to one scale by their own weights. Without a task (the whole batch as
    one) it is the mean of all. All losses are computed for every task and one is selected, so that tasks run under vmap and no step
    waits for the host: K^2 small losses, and none of the network's work twice.

    Args:
        objectives: of task 0, 1, ...; objectives with a carry (a queue, a centre) are refused, and so are heads of prototypes that
            differ in their number and masks that differ in their share.

    >>> from metacal import objectives
    >>> mixed = PerTask((objectives.SimCLR(), objectives.BYOL()))
    >>> mixed.heads, mixed.ema_target
    (('projector', 'predictor'), True)
    """

    objectives: tuple[SSLObjective, ...]

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("`objectives` should hold one objective for every task, got none.")
        carrying = [type(objective).__name__ for objective in self.objectives if tree.leaves(objective.init_carry(1))]
        if carrying:
            raise ValueError(f"`objectives` should have no carry (a queue or a centre), which tasks would share; {carrying} have one.")
        set_once = object.__setattr__  # the dataclass is frozen; these follow from its field
        for head, name in (("prototypes", "num_prototypes"), ("decoder", "visible")):
            settings = {getattr(objective, name) for objective in self.objectives if head in objective.heads}
            if len(settings) > 1:
                raise ValueError(f"`objectives` should agree on `{name}`, as they share that head; got {sorted(settings)}.")
            for setting in settings:
                set_once(self, name, setting)
        set_once(self, "heads", tuple(dict.fromkeys(head for objective in self.objectives for head in objective.heads)))
        set_once(self, "ema_target", any(objective.ema_target for objective in self.objectives))

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        """The loss of task ``carry``, an integer tensor; of all tasks together where it is ``()``."""
        losses = torch.stack([objective(outputs) for objective in self.objectives])
        return losses.mean() if isinstance(carry, tuple) else losses.index_select(0, carry.reshape(1)).squeeze(0)


@dataclass(frozen=True)
class Problem:
    """Which network, objective and calibrator, and how a batch becomes tasks.

    Args:
        objective: of all tasks, or :class:`PerTask`.
        where: what is calibrated, the projector's output z or the encoder's output h (then the projector reads h~) [O]. A masked
            autoencoder has no projector: both are its encoder's tokens, each a representation.
        num_tasks: K; 4 is reported best [S].
        split_by: how a task becomes support and query: half of its views, or half of its samples [O].
        momentum: tau of the EMA target network (BYOL, MoCo, DINO).
        deal: how samples become tasks: at "random" [S]; in the order "given", the first n to task 0 and so on; or by balanced
            "clusters" of the encoder's outputs at theta on each sample's first view, see :func:`metacal.tasks.clusters` [O].
        statistics: what BatchNorm in a head sees: the samples of the "task" at hand, or those of all tasks, the "batch" [O]. The latter
            takes every sample through the network with every task: K times the work of a stage.
        carry, target: the objective's state (a queue, a centre) and the EMA target network's params in the iteration at hand;
            methods replace both in every one.

    Errors:
        ValueError: a field is none of its values; :class:`PerTask` holds another number of objectives than there are tasks.
    """

    network: Network
    objective: SSLObjective
    calibrator: Calibrator = Identity()
    where: Where = "projector"
    num_tasks: int = 4
    split_by: SplitBy = "views"
    momentum: float = 0.99
    deal: Deal = "random"
    statistics: Statistics = "task"
    carry: Tree = ()
    target: Tree = ()

    def __post_init__(self) -> None:
        if not isinstance(self.objective, SSLObjective):
            raise TypeError(f"`objective` should be one of metacal.objectives, or an SSLObjective of your own, got {self.objective!r}.")
        if not isinstance(self.calibrator, Calibrator):
            raise TypeError(f"`calibrator` should be a tc2.Calibrator such as tc2.Networks(n_f=32), got {self.calibrator!r}.")
        _checks.one_of("where", self.where, Where)
        _checks.one_of("split_by", self.split_by, SplitBy)
        _checks.one_of("deal", self.deal, Deal)
        _checks.one_of("statistics", self.statistics, Statistics)
        _checks.whole("num_tasks", self.num_tasks)
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"`momentum` should lie between 0 (the target is the network itself) and 1 (it stays), got {self.momentum}.")
        if isinstance(self.objective, PerTask) and len(self.objective.objectives) != self.num_tasks:
            raise ValueError(
                f"`objective` should hold one objective for each of the K = {self.num_tasks} tasks, got "
                f"{len(self.objective.objectives)}. Set `num_tasks` to their number."
            )

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
        if self.statistics == "batch":  # every task holds the same samples
            return self._with_the_others(self.represent(theta, x[0]).unflatten(0, (self.num_tasks, -1)))
        return torch.stack([self.represent(theta, task) for task in x])

    def pooled(self, *sides: Tensor) -> Tensor:
        """The representations [K, n, m, d] of all tasks, every sample once, as rows: Z [N m, d]."""
        once = slice(1) if self.statistics == "batch" else slice(None)  # there every task holds all samples
        return torch.cat([side[once].flatten(0, -2) for side in sides])

    def loss(self, theta: Tree, phi: Tree, V: Tensor, views: Views) -> Tensor:
        """The calibrated SSL loss l_k of one task."""
        return self.loss_of(theta, phi, V, views._replace(x=self.represent(theta, views.x)))

    def loss_of(self, theta: Tree, phi: Tree, V: Tensor, represented: Views) -> Tensor:
        """The same from representations [n, m, d] in place of the images: all that the calibrator's own stage needs."""
        read = self.carry if isinstance(represented.task, tuple) else represented.task  # PerTask reads the number, and has no state
        return self.objective(self._outputs(theta, phi, V, represented), read)

    def next_carry(self, theta: Tree, phi: Tree, V: Tensor, seen: Views) -> Tree:
        """The objective's state after an iteration that saw these tasks [K, n, m, C, H, W]; it moves once per iteration.

        With a target network only its outputs are looked at, which are there already; otherwise it costs a forward pass.
        """
        if not tree.leaves(self.carry):
            return self.carry
        outputs = []
        for k in range(len(seen.x)):
            task: Views = tree.index(seen, k)
            r = self.represent(theta, task.x) if isinstance(task.target, tuple) or not self.objective.ema_target else task.target
            outputs.append(tree.detach(self._outputs(theta, phi, V, task._replace(x=r))))
        return self.objective.update(tree.map(lambda *fields: torch.cat(fields), *outputs), self.carry)

    def _outputs(self, theta: Tree, phi: Tree, V: Tensor, represented: Views) -> Outputs:
        r, target, _ = represented
        z = self._finish(theta, self.calibrator.calibrate(phi, r, V))
        p = None if self.network.predict is None else self.network.predict(theta, z)
        if isinstance(target, tuple):
            outputs = Outputs(z, p)
        elif self.network.decode is not None:
            outputs = Outputs(z, *self.network.decode(theta, z, target))
        else:
            outputs = Outputs(z, p, self._finish(self._target(), self.calibrator.calibrate(phi, target, V)).detach())
        if self.statistics == "batch":  # the task's own samples are the first
            outputs = tree.map(lambda out: out[: len(out) // self.num_tasks], outputs)
        return outputs

    def _target(self) -> Tree:
        if self.where == "encoder" and not tree.leaves(self.target):
            raise ValueError(
                "`target` should hold the EMA target network's params where what is calibrated is the encoder's output, as its own "
                "projector reads that; got none. Use dataclasses.replace(problem, target=state.target)."
            )
        return self.target

    def _finish(self, theta: Tree, calibrated: Tensor) -> Tensor:
        return calibrated if self.where == "projector" else self.network.project(theta, calibrated)

    def init_target(self, theta: Tree) -> Tree:
        """The EMA target network at the start, a copy of encoder and projector; ``()`` where the objective has none."""
        return tree.clone({part: theta[part] for part in ("encoder", "projector")}) if self.objective.ema_target else ()

    def split(self, views: Tensor, theta: Tree) -> Tensor:
        """Deals augmented images [N, m, C, H, W] into tasks [K, n, m, C, H, W]; only "clusters" reads theta."""
        _check_views(views)
        if self.deal == "random":
            return tasks.split(views, self.num_tasks)
        if self.deal == "given":
            return tasks.blocks(views, self.num_tasks)
        if not tree.leaves(theta):
            raise ValueError("`theta` should be the network's params where `deal` is 'clusters', got none. Pass the state's theta.")
        return tasks.split(views, self.num_tasks, permutation=tasks.clusters(self.network.encode(theta, views[:, 0]), self.num_tasks))

    def batch(self, views: Tensor, target: Tree, theta: Tree = ()) -> Batch:
        """Splits augmented images [N, m, C, H, W] into tasks, support and query."""
        support, query = tasks.support_query(self.split(views, theta), self.split_by)
        return Batch(self.whole(support, target), self.whole(query, target))

    def whole(self, x: Tensor, target: Tree) -> Views:
        """Tasks [K, n, m, C, H, W] with all that their losses read."""
        x = self._masked(x)
        if self.statistics == "batch":
            x = self._with_the_others(x)
        views = self._with_target(x, target, self.represent_tasks)
        return views._replace(task=torch.arange(self.num_tasks, device=x.device)) if isinstance(self.objective, PerTask) else views

    def _with_the_others(self, samples: Tensor) -> Tensor:
        """[K, n, ...] -> [K, K n, ...]: behind a task's samples those of the others, in a circle."""
        return torch.stack([samples.roll(-k, 0).flatten(0, 1) for k in range(self.num_tasks)])

    def together(self, views: Tensor, target: Tree) -> Views:
        """Images [N, m, C, H, W] as one task, with the target network's outputs."""
        _check_views(views)
        return self._with_target(self._masked(views), target, self.represent)

    def _masked(self, x: Tensor) -> Tensor:
        """Masks are drawn here, where a batch is made, so that all stages, adjoints and replays of an iteration see the same ones."""
        return x if self.network.mask is None else self.network.mask(x)

    def _with_target(self, x: Tensor, target: Tree, represent: Callable[[Tree, Tensor], Tensor]) -> Views:
        if self.network.decode is not None:
            return Views(x, x)
        return Views(x, represent(target, x).detach() if tree.leaves(target) else ())


def _check_views(views: Tensor) -> None:
    if views.ndim != 5 or not views.is_floating_point():
        raise ValueError(
            f"`views` should be floating point [N, m, C, H, W], m views of each of N images, got {tuple(views.shape)} of {views.dtype}. "
            "Make them with metacal.data.views, and floats of pixels with metacal.data.to_float."
        )


def per_task(fn: Callable[..., Tensor], *stacked: Tree) -> Tensor:
    """``fn`` of every task, [K]: a loop, which on a CPU is as fast as vmap and works for every objective."""
    num_tasks: int = tree.leaves(stacked)[0].shape[0]
    return torch.stack([fn(*(tree.index(s, k) for s in stacked)) for k in range(num_tasks)])
