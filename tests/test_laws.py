"""The laws of differentiation through training, as products of tables: methods x problems x optimizers.

A law is asserted against closed forms, dense matrices or loops written out in ``problems.py``, never against stored output of the
package. Cells of a product that do not apply are listed with the reason in :data:`NOT_APPLICABLE`.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
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
    SOLVABLE,
    TRAIN,
    Gradient,
    Problem,
    Tree,
    adaptation,
    best_residual,
    central_differences,
    close,
    derivative,
    difference_gradient,
    direct_solve,
    f64,
    implicit_gradient,
    leaf_grads,
    leaves,
    loop,
    neumann_series,
    newton,
    nystroem,
    random_quadratic,
    ravel,
    rebuild,
    relative_error,
    second_order,
    smallest_energy,
    smallest_normal_residual,
    smallest_residual,
    tree_map,
    unravel,
    unrolled_gradient,
    unrolled_value,
)

# What a biased method warns of is exactly what the laws below reproduce.
pytestmark = pytest.mark.filterwarnings("ignore::metacal.linear.UnreliableHypergradient")

MODES = ("mixed", "reverse", "graph")
UNDER_TRANSFORMS = ("mixed", "reverse")
SGD = OPTIMIZERS["sgd"]


def estimate(problem: Problem, solver: metacal.InnerSolver, adjoint: Any, num_steps: int = 1, **over: Any) -> metacal.HyperGradient:
    params, hparams = over.get("params", problem.params), over.get("hparams", problem.hparams)
    state = solver.init(params, hparams)
    return metacal.hypergradient(problem.outer, solver, adjoint)(state, hparams, problem.steps(num_steps), problem.outer_batch)


def sgd_solver(problem: Problem) -> metacal.InnerSolver:
    return metacal.descent(problem.inner, optim.sgd(problem.step_size))


def sgd_end(problem: Problem, num_steps: int) -> Tree:
    """Where the written-out gradient descent ends."""
    start = tree_map(torch.clone, problem.params)
    return tree_map(
        torch.Tensor.detach, loop(problem.inner, SGD, start, problem.hparams, problem.steps(num_steps), {"lr": problem.step_size})
    )


def dense_oracle(problem: Problem, at: Tree, batch: Tree, inverse: Callable[[Tensor, Tensor], Tensor], damping: float = 0.0) -> Gradient:
    return implicit_gradient(problem.inner, problem.outer, at, problem.hparams, batch, problem.outer_batch, inverse, damping)


# Law 1: every adjoint x every problem


@dataclass(frozen=True)
class Method:
    """An adjoint and what it computes, bias included: a dense formula at the end of the run."""

    name: str
    adjoint: Callable[[Problem], Any]
    inverse: Callable[[Problem], Callable[[Tensor, Tensor], Tensor]]
    damping: float = 0.0
    tolerance: float = 1e-10
    is_exact: bool = False
    """Is the hypergradient itself at a solution, not an approximation of it."""


def size(p: Problem) -> int:
    return len(ravel(p.params))


METHODS = {
    m.name: m
    for m in (
        Method("implicit dense", lambda p: adjoints.Implicit(linear.Dense()), lambda p: direct_solve, is_exact=True),
        Method(
            "implicit dense, damped",
            lambda p: adjoints.Implicit(linear.Dense(), damping=0.3),
            lambda p: direct_solve,
            damping=0.3,
        ),
        Method(
            "implicit Cholesky", lambda p: adjoints.Implicit(linear.Dense(factorization="cholesky")), lambda p: direct_solve, is_exact=True
        ),
        Method("implicit CG(n)", lambda p: adjoints.Implicit(linear.CG(size(p) + 2)), lambda p: direct_solve, is_exact=True),
        Method("implicit CG(1)", lambda p: adjoints.Implicit(linear.CG(1)), lambda p: smallest_energy(1)),
        Method(
            "implicit CG(2), damped",
            lambda p: adjoints.Implicit(linear.CG(2), damping=0.1),
            lambda p: smallest_energy(2),
            damping=0.1,
        ),
        Method(
            "implicit preconditioned CG",
            lambda p: adjoints.Implicit(linear.CG(1, preconditioner=linear.Dense())),
            lambda p: direct_solve,
            is_exact=True,
        ),
        Method("implicit Lanczos(n)", lambda p: adjoints.Implicit(linear.Lanczos(size(p))), lambda p: direct_solve, is_exact=True),
        Method("implicit Lanczos(2)", lambda p: adjoints.Implicit(linear.Lanczos(2)), lambda p: best_residual(2, smallest_energy)),
        Method("implicit MINRES(n)", lambda p: adjoints.Implicit(linear.MINRES(2 * size(p))), lambda p: direct_solve, is_exact=True),
        Method("implicit MINRES(2)", lambda p: adjoints.Implicit(linear.MINRES(2)), lambda p: smallest_residual(2)),
        Method("implicit GMRES(n)", lambda p: adjoints.Implicit(linear.GMRES(size(p))), lambda p: direct_solve, is_exact=True),
        Method("implicit GMRES(2)", lambda p: adjoints.Implicit(linear.GMRES(2)), lambda p: smallest_residual(2)),
        Method("implicit NormalCG(n)", lambda p: adjoints.Implicit(linear.NormalCG(2 * size(p))), lambda p: direct_solve, is_exact=True),
        Method("implicit NormalCG(1)", lambda p: adjoints.Implicit(linear.NormalCG(1)), lambda p: smallest_normal_residual(1)),
        Method("implicit BiCGSTAB(n)", lambda p: adjoints.Implicit(linear.BiCGSTAB(2 * size(p))), lambda p: direct_solve, is_exact=True),
        Method(
            "implicit Nystroem",
            lambda p: adjoints.Implicit(linear.Nystroem(rank=(size(p) + 1) // 2, rho=0.2)),
            lambda p: nystroem(linear.Nystroem(rank=(size(p) + 1) // 2).rows, 0.2),
        ),
        *(
            Method(
                f"implicit Neumann({k})",
                lambda p, k=k: adjoints.Implicit(linear.Neumann(num_steps=k, step_size=p.step_size)),
                lambda p, k=k: neumann_series(k, p.step_size),
                is_exact=k == 90,
            )
            for k in (0, 1, 7, 90)
        ),
        Method("implicit identity", lambda p: adjoints.Implicit(linear.Identity()), lambda p: lambda matrix, b: b),
        Method("first order", lambda p: adjoints.FirstOrder(), lambda p: lambda matrix, b: torch.zeros_like(b)),
    )
}
INDEFINITE = "conjugate gradients and Cholesky need a positive definite Hessian; on the way of this network it is indefinite"
ILL = "28 unknowns and a squared condition number: the rate of the normal equations is tested on small systems"
NOT_APPLICABLE = {
    **{
        (m, "mlp_reweighting"): INDEFINITE
        for m in ("implicit CG(n)", "implicit CG(1)", "implicit CG(2), damped", "implicit preconditioned CG", "implicit Cholesky")
    },
    ("implicit NormalCG(n)", "mlp_reweighting"): ILL,
}


def cells(*tables: Any) -> list[Any]:
    return [
        pytest.param(
            *cell,
            id=" | ".join(cell),
            marks=[pytest.mark.not_applicable(reason=NOT_APPLICABLE[cell])] if cell in NOT_APPLICABLE else [],
        )
        for cell in itertools.product(*tables)
    ]


@pytest.mark.parametrize(("method", "problem"), cells([m for m in METHODS if m != "implicit Neumann(90)"], PROBLEMS))
def test_law_1_each_adjoint_after_three_steps(method: str, problem: str) -> None:
    """Away from a solution: the formula of the method at the last state and batch."""
    row, p = METHODS[method], PROBLEMS[problem]
    hg = estimate(p, sgd_solver(p), row.adjoint(p), 3)
    end = sgd_end(p, 3)
    truth = dense_oracle(p, end, p.steps(3)[-1], row.inverse(p), row.damping)
    close(hg.state.params, end, 1e-13)
    close(hg.value, truth.value, 1e-12)
    # Relative to the direct and indirect parts together: where both cancel, rounding is relative to them.
    close(hg.hparams, truth.hparams, row.tolerance)


@pytest.mark.parametrize(("method", "problem"), cells(METHODS, SOLVABLE))
def test_law_1_each_adjoint_at_a_solution(method: str, problem: str) -> None:
    """At a known solution, no step taken: exact methods give the closed form, biased ones exactly their bias."""
    row, p = METHODS[method], PROBLEMS[problem]
    hg = estimate(p, metacal.stationary(p.inner), row.adjoint(p), 1, params=p.solution)
    close(hg.state.params, p.solution, 0.0)
    truth = dense_oracle(p, p.solution, p.batches[0], row.inverse(p), row.damping)
    close(hg.hparams, truth.hparams, row.tolerance)
    if row.is_exact:
        tolerance = 1e-5 if "Neumann" in method else 1e-10  # 90 terms shrink the error by at least 0.853^90 = 6e-7
        close(hg.hparams, p.hypergradient, tolerance)
        assert float(hg.stats["linear_residual"]) < tolerance
    elif row.name != "first order" and p.name not in ("one_element", "zero_dim") and (p.name != "ridge_scalar" or "(2)" not in row.name):
        # (two Krylov directions hold the solution of ridge_scalar, whose Hessian times the outer gradient has rank two)
        assert relative_error(hg.hparams, p.hypergradient) > 1e-6, "a biased method that is exact here tests nothing"
    if "implicit" in row.name:
        assert float(hg.stats["residual_norm"]) < 1e-12


@pytest.mark.parametrize("problem", SOLVABLE)
def test_law_1_conjugate_gradients_reach_their_rate(problem: str) -> None:
    """The error in the energy norm falls at least as 2 ((sqrt(k)-1)/(sqrt(k)+1))^steps; exact at the dimension."""
    p = PROBLEMS[problem]
    _, hessian, _ = second_order(p.inner, p.solution, p.hparams, p.batches[0])
    b = torch.cos(torch.arange(len(hessian), dtype=F64))
    exact = torch.linalg.solve(hessian, b)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    rate = ((eigenvalues[-1] / eigenvalues[0]).sqrt() - 1) / ((eigenvalues[-1] / eigenvalues[0]).sqrt() + 1)
    like = p.solution

    def matvec(v: Tree) -> Tree:
        return unravel(like, hessian @ ravel(v))

    def energy(e: Tensor) -> Tensor:
        return (e @ hessian @ e).sqrt()

    for k in range(1, len(b) + 1):
        solution = linear.CG(k).solve(matvec, unravel(like, b))
        error = ravel(solution.value) - exact
        assert energy(error) <= 2 * rate**k * energy(exact) + 1e-12
        assert abs(float(solution.residual_norm - (hessian @ ravel(solution.value) - b).norm() / b.norm())) < 1e-13
    assert energy(error) <= 1e-10 * energy(exact)


def test_law_1_linear_solvers_on_a_six_dimensional_system() -> None:
    """Symmetric positive definite, several leaves, a start that is not zero, and an early convergence that stays put."""
    i = torch.arange(6, dtype=F64)
    root = torch.sin(1 + 6 * i[:, None] + i * i)
    matrix, b = root @ root.T + 0.2 * torch.eye(6, dtype=F64), torch.cos(i)
    like = {"y": torch.zeros(2, 2, dtype=F64), "x": (torch.zeros((), dtype=F64), torch.zeros(1, dtype=F64))}
    exact = torch.linalg.solve(matrix, b)

    def matvec(v: Tree) -> Tree:
        return unravel(like, matrix @ ravel(v))

    rhs = unravel(like, b)
    for solver in (linear.CG(6), linear.CG(60), linear.Dense()):
        solution = solver.solve(matvec, rhs)
        close(ravel(solution.value), exact, 1e-9)
        assert float(solution.residual_norm) < 1e-9
    start = unravel(like, exact + 0.1 * torch.sin(i))
    close(ravel(linear.CG(6).solve(matvec, rhs, start).value), exact, 1e-9)
    close(ravel(linear.CG(3).solve(matvec, rhs, unravel(like, exact)).value), exact, 1e-12)
    step = float(1 / torch.linalg.eigvalsh(matrix)[-1])
    for k in (0, 1, 5):
        close(ravel(linear.Neumann(num_steps=k, step_size=step).solve(matvec, rhs).value), neumann_series(k, step)(matrix, b), 1e-12)
    zero = unravel(like, torch.zeros(6, dtype=F64))
    for solver in (linear.CG(3), linear.Dense(), linear.Neumann(num_steps=3, step_size=step), linear.Identity()):
        assert torch.equal(ravel(solver.solve(matvec, zero).value), torch.zeros(6, dtype=F64)), solver


@pytest.mark.parametrize("problem", SOLVABLE)
def test_law_1_unrolling_from_a_solution_is_a_neumann_series(problem: str) -> None:
    """K steps of gradient descent at a solution are the Neumann series with K terms: two adjoints without common code."""
    p = PROBLEMS[problem]
    for k in (1, 4):
        unrolled = estimate(p, sgd_solver(p), adjoints.Unrolled(), k, params=p.solution)
        neumann = estimate(p, metacal.stationary(p.inner), adjoints.Implicit(linear.Neumann(k - 1, p.step_size)), params=p.solution)
        close(unrolled.hparams, neumann.hparams, 1e-9)


def test_law_1_first_order_params_is_the_outer_gradient_at_the_end() -> None:
    for p in PROBLEMS.values():
        hg = estimate(p, sgd_solver(p), adjoints.FirstOrder(), 3)
        w = leaf_grads(sgd_end(p, 3))
        close(hg.params, derivative(p.outer(w, p.hparams, p.outer_batch), w), 1e-12)


def test_law_1_what_is_not_estimated_is_empty() -> None:
    p = PROBLEMS["ridge_scalar"]
    assert estimate(p, sgd_solver(p), adjoints.Implicit(linear.Dense()), 3).params == ()
    assert estimate(p, sgd_solver(p), adjoints.Unrolled(window=2), 3).params == ()
    assert estimate(p, sgd_solver(p), adjoints.Unrolled(window=3), 3).params != ()


@pytest.mark.parametrize("which", ["last", "every"])
def test_law_1_select_says_which_batches_define_the_system(which: str) -> None:
    p = PROBLEMS["mlp_reweighting"]
    hg = estimate(p, sgd_solver(p), adjoints.Implicit(linear.Dense(), select=getattr(linear, which)), 3)

    def mean(params: Tree, hparams: Tree, batches: Any) -> Tensor:
        return torch.stack([p.inner(params, hparams, b) for b in batches]).mean()

    used = p.steps(3)[-1:] if which == "last" else p.steps(3)
    close(hg.hparams, implicit_gradient(mean, p.outer, sgd_end(p, 3), p.hparams, used, p.outer_batch, direct_solve).hparams)


# Law 1 for what follows the path or shifts it, each with its formula


def shifted_end(p: Problem, num_steps: int, shift: Tree) -> Tensor:
    start, h = tree_map(torch.clone, p.params), tree_map(torch.add, p.hparams, shift)
    return ravel(loop(p.inner, SGD, start, h, p.steps(num_steps), {"lr": p.step_size})).detach()


def parts(p: Problem, num_steps: int) -> tuple[Tensor, Tensor]:
    """d outer / d params and d outer / d hparams, flat, at the end of the written-out run."""
    w, h = leaf_grads(sgd_end(p, num_steps)), leaf_grads(p.hparams)
    value = p.outer(w, h, p.outer_batch)
    return ravel(derivative(value, w, create_graph=True)).detach(), ravel(derivative(value, h))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_law_1_forward_mode_is_exact(problem: str) -> None:
    p = PROBLEMS[problem]
    truth = unrolled_gradient(p, OPTIMIZERS["momentum0.9"], 3)
    solver = metacal.descent(p.inner, OPTIMIZERS["momentum0.9"].build())
    for adjoint in (adjoints.Forward(), adjoints.Forward(chunk_size=2)):
        hg = estimate(p, solver, adjoint, 3)
        close(hg.value, truth.value, 1e-12)
        close(hg.hparams, truth.hparams)
        assert hg.params == ()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_law_1_one_random_direction(problem: str) -> None:
    """A sketch is <g, u> u, and u can be read from its signs; so can the central difference along u that a zeroth-order one is."""
    p, radius = PROBLEMS[problem], 0.1
    f_w, f_h = parts(p, 3)
    exact = ravel(unrolled_gradient(p, SGD_AT[problem], 3).hparams) - f_h
    hg = estimate(p, sgd_solver(p), adjoints.ForwardSketch(num_directions=1), 3)
    sketch = ravel(hg.hparams) - f_h
    u = sketch.sign()
    close(sketch, (exact @ u) * u, 1e-9)
    hg = estimate(p, sgd_solver(p), adjoints.ZerothOrder(num_directions=1, radius=radius), 3)
    u = (ravel(hg.hparams) - f_h).sign()
    ends = [shifted_end(p, 3, unravel(p.hparams, s * radius * u)) for s in (1.0, -1.0)]
    close(ravel(hg.hparams) - f_h, f_w @ (ends[0] - ends[1]) / (2 * radius) * u, 1e-9)


SGD_AT = {name: dataclasses.replace(SGD, hyper={"lr": p.step_size}) for name, p in PROBLEMS.items()}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_law_1_differences_of_gradients(problem: str) -> None:
    """DARTS and SAMA, radius and all: SAMA's matrix by differentiating torch.optim's formula for the last update."""
    p, radius = PROBLEMS[problem], 0.3

    def truth(end: Tree, adapt: Callable[[Tree], Tree]) -> Tree:
        return difference_gradient(p.inner, p.outer, end, p.hparams, p.steps(3)[-1], p.outer_batch, radius, adapt).hparams

    adjoint = adjoints.FiniteDifference(radius=radius, step_size=0.7)
    close(estimate(p, sgd_solver(p), adjoint, 3).hparams, truth(sgd_end(p, 3), lambda ct: tree_map(lambda x: 0.7 * x, ct)), 1e-9)
    for name in ("sgd", "nesterov0.9", "adam", "rmsprop_a0.9"):
        row = OPTIMIZERS[name]
        end = tree_map(torch.Tensor.detach, loop(p.inner, row, tree_map(torch.clone, p.params), p.hparams, p.steps(3)))

        def adapt(ct: Tree, row: Any = row) -> Tree:
            return adaptation(p.inner, row, p.params, p.hparams, p.steps(3), ct)

        hg = estimate(p, metacal.descent(p.inner, row.build()), adjoints.SAMA(radius=radius), 3)
        close(hg.hparams, truth(end, adapt), 1e-9)


@pytest.mark.parametrize("problem", SOLVABLE)
def test_law_1_differences_tend_to_one_step_truncation(problem: str) -> None:
    """As the radius squared: a hundredth of it is a ten-thousandth of the distance to T1-T2."""
    p = PROBLEMS[problem]
    limit = estimate(p, sgd_solver(p), adjoints.Implicit(linear.Identity()), 3).hparams

    def distance(radius: float) -> float:
        return relative_error(estimate(p, sgd_solver(p), adjoints.FiniteDifference(radius=radius), 3).hparams, limit)

    far, near = distance(0.1), distance(0.01)
    assert near < 1e-12 or 80 < far / near < 125, (far, near)  # 0: the mixed derivative is affine in the params


@pytest.mark.parametrize(("dimension", "condition"), [*itertools.product([2, 20], [1.0, 1e2, 1e4, 1e6]), (200, 1e2), (200, 1e6)])
def test_law_1_random_quadratics(dimension: int, condition: float) -> None:
    """At the known solution: direct solvers to rounding times the condition number, iterative ones within their textbook rate."""
    p = random_quadratic(dimension, condition)
    matrix, mix, direct, f_w = quadratic_parts(p)
    exact = torch.linalg.solve(matrix, f_w)
    root = torch.sqrt(torch.tensor(condition, dtype=F64))
    rate = (root - 1) / (root + 1)
    energy = (exact @ matrix @ exact).sqrt()
    # |B^T e| <= |B^T A^-1/2| |e|_A, and what is smallest in the residual is at most sqrt(condition) larger in the energy
    scale = torch.linalg.matrix_norm(torch.linalg.solve(matrix, mix).T @ mix, 2).sqrt() * energy * root

    def run(solver: linear.LinearSolver) -> metacal.HyperGradient:
        return estimate(p, metacal.stationary(p.inner), adjoints.Implicit(solver), params=p.solution)

    def indirect(hg: metacal.HyperGradient) -> Tensor:
        return hg.hparams["x"] - direct

    for solver in (linear.Dense(), linear.Dense(factorization="cholesky")):
        close(run(solver).hparams, p.hypergradient, 1e-13 * condition + 1e-12)
    k = min(dimension, 30)
    for solver in (linear.CG(k), linear.Lanczos(k), linear.MINRES(k)):
        hg = run(solver)
        error = (indirect(hg) - mix.T @ exact).norm()
        assert (
            error <= 2 * rate**k * scale * (root if isinstance(solver, linear.MINRES) else 1) + 1e-12 * condition * (mix.T @ exact).norm()
        )
        assert float(hg.stats["num_products"]) <= k
        assert 1 / condition * (1 - 1e-6) <= float(hg.stats["curvature_min"]) <= float(hg.stats["curvature_max"]) <= 1 + 1e-6
    for k in (0, 5, 40):
        terms = neumann_series(k, 0.9)(matrix, f_w)
        close(indirect(run(linear.Neumann(k, 0.9))), mix.T @ terms, 1e-10)
    solver = linear.Nystroem(rank=dimension, rho=1e-2)  # of full rank: a damping of rho, exactly
    close(indirect(run(solver)), mix.T @ torch.linalg.solve(matrix + 1e-2 * torch.eye(dimension, dtype=F64), f_w), 1e-12 * condition + 1e-9)


def quadratic_parts(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, the direct part and f_w at the solution."""
    w, h = leaf_grads(p.solution), leaf_grads(p.hparams)
    value = p.outer(w, h, ())
    zero = torch.zeros_like(p.solution["w"])
    gradient = torch.func.grad(lambda w, x: p.inner({"w": w}, {"x": x}, ()))
    matrix = torch.func.jacfwd(gradient)(zero, p.hparams["x"])
    mix = -torch.func.jacfwd(gradient, argnums=1)(zero, p.hparams["x"])
    return matrix, mix, derivative(value, h)["x"], derivative(value, w)["w"]


def test_law_1_gauss_newton() -> None:
    """Of a linear model with its regulariser among the outputs it is the Hessian; of a network, J^T H_out J + damping, densely."""
    p = PROBLEMS["logistic_exp_reg"]
    x, y = p.batches[0]
    operator = linear.GaussNewton(
        lambda w, h, b: {"z": b[0] @ w["w"], "w": w["w"]},
        lambda out, h, b: (
            (torch.logaddexp(out["z"], torch.zeros_like(b[1])) - b[1] * out["z"]).mean() + 0.5 * (h["lam"].exp() * out["w"] ** 2).sum()
        ),
    )
    for solver in (linear.Dense(), linear.CG(3), linear.MINRES(3)):
        hg = estimate(p, metacal.stationary(p.inner), adjoints.Implicit(solver, operator=operator), params=p.solution)
        close(hg.hparams, p.hypergradient)

    i = torch.arange(6, dtype=F64)
    params = {"a": torch.sin(i).reshape(3, 2), "b": torch.cos(i[:2])}
    hparams = {"weights": torch.linspace(0.2, 1.0, 8, dtype=F64)}

    def model(w: Tree, h: Tree, b: Tree) -> Tensor:
        return torch.tanh(b[0] @ w["a"]) @ w["b"]

    def loss(z: Tensor, h: Tree, b: Tree) -> Tensor:
        return (h["weights"] * (z - b[1]) ** 4).mean()

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return (model(w, h, b) - b[1]).square().mean()

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        return loss(model(w, h, b), h, b)

    J = torch.func.jacrev(lambda w: model(unravel(params, w), hparams, (x, y)))(ravel(params))
    H_out = torch.func.hessian(lambda z: loss(z, hparams, (x, y)))(model(params, hparams, (x, y)))
    A = J.T @ H_out @ J + 0.2 * torch.eye(8, dtype=F64)
    truth = implicit_gradient(inner, outer, params, hparams, (x, y), p.outer_batch, lambda _, b: torch.linalg.solve(A, b))
    solver = metacal.stationary(inner)
    for linear_solver in (linear.Dense(), linear.Dense(factorization="cholesky"), linear.CG(10)):
        run = metacal.hypergradient(outer, solver, adjoints.Implicit(linear_solver, operator=linear.GaussNewton(model, loss), damping=0.2))
        close(run(solver.init(params, hparams), hparams, [(x, y)], p.outer_batch).hparams, truth.hparams, 1e-9)


def test_law_1_stochastic_neumann_reads_the_batches_in_a_circle() -> None:
    """v = a sum_k prod_j (I - a H_j) b with another batch's Hessian in each product; the mixed product is that of the mean."""
    p, a, k = PROBLEMS["mlp_reweighting"], 0.1, 5
    hg = estimate(p, sgd_solver(p), adjoints.Implicit(linear.Neumann(k, a), select=linear.every, stochastic=True), 3)
    end = sgd_end(p, 3)
    hessians = [second_order(p.inner, end, p.hparams, b)[1] for b in p.steps(3)]
    cross = torch.stack([second_order(p.inner, end, p.hparams, b)[2] for b in p.steps(3)]).mean(0)
    f_w, f_h = parts(p, 3)
    candidates = []
    for first in range(3):
        term = total = f_w
        for j in range(k):
            term = term - a * hessians[(first + j) % 3] @ term
            total = total + term
        candidates.append(relative_error(ravel(hg.hparams), f_h - a * cross.T @ total))
    assert min(candidates) < 1e-10, candidates
    assert sorted(candidates)[1] > 1e-6, "the order matters"


def deep_equilibrium(p: Tree, h: Tree, b: Tensor) -> Tree:
    """z <- tanh(W z + U b): its Jacobian is not symmetric."""
    return {"z": torch.tanh(h["W"] @ p["z"] + h["U"] @ b)}


@pytest.mark.parametrize(
    "solver",
    [
        linear.Dense(),
        linear.Neumann(num_steps=200, step_size=1.0),
        linear.GMRES(4),
        linear.GMRES(60, restart=3),
        linear.BiCGSTAB(8),
        linear.NormalCG(8),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_steps", [2, 80])
def test_law_1_fixed_points_use_the_transposed_jacobian(solver: Any, num_steps: int) -> None:
    """A deep equilibrium layer; conjugate gradients, MINRES and Lanczos do not apply to its non-symmetric Jacobian."""
    i = torch.arange(4, dtype=F64)
    hparams = {"W": 0.3 * torch.sin(1 + 4 * i[:, None] + i * i), "U": torch.cos(i[:, None] + torch.arange(2, dtype=F64))}
    x, z = f64(0.5, -1.0), {"z": torch.zeros(4, dtype=F64)}
    fixed = metacal.fixed_point(deep_equilibrium)

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        return (p["z"] ** 3).sum() + 0.1 * (h["U"] ** 2).sum()

    state = fixed.init(z, hparams)
    hg = metacal.hypergradient(outer, fixed, adjoints.Implicit(solver))(state, hparams, [x] * num_steps, ())

    end = z
    for _ in range(num_steps):
        end = deep_equilibrium(end, hparams, x)
    w, h = ravel(end).requires_grad_(), ravel(hparams).requires_grad_()
    residual = w - deep_equilibrium({"z": w}, unravel(hparams, h), x)["z"]
    rows = [torch.autograd.grad(r, (w, h), retain_graph=True) for r in residual]
    jacobian, cross = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    f_w, f_h = torch.autograd.grad(outer({"z": w}, unravel(hparams, h), ()), (w, h))
    close(ravel(hg.hparams), f_h - cross.T @ torch.linalg.solve(jacobian.T, f_w), 1e-9)
    wrong = f_h - cross.T @ torch.linalg.solve(jacobian, f_w)
    assert relative_error(ravel(hg.hparams), wrong) > 1e-3


# Law 2: unrolled differentiation is one number, however it is computed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_law_2_modes_segments_and_windows_agree_with_the_written_out_loop(problem: str, optimizer: str) -> None:
    p, row, num_steps = PROBLEMS[problem], OPTIMIZERS[optimizer], 4
    truth = unrolled_gradient(p, row, num_steps)
    value = unrolled_value(p, row, num_steps)
    # Two directions, each a probe of every coordinate at once.
    for phase in (1.0, 2.0):
        u, v = (torch.cos(phase + 3 * torch.arange(len(ravel(x)), dtype=F64)) for x in (p.params, p.hparams))
        (slope,) = central_differences(lambda e, v=v: value(p.params, unravel(p.hparams, ravel(p.hparams) + e[0] * v)), (f64([0.0]),))
        close(ravel(truth.hparams) @ v, slope[0], 1e-7)
        (slope,) = central_differences(
            lambda e, u=u: value(unravel(p.params, ravel(p.params) + e[0] * u), p.hparams), (f64([0.0]),), step=1e-4
        )
        close(ravel(truth.params) @ u, slope[0], 1e-6)

    solver = metacal.descent(p.inner, row.build())
    choices = [("mixed", None), ("mixed", 1), ("reverse", None), ("graph", None), ("graph", 3), ("auto", None)]
    if problem == "zero_dim":
        choices += [("mixed", 3), ("mixed", 4), ("mixed", 9), ("reverse", 1), ("reverse", 3), ("graph", 1), ("graph", 9)]
    for mode, segment in choices:
        hg = estimate(p, solver, adjoints.Unrolled(mode=mode, segment=segment), num_steps)
        close(hg.value, truth.value, 1e-12)
        close(hg.hparams, truth.hparams, 1e-10)
        close(hg.params, truth.params, 1e-10)


@pytest.mark.parametrize(("problem", "optimizer"), [("mlp_reweighting", "momentum0.9"), ("multi_leaf", "adam"), ("zero_dim", "sgd")])
def test_law_2_windows(problem: str, optimizer: str) -> None:
    """The last K steps, exactly; all T of them are the full derivative, the initial params' included."""
    p, row, num_steps = PROBLEMS[problem], OPTIMIZERS[optimizer], 5
    solver = metacal.descent(p.inner, row.build())
    for mode, window in itertools.product(MODES, (1, 2, 4)):
        truth = unrolled_gradient(p, row, num_steps, window)
        for segment in (None, 1):
            hg = estimate(p, solver, adjoints.Unrolled(mode=mode, window=window, segment=segment), num_steps)
            close(hg.hparams, truth.hparams)
            close(hg.value, truth.value, 1e-12)
    full = unrolled_gradient(p, row, num_steps)
    for mode, window in itertools.product(MODES, (5, 9)):
        hg = estimate(p, solver, adjoints.Unrolled(mode=mode, window=window), num_steps)
        close(hg.hparams, full.hparams)
        close(hg.params, full.params)


@pytest.mark.parametrize("mode", MODES)
def test_law_2_offloaded_states_change_nothing(mode: str) -> None:
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.adam(0.1))
    plain = estimate(p, solver, adjoints.Unrolled(mode=mode), 4)
    close(estimate(p, solver, adjoints.Unrolled(mode=mode, offload=True), 4).hparams, plain.hparams, 1e-15)


@pytest.mark.parametrize(
    "adjoint",
    [*(adjoints.Unrolled(mode=m) for m in MODES), adjoints.Implicit(linear.CG(4)), adjoints.FirstOrder()],
    ids=lambda adjoint: str(adjoint).split(", select=")[0],  # a function's address would differ between parallel workers
)
def test_law_2_zero_and_one_step(adjoint: Any) -> None:
    """No step: the params are the start. One step: the shortest segment there is."""
    p = PROBLEMS["multi_leaf"]
    for num_steps in (0, 1):
        if isinstance(adjoint, adjoints.Implicit) and num_steps == 0:
            continue  # without a batch it has no system to solve
        hg = estimate(p, sgd_solver(p), adjoint, num_steps)
        w, h = leaf_grads(p.params), leaf_grads(p.hparams)
        end = loop(p.inner, SGD, w, h, p.steps(num_steps), {"lr": p.step_size})
        if isinstance(adjoint, adjoints.Unrolled):
            value = p.outer(end, h, p.outer_batch)
            close(hg.params, derivative(value, w, create_graph=True))
            close(hg.hparams, derivative(value, h))
        close(hg.state.params, end, 1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_law_2_proximal_descent(mode: str) -> None:
    """The pull towards an anchor is part of the objective, for its value and its derivative."""
    p, strength = PROBLEMS["mlp_reweighting"], 0.7
    hparams = {"model": p.hparams, "anchor": tree_map(lambda x: x + 0.1, p.params)}

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.inner(w, h["model"], b)

    def written_out(w: Tree, h: Tree, b: Tree) -> Tensor:
        return inner(w, h, b) + strength / 2 * sum(((x - y) ** 2).sum() for x, y in zip(leaves(w), leaves(h["anchor"]), strict=False))

    solver = metacal.proximal(inner, optim.sgd(0.1), strength, anchor=lambda h: h["anchor"])
    run = metacal.hypergradient(lambda w, h, b: p.outer(w, h["model"], b), solver, adjoints.Unrolled(mode=mode))
    hg = run(solver.init(p.params, hparams), hparams, p.steps(4), p.outer_batch)
    h = leaf_grads(hparams)
    end = loop(written_out, SGD, leaf_grads(p.params), h, p.steps(4))
    close(hg.hparams, derivative(p.outer(end, h["model"], p.outer_batch), h))


# Law 3: forward and reverse agree


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_law_3_forward_and_reverse_agree(mode: str, optimizer: str) -> None:
    """<ct, J t> = <J^T ct, t> with J t by forward mode through ``run`` and J^T ct by the adjoint."""
    p, row, num_steps = PROBLEMS["mlp_reweighting"], OPTIMIZERS[optimizer], 4
    solver = metacal.descent(p.inner, row.build())
    generator = torch.Generator().manual_seed(1)

    def random(tree: Tree) -> Tree:
        return tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=F64), tree)

    t_params, t_hparams, ct = random(p.params), random(p.hparams), random(p.params)

    def end(w: Tree, h: Tree) -> Tree:
        return metacal.run(solver, solver.init(w, h), h, p.steps(num_steps)).params

    _, forward = torch.func.jvp(end, (p.params, p.hparams), (t_params, t_hparams))
    state, pullback = adjoints.Unrolled(mode=mode).vjp(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(num_steps))
    back = pullback(ct)
    close(state.params, end(p.params, p.hparams), 1e-13)
    left = ravel(ct) @ ravel(forward)
    close(ravel(back.params) @ ravel(t_params) + ravel(back.hparams) @ ravel(t_hparams), left, 1e-10)


FORWARD_RULES = {
    "mixed": adjoints.Unrolled(),
    "reverse": adjoints.Unrolled(mode="reverse"),
    "window": adjoints.Unrolled(window=2),
    "forward": adjoints.Forward(),
    "first order": adjoints.FirstOrder(),
    **{
        str(solver).split("(")[0]: adjoints.Implicit(solver)
        for solver in (
            linear.Dense(),
            linear.Identity(),
            linear.Neumann(3, 0.2),
            linear.CG(9),
            linear.MINRES(9),
            linear.GMRES(8),
            linear.Lanczos(8),
            linear.BiCGSTAB(9),
            linear.NormalCG(12),
            linear.Nystroem(rank=3, rho=0.2),
        )
    },
}


@pytest.mark.parametrize("adjoint", FORWARD_RULES)
def test_law_3_each_adjoint_is_the_transpose_of_its_own_forward_rule(adjoint: str) -> None:
    """What a `solve` inside an inner objective needs: both rules are one linear map, biased or not."""
    p, row = PROBLEMS["multi_leaf"], FORWARD_RULES[adjoint]
    solver, generator = sgd_solver(p), torch.Generator().manual_seed(1)
    t_params, t_hparams, ct = (
        tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=F64), t) for t in (p.params, p.hparams, p.params)
    )
    state = solver.init(p.params, p.hparams)
    back = row.vjp(solver, state, p.hparams, p.steps(4))[1](ct)
    if back.params == ():  # not estimated, so nothing flows from there
        t_params = tree_map(torch.zeros_like, t_params)
    forward = row.jvp(solver, state, p.hparams, p.steps(4), t_params, t_hparams)
    right = ravel(back.hparams) @ ravel(t_hparams) + (ravel(back.params) @ ravel(t_params) if back.params != () else 0.0)
    close(right, ravel(ct) @ ravel(forward), 1e-9)


# Law 4: implicit tends to unrolled


CONVERGENT = {
    "sgd, lr 0.8": lambda: optim.sgd(0.8),
    "sgd, lr 0.4": lambda: optim.sgd(0.4),
    "momentum, lr 0.3": lambda: optim.sgd(0.3, momentum=0.5),
    "nesterov, lr 0.3": lambda: optim.sgd(0.3, momentum=0.5, nesterov=True),
    "dampened, lr 0.5": lambda: optim.sgd(0.5, momentum=0.5, dampening=0.5),
}


@pytest.mark.parametrize(
    ("optimizer", "problem"), [("sgd, lr 0.8", "multi_leaf"), *itertools.product(CONVERGENT, ["ridge_scalar", "quadratic_bilevel"])]
)
def test_law_4_implicit_tends_to_unrolled(optimizer: str, problem: str) -> None:
    """At the linear rate of the iteration, with the same number at the end for any step size (never scaled by it)."""
    p, errors, residuals = PROBLEMS[problem], [], []
    solver = metacal.descent(p.inner, CONVERGENT[optimizer]())
    for num_steps in (10, 40, 250):
        unrolled = estimate(p, solver, adjoints.Unrolled(mode="graph"), num_steps)
        implicit = estimate(p, solver, adjoints.Implicit(linear.Dense()), num_steps)
        errors.append(relative_error(implicit.hparams, unrolled.hparams))
        residuals.append(float(implicit.stats["residual_norm"]))
    assert errors[0] > errors[1] > errors[2]
    assert residuals[0] > residuals[1] > residuals[2]
    assert errors[2] < 1e-10
    assert residuals[2] < 1e-10
    close(implicit.hparams, p.hypergradient, 1e-10)


@pytest.mark.parametrize(
    "build", [lambda: optim.sgd(0.1, weight_decay=0.01), lambda: optim.adamw(0.1), lambda: optim.adam(0.1, weight_decay=0.1)]
)
@pytest.mark.parametrize("learnable", [False, True])
def test_law_4_weight_decay_in_the_optimizer_is_refused(build: Callable[[], Any], learnable: bool) -> None:
    p = PROBLEMS["ridge_scalar"]
    solver = metacal.descent(p.inner, (lambda h: build()) if learnable else build())
    with pytest.raises(ValueError, match=r"weight.decay.*objective"):
        estimate(p, solver, adjoints.Implicit(linear.Dense()), 2)


# Law 5: vmap over tasks


VMAPPED = {
    **{f"unrolled {m}": adjoints.Unrolled(mode=m) for m in UNDER_TRANSFORMS},
    "unrolled window": adjoints.Unrolled(window=2),
    "first order": adjoints.FirstOrder(),
    # Fewer steps than it takes to converge: whether there is another after that is rounding.
    "implicit CG": adjoints.Implicit(linear.CG(3)),
    "implicit Neumann": adjoints.Implicit(linear.Neumann(num_steps=4, step_size=0.2)),
    "implicit dense": adjoints.Implicit(linear.Dense()),
    "implicit MINRES": adjoints.Implicit(linear.MINRES(5)),
    "implicit GMRES": adjoints.Implicit(linear.GMRES(5)),
    "implicit Lanczos": adjoints.Implicit(linear.Lanczos(5)),
    "implicit BiCGSTAB": adjoints.Implicit(linear.BiCGSTAB(2)),
    "implicit NormalCG": adjoints.Implicit(linear.NormalCG(4)),
    "implicit Nystroem": adjoints.Implicit(linear.Nystroem(rank=4)),
    "implicit preconditioned": adjoints.Implicit(linear.CG(3, preconditioner=linear.Diagonal(2))),
    "forward": adjoints.Forward(),
    "sketch": adjoints.ForwardSketch(num_directions=2),
    "finite difference": adjoints.FiniteDifference(radius=0.1),
    "SAMA": adjoints.SAMA(radius=0.1),
    "zeroth order": adjoints.ZerothOrder(num_directions=2, radius=0.1),
}
SEE_THE_UPDATE = ("unrolled mixed", "unrolled reverse")  # with every optimizer
SEEN_BEFORE = ("unrolled window", "first order", "implicit CG", "implicit Neumann", "implicit dense", "forward", "SAMA")


FEW_OPTIMIZERS = ("sgd", "momentum0.9", "adam")
VMAP_CELLS = [
    (o, a, shared)
    for o, a, shared in itertools.product(OPTIMIZERS, VMAPPED, (True, False))
    if a in SEE_THE_UPDATE or (o in FEW_OPTIMIZERS and a in SEEN_BEFORE) or o == "sgd"
]


@pytest.mark.parametrize(
    ("optimizer", "adjoint", "shared"),
    [pytest.param(*c, id=f"{c[0]} | {c[1]} | {'shared' if c[2] else 'expanded'} start") for c in VMAP_CELLS],
)
def test_law_5_vmap_over_tasks_is_a_stack_of_single_calls(optimizer: str, adjoint: str, shared: bool) -> None:
    row, p, num_tasks, num_steps = OPTIMIZERS[optimizer], PROBLEMS["multi_leaf"], 2, 2
    solver = metacal.descent(p.inner, row.build())
    single = metacal.hypergradient(p.outer, solver, VMAPPED[adjoint])
    shifts = f64(0.3, -0.5)

    def tasks(tree: Tree) -> Tree:
        return tree_map(lambda x: torch.stack([x + s * torch.cos(x) for s in shifts]), tree)

    hparams, batches, outer_batch = tasks(p.hparams), [tasks(b) for b in p.steps(num_steps)], tasks(p.outer_batch)
    start = p.params if shared else tasks(p.params)

    def task(i: int, tree: Tree) -> Tree:
        return tree_map(lambda x: x[i], tree)

    def call(w: Tree, h: Tree, bs: Any, ob: Any) -> metacal.HyperGradient:
        return single(solver.init(w, h), h, bs, ob)

    def vmapped(fn: Callable[..., Any], first: int | None) -> Callable[..., Any]:
        return torch.func.vmap(fn, in_dims=(first, 0, 0, 0), randomness="same")  # of directions that are drawn

    torch.manual_seed(3)
    mapped = vmapped(call, None if shared else 0)(start, hparams, batches, outer_batch)
    if shared:  # the optimizer's state too may be shared, made outside
        state = solver.init(start, task(0, hparams))
        torch.manual_seed(3)
        again = vmapped(single, None)(state, hparams, batches, outer_batch)
        close(again.hparams, mapped.hparams, 1e-12)
    for i in range(num_tasks):
        torch.manual_seed(3)
        one = call(start if shared else task(i, start), task(i, hparams), [task(i, b) for b in batches], task(i, outer_batch))
        close(mapped.value[i], one.value, 1e-12)
        close(task(i, mapped.hparams), one.hparams, 1e-10)
        close(task(i, mapped.params), one.params, 1e-10)
        close(task(i, mapped.state.params), one.state.params, 1e-12)
        for name, number in one.stats.items():
            if "residual" in name:  # at convergence a residual is rounding
                assert abs(float(mapped.stats[name][i]) - float(number)) <= 1e-9 * max(1.0, float(number)), name
            else:
                rtol = 1e-4 if "curvature" in name else 1e-9  # the last direction of a solve that converged is rounding too
                assert torch.allclose(mapped.stats[name][i].to(number.dtype), number, rtol=rtol, equal_nan=True), name


def test_law_5_solve_under_vmap() -> None:
    p = PROBLEMS["multi_leaf"]
    solver, lams = sgd_solver(p), torch.stack([p.hparams["reg"] + s for s in (0.0, 0.4, -0.3)])
    for adjoint in (
        adjoints.Unrolled(),
        adjoints.Unrolled(mode="reverse"),
        adjoints.Implicit(linear.CG(9)),
        adjoints.Implicit(linear.Dense()),
    ):

        def value(reg: Tensor, adjoint: Any = adjoint) -> Tensor:
            h = {**p.hparams, "reg": reg}
            return p.outer(metacal.solve(solver, p.params, h, p.steps(4), adjoint), h, p.outer_batch)

        mapped = torch.func.vmap(torch.func.grad(value))(lams)
        for i in range(3):
            close(mapped[i], torch.func.grad(value)(lams[i]), 1e-10)
            hg = estimate(p, solver, adjoint, 4, hparams={**p.hparams, "reg": lams[i]})
            close(mapped[i], hg.hparams["reg"], 1e-10)


# Law 6: derivatives of an estimate are right, or refused


def truth_of_second_order(p: Problem, num_steps: int, row: Any = SGD) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of the unrolled outer value by the flat hyperparameters, by plain autograd through the loop."""
    h = ravel(p.hparams).requires_grad_()
    w = loop(p.inner, row, tree_map(torch.clone, p.params), unravel(p.hparams, h), p.steps(num_steps))
    value = p.outer(w, unravel(p.hparams, h), p.outer_batch)
    (gradient,) = torch.autograd.grad(value, h, create_graph=True)
    return value.detach(), gradient.detach(), torch.stack([torch.autograd.grad(g, h, retain_graph=True)[0] for g in gradient])


def direction(n: int) -> Tensor:
    return torch.cos(1.0 + torch.arange(n, dtype=F64))


def second_order_ways(
    value: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], at: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Hessian times ``direction``, in every way that torch offers: from the estimated gradient, and from the value twice."""
    e = direction(len(at))

    def autograd_of_gradient() -> Tensor:
        x = at.clone().requires_grad_()
        return torch.autograd.grad(gradient(x) @ e, x)[0]

    def twice() -> Tensor:
        x = at.clone().requires_grad_()
        (first,) = torch.autograd.grad(value(x), x, create_graph=True)
        return torch.autograd.grad(first @ e, x)[0]

    return {
        "jacrev of the gradient": lambda: torch.func.jacrev(gradient)(at) @ e,
        "jacfwd of the gradient": lambda: torch.func.jacfwd(gradient)(at) @ e,
        "autograd of the gradient": autograd_of_gradient,
        "jvp(grad) of the value": lambda: torch.func.jvp(torch.func.grad(value), (at,), (e,))[1],
        "grad(grad) of the value": lambda: torch.func.grad(lambda x: torch.func.grad(value)(x) @ e)(at),
        "autograd twice": twice,
    }


MAY_REFUSE = (RuntimeError, ValueError, NotImplementedError, TypeError)


def right_or_refused(ways: dict[str, Callable[[], Tensor]], truth: Tensor, must_work: set[str], tolerance: float) -> None:
    """Never zero, never another number."""
    refused = {}
    for name, way in ways.items():
        try:
            got = way()
        except MAY_REFUSE as error:
            refused[name] = str(error)
            continue
        error = relative_error(got, truth)
        assert error <= tolerance, f"{name}: relative error {error:.3g}\ngot   {got}\ntruth {truth}"
    assert not refused.keys() & must_work, refused
    assert all(len(message) > 20 for message in refused.values()), f"refused without a word: {refused}"


TRANSFORMED = {"jacrev of the gradient", "jacfwd of the gradient"}


SECOND_ORDER = [
    *itertools.product(["logistic_exp_reg"], FEW_OPTIMIZERS, UNDER_TRANSFORMS, [None]),
    ("logistic_exp_reg", "adam", "mixed", 1),
    ("zero_dim", "sgd", "mixed", None),
]


@pytest.mark.parametrize(("problem", "optimizer", "mode", "segment"), SECOND_ORDER)
def test_law_6_derivatives_of_an_unrolled_estimate(problem: str, optimizer: str, mode: str, segment: int | None) -> None:
    p, row = PROBLEMS[problem], OPTIMIZERS[optimizer]
    solver = metacal.descent(p.inner, row.build())
    run = metacal.hypergradient(p.outer, solver, adjoints.Unrolled(mode=mode, segment=segment))
    truth_value, truth_gradient, truth_hessian = truth_of_second_order(p, 3, row)

    def call(h: Tensor) -> metacal.HyperGradient:
        tree = unravel(p.hparams, h)
        return run(solver.init(p.params, tree), tree, p.steps(3), p.outer_batch)

    def value(h: Tensor) -> Tensor:
        return call(h).value

    at = ravel(p.hparams)
    close(call(at).value, truth_value, 1e-12)
    close(torch.func.grad(value)(at), truth_gradient, 1e-10)
    close(torch.func.jacfwd(value)(at), truth_gradient, 1e-10)
    ways = second_order_ways(value, lambda h: ravel(call(h).hparams), at)
    right_or_refused(ways, truth_hessian @ direction(len(at)), TRANSFORMED | {"jvp(grad) of the value", "grad(grad) of the value"}, 1e-9)


def test_law_6_derivatives_of_an_estimate_by_the_initial_params() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.descent(p.inner, optim.adam(0.1))
    for mode in UNDER_TRANSFORMS:
        run = metacal.hypergradient(p.outer, solver, adjoints.Unrolled(mode=mode))

        def gradient(w: Tensor, run: Any = run) -> Tensor:
            return run(solver.init({"w": w}, p.hparams), p.hparams, p.steps(3), p.outer_batch).params["w"]

        w = p.params["w"].clone().requires_grad_()
        value = p.outer(loop(p.inner, OPTIMIZERS["adam"], {"w": w}, p.hparams, p.steps(3)), p.hparams, p.outer_batch)
        (first,) = torch.autograd.grad(value, w, create_graph=True)
        truth = torch.stack([torch.autograd.grad(g, w, retain_graph=True)[0] for g in first])
        close(torch.func.jacrev(gradient)(p.params["w"]), truth, 1e-9)
        close(torch.func.jacfwd(gradient)(p.params["w"]), truth, 1e-9)


def implicit_second_order(p: Problem) -> Tensor:
    """d^2 outer(w*(h), h) / dh^2: central differences of the dense implicit gradient at Newton's solution."""

    def gradient(h: Tree) -> Tensor:
        w = newton(p.inner, p.solution, h, p.batches[0])
        return ravel(implicit_gradient(p.inner, p.outer, w, h, p.batches[0], p.outer_batch, direct_solve).hparams)

    rows = [ravel(central_differences(lambda h, i=i: gradient(h)[i], p.hparams, step=1e-3)) for i in range(len(ravel(p.hparams)))]
    return torch.stack(rows)


IMPLICIT = [
    ("logistic_exp_reg", linear.Dense()),
    ("zero_dim", linear.CG(2)),
    ("zero_dim", linear.Neumann(num_steps=12, step_size=0.33)),
]


@pytest.mark.parametrize(("problem", "linear_solver"), IMPLICIT, ids=str)
@pytest.mark.parametrize("inner", ["descent", "stationary"])
def test_law_6_derivatives_of_an_implicit_estimate(inner: str, problem: str, linear_solver: linear.LinearSolver) -> None:
    """Descent that has converged, and a solution found elsewhere: d w*/d h belongs to the derivative in both."""
    p = PROBLEMS[problem]
    truth = implicit_second_order(p)
    solver = sgd_solver(p) if inner == "descent" else metacal.stationary(p.inner)
    num_steps = 2 if inner == "descent" else 1
    run = metacal.hypergradient(p.outer, solver, adjoints.Implicit(linear_solver))

    def call(h: Tensor) -> metacal.HyperGradient:
        tree = unravel(p.hparams, h)
        return run(solver.init(p.solution, tree), tree, p.steps(num_steps), p.outer_batch)

    at = ravel(p.hparams)
    right_or_refused(
        {
            "grad of the value": lambda: torch.func.grad(lambda h: call(h).value)(at),
            "jacfwd of the value": lambda: torch.func.jacfwd(lambda h: call(h).value)(at),
        },
        ravel(p.hypergradient),
        {"grad of the value"} if inner == "descent" else set(),
        1e-7,
    )
    ways = second_order_ways(lambda h: call(h).value, lambda h: ravel(call(h).hparams), at)
    right_or_refused(ways, truth @ direction(len(at)), TRANSFORMED if inner == "descent" else set(), 1e-6)


@pytest.mark.parametrize(("problem", "linear_solver"), IMPLICIT, ids=str)
def test_law_6_derivatives_of_solve_by_an_implicit_adjoint(problem: str, linear_solver: linear.LinearSolver) -> None:
    p = PROBLEMS[problem]
    adjoint, solver = adjoints.Implicit(linear_solver), metacal.stationary(p.inner)

    def value(h: Tensor) -> Tensor:
        tree = unravel(p.hparams, h)
        return p.outer(metacal.solve(solver, p.solution, tree, p.steps(1), adjoint), tree, p.outer_batch)

    at, must = ravel(p.hparams), {"jvp(grad) of the value", "grad(grad) of the value", "autograd twice"}
    close(torch.func.grad(value)(at), ravel(p.hypergradient), 1e-9)
    ways = second_order_ways(value, torch.func.grad(value), at)
    ways.pop("autograd of the gradient")
    right_or_refused(ways, implicit_second_order(p) @ direction(len(at)), must, 1e-6)


@pytest.mark.parametrize(
    ("problem", "optimizer", "mode"), [("multi_leaf", "momentum0.9", "mixed"), *(cell[:3] for cell in SECOND_ORDER if cell[3] is None)]
)
def test_law_6_derivatives_of_solve_by_unrolling(problem: str, optimizer: str, mode: str) -> None:
    p, row = PROBLEMS[problem], OPTIMIZERS[optimizer]
    solver = metacal.descent(p.inner, row.build())

    def value(h: Tensor) -> Tensor:
        tree = unravel(p.hparams, h)
        return p.outer(metacal.solve(solver, p.params, tree, p.steps(3), adjoints.Unrolled(mode=mode)), tree, p.outer_batch)

    _, gradient, hessian = truth_of_second_order(p, 3, row)
    at = ravel(p.hparams)
    close(torch.func.grad(value)(at), gradient)
    x = at.clone().requires_grad_()
    value(x).backward()
    close(x.grad, gradient)
    right_or_refused({"forward": lambda: torch.func.jacfwd(value)(at)}, gradient, set(), 1e-9)
    ways = second_order_ways(value, torch.func.grad(value), at)
    ways.pop("autograd of the gradient")
    right_or_refused(ways, hessian @ direction(len(at)), {"jvp(grad) of the value", "grad(grad) of the value", "autograd twice"}, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_law_6_the_torch_door(mode: str) -> None:
    """``outer(solve(...)).backward()`` fills ``.grad`` of params and hparams that are nn.Parameters."""
    p, row = PROBLEMS["mlp_reweighting"], OPTIMIZERS["momentum0.9"]
    solver = metacal.descent(p.inner, row.build())
    params = tree_map(lambda x: torch.nn.Parameter(x.clone()), p.params)
    hparams = tree_map(lambda x: torch.nn.Parameter(x.clone()), p.hparams)
    stats: dict[str, Tensor] = {}
    w = metacal.solve(solver, params, hparams, p.steps(5), adjoints.Unrolled(mode=mode), stats=stats)
    value = p.outer(w, hparams, p.outer_batch)
    value.backward()
    truth = unrolled_gradient(p, row, 5)
    close(value, truth.value, 1e-12)
    close(tree_map(lambda x: x.grad, hparams), truth.hparams)
    close(tree_map(lambda x: x.grad, params), truth.params)
    assert int(stats["first_bad_step"]) == -1


def test_law_6_three_levels() -> None:
    """A solve inside an inner objective, differentiated in every mode: against three nested loops on plain autograd."""
    i = torch.arange(3, dtype=F64)
    matrix = torch.eye(3, dtype=F64) + 0.2 * torch.sin(3 * i[:, None] + i)
    x0, y0, z = torch.zeros(3, dtype=F64), 0.1 * torch.ones(3, dtype=F64), torch.cos(i)

    def lowest(x: Tensor, y_and_z: Any, b: Tree) -> Tensor:
        y, z = y_and_z
        return 0.5 * ((matrix @ x - y) ** 2).sum() + 0.1 * (torch.exp(z) * x**2).sum()

    def middle_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((x - torch.sin(z)) ** 2).sum() + 0.05 * (y**4).sum() + 0.1 * (x * y * z).sum()

    def highest(y: Tensor, z: Tensor, b: Tree) -> Tensor:
        return (y**3).sum() + (torch.cos(z) * y).sum()

    def written_out(z: Tensor) -> Tensor:
        y = y0.clone().requires_grad_()
        for _ in range(2):
            x = x0.clone().requires_grad_()
            for _ in range(3):
                x = x - 0.2 * torch.autograd.grad(lowest(x, (y, z), ()), x, create_graph=True)[0]
            y = y - 0.3 * torch.autograd.grad(middle_of(x, y, z), y, create_graph=True)[0]
        return highest(y, z, ())

    leaf = z.clone().requires_grad_()
    (truth,) = torch.autograd.grad(written_out(leaf), leaf)

    for low, mid in (("mixed", "mixed"), ("reverse", "mixed"), ("mixed", "reverse"), ("reverse", "graph")):
        inmost = metacal.descent(lowest, optim.sgd(0.2))

        def middle(y: Tensor, z: Tensor, b: Tree, low: str = low, inmost: Any = inmost) -> Tensor:
            return middle_of(metacal.solve(inmost, x0, (y, z), metacal.repeat((), 3), adjoints.Unrolled(mode=low)), y, z)

        solver = metacal.descent(middle, optim.sgd(0.3))
        hg = metacal.hypergradient(highest, solver, adjoints.Unrolled(mode=mid))(solver.init(y0, z), z, metacal.repeat((), 2), ())
        close(hg.hparams, truth, 1e-10)

    quick = metacal.descent(lowest, optim.sgd(0.6))

    def implicit_middle(y: Tensor, z: Tensor, b: Tree) -> Tensor:
        x = metacal.solve(quick, x0, (y, z), metacal.repeat((), 60), adjoints.Implicit(linear.Dense()))
        return middle_of(x, y, z)

    def exact_middle(y: Tensor, z: Tensor) -> Tensor:
        x = torch.linalg.solve(matrix.T @ matrix + 0.2 * torch.diag(torch.exp(z)), matrix.T @ y)
        return middle_of(x, y, z)

    leaf = z.clone().requires_grad_()
    y = y0.clone().requires_grad_()
    for _ in range(2):
        y = y - 0.3 * torch.autograd.grad(exact_middle(y, leaf), y, create_graph=True)[0]
    (truth,) = torch.autograd.grad(highest(y, leaf, ()), leaf)
    for mode in ("mixed", "graph"):
        solver = metacal.descent(implicit_middle, optim.sgd(0.3))
        hg = metacal.hypergradient(highest, solver, adjoints.Unrolled(mode=mode))(solver.init(y0, z), z, metacal.repeat((), 2), ())
        close(hg.hparams, truth, 1e-8)


DIFFERENTIATED: dict[str, Any] = {
    "forward": adjoints.Forward(),
    "sketch": adjoints.ForwardSketch(num_directions=2),
    "finite difference": adjoints.FiniteDifference(radius=0.2),
    "SAMA": adjoints.SAMA(radius=0.2),
    "zeroth order": adjoints.ZerothOrder(num_directions=2, radius=0.1),
    "first order": adjoints.FirstOrder(),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("adjoint", DIFFERENTIATED)
def test_law_6_derivatives_of_an_approximate_estimate(adjoint: str, optimizer: str) -> None:
    """The derivative of the value is that of the run; that of the estimate is the estimate's own, for one draw of directions."""
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.descent(p.inner, OPTIMIZERS[optimizer].build())
    run = metacal.hypergradient(p.outer, solver, DIFFERENTIATED[adjoint])

    def call(h: Tensor) -> metacal.HyperGradient:
        torch.manual_seed(11)
        tree = unravel(p.hparams, h)
        return run(solver.init(p.params, tree), tree, p.steps(2), p.outer_batch)

    def gradient(h: Tensor) -> Tensor:
        return ravel(call(h).hparams)

    at, e = ravel(p.hparams), direction(3)
    truth = unrolled_gradient(p, OPTIMIZERS[optimizer], 2)
    ways = {
        "grad of the value": lambda: torch.func.grad(lambda h: call(h).value)(at),
        "jvp of the value": lambda: torch.func.jacfwd(lambda h: call(h).value, randomness="same")(at),
    }
    right_or_refused(ways, ravel(truth.hparams), set(), 1e-9)

    # Every Jacobian of a map of three numbers, by rows of central differences
    jacobian = torch.stack([ravel(central_differences(lambda h, i=i: gradient(h["lam"])[i], p.hparams, step=1e-3)) for i in range(3)])

    def autograd() -> Tensor:
        x = at.clone().requires_grad_()
        return torch.autograd.grad(gradient(x) @ e, x)[0]

    ways = {
        "jacrev": lambda: e @ torch.func.jacrev(gradient)(at),
        "jacfwd": lambda: e @ torch.func.jacfwd(gradient, randomness="same")(at),
        "autograd": autograd,
    }
    right_or_refused(ways, e @ jacobian, set(), 1e-6)


@pytest.mark.parametrize("adjoint", ["forward", "sketch", "zeroth order", "finite difference", "SAMA"])
def test_law_6_a_solve_by_an_approximate_adjoint(adjoint: str) -> None:
    """``backward`` gives the estimate; a second derivative of what is exact is exact, and of what is not is refused or its own."""
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.descent(p.inner, optim.adam(0.1))

    def value(h: Tensor) -> Tensor:
        torch.manual_seed(11)
        tree = unravel(p.hparams, h)
        return p.outer(metacal.solve(solver, p.params, tree, p.steps(3), DIFFERENTIATED[adjoint]), tree, p.outer_batch)

    at = ravel(p.hparams)
    x = at.clone().requires_grad_()
    value(x).backward()
    torch.manual_seed(11)
    hg = estimate(p, solver, DIFFERENTIATED[adjoint], 3)
    close(x.grad, ravel(hg.hparams), 1e-10)
    _, gradient, hessian = truth_of_second_order(p, 3, OPTIMIZERS["adam"])
    if adjoint == "forward":
        right_or_refused(
            {"grad": lambda: torch.func.grad(value)(at), "jacfwd": lambda: torch.func.jacfwd(value)(at)}, gradient, {"grad"}, 1e-9
        )
        ways = second_order_ways(value, torch.func.grad(value), at)
        ways.pop("autograd of the gradient")
        right_or_refused(ways, hessian @ direction(3), set(), 1e-9)


def test_law_6_an_estimate_outside_transforms_is_cut_off() -> None:
    """Differentiating its results by plain autograd is an error, not a zero."""
    p = PROBLEMS["ridge_scalar"]
    for adjoint in ALL_ADJOINTS.values():
        h = leaf_grads(p.hparams)
        hg = estimate(p, sgd_solver(p), adjoint, 2, hparams=h)
        for result in (hg.value, *leaves(hg.hparams), *leaves(hg.params), *leaves(hg.state.params)):
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.autograd.grad(result.sum(), h["lam"])
        assert h["lam"].grad is None


def test_law_6_graph_mode_is_outermost_only() -> None:
    p = PROBLEMS["ridge_scalar"]

    def value(lam: Tensor) -> Tensor:
        return estimate(p, sgd_solver(p), adjoints.Unrolled(mode="graph"), 2, hparams={"lam": lam}).value

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.vmap):
        with pytest.raises((RuntimeError, ValueError), match="mixed"):
            transform(value)(f64(0.3) if transform is not torch.func.vmap else f64(0.3, 0.4))


# Law 7: compiled equals eager


def test_law_7_a_compiled_solver_equals_the_eager_one() -> None:
    p = PROBLEMS["mlp_reweighting"]
    eager = metacal.descent(p.inner, optim.sgd(0.1, momentum=0.9))
    compiled = metacal.descent(p.inner, optim.sgd(0.1, momentum=0.9), compile=True)
    for adjoint in (adjoints.Unrolled(), adjoints.Implicit(linear.Neumann(num_steps=3, step_size=0.1))):
        one, two = estimate(p, eager, adjoint, 3), estimate(p, compiled, adjoint, 3)
        close(two.value, one.value, 1e-12)
        close(two.hparams, one.hparams, 1e-10)
        close(two.params, one.params, 1e-10)
        close(two.state.params, one.state.params, 1e-12)


# Law 8: replay is exact with random numbers


def noisy(p: Tree, h: Tree, b: Tree) -> Tensor:
    """Dropout, additive noise and a random permutation: three uses of the default generator in one step."""
    x, y = b
    kept = torch.nn.functional.dropout(x, 0.4)
    weights = torch.rand(len(y), dtype=F64)
    order = torch.randperm(len(y))
    z = (kept @ (p["w"] + 0.1 * torch.randn(3, dtype=F64)) - y)[order]
    return 0.5 * (weights * z**2).mean() + 0.5 * (h["lam"].exp() * p["w"] ** 2).sum()


def noisy_outer(p: Tree, h: Tree, b: Tree) -> Tensor:
    x, y = b
    return 0.5 * ((torch.nn.functional.dropout(x, 0.3) @ p["w"] - y) ** 2).mean()


def noisy_problem() -> Problem:
    base = PROBLEMS["ridge_scalar"]
    return Problem(
        "noisy",
        noisy,
        noisy_outer,
        {"w": f64(0.3, -0.2, 0.5)},
        {"lam": f64(-1.0, 0.0, -0.5)},
        base.batches,
        base.outer_batch,
        step_size=0.2,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("segment", [None, 1, 2, 5])
@pytest.mark.parametrize("mode", MODES)
def test_law_8_replay_draws_the_same_noise(mode: str, segment: int | None, optimizer: str) -> None:
    p, row = noisy_problem(), OPTIMIZERS[optimizer]
    torch.manual_seed(7)
    truth = unrolled_gradient(p, row, 5)
    after = torch.get_rng_state()
    torch.manual_seed(8)
    assert relative_error(unrolled_gradient(p, row, 5).hparams, truth.hparams) > 1e-2, "the noise matters"

    torch.manual_seed(7)
    hg = estimate(p, metacal.descent(p.inner, row.build()), adjoints.Unrolled(mode=mode, segment=segment), 5)
    close(hg.value, truth.value, 1e-12)
    close(hg.hparams, truth.hparams)
    close(hg.params, truth.params)
    assert torch.equal(torch.get_rng_state(), after), "law 10: the backward sweep draws nothing extra"

    torch.manual_seed(7)
    h, w = leaf_grads(p.hparams), leaf_grads(p.params)
    end = metacal.solve(metacal.descent(p.inner, row.build()), w, h, p.steps(5), adjoints.Unrolled(mode=mode, segment=segment))
    value = p.outer(end, h, p.outer_batch)
    before_backward = torch.get_rng_state()
    torch.rand(3)
    value.backward()
    close(tree_map(lambda x: x.grad, h), truth.hparams)
    assert torch.equal(before_backward, after)


def test_law_8_windows_replay_the_same_noise() -> None:
    p = noisy_problem()
    for mode, window in itertools.product((*MODES, "auto"), (1, 3)):
        torch.manual_seed(7)
        truth = unrolled_gradient(p, SGD, 5, window)
        torch.manual_seed(7)
        hg = estimate(p, metacal.descent(p.inner, SGD.build()), adjoints.Unrolled(mode=mode, window=window), 5)
        close(hg.hparams, truth.hparams)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_law_8_forward_mode_sees_the_same_noise(optimizer: str) -> None:
    """In every direction, whether pushed together or one by one."""
    p, row = noisy_problem(), OPTIMIZERS[optimizer]
    torch.manual_seed(7)
    truth = unrolled_gradient(p, row, 4)
    after = torch.get_rng_state()
    for adjoint in (adjoints.Forward(), adjoints.Forward(chunk_size=1), adjoints.Forward(chunk_size=2)):
        torch.manual_seed(7)
        hg = estimate(p, metacal.descent(p.inner, row.build()), adjoint, 4)
        close(hg.value, truth.value, 1e-12)
        close(hg.hparams, truth.hparams)
        assert torch.equal(torch.get_rng_state(), after)


def test_law_8_differences_see_one_realisation() -> None:
    """Both gradients of a finite difference: else it would be noise over the radius. Both runs of a zeroth-order direction."""
    p, radius = noisy_problem(), 1e-3
    torch.manual_seed(7)
    hg = estimate(p, sgd_solver(p), adjoints.FiniteDifference(radius=radius), 3)
    torch.manual_seed(7)
    again = estimate(p, sgd_solver(p), adjoints.Implicit(linear.Identity()), 3)
    close(hg.hparams, again.hparams, 1e-5)

    quiet = dataclasses.replace(p, outer=PROBLEMS["ridge_scalar"].outer)
    torch.manual_seed(7)
    hg = estimate(quiet, sgd_solver(p), adjoints.ZerothOrder(num_directions=1, radius=radius), 3)
    u = ravel(hg.hparams).sign()

    def end(s: float) -> Tensor:
        torch.manual_seed(7)
        return shifted_end(p, 3, unravel(p.hparams, s * u))

    w = unravel(p.params, end(0.0).requires_grad_())
    f_w = ravel(derivative(quiet.outer(w, p.hparams, p.outer_batch), w))
    close(ravel(hg.hparams), f_w @ (end(radius) - end(-radius)) / (2 * radius) * u, 1e-7)


@pytest.mark.parametrize("select", ["last", "every"])
def test_law_8_one_realisation_of_noise_per_linear_solve(select: str) -> None:
    """Many products, one matrix: iterative and direct solvers agree, and the reported residual is the true one."""
    p, found = noisy_problem(), []
    exact = (linear.MINRES(8), linear.GMRES(3), linear.Lanczos(3), linear.BiCGSTAB(6), linear.NormalCG(8))
    for solver in (linear.CG(8), linear.Dense(), *exact):
        torch.manual_seed(3)
        hg = estimate(p, sgd_solver(p), adjoints.Implicit(solver, select=getattr(linear, select)), 4)
        found.append(hg.hparams)
        assert float(hg.stats["linear_residual"]) < 1e-10
        close(found[0], found[-1], 1e-9)
    if select == "every":
        return
    # Matrix and mixed product belong to one realisation: that of the last step, or the next in line.
    torch.manual_seed(3)
    w = tree_map(torch.clone, p.params)
    for batch in p.steps(4):
        last = torch.get_rng_state()
        w = tree_map(torch.Tensor.detach, loop(p.inner, SGD, w, p.hparams, [batch], {"lr": p.step_size}))
    following = torch.get_rng_state()

    def with_noise(objective: Any, noise: Tensor) -> Any:
        def call(w: Tree, h: Tree, b: Tree) -> Tensor:
            torch.set_rng_state(noise)
            return objective(w, h, b)

        return call

    errors = []
    for noise in (last, following):
        inner, outer = with_noise(p.inner, noise), with_noise(p.outer, following)
        errors.append(relative_error(found[1], implicit_gradient(inner, outer, w, p.hparams, TRAIN, p.outer_batch, direct_solve).hparams))
    assert min(errors) < 1e-9
    assert max(errors) > 1e-3


# Law 9: optimizers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_9_trajectories_equal_torch_optim(optimizer: str) -> None:
    p, row = PROBLEMS["mlp_reweighting"], OPTIMIZERS[optimizer]
    solver = metacal.descent(p.inner, row.build())
    ours = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(20)).params
    theirs = [x.clone().requires_grad_() for x in leaves(p.params)]
    torch_optimizer = row.torch(theirs)
    for batch in p.steps(20):
        torch_optimizer.zero_grad()
        p.inner(rebuild(p.params, theirs), p.hparams, batch).backward()
        torch_optimizer.step()
    assert max(float((x - y.detach()).abs().max()) for x, y in zip(leaves(ours), theirs, strict=True)) <= 1e-14


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_9_every_hyperparameter_is_differentiable(optimizer: str, mode: str) -> None:
    """lr, momentum, dampening, betas, alpha, weight decay, eps: the loop's exact derivative, and central differences of it."""
    p, row, num_steps = PROBLEMS["logistic_exp_reg"], OPTIMIZERS[optimizer], 5
    numbers = {k: v for k, v in row.hyper.items() if k != "betas"}
    if "eps" in numbers:
        numbers["eps"] = 1e-2  # large enough to matter
    if row.kind == "sgd":
        numbers.setdefault("weight_decay", 0.0)
    if "betas" in row.hyper:
        numbers["beta1"], numbers["beta2"] = row.hyper["betas"]
    numbers = {k: f64(v) for k, v in numbers.items()}

    def settings(h: Tree) -> dict[str, Any]:
        out = {k: v for k, v in h.items() if not k.startswith("beta")}
        return {**out, "betas": (h["beta1"], h["beta2"])} if "beta1" in h else out

    solver = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), lambda h: row.build(settings(h)))
    run = metacal.hypergradient(lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoints.Unrolled(mode=mode))
    hg = run(solver.init(p.params, numbers), numbers, p.steps(num_steps), p.outer_batch)

    def value(h: Tree) -> Tensor:
        w = loop(p.inner, row, tree_map(torch.clone, p.params), p.hparams, p.steps(num_steps), settings(h))
        return p.outer(w, p.hparams, p.outer_batch)

    h = leaf_grads(numbers)
    truth = derivative(value(h), h)
    for name in numbers:
        close(hg.hparams[name], truth[name], 1e-9)
    close(truth, central_differences(value, numbers, step=1e-5), 1e-6)


# Law 10: nothing is touched, nothing drawn, nothing grows


ALL_ADJOINTS = {
    **{f"unrolled {m}": adjoints.Unrolled(mode=m) for m in MODES},
    "unrolled auto": adjoints.Unrolled(mode="auto"),
    "window": adjoints.Unrolled(window=2),
    "first order": adjoints.FirstOrder(),
    "CG": adjoints.Implicit(linear.CG(3)),
    "Neumann": adjoints.Implicit(linear.Neumann(num_steps=3, step_size=0.1)),
    "dense": adjoints.Implicit(linear.Dense()),
    "identity": adjoints.Implicit(linear.Identity()),
    "MINRES": adjoints.Implicit(linear.MINRES(3)),
    "GMRES": adjoints.Implicit(linear.GMRES(3)),
    "Lanczos": adjoints.Implicit(linear.Lanczos(3)),
    "BiCGSTAB": adjoints.Implicit(linear.BiCGSTAB(3)),
    "NormalCG": adjoints.Implicit(linear.NormalCG(3)),
    "Nystroem": adjoints.Implicit(linear.Nystroem(rank=2)),
    "preconditioned CG": adjoints.Implicit(linear.CG(2, preconditioner=linear.Diagonal(2))),
    "forward": adjoints.Forward(),
    "sketch": adjoints.ForwardSketch(num_directions=2),
    "finite difference": adjoints.FiniteDifference(),
    "SAMA": adjoints.SAMA(),
    "zeroth order": adjoints.ZerothOrder(num_directions=2),
}
NOT_APPLICABLE |= {
    ("sketch", "law 10"): "its random directions come from the default generator, before the run: by design",
    ("zeroth order", "law 10"): "its random directions come from the default generator, after the run: by design",
    ("sketch", "law 12"): "along random directions a derivative of zero is zero in the mean only",
    ("zeroth order", "law 12"): "along random directions a derivative of zero is zero in the mean only",
}


@pytest.mark.parametrize(("adjoint", "law"), cells(ALL_ADJOINTS, ["law 10"]))
def test_law_10_the_generator_ends_where_run_and_outer_leave_it(adjoint: str, law: str) -> None:
    p = noisy_problem()
    solver = metacal.descent(p.inner, optim.adam(0.05))
    state = solver.init(p.params, p.hparams)
    torch.manual_seed(5)
    end = metacal.run(solver, state, p.hparams, p.steps(4))
    value = p.outer(end.params, p.hparams, p.outer_batch)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    hg = metacal.hypergradient(p.outer, solver, ALL_ADJOINTS[adjoint])(state, p.hparams, p.steps(4), p.outer_batch)
    close(hg.value, value, 1e-13)
    close(hg.state.params, end.params, 1e-13)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("adjoint", ALL_ADJOINTS)
def test_law_10_inputs_are_untouched(adjoint: str) -> None:
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.sgd(0.05, momentum=0.9))
    params = tree_map(lambda x: torch.nn.Parameter(x.clone()), p.params)
    hparams = tree_map(lambda x: torch.nn.Parameter(x.clone()), p.hparams)
    state = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(2))._replace(params=params)
    everything = leaves((tuple(state), hparams, p.batches, p.outer_batch))
    before = [(x.detach().clone(), x._version, x.requires_grad) for x in everything]
    metacal.hypergradient(p.outer, solver, ALL_ADJOINTS[adjoint])(state, hparams, p.steps(3), p.outer_batch)
    for x, (value, version, requires_grad) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
        assert x.requires_grad == requires_grad
        assert x.grad is None


@pytest.mark.parametrize("adjoint", ALL_ADJOINTS)
def test_law_10_two_calls_agree_bit_for_bit(adjoint: str) -> None:
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.adam(0.05))
    one, two = ((torch.manual_seed(4), estimate(p, solver, ALL_ADJOINTS[adjoint], 3))[1] for _ in range(2))
    assert torch.equal(ravel(one.hparams), ravel(two.hparams))
    assert torch.equal(one.value, two.value)


@pytest.mark.parametrize(
    "adjoint", ["unrolled mixed", "unrolled reverse", "unrolled graph", "CG", "GMRES", "forward", "SAMA", "zeroth order"]
)
def test_law_10_memory_does_not_grow_over_outer_steps(adjoint: str) -> None:
    """The number and size of live tensors is the same after 3 and after 6 warm-started outer steps."""
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.sgd(0.05, momentum=0.9))
    outer_loop = metacal.nested(p.outer, solver, ALL_ADJOINTS[adjoint], optim.adam(0.01))
    state = outer_loop.init(p.params, p.hparams)

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return len(tensors), sum(x.numel() for x in tensors)

    seen = []
    for _ in range(2):
        for _ in range(3):
            state, hg = outer_loop.step(state, p.steps(3), p.outer_batch)
            del hg
        seen.append(live())
    # Fewer is well: what an earlier test left behind may go meanwhile.
    assert all(after <= before for before, after in zip(*seen, strict=True)), seen


# Law 11: not-a-number is neither hidden nor made


@pytest.mark.parametrize("adjoint", ALL_ADJOINTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_law_11_a_nan_never_becomes_a_zero(adjoint: str, poison: float) -> None:
    p = PROBLEMS["ridge_scalar"]

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        batch, factor = b
        return p.inner(w, h, batch) * factor

    batches = [(p.batches[0], f64(poison if t == 2 else 1.0)) for t in range(5)]
    solver = metacal.descent(inner, optim.sgd(0.1))
    hg = metacal.hypergradient(p.outer, solver, ALL_ADJOINTS[adjoint])(solver.init(p.params, p.hparams), p.hparams, batches, p.outer_batch)
    assert not torch.isfinite(hg.value)
    if adjoint != "first order":  # whose hparams are the direct part alone: f does not depend on lam
        assert not torch.isfinite(hg.hparams["lam"])
    assert int(hg.stats["first_bad_step"]) == 2
    good = estimate(p, solver_of(p), ALL_ADJOINTS[adjoint], 5)
    assert int(good.stats["first_bad_step"]) == -1


def solver_of(p: Problem) -> metacal.InnerSolver:
    return metacal.descent(p.inner, optim.sgd(0.1))


def test_law_11_linear_solvers_do_not_hide_a_nan() -> None:
    solvers = (
        linear.CG(3),
        linear.Neumann(num_steps=2, step_size=0.1),
        linear.Neumann(num_steps=2),
        linear.MINRES(3),
        linear.GMRES(3),
        linear.Lanczos(3),
        linear.BiCGSTAB(3),
        linear.NormalCG(3),
        linear.Dense(),
        linear.Dense(factorization="cholesky"),
        linear.Nystroem(rank=1),
        linear.CG(3, preconditioner=linear.Diagonal(1)),
    )
    for solver in (*solvers, linear.Identity()):
        solution = solver.solve(lambda v: v, f64(1.0, float("nan")))
        assert not torch.isfinite(solution.value).all(), solver
    for solver in solvers:
        solution = solver.solve(lambda v: v * f64(1.0, float("nan")), f64(1.0, 1.0))
        assert not torch.isfinite(solution.value).all(), solver
        assert not torch.isfinite(solution.residual_norm), solver


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", [name for name, row in OPTIMIZERS.items() if row.fixed_points_are_stationary])
def test_law_11_a_zero_gradient_does_not_poison_the_others(optimizer: str, mode: str) -> None:
    """A coordinate that the loss never sees, an entire leaf of them, and a start where all is zero: against the problem without them."""
    row, p = OPTIMIZERS[optimizer], PROBLEMS["logistic_exp_reg"]
    hyper = {"eps": 1e-10} if optimizer == "adagrad" else {}
    hparams = {**p.hparams, "lr": f64(0.1)}
    solver = metacal.descent(
        lambda w, h, b: p.inner({"w": w["w"][:3]}, h, b) + 0.0 * w["dead"].sum(), lambda h: row.build({**hyper, "lr": h["lr"]})
    )

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.outer({"w": w["w"][:3]}, h, b) + 2.0 * w["w"][3] + w["dead"].sum()

    params = {"w": torch.cat([p.params["w"], f64([0.7])]), "dead": torch.zeros(2, dtype=F64)}
    run = metacal.hypergradient(outer, solver, adjoints.Unrolled(mode=mode))
    hg = run(solver.init(params, hparams), hparams, p.steps(4), p.outer_batch)

    w, h = leaf_grads(p.params), leaf_grads(hparams)
    end = loop(p.inner, row, w, h, p.steps(4), {**hyper, "lr": h["lr"]})
    value = p.outer(end, h, p.outer_batch)
    close(hg.hparams, derivative(value, h, create_graph=True))
    close(hg.params["w"][:3], derivative(value, w)["w"])
    assert hg.params["w"][3] == 2.0
    assert hg.params["dead"].tolist() == [1.0, 1.0]


# Law 12: the smallest cases


@pytest.mark.parametrize("adjoint", ALL_ADJOINTS)
def test_law_12_empty_hparams(adjoint: str) -> None:
    p = PROBLEMS["logistic_exp_reg"]
    for empty in ({}, ()):
        solver = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.1))
        run = metacal.hypergradient(lambda w, h, b: p.outer(w, p.hparams, b), solver, ALL_ADJOINTS[adjoint])
        hg = run(solver.init(p.params, empty), empty, p.steps(3), p.outer_batch)
        assert hg.hparams == empty
        if adjoint.startswith("unrolled"):
            close(hg.params, unrolled_gradient(p, SGD, 3).params)


@pytest.mark.parametrize(("adjoint", "law"), cells(ALL_ADJOINTS, ["law 12"]))
def test_law_12_an_hparam_without_influence_has_a_zero_derivative(adjoint: str, law: str) -> None:
    p = PROBLEMS["ridge_scalar"]
    hparams = {**p.hparams, "unused": f64(1.0, 2.0)}
    assert estimate(p, solver_of(p), ALL_ADJOINTS[adjoint], 3, hparams=hparams).hparams["unused"].tolist() == [0.0, 0.0]


def test_law_12_the_same_tensor_as_params_and_hparams() -> None:
    """MAML's start that is also the anchor: the two roles are told apart."""
    p = PROBLEMS["ridge_scalar"]
    shared = f64(0.2, -0.1, 0.3)

    def inner(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.inner(w, p.hparams, b) + 0.5 * ((w["w"] - h) ** 2).sum()

    solver = metacal.descent(inner, optim.sgd(0.1))
    for mode in MODES:
        run = metacal.hypergradient(lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoints.Unrolled(mode=mode))
        hg = run(solver.init({"w": shared}, shared), shared, p.steps(3), p.outer_batch)
        w, h = shared.clone().requires_grad_(), shared.clone().requires_grad_()
        value = p.outer(loop(inner, SGD, {"w": w}, h, p.steps(3)), p.hparams, p.outer_batch)
        truth = torch.autograd.grad(value, (w, h))
        close((hg.params["w"], hg.hparams), truth)


# The two training loops are compositions of the above


def test_nested_moves_the_hparams_and_carries_the_inner_state_over() -> None:
    p, num_outer = PROBLEMS["mlp_reweighting"], 4
    row = OPTIMIZERS["momentum0.9"]
    solver = metacal.descent(p.inner, row.build())
    for warm_start in (True, False):
        outer_loop = metacal.nested(p.outer, solver, adjoints.Unrolled(), optim.adam(0.05), warm_start=warm_start)
        start_state = outer_loop.init(p.params, p.hparams)
        h = leaf_grads(p.hparams)
        torch_outer = torch.optim.Adam(leaves(h), lr=0.05)
        inner_state, data = solver.init(p.params, p.hparams), [(p.steps(3), p.outer_batch)] * num_outer
        for step, (state, hg) in enumerate(metacal.iterate(outer_loop, start_state, data), start=1):
            start = inner_state if warm_start else solver.init(p.params, tree_map(torch.Tensor.detach, h))
            expected = metacal.hypergradient(p.outer, solver, adjoints.Unrolled())(
                start, tree_map(torch.Tensor.detach, h), p.steps(3), p.outer_batch
            )
            close(hg.hparams, expected.hparams, 1e-12)
            for x, g in zip(leaves(h), leaves(expected.hparams), strict=True):
                x.grad = g.clone()
            torch_outer.step()
            close(state.hparams, h, 1e-13)
            inner_state = expected.state
            assert int(state.step) == step
        assert step == num_outer
        if warm_start:
            close(state.inner.params, inner_state.params, 1e-13)


def test_nested_solves_a_bilevel_problem() -> None:
    """quadratic_bilevel has a unique minimiser: the zero of its closed-form hypergradient, an affine map of x."""
    p = PROBLEMS["quadratic_bilevel"]

    def gradient(x: Tensor) -> Tensor:
        at = implicit_solution(x)
        return implicit_gradient(p.inner, p.outer, {"z": at}, {"x": x}, (), (), direct_solve).hparams["x"]

    def implicit_solution(x: Tensor) -> Tensor:
        _, hessian, _ = second_order(p.inner, p.params, {"x": x}, ())
        g, _, _ = second_order(p.inner, {"z": torch.zeros(4, dtype=F64)}, {"x": x}, ())
        return -torch.linalg.solve(hessian, g)

    zero = torch.zeros(3, dtype=F64)
    offset = gradient(zero)
    matrix = torch.stack([gradient(e) - offset for e in torch.eye(3, dtype=F64)], 1)
    truth = torch.linalg.solve(matrix, -offset)
    outer_loop = metacal.nested(
        p.outer, metacal.descent(p.inner, optim.sgd(0.4)), adjoints.Implicit(linear.CG(4)), optim.sgd(0.3, momentum=0.6)
    )
    data = [(p.steps(4), ())] * 80
    state, hg = list(metacal.iterate(outer_loop, outer_loop.init(p.params, p.hparams), data))[-1]
    close(state.hparams["x"], truth, 1e-5)
    assert float(hg.stats["residual_norm"]) < 1e-5


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled(), adjoints.Unrolled(mode="reverse"), adjoints.FirstOrder()], ids=str)
def test_meta_initialisation_moves_the_start(adjoint: Any) -> None:
    """Three outer steps of MAML with the outer torch.optim.Adam, task by task."""
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.1))

    def outer(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.outer(w, p.hparams, b)

    outer_loop = metacal.meta_initialisation(outer, solver, adjoint, optim.adam(0.05))
    w = leaf_grads(p.params)
    torch_outer = torch.optim.Adam(leaves(w), lr=0.05)
    for state, hg in metacal.iterate(outer_loop, outer_loop.init(p.params, {}), [(p.steps(2), p.outer_batch)] * 3):
        torch_outer.zero_grad()
        if isinstance(adjoint, adjoints.FirstOrder):
            end = leaf_grads(loop(p.inner, SGD, w, p.hparams, p.steps(2)))
            w["w"].grad = derivative(outer(end, {}, p.outer_batch), end)["w"]
        else:
            outer(loop(p.inner, SGD, w, p.hparams, p.steps(2)), {}, p.outer_batch).backward()
        close(hg.params["w"], w["w"].grad, 1e-10)
        torch_outer.step()
        close(state.inner.params, w, 1e-12)


def test_meta_initialisation_with_an_implicit_adjoint_is_imaml() -> None:
    """d outer(w*(theta)) / d theta = strength (H + strength I)^-1 f_w for the proximal problem (Rajeswaran et al. 2019, eq. 6)."""
    p, strength = PROBLEMS["logistic_exp_reg"], 0.8
    solver = metacal.proximal(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.25), strength, anchor=lambda h: h)
    outer_loop = metacal.meta_initialisation(
        lambda w, h, b: p.outer(w, p.hparams, b), solver, adjoints.Implicit(linear.Dense()), optim.sgd(0.5)
    )
    state, hg = outer_loop.step(outer_loop.init(p.params, {}), p.steps(200), p.outer_batch)

    def tied(w: Tree, h: Tree, b: Tree) -> Tensor:
        return p.inner(w, p.hparams, b) + strength / 2 * ((w["w"] - h["w"]) ** 2).sum()

    end = newton(tied, p.params, p.params, p.batches[0])
    _, hessian, _ = second_order(tied, end, p.params, p.batches[0])
    w = leaf_grads(end)
    truth = strength * torch.linalg.solve(hessian, derivative(p.outer(w, p.hparams, p.outer_batch), w)["w"])
    close(hg.hparams["w"], truth, 1e-9)
    close(state.inner.params["w"], p.params["w"] - 0.5 * truth, 1e-9)
    plain = metacal.descent(lambda w, h, b: p.inner(w, p.hparams, b), optim.sgd(0.1))
    untied = metacal.meta_initialisation(lambda w, h, b: p.outer(w, p.hparams, b), plain, adjoints.Implicit(linear.Dense()), optim.sgd(0.5))
    with pytest.raises(ValueError, match="proximal"):
        untied.step(untied.init(p.params, {}), p.steps(2), p.outer_batch)
