"""Forward mode, sketches, finite differences and zeroth order: each against its own formula, written out without the package.

Exact methods are compared with the loops of ``problems.py``; random ones with their expectation, by going through every sign vector;
biased ones with their bias.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metacal
from metacal import _random, adjoints, linear, optim, tree
from metacal.adjoints import lanes
from metacal.diagnostics.cost import peak_bytes, work
from metacal.single_loop import evolution
from problems import (
    F64,
    OPTIMIZERS,
    PROBLEMS,
    TRAIN,
    VALID,
    Problem,
    Tree,
    close,
    derivative,
    f64,
    leaf_grads,
    leaves,
    loop,
    ravel,
    relative_error,
    tree_map,
    unravel,
    unrolled_gradient,
)

SGD = OPTIMIZERS["sgd"]


def estimate(p: Problem, solver: Any, adjoint: Any, num_steps: int, **over: Any) -> metacal.HyperGradient:
    params, hparams = over.get("params", p.params), over.get("hparams", p.hparams)
    return metacal.hypergradient(p.outer, solver, adjoint)(solver.init(params, hparams), hparams, p.steps(num_steps), p.outer_batch)


def descent(p: Problem, row: Any = SGD) -> metacal.InnerSolver:
    return metacal.descent(p.inner, row.build())


def every_sign(m: int) -> Tensor:
    """[2^m, m]: their mean is 0, their covariance I, exactly."""
    return torch.tensor(list(itertools.product([1.0, -1.0], repeat=m)), dtype=F64)


def as_lanes(like: Tree, rows: Tensor) -> Tree:
    return tree.stack([unravel(like, row) for row in rows])


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``draw(rows, ...)``: the next directions that are asked for."""

    def replace(*rows: Tensor) -> None:
        queue: Iterator[Tensor] = iter(rows)

        def next_ones(like: Tree, num: int, distribution: str) -> Tree:
            given = next(queue)
            assert len(given) == num
            return as_lanes(like, given)

        monkeypatch.setattr(lanes, "directions", next_ones)

    return replace


# Forward: the exact derivative


@pytest.mark.parametrize(
    ("problem", "optimizer"),
    [(p, o) for p, o in itertools.product(PROBLEMS, OPTIMIZERS) if o in ("sgd", "adam") or p in ("multi_leaf", "mlp_reweighting")],
)
def test_forward_is_the_derivative_of_the_run(problem: str, optimizer: str) -> None:
    p, row = PROBLEMS[problem], OPTIMIZERS[optimizer]
    truth = unrolled_gradient(p, row, 4)
    hg = estimate(p, descent(p, row), adjoints.Forward(), 4)
    close(hg.value, truth.value, 1e-12)
    close(hg.hparams, truth.hparams, 1e-10)
    assert hg.params == ()
    assert int(hg.stats["first_bad_step"]) == -1


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 15, 99])
def test_forward_in_chunks(chunk_size: int) -> None:
    p = PROBLEMS["mlp_reweighting"]
    truth = unrolled_gradient(p, OPTIMIZERS["adam"], 3)
    close(estimate(p, descent(p, OPTIMIZERS["adam"]), adjoints.Forward(chunk_size), 3).hparams, truth.hparams)


@pytest.mark.parametrize("optimizer", ["momentum0.9", "adam", "rmsprop_a0.9"])
def test_forward_learns_the_optimizers_settings(optimizer: str) -> None:
    """A learned rate acts through the update alone, and an exact method sees it."""
    p, row = PROBLEMS["logistic_exp_reg"], OPTIMIZERS[optimizer]
    hparams = {"rate": f64(0.1), **p.hparams}
    solver = metacal.descent(lambda w, h, b: p.inner(w, h, b), lambda h: row.build({"lr": h["rate"]}))
    hg = metacal.hypergradient(p.outer, solver, adjoints.Forward())(solver.init(p.params, hparams), hparams, p.steps(5), p.outer_batch)
    h = leaf_grads(hparams)
    end = loop(p.inner, row, tree_map(torch.clone, p.params), h, p.steps(5), {"lr": h["rate"]})
    close(hg.hparams, derivative(p.outer(end, h, p.outer_batch), h))


def deep_equilibrium(p: Tree, h: Tree, b: Tensor) -> Tree:
    return {"z": torch.tanh(h["W"] @ p["z"] + h["U"] @ b)}


def equilibrium() -> tuple[metacal.InnerSolver, Tree, Tree, Tensor]:
    i = torch.arange(4, dtype=F64)
    hparams = {"W": 0.3 * torch.sin(1 + 4 * i[:, None] + i * i), "U": torch.cos(i[:, None] + torch.arange(2, dtype=F64))}
    return metacal.fixed_point(deep_equilibrium), {"z": torch.zeros(4, dtype=F64)}, hparams, f64(0.5, -1.0)


@pytest.mark.parametrize("adjoint", [adjoints.Forward(), adjoints.Forward(chunk_size=5)], ids=str)
def test_forward_takes_any_solver(adjoint: Any) -> None:
    solver, z, hparams, x = equilibrium()

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        return (p["z"] ** 3).sum() + 0.1 * (h["U"] ** 2).sum()

    hg = metacal.hypergradient(outer, solver, adjoint)(solver.init(z, hparams), hparams, [x] * 6, ())
    h, end = leaf_grads(hparams), z
    for _ in range(6):
        end = deep_equilibrium(end, h, x)
    close(hg.hparams, derivative(outer(end, h, ()), h))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forward_tangents_and_reverse_cotangents_agree(optimizer: str) -> None:
    """<ct, J t> = <J^T ct, t>, by the initial params as well, and by the hparams alone for the pullback."""
    p, row = PROBLEMS["mlp_reweighting"], OPTIMIZERS[optimizer]
    solver, steps = descent(p, row), p.steps(4)
    state = solver.init(p.params, p.hparams)
    t_params, t_hparams, ct = (
        tree_map(lambda x, s=s: torch.cos(s + torch.arange(x.numel(), dtype=F64)).reshape(x.shape), like)
        for s, like in ((1.0, p.params), (2.0, p.hparams), (3.0, p.params))
    )
    back = adjoints.Unrolled().vjp(solver, state, p.hparams, steps)[1](ct)
    for adjoint in (adjoints.Forward(), adjoints.ForwardSketch(1)):
        moved = adjoint.jvp(solver, state, p.hparams, steps, t_params, t_hparams)
        close(ravel(ct) @ ravel(moved), ravel(back.params) @ ravel(t_params) + ravel(back.hparams) @ ravel(t_hparams), 1e-10)
    close(adjoints.Forward().vjp(solver, state, p.hparams, steps)[1](ct).hparams, back.hparams, 1e-10)


def test_forward_refuses_many_hparams_unless_told() -> None:
    p = PROBLEMS["mlp_reweighting"]
    with pytest.raises(ValueError, match=r"`hparams`.*15 scalars.*max_hparams=14.*ForwardSketch.*Unrolled.*Forward\(max_hparams=15\)"):
        estimate(p, descent(p), adjoints.Forward(max_hparams=14), 2)
    estimate(p, descent(p), adjoints.Forward(max_hparams=15), 2)
    many = torch.zeros(4097)
    solver = metacal.descent(lambda w, h, b: ((w - h[:2]) ** 2).sum(), optim.sgd(0.1))
    with pytest.raises(ValueError, match="4097"):
        metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoints.Forward())(solver.init(torch.zeros(2), many), many, [()], ())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@pytest.mark.parametrize("adjoint", [adjoints.Forward(chunk_size=1), adjoints.ForwardSketch(1)], ids=str)
def test_what_has_no_forward_mode_is_refused_with_the_remedy(adjoint: Any) -> None:
    solver = metacal.descent(lambda w, h, b: (Cube.apply(w) - h).pow(2).sum(), optim.sgd(0.1))
    h = torch.ones(2, dtype=F64)
    with pytest.raises(RuntimeError, match=r"`solver`.*forward mode.*Unrolled\(mode='reverse'\)"):
        metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)(solver.init(h, h), h, [()] * 2, ())


@pytest.mark.parametrize("chunk_size", [1, None])
def test_forward_through_mse_loss(chunk_size: int | None) -> None:
    """Its forward-mode derivative fails where the target has no tangent; a target in the batch is given one."""
    x, y = TRAIN
    h, w = f64(-1.0, 0.0, 0.5), f64(0.3, -0.2, 0.5)

    def inner(w: Tree, h: Tree, b: Tree, mse: Any = F.mse_loss) -> Tensor:
        return mse(b[0] @ w, b[1]) + (h.exp() * w**2).sum()

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return ((b[0] @ w - b[1]) ** 2).mean()

    solver = metacal.descent(inner, optim.adam(0.1))
    hg = metacal.hypergradient(outer, solver, adjoints.Forward(chunk_size))(solver.init(w, h), h, [(x, y)] * 3, VALID)
    leaf = h.clone().requires_grad_()
    end = loop(lambda w, h, b: inner(w, h, b, lambda a, b: ((a - b) ** 2).mean()), OPTIMIZERS["adam"], w.clone(), leaf, [(x, y)] * 3)
    close(hg.hparams, torch.autograd.grad(outer(end, leaf, VALID), leaf)[0])
    closed_over = metacal.descent(lambda w, h, b: inner(w, h, (x, y)), optim.adam(0.1))
    with pytest.raises(RuntimeError, match="mse_loss"):
        metacal.hypergradient(outer, closed_over, adjoints.Forward(chunk_size))(solver.init(w, h), h, [()] * 3, VALID)


def batch_norm_problem() -> tuple[Any, metacal.InnerSolver, Any, Tree, list[Tensor]]:
    torch.manual_seed(0)
    net = metacal.functional(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double())

    def inner(w: Tree, h: Tree, b: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        out, carry = net.apply(w, b, carry=carry)
        return ((out[:, 0] - h) ** 2).mean(), carry

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return sum(((x - 0.1) ** 2).sum() for x in leaves(w))

    return (
        net,
        metacal.descent(inner, optim.sgd(0.1, momentum=0.9), carry=net.buffers),
        outer,
        f64(0.5, -0.5, 1.0, 0.0, 0.2),
        [torch.randn(5, 3, dtype=F64) for _ in range(3)],
    )


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_forward_with_batch_norm_as_carry(chunk_size: int | None) -> None:
    net, solver, outer, h, batches = batch_norm_problem()
    state = solver.init(net.params, h)
    truth = metacal.hypergradient(outer, solver, adjoints.Unrolled(mode="reverse"))(state, h, batches, ())
    hg = metacal.hypergradient(outer, solver, adjoints.Forward(chunk_size))(state, h, batches, ())
    close(hg.hparams, truth.hparams)
    close(hg.state.carry, truth.state.carry, 1e-14)
    assert leaves(hg.state.carry)[0].shape == leaves(truth.state.carry)[0].shape


# ForwardSketch: unbiased, with the variance that it says


@pytest.mark.parametrize("problem", ["ridge_scalar", "multi_leaf", "quadratic_bilevel"])
def test_a_sketch_over_every_sign_vector_is_the_exact_derivative(problem: str, draw: Any) -> None:
    p = PROBLEMS[problem]
    signs = every_sign(len(ravel(p.hparams)))
    exact = unrolled_gradient(p, OPTIMIZERS["adam"], 3)
    for chunk_size in (None, 3):
        draw(signs)
        hg = estimate(p, descent(p, OPTIMIZERS["adam"]), adjoints.ForwardSketch(len(signs), chunk_size=chunk_size), 3)
        close(hg.hparams, exact.hparams)
        close(hg.value, exact.value, 1e-12)


def indirect(p: Problem, adjoint: Any, num_steps: int, row: Any = SGD) -> tuple[Tensor, dict[str, Tensor]]:
    """The pullback alone: what the adjoint estimates, without the direct part."""
    solver = descent(p, row)
    ct = tree_map(lambda x: torch.cos(torch.arange(x.numel(), dtype=F64)).reshape(x.shape), p.params)
    found = adjoint.vjp(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(num_steps))[1](ct)
    return ravel(found.hparams), found.stats


@pytest.mark.parametrize("adjoint", [adjoints.ForwardSketch, lambda k: adjoints.ZerothOrder(k, 1e-2)], ids=["sketch", "zeroth order"])
def test_the_variance_of_one_sign_vector_is_m_minus_1_times_the_square(adjoint: Any, draw: Any) -> None:
    p = PROBLEMS["quadratic_bilevel"]  # its run is linear in the hparams: zeroth order has no bias of its own
    g, _ = indirect(p, adjoints.Forward(), 3)
    signs = every_sign(len(g))
    errors = []
    for row in signs:
        draw(row[None])
        errors.append(((indirect(p, adjoint(1), 3)[0] - g) ** 2).sum())
    close(torch.stack(errors).mean(), (len(g) - 1) * g @ g, 1e-9)
    rows = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 0.3]], dtype=F64)
    draw(rows)
    mean, stats = indirect(p, adjoint(2), 3)
    samples = (rows @ g)[:, None] * rows
    close(mean, samples.mean(0), 1e-9)
    close(stats["standard_error"], (samples.var(0).sum() / 2).sqrt() / mean.norm(), 1e-8)
    draw(rows[:1])
    assert indirect(p, adjoint(1), 3)[1]["standard_error"].isnan()


@pytest.mark.parametrize(("distribution", "excess"), [("rademacher", -1), ("gaussian", 1)])
def test_directions_have_mean_zero_and_unit_covariance(distribution: Any, excess: int) -> None:
    """Within five standard deviations; and the variance of <g, u> u is (m -+ 1) |g|^2."""
    num, like = 40_000, {"b": torch.zeros((), dtype=F64), "a": torch.zeros(2, 2, dtype=F64)}
    u = torch.stack([ravel(tree.index(lanes.directions(like, 1, distribution), 0)) for _ in range(2)])
    assert not torch.equal(u[0], u[1])
    drawn = lanes.directions(like, num, distribution)
    assert drawn["a"].shape == (num, 2, 2)
    u = torch.cat([drawn["a"].reshape(num, 4), drawn["b"].reshape(num, 1)], 1)
    if distribution == "rademacher":
        assert (u.abs() == 1).all()
    assert u.mean(0).abs().max() < 5 / math.sqrt(num)
    assert ((u.T @ u) / num - torch.eye(5, dtype=F64)).abs().max() < 5 * math.sqrt(2 / num)
    g = f64(1.0, -2.0, 0.5, 0.3, 1.5)
    errors = (((u @ g)[:, None] * u - g) ** 2).sum(1)
    assert abs(errors.mean() - (5 + excess) * g @ g) < 5 * errors.std() / math.sqrt(num)
    assert lanes.directions({"x": torch.zeros(2, dtype=torch.float32)}, 3, distribution)["x"].dtype == torch.float32


def test_a_sketch_averages_towards_the_exact_derivative() -> None:
    """From torch's own generator, within five of the standard errors that it reports."""
    p = PROBLEMS["mlp_reweighting"]
    g, _ = indirect(p, adjoints.Forward(), 3)
    for distribution in ("rademacher", "gaussian"):
        found, stats = indirect(p, adjoints.ForwardSketch(400, distribution), 3)
        error = (found - g).norm() / found.norm()
        assert 0.2 * stats["standard_error"] < error < 3 * stats["standard_error"]
        assert 0.1 < stats["standard_error"] < 0.4  # sqrt(15 / 400) = 0.19


# FiniteDifference


def central(p: Problem, w: Tree, v: Tree, radius: float, batches: Sequence[Tree]) -> Tensor:
    """-(grad_h L(w + eps v) - grad_h L(w - eps v)) / (2 eps) with eps = radius / |v|."""
    eps = radius / ravel(v).norm()

    def gradient(sign: float) -> Tensor:
        h = leaf_grads(p.hparams)
        at = tree_map(lambda x, d: (x + sign * eps * d).detach(), w, v)
        return ravel(derivative(torch.stack([p.inner(at, h, b) for b in batches]).mean(), h))

    return -(gradient(1.0) - gradient(-1.0)) / (2 * eps)


def end_and_cotangent(p: Problem, num_steps: int, row: Any = SGD) -> tuple[Tree, Tree, Tensor]:
    """Where the run ends, f_w and f_h there."""
    w = leaf_grads(loop(p.inner, row, tree_map(torch.clone, p.params), p.hparams, p.steps(num_steps)))
    h = leaf_grads(p.hparams)
    value = p.outer(w, h, p.outer_batch)
    return tree_map(torch.Tensor.detach, w), derivative(value, w, create_graph=True), ravel(derivative(value, h))


@pytest.mark.parametrize("which", ["last", "every"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_finite_difference_is_its_formula(problem: str, which: str) -> None:
    p = PROBLEMS[problem]
    w, f_w, f_h = end_and_cotangent(p, 4)
    adjoint = adjoints.FiniteDifference(radius=0.3, step_size=0.7, select=getattr(linear, which))
    hg = estimate(p, descent(p), adjoint, 4)
    v = tree_map(lambda x: 0.7 * x, f_w)
    batches = p.steps(4)[-1:] if which == "last" else p.steps(4)
    close(ravel(hg.hparams), f_h + central(p, w, v, 0.3, batches), 1e-10)
    close(hg.stats["eps"], 0.3 / ravel(v).norm(), 1e-12)
    assert hg.params == ()
    microbatched = metacal.descent(metacal.microbatched(p.inner, 2), SGD.build()) if problem == "ridge_scalar" else descent(p)
    close(estimate(p, microbatched, adjoint, 4).hparams, hg.hparams, 1e-10)


def test_a_finite_difference_tends_to_t1_t2_as_the_square_of_the_radius() -> None:
    p = PROBLEMS["mlp_reweighting"]
    _, _, f_h = end_and_cotangent(p, 4)
    t1_t2 = ravel(estimate(p, descent(p), adjoints.Implicit(linear.Identity()), 4).hparams) - f_h
    errors = []
    for radius in (0.2, 0.1, 0.05):
        found = ravel(estimate(p, descent(p), adjoints.FiniteDifference(radius, step_size=0.25), 4).hparams) - f_h
        errors.append(relative_error(found, 0.25 * t1_t2))
    assert 3.8 < errors[0] / errors[1] < 4.2
    assert 3.95 < errors[1] / errors[2] < 4.05
    # Where L's gradient by the hparams is quadratic in the params there is nothing beyond the central difference.
    p = PROBLEMS["multi_leaf"]
    exact = estimate(p, descent(p), adjoints.Implicit(linear.Identity()), 4)
    close(estimate(p, descent(p), adjoints.FiniteDifference(radius=2.0), 4).hparams, exact.hparams, 1e-10)


ONE_STEP = {"finite difference": adjoints.FiniteDifference(), "SAMA": adjoints.SAMA()}


@pytest.mark.parametrize("adjoint", ONE_STEP.values(), ids=ONE_STEP)
def test_a_zero_cotangent_gives_zeros_and_a_nan_a_nan(adjoint: Any) -> None:
    p = PROBLEMS["mlp_reweighting"]
    solver = descent(p, OPTIMIZERS["adam"])
    _, pullback = adjoint.vjp(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(3))
    zero = tree_map(torch.zeros_like, p.params)
    assert torch.equal(ravel(pullback(zero).hparams), torch.zeros(15, dtype=F64))
    poisoned = tree_map(torch.clone, zero)
    poisoned["out"][0, 0] = float("nan")
    assert ravel(pullback(poisoned).hparams).isnan().any()
    assert pullback(poisoned).stats["eps"].isnan()


@pytest.mark.parametrize("adjoint", ONE_STEP.values(), ids=ONE_STEP)
def test_a_run_with_carry_is_differenced_at_its_last_statistics(adjoint: Any) -> None:
    net, solver, outer, h, batches = batch_norm_problem()
    state = solver.init(net.params, h)
    exact = metacal.hypergradient(outer, solver, adjoints.Implicit(linear.Identity()))(state, h, batches, ())
    hg = metacal.hypergradient(outer, solver, adjoint)(state, h, batches, ())
    scale = 0.1 if isinstance(adjoint, adjoints.SAMA) else 1.0
    close(hg.hparams, scale * exact.hparams, 1e-4)  # O(radius^2)
    close(hg.state.carry, exact.state.carry, 1e-14)


# SAMA


def last_step(p: Problem, row: Any, num_steps: int) -> tuple[list[Tensor], list[Any], list[Tensor]]:
    """Params, optimizer states and gradient at which the last step is taken, by the written-out formulas."""
    ws, states = leaves(p.params), [{} for _ in leaves(p.params)]
    for t, batch in enumerate(p.steps(num_steps), start=1):
        live = [w.detach().requires_grad_() for w in ws]
        gs = torch.autograd.grad(p.inner(unravel(p.params, torch.cat([w.reshape(-1) for w in live])), p.hparams, batch), live)
        if t == num_steps:
            return ws, states, list(gs)
        pairs = [row.step(w, g, s, t, row.formula_hyper) for w, g, s in zip(ws, gs, states, strict=True)]
        ws, states = [w for w, _ in pairs], [s for _, s in pairs]
    raise AssertionError


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", ["logistic_exp_reg", "mlp_reweighting", "zero_dim"])
def test_sama_is_its_formula_for_every_optimizer(problem: str, optimizer: str) -> None:
    """D by differentiating the published formula of the last update, leaf by leaf."""
    p, row, num_steps = PROBLEMS[problem], OPTIMIZERS[optimizer], 4
    w, f_w, f_h = end_and_cotangent(p, num_steps, row)
    v = []
    for x, s, g, ct in zip(*last_step(p, row, num_steps), leaves(f_w), strict=True):
        g = g.detach().requires_grad_()
        after, _ = row.step(x, g, s, num_steps, row.formula_hyper)
        v.append(-torch.autograd.grad(after, g, ct)[0])
    v = unravel(p.params, torch.cat([x.reshape(-1) for x in v]))
    hg = estimate(p, descent(p, row), adjoints.SAMA(radius=0.3), num_steps)
    close(hg.state.params, w, 1e-12)
    close(ravel(hg.hparams), f_h + central(p, w, v, 0.3, p.steps(num_steps)[-1:]), 1e-9)
    close(hg.stats["adaptation"], ravel(v).norm() / ravel(f_w).norm(), 1e-9)


def test_sama_for_sgd_is_a_finite_difference_with_the_inner_rate() -> None:
    for p in PROBLEMS.values():
        one = estimate(p, descent(p), adjoints.SAMA(radius=0.1), 3)
        two = estimate(p, descent(p), adjoints.FiniteDifference(radius=0.1, step_size=0.1), 3)
        close(one.hparams, two.hparams, 1e-13)


def test_sama_for_adam_has_the_closed_form_of_its_derivative() -> None:
    """Unbiased m, v after the last step: du/dg = lr / c1 (b1' (sqrt(v/c2) + eps) - m b2' g / (c2 sqrt(v/c2))) / (sqrt(v/c2) + eps)^2."""
    p, (b1, b2), lr, eps, T = PROBLEMS["logistic_exp_reg"], (0.9, 0.999), 0.1, 1e-8, 3
    _, (s,), (g,) = last_step(p, OPTIMIZERS["adam"], T)
    m, v = b1 * s["m"] + (1 - b1) * g, b2 * s["v"] + (1 - b2) * g * g
    c1, c2 = 1 - b1**T, 1 - b2**T
    root = (v / c2).sqrt()
    D = lr / c1 * ((1 - b1) * (root + eps) - m * (1 - b2) * g / (c2 * root)) / (root + eps) ** 2
    w, f_w, f_h = end_and_cotangent(p, T, OPTIMIZERS["adam"])
    direction = tree_map(lambda ct: D * ct, f_w)
    hg = estimate(p, descent(p, OPTIMIZERS["adam"]), adjoints.SAMA(radius=0.01), T)
    close(ravel(hg.hparams), f_h + central(p, w, direction, 0.01, p.steps(1)), 1e-9)


def test_sama_transposes_an_update_that_is_not_elementwise() -> None:
    """Clipping by the norm of all leaves, then momentum: D is a dense matrix."""
    p, T = PROBLEMS["mlp_reweighting"], 3
    solver = metacal.descent(p.inner, optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.5, momentum=0.9)))
    before = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(T - 1))
    x = leaf_grads(before.params)
    g = ravel(derivative(p.inner(x, p.hparams, p.steps(T)[-1]), x)).detach()
    assert g.norm() > 0.1
    # d/dg of -lr (c g): the momentum of before is a constant.
    c = 0.1 / (g.norm() + 1e-6)
    dense = 0.5 * (c * torch.eye(len(g), dtype=F64) - 0.1 / (g.norm() + 1e-6) ** 2 / g.norm() * torch.outer(g, g))
    hg = estimate(p, solver, adjoints.SAMA(radius=0.2), T)
    w = leaf_grads(hg.state.params)
    f_w = ravel(derivative(p.outer(w, p.hparams, p.outer_batch), w))
    v = unravel(p.params, dense.T @ f_w)
    close(ravel(hg.hparams), central(p, hg.state.params, v, 0.2, p.steps(T)[-1:]), 1e-8)


def test_an_update_that_does_not_respond_to_the_gradient_shows_in_the_statistics() -> None:
    p = PROBLEMS["ridge_scalar"]
    assert float(estimate(p, metacal.descent(p.inner, optim.sgd(0.0)), adjoints.SAMA(), 1).stats["adaptation"]) == 0
    assert float(estimate(p, descent(p), adjoints.SAMA(), 1).stats["adaptation"]) == pytest.approx(0.1)


# ZerothOrder


def test_zeroth_order_over_every_sign_vector_is_exact_for_a_run_that_is_linear_in_the_hparams(draw: Any) -> None:
    p = PROBLEMS["quadratic_bilevel"]
    signs = every_sign(3)
    exact = unrolled_gradient(p, OPTIMIZERS["momentum0.9"], 4)
    for radius, chunk_size in ((0.01, 1), (1.0, 3), (1.0, None)):
        draw(signs)
        adjoint = adjoints.ZerothOrder(8, radius, chunk_size=chunk_size)
        hg = estimate(p, descent(p, OPTIMIZERS["momentum0.9"]), adjoint, 4)
        close(hg.hparams, exact.hparams, 1e-10)
        close(hg.value, exact.value, 1e-12)


@pytest.mark.parametrize("problem", ["logistic_exp_reg", "multi_leaf"])
def test_the_bias_of_zeroth_order_is_the_square_of_the_radius(problem: str, draw: Any) -> None:
    p = PROBLEMS[problem]
    signs = every_sign(len(ravel(p.hparams)))
    exact, _ = indirect(p, adjoints.Forward(), 4, OPTIMIZERS["adam"])
    errors = []
    for radius in (0.08, 0.04, 0.02):
        draw(signs)
        found, _ = indirect(p, adjoints.ZerothOrder(len(signs), radius, chunk_size=None), 4, OPTIMIZERS["adam"])
        errors.append(float((found - exact).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.85 < errors[1] / errors[2] < 4.15


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_zeroth_order_needs_no_derivative_of_the_run(chunk_size: int | None, draw: Any) -> None:
    """A quantised rule, and with one direction at a time even a branch on the values: written out for each direction."""
    rows = torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.5, 2.0]], dtype=F64)
    h, radius, ct = f64(8.0, 3.0), 2.0, f64(1.0, -0.5)

    def quantised(w: Tensor, h: Tensor, b: Tree) -> Tensor:
        moved = torch.round(w / 2 + h)
        if chunk_size == 1 and float(moved.detach().sum()) > 20:
            moved = moved - 1
        return moved

    def end(h: Tensor) -> Tensor:
        w = torch.zeros(2, dtype=F64)
        for _ in range(5):
            w = quantised(w, h, ())
        return w

    solver = metacal.fixed_point(quantised)
    draw(rows)
    adjoint = adjoints.ZerothOrder(3, radius, chunk_size=chunk_size)
    hg = metacal.hypergradient(lambda w, h, b: ct @ w, solver, adjoint)(solver.init(torch.zeros(2, dtype=F64), h), h, [()] * 5, ())
    slopes = torch.stack([ct @ (end(h + radius * u) - end(h - radius * u)) / (2 * radius) for u in rows])
    close(hg.hparams, (slopes[:, None] * rows).mean(0), 1e-14)
    assert slopes.abs().min() > 0
    exact = metacal.hypergradient(lambda w, h, b: ct @ w, solver, adjoints.Unrolled(mode="reverse"))(
        solver.init(torch.zeros(2, dtype=F64), h), h, [()] * 5, ()
    )
    assert torch.equal(exact.hparams, torch.zeros(2, dtype=F64)), "the derivative itself says nothing"


def test_the_tangent_of_zeroth_order_is_a_central_difference() -> None:
    p = PROBLEMS["mlp_reweighting"]
    solver = descent(p, OPTIMIZERS["momentum0.9"])
    state = solver.init(p.params, p.hparams)
    t = tuple(tree_map(torch.cos, x) for x in (p.params, p.hparams))
    exact = ravel(adjoints.Forward().jvp(solver, state, p.hparams, p.steps(3), *t))
    errors = []
    for radius in (0.2, 0.1, 0.05):
        found = adjoints.ZerothOrder(1, radius).jvp(solver, state, p.hparams, p.steps(3), *t)
        errors.append(relative_error(ravel(found), exact))
    assert 3.9 < errors[0] / errors[1] < 4.1
    assert 3.95 < errors[1] / errors[2] < 4.05


# Laws for all of them

NUM_STEPS = 3
ALL: dict[str, Any] = {
    "forward": adjoints.Forward(),
    "forward, one by one": adjoints.Forward(chunk_size=1),
    "sketch": adjoints.ForwardSketch(3),
    "finite difference": adjoints.FiniteDifference(),
    "SAMA": adjoints.SAMA(),
    "zeroth order": adjoints.ZerothOrder(2, chunk_size=None),
    "zeroth order, one by one": adjoints.ZerothOrder(2),
}
DRAWS = ("sketch", "zeroth order", "zeroth order, one by one")
every_method = pytest.mark.parametrize("method", ALL)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize(("method", "optimizer"), [(m, o) for m in ALL for o in (OPTIMIZERS if m in ("forward", "SAMA") else ("adam",))])
def test_vmap_over_tasks_is_a_stack_of_single_calls(method: str, optimizer: str, randomness: str) -> None:
    if randomness == "different" and (method not in DRAWS):
        randomness = "error"  # the default: nothing is drawn
    p, adjoint = PROBLEMS["multi_leaf"], ALL[method]
    solver = descent(p, OPTIMIZERS[optimizer])
    single = metacal.hypergradient(p.outer, solver, adjoint)

    def tasks(value: Tree) -> Tree:
        return tree_map(lambda x: torch.stack([x + s * torch.cos(x) for s in (0.3, -0.5)]), value)

    def call(w: Tree, h: Tree, bs: Any, ob: Any) -> metacal.HyperGradient:
        return single(solver.init(w, h), h, bs, ob)

    hparams, batches, outer_batch = tasks(p.hparams), [tasks(b) for b in p.steps(2)], tasks(p.outer_batch)
    torch.manual_seed(3)
    mapped = torch.func.vmap(call, in_dims=(None, 0, 0, 0), randomness=randomness)(p.params, hparams, batches, outer_batch)
    drawn = lanes.directions
    for i in range(2):
        torch.manual_seed(3)
        h = tree.index(hparams, i)
        if randomness == "different":  # one draw for all tasks, whose axis is the first
            num = getattr(adjoint, "num_directions", 1)
            with _random.apart() if method == "sketch" else contextlib.nullcontext():
                every = torch.func.vmap(lambda h, num=num: drawn(h, num, "rademacher"), randomness="different")(hparams)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lanes, "directions", lambda *_, i=i, every=every: tree.index(every, i))
                one = call(p.params, h, [tree.index(b, i) for b in batches], tree.index(outer_batch, i))
        else:
            one = call(p.params, h, [tree.index(b, i) for b in batches], tree.index(outer_batch, i))
        close(mapped.value[i], one.value, 1e-12)
        close(tree.index(mapped.hparams, i), one.hparams, 1e-9)
        for name, number in one.stats.items():
            close(mapped.stats[name][i], number.to(F64), 1e-9)


def noisy(p: Tree, h: Tree, b: Tree) -> Tensor:
    """Dropout, additive noise and a random permutation."""
    x, y = b
    kept = F.dropout(x, 0.4)
    weights, order = torch.rand(len(y), dtype=F64), torch.randperm(len(y))
    z = (F.dropout(kept @ (p["w"] + 0.1 * torch.randn(3, dtype=F64)), 0.2) - y)[order]
    return 0.5 * (weights * z**2).mean() + 0.5 * (h["lam"].exp() * p["w"] ** 2).sum() + h["lam"].sum() * (weights * z).mean()


def noisy_problem() -> Problem:
    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        x, y = b
        return 0.5 * ((F.dropout(x, 0.3) @ p["w"] - y) ** 2).mean()

    return Problem("noisy", noisy, outer, {"w": f64(0.3, -0.2, 0.5)}, {"lam": f64(-1.0, 0.0, -0.5)}, (TRAIN,), VALID, step_size=0.2)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_all_directions_of_a_step_see_its_noise(optimizer: str, chunk_size: int | None, draw: Any) -> None:
    p, row = noisy_problem(), OPTIMIZERS[optimizer]
    torch.manual_seed(7)
    truth = unrolled_gradient(p, row, 5)
    after = torch.get_rng_state()
    signs = every_sign(3)
    for adjoint, tolerance in (
        (adjoints.Forward(chunk_size), 1e-10),
        (adjoints.ForwardSketch(8, chunk_size=chunk_size), 1e-10),
        (adjoints.ZerothOrder(8, 1e-4, chunk_size=chunk_size), 1e-6),
    ):
        draw(signs)
        torch.manual_seed(7)
        hg = estimate(p, descent(p, row), adjoint, 5)
        close(hg.value, truth.value, 1e-12)
        close(hg.hparams, truth.hparams, tolerance)
        if not isinstance(adjoint, adjoints.ForwardSketch):  # whose pullback draws a number
            assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("method", ONE_STEP)
def test_both_sides_of_a_difference_see_one_realisation_of_noise(method: str) -> None:
    """That which comes after the run, as the linear systems of Implicit do."""
    p = noisy_problem()
    torch.manual_seed(7)
    w = loop(p.inner, SGD, tree_map(torch.clone, p.params), p.hparams, p.steps(3))
    following = torch.get_rng_state()
    at = leaf_grads(w)
    ct = derivative(p.outer(at, p.hparams, p.outer_batch), at)
    frozen = Problem(
        "frozen", lambda w, h, b: (torch.set_rng_state(following), noisy(w, h, b))[1], p.outer, p.params, p.hparams, p.batches, (), 0.1
    )
    truth = central(frozen, w, tree_map(lambda x: 0.1 * x, ct), 0.01, p.batches)
    torch.manual_seed(7)
    adjoint = adjoints.SAMA() if method == "SAMA" else adjoints.FiniteDifference(step_size=0.1)
    hg = estimate(p, descent(p), adjoint, 3)
    close(ravel(hg.hparams), truth, 1e-9)  # the outer objective has no direct part


@every_method
def test_the_generator_ends_where_run_and_outer_leave_it_but_for_the_directions(method: str) -> None:
    p, num = noisy_problem(), getattr(ALL[method], "num_directions", 0)
    solver = descent(p, OPTIMIZERS["adam"])
    state = solver.init(p.params, p.hparams)
    torch.manual_seed(5)
    end = metacal.run(solver, state, p.hparams, p.steps(4))
    if method.startswith("zeroth"):
        lanes.directions(p.hparams, num, "rademacher")
    value = p.outer(end.params, p.hparams, p.outer_batch)
    if method == "sketch":
        torch.rand(())
    after = torch.get_rng_state()
    torch.manual_seed(5)
    hg = metacal.hypergradient(p.outer, solver, ALL[method])(state, p.hparams, p.steps(4), p.outer_batch)
    close(hg.value, value, 1e-13)
    close(hg.state.params, end.params, 1e-13)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("method", ["forward", "sketch"])
def test_a_solve_under_a_transform_sees_the_noise_of_its_repetition(method: str, draw: Any) -> None:
    """The forward run of ``torch.func.grad`` and the one that its backward repeats."""
    p = noisy_problem()
    solver = descent(p, OPTIMIZERS["adam"])
    torch.manual_seed(7)
    truth = unrolled_gradient(p, OPTIMIZERS["adam"], 3).hparams

    def value(h: Tree) -> Tensor:
        torch.manual_seed(7)
        adjoint = adjoints.ForwardSketch(8) if method == "sketch" else adjoints.Forward()
        return p.outer(metacal.solve(solver, p.params, h, p.steps(3), adjoint), h, p.outer_batch)

    draw(every_sign(3))
    close(torch.func.grad(value)(p.hparams), truth, 1e-10)
    leaf = leaf_grads(p.hparams)
    draw(every_sign(3))
    value(leaf).backward()
    close(tree_map(lambda x: x.grad, leaf), truth, 1e-10)


def test_a_sketched_solve_is_one_number_by_both_ways_of_differentiating_it() -> None:
    """Its directions are its own: neither way's run sees other noise because of them."""
    p = noisy_problem()
    solver = descent(p, OPTIMIZERS["adam"])

    def value(h: Tree) -> Tensor:
        torch.manual_seed(7)
        return p.outer(metacal.solve(solver, p.params, h, p.steps(3), adjoints.ForwardSketch(2)), h, p.outer_batch)

    leaf = leaf_grads(p.hparams)
    value(leaf).backward()
    close(torch.func.grad(value)(p.hparams), tree_map(lambda x: x.grad, leaf), 1e-12)


def test_the_sketch_draws_new_directions_every_time_and_the_same_for_a_seed() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    call = lambda: estimate(p, descent(p), adjoints.ForwardSketch(1), 2).hparams["lam"]  # noqa: E731
    torch.manual_seed(0)
    found = [call() for _ in range(12)]
    assert len({tuple(x.sign().tolist()) for x in found}) > 2
    torch.manual_seed(0)
    assert torch.equal(found[0], call())


@every_method
def test_inputs_are_untouched_and_two_calls_agree_bit_for_bit(method: str) -> None:
    p = PROBLEMS["multi_leaf"]
    solver = metacal.descent(p.inner, optim.sgd(0.05, momentum=0.9))
    params, hparams = (tree_map(lambda x: nn.Parameter(x.clone()), x) for x in (p.params, p.hparams))
    state = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(2))._replace(params=params)
    everything = leaves((tuple(state), hparams, p.batches, p.outer_batch))
    before = [(x.detach().clone(), x._version, x.requires_grad) for x in everything]
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(metacal.hypergradient(p.outer, solver, ALL[method])(state, hparams, p.steps(3), p.outer_batch))
    assert torch.equal(ravel(found[0].hparams), ravel(found[1].hparams))
    for x, (value, version, requires_grad) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
        assert x.requires_grad == requires_grad
        assert x.grad is None
    for result in (found[0].value, *leaves(found[0].hparams), *leaves(found[0].state.params), *found[0].stats.values()):
        assert not result.requires_grad


@every_method
def test_a_nan_never_becomes_a_zero(method: str) -> None:
    p = PROBLEMS["ridge_scalar"]
    batches = [(p.batches[0], f64(float("nan") if t == 2 else 1.0)) for t in range(4)]
    solver = metacal.descent(lambda w, h, b: p.inner(w, h, b[0]) * b[1], optim.sgd(0.1))
    hg = metacal.hypergradient(p.outer, solver, ALL[method])(solver.init(p.params, p.hparams), p.hparams, batches, p.outer_batch)
    assert hg.value.isnan()
    assert hg.hparams["lam"].isnan()
    assert int(hg.stats["first_bad_step"]) == 2


@every_method
def test_the_smallest_cases(method: str, draw: Any) -> None:
    """Empty hparams, one without influence, 0-dim and one-element problems, no step."""
    p, adjoint = PROBLEMS["logistic_exp_reg"], ALL[method]
    for empty in ({}, ()):
        solver = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.1))
        run = metacal.hypergradient(lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoint)
        hg = run(solver.init(p.params, empty), empty, p.steps(2), p.outer_batch)
        assert hg.hparams == empty
        close(hg.state.params, loop(p.inner, SGD, tree_map(torch.clone, p.params), p.hparams, p.steps(2)), 1e-13)
    unused = {"unused": f64(1.0, 2.0)}
    run = metacal.hypergradient(lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoint)
    assert run(solver.init(p.params, unused), unused, p.steps(2), p.outer_batch).hparams["unused"].tolist() == [0.0, 0.0]
    for name in ("zero_dim", "one_element"):
        small = PROBLEMS[name]
        truth = unrolled_gradient(small, SGD, 3)
        if method in DRAWS:  # with one hyperparameter every sign is the whole derivative
            draw(*[every_sign(1)[:1].expand(adjoint.num_directions, 1)])
        found = estimate(small, descent(small), adjoint, 3).hparams
        if method in ONE_STEP:
            w, f_w, f_h = end_and_cotangent(small, 3)
            v = tree_map(lambda x: (0.1 if method == "SAMA" else 1.0) * x, f_w)
            close(ravel(found), f_h + central(small, w, v, 0.01, small.steps(1)), 1e-10)
        else:
            close(found, truth.hparams, 1e-3 if "zeroth" in method else 1e-10)
    small, solver = PROBLEMS["ridge_scalar"], descent(PROBLEMS["ridge_scalar"])
    if method in ONE_STEP:
        with pytest.raises(ValueError, match=r"`batches`.*at least one batch.*\[batch\]"):
            estimate(small, solver, adjoint, 0)
    else:
        if method in DRAWS:
            draw(torch.ones(adjoint.num_directions, 1, dtype=F64))
        assert estimate(small, solver, adjoint, 0).hparams["lam"].tolist() == 0.0


@pytest.mark.parametrize("method", ["forward", "sketch", "finite difference", "SAMA", "zeroth order, one by one"])
def test_memory_does_not_grow_over_outer_steps(method: str) -> None:
    p = PROBLEMS["multi_leaf"]
    outer_loop = metacal.nested(p.outer, metacal.descent(p.inner, optim.sgd(0.05, momentum=0.9)), ALL[method], optim.adam(0.01))
    state = outer_loop.init(p.params, p.hparams)

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return len(tensors), sum(x.numel() for x in tensors)

    seen = []
    for _ in range(2):
        for _ in range(2):
            state, hg = outer_loop.step(state, p.steps(2), p.outer_batch)
            del hg
        seen.append(live())
    assert seen[0] == seen[1]


# Derivatives of the estimates


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@every_method
def test_derivatives_of_an_estimate_are_those_of_its_own_function(method: str, optimizer: str) -> None:
    """Against central differences of the estimate itself, its directions drawn from the same seed."""
    p = PROBLEMS["logistic_exp_reg"]
    adjoint = adjoints.FiniteDifference(radius=0.3) if method == "finite difference" else ALL[method]
    adjoint = adjoints.ZerothOrder(2, 0.1, chunk_size=adjoint.chunk_size) if "zeroth" in method else adjoint
    solver = descent(p, OPTIMIZERS[optimizer])
    run = metacal.hypergradient(p.outer, solver, adjoint)

    def call(lam: Tensor) -> metacal.HyperGradient:
        torch.manual_seed(4)
        h = {"lam": lam}
        return run(solver.init(p.params, h), h, p.steps(2), p.outer_batch)

    def gradient(lam: Tensor) -> Tensor:
        return call(lam).hparams["lam"]

    at, d = p.hparams["lam"], 1e-4
    columns = [(8 * (gradient(at + d * e) - gradient(at - d * e)) - gradient(at + 2 * d * e) + gradient(at - 2 * d * e)) / (12 * d)
               for e in torch.eye(3, dtype=F64)]  # fmt: skip
    truth = torch.stack(columns, 1)
    close(torch.func.jacrev(gradient)(at), truth, 1e-6)
    close(torch.func.jacfwd(gradient, randomness="same")(at), truth, 1e-6)
    e = f64(1.0, -0.5, 0.3)
    close(torch.func.jvp(gradient, (at,), (e,))[1], truth @ e, 1e-6)
    exact = unrolled_gradient(p, OPTIMIZERS[optimizer], 2).hparams["lam"]
    close(torch.func.grad(lambda lam: call(lam).value)(at), exact, 1e-10)  # the run itself is differentiated as it is
    leaf = at.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):  # outside of transforms an estimate is cut off
        torch.autograd.grad(gradient(leaf).sum(), leaf)


@every_method
def test_the_pullback_is_linear_where_somebody_differentiates_it_by_plain_autograd(method: str) -> None:
    """By the cotangent alone, nothing else in a graph: d <e, pullback(ct)> / d ct, against central differences."""
    p, adjoint = PROBLEMS["mlp_reweighting"], ALL[method]
    if method in ONE_STEP:
        adjoint = type(adjoint)(radius=0.3)
    solver = descent(p, OPTIMIZERS["momentum0.9"])
    state = solver.init(p.params, p.hparams)
    pullback = adjoint.vjp(solver, state, p.hparams, p.steps(2))[1]
    ct = tree_map(lambda x: torch.cos(torch.arange(x.numel(), dtype=F64)).reshape(x.shape), p.params)
    e = torch.sin(torch.arange(15, dtype=F64))

    def value(ct: Tree) -> Tensor:
        return ravel(pullback(ct).hparams) @ e

    leaf = leaf_grads(ct)
    found = ravel(derivative(value(leaf), leaf))
    t = torch.sin(1 + torch.arange(len(found), dtype=F64))
    d = 1e-3
    ahead, behind = (value(tree_map(lambda x, y, s=s: x + s * d * y, ct, unravel(ct, t))) for s in (1, -1))
    close(found @ t, (ahead - behind) / (2 * d), 1e-6)


@every_method
def test_solve_is_differentiated_by_the_same_number(method: str) -> None:
    """The torch door and torch.func's gradient of it equal the estimate; the initial params get nothing."""
    p, adjoint = PROBLEMS["multi_leaf"], ALL[method]
    solver = descent(p, OPTIMIZERS["adam"])
    torch.manual_seed(1)
    hg = estimate(p, solver, adjoint, 3)

    def value(params: Tree, hparams: Tree, stats: Any = None) -> Tensor:
        torch.manual_seed(1)
        return p.outer(metacal.solve(solver, params, hparams, p.steps(3), adjoint, stats=stats), hparams, p.outer_batch)

    params, hparams, stats = leaf_grads(p.params), leaf_grads(p.hparams), {}
    value(params, hparams, stats).backward()
    close(tree_map(lambda x: x.grad, hparams), hg.hparams, 1e-12)
    assert all(x.grad is None for x in leaves(params))
    close(list(stats.values()), [hg.stats[name].to(F64) for name in stats], 1e-9)
    close(torch.func.grad(lambda h: value(p.params, h))(p.hparams), hg.hparams, 1e-10)


def test_a_solve_inside_an_inner_objective() -> None:
    """Three levels against plain nested loops; where the lowest is asked for tangents, an adjoint without them refuses."""
    i = torch.arange(3, dtype=F64)
    x0, y0, z = torch.zeros(3, dtype=F64), 0.1 * torch.ones(3, dtype=F64), torch.cos(i)

    def lowest(x: Tensor, h: Any, b: Tree) -> Tensor:
        y, z = h
        return 0.5 * ((x - y) ** 2).sum() + 0.1 * (torch.exp(z) * x**2).sum()

    def middle_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((x - torch.sin(z)) ** 2).sum() + 0.05 * (y**4).sum() + 0.1 * (x * y * z).sum()

    inmost = metacal.descent(lowest, optim.sgd(0.3))

    def hypergradient(adjoint: Any, outermost: Any = adjoints.Unrolled()) -> Tensor:
        def middle(y: Tensor, z: Tensor, b: Tree) -> Tensor:
            return middle_of(metacal.solve(inmost, x0, (y, z), metacal.repeat((), 3), adjoint), y, z)

        solver = metacal.descent(middle, optim.sgd(0.3))
        run = metacal.hypergradient(lambda y, z, b: (y**3).sum(), solver, outermost)
        return run(solver.init(y0, z), z, metacal.repeat((), 2), ()).hparams

    leaf, y = z.clone().requires_grad_(), y0.clone().requires_grad_()
    for _ in range(2):
        x = x0.clone().requires_grad_()
        for _ in range(3):
            x = x - 0.3 * torch.autograd.grad(lowest(x, (y, leaf), ()), x, create_graph=True)[0]
        y = y - 0.3 * torch.autograd.grad(middle_of(x, y, leaf), y, create_graph=True)[0]
    close(hypergradient(adjoints.Forward()), torch.autograd.grad((y**3).sum(), leaf)[0], 1e-10)
    for adjoint in ONE_STEP.values():
        close(hypergradient(adjoint), hypergradient(adjoint, adjoints.Unrolled(mode="reverse")), 1e-12)
        with pytest.raises(NotImplementedError, match=r"no forward-mode rule.*Unrolled\(mode='reverse'\)"):
            hypergradient(adjoint, adjoints.Forward())


# Evolution strategies over truncated unrolls


@pytest.mark.parametrize("chunk_size", [7, None])
def test_pes_sees_the_whole_past_and_es_one_unroll(chunk_size: int | None, draw: Any) -> None:
    """Linear dynamics, a quadratic outer objective, and every sequence of sign vectors over three unrolls: expectations, exactly."""
    p, row, K = PROBLEMS["quadratic_bilevel"], OPTIMIZERS["momentum0.9"], 2
    sequences = every_sign(9).reshape(512, 3, 3)
    sequences = sequences[sequences[:, 0, 0] > 0]  # the others are their mirror images, which a pair has already
    for method, window in ((evolution.pes, None), (evolution.es, K)):
        draw(*sequences.unbind(1))
        optimizer = method(p.outer, descent(p, row), optim.sgd(0.0), 512, 0.3, chunk_size=None if chunk_size is None else 200)
        state = optimizer.init(p.params, p.hparams)
        for unroll in (1, 2, 3):
            state, hg = optimizer.step(state, p.steps(K), p.outer_batch)
            close(hg.hparams, unrolled_gradient(p, row, K * unroll, window).hparams, 1e-9)
    assert relative_error(hg.hparams, unrolled_gradient(p, row, 3 * K).hparams) > 0.05, "a bias that is none tests nothing"


@pytest.mark.parametrize("method", [evolution.pes, evolution.es])
def test_two_pairs_written_out(method: Any, draw: Any) -> None:
    """Three outer steps with an outer optimizer that moves, the inner problem beginning again after two."""
    p, row, radius = PROBLEMS["mlp_reweighting"], OPTIMIZERS["momentum0.9"], 0.2
    us = [torch.cos(s + torch.arange(30, dtype=F64)).reshape(2, 15) for s in range(3)]
    optimizer = method(p.outer, descent(p, row), optim.sgd(0.5, momentum=0.9), 4, radius, unrolls=2)
    draw(*us)
    state = optimizer.init(p.params, p.hparams)

    h, buffer, data = ravel(p.hparams), torch.zeros(15, dtype=F64), p.steps(2)
    past: list[list[Tensor]] = [[], [], [], []]  # the hparams of every inner step that a particle has taken
    xi = torch.zeros(2, 15, dtype=F64)
    for outer_step, u in enumerate(us):
        if outer_step == 2:
            past, xi = [[], [], [], []], torch.zeros(2, 15, dtype=F64)
        ends, values = [], []
        for i, sign in enumerate((1, 1, -1, -1)):
            past[i] += [h + sign * radius * u[i % 2]] * 2
            hs = torch.stack(past[i])

            def inner(w: Tree, _: Tree, b: Tree, hs: Tensor = hs) -> Tensor:
                return p.inner(w, unravel(p.hparams, hs[b["t"]]), b)

            batches = [{**data[t % 2], "t": t} for t in range(len(hs))]
            w = loop(inner, row, tree_map(torch.clone, p.params), (), batches)
            ends.append(ravel(w).detach())
            values.append(p.outer(w, unravel(p.hparams, hs[-1]), p.outer_batch).detach())
        xi = xi + u if method is evolution.pes else u
        slopes = torch.stack([(values[i] - values[i + 2]) / (2 * radius) for i in range(2)])
        gradient = (slopes[:, None] * xi).mean(0)
        buffer = 0.9 * buffer + gradient
        h = h - 0.5 * buffer

        state, hg = optimizer.step(state, data, p.outer_batch)
        close(ravel(hg.hparams), gradient, 1e-10)
        close(hg.value, torch.stack(values).mean(), 1e-12)
        close(torch.stack([ravel(tree.index(hg.state.params, i)) for i in range(4)]), torch.stack(ends), 1e-12)
        close(ravel(state.hparams), h, 1e-12)
        assert int(state.step) == outer_step + 1
        assert hg.params == ()
        restarted = outer_step == 1
        start = torch.stack([ravel(p.params)] * 4)
        close(torch.stack([ravel(tree.index(state.inner.params, i)) for i in range(4)]), start if restarted else torch.stack(ends), 1e-12)


def test_particles_in_chunks_in_the_end_of_a_run_and_over_tasks() -> None:
    """The same numbers for every chunk size, after a save in the middle, and under vmap."""
    p = PROBLEMS["logistic_exp_reg"]
    data = [(p.steps(2), p.outer_batch)] * 3

    def optimizer(chunk_size: int | None) -> metacal.BilevelOptimizer:
        return evolution.pes(p.outer, descent(p, OPTIMIZERS["adam"]), optim.adam(0.05), 6, 0.1, unrolls=2, chunk_size=chunk_size)

    def last(opt: metacal.BilevelOptimizer, state: Any, data: Any = data) -> Any:
        return list(metacal.iterate(opt, state, data))[-1]

    torch.manual_seed(2)
    state, hg = last(optimizer(1), optimizer(1).init(p.params, p.hparams))
    after = torch.get_rng_state()
    for chunk_size in (2, 4, None):
        torch.manual_seed(2)
        again, other = last(optimizer(chunk_size), optimizer(chunk_size).init(p.params, p.hparams))
        close(again.hparams, state.hparams, 1e-12)
        close(other.hparams, hg.hparams, 1e-10)
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(2)
    halfway, _ = last(optimizer(1), optimizer(1).init(p.params, p.hparams), data[:1])
    loaded = tree.load_state_dict(optimizer(1).init(p.params, p.hparams), tree.state_dict(halfway))
    resumed, _ = last(optimizer(1), loaded, data[1:])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(resumed), tree.leaves(state), strict=True))

    def run(lam: Tensor) -> Tensor:
        torch.manual_seed(2)
        return last(optimizer(None), optimizer(None).init(p.params, {"lam": lam}))[0].hparams["lam"]

    lams = torch.stack([p.hparams["lam"], p.hparams["lam"] + 0.3])
    close(torch.func.vmap(run, randomness="same")(lams), torch.stack([run(lam) for lam in lams]), 1e-11)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_particles_share_their_noise(chunk_size: int | None, draw: Any) -> None:
    """Particles that are not perturbed are one run; so the halves of a pair differ by the hyperparameters alone."""
    p = noisy_problem()
    solver = descent(p, OPTIMIZERS["adam"])
    outer = metacal.with_aux(lambda w, h, b: (p.outer(w, h, b), {"norm": w["w"].norm()}))
    optimizer = evolution.pes(outer, solver, optim.sgd(0.1), 6, 0.1, chunk_size=chunk_size)
    start = optimizer.init(p.params, p.hparams)
    torch.manual_seed(7)
    end = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(3))
    value = p.outer(end.params, p.hparams, p.outer_batch)
    after = torch.get_rng_state()
    draw(torch.zeros(3, 3, dtype=F64))
    torch.manual_seed(7)
    _, hg = optimizer.step(start, p.steps(3), p.outer_batch)
    assert torch.equal(torch.get_rng_state(), after)
    close(hg.value, value, 1e-13)
    close(hg.aux["norm"], end.params["w"].norm(), 1e-13)
    assert hg.hparams["lam"].tolist() == [0.0, 0.0, 0.0]


def test_evolution_reports_what_is_not_a_number() -> None:
    p = PROBLEMS["ridge_scalar"]
    batches = [(p.batches[0], f64(float("nan") if t == 1 else 1.0)) for t in range(3)]
    solver = metacal.descent(lambda w, h, b: p.inner(w, h, b[0]) * b[1], optim.sgd(0.1))
    for chunk_size in (1, None):
        optimizer = evolution.pes(p.outer, solver, optim.sgd(0.1), 4, 0.1, chunk_size=chunk_size)
        state, hg = optimizer.step(optimizer.init(p.params, p.hparams), batches, p.outer_batch)
        assert int(hg.stats["first_bad_step"]) == 1
        assert hg.hparams["lam"].isnan()
        assert state.hparams["lam"].isnan()
    good = optimizer.step(optimizer.init(p.params, p.hparams), batches[2:], p.outer_batch)[1]
    assert int(good.stats["first_bad_step"]) == -1
    assert good.stats["standard_error"].isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_particles": 3}, r"`num_particles`.*even.*3"),
        ({"num_particles": 0}, r"`num_particles`.*integer of at least 1.*0"),
        ({"radius": 0.0}, r"`radius`.*positive"),
        ({"unrolls": 0}, r"`unrolls`.*integer of at least 1"),
        ({"distribution": "cauchy"}, r"`distribution`.*'cauchy'"),
        ({"chunk_size": -1}, r"`chunk_size`.*integer of at least 1"),
    ],
)
def test_bad_settings_of_an_evolution_strategy_are_refused(settings: dict[str, Any], message: str) -> None:
    p = PROBLEMS["ridge_scalar"]
    for method in (evolution.pes, evolution.es):
        with pytest.raises(ValueError, match=message):
            method(p.outer, descent(p), optim.sgd(0.1), **{"num_particles": 2, "radius": 0.1, **settings})


def test_an_evolution_strategy_needs_hparams_and_a_sequence() -> None:
    p = PROBLEMS["ridge_scalar"]
    optimizer = evolution.es(p.outer, descent(p), optim.sgd(0.1), 2, 0.1)
    with pytest.raises(ValueError, match=r"`hparams`.*at least one tensor"):
        optimizer.init(p.params, {})
    with pytest.raises(TypeError, match=r"`batches`.*sequence"):
        optimizer.step(optimizer.init(p.params, p.hparams), iter(p.steps(2)), p.outer_batch)


@pytest.mark.parametrize("method", [evolution.es, evolution.pes])
def test_particles_are_judged_with_their_own_carry(method: Any) -> None:
    """A carry that counts to two steps, and an outer objective that multiplies by it: twice the value and the gradient without."""
    p = PROBLEMS["ridge_scalar"]
    sgd = optim.sgd(0.05)
    counting = metacal.descent(lambda w, h, b, c: (p.inner(w, h, b), c + 1), sgd, carry=torch.tensor(0))
    reading = metacal.with_carry(lambda w, h, b, c: c * p.outer(w, h, b))
    found = []
    for outer, solver in ((p.outer, metacal.descent(p.inner, sgd)), (reading, counting)):
        optimizer = method(outer, solver, optim.sgd(0.1), 4, 0.1)
        torch.manual_seed(0)
        found.append(optimizer.step(optimizer.init(p.params, p.hparams), p.steps(2), p.outer_batch)[1])
    close((found[1].value, found[1].hparams), tree.scale(2.0, (found[0].value, found[0].hparams)), 1e-12)


# What it costs


def net_problem() -> tuple[Any, Tree, Tree, Tensor, Callable[[], None]]:
    sizes = [12, 16, 16, 4]
    params = {str(i): torch.sin(torch.arange(m * n, dtype=F64)).reshape(m, n) / 4 for i, (m, n) in enumerate(itertools.pairwise(sizes))}
    x, labels = torch.cos(torch.arange(8 * 12, dtype=F64)).reshape(8, 12), torch.arange(8) % 4

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        out = torch.tanh(torch.tanh(b @ p["0"]) @ p["1"]) @ p["2"]
        return (h * F.cross_entropy(out, labels, reduction="none")).mean()

    def plain_step() -> None:
        inner({k: v.clone().requires_grad_() for k, v in params.items()}, torch.ones(8, dtype=F64), x).backward()

    return inner, params, torch.ones(8, dtype=F64), x, plain_step


T = 5
WORK = {  # in plain training steps, beside the outer gradient
    "forward": (adjoints.Forward(), T * (1 + 2 * 8)),
    "forward, in two chunks": (adjoints.Forward(chunk_size=4), T * (2 + 2 * 8)),
    "sketch": (adjoints.ForwardSketch(3), T * (1 + 2 * 3)),
    "finite difference": (adjoints.FiniteDifference(), T + 2),
    "SAMA": (adjoints.SAMA(), T + 2),
    "zeroth order": (adjoints.ZerothOrder(3, chunk_size=None), T * (1 + 2 * 3)),
    "zeroth order, one by one": (adjoints.ZerothOrder(3), T * (1 + 2 * 3)),
}


@pytest.mark.parametrize("method", WORK)
def test_work(method: str) -> None:
    inner, params, hparams, x, plain_step = net_problem()
    adjoint, most = WORK[method]
    solver = metacal.descent(inner, optim.sgd(0.1, momentum=0.9))
    state = solver.init(params, hparams)
    run = metacal.hypergradient(inner, solver, adjoint)
    steps = work(lambda: run(state, hparams, [x] * T, x)) / work(plain_step) - 1
    assert 0.6 * most <= steps <= most + 0.01, steps  # the averages over directions are products too


def test_work_of_an_evolution_strategy() -> None:
    inner, params, hparams, x, plain_step = net_problem()
    forward = work(lambda: inner(params, hparams, x))
    optimizer = evolution.pes(inner, metacal.descent(inner, optim.sgd(0.1)), optim.sgd(0.1), 6, 0.1)
    state = optimizer.init(params, hparams)
    assert work(lambda: optimizer.step(state, [x] * T, x)) == pytest.approx(6 * (T * work(plain_step) + forward), rel=1e-3)


WIDE = 100


@pytest.mark.parametrize("method", ["forward", "sketch", "finite difference", "SAMA", "zeroth order", "pes"])
def test_peak_memory_does_not_depend_on_the_number_of_steps(method: str) -> None:
    """Weights of 80 kB each, activations of 1 kB."""
    params = {k: torch.eye(WIDE, dtype=F64) for k in ("a", "b")}
    x, hparams = torch.cos(torch.arange(WIDE, dtype=F64))[None], torch.ones(3, dtype=F64)

    def inner(p: Tree, h: Tree, b: Tensor) -> Tensor:
        return (h.sum() * torch.tanh(torch.tanh(b @ p["a"]) @ p["b"]) ** 2).mean()

    solver = metacal.descent(inner, optim.sgd(1e-3, momentum=0.9))
    if method == "pes":
        optimizer = evolution.pes(inner, solver, optim.sgd(0.1), 4, 0.1, chunk_size=None)
        start = optimizer.init(params, hparams)

        def run(n: int) -> Any:
            return optimizer.step(start, [x] * n, x)
    else:
        state, hypergradient = solver.init(params, hparams), metacal.hypergradient(inner, solver, ALL[method])

        def run(n: int) -> Any:
            return hypergradient(state, hparams, [x] * n, x)

    peaks = {}
    for num_steps in (2, 2, 8):  # the first call allocates what stays
        peaks[num_steps] = peak_bytes(lambda n=num_steps: run(n))
    assert peaks[2] > 8 * WIDE**2
    assert peaks[8] <= peaks[2] + 4 * WIDE**2


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adjoints.Forward(chunk_size=0), r"`chunk_size`.*integer of at least 1.*0"),
        (lambda: adjoints.Forward(max_hparams=-1), r"`max_hparams`.*integer of at least 1.*-1"),
        (lambda: adjoints.ForwardSketch(0), r"`num_directions`.*integer of at least 1.*0"),
        (lambda: adjoints.ForwardSketch(True), r"`num_directions`.*integer of at least 1.*True"),
        (lambda: adjoints.ForwardSketch(2, "uniform"), r"`distribution`.*rademacher, gaussian.*'uniform'"),
        (lambda: adjoints.ForwardSketch(2, chunk_size=1.5), r"`chunk_size`.*1\.5"),
        (lambda: adjoints.FiniteDifference(radius=0.0), r"`radius`.*positive.*0\.0"),
        (lambda: adjoints.FiniteDifference(step_size=-1.0), r"`step_size`.*positive.*-1\.0"),
        (lambda: adjoints.SAMA(radius=float("nan")), r"`radius`.*positive.*nan"),
        (lambda: adjoints.ZerothOrder(0), r"`num_directions`.*integer of at least 1"),
        (lambda: adjoints.ZerothOrder(1, radius=-0.1), r"`radius`.*positive"),
        (lambda: adjoints.ZerothOrder(1, distribution="sphere"), r"`distribution`.*'sphere'"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("adjoint", ONE_STEP.values(), ids=ONE_STEP)
def test_a_solver_without_an_objective_has_nothing_to_difference(adjoint: Any) -> None:
    solver, z, hparams, x = equilibrium()
    with pytest.raises(ValueError, match=r"`solver`.*inner objective.*fixed_point.*Implicit\(linear\.Identity\(\)\)"):
        metacal.hypergradient(lambda p, h, b: p["z"].sum(), solver, adjoint)(solver.init(z, hparams), hparams, [x], ())


@every_method
def test_a_generator_of_batches_and_one_that_requires_grad_are_refused(method: str) -> None:
    p = PROBLEMS["ridge_scalar"]
    solver = descent(p)
    run, state = metacal.hypergradient(p.outer, solver, ALL[method]), solver.init(p.params, p.hparams)
    with pytest.raises(TypeError, match=r"`batches`.*sequence"):
        run(state, p.hparams, (b for b in p.steps(2)), p.outer_batch)
    with pytest.raises(ValueError, match=r"`batches`.*requires grad"):
        run(state, p.hparams, [tuple(x.clone().requires_grad_() for x in p.batches[0])] * 2, p.outer_batch)


def test_meta_initialisation_refuses_them() -> None:
    """None estimates the derivative by the initial params."""
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.1))
    for adjoint in ALL.values():
        optimizer = metacal.meta_initialisation(lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoint, optim.sgd(0.5))
        with pytest.raises(ValueError, match="initial params"):
            optimizer.step(optimizer.init(p.params, {}), p.steps(2), p.outer_batch)
