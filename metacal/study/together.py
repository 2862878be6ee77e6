"""The seeds of one place of a study trained side by side in one process: ``torch.func.vmap`` over the library's own iterations.

A run that is trained with others draws what it would have drawn by itself: its networks, its batches, its augmentations and who
belongs to which task, all outside of vmap and from a generator of its own. What is mapped is the rest of the iteration.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metacal import _random, tree
from metacal._device import wait
from metacal._typing import Tree
from metacal.objectives import SIGReg
from metacal.tc2 import Method, MethodState
from metacal.train import checkpoint
from metacal.train._files import replacing
from metacal.train.budget import BUDGET, budget
from metacal.train.build import training_method
from metacal.train.config import Config
from metacal.train.environment import resolve_device, seed_everything
from metacal.train.experiment import Prepared, prepare, pretrain, write_settings
from metacal.train.logs import Logs, read_metrics
from metacal.train.loop import CHECKPOINTS, fit

_UNDIVIDED = ("base", "matched")  # readings that take the batch as it is
_NOT_MAPPED = re.compile("vmap|functorch|batching rule|torch.func", re.IGNORECASE)  # in the words of torch


def pretrain_together(config: Config, seeds: Sequence[int], folder: str | Path, *, progress: bool = True) -> dict[int, dict[str, Any]]:
    """Does for every seed what :func:`metacal.train.experiment.pretrain` does, in one process; returns the results by seed.

    Leaves ``folder/seedS`` as a run of its own would, with the same draws, bit for bit. A step is the same up to rounding, which training
    in float32 amplifies: after some tens of steps losses were seen to differ by 0.1 and probes by three points, another realisation
    of one seed. budget.json and
    results.json say which seeds were trained together; ``seconds_per_step`` is one seed's share.

    Interrupted, it goes on where it was: from the checkpoints of ``folder/together-S-...``, which is gone once every run has its own,
    or from a run's own. Seeds that are added meanwhile make another group. A NaN in one seed stops all that are trained with it.

    An adjoint ``Unrolled(mode="graph")`` gives way to mode "mixed", of the same numbers and another cost. Where a linear solver fails,
    the stats say so, but no warning does: under vmap there is no number to look at.

    Cost: an iteration is that of S runs, and so is the memory. The convolutions of S encoders become grouped ones: measure whether it
    pays, ``metacal together`` against ``metacal pretrain``.

    Errors: those of ``pretrain``; ValueError or RuntimeError where vmap cannot take an iteration, see :func:`refuse`.
    """
    folder = Path(folder)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` should be different numbers, at least one; got {list(seeds)}.")
    refuse(config)
    for seed in seeds:
        write_settings(_run(folder, seed), replace(config, seed=seed), resume=True)
    for group in _groups(folder, seeds):
        _train(config, group, folder, progress)
    # All are trained, or were begun by themselves: the rest is a run that goes on from its newest checkpoint.
    return {seed: pretrain(replace(config, seed=seed), _run(folder, seed), resume=True, progress=progress) for seed in seeds}


def refuse(config: Config) -> None:
    """Raises ValueError, with the reason, where it is known beforehand that the seeds of a configuration cannot be trained together."""
    reason = None
    if config.tc2.reading == "pcgrad":
        reason = "the reading pcgrad draws the order of its projections within an iteration"
    elif config.tc2.reading == "upgrad":
        reason = "the reading upgrad solves its quadratic programs on the host"
    elif config.tc2.reading == "matched" and config.tc2.budget == "seconds":
        reason = "the budget `seconds` measures another number of steps for every run (`passes` does not)"
    elif isinstance(config.objective, SIGReg):
        reason = "the objective SIGReg draws directions within an iteration"
    elif "decoder" in config.objective.heads:
        reason = f"the objective {type(config.objective).__name__} draws masks within an iteration"
    if reason:
        raise ValueError(f"`together` cannot be had here: {reason}. Set it to false: every seed is then a process of its own.")


def side_by_side(method: Method) -> Callable[[MethodState, Tensor], tuple[MethodState, dict[str, Tensor]]]:
    """``method.step`` of S runs at once: states whose leaves but ``step`` are [S, ...], views [S, N, m, C, H, W], metrics [S].

    Errors: RuntimeError, naming the remedy, for what torch.func.vmap refuses: random draws, numbers read by the host.

    >>> from metacal import nets, objectives, optim, tc2
    >>> net = tc2.network(nets.ConvEncoder(width=8, dim=8), objectives.SimCLR(), dim=8, d=8)
    >>> method = tc2.base(tc2.Problem(net, objectives.SimCLR()), optim.adam(1e-3))
    >>> states, metrics = side_by_side(method)(stacked([method.init(), method.init()]), torch.rand(2, 8, 2, 1, 8, 8))
    >>> states.step, metrics["loss"].shape
    (tensor(1), torch.Size([2]))
    """

    def step(states: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        leaves, structure = tree.flatten(_mapped(states))

        def one(leaves: list[Tensor], views: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
            state, metrics = method.step(MethodState(**tree.unflatten(structure, leaves), step=states.step), views)
            return tree.leaves(_mapped(state)), metrics

        try:
            moved, metrics = torch.func.vmap(one)(leaves, views)
        except RuntimeError as error:
            if not _NOT_MAPPED.search(str(error)):
                raise
            raise RuntimeError(
                f"These seeds cannot be trained together, because torch.func.vmap refuses a part of an iteration: {error}\n"
                "Set `together` to false: every seed is then a process of its own."
            ) from error
        return MethodState(**tree.unflatten(structure, moved), step=states.step + 1), metrics

    return step


def stacked(states: Sequence[MethodState]) -> MethodState:
    """The states of S runs after as many iterations as one: every leaf but ``step`` gets a leading axis."""
    return MethodState(**tree.stack([_mapped(state) for state in states]), step=states[0].step)


def _row(states: MethodState, i: int) -> MethodState:
    return MethodState(**tree.index(_mapped(states), i), step=states.step)


def _mapped(state: MethodState) -> dict[str, Tree]:
    """All but the count of iterations, which is one for all seeds and which the host reads (is this the warm-up?)."""
    return {name: value for name, value in state._asdict().items() if name != "step"}


def _run(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}"


def _groups(folder: Path, seeds: Sequence[int]) -> list[list[int]]:
    """The seeds to train together: those that were interrupted in it, and those that have not begun."""
    waiting = [seed for seed in seeds if not any((_run(folder, seed) / CHECKPOINTS).glob("step_*.pt"))]
    groups: list[list[int]] = []
    for joint in sorted(folder.glob("together-*")):
        group = [int(seed) for seed in joint.name.split("-")[1:]]
        if set(group) <= set(seeds) - {seed for other in groups for seed in other}:
            groups.append(group)
    waiting = [seed for seed in waiting if all(seed not in group for group in groups)]
    return [*groups, waiting] if waiting else groups


def _train(config: Config, seeds: Sequence[int], folder: Path, progress: bool) -> None:
    """Trains the seeds together, and leaves each a folder like that of a run which was stopped after its last iteration."""
    joint, device = folder / "-".join(["together", *map(str, seeds)]), resolve_device(config.device)
    runs: list[Prepared] = []
    drawn: list[_random.Noise] = []  # a list and not one stacked tree: torch's set_rng_state crashes on a row of a matrix
    for seed in seeds:
        runs.append(prepare(replace(config, seed=seed)))
        drawn.append(_random.noise(runs[-1].state))
    method_step = side_by_side(training_method(_mappable(config), replace(runs[0].problem, deal="given")))

    def draw(run: Prepared, state: MethodState, t: int) -> Tensor:
        """The views [N, m, C, H, W] of one run's iteration, task by task: all that is random in it."""
        views = run.sample(t)
        if config.tc2.reading in _UNDIVIDED:
            return views
        dealt: Tensor = run.problem.split(views, state.theta).flatten(0, 1)
        return dealt

    def step(state: Tree, t: int) -> tuple[Tree, dict[str, float | Tensor]]:
        states, views, noise = state["states"], [], []
        for i, run in enumerate(runs):
            _random.restore(state["noise"][i])
            views.append(draw(run, _row(states, i), t))
            noise.append(_random.noise(states.theta))
        started = time.perf_counter()
        states, metrics = method_step(states, torch.stack(views))
        wait(device)
        logged: dict[str, float | Tensor] = {"seconds": time.perf_counter() - started}
        for i, (seed, run) in enumerate(zip(seeds, runs, strict=True)):
            own = {**tree.index(metrics, i), **run.monitors(_row(states, i), t)}
            logged |= {_prefix(seed) + name: value for name, value in own.items()}
        return {"states": states, "noise": noise}, logged

    write_settings(joint, replace(config, seed=seeds[0]), resume=True)
    planned, t = budget(config), config.train
    last = fit(
        step,
        {"states": stacked([run.state for run in runs]), "noise": drawn},
        planned["steps"],
        joint,
        checkpoint_every=t.checkpoint_every,
        log_every=t.log_every,
        resume=True,
        progress=progress,
        tensorboard=False,
    )
    rows = read_metrics(joint)
    shared = {"seconds_per_step": median(row["seconds"] for row in rows) / len(seeds), "together": list(seeds)}
    for i, seed in enumerate(seeds):
        own = _run(folder, seed)
        with replacing(own / BUDGET) as file:
            file.write(json.dumps({**planned, **shared}).encode())
        with Logs(own, tensorboard=True) as logs:
            for row in rows:
                logs.write(row["step"], {n.removeprefix(_prefix(seed)): value for n, value in row.items() if n.startswith(_prefix(seed))})
            logs.flush()
        seed_everything(seed)  # numpy's generator and Python's, from which nothing was drawn
        _random.restore(last["noise"][i])
        checkpoint.save(own / CHECKPOINTS, planned["steps"], {"state": tree.state_dict(_row(last["states"], i))})
    # Renamed first, in one stroke: half of the folder would be taken for an interrupted group.
    shutil.rmtree(joint.rename(joint.with_name(f".{joint.name}")))


def _prefix(seed: int) -> str:
    return f"seed{seed}/"


def _mappable(config: Config) -> Config:
    """The same stages by adjoints that vmap can map."""
    c = config.tc2
    return replace(config, tc2=replace(c, calibrator_stage=c.calibrator_stage.mappable(), encoder_stage=c.encoder_stage.mappable()))
