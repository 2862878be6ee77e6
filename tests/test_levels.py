"""More than two levels, and derivatives of derivatives: a solve inside an inner objective, with every adjoint at every level.

The three-level problem is quadratic, so that everything about it is known::

    x*(y, z) = argmin_x  x A x / 2 - x (B y + C z)              = P y + Q z,      P = A^-1 B,  Q = A^-1 C
    y*(z)    = argmin_y  |x*(y, z) - t|^2 / 2 + y D y / 2 + y E z = M^-1 (P^T (t - Q z) - E z),  M = P^T P + D
    F(z)     = |y*(z) - r|^2 / 2 + x*(y*(z), z) G z

With K gradient steps at the middle level instead of its argmin, y is an affine map of z again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metacal
from metacal import adjoints, linear, optim
from problems import F64, PROBLEMS, REFERENCE, Tree, close, f64, spd

N, K, LOW_STEPS, MIDDLE_TERMS = 2, 2, 4, 3


def scattered(phase: float, *shape: int) -> Tensor:
    return torch.sin(phase + 1.7 * torch.arange(torch.Size(shape).numel(), dtype=F64) ** 1.1).reshape(shape)


# Well conditioned, so that few steps converge, but far from the identity.
A = 2.0 * spd(N, 1.03)
B, C, D = 0.1 * scattered(0.3, N, N), scattered(1.1, N, N), 3.0 * spd(N, 1.03, seed=3)
E, G, R, T = scattered(2.0, N, N), scattered(0.7, N, N), scattered(1.9, N), scattered(2.7, N)
P, Q = torch.linalg.solve(A, B), torch.linalg.solve(A, C)
M = P.T @ P + D
Z, Y0 = scattered(0.4, N), scattered(1.3, N)


def best_step(matrix: Tensor) -> tuple[float, float]:
    """The step size with the best rate on a quadratic, and the rate."""
    low, high = torch.linalg.eigvalsh(matrix)[[0, -1]].tolist()
    return 2 / (low + high), (high - low) / (high + low)


STEP, LOW_RATE = best_step(A)
MIDDLE_STEP, MIDDLE_RATE = best_step(M)
assert max((LOW_STEPS + 1) * LOW_RATE**LOW_STEPS, MIDDLE_RATE ** (MIDDLE_TERMS + 1)) < 3e-7


def lowest(x: Tree, above: Tree, b: Tree) -> Tensor:
    return 0.5 * x["x"] @ A @ x["x"] - x["x"] @ (B @ above["y"] + C @ above["z"])


def low_solution(y: Tensor, z: Tensor) -> Tensor:
    return P @ y + Q @ z


def middle_value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 0.5 * ((x - T) ** 2).sum() + 0.5 * y @ D @ y + y @ E @ z


def highest_value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 0.5 * ((y - R) ** 2).sum() + x @ G @ z


def middle_solution(z: Tensor) -> Tensor:
    return torch.linalg.solve(M, P.T @ (T - Q @ z) - E @ z)


def after_steps(z: Tensor) -> Tensor:
    """K gradient steps of the middle level."""
    y = Y0
    for _ in range(K):
        y = y - 0.2 * (M @ y - P.T @ (T - Q @ z) + E @ z)
    return y


def slope(path: Callable[[Tensor], Tensor]) -> Tensor:
    """dF/dz along y = path(z), an affine map: by its matrix."""
    y0 = path(torch.zeros(N, dtype=F64))
    Y = torch.stack([path(e) - y0 for e in torch.eye(N, dtype=F64)], 1)
    y = path(Z)
    # F = |y - r|^2/2 + (P y + Q z) G z
    return Y.T @ (y - R) + (P @ Y + Q).T @ (G @ Z) + G.T @ (P @ y + Q @ Z)


def curvature(path: Callable[[Tensor], Tensor]) -> Tensor:
    """d2F/dz2 along an affine path."""
    y0 = path(torch.zeros(N, dtype=F64))
    Y = torch.stack([path(e) - y0 for e in torch.eye(N, dtype=F64)], 1)
    X = P @ Y + Q
    return Y.T @ Y + X.T @ G + G.T @ X


def test_the_closed_form() -> None:
    """Against autograd through the formulas."""
    for path in (middle_solution, after_steps):
        F = lambda z, path=path: highest_value(low_solution(path(z), z), path(z), z)  # noqa: E731
        close(slope(path), torch.func.grad(F)(Z), 1e-13)
        close(curvature(path), torch.func.hessian(F)(Z), 1e-12)
    y = middle_solution(Z)
    assert torch.func.grad(lambda y: middle_value(low_solution(y, Z), y, Z))(y).abs().max() < 1e-13


LOW: dict[str, Any] = {
    "mixed": adjoints.Unrolled(),
    "reverse": adjoints.Unrolled(mode="reverse"),
    "dense": adjoints.Implicit(linear.Dense()),
    "cg": adjoints.Implicit(linear.CG(N)),
    "neumann": adjoints.Implicit(linear.Neumann(LOW_STEPS, STEP)),
    "forward": adjoints.Forward(),
}
MIDDLE: dict[str, Any] = {
    "mixed": adjoints.Unrolled(),
    "reverse": adjoints.Unrolled(mode="reverse"),
    "graph": adjoints.Unrolled(mode="graph"),
    "dense": adjoints.Implicit(linear.Dense()),
    "cg": adjoints.Implicit(linear.CG(N)),
    "neumann": adjoints.Implicit(linear.Neumann(MIDDLE_TERMS, MIDDLE_STEP)),
    "forward": adjoints.Forward(),
}


def low(y: Tensor, z: Tensor, adjoint: Any) -> Tensor:
    """x*(y, z), by contracting steps from nowhere for the unrolled; implicit ones start where they end, and take one."""
    unrolled = not isinstance(adjoint, adjoints.Implicit)
    solver = metacal.descent(lowest, optim.sgd(STEP)) if unrolled else metacal.stationary(lowest)
    start = {"x": torch.zeros(N, dtype=F64)} if unrolled else {"x": low_solution(y, z).detach()}
    return metacal.solve(solver, start, {"y": y, "z": z}, metacal.repeat((), LOW_STEPS if unrolled else 1), adjoint)["x"]


def two_levels(low_adjoint: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def middle(y: Tree, z: Tree, b: Tree) -> Tensor:
        return middle_value(low(y["y"], z["z"], low_adjoint), y["y"], z["z"])

    def highest(y: Tree, z: Tree, b: Tree) -> Tensor:
        return highest_value(low(y["y"], z["z"], low_adjoint), y["y"], z["z"])

    return middle, highest


def hypergradient(low_adjoint: Any, middle_adjoint: Any) -> tuple[metacal.HyperGradient, Tensor]:
    middle, highest = two_levels(low_adjoint)
    if isinstance(middle_adjoint, adjoints.Implicit):
        solver, start, num_steps, truth = metacal.stationary(middle), middle_solution(Z), 1, slope(middle_solution)
    else:
        solver, start, num_steps, truth = metacal.descent(middle, optim.sgd(0.2)), Y0, K, slope(after_steps)
    estimate = metacal.hypergradient(highest, solver, middle_adjoint)
    return estimate(solver.init({"y": start}, {"z": Z}), {"z": Z}, metacal.repeat((), num_steps), ()), truth


PAIRS = [*itertools.product(["mixed", "dense", "neumann"], MIDDLE), *itertools.product(["reverse", "cg", "forward"], ["reverse", "dense"])]


@pytest.mark.parametrize(("low_adjoint", "middle_adjoint"), PAIRS)
def test_three_levels(low_adjoint: str, middle_adjoint: str) -> None:
    hg, truth = hypergradient(LOW[low_adjoint], MIDDLE[middle_adjoint])
    close(hg.hparams["z"], truth, 1e-6)


OTHERS = {
    "cholesky": linear.Dense(factorization="cholesky"),
    "normal cg": linear.NormalCG(2 * N),
    "minres": linear.MINRES(2 * N),
    "gmres": linear.GMRES(N),
    "lanczos": linear.Lanczos(N),
    "bicgstab": linear.BiCGSTAB(2 * N),
    "preconditioned": linear.CG(2, preconditioner=linear.Dense()),
}


@pytest.mark.parametrize("solver", OTHERS)
def test_three_levels_with_every_exact_linear_solver(solver: str) -> None:
    """At the lowest level under mixed mode, and at the middle one over a dense solve."""
    implicit = adjoints.Implicit(OTHERS[solver])
    for low_adjoint, middle_adjoint in ((implicit, adjoints.Unrolled()), (LOW["dense"], implicit)):
        hg, truth = hypergradient(low_adjoint, middle_adjoint)
        close(hg.hparams["z"], truth, 1e-8)


@pytest.mark.parametrize(("low_adjoint", "middle_adjoint"), [("dense", "dense"), ("cg", "mixed"), ("mixed", "reverse")])
def test_three_levels_by_the_torch_door_twice(low_adjoint: str, middle_adjoint: str) -> None:
    """``solve`` inside ``solve``: gradient and second derivative of the top by z."""
    middle, highest = two_levels(LOW[low_adjoint])
    adjoint = MIDDLE[middle_adjoint]
    implicit = isinstance(adjoint, adjoints.Implicit)
    path = middle_solution if implicit else after_steps
    solver = metacal.stationary(middle) if implicit else metacal.descent(middle, optim.sgd(0.2))

    def value(z: Tensor) -> Tensor:
        start = {"y": middle_solution(Z) if implicit else Y0}
        y = metacal.solve(solver, start, {"z": z}, metacal.repeat((), 1 if implicit else K), adjoint)
        return highest(y, {"z": z}, ())

    z, e = Z.clone().requires_grad_(), scattered(0.9, N)
    (first,) = torch.autograd.grad(value(z), z, create_graph=True)
    close(first.detach(), slope(path), 1e-6)
    (second,) = torch.autograd.grad(first @ e, z)
    close(second, curvature(path) @ e, 1e-5)


RIDGE = PROBLEMS["ridge_scalar"]
SECOND = REFERENCE["ridge_scalar"]["second_derivative"]
EXACT = {
    "dense": linear.Dense(),
    "cholesky": linear.Dense(factorization="cholesky"),
    "cg": linear.CG(3),
    "normal cg": linear.NormalCG(6),
    "minres": linear.MINRES(4),
    "gmres": linear.GMRES(3),
    "lanczos": linear.Lanczos(3),
    "bicgstab": linear.BiCGSTAB(4),
    "neumann": linear.Neumann(70, 0.9),
}


@pytest.mark.parametrize("solver", EXACT)
def test_second_derivatives_through_an_implicit_adjoint(solver: str) -> None:
    """d2 outer(w*(lam)) / d lam2 on ridge_scalar, by autograd twice, by torch.func, and as the derivative of an estimate."""
    inner, adjoint = metacal.stationary(RIDGE.inner), adjoints.Implicit(EXACT[solver])
    truth, tolerance = f64(SECOND), 1e-6 if solver == "neumann" else 1e-9
    assert abs(SECOND + 0.11742526040551855) < 1e-15

    def value(lam: Tensor) -> Tensor:
        w = metacal.solve(inner, RIDGE.solution, {"lam": lam}, RIDGE.steps(1), adjoint)
        return RIDGE.outer(w, {"lam": lam}, RIDGE.outer_batch)

    lam = f64(0.3).requires_grad_()
    (first,) = torch.autograd.grad(value(lam), lam, create_graph=True)
    close(torch.autograd.grad(first, lam)[0], truth, tolerance)
    if solver == "neumann":
        return  # a polynomial of degree 70, differentiated through: once is enough
    close(torch.func.jvp(torch.func.grad(value), (f64(0.3),), (f64(1.0),))[1], truth, tolerance)

    def gradient(lam: Tensor) -> Tensor:
        h = {"lam": lam}
        return metacal.hypergradient(RIDGE.outer, inner, adjoint)(
            inner.init(RIDGE.solution, h), h, RIDGE.steps(1), RIDGE.outer_batch
        ).hparams["lam"]

    close(torch.func.grad(gradient)(f64(0.3)), truth, tolerance)


# Levels that all go forward


def along(f: Callable[..., Any], v: Tensor) -> Callable[[Tensor], Any]:
    return lambda h: torch.func.jvp(f, (h,), (v,))[1]


TWICE: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "jvp of jvp": lambda f: along(along(f, Z), R),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "jvp of hessian": lambda f: along(torch.func.hessian(f), Z),
    "jacfwd of vmap of jvp": lambda f: torch.func.jacfwd(lambda h: torch.func.vmap(lambda v: along(f, v)(h))(torch.stack([Z, R]))),
}


def bent(w: Tree, h: Tree, b: Tree) -> Tensor:
    return ((w - h) ** 2).sum() + 0.2 * (w**4).sum() + (w * h**2).sum()


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled(), adjoints.Unrolled("reverse"), adjoints.Forward(), adjoints.ForwardSketch(2)])
@pytest.mark.parametrize("twice", TWICE)
def test_two_levels_may_go_forward(twice: str, adjoint: metacal.Adjoint) -> None:
    """Against the run itself, without an autograd.Function around it: torch would take the inner tangent for a constant there."""
    solver, batches, h = metacal.descent(bent, optim.sgd(0.1, momentum=0.5)), metacal.repeat(None, 4), f64(0.7, -0.4)
    plain = lambda h: (metacal.run(solver, solver.init(Y0, h), h, batches).params ** 3).sum()  # noqa: E731
    solved = lambda h: (metacal.solve(solver, Y0, h, batches, adjoint) ** 3).sum()  # noqa: E731
    close(TWICE[twice](solved)(h), TWICE[twice](plain)(h), 1e-12)


@pytest.mark.parametrize("adjoint", [adjoints.Implicit(linear.Dense()), adjoints.Unrolled(window=2), adjoints.FiniteDifference()])
def test_two_levels_that_go_forward_are_refused_where_there_is_no_rule(adjoint: metacal.Adjoint) -> None:
    solver, h = metacal.descent(bent, optim.sgd(0.1)), f64(0.7, -0.4)
    solved = lambda h: (metacal.solve(solver, Y0, h, metacal.repeat(None, 4), adjoint) ** 3).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="`adjoint` should be one that derives the run itself where two levels go forward"):
        torch.func.jacfwd(torch.func.jacfwd(solved))(h)


@pytest.mark.parametrize("solver", [linear.Dense(), linear.CG(2), linear.GMRES(2)], ids=str)
@pytest.mark.parametrize("transform", ["jacfwd of jacfwd", "jvp of jvp"])
def test_an_implicit_estimate_refuses_two_levels_that_go_forward(transform: str, solver: linear.LinearSolver) -> None:
    """torch would take the inner tangent for a constant; every other way to the third derivative of the outer value is right."""
    inner, h = metacal.descent(bent, optim.sgd(0.1)), f64(0.7, -0.4)
    w = metacal.run(inner, inner.init(Y0, h), h, metacal.repeat(None, 300)).params
    solver_at = metacal.stationary(bent)
    estimate = metacal.hypergradient(lambda w, h, b: (w**3).sum(), solver_at, adjoints.Implicit(solver))

    def gradient(h: Tensor) -> Tensor:
        return estimate(solver_at.init(w, h), h, [None], None).hparams

    with pytest.raises(RuntimeError, match=r"two levels that go forward.*jacrev\(jacfwd\(f\)\)"):
        TWICE[transform](gradient)(h)
    plain = lambda h: (metacal.run(inner, inner.init(Y0, h), h, metacal.repeat(None, 300)).params ** 3).sum()  # noqa: E731
    truth = torch.func.jacrev(torch.func.jacrev(torch.func.grad(plain)))(h)
    backward, forward = torch.func.jacrev, torch.func.jacfwd
    for outer, middle in ((backward, backward), (backward, forward), (forward, backward)):
        close(outer(middle(gradient))(h), truth, 1e-9)


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled(), adjoints.Implicit(linear.Dense())])
def test_a_solve_in_lanes_goes_forward_in_each(adjoint: metacal.Adjoint) -> None:
    """The params that it starts from are the same in every lane, the tangents are not: also where no step makes them differ."""
    solver, h, d_h = metacal.descent(bent, optim.sgd(0.1)), f64(0.7, -0.4), f64(1.0, 2.0)
    for start in (solver,) if adjoint.derives_steps else (solver, metacal.stationary(bent)):
        value = lambda h, s=start: (metacal.solve(s, Y0, h, metacal.repeat(None, 3), adjoint) ** 3).sum()  # noqa: E731
        found = along(torch.func.vmap(value), torch.stack([d_h, 3 * d_h]))(torch.stack([h, h]))
        one = along(value, d_h)(h)
        close(found, torch.stack([one, 3 * one]), 1e-12)
