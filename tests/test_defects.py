"""What other libraries get wrong, one regression test each, and bad input that has to be spoken of.

Every defect was found by running a library on a problem with a known answer; here the same problem is put to metacal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import metacal
from metacal import adjoints, linear, optim
from problems import (
    F64,
    OPTIMIZERS,
    PROBLEMS,
    REFERENCE,
    SOLVABLE,
    Problem,
    Tree,
    close,
    derivative,
    direct_solve,
    f64,
    implicit_gradient,
    leaf_grads,
    leaves,
    loop,
    neumann_series,
    ravel,
    relative_error,
    smallest_energy,
    tree_map,
    unrolled_gradient,
)

RIDGE = PROBLEMS["ridge_scalar"]
EXACT = REFERENCE["ridge_scalar"]["hypergrad"]
ADJOINTS = {
    **{f"unrolled {m}": adjoints.Unrolled(mode=m) for m in ("mixed", "reverse", "graph", "auto")},
    "window": adjoints.Unrolled(window=2),
    "forward": adjoints.Forward(),
    "sketch": adjoints.ForwardSketch(num_directions=2),
    "first order": adjoints.FirstOrder(),
    "finite difference": adjoints.FiniteDifference(),
    "SAMA": adjoints.SAMA(),
    "zeroth order": adjoints.ZerothOrder(num_directions=2),
    **{
        type(solver).__name__: adjoints.Implicit(solver)
        for solver in (
            linear.CG(3),
            linear.NormalCG(3),
            linear.MINRES(3),
            linear.GMRES(3),
            linear.BiCGSTAB(3),
            linear.Lanczos(3),
            linear.Dense(),
            linear.Nystroem(rank=1),
            linear.Neumann(num_steps=3, step_size=0.1),
            linear.Identity(),
        )
    },
}


def estimate(p: Problem, solver: metacal.InnerSolver, adjoint: Any, num_steps: int = 1, **over: Any) -> metacal.HyperGradient:
    params, hparams = over.get("params", p.params), over.get("hparams", p.hparams)
    state = solver.init(params, hparams)
    return metacal.hypergradient(over.get("outer", p.outer), solver, adjoint)(state, hparams, p.steps(num_steps), p.outer_batch)


def at_solution(p: Problem, adjoint: Any, **over: Any) -> metacal.HyperGradient:
    return estimate(p, metacal.stationary(over.pop("inner", p.inner)), adjoint, params=p.solution, **over)


def six_dimensional() -> tuple[Tensor, Tensor]:
    i = torch.arange(6, dtype=F64)
    root = torch.sin(1 + 6 * i[:, None] + i * i)
    return root @ root.T + 0.2 * torch.eye(6, dtype=F64), torch.cos(i)


# The ten defects


@pytest.mark.parametrize("tolerance", [None, 1e-8, 1e-2])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 50])
def test_defect_1_the_converged_iterate_is_committed(num_steps: int, tolerance: float | None) -> None:
    """CG that tests for convergence before it moves is off by 0.01496 on ridge_scalar, for every number of steps."""
    hg = at_solution(RIDGE, adjoints.Implicit(linear.CG(num_steps, tolerance=tolerance)))
    close(hg.hparams["lam"], f64(EXACT), 1e-10)
    # Two directions hold the solution: the rest is idle, but for one where rounding is above the tolerance.
    assert int(hg.stats["num_products"]) <= (2 if tolerance else 3)


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_defect_2_the_direction_is_updated_with_the_new_residual(num_steps: int) -> None:
    """CG with the old one has a relative error of 0.3 - 0.9 on this system; exact is reached at its dimension, 6."""
    matrix, b = six_dimensional()
    got = linear.CG(num_steps).solve(lambda v: matrix @ v, b)
    close(got.value, smallest_energy(num_steps)(matrix, b), 1e-8)
    if num_steps >= 6:
        close(got.value, direct_solve(matrix, b), 1e-9)
        assert float(got.residual_norm) < 1e-9


@pytest.mark.parametrize("factor", [0.1, 1.0, 25.0])
def test_defect_3_no_hidden_step_scale_in_a_linear_solve(factor: float) -> None:
    """A scale in one of CG's two updates: relative error 5. Iterate and residual agree, and scaling the inner problem does nothing."""
    matrix, b = six_dimensional()
    for solver in (linear.CG(3), linear.MINRES(3), linear.GMRES(3), linear.Lanczos(3), linear.NormalCG(3), linear.BiCGSTAB(3)):
        solution = solver.solve(lambda v: factor * (matrix @ v), b)
        assert abs(solution.residual_norm - (factor * (matrix @ solution.value) - b).norm() / b.norm()) < 1e-10
        close(factor * solution.value, solver.solve(lambda v: matrix @ v, b).value, 1e-9)
    p = PROBLEMS["quadratic_bilevel"]
    for linear_solver in (linear.CG(4), linear.Dense(), linear.MINRES(4), linear.GMRES(4)):
        hg = at_solution(p, adjoints.Implicit(linear_solver), inner=lambda w, h, b: factor * p.inner(w, h, b))
        close(hg.hparams, p.hypergradient, 1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor(0.3, dtype=F64)], ids=["none", "number", "tensor"])
def test_defect_4_damping_counts_once_and_the_direct_term_is_there(damping: Any) -> None:
    p, once = PROBLEMS["quadratic_bilevel"], float(damping)
    truth = [
        implicit_gradient(p.inner, p.outer, p.solution, p.hparams, (), (), direct_solve, factor * once).hparams for factor in (1.0, 2.0)
    ]
    for solver in (linear.Dense(), linear.CG(4), linear.MINRES(4), linear.GMRES(4), linear.Lanczos(4), linear.NormalCG(8)):
        close(at_solution(p, adjoints.Implicit(solver, damping=damping)).hparams, truth[0], 1e-9)
    assert not once or relative_error(truth[1], truth[0]) > 1e-2, "twice would show"


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_defect_4_every_adjoint_has_the_direct_term(adjoint: str) -> None:
    """An outer objective with nothing but a direct term, beside a hair of the params: dF/dh = 2 h."""
    p = PROBLEMS["quadratic_bilevel"]
    hair = 1e-9
    hg = quietly(
        lambda: estimate(
            p,
            metacal.descent(p.inner, optim.sgd(0.1)),
            ADJOINTS[adjoint],
            2,
            outer=lambda w, h, b: (h["x"] ** 2).sum() + hair * (w["z"] ** 2).sum(),
        )
    )
    close(hg.hparams["x"], 2 * p.hparams["x"], 1e-6)


def quietly(fn: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linear.UnreliableHypergradient)
        return fn()


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_defect_5_a_nan_is_no_zero(where: str, adjoint: str) -> None:
    """In one of the hypergradient's coordinates alone: the others do not hide it."""
    p = PROBLEMS["logistic_exp_reg"]
    poison = f64(1.0, float("nan"), 1.0)

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.inner(w, h, b) + ((h["lam"] * poison * w["w"]).sum() if where == "inner" else 0.0)

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.outer(w, h, b) + ((h["lam"] * poison).sum() * w["w"][0] if where == "outer" else 0.0)

    hg = estimate(p, metacal.descent(inner, optim.sgd(0.1)), ADJOINTS[adjoint], 2, outer=outer)
    if (where, adjoint) != ("inner", "first order"):  # whose hparams are the direct part alone
        assert bool(hg.hparams["lam"].isnan().any())
    assert not bool(hg.value.isfinite())
    if where == "inner":
        assert int(hg.stats["first_bad_step"]) == 0


@pytest.mark.parametrize("adjoint", ["unrolled mixed", "unrolled reverse", "unrolled graph", "unrolled auto", "forward", "Dense"])
@pytest.mark.parametrize("way", ["torch.func.grad", "torch.autograd.grad", "a closed form"])
def test_defect_6_a_gradient_penalty_counts(way: str, adjoint: str) -> None:
    """|grad of the loss|^2 inside the inner objective, however it is computed: right, or refused with a word; never left out."""
    p = PROBLEMS["ridge_scalar"]
    x, y = p.batches[0]
    hparams = {"lam": f64(0.3), "penalty": f64(0.2)}

    def fit(w: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y) ** 2).mean()

    def penalty(w: Tensor, way: str) -> Tensor:
        if way == "a closed form":
            g = x.T @ (x @ w - y) / 8
        elif way == "torch.func.grad":
            g = torch.func.grad(fit)(w)
        else:
            (g,) = torch.autograd.grad(fit(w), w, create_graph=True)
        return (g**2).sum()

    def inner(w: Tree, h: Tree, b: Tree, way: str = way) -> Tensor:
        return fit(w["w"]) + 0.5 * h["lam"] * (w["w"] ** 2).sum() + h["penalty"] * penalty(w["w"], way)

    def closed(w: Tree, h: Tree, b: Tree) -> Tensor:
        return inner(w, h, b, "a closed form")

    end = loop(closed, OPTIMIZERS["sgd"], {"w": torch.zeros(3, dtype=F64)}, hparams, p.steps(3))
    if adjoint == "Dense":
        truth = implicit_gradient(closed, p.outer, tree_map(torch.Tensor.detach, end), hparams, p.batches[0], p.outer_batch, direct_solve)
        wanted = truth.hparams
    else:
        h = leaf_grads(hparams)
        end = loop(closed, OPTIMIZERS["sgd"], {"w": torch.zeros(3, dtype=F64)}, h, p.steps(3))
        wanted = derivative(p.outer(end, h, p.outer_batch), h)
    assert abs(float(wanted["penalty"])) > 1e-4
    refused = None
    try:
        hg = estimate(p, metacal.descent(inner, optim.sgd(0.1)), ADJOINTS[adjoint], 3, hparams=hparams)
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    if refused is None:
        close(hg.hparams, wanted, 1e-9)
    else:
        assert way == "torch.autograd.grad", refused
        assert len(refused) > 20


@pytest.mark.parametrize("solver", [linear.Dense(), linear.CG(9)], ids=str)
def test_defect_7_coupled_leaves_0_dim_solutions_and_second_derivatives(solver: Any) -> None:
    """A direct solve by diagonal blocks, a 0-dim solution with gradient 0, and a second derivative of -0.0465 for -0.1174."""
    p = PROBLEMS["multi_leaf"]
    close(at_solution(p, adjoints.Implicit(solver)).hparams, p.hypergradient, 1e-8)
    blocks = implicit_gradient(p.inner, p.outer, p.solution, p.hparams, p.batches[0], p.outer_batch, by_diagonal_blocks(p)).hparams
    assert relative_error(blocks, p.hypergradient) > 1e-2, "the leaves are coupled"
    close(at_solution(PROBLEMS["zero_dim"], adjoints.Implicit(solver)).hparams, PROBLEMS["zero_dim"].hypergradient, 1e-10)

    def value(lam: Tensor) -> Tensor:
        h = {"lam": lam}
        return RIDGE.outer(
            metacal.solve(metacal.stationary(RIDGE.inner), RIDGE.solution, h, RIDGE.steps(1), adjoints.Implicit(solver)),
            h,
            RIDGE.outer_batch,
        )

    lam = f64(0.3).requires_grad_()
    (first,) = torch.autograd.grad(value(lam), lam, create_graph=True)
    close(first, f64(EXACT), 1e-10)
    close(torch.autograd.grad(first, lam)[0], f64(-0.11742526040551855), 1e-9)


def by_diagonal_blocks(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(matrix: Tensor, b: Tensor) -> Tensor:
        begin, out = 0, torch.zeros_like(b)
        for leaf in leaves(p.params):
            here = slice(begin, begin + leaf.numel())
            out[here] = torch.linalg.solve(matrix[here, here], b[here])
            begin += leaf.numel()
        return out

    return apply


@pytest.mark.parametrize("mode", ["mixed", "reverse", "graph", "auto"])
@pytest.mark.parametrize("name", ["adamw_wd0.01", "sgd", "momentum0.9", "adam", "rmsprop_a0.9", "adagrad"])
def test_defect_8_every_optimizer_steps_through_the_unrolled_path(name: str, mode: Any) -> None:
    """An AdamW whose step returns nothing, on a path that no test ran: two outer steps, inner and outer optimizer alike."""
    p, row = PROBLEMS["logistic_exp_reg"], OPTIMIZERS[name]
    opt = metacal.nested(p.outer, metacal.descent(p.inner, row.build()), adjoints.Unrolled(mode=mode), row.build(), warm_start=False)
    state, h = opt.init(p.params, p.hparams), leaf_grads(p.hparams)
    outer = row.torch(leaves(h))
    for step in range(2):
        before = state.hparams["lam"]
        state, hg = opt.step(state, p.steps(3), p.outer_batch)
        value = p.outer(loop(p.inner, row, tree_map(torch.clone, p.params), h, p.steps(3)), h, p.outer_batch)
        h["lam"].grad = derivative(value, h)["lam"].detach()
        close(hg.hparams["lam"], h["lam"].grad, 1e-9)
        outer.step()
        close(state.hparams["lam"], h["lam"].detach(), 1e-11)
        assert bool((state.hparams["lam"] != before).all()), step


@pytest.mark.parametrize("step_size", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("problem", ["ridge_scalar", "logistic_exp_reg", "quadratic_bilevel"])
def test_defect_9_no_step_size_in_an_implicit_gradient_and_the_right_one_in_a_truncated_one(problem: str, step_size: float) -> None:
    p = PROBLEMS[problem]
    solver = metacal.descent(p.inner, optim.sgd(step_size))
    close(estimate(p, solver, adjoints.Implicit(linear.Dense()), 2, params=p.solution).hparams, p.hypergradient, 1e-9)
    for window in (1, 3):
        series = implicit_gradient(
            p.inner, p.outer, p.solution, p.hparams, p.batches[0], p.outer_batch, neumann_series(window - 1, step_size)
        ).hparams
        for mode in ("mixed", "reverse", "graph", "auto"):
            hg = estimate(p, solver, adjoints.Unrolled(mode=mode, window=window), 4, params=p.solution)
            close(hg.hparams, series, 1e-9)


def decaying(n: int = 30) -> Tensor:
    """Eigenvalues from 1 down to 1e-9: no rank below n holds it."""
    q = torch.linalg.qr(torch.sin(torch.arange(n * n, dtype=F64) ** 1.3).reshape(n, n))[0]
    return (q * torch.logspace(0, -9, n, dtype=F64)) @ q.T


def test_defect_10_nystroem_scales_rho_and_tells_its_residual() -> None:
    """With a tiny rho the part that the sketch does not hold is divided by it: 2e7 relative error. Nobody asked for that rho."""
    matrix = decaying() + 1e-2 * torch.eye(30, dtype=F64)
    b = torch.cos(torch.arange(30, dtype=F64))
    exact = torch.linalg.solve(matrix, b)
    tiny = linear.Nystroem(rank=4, rho=1e-9).solve(lambda v: matrix @ v, b)
    assert relative_error(tiny.value, exact) > 1e3
    assert float(tiny.residual_norm) > 1e3, "and says so"
    for rank in (4, 8, 16, 30):
        solution = linear.Nystroem(rank=rank).solve(lambda v: matrix @ v, b)
        assert relative_error(solution.value, exact) < 1.0, rank
        close(solution.residual_norm, (matrix @ solution.value - b).norm() / b.norm(), 1e-8)
        for scale in (1e-6, 1e6):  # the scale is that of the matrix
            scaled = linear.Nystroem(rank=rank).solve(lambda v, scale=scale: scale * (matrix @ v), b)
            close(scale * scaled.value, solution.value, 1e-4)


# Bad input: reported, with what it means for the hypergradient and what to do


@contextmanager
def reported(*words: str) -> Iterator[None]:
    with pytest.warns(linear.UnreliableHypergradient) as record:
        yield
    said = " ".join(str(w.message) for w in record)
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


def saddle(curvature: float) -> tuple[metacal.InnerSolver, Tree, Tree]:
    """H = diag(1, 2, curvature)."""
    d = f64(1.0, 2.0, curvature)
    solver = metacal.stationary(lambda w, h, b: 0.5 * (d * w["w"] ** 2).sum() - (h["x"] * w["w"]).sum())
    return solver, {"w": f64(0.1, 0.2, 0.3)}, {"x": f64(1.0, 1.0, 1.0)}


def outer_of(w: Tree, h: Tree, b: Tree) -> Tensor:
    return (f64(1.0, -1.0, 2.0) * w["w"]).sum()


def implicit_at(parts: tuple[metacal.InnerSolver, Tree, Tree], solver: linear.LinearSolver, **over: Any) -> metacal.HyperGradient:
    inner, params, hparams = parts
    return metacal.hypergradient(outer_of, inner, adjoints.Implicit(solver, **over))(inner.init(params, hparams), hparams, [()], ())


def test_an_indefinite_hessian_under_conjugate_gradients() -> None:
    with reported("not positive definite", "hypergradient", "MINRES", "damping"):
        hg = implicit_at(saddle(-1.0), linear.CG(3))
    assert float(hg.stats["curvature_min"]) <= 0
    with reported("not positive definite", "hypergradient"):
        hg = implicit_at(saddle(-1.0), linear.Dense(factorization="cholesky"))
    assert not bool(hg.hparams["x"].isfinite().all())
    for solver in (linear.MINRES(3), linear.GMRES(3), linear.Lanczos(3), linear.Dense(), linear.NormalCG(6)):  # what the advice says
        hg = implicit_at(saddle(-1.0), solver)
        close(hg.hparams["x"], f64(1.0, -0.5, -2.0), 1e-9)
    close(implicit_at(saddle(-1.0), linear.CG(3), damping=2.0).hparams["x"], f64(1 / 3, -1 / 4, 2.0), 1e-9)


def test_a_neumann_step_outside_the_stable_range() -> None:
    with reported("diverges", "step", "2 / the largest eigenvalue"):
        implicit_at(saddle(3.0), linear.Neumann(num_steps=20, step_size=0.7))
    hg = implicit_at(saddle(3.0), linear.Neumann(num_steps=40, step_size=0.6))
    close(hg.hparams["x"], f64(1.0, -0.5, 2 / 3), 1e-3)
    hg = implicit_at(saddle(3.0), linear.Neumann(num_steps=60))  # estimated
    close(hg.hparams["x"], f64(1.0, -0.5, 2 / 3), 1e-6)


@pytest.mark.parametrize(
    "solver",
    [
        linear.CG(6),
        linear.MINRES(6),
        linear.GMRES(6),
        linear.Lanczos(6),
        linear.BiCGSTAB(6),
        linear.NormalCG(6),
        linear.Dense(),
        linear.Dense(factorization="cholesky"),
    ],
    ids=str,
)
def test_a_singular_system_without_a_solution(solver: Any) -> None:
    """b has a part that no product reaches: no number without a word."""
    with reported("hypergradient"):
        hg = implicit_at(saddle(0.0), solver)
    residual = float(hg.stats["linear_residual"])
    assert math.isnan(residual) or residual > 0.3


@pytest.mark.parametrize("solver", [linear.CG(6), linear.MINRES(6), linear.GMRES(6), linear.Lanczos(6), linear.NormalCG(6)], ids=str)
def test_a_singular_system_with_a_solution_is_solved(solver: Any) -> None:
    inner, params, hparams = saddle(0.0)
    estimate = metacal.hypergradient(lambda w, h, b: w["w"][0] - w["w"][1], inner, adjoints.Implicit(solver))
    hg = estimate(inner.init(params, hparams), hparams, [()], ())
    close(hg.hparams["x"], f64(1.0, -0.5, 0.0), 1e-10)


@pytest.mark.parametrize("problem", SOLVABLE)
def test_an_unconverged_inner_solve_shows(problem: str) -> None:
    """The relative residual falls with the distance to the solution, and bounds what the hypergradient is worth."""
    p = PROBLEMS[problem]
    solver, residuals, errors = metacal.descent(p.inner, optim.sgd(p.step_size)), [], []
    for num_steps in (1, 10, 100):
        hg = estimate(p, solver, adjoints.Implicit(linear.Dense()), num_steps)
        residuals.append(float(hg.stats["residual_norm"]))
        errors.append(relative_error(hg.hparams, p.hypergradient))
    assert residuals[0] > residuals[1] > residuals[2]
    assert residuals[0] > 1e-3, "far away is far away"
    for residual, error in zip(residuals, errors, strict=True):
        assert error < 1e-3 or residual > 1e-3, (residual, error)


@pytest.mark.parametrize("problem", ["ridge_scalar", "multi_leaf", "zero_dim"])
def test_a_rank_above_the_dimension(problem: str) -> None:
    p = PROBLEMS[problem]
    n = len(ravel(p.params))
    with pytest.raises(ValueError, match=rf"`rank`.*{n}.*{n + 1}.*Dense"):
        at_solution(p, adjoints.Implicit(linear.Nystroem(rank=n + 1)))


class Rounding(torch.autograd.Function):
    """Old style: no setup_context, so that no torch.func transform can see through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


@pytest.mark.parametrize("adjoint", ["unrolled mixed", "unrolled reverse", "unrolled graph", "unrolled auto", "forward", "Dense", "CG"])
def test_a_custom_function_without_setup_context(adjoint: str) -> None:
    """Right by a double backward, or by another way and announced, or refused with the remedy; the number is never another."""
    p = PROBLEMS["ridge_scalar"]

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.inner(w, {"lam": torch.zeros((), dtype=F64)}, b) + 0.5 * h["lam"] * Rounding.apply(w["w"]).sum()

    truth = unrolled_gradient(p, OPTIMIZERS["sgd"], 3).hparams
    if adjoint in ("Dense", "CG"):
        end = loop(p.inner, OPTIMIZERS["sgd"], {"w": torch.zeros(3, dtype=F64)}, p.hparams, p.steps(3))
        truth = implicit_gradient(
            p.inner, p.outer, tree_map(torch.Tensor.detach, end), p.hparams, p.batches[0], p.outer_batch, direct_solve
        ).hparams
    refused = None
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            hg = estimate(p, metacal.descent(inner, optim.sgd(0.1)), ADJOINTS[adjoint], 3)
        except (RuntimeError, ValueError) as error:
            refused = str(error)
    if refused is not None:
        assert "setup_context" in refused
        return
    close(hg.hparams, truth, 1e-9)
    said = " ".join(str(w.message) for w in record)
    assert adjoint != "forward" or "setup_context" in said, said


def hidden_state() -> Any:
    """A momentum kept outside the state: replay would be another run."""
    kept: list[Tree] = []

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = True) -> tuple[Tree, Tree]:
        kept.append(updates)
        return metacal.tree.scale(-0.1, metacal.tree.mean(kept)), state

    return optim.GradientTransformation(lambda params: (), update)


def detached_scale() -> Any:
    """A gradient normalised by a norm that no derivative passes through."""

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = True) -> tuple[Tree, Tree]:
        size = metacal.tree.norm(metacal.tree.detach(updates))
        return metacal.tree.map(lambda g: -0.1 * g / (size + 1e-3), updates), state

    return optim.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize("make", [hidden_state, detached_scale])
def test_an_optimizer_that_cannot_be_differentiated(make: Callable[[], Any]) -> None:
    optimizer = make()
    with pytest.raises(ValueError, match=r"`optimizer`.*metacal\.optim"):
        estimate(RIDGE, metacal.descent(RIDGE.inner, optimizer), adjoints.Unrolled(), 3)
