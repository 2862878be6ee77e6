"""TC²'s two-stage bi-level optimisation, in both readings: compositions of the library's pieces, nothing else.

Reading ``paper`` [S]:

    stage 1, theta fixed:  phi'  = phi - a1 grad_phi [ mean_k l_k^s(theta, phi) + L_tc2(phi) ]          J1 steps
                           phi   moves along grad_phi [ mean_k l_k^q(theta, phi') + L_tc2(phi') ]
    stage 2, phi fixed:    theta'_k = theta - a2 grad_theta l_k^s(theta, phi)   for every task          J2 steps
                           theta moves along grad_theta mean_k sum_j P[k, j] l_j^q(theta'_k, phi)

Reading ``lookahead`` [O], the hypergradient of the calibrator through the encoder:

    theta+ = theta - a grad_theta mean_k l_k^s(theta, phi)                                              J steps
    phi    moves along d/d phi [ mean_k l_k^q(theta+(phi), phi) + L_tc2(phi) ]
    theta  moves along grad_theta mean_k l_k^s(theta, phi)

Means over tasks and not sums, so that K does not change the step size [O].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, derivatives, optim, tree
from metacal._typing import Objective, Tree
from metacal.adjoints import Adjoint, Unrolled
from metacal.batches import repeat
from metacal.bilevel import BilevelOptimizer, BilevelState, Tasks, meta_initialisation, nested
from metacal.inner import InnerSolver
from metacal.optim import GradientTransformation, sgd
from metacal.solvers import descent, proximal
from metacal.tc2.calibrate import Identity, Networks
from metacal.tc2.factors import check_num_factors
from metacal.tc2.losses import CalibrationLoss, stable
from metacal.tc2.method import Method, MethodState, ended, initial, present
from metacal.tc2.pairing import judged, pairing_matrix
from metacal.tc2.problem import Problem, Views, per_task


@dataclass(frozen=True)
class Stage:
    """The inner run of a stage: ``steps`` of SGD at ``lr``, differentiated by ``adjoint``.

    With one or two steps ``Unrolled(mode="graph")`` is the fastest exact adjoint.

    ``strength`` ties the inner solution to where it starts, + strength/2 |w - w_0|^2 (iMAML): what an implicit adjoint needs
    where the initial params are the variable (both stages of reading ``paper``). Take it larger than the loss's negative
    curvature: on a concave direction conjugate gradients stand still, and the residual in ``stats`` says so.
    """

    lr: float
    steps: int = 1
    adjoint: Adjoint = Unrolled(mode="graph")
    strength: float | None = None

    def __post_init__(self) -> None:
        _checks.whole("steps", self.steps, 0)
        _checks.number("lr", self.lr, "it is the rate of the stage's SGD")
        if self.strength is not None:
            _checks.number("strength", self.strength, "it ties the solution to where it starts; None leaves it free")

    def meta(self, outer: Objective, inner: Objective, optimizer: GradientTransformation, tasks: Tasks) -> BilevelOptimizer:
        """The stage as the meta-learning of an initialisation."""
        return meta_initialisation(outer, self.solver(inner), self.adjoint, optimizer, tasks=tasks)

    def mappable(self) -> Stage:
        """The same by an adjoint that vmap can map: mode "graph" gives way to "mixed", of the same numbers at another cost."""
        graph = isinstance(self.adjoint, Unrolled) and self.adjoint.mode == "graph"
        return replace(self, adjoint=replace(self.adjoint, mode="mixed")) if graph else self  # type: ignore[type-var]

    def solver(self, inner: Objective) -> InnerSolver:
        """The inner solver of an objective."""
        if self.strength is None:
            return descent(inner, sgd(self.lr))
        return proximal(inner, sgd(self.lr), self.strength, anchor=lambda start: start)


class _Calibration(NamedTuple):
    """What stage 1 reads: support and query with representations [K, n, m, d] in place of images; Z is the representations of all."""

    support: Views
    query: Views
    Z: Tensor


def paper(
    problem: Problem,
    optimizer: GradientTransformation,
    calibrator_optimizer: GradientTransformation,
    *,
    calibration: CalibrationLoss | None = None,
    calibrator_stage: Stage = Stage(lr=1e-2),
    encoder_stage: Stage = Stage(lr=0.05),
    pairing: str | Tensor = "own",
    warmup: int = 0,
    tasks: Literal["loop", "vmap"] = "loop",
) -> Method:
    """TC² as the summary describes it [S]; with the ``Identity`` calibrator it is tasks without calibration (control 3).

    V is computed once per iteration and detached in stage 2. Stage 1 works on representations: it needs no encoder backward.

    Args:
        optimizer, calibrator_optimizer: the outer steps on theta and phi.
        calibration: L_tc2, the stable form by default.
        calibrator_stage, encoder_stage: the inner runs (a1, J1) and (a2, J2).
        pairing: whose query losses judge theta'_k: a name or a row-stochastic [K, K] matrix.
        warmup: iterations at the start without calibration [O].
        tasks: run the tasks of both stages in a loop or under vmap (``Stage.mappable``), which dispatches fewer and larger operations;
            measure which is faster.

    Cost, in N images (one view of the batch) that pass forward through the encoder, with m views and a graph or first-order adjoint:
    m for V (none without a calibrator), J2 m / 2 for the inner runs, and m / 2 times the number of tasks that judge each; replay
    passes the support again. Stage 1 takes J1 + 1 gradients of the calibrator, and what its adjoint adds, on representations.

    Errors:
        ValueError: ``tasks`` or ``pairing`` is none of its values; n_f > d; at the first step, an adjoint that does not estimate the
            derivative by the initial params.
    """
    if tasks not in ("loop", "vmap"):
        raise ValueError(f"`tasks` should be 'loop' or 'vmap', got {tasks!r}: an iteration is not the place to measure which is faster.")
    _check_stages(warmup, calibrator_stage=calibrator_stage, encoder_stage=encoder_stage)
    encoder_stage = encoder_stage.mappable() if tasks == "vmap" else encoder_stage
    calibration = stable() if calibration is None else calibration
    _check_factors(problem, calibration)
    judges, weights = judged(pairing_matrix(pairing, problem.num_tasks))
    without = replace(problem, calibrator=Identity())
    over_tasks = per_task if tasks == "loop" else lambda fn, stacked: torch.func.vmap(fn)(stacked)

    def init() -> MethodState:
        return initial(problem, optimizer, calibrator_optimizer)

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        now = present(without if int(state.step) < warmup else problem, state)
        support, query = problem.batch(views, state.target, state.theta)
        state, V, metrics = _calibrated(now, state, support, query, calibrate)

        def inner(theta: Tree, _: Tree, task: Views) -> Tensor:
            return now.loss(theta, state.phi, V, task)

        def outer(theta: Tree, _: Tree, judgement: tuple[Views, Tensor]) -> Tensor:
            judging, weight = judgement  # the J tasks that judge this one
            return (weight * per_task(lambda task: now.loss(theta, state.phi, V, task), judging)).sum()

        stage = encoder_stage.meta(outer, inner, optimizer, tasks)
        judging = tree.map(lambda x: x[judges.to(x.device)], query)
        after, hg = stage.step(
            BilevelState(stage.init(state.theta, {}).inner, {}, state.theta_opt, (), state.step),
            repeat(support, encoder_stage.steps),
            (judging, weights.to(views)),
        )
        metrics |= {"loss": hg.value, "first_bad_step": hg.stats.get("first_bad_step", torch.tensor(-1))}
        carry = now.next_carry(state.theta, state.phi, V, support)
        state = state._replace(theta=after.inner.params, theta_opt=after.opt_state, carry=carry)
        return ended(problem, state), metrics

    def calibrate(state: MethodState, represented: _Calibration) -> tuple[MethodState, dict[str, Tensor]]:
        now = present(problem, state)

        def objective(phi: Tree, Z: Tensor, views: Views) -> Tensor:
            V = problem.calibrator.factors(phi, Z)
            ssl = over_tasks(lambda task: now.loss_of(state.theta, phi, V, task), views).mean()
            return ssl + calibration(Z, V, problem.calibrator.weights(phi, Z, V))[0]

        def inner(phi: Tree, _: Tree, batch: _Calibration) -> Tensor:
            return objective(phi, batch.Z, batch.support)

        def outer(phi: Tree, _: Tree, batch: _Calibration) -> Tensor:
            return objective(phi, batch.Z, batch.query)

        stage = calibrator_stage.meta(outer, inner, calibrator_optimizer, "one")
        after, hg = stage.step(
            BilevelState(stage.init(state.phi, {}).inner, {}, state.phi_opt, (), state.step),
            repeat(represented, calibrator_stage.steps),
            represented,
        )
        return state._replace(phi=after.inner.params, phi_opt=after.opt_state), {"calibration_loss": hg.value}

    return Method(init, step)


def lookahead(
    problem: Problem,
    optimizer: GradientTransformation,
    calibrator_optimizer: GradientTransformation,
    *,
    calibration: CalibrationLoss | None = None,
    encoder_stage: Stage = Stage(lr=0.05),
    warmup: int = 0,
) -> Method:
    """TC² with the calibrator's true hypergradient through the encoder's steps [O]; any adjoint.

    Args:
        optimizer, calibrator_optimizer: the outer steps on theta and phi.
        calibration: L_tc2, the stable form by default.
        encoder_stage: the inner run (a, J), on the mean over tasks.
        warmup: iterations at the start without calibration [O].

    Cost, counted as for :func:`paper`, with a graph adjoint: m for V, J m / 2 for the inner run, m / 2 for the query, and m / 2 for
    theta's own step; replay passes the support again.

    Errors:
        ValueError: ``encoder_stage`` has a ``strength``; n_f > d.
    """
    _check_stages(warmup, encoder_stage=encoder_stage)
    calibration = stable() if calibration is None else calibration
    _check_factors(problem, calibration)
    if encoder_stage.strength is not None:
        raise ValueError("`strength` belongs to reading `paper`: here the hparams are the calibrator, not the initial params. Pass None.")
    without = replace(problem, calibrator=Identity())

    def init() -> MethodState:
        return initial(problem, optimizer, calibrator_optimizer)

    def step(state: MethodState, views: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        now = present(without if int(state.step) < warmup else problem, state)
        support, query = problem.batch(views, state.target, state.theta)
        state, V, metrics = _calibrated(now, state, support, query, lambda state, r: calibrate(state, support, query, r.Z))
        loss, _, (gradient,) = derivatives.value_and_grad(
            lambda theta: (per_task(lambda task: now.loss(theta, state.phi, V, task), support).mean(), None), state.theta
        )
        carry = now.next_carry(state.theta, state.phi, V, support)
        theta, theta_opt = optim.moved(optimizer, gradient, state.theta_opt, state.theta)
        return ended(problem, state._replace(theta=theta, theta_opt=theta_opt, carry=carry)), {"loss": loss, **metrics}

    def calibrate(state: MethodState, support: Views, query: Views, Z: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
        now = present(problem, state)

        def ssl(theta: Tree, phi: Tree, views: Views) -> Tensor:
            V = problem.calibrator.factors(phi, Z)
            return per_task(lambda task: now.loss(theta, phi, V, task), views).mean()

        def outer(theta: Tree, phi: Tree, views: Views) -> Tensor:
            V = problem.calibrator.factors(phi, Z)
            return ssl(theta, phi, views) + calibration(Z, V, problem.calibrator.weights(phi, Z, V))[0]

        bilevel = nested(outer, encoder_stage.solver(ssl), encoder_stage.adjoint, calibrator_optimizer, warm_start=False)
        after, hg = bilevel.step(
            BilevelState(bilevel.init(state.theta, state.phi).inner, state.phi, state.phi_opt, (), state.step),
            repeat(support, encoder_stage.steps),
            query,
        )
        return state._replace(phi=after.hparams, phi_opt=after.opt_state), {"calibration_loss": hg.value, **_logged(hg.stats)}

    return Method(init, step)


def _check_stages(warmup: int, **stages: Stage) -> None:
    _checks.whole("warmup", warmup, 0)
    for name, stage in stages.items():
        if not isinstance(stage, Stage):
            raise TypeError(f"`{name}` should be a tc2.Stage, got {stage!r}. For a rate alone: tc2.Stage(lr=0.05).")


def _check_factors(problem: Problem, calibration: CalibrationLoss) -> None:
    calibrator = problem.calibrator
    if isinstance(calibrator, Networks):
        in_loss = "sparsity" in calibration.terms and bool(calibration.weights.get("sparsity", 1.0) != 0)
        sparse = calibrator.sparsity is not None or in_loss
        check_num_factors(problem.d if calibrator.n_f is None else calibrator.n_f, problem.d, sparse=sparse)


def _calibrated(
    problem: Problem,
    state: MethodState,
    support: Views,
    query: Views,
    calibrate: Callable[[MethodState, _Calibration], tuple[MethodState, dict[str, Tensor]]],
) -> tuple[MethodState, Tensor, dict[str, Tensor]]:
    """Moves the calibrator, where it has something to learn, and computes the iteration's factors V."""
    if isinstance(problem.calibrator, Identity):
        return state, support.x.new_zeros(()), {}  # it reads no factors
    represented = _represented(problem, state.theta, support, query)
    state, metrics = calibrate(state, represented) if tree.leaves(state.phi) else (state, {})
    return state, problem.calibrator.factors(state.phi, represented.Z).detach(), metrics


def _logged(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stats that are metrics. A metric that is not finite stops a run, and the curvature is NaN where a solver met none."""
    return {name: value for name, value in stats.items() if name in ("first_bad_step", "residual_norm", "num_products")}


def _represented(problem: Problem, theta: Tree, support: Views, query: Views) -> _Calibration:
    r_s, r_q = problem.represent_tasks(theta, support.x), problem.represent_tasks(theta, query.x)
    return _Calibration(support._replace(x=r_s), query._replace(x=r_q), problem.pooled(r_s, r_q))
