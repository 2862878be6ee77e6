"""TC²'s stages and controls: one iteration of each against the same iteration written out in plain autograd."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metacal import _random, linear, nets, objectives, optim, tasks, tc2, tree
from metacal.adjoints import FirstOrder, Implicit, Unrolled
from metacal.objectives import Outputs, SSLObjective
from metacal.tc2 import Method, MethodState, Networks, PerTask, Problem, Stage, Views, upgrad
from metacal.train import config as kinds
from metacal.train.budget import budget, images_per_step
from metacal.train.build import build
from metacal.train.config import Config, NetworkConfig, TC2Config, TrainConfig
from problems import close, derivative, leaf_grads, ravel

OBJECTIVES = {
    "simclr": objectives.SimCLR(),
    "simsiam": objectives.SimSiam(),
    "byol": objectives.BYOL(),
    "barlow_twins": objectives.BarlowTwins(),
    "vicreg": objectives.VICReg(2.5, 2.5, 0.1),
}
SMOOTH = ("simclr", "vicreg")  # without a stop-gradient: central differences of the whole run are the truth
K, N = 2, 8
SIZE, DIM, D, N_F = 4, 6, 5, 4
A1, A2 = 0.1, 0.1  # large, so that what is of second order counts

LAMBDA_S, LAMBDA_1 = 0.3, 0.2
CALIBRATION = tc2.stable(LAMBDA_S, LAMBDA_1)
SGD = optim.sgd(1.0)  # the outer step is then minus the gradient


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net(objective: SSLObjective, norm: Any = "batch") -> tc2.Network:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIM), nn.Tanh())
    return tc2.network(encoder, objective, dim=DIM, d=D, hidden=7, norm=norm)


def problem(name: str = "simclr", **over: Any) -> Problem:
    objective = OBJECTIVES[name]
    over = {"objective": objective, "calibrator": Networks(n_f=N_F, hidden=7), "num_tasks": K, "momentum": 0.9, **over}
    return Problem(net(objective), **over)


def images(views: int = 4, samples: int = N) -> Tensor:
    shared = torch.randn(samples, 1, 1, SIZE, SIZE)
    return shared + 0.5 * torch.randn(samples, views, 1, SIZE, SIZE)


def trained(state: MethodState) -> MethodState:
    """A state that is nowhere special: the calibrator's last layers start at zero, the target as a copy."""
    shaken = tree.map(lambda leaf: leaf + 0.2 * torch.randn_like(leaf), (state.phi, state.target))
    return state._replace(phi=shaken[0], target=shaken[1])


def stages(**over: Any) -> dict[str, Stage]:
    return {"calibrator_stage": Stage(A1, **over), "encoder_stage": Stage(A2, **over)}


def take(method: Method, state: MethodState, x: Tensor) -> tuple[MethodState, dict[str, Tensor]]:
    """An iteration whose random split :func:`split` repeats."""
    torch.manual_seed(1)
    return method.step(state, x)


def split(x: Tensor, num_tasks: int = K) -> tuple[Tensor, Tensor]:
    """Support and query views [K, n, 2, C, H, W] of the split that :func:`take` draws."""
    torch.manual_seed(1)
    tasks = x[torch.randperm(len(x))].reshape(num_tasks, -1, *x.shape[1:])
    return tasks[:, :, :2], tasks[:, :, 2:]


# The same iteration by hand: nothing of metacal.tc2 but the network's parts and the calibrator's V.


def mlp(params: Any, x: Tensor) -> Tensor:
    hidden = F.gelu(x @ params["hidden"]["weight"].T + params["hidden"]["bias"])
    return hidden @ params["output"]["weight"].T + params["output"]["bias"]


def weights(phi: Any, z: Tensor, V: Tensor) -> Tensor:
    return z @ V + mlp(phi["weight"], z)


def ssl(p: Problem, theta: Any, phi: Any, V: Tensor | None, x: Tensor, target: Any = ()) -> Tensor:
    """The calibrated loss of one task's views [n, m, C, H, W]; V None is no calibration."""

    def calibrate(z: Tensor) -> Tensor:
        return z if V is None else weights(phi, z, V) @ V.T

    def project(theta: Any, x: Tensor) -> Tensor:
        h = p.network.encode(theta, x)
        return p.network.project(theta, calibrate(h)) if p.where == "encoder" else calibrate(p.network.project(theta, h))

    z = project(theta, x)
    prediction = p.network.predict(theta, z) if p.network.predict else None
    # In TC² the target's representations pass the same calibration, and at the encoder the same projector.
    fixed = project({**theta, **target}, x).detach() if target else None
    return p.objective(Outputs(z, prediction, fixed))


def calibration_loss(Z: Tensor, V: Tensor, w: Tensor) -> Tensor:
    Z_fixed = Z.detach()
    orthogonality = (V.T @ V - torch.eye(V.shape[1])).square().sum() / V.shape[1]
    reconstruction = (Z_fixed - Z_fixed @ V @ V.T).square().sum() / Z_fixed.square().sum()
    return orthogonality + reconstruction + LAMBDA_S * ((Z - w @ V.T).square().mean() + LAMBDA_1 * w.abs().mean())


def represented(p: Problem, theta: Any, *sides: Tensor) -> Tensor:
    """Z: every task of support and query for itself, as BatchNorm in the projector makes a difference."""
    tasks = [p.network.encode(theta, task) for side in sides for task in side]
    return torch.cat([(h if p.where == "encoder" else p.network.project(theta, h)).flatten(0, -2) for h in tasks])


def factors(p: Problem, phi: Any, Z: Tensor) -> Tensor:
    return p.calibrator.factors(phi, Z)


def descended(loss: Callable[[Any], Tensor], params: Any, lr: float, steps: int) -> Any:
    for _ in range(steps):
        params = tree.axpy(-lr, derivative(loss(params), params, create_graph=True), params)
    return params


def by_hand(
    p: Problem,
    state: MethodState,
    sides: tuple[Tensor, Tensor],
    steps: int,
    pairing: Tensor,
    *,
    Z: Tensor | None = None,
    loss: Callable[[Any, Any, Tensor, Tensor, int], Tensor] | None = None,
) -> tuple[Any, Any, float]:
    """Stage 1's and stage 2's outer gradients, and the outer loss; ``loss`` is that of task k from all tasks' views."""
    support, query = sides
    if loss is None:

        def loss(theta: Any, phi: Any, V: Tensor, side: Tensor, k: int) -> Tensor:
            return ssl(p, theta, phi, V, side[k], state.target)

    if Z is None:
        Z = represented(p, state.theta, support, query).detach()

    def objective(phi: Any, views: Tensor) -> Tensor:
        V = factors(p, phi, Z)
        each = [loss(state.theta, phi, V, views, k) for k in range(p.num_tasks)]
        return sum(each) / len(each) + calibration_loss(Z, V, weights(phi, Z, V))

    start = leaf_grads(state.phi)
    d_phi = derivative(objective(descended(lambda phi: objective(phi, support), start, A1, steps), query), start)
    phi = tree.sub(state.phi, d_phi)

    V = factors(p, phi, Z).detach()
    start = leaf_grads(state.theta)
    outer = torch.zeros(())
    for k in range(p.num_tasks):
        adapted = descended(lambda theta: loss(theta, phi, V, support, k), start, A2, steps)  # noqa: B023
        for j in range(p.num_tasks):
            outer = outer + pairing[k, j] / p.num_tasks * loss(adapted, phi, V, query, j)
    return d_phi, derivative(outer, start), outer.item()


# 1. Reading `paper`


def test_without_calibration_steps_or_tasks_it_is_the_base_method() -> None:
    """Fact 4."""
    for name, objective in OBJECTIVES.items():
        p = Problem(net(objective), objective, num_tasks=1)
        still = {"calibrator_stage": Stage(0.0), "encoder_stage": Stage(0.0)}
        method, plain = tc2.paper(p, optim.adam(1e-2), optim.adam(1e-2), **still), tc2.base(p, optim.adam(1e-2))
        torch.manual_seed(0)
        state, x = method.init(), images()
        after, metrics = take(method, state, x)
        (query,) = split(x, 1)[1]
        expected, base_metrics = plain.step(state, query)
        assert torch.equal(metrics["loss"], base_metrics["loss"]), name
        for got, want in zip(tree.leaves(after), tree.leaves(expected), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
        assert not torch.equal(ravel(after.theta), ravel(state.theta))


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_stages_of_paper_are_the_written_out_ones(name: str, steps: int) -> None:
    p = problem(name)
    method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, **stages(steps=steps))
    state, x = trained(method.init()), images()
    after, metrics = take(method, state, x)
    d_phi, d_theta, outer = by_hand(p, state, split(x), steps, torch.eye(K))
    close(tree.sub(state.phi, after.phi), d_phi)
    close(tree.sub(state.theta, after.theta), d_theta)
    assert metrics["loss"].item() == pytest.approx(outer, rel=1e-12)
    assert metrics["first_bad_step"] == -1


def test_at_the_encoder_both_stages_are_the_written_out_ones() -> None:
    for name in ("simclr", "simsiam"):
        p = problem(name, where="encoder")
        assert p.d == DIM
        method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, **stages())
        state, x = trained(method.init()), images()
        after, _ = take(method, state, x)
        d_phi, d_theta, _ = by_hand(p, state, split(x), 1, torch.eye(K))
        close(tree.sub(state.phi, after.phi), d_phi)
        close(tree.sub(state.theta, after.theta), d_theta)


def test_stage_two_holds_the_factors_fixed() -> None:
    p = problem()
    method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, calibrator_stage=Stage(0.0), encoder_stage=Stage(0.0))
    state, x = trained(method.init()), images()
    after, _ = take(method, state, x)
    support, query = split(x)
    start = leaf_grads(state.theta)
    free = factors(p, after.phi, represented(p, start, support, query))

    def gradient(V: Tensor) -> Any:
        return derivative(torch.stack([ssl(p, start, after.phi, V, task) for task in query]).mean(), start)

    moved = tree.sub(state.theta, after.theta)
    close(moved, gradient(free.detach()))
    with pytest.raises(AssertionError, match="relative error"):  # the other choice is another gradient
        close(moved, gradient(free), 1e-3)


@pytest.mark.parametrize("pairing", ["own", "cross", "all", "cyclic", "matrix"])
def test_pairings_are_double_loops(pairing: str) -> None:
    tasks = 4
    p = problem("vicreg", num_tasks=tasks, calibrator=tc2.Identity())
    eye = torch.eye(tasks)
    matrix = {
        "own": eye,
        "cross": (1 - eye) / (tasks - 1),
        "all": torch.ones(tasks, tasks) / tasks,
        "cyclic": torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]),
        "matrix": torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0]]),
    }[pairing]
    method = tc2.paper(p, SGD, SGD, pairing=matrix if pairing == "matrix" else pairing, **stages())
    state, x = method.init(), images(samples=16)
    after, metrics = take(method, state, x)
    support, query = split(x, tasks)
    start = leaf_grads(state.theta)
    outer = torch.zeros(())
    for k in range(tasks):
        adapted = descended(lambda theta: ssl(p, theta, {}, None, support[k]), start, A2, 1)  # noqa: B023
        for j in range(tasks):
            outer = outer + matrix[k, j] * ssl(p, adapted, {}, None, query[j]) / tasks
    close(metrics["loss"], outer, 1e-7 if pairing in ("cross", "all") else 1e-12)  # 1/3 as a float32 number
    close(tree.sub(state.theta, after.theta), derivative(outer, start), 1e-7 if pairing in ("cross", "all") else 1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loop_over_tasks_equals_vmap(name: str) -> None:
    p = problem(name)
    both = [tc2.paper(p, SGD, SGD, tasks=tasks, pairing="cross", **stages(steps=2, adjoint=Unrolled())) for tasks in ("loop", "vmap")]
    state, x = trained(both[0].init()), images()
    (looped, loop_metrics), (mapped, map_metrics) = (take(method, state, x) for method in both)
    close((mapped.theta, mapped.phi), (looped.theta, looped.phi), 1e-12)
    close(map_metrics["loss"], loop_metrics["loss"], 1e-12)


def test_under_vmap_both_stages_dispatch_fewer_operations() -> None:
    """That is what a step of small kernels costs on a GPU: 4 tasks in a loop make 2 times as many operations."""

    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += 1
            return func(*args, **(kwargs or {}))

    found = {}
    for stage in ("calibrator_stage", "encoder_stage"):
        for way in ("loop", "vmap"):
            one = {name: tc2.Stage(0.1, steps=int(name == stage), adjoint=Unrolled()) for name in ("calibrator_stage", "encoder_stage")}
            method = tc2.paper(problem(num_tasks=4), SGD, SGD, tasks=way, **one)
            state, x = method.init(), images(samples=16)
            with Counted() as count:
                take(method, state, x)
            found[stage, way] = count.operations
        assert found[stage, "vmap"] < 0.75 * found[stage, "loop"]


def test_under_vmap_the_graph_of_a_stage_gives_way_to_mode_mixed() -> None:
    looped, mapped = (tc2.paper(problem(), SGD, SGD, tasks=tasks) for tasks in ("loop", "vmap"))
    state, x = trained(looped.init()), images()
    close(take(mapped, state, x)[0].theta, take(looped, state, x)[0].theta, 1e-12)
    truncated = Stage(0.1, adjoint=Unrolled(mode="graph", segment=2))
    assert truncated.mappable().adjoint == Unrolled(mode="mixed", segment=2)
    assert Stage(0.1, adjoint=Unrolled(mode="reverse")).mappable().adjoint == Unrolled(mode="reverse")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Stage(math.nan), ValueError, "`lr` should be at least 0, got nan"),
        (lambda: Stage("a"), TypeError, "`lr` should be a number, at least 0, got 'a'"),  # type: ignore[arg-type]
        (lambda: Stage(0.1, strength=math.nan), ValueError, "`strength` should be at least 0, got nan"),
        (lambda: tc2.paper(problem(), SGD, SGD, warmup=-1), ValueError, "`warmup` should be an integer of at least 0, got -1"),
        (lambda: tc2.lookahead(problem(), SGD, SGD, warmup=1.5), ValueError, "`warmup` .* got 1.5"),  # type: ignore[arg-type]
        (lambda: tc2.paper(problem(), SGD, SGD, encoder_stage=0.05), TypeError, "`encoder_stage` should be a tc2.Stage, got 0.05"),  # type: ignore[arg-type]
        (lambda: tc2.stable(lambda_s=-1), ValueError, "`lambda_s` should be at least 0, got -1"),
        (lambda: tc2.stable(lambda_1=math.nan), ValueError, "`lambda_1` should be at least 0, got nan"),
        (lambda: problem(objective="SimCLR"), TypeError, "`objective` should be one of metacal.objectives, .* got 'SimCLR'"),
        (lambda: problem(calibrator=32), TypeError, "`calibrator` should be a tc2.Calibrator .* got 32"),
        (lambda: tc2.paper(problem(), SGD, SGD, pairing=[[1.0]]), TypeError, "`pairing` should be a name or a .* tensor, got list"),  # type: ignore[arg-type]
        (lambda: OBJECTIVES["simclr"].__class__("a"), TypeError, "`temperature` should be a number or a 0-dim tensor, got 'a'"),  # type: ignore[call-arg]
    ],
)
def test_wrong_settings_are_named_where_they_are_given(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# 1b. What a task is, and what its heads' statistics see


FOUR = (OBJECTIVES["simclr"], OBJECTIVES["byol"], OBJECTIVES["vicreg"], OBJECTIVES["simsiam"])


def per_objective(*each: SSLObjective) -> Problem:
    return Problem(net(PerTask(each)), PerTask(each), num_tasks=len(each))


def per_task(num_tasks: int = 4, **over: Any) -> Problem:
    mixed = PerTask(FOUR[:num_tasks])
    over = {"calibrator": Networks(n_f=N_F, hidden=7), "num_tasks": num_tasks, "momentum": 0.9, **over}
    return Problem(net(mixed), mixed, **over)


@pytest.mark.parametrize("deal", ["given", "clusters"])
def test_tasks_by_order_and_by_clusters_take_the_written_out_step(deal: Any) -> None:
    p = problem("byol", deal=deal)
    method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, **stages())
    state, x = trained(method.init()), images()
    before = torch.get_rng_state()
    after, metrics = method.step(state, x)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn
    order = torch.arange(N) if deal == "given" else tasks.clusters(p.network.encode(state.theta, x[:, 0]), K)
    assert (deal == "given") == torch.equal(order, torch.arange(N))
    dealt = x[order].reshape(K, -1, *x.shape[1:])
    d_phi, d_theta, outer = by_hand(p, state, (dealt[:, :, :2], dealt[:, :, 2:]), 1, torch.eye(K))
    close(tree.sub(state.phi, after.phi), d_phi)
    close(tree.sub(state.theta, after.theta), d_theta)
    assert metrics["loss"].item() == pytest.approx(outer, rel=1e-12)


def test_an_objective_for_each_task_is_the_loop_over_them() -> None:
    p = per_task()
    pairing = tc2.cyclic(4).double()
    method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, pairing=pairing, **stages())
    state, x = trained(method.init()), images(samples=16)
    after, metrics = take(method, state, x)

    def loss(theta: Any, phi: Any, V: Tensor, side: Tensor, k: int) -> Tensor:
        alone = replace(p, objective=FOUR[k])
        return ssl(alone, theta, phi, V, side[k], state.target)

    d_phi, d_theta, outer = by_hand(p, state, split(x, 4), 1, pairing, loss=loss)
    close(tree.sub(state.phi, after.phi), d_phi)
    close(tree.sub(state.theta, after.theta), d_theta)
    assert metrics["loss"].item() == pytest.approx(outer, rel=1e-12)
    mapped = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, pairing=pairing, tasks="vmap", **stages(adjoint=Unrolled()))
    close(take(mapped, state, x)[0].theta, after.theta, 1e-12)


@pytest.mark.parametrize("where", ["projector", "encoder"])
def test_shared_statistics_are_those_of_all_tasks(where: Any) -> None:
    p = per_task(2, where=where, statistics="batch")  # SimCLR and BYOL: projector, predictor and target have BatchNorm
    method = tc2.paper(p, SGD, SGD, calibration=CALIBRATION, **stages())
    state, x = trained(method.init()), images(samples=12)
    after, metrics = take(method, state, x)
    support, query = split(x)

    def loss(theta: Any, phi: Any, V: Tensor, side: Tensor, k: int) -> Tensor:
        """All samples through every layer in the order they have, then task k's outputs."""
        flat = side.flatten(0, 1)

        def project(represents: Any) -> Tensor:
            h = p.network.encode(represents, flat)
            r = h if where == "encoder" else p.network.project(represents, h)
            z = weights(phi, r, V) @ V.T
            return p.network.project(represents, z) if where == "encoder" else z  # each network's own projector ends what it makes

        assert p.network.predict is not None
        z, fixed = project(theta), project({**theta, **state.target}).detach()
        outputs = (z, p.network.predict(theta, z), fixed)
        return FOUR[k](Outputs(*(out.unflatten(0, (K, -1))[k] for out in outputs)))

    whole = [side.flatten(0, 1)[None] for side in (support, query)]
    Z = represented(p, state.theta, *whole).detach()
    d_phi, d_theta, outer = by_hand(p, state, (support, query), 1, torch.eye(K), Z=Z, loss=loss)
    close(tree.sub(state.phi, after.phi), d_phi)
    close(tree.sub(state.theta, after.theta), d_theta)
    assert metrics["loss"].item() == pytest.approx(outer, rel=1e-12)
    alone = tc2.paper(replace(p, statistics="task"), SGD, SGD, calibration=CALIBRATION, **stages())
    with pytest.raises(AssertionError, match="relative error"):
        close(take(alone, state, x)[0].theta, after.theta, 1e-6)


@pytest.mark.parametrize("reading", ["lookahead", "vmap", "pcgrad"])
def test_shared_statistics_change_nothing_where_there_are_none(reading: str) -> None:
    """With LayerNorm in the heads no sample sees another: then the other samples that pass must not count."""
    methods = []
    for statistics in ("task", "batch"):
        torch.manual_seed(0)
        p = Problem(net(OBJECTIVES["byol"], "layer"), OBJECTIVES["byol"], Networks(n_f=N_F, hidden=7), num_tasks=K, statistics=statistics)
        methods.append(
            {
                "lookahead": lambda p=p: tc2.lookahead(p, SGD, SGD, encoder_stage=Stage(A2, 2)),
                "vmap": lambda p=p: tc2.paper(p, SGD, SGD, tasks="vmap", pairing="cross", **stages(adjoint=Unrolled())),
                "pcgrad": lambda p=p: tc2.project_conflicts(p, SGD),
            }[reading]()
        )
    state, x = trained(methods[0].init()), images()
    (alone, _), (together, _) = (take(method, state, x) for method in methods)
    close(together.theta, alone.theta, 1e-10)
    if reading != "pcgrad":
        close(together.phi, alone.phi, 1e-10)


def test_one_objective_for_all_tasks_is_each_tasks_own() -> None:
    same = PerTask((OBJECTIVES["byol"],) * K)
    assert (same.heads, same.ema_target) == (OBJECTIVES["byol"].heads, True)
    p = problem("byol")
    methods = [tc2.paper(one, SGD, SGD, **stages()) for one in (p, replace(p, objective=same))]
    state, x = trained(methods[0].init()), images()
    first, second = (take(method, state, x)[0] for method in methods)
    assert torch.equal(ravel(first.theta), ravel(second.theta))


def test_an_objective_for_each_task_is_their_mean_where_there_is_one_task() -> None:
    p = per_task(2)
    state, x = trained(tc2.base(p, SGD).init()), images()
    _, metrics = tc2.base(p, SGD).step(state, x)
    alone = [tc2.base(replace(p, objective=objective), SGD).step(state, x)[1]["loss"] for objective in FOUR[:2]]
    close(metrics["loss"], torch.stack(alone).mean(), 1e-12)


# 2. Reading `lookahead`


def lookahead_outer(p: Problem, state: MethodState, x: Tensor, steps: int) -> Callable[[Any], Tensor]:
    """The outer loss as a function of phi, the encoder's steps included."""
    support, query = split(x)
    Z = represented(p, state.theta, support, query).detach()

    def loss(theta: Any, phi: Any, views: Tensor) -> Tensor:
        V = factors(p, phi, Z)
        return torch.stack([ssl(p, theta, phi, V, task, state.target) for task in views]).mean()

    def outer(phi: Any, through: bool = True) -> Tensor:
        held = phi if through else tree.detach(phi)
        theta = descended(lambda theta: loss(theta, held, support), leaf_grads(state.theta), A2, steps)
        V = factors(p, phi, Z)
        return loss(theta if through else tree.detach(theta), phi, query) + calibration_loss(Z, V, weights(phi, Z, V))

    return outer


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_lookahead_hypergradient_is_that_of_the_whole_run(name: str, steps: int) -> None:
    p = problem(name)
    method = tc2.lookahead(p, SGD, SGD, calibration=CALIBRATION, encoder_stage=Stage(A2, steps))
    state, x = trained(method.init()), images()
    after, metrics = take(method, state, x)
    outer = lookahead_outer(p, state, x, steps)
    assert metrics["calibration_loss"].item() == pytest.approx(outer(state.phi).item(), rel=1e-12)
    found = tree.sub(state.phi, after.phi)
    for seed in range(3):
        direction = tree.map(lambda leaf, seed=seed: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)), found)
        h = 1e-5
        slope = (outer(tree.axpy(h, direction, state.phi)) - outer(tree.axpy(-h, direction, state.phi))) / (2 * h)
        assert tree.vdot(found, direction).item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-7)


def test_the_lookahead_encoder_takes_the_step_on_the_calibrated_support() -> None:
    p = problem("byol")
    method = tc2.lookahead(p, SGD, SGD, calibration=CALIBRATION, encoder_stage=Stage(A2))
    state, x = trained(method.init()), images()
    after, metrics = take(method, state, x)
    support, query = split(x)
    V = factors(p, after.phi, represented(p, state.theta, support, query).detach())
    start = leaf_grads(state.theta)
    loss = torch.stack([ssl(p, start, after.phi, V.detach(), task, state.target) for task in support]).mean()
    close(metrics["loss"], loss)
    close(tree.sub(state.theta, after.theta), derivative(loss, start))


def test_first_order_lookahead_is_the_direct_term() -> None:
    p = problem("vicreg")
    method = tc2.lookahead(p, SGD, SGD, calibration=CALIBRATION, encoder_stage=Stage(A2, 2, FirstOrder()))
    state, x = trained(method.init()), images()
    after, _ = take(method, state, x)
    outer, phi = lookahead_outer(p, state, x, 2), leaf_grads(state.phi)
    found = tree.sub(state.phi, after.phi)
    close(found, derivative(outer(phi, through=False), phi))
    with pytest.raises(AssertionError, match="relative error"):
        close(found, derivative(outer(phi), phi), 1e-2)


@dataclass(frozen=True)
class Pull(SSLObjective):
    """Towards a fixed pattern: strongly convex in a linear network."""

    def __call__(self, outputs: Outputs, carry: Any = ()) -> Tensor:
        pattern = torch.sin(torch.arange(outputs.z.numel(), dtype=outputs.z.dtype)).reshape(outputs.z.shape)
        return (outputs.z - pattern).square().mean()


def linear_problem() -> Problem:
    """Four inputs, three outputs, no hidden layer: theta is a least squares solution."""
    params = {"encoder": {"weight": torch.randn(4, 3)}}
    linear_net = tc2.Network(
        params, lambda theta, x: x.flatten(-3) @ theta["encoder"]["weight"], lambda theta, h: h, None, lambda theta: None, 3, 3
    )
    return Problem(linear_net, Pull(), _Scaling(), num_tasks=K)


@dataclass(frozen=True)
class _Scaling(tc2.Calibrator):
    """z~ = z * s: a calibrator that leaves the inner problem convex."""

    def init(self, d: int, generator: Any = None, dtype: Any = None, device: Any = None) -> Any:
        return {"scale": torch.linspace(0.7, 1.3, d)}

    def factors(self, phi: Any, Z: Tensor) -> Tensor:
        return phi["scale"].diag()

    def weights(self, phi: Any, z: Tensor, V: Tensor) -> Tensor:
        return z

    def synthesis(self, w: Tensor, V: Tensor) -> Tensor:
        return w @ V.mT


def test_implicit_lookahead_tends_to_the_unrolled_one_where_the_encoder_converges() -> None:
    p = linear_problem()
    x = torch.randn(16, 4, 1, 2, 2)
    x[:, :2] = 32**0.5 * torch.linalg.qr(torch.randn(32, 4)).Q.reshape(16, 2, 1, 2, 2)  # the support's curvatures: 2/3 scale^2

    def hypergradient(adjoint: Any) -> Any:
        method = tc2.lookahead(p, SGD, SGD, calibration=CALIBRATION.without("sparsity"), encoder_stage=Stage(1.3, 50, adjoint))
        state = method.init()
        return tree.sub(state.phi, take(method, state, x)[0].phi)

    truth = hypergradient(Unrolled())
    close(hypergradient(Implicit(linear.CG(30))), truth, 1e-8)
    # The Neumann series contracts by |1 - a * curvature| with each term, as the steps themselves do: here by 0.58 at least.
    errors = [ravel(tree.sub(hypergradient(Implicit(linear.Neumann(n, 1.3))), truth)).norm().item() for n in (4, 8, 16)]
    assert errors[1] < 0.58**4 * errors[0]
    assert errors[2] < 0.58**8 * errors[1]
    with pytest.raises(AssertionError, match="relative error"):
        close(hypergradient(FirstOrder()), truth, 1e-2)


def test_implicit_paper_is_imaml_where_the_tasks_converge() -> None:
    """(I + H_k / strength)^-1 of every task's outer gradient, with the dense Hessian of the task."""
    p, strength = linear_problem(), 0.5
    stage = Stage(0.5, 100, Implicit(linear.CG(40)), strength=strength)
    still = Stage(0.0, 1, Unrolled())
    method = tc2.paper(p, SGD, optim.sgd(0.01), calibration=CALIBRATION.without("sparsity"), calibrator_stage=still, encoder_stage=stage)
    state, x = method.init(), torch.randn(16, 4, 1, 2, 2)
    after, _ = take(method, state, x)
    support, query = split(x)
    W0 = state.theta["encoder"]["weight"]

    def loss(W: Tensor, task: Tensor) -> Tensor:
        return p.objective(Outputs((task.flatten(-3) @ W) * after.phi["scale"]))

    expected = torch.zeros_like(W0)
    for k in range(K):
        H = torch.autograd.functional.hessian(lambda w: loss(w.reshape(4, 3), support[k]), W0.flatten())  # noqa: B023
        inner_gradient = torch.func.grad(loss)(W0, support[k]).flatten()
        A = H + strength * torch.eye(12)
        solution = (W0.flatten() - torch.linalg.solve(A, inner_gradient)).reshape(4, 3)  # quadratic: Newton's step is exact
        expected += (strength * torch.linalg.solve(A, torch.func.grad(loss)(solution, query[k]).flatten())).reshape(4, 3) / K
    close(W0 - after.theta["encoder"]["weight"], expected, 1e-8)


# 3. Products: adjoints x readings x objectives

PAPER_ADJOINTS: dict[str, tuple[Any, float | None]] = {
    "graph": (Unrolled(mode="graph"), None),
    "mixed": (Unrolled(), None),
    "reverse, segment": (Unrolled(mode="reverse", segment=1), None),
    "first order": (FirstOrder(), None),
    "implicit CG": (Implicit(linear.CG(3)), 50.0),  # more than the losses' negative curvature
    "implicit Neumann": (Implicit(linear.Neumann(3, 0.01)), 50.0),
    "implicit identity": (Implicit(linear.Identity()), 50.0),
    "unrolled, tied": (Unrolled(), 50.0),
}
LOOKAHEAD_ADJOINTS = {
    **{name: adjoint for name, (adjoint, strength) in PAPER_ADJOINTS.items() if strength is None or name.startswith("implicit")},
    "window": Unrolled(window=1),
    "dense": Implicit(linear.Dense(), damping=1.0),
}


def assert_a_sound_step(method: Method) -> None:
    state, x = trained(method.init()), images()
    after, metrics = take(method, state, x)
    for name, value in {**tree.state_dict(after), **metrics}.items():
        assert value.isfinite().all(), name
    for before, now in ((state.theta, after.theta), (state.phi, after.phi)):
        assert not torch.equal(ravel(before), ravel(now))
    assert after.step == state.step + 1


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # so few steps solve nothing: the step has to be sound
@pytest.mark.parametrize("adjoint", PAPER_ADJOINTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_paper_runs_with_every_adjoint_that_makes_sense(name: str, adjoint: str) -> None:
    how, strength = PAPER_ADJOINTS[adjoint]
    stage = Stage(A2 if strength is None else 0.01, 2, how, strength)
    assert_a_sound_step(tc2.paper(problem(name), SGD, SGD, calibrator_stage=stage, encoder_stage=stage))


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # so few steps solve nothing: the step has to be sound
@pytest.mark.parametrize("adjoint", LOOKAHEAD_ADJOINTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_lookahead_runs_with_every_adjoint(name: str, adjoint: str) -> None:
    assert_a_sound_step(tc2.lookahead(problem(name), SGD, SGD, encoder_stage=Stage(A2, 2, LOOKAHEAD_ADJOINTS[adjoint])))


@pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")  # so few steps solve nothing: the step has to be sound
@pytest.mark.parametrize("adjoint", [Implicit(linear.CG(3)), Unrolled(window=1)], ids=["implicit", "window"])
@pytest.mark.parametrize("which", ["calibrator_stage", "encoder_stage"])
def test_paper_refuses_what_does_not_see_the_initial_params(which: str, adjoint: Any) -> None:
    method = tc2.paper(problem(), SGD, SGD, **{which: Stage(0.1, 2, adjoint)})
    with pytest.raises(ValueError, match=r"with respect to the initial params.*proximal"):
        take(method, method.init(), images())


def test_lookahead_refuses_a_tied_stage() -> None:
    with pytest.raises(ValueError, match="`strength` belongs to reading `paper`"):
        tc2.lookahead(problem(), SGD, SGD, encoder_stage=Stage(0.1, strength=1.0))


# 4. What moves, and when


@pytest.mark.parametrize("reading", ["paper", "lookahead", "base", "pcgrad"])
def test_the_target_moves_once_per_iteration_by_tau(reading: str) -> None:
    p = problem("byol", momentum=0.75)
    method = {
        "paper": lambda: tc2.paper(p, SGD, SGD, **stages(steps=3)),
        "lookahead": lambda: tc2.lookahead(p, SGD, SGD, encoder_stage=Stage(A2, 3)),
        "base": lambda: tc2.base(p, SGD),
        "pcgrad": lambda: tc2.project_conflicts(p, SGD),
    }[reading]()
    state, x = trained(method.init()), images()
    after, _ = take(method, state, x)
    followed = {part: after.theta[part] for part in ("encoder", "projector")}
    assert sorted(after.target) == sorted(followed)
    for target, old, theta in zip(*map(tree.leaves, (after.target, state.target, followed)), strict=True):
        assert torch.equal(target, 0.75 * old + 0.25 * theta)


def test_objectives_without_a_target_have_none() -> None:
    assert [name for name in OBJECTIVES if tree.leaves(tc2.base(problem(name), SGD).init().target)] == ["byol"]


@pytest.mark.parametrize("reading", [tc2.paper, tc2.lookahead])
def test_the_warm_up_is_the_same_method_without_calibration(reading: Any) -> None:
    p = problem()
    method = reading(p, SGD, optim.adam(1e-2), encoder_stage=Stage(A2), warmup=2)
    without = reading(replace(p, calibrator=tc2.Identity()), SGD, SGD, encoder_stage=Stage(A2))
    state, x = trained(method.init()), images()
    plain = state
    for _ in range(2):
        before = state
        (state, metrics), (plain, _) = take(method, state, x), take(without, plain, x)
        assert torch.equal(ravel((state.phi, before.phi_opt[0])), ravel((before.phi, state.phi_opt[0])))
        assert torch.equal(ravel(state.theta), ravel(plain.theta))
        assert "calibration_loss" not in metrics
    after, metrics = take(method, state, x)
    assert not torch.equal(ravel(after.phi), ravel(state.phi))
    assert not torch.equal(ravel(after.theta), ravel(take(without, state, x)[0].theta))
    assert "calibration_loss" in metrics


@pytest.mark.parametrize("where", ["projector", "encoder"])
def test_downstream_users_get_the_encoder_without_calibration(where: Any) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIM), nn.Tanh())
    network = tc2.network(encoder, OBJECTIVES["simclr"], dim=DIM, d=D)
    p = Problem(network, OBJECTIVES["simclr"], Networks(n_f=N_F), where, K)
    before = encoder[1].weight.clone()
    method = tc2.paper(p, SGD, SGD)
    state, _ = take(method, trained(method.init()), images())
    assert torch.equal(encoder[1].weight, before)  # training leaves the user's module alone until `write`
    network.write(state.theta)
    x = images()[:, 0]
    weight, bias = (state.theta["encoder"][name] for name in ("1.weight", "1.bias"))
    close(network.encode(state.theta, x), torch.tanh(x.flatten(1) @ weight.T + bias), 1e-14)
    assert torch.equal(encoder(x), network.encode(state.theta, x))


def test_the_closed_form_calibrator_needs_no_stage_one() -> None:
    p = problem(calibrator=tc2.PCA(n_f=3, lambda_1=0.01))
    for method in (tc2.paper(p, SGD, SGD), tc2.lookahead(p, SGD, SGD)):
        state, metrics = take(method, method.init(), images())
        assert state.phi == {}
        assert "calibration_loss" not in metrics
        assert not torch.equal(ravel(state.theta), ravel(method.init().theta))


def test_pcgrad_is_the_algorithm_on_the_tasks_gradients() -> None:
    tasks = 4
    p = problem("vicreg", num_tasks=tasks, calibrator=tc2.Identity())
    method = tc2.project_conflicts(p, SGD)
    state, x = method.init(), images(samples=16)
    after, metrics = take(method, state, x)
    torch.manual_seed(1)
    split_tasks = x[torch.randperm(16)].reshape(tasks, 4, *x.shape[1:])
    with _random.apart():
        order = torch.rand(tasks, tasks).argsort(1)
    start = leaf_grads(state.theta)
    losses = [ssl(p, start, {}, None, task) for task in split_tasks]  # support and query together: all four views
    gradients = [ravel(derivative(loss, start)) for loss in losses]
    projected = []
    for i, g in enumerate(gradients):
        for j in order[i].tolist():
            if j != i and g @ gradients[j] < 0:
                g = g - (g @ gradients[j]) / gradients[j].square().sum() * gradients[j]
        projected.append(g)
    assert any(not torch.equal(g, h) for g, h in zip(gradients, projected, strict=True))  # there was a conflict to project
    close(ravel(tree.sub(state.theta, after.theta)), torch.stack(projected).mean(0))
    close(metrics["loss"], torch.stack(losses).mean())


def nearest_without_conflict(g: Tensor, i: int) -> Tensor:
    """The projection of g[i] onto {h: g h >= 0}, from the KKT conditions of every set of active constraints."""
    best = None
    for active in itertools.chain.from_iterable(itertools.combinations(range(len(g)), r) for r in range(len(g) + 1)):
        A = g[list(active)]
        multipliers = -torch.linalg.solve(A @ A.T, A @ g[i]) if active else g.new_zeros(0)
        h = g[i] + multipliers @ A
        if (multipliers >= -1e-12).all() and (g @ h >= -1e-12).all() and (best is None or (h - g[i]).norm() < (best - g[i]).norm()):
            best = h
    assert best is not None
    return best


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")  # qpsolvers imports what it finds
def test_upgrad_is_the_mean_of_projections_onto_the_cone_without_conflict() -> None:
    pytest.importorskip("quadprog")
    for seed in range(5):
        g = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        expected = torch.stack([nearest_without_conflict(g, i) for i in range(4)]).mean(0)
        assert (g @ g.T < 0).any()
        found = upgrad(g)
        close(found, expected, 2e-3)  # torchjd's ridge is 1e-4
        assert (g @ found > -2e-3 * g.norm() ** 2).all()
        close(upgrad(1e-8 * g), 1e-8 * found, 1e-8)  # small gradients are projected as well
        trees = [{"a": row[:2], "b": row[2:].reshape(2, 2)} for row in g]
        close(torch.cat([leaf.flatten() for leaf in tree.leaves(upgrad(trees))]), found, 1e-12)
    agreeing = torch.tensor([[1.0, 0.5], [0.2, 1.0]])
    close(upgrad(agreeing), agreeing.mean(0), 1e-12)
    assert torch.equal(upgrad(torch.zeros(3, 2)), torch.zeros(2))
    with pytest.raises(ArithmeticError, match="`gradients` should be finite"):
        upgrad(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


def test_upgrad_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r'pip install "torchjd\[quadprog-projector\]"'):
        upgrad(torch.eye(2))


def test_surgery_draws_from_a_stream_of_its_own() -> None:
    """So that what is drawn next, views and tasks, is what it is without surgery, and the orders of two iterations differ."""
    p = problem("vicreg", num_tasks=4, calibrator=tc2.Identity())
    after, orders = [], []

    def remembered(gradients: list[Any]) -> Any:
        before = torch.get_rng_state()
        orders.append(torch.rand(4, 4).argsort(1))
        torch.set_rng_state(before)
        return tc2.pcgrad(gradients)

    for surgery in (tree.mean, remembered):  # type: ignore[assignment]
        torch.manual_seed(3)
        method, x = tc2.project_conflicts(p, SGD, surgery), images(samples=16)
        state = method.init()
        for _ in range(2):
            state, _ = method.step(state, x)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    assert not torch.equal(*orders)


def test_without_surgery_it_is_the_mean_over_the_tasks() -> None:
    p = problem("vicreg", calibrator=tc2.Identity())
    method = tc2.project_conflicts(p, SGD, tree.mean)
    state, x = method.init(), images()
    after, metrics = take(method, state, x)
    start = leaf_grads(state.theta)
    loss = sum(ssl(p, start, {}, None, task) for task in torch.cat(split(x), 2)) / p.num_tasks
    close(metrics["loss"], loss)
    close(tree.sub(state.theta, after.theta), derivative(loss, start))


def test_the_method_takes_any_surgery() -> None:
    p = problem("vicreg", calibrator=tc2.Identity())
    method = tc2.project_conflicts(p, SGD, lambda gradients: gradients[1])
    state, x = method.init(), images()
    after, _ = take(method, state, x)
    second = torch.cat(split(x), 2)[1]
    start = leaf_grads(state.theta)
    close(tree.sub(state.theta, after.theta), derivative(ssl(p, start, {}, None, second), start))


# 5. Measurement


@pytest.mark.parametrize("deal", ["random", "given", "clusters"])
def test_conflict_stands_beside_that_of_the_same_batch_with_shuffled_membership(deal: Any) -> None:
    p = problem("vicreg", deal=deal)
    state = trained(tc2.paper(p, SGD, SGD).init())
    n = N // K
    x = images(samples=n).repeat(K, 1, 1, 1, 1)  # every block holds the same samples: without conflict at all
    if deal == "clusters":
        x = images()
    plain = replace(p, calibrator=tc2.Identity())  # its V does not depend on the shuffle
    torch.manual_seed(1)
    found = tc2.measure(plain, state, x, lr=0.1)
    torch.manual_seed(1)
    if deal == "random":
        torch.randperm(N)  # the split itself
    shuffled = tc2.measure(replace(plain, deal="random"), state, x, lr=0.1)
    for name in ("conflict_rate", "conflict_severity"):
        assert found.scalars[f"resplit_{name}"] == shuffled.scalars[name]
    if deal == "given":
        torch.testing.assert_close(found.cosines, torch.ones(K, K))
        assert shuffled.cosines[0, 1] < 0.99
    if deal == "clusters":
        order = tasks.clusters(p.network.encode(state.theta, x[:, 0]), K)
        found, expected = tc2.measure(p, state, x, lr=0.1), tc2.measure(replace(p, deal="given"), state, x[order], lr=0.1)
        assert torch.equal(found.transfer, expected.transfer)


def test_the_conflict_without_the_calibrator_is_that_of_the_same_tasks() -> None:
    p = problem("simclr")
    state, x = trained(tc2.paper(p, SGD, SGD).init()), images()
    torch.manual_seed(1)
    found = tc2.measure(p, state, x)
    torch.manual_seed(1)
    plain = tc2.measure(replace(p, calibrator=tc2.Identity()), state, x)
    for name in ("conflict_rate", "conflict_severity"):
        assert found.scalars[f"uncalibrated_{name}"] == plain.scalars[name]
    assert not torch.equal(found.cosines, plain.cosines)  # the calibrator does something
    assert "uncalibrated_conflict_rate" not in plain.scalars


def test_where_statistics_are_shared_what_is_measured_reads_every_sample_once() -> None:
    p = replace(problem("vicreg", deal="given"), network=net(OBJECTIVES["vicreg"], norm=None))
    state, x = trained(tc2.paper(p, SGD, SGD).init()), images()
    found, expected = (tc2.measure(replace(p, statistics=name), state, x, lr=0.1) for name in ("batch", "task"))
    close(found.transfer, expected.transfer, 1e-12)  # without BatchNorm both are the same
    assert found.scalars.keys() == expected.scalars.keys()
    for name in found.scalars.keys() - {"resplit_conflict_rate", "resplit_conflict_severity"}:
        close(found.scalars[name], expected.scalars[name], 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measuring_leaves_everything_as_it_was(name: str) -> None:
    p = problem(name)
    state, x = trained(tc2.paper(p, SGD, SGD).init()), images()
    before, rng = tree.clone(state), torch.get_rng_state()
    found = tc2.measure(p, state, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(before), strict=True))
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in found.scalars.values())
    for matrix in (found.cosines, found.transfer):
        assert matrix.shape == (K, K)
        assert not matrix.requires_grad
    torch.testing.assert_close(found.cosines.diagonal(), torch.ones(K))
    again = tc2.measure(p, state, x)  # the same draws, the same figures
    assert torch.equal(again.transfer, found.transfer)


def test_the_transfer_matrix_is_a_double_loop_and_its_cosines_are_the_support_gradients() -> None:
    tasks = 4
    p = problem("vicreg", num_tasks=tasks)
    state, x = trained(tc2.paper(p, SGD, SGD).init()), images(samples=16)
    torch.manual_seed(1)
    found = tc2.measure(p, state, x, lr=0.1, steps=2)
    support, query = split(x, tasks)
    V = factors(p, state.phi, represented(p, state.theta, support, query)).detach()
    start = leaf_grads(state.theta)
    expected = torch.zeros(tasks, tasks)
    for i in range(tasks):
        adapted = descended(lambda theta: ssl(p, theta, state.phi, V, support[i]), start, 0.1, 2)  # noqa: B023
        for j in range(tasks):
            expected[i, j] = (ssl(p, start, state.phi, V, query[j]) - ssl(p, adapted, state.phi, V, query[j])).item()
    close(found.transfer, expected)
    g = torch.stack([ravel(derivative(ssl(p, start, state.phi, V, task), start)) for task in support])
    unit = g / g.norm(dim=1, keepdim=True)
    close(found.cosines, unit @ unit.T)
    pairs = (unit @ unit.T)[torch.triu_indices(tasks, tasks, 1).unbind()]
    assert found.scalars["conflict_rate"] == (pairs < 0).double().mean()
    close(found.scalars["conflict_severity"], pairs.clamp(max=0).mean())
    others = expected[~torch.eye(tasks, dtype=torch.bool)]
    close(found.scalars["transfer_to_others"], others.mean())


def test_transfer_is_the_inner_product_of_gradients_to_first_order() -> None:
    """T(i -> j) = a <g_i, g_j> + O(a^2): the remainder falls by 4 when a halves."""
    p = problem("simclr")
    smooth = p.network._replace(project=lambda theta, h: torch.tanh(h @ theta["projector"]["layers.0.weight"].T), d=7)  # no ReLU
    p = replace(p, network=smooth)
    state, x = trained(tc2.paper(p, SGD, SGD).init()), images()
    torch.manual_seed(1)
    support, query = split(x)
    V = factors(p, state.phi, represented(p, state.theta, support, query)).detach()
    start = leaf_grads(state.theta)
    g_s, g_q = (torch.stack([ravel(derivative(ssl(p, start, state.phi, V, task), start)) for task in side]) for side in (support, query))

    def remainder(a: float) -> float:
        torch.manual_seed(1)
        return (tc2.measure(p, state, x, lr=a).transfer - a * g_s @ g_q.T).norm().item()

    errors = [remainder(a) for a in (4e-4, 2e-4, 1e-4)]
    assert errors[0] > 1e-9  # there is something of second order
    assert [errors[i] / errors[i + 1] for i in range(2)] == pytest.approx([4, 4], rel=0.05)


def test_a_single_task_has_no_others() -> None:
    p = problem(num_tasks=1)
    found = tc2.measure(p, tc2.paper(p, SGD, SGD).init(), images())
    assert "transfer_to_others" not in found.scalars
    assert found.scalars["conflict_rate"] == 0


# 6. Costs: which images pass through the encoder


def small(reading: Any = "paper", **over: Any) -> Config:
    return Config(
        network=NetworkConfig(width=8, dim=8, d=8, hidden=8),
        tc2=TC2Config(**{"reading": reading, "calibrator": Networks(n_f=4, hidden=8), **over}),
        train=TrainConfig(steps=10, batch_size=32),
        device="cpu",
    )


def shared(config: Config) -> Config:
    return replace(config, network=replace(config.network, norm="shared"))


MIXED = {stage: Stage(0.05, 1, Unrolled()) for stage in ("calibrator_stage", "encoder_stage")}
PASSES: dict[str, tuple[Config, int]] = {  # in images of the batch, N
    "base, 2 views": (small("base", num_views=2), 2),
    "base, 4 views": (small("base"), 4),
    "pcgrad, 4 views": (small("pcgrad"), 4),
    "tasks: 2 support + 2 query views": (small("tasks"), 2 + 2),
    "tasks, each judged by the 3 others": (small("tasks", pairing="cross"), 2 + 3 * 2),
    "tasks, judged by the next": (small("tasks", pairing="cyclic"), 2 + 2),
    "tasks, 3 steps": (small("tasks", encoder_stage=Stage(0.05, 3)), 3 * 2 + 2),
    "tasks, first order": (small("tasks", encoder_stage=Stage(0.05, 1, FirstOrder())), 2 + 2),
    "tasks, mixed mode passes the support again": (small("tasks", encoder_stage=Stage(0.05, 1, Unrolled())), 2 + 2 + 2),
    "tasks by samples: 4 views of half + half": (small("tasks", split_by="samples"), 2 + 2),
    "paper: all views for V, then support, query": (small(), 4 + 2 + 2),
    "paper, vmap": (small(run_tasks="vmap", **MIXED), 4 + 2 + 2 + 2),
    "lookahead: V, inner support, query, outer support": (small("lookahead"), 4 + 2 + 2 + 2),
    "clusters: one view more": (small(tasks=kinds.Clusters()), 1 + 4 + 2 + 2),
    "domains": (small(tasks=kinds.Domains()), 4 + 2 + 2),
    "shared statistics: every task passes all samples": (shared(small()), 4 + 4 * 2 + 4 * 2),
    "shared statistics, pcgrad": (shared(small("pcgrad")), 4 * 4),
    "shared statistics, base": (shared(small("base")), 4),
}


@pytest.mark.parametrize("name", PASSES)
def test_images_per_step(name: str) -> None:
    config, passes = PASSES[name]
    before = torch.get_rng_state()
    assert images_per_step(config) == passes * config.train.batch_size
    assert torch.equal(torch.get_rng_state(), before)


def test_the_target_network_counts_too() -> None:
    assert images_per_step(replace(small("base", num_views=2), objective=objectives.BYOL())) == 4 * 32


def test_the_matched_base_takes_as_many_steps_as_make_the_same_passes() -> None:
    assert budget(small("base")) == {"steps": 10}
    assert budget(small("matched")) == {"steps": 10 * 8 // 4, "matched_by": {"passes": {"paper": 8 * 32, "matched": 4 * 32}}}
    assert budget(small("matched", num_views=4, pairing="cross"))["steps"] == round(10 * (4 + 2 + 6) / 4)


@pytest.mark.parametrize(
    ("reading", "run_tasks", "objective"),
    [
        ("paper", "loop", objectives.SimCLR()),
        ("paper", "vmap", objectives.BYOL()),
        ("lookahead", "loop", objectives.SimCLR()),
        ("base", "loop", objectives.VICReg()),
    ],
)
def test_bfloat16_is_close_to_float32(reading: Any, run_tasks: Any, objective: SSLObjective) -> None:
    torch.set_default_dtype(torch.float32)
    config = small(run_tasks=run_tasks, reading=reading, **MIXED)
    losses = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        _, method = build(replace(config, objective=objective, train=replace(config.train, bf16=bf16)), 1)
        state, metrics = take(method, method.init(), torch.rand(32, 4, 1, 8, 8))
        assert all(leaf.isfinite().all() and leaf.dtype in (torch.float32, torch.int64) for leaf in tree.leaves(state))
        losses.append(metrics["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]  # the encoder did run in lower precision


# 7. What users get told


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: take_one(problem(num_tasks=3)), r"N = 8 samples do not make K = 3 equal tasks"),
        (lambda: take_one(problem(), images(views=2)), r"m >= 2 views of every sample, got m = 1.*support and query need two each"),
        (lambda: take_one(problem(), images(views=1)), r"`num_support` should leave support and query at least one of the 1 views"),
        (lambda: tc2.paper(problem(calibrator=Networks(n_f=D + 1)), SGD, SGD), r"`n_f` should be at most d = 5"),
        (lambda: tc2.lookahead(problem(calibrator=Networks(n_f=D + 1)), SGD, SGD), r"`n_f` should be at most d = 5"),
        (lambda: take_one(problem(calibrator=tc2.PCA(n_f=D + 1))), r"`n_f` should be at most d = 5"),
        (lambda: tc2.paper(problem(), SGD, SGD, pairing="other"), r"`pairing` should be one of"),
        (lambda: tc2.paper(problem(num_tasks=1), SGD, SGD, pairing="cross"), r"a single task has no others"),
        (lambda: replace(per_task(2), num_tasks=3), r"one objective for each of the K = 3 tasks, got 2.*Set `num_tasks`"),
        (lambda: PerTask((OBJECTIVES["simclr"], objectives.MoCo())), r"`objectives` should have no carry.*\['MoCo'\]"),
        (lambda: PerTask((objectives.SwAV(num_prototypes=5), objectives.SwAV(num_prototypes=6))), r"agree on `num_prototypes`.*\[5, 6\]"),
        (lambda: per_objective(objectives.SwAV(), objectives.BYOL()), r"at most one of predictor and prototypes"),
        (lambda: PerTask(()), r"one objective for every task, got none"),
        (lambda: problem(deal="clusters").batch(images(), ()), r"`theta` should be the network's params.*'clusters'"),
        (lambda: take_one(problem(num_tasks=3, deal="given")), r"N = 8 samples do not make K = 3 equal tasks"),
        (lambda: Stage(-0.1), r"`lr` should be at least 0, got -0.1"),
        (lambda: Stage(0.1, -1), r"`steps` should be an integer of at least 0"),
    ],
)
def test_errors_say_what_to_do(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt()


def take_one(p: Problem, x: Tensor | None = None) -> Any:
    method = tc2.paper(p, SGD, SGD)
    return take(method, method.init(), images() if x is None else x)


def test_two_views_are_enough_where_samples_are_split() -> None:
    p = problem(split_by="samples")
    state, metrics = take(method := tc2.paper(p, SGD, SGD), method.init(), images(views=2))
    assert state.step == 1
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize("reading", [tc2.paper, tc2.lookahead])
@pytest.mark.parametrize("where", ["projector", "encoder"])
def test_as_many_factors_as_dimensions_need_sparsity(reading: Any, where: Any) -> None:
    n_f = {"projector": D, "encoder": DIM}[where]
    make = partial(reading, optimizer=SGD, calibrator_optimizer=SGD)
    for calibrator in (Networks(), Networks(n_f=n_f)):
        square = problem(calibrator=calibrator, where=where)
        for vacuous in (tc2.stable(lambda_1=0.0), tc2.stable(lambda_s=0.0), tc2.stable().without("sparsity")):
            with pytest.warns(tc2.VacuousReconstructionWarning, match=f"n_f = d = {n_f}"):
                make(square, calibration=vacuous)
        make(square, calibration=tc2.stable())  # warnings are errors here
    make(problem(calibrator=Networks(sparsity=tc2.TopK(2)), where=where), calibration=tc2.stable(lambda_1=0.0))
    make(problem(calibrator=Networks(n_f=n_f - 1), where=where), calibration=tc2.stable(lambda_1=0.0))


def test_views_of_a_task_are_a_tree() -> None:
    """What stages stack and index: a target that is not there stays not there."""
    views = Views(images())
    assert tree.index(views, 0).target == ()
    assert torch.equal(tree.index(views, 0).x, views.x[0])


@pytest.mark.parametrize("reading", [tc2.paper, tc2.lookahead])
def test_views_of_another_kind_are_refused_in_words(reading: Any) -> None:
    torch.manual_seed(0)
    net = tc2.network(nets.ConvEncoder(width=8, dim=4), objectives.SimCLR(), dim=4, d=4, hidden=4)
    problem = tc2.Problem(net, objectives.SimCLR(), tc2.Networks(n_f=2), num_tasks=2)
    method = reading(problem, optim.sgd(0.1), optim.sgd(0.1))
    state = method.init()
    for views, message in (
        (torch.rand(8, 4, 3, 8, 8), r"`images` \[.*3, 8, 8\] have other channels.*metacal.data.resize"),
        (torch.rand(8, 1, 8, 8), r"`views` should be floating point \[N, m, C, H, W\].*got \(8, 1, 8, 8\)"),
        (torch.zeros(8, 4, 1, 8, 8, dtype=torch.uint8), r"`views` should be floating point.*torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            method.step(state, views)
