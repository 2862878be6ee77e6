"""What is measured while a method trains: conflict and transfer between tasks, the calibration, and collapse."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metacal import derivatives, tree
from metacal._typing import Tree
from metacal.batches import repeat
from metacal.inner import run
from metacal.optim import sgd
from metacal.solvers import descent
from metacal.tc2.calibrate import Identity
from metacal.tc2.conflict import cosines, measure_conflict, monitors, transfer_matrix
from metacal.tc2.method import MethodState, present
from metacal.tc2.problem import Batch, Problem, Views


class Measurement(NamedTuple):
    """What :func:`measure` finds on one batch.

    Attributes:
        cosines: [K, K] between the tasks' support gradients at theta.
        transfer: [K, K], T(i -> j) = l_j^q(theta) - l_j^q(theta'_i): positive where a step on task i helps task j.
        scalars: conflict rate and severity, the same for the same batch with its membership shuffled (the baseline of any kind of
            tasks; a random split's conflict is largely sampling noise), mean transfer to other tasks, and, where there is a
            calibrator, the calibration's errors and sparsity, and the conflict of the same tasks at the same theta without it.
    """

    cosines: Tensor
    transfer: Tensor
    scalars: dict[str, Tensor]


def measure(problem: Problem, state: MethodState, views: Tensor, *, lr: float = 0.05, steps: int = 1) -> Measurement:
    """Measures a batch [N, m, C, H, W] without changing the state or torch's generators' course.

    Args:
        lr, steps: the adaptation theta'_i of the transfer matrix.

    Cost: 2 K gradients (3 K with a calibrator), K runs of ``steps``, K (K + 1) query losses.
    """
    problem = present(problem, state)
    with torch.random.fork_rng(devices=[views.device] if views.is_cuda else []):
        batch = problem.batch(views, state.target, state.theta)
        again = replace(problem, deal="random").batch(views, state.target)
    V = views.new_zeros(())
    scalars: dict[str, Tensor] = {}
    if not isinstance(problem.calibrator, Identity):
        Z = problem.pooled(*(problem.represent_tasks(state.theta, side.x) for side in batch))
        V = problem.calibrator.factors(state.phi, Z).detach()
        scalars |= monitors(Z, V, problem.calibrator.weights(state.phi, Z, V))
    K = problem.num_tasks

    def loss(theta: Tree, _: Tree, task: Views) -> Tensor:
        return problem.loss(theta, state.phi, V, task)

    def task(side: Views, k: int) -> Views:
        return tree.index(side, k)

    def conflict(of: Problem, split: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        def gradient(k: int) -> Tree:
            return derivatives.value_and_grad(lambda theta: (of.loss(theta, state.phi, V, task(split.support, k)), None), state.theta)[2][0]

        found = cosines([gradient(k) for k in range(K)])
        return found, measure_conflict(found)

    solver = descent(loss, sgd(lr))
    start = solver.init(state.theta, {})
    adapted = [run(solver, start, {}, repeat(task(batch.support, k), steps)).params for k in range(K)]
    before = torch.stack([loss(state.theta, {}, task(batch.query, j)) for j in range(K)]).detach()
    after = torch.stack([torch.stack([loss(theta, {}, task(batch.query, j)) for j in range(K)]) for theta in adapted]).detach()
    transfer = transfer_matrix(before, after)
    here, (rate, severity) = conflict(problem, batch)
    _, (baseline_rate, baseline_severity) = conflict(problem, again)
    scalars |= {
        "conflict_rate": rate,
        "conflict_severity": severity,
        "resplit_conflict_rate": baseline_rate,
        "resplit_conflict_severity": baseline_severity,
    }
    if not isinstance(problem.calibrator, Identity):
        _, (plain_rate, plain_severity) = conflict(replace(problem, calibrator=Identity()), batch)
        scalars |= {"uncalibrated_conflict_rate": plain_rate, "uncalibrated_conflict_severity": plain_severity}
    if K > 1:
        scalars["transfer_to_others"] = (transfer.sum() - transfer.trace()) / (K * (K - 1))
    return Measurement(here, transfer, scalars)
