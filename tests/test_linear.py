"""Linear solvers and implicit differentiation, against dense matrices, definitions and textbook rates."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metacal
from metacal import adjoints, linear
from problems import F64, PROBLEMS, REFERENCE, Tree, close, f64, implicit_gradient, ravel, second_order, tree_map, unravel

EPS = torch.finfo(F64).eps


def kind_of(solver: linear.LinearSolver) -> str:
    return type(solver).__name__


# Systems


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=F64))[0]


def spectral(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """The symmetric matrix of these eigenvalues in a random basis."""
    Q = orthogonal(len(eigenvalues), seed)
    return Q @ torch.diag(eigenvalues) @ Q.T


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    return spectral(torch.logspace(0, torch.log10(torch.tensor(condition)).item(), n, dtype=F64), seed)


def indefinite(n: int, condition: float, seed: int = 0) -> Tensor:
    return spectral(torch.logspace(0, torch.log10(torch.tensor(condition)).item(), n, dtype=F64) * (-1) ** torch.arange(n), seed)


def nonsymmetric(n: int, condition: float, seed: int = 0) -> Tensor:
    return orthogonal(n, seed) @ torch.diag(torch.linspace(1, condition, n, dtype=F64)) @ orthogonal(n, seed + 1)


def rhs(n: int, seed: int = 7) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


def leaves_of(n: int) -> Tree:
    """A tree of n zeros: several leaves, a 0-dim one among them."""
    if n < 4:
        return torch.zeros(n, dtype=F64)
    return {"b": (torch.zeros((), dtype=F64), torch.zeros(2, 1, dtype=F64)), "a": torch.zeros(n - 3, dtype=F64)}


@dataclass
class Counted:
    """A as a LinearMap that counts what is asked of it."""

    A: Tensor
    like: Tree
    calls: int = field(default=0)

    def map(self) -> linear.LinearMap:
        def product(matrix: Tensor, v: Tree) -> Tree:
            self.calls += 1
            return unravel(self.like, matrix @ ravel(v))

        is_symmetric = torch.allclose(self.A, self.A.T, rtol=1e-9)
        return linear.LinearMap(lambda v: product(self.A, v), lambda v: product(self.A.T, v), is_symmetric=is_symmetric)


def solve(solver: linear.LinearSolver, A: Tensor, b: Tensor, x0: Tensor | None = None) -> linear.LinearSolution:
    like = leaves_of(len(b))
    start = None if x0 is None else unravel(like, x0)
    solution = solver.solve(Counted(A, like).map(), unravel(like, b), start)
    return solution._replace(value=ravel(solution.value))


def krylov(A: Tensor, b: Tensor, k: int) -> Tensor:
    """An orthonormal basis [n, k] of span(b, A b, ..., A^{k-1} b)."""
    basis = [b / b.norm()]
    for _ in range(k - 1):
        v = A @ basis[-1]
        for _ in range(2):
            v = v - sum(((q @ v) * q for q in basis), torch.zeros_like(v))
        basis.append(v / v.norm())
    return torch.stack(basis, 1)


# Each solver gets there


DIRECT: dict[str, Callable[[int], linear.LinearSolver]] = {
    "GMRES": lambda n: linear.GMRES(n),
    "Lanczos": lambda n: linear.Lanczos(n + 3),
    "LU": lambda n: linear.Dense(),
    "LU in chunks": lambda n: linear.Dense(chunk_size=7),
    "Cholesky": lambda n: linear.Dense("cholesky"),
    "CG, exact preconditioner": lambda n: linear.CG(3, preconditioner=linear.Dense("cholesky")),
}


@pytest.mark.parametrize(("n", "condition"), [(2, 1.0), (3, 10.0), (20, 1e4), (60, 1e6), (200, 1e2), (200, 1e6)])
@pytest.mark.parametrize("solver", DIRECT)
def test_exact_at_the_dimension(solver: str, n: int, condition: float) -> None:
    A, b = spd(n, condition), rhs(n)
    solution = solve(DIRECT[solver](n), A, b)
    bound = 100 * condition * EPS * n**0.5
    close(solution.value, torch.linalg.solve(A, b), bound)
    true = (A @ solution.value - b).norm() / b.norm()
    assert abs(float(solution.residual_norm - true)) <= bound


ITERATIVE: dict[str, Callable[[float], linear.LinearSolver]] = {
    "CG": lambda k: linear.CG(int(12 * k**0.5) + 20),
    "MINRES": lambda k: linear.MINRES(int(12 * k**0.5) + 20),
    "BiCGSTAB": lambda k: linear.BiCGSTAB(int(12 * k**0.5) + 20),
    "GMRES, restarted": lambda k: linear.GMRES(int(25 * k) + 20, restart=15),
    "NormalCG": lambda k: linear.NormalCG(int(12 * k) + 20),
    "Neumann": lambda k: linear.Neumann(int(27 * k) + 20),
}


@pytest.mark.parametrize(("n", "condition"), [(2, 1.0), (5, 4.0), (200, 30.0)])
@pytest.mark.parametrize("solver", ITERATIVE)
def test_iterative_solvers_converge(solver: str, n: int, condition: float) -> None:
    A, b = spd(n, condition), rhs(n)
    solution = solve(ITERATIVE[solver](condition), A, b)
    close(solution.value, torch.linalg.solve(A, b), 1e-10)
    assert float(solution.residual_norm) < 1e-10


@pytest.mark.parametrize("solver", [linear.GMRES(9), linear.BiCGSTAB(14), linear.NormalCG(20), linear.Dense()], ids=kind_of)
def test_nonsymmetric_systems(solver: linear.LinearSolver) -> None:
    A, b = nonsymmetric(9, 3.0) + 2 * torch.eye(9, dtype=F64), rhs(9)
    close(solve(solver, A, b).value, torch.linalg.solve(A, b), 1e-10)
    like = leaves_of(9)
    plain = solver.solve(lambda v: unravel(like, A @ ravel(v)), unravel(like, b))  # the transpose, if any, is derived
    close(ravel(plain.value), torch.linalg.solve(A, b), 1e-10)


@pytest.mark.parametrize("kind", [linear.CG, linear.MINRES, linear.Lanczos])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_residual_is_true_whatever_the_matrix(kind: Any, num_steps: int) -> None:
    """Solvers for symmetric A take one product more, for a residual that they cannot carry, where nobody says that A is symmetric."""
    for A in (f64([[1.0, 2.0], [-2.0, 1.0]]), nonsymmetric(6, 4.0), spd(6, 4.0)):
        b, calls = torch.ones(len(A), dtype=F64), 0

        def product(v: Tensor, A: Tensor = A) -> Tensor:
            nonlocal calls
            calls += 1
            return A @ v

        solution = kind(num_steps).solve(product, b)
        true = (b - A @ solution.value).norm() / b.norm()
        assert abs(solution.residual_norm - true) <= 1e-9 * (1 + true)
        told = kind(num_steps).solve(linear.symmetric(lambda v, A=A: A @ v), b)
        assert torch.equal(solution.value, told.value)
        one_more = 0 if kind is linear.CG else 1
        assert int(solution.num_products) == int(told.num_products) + one_more
        assert calls <= num_steps + one_more


@pytest.mark.parametrize("solver", [linear.MINRES(200), linear.GMRES(20), linear.Lanczos(20), linear.NormalCG(400)], ids=kind_of)
def test_indefinite_systems(solver: linear.LinearSolver) -> None:
    A, b = indefinite(20, 10.0), rhs(20)
    solution = solve(solver, A, b)
    close(solution.value, torch.linalg.solve(A, b), 1e-10)
    assert solution.curvature is not None
    assert solution.curvature[0] < 0 < solution.curvature[1]


# The iterates are what they are by definition


@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_conjugate_gradients_and_lanczos_minimise_the_energy(condition: float) -> None:
    A, b = spd(30, condition), rhs(30)
    for k in (1, 2, 3, 6):
        V = krylov(A, b, k)
        best = V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)
        cg, lanczos = solve(linear.CG(k), A, b), solve(linear.Lanczos(k), A, b)
        close(cg.value, best, 1e-9)
        close(lanczos.value, best, 1e-9)
        for solution in (cg, lanczos):
            close(solution.residual_norm, (A @ best - b).norm() / b.norm(), 1e-9)


@pytest.mark.parametrize(
    ("solver", "A"),
    [
        (linear.MINRES, indefinite(30, 20.0)),
        (linear.GMRES, indefinite(30, 20.0)),
        (linear.GMRES, nonsymmetric(30, 20.0)),
        (linear.MINRES, spd(30, 1e3)),
    ],
    ids=["MINRES indefinite", "GMRES indefinite", "GMRES nonsymmetric", "MINRES definite"],
)
def test_minimal_residuals_are_minimal(solver: Any, A: Tensor) -> None:
    b, x0 = rhs(30), 0.1 * rhs(30, seed=3)
    for k, start in itertools.product((1, 2, 5, 9), (None, x0)):
        r = b if start is None else b - A @ start
        V = krylov(A, r, k)
        best = V @ torch.linalg.lstsq(A @ V, r).solution + (0 if start is None else start)
        solution = solve(solver(k), A, b, start)
        close(solution.value, best, 1e-9)
        close(solution.residual_norm, (b - A @ best).norm() / b.norm(), 1e-9)


def test_normal_conjugate_gradients_minimise_the_residual() -> None:
    A, b = nonsymmetric(30, 20.0), rhs(30)
    for k in (1, 2, 5):
        V = krylov(A.T @ A, A.T @ b, k)
        best = V @ torch.linalg.lstsq(A @ V, b).solution
        close(solve(linear.NormalCG(k), A, b).value, best, 1e-9)


@pytest.mark.parametrize("restart", [1, 4, 50])
def test_restarts_are_fresh_starts(restart: int) -> None:
    A, b = nonsymmetric(12, 5.0), rhs(12)
    x, spent = torch.zeros_like(b), 0
    while spent < 10:
        steps = min(restart, 10 - spent)
        x = solve(linear.GMRES(steps), A, b, x).value
        spent += steps
    close(solve(linear.GMRES(10, restart=restart), A, b).value, x, 1e-10)


@pytest.mark.parametrize("solver", [linear.BiCGSTAB, linear.MINRES, linear.GMRES, linear.NormalCG])
def test_the_best_iterate_is_returned(solver: Any) -> None:
    """More steps never make the residual worse, though that of BiCGSTAB's iterates rises on the way."""
    A = nonsymmetric(40, 30.0) + 3 * torch.eye(40, dtype=F64) if solver in (linear.GMRES, linear.NormalCG) else spd(40, 1e3)
    b = rhs(40)
    residuals = []
    for k in range(1, 25):
        solution = solve(solver(k), A, b)
        close(solution.residual_norm, (A @ solution.value - b).norm() / b.norm(), 1e-8)
        residuals.append(float(solution.residual_norm))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(residuals))
    assert residuals[-1] < 0.9


def test_lanczos_passes_a_space_without_an_iterate() -> None:
    """diag(1, -1) in the space of (1, 1): T = 0 at the first step; the second is exact."""
    A, b = torch.diag(f64(1.0, -1.0)), f64(1.0, 1.0)
    close(solve(linear.Lanczos(2), A, b).value, f64(1.0, -1.0), 1e-13)
    one = solve(linear.Lanczos(1), A, b)
    assert not (one.residual_norm <= 1 - 1e-9)  # nothing solved, and not said to be


# Rates


@pytest.mark.parametrize("condition", [4.0, 1e2, 1e4])
def test_rates_of_the_krylov_methods(condition: float) -> None:
    A, b = spd(200, condition), rhs(200)
    exact = torch.linalg.solve(A, b)
    root = (condition**0.5 - 1) / (condition**0.5 + 1)
    normal = (condition - 1) / (condition + 1)

    def energy(e: Tensor) -> Tensor:
        return (e @ A @ e).sqrt()

    for k in (5, 20, 60):
        cg, minres, cgnr = (solve(s(k), A, b) for s in (linear.CG, linear.MINRES, linear.NormalCG))
        assert energy(cg.value - exact) <= (2 * root**k + 1e-13) * energy(exact)
        assert minres.residual_norm <= 2 * root**k + 1e-13
        assert (A @ (cgnr.value - exact)).norm() <= (2 * normal**k + 1e-13) * b.norm()


def test_rate_of_minimal_residuals_on_a_symmetric_spectrum() -> None:
    """Eigenvalues in [-20, -1] and [1, 20]: the residual falls by (k-1)/(k+1) in two steps, as that of A^2 does in one."""
    A, b = spectral(torch.cat([torch.linspace(1, 20, 50, dtype=F64), -torch.linspace(1, 20, 50, dtype=F64)])), rhs(100)
    for k in (10, 40, 80):
        assert solve(linear.MINRES(k), A, b).residual_norm <= 2 * (19 / 21) ** (k // 2)


def test_distinct_eigenvalues_are_the_steps_needed() -> None:
    A, b = spectral(f64([1.0] * 20 + [3.0] * 20 + [10.0] * 10)), rhs(50)
    exact = torch.linalg.solve(A, b)
    for solver in (linear.CG(3), linear.MINRES(3), linear.GMRES(3), linear.Lanczos(3), linear.NormalCG(3), linear.BiCGSTAB(3)):
        close(solve(solver, A, b).value, exact, 1e-10)
    for solver in (linear.CG(2), linear.MINRES(2), linear.GMRES(2), linear.Lanczos(2), linear.NormalCG(2), linear.BiCGSTAB(2)):
        assert (solve(solver, A, b).value - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("num_steps", [0, 1, 7, 60])
def test_the_error_of_a_neumann_series_is_known(num_steps: int) -> None:
    """(I - aA)^{K+1} (exact - x0), and the reported residual is that of one term less."""
    A, b, x0 = spd(20, 10.0), rhs(20), rhs(20, seed=3)
    exact, step = torch.linalg.solve(A, b), 0.15
    shrink = torch.eye(20, dtype=F64) - step * A
    for start in (None, x0):
        solution = solve(linear.Neumann(num_steps, step), A, b, start)
        error = torch.linalg.matrix_power(shrink, num_steps + 1) @ (exact - (0 if start is None else start))
        close(exact - solution.value, error, 1e-8)
        if num_steps:
            before = solve(linear.Neumann(num_steps - 1, step), A, b, start).value
            close(solution.residual_norm, (A @ before - b).norm() / b.norm(), 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_estimated_step_size_follows_the_matrix(scale: float) -> None:
    A, b = scale * spd(30, 10.0), rhs(30)
    solution = solve(linear.Neumann(400), A, b)
    close(solution.value, torch.linalg.solve(A, b), 1e-9)
    assert int(solution.num_products) == 408
    # a = 1 / (1.1 |A u|): v_0 = a b shows it
    step = float(solve(linear.Neumann(0, power_steps=60), A, b).value[0] / b[0])
    assert 1 / (1.1 * 10 * scale) <= step * (1 + 1e-9)
    assert step <= 1 / (1.09 * 10 * scale)


# Curvature


def test_curvature_is_the_range_of_rayleigh_quotients() -> None:
    A, b = spd(30, 1e2), rhs(30)
    eigenvalues = torch.linalg.eigvalsh(A)
    V = krylov(A, b, 10)
    ritz = torch.linalg.eigvalsh(V.T @ A @ V)
    close(solve(linear.Lanczos(10), A, b).curvature, ritz[[0, -1]], 1e-10)
    for solver in (linear.CG(10), linear.MINRES(10), linear.GMRES(10), linear.NormalCG(10), linear.BiCGSTAB(10), linear.Neumann(10)):
        curvature = solve(solver, A, b).curvature
        assert curvature is not None
        assert curvature.shape == (2,)
        assert eigenvalues[0] <= curvature[0] < curvature[1] <= eigenvalues[-1] * (1 + 1e-12), solver
    close(solve(linear.CG(1), A, b).curvature, (b @ A @ b / (b @ b)).expand(2), 1e-12)
    close(solve(linear.Dense(), A, b).curvature, torch.stack([A.diagonal().min(), A.diagonal().max()]), 1e-12)
    assert linear.Identity().solve(lambda v: v, b).curvature is None
    assert solve(linear.CG(3), A, torch.zeros_like(b)).curvature.isnan().all()


@pytest.mark.parametrize("solver", [linear.CG, linear.MINRES, linear.BiCGSTAB, linear.NormalCG, linear.GMRES, linear.Lanczos])
def test_curvature_is_not_that_of_rounding(solver: Any) -> None:
    """b is an eigenvector: after one step what is left is rounding, which has every other eigenvalue in it and counts no more."""
    eigenvalues = torch.tensor([2.0, 50.0, 70.0, 90.0, 100.0], dtype=F64)
    solution = solver(4, tolerance=1e-6).solve(lambda v: spectral(eigenvalues) @ v, orthogonal(5)[:, 0])
    assert solution.curvature is not None
    assert torch.allclose(solution.curvature, f64(2.0), rtol=1e-9)


def test_conjugate_gradients_stand_still_at_negative_curvature() -> None:
    A, b = torch.diag(f64(4.0, 3.0, -1.0)), f64(1.0, 1.0, 1.5)
    few, many = solve(linear.CG(2), A, b), solve(linear.CG(30), A, b)
    assert torch.equal(few.value, many.value)
    assert int(many.num_products) == 2
    assert many.curvature[0] < 0
    close(many.residual_norm, (A @ many.value - b).norm() / b.norm(), 1e-12)
    at_once = solve(linear.CG(5), -A, f64(1.0, 0.0, 0.0))
    close(at_once.value, torch.zeros(3, dtype=F64), 0.0)
    assert int(at_once.num_products) == 1


# Products


SOLVERS: dict[str, linear.LinearSolver] = {
    "Neumann": linear.Neumann(6, 0.05),
    "Neumann, estimated": linear.Neumann(6, power_steps=3),
    "CG": linear.CG(6),
    "CG, diagonal": linear.CG(6, preconditioner=linear.Diagonal(2)),
    "CG, Nystroem": linear.CG(6, preconditioner=linear.Nystroem(3, rho=0.5)),
    "NormalCG": linear.NormalCG(6),
    "MINRES": linear.MINRES(6),
    "GMRES": linear.GMRES(6),
    "GMRES, restarted": linear.GMRES(6, restart=4),
    "BiCGSTAB": linear.BiCGSTAB(6),
    "Lanczos": linear.Lanczos(6),
    "Dense": linear.Dense(),
    "Cholesky": linear.Dense("cholesky"),
    "Nystroem": linear.Nystroem(5),
    "Diagonal": linear.Diagonal(3),
    "Identity": linear.Identity(),
}
N = 12
PRODUCTS = {
    **dict.fromkeys(SOLVERS, 6),
    "Neumann, estimated": 9,
    "CG, diagonal": 8,
    "CG, Nystroem": 9,
    "NormalCG": 12,
    "BiCGSTAB": 12,
    "Dense": N,
    "Cholesky": N,
    "Nystroem": 6,
    "Diagonal": 4,
    "Identity": 0,
}
BY_COLUMNS = ("Dense", "Cholesky", "CG, Nystroem", "Nystroem")  # several products in one call under vmap
STARTS = ("Neumann", "Neumann, estimated", "CG", "NormalCG", "MINRES", "GMRES", "GMRES, restarted", "BiCGSTAB", "Lanczos")


@pytest.mark.parametrize("name", SOLVERS)
def test_products_are_counted_and_none_is_wasted(name: str) -> None:
    A, b, like = spd(N, 50.0), rhs(N), leaves_of(N)
    counter = Counted(A, like)
    solution = SOLVERS[name].solve(counter.map(), unravel(like, b))
    assert int(solution.num_products) == PRODUCTS[name]
    if name not in BY_COLUMNS:
        assert counter.calls == PRODUCTS[name]
    if name in STARTS:
        counter = Counted(A, like)
        solution = SOLVERS[name].solve(counter.map(), unravel(like, b), unravel(like, b))
        assert int(solution.num_products) == counter.calls == PRODUCTS[name] + 1


class Operations(TorchDispatchMode):
    """Counts the operations that compute, which views do not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [linear.CG, linear.MINRES, linear.BiCGSTAB, linear.NormalCG, lambda n: linear.Neumann(n, 0.5)])
def test_a_step_computes_as_much_however_many_leaves_there_are(solver: Callable[[int], linear.LinearSolver]) -> None:
    """Beyond the product itself, here one operation for each leaf."""

    def of_a_step(num_leaves: int) -> float:
        scales = {str(i): torch.linspace(1.0, 2.0, 60 // num_leaves, dtype=F64) + i for i in range(num_leaves)}

        def product(v: Tree) -> Tree:
            return {name: scale * v[name] for name, scale in scales.items()}

        def operations(num_steps: int) -> int:
            with Operations() as counted:
                made = solver(num_steps)
                made.solve(linear.LinearMap(product, product), scales)
            products = num_steps * getattr(made, "products_per_step", 1)
            return counted.count - products * num_leaves

        return (operations(7) - operations(3)) / 4

    assert of_a_step(1) == of_a_step(20)


def test_deriving_a_transpose_takes_one_product() -> None:
    A, b, calls = nonsymmetric(5, 4.0), rhs(5), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    solution = linear.NormalCG(2).solve(product, b)
    assert int(solution.num_products) == 5
    assert calls == 3  # two forwards and the recorded one: the other two products are pulled back


def test_converged_systems_stop_counting() -> None:
    A, b = spd(20, 5.0), rhs(20)
    for solver in (linear.CG, linear.MINRES, linear.GMRES, linear.Lanczos, linear.NormalCG, linear.BiCGSTAB):
        loose = solve(solver(60, tolerance=1e-3), A, b)
        assert loose.residual_norm <= 1e-3
        assert 0 < loose.num_products < 40
        fewer = int(loose.num_products) // solver.products_per_step - 1
        assert solve(solver(fewer, tolerance=1e-3), A, b).residual_norm > 1e-3, "no product after convergence"
        exact = solve(solver(60), A, b, torch.linalg.solve(A, b))
        assert exact.residual_norm < 1e-13


# Lanes


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_a_stack_of_single_solves(name: str) -> None:
    """Lanes that converge at once, after a few steps, and not at all."""
    As = torch.stack([torch.eye(N, dtype=F64), spectral(f64([1.0] * 6 + [2.0] * 6)), spd(N, 200.0), spd(N, 5.0)])
    bs = torch.stack([rhs(N), rhs(N, 1), rhs(N, 2), torch.zeros(N, dtype=F64)])
    solver, like = SOLVERS[name], leaves_of(N)

    def single(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        solution = solver.solve(
            linear.LinearMap(lambda v: unravel(like, A @ ravel(v)), lambda v: unravel(like, A.T @ ravel(v))), unravel(like, b)
        )
        return ravel(solution.value), solution.residual_norm, solution.num_products

    values, residuals, products = torch.func.vmap(single)(As, bs)
    for i, (A, b) in enumerate(zip(As, bs, strict=True)):
        value, residual, count = single(A, b)
        close(values[i], value, 1e-9)
        assert torch.allclose(residuals[i], residual, rtol=1e-6, atol=1e-13, equal_nan=True)
        assert abs(products[i] - count) <= (1 if residual < 1e-13 else 0)  # at convergence rounding decides
    close(values[3], torch.zeros(N, dtype=F64), 0.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_nan_stays_visible(name: str) -> None:
    A, b = spd(N, 5.0), rhs(N)
    bad = A.clone()
    bad[0, 0] = torch.nan
    if name != "Identity":
        solution = solve(SOLVERS[name], bad, b)
        assert not torch.isfinite(solution.value).all()
        assert not torch.isfinite(solution.residual_norm)
    b[1] = torch.nan
    assert not torch.isfinite(solve(SOLVERS[name], A, b).value).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_zero_right_hand_side_and_a_single_number(name: str) -> None:
    solution = solve(SOLVERS[name], spd(N, 5.0), torch.zeros(N, dtype=F64))
    close(solution.value, torch.zeros(N, dtype=F64), 0.0)
    assert name == "Identity" or float(solution.residual_norm) == 0
    if name not in ("CG, Nystroem", "Nystroem", "Identity", "Neumann"):
        close(SOLVERS[name].solve(lambda v: 4 * v, f64(2.0)).value, f64(0.5), 1e-2 if name.startswith("Neumann") else 1e-13)


# Singular systems


@pytest.mark.parametrize("solver", [linear.MINRES(12), linear.GMRES(12), linear.NormalCG(20)], ids=kind_of)
def test_singular_systems(solver: linear.LinearSolver) -> None:
    """With b in the range: a solution. Otherwise: a least squares solution, with its residual."""
    A = spectral(torch.cat([torch.zeros(3, dtype=F64), torch.linspace(1, 3, 5, dtype=F64)]))
    inside, outside = A @ rhs(8), rhs(8)
    close(A @ solve(solver, A, inside).value, inside, 1e-9)
    solution = solve(solver, A, outside)
    projected = A @ torch.linalg.pinv(A, rtol=1e-10) @ outside
    if not isinstance(solver, linear.GMRES):  # whose Krylov space need not hold it
        close(A @ solution.value, projected, 1e-9)
    close(solution.residual_norm, (A @ solution.value - outside).norm() / outside.norm(), 1e-6)
    assert solution.residual_norm >= (outside - projected).norm() / outside.norm() - 1e-12


def test_lanczos_leaves_out_what_has_no_solution() -> None:
    """b has a part out of the range: T is singular in the last space, where a pivot of rounding made a value of 1e15."""
    A = torch.diag(f64(1.0, 2.0, 0.0))
    for matrix, b in ((A, torch.ones(3, dtype=F64)), (spectral(f64(1.0, 2.0, 3.0, 0.0, 5.0)), rhs(5))):
        for num_steps in (2, 3, 5, 9):
            solution = solve(linear.Lanczos(num_steps), matrix, b)
            close(solution.residual_norm, (b - matrix @ solution.value).norm() / b.norm(), 1e-9)
            assert solution.value.norm() < 1e2 * b.norm()
    assert solve(linear.Lanczos(3), A, torch.ones(3, dtype=F64)).residual_norm > 0.5


# Sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SOLVERS)
def test_squares_neither_overflow_nor_vanish(name: str, dtype: torch.dtype) -> None:
    """A right-hand side of 1e160 or 1e-170, in float32 1e20 or 1e-25: the solution scaled, with its residual, from a start too."""
    A, b = spd(N, 5.0).to(dtype), rhs(N).to(dtype)
    product = linear.symmetric(lambda v: A @ v)
    for size in (1e160, 1e-170) if dtype == torch.float64 else (1e20, 1e-25):
        for x0 in (None, b) if name in STARTS else (None,):
            one = SOLVERS[name].solve(product, b, x0)
            scaled = SOLVERS[name].solve(product, size * b, None if x0 is None else size * x0)
            tolerance = 1e-3 if dtype == torch.float32 else 1e-9
            close(scaled.value / size, one.value, tolerance)
            assert torch.allclose(scaled.residual_norm, one.residual_norm, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_infinity_stays_visible(name: str) -> None:
    solution = SOLVERS[name].solve(linear.symmetric(lambda v: spd(N, 5.0) @ v), f64([torch.inf] + [1.0] * (N - 1)))
    assert not torch.isfinite(solution.value).all()
    assert not torch.isfinite(solution.residual_norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """torch factorises no matrix in it."""
    A, b = torch.diag(torch.linspace(1.0, 2.0, N)).to(dtype), torch.ones(N, dtype=dtype)
    solution = SOLVERS[name].solve(linear.symmetric(lambda v: A @ v), b)
    assert solution.value.dtype == dtype
    if name not in ("Nystroem", "Identity", "Neumann", "Neumann, estimated"):
        close(solution.value.double(), 1 / A.diagonal().double(), 0.02)


@pytest.mark.parametrize("solver", [linear.Dense(), linear.Dense("cholesky"), linear.Nystroem(2, rho=0.5)], ids=str)
def test_direct_solvers_have_second_derivatives_in_every_mode(solver: linear.LinearSolver) -> None:
    """By a formula with an inverse; the tangent of torch.linalg.solve has a wrong derivative."""
    A, b, eye = spd(2, 3.0), rhs(2), torch.eye(2, dtype=F64)
    shift = 0.5 if isinstance(solver, linear.Nystroem) else 0.0  # of full rank, it is a damping
    solved = lambda a: solver.solve(lambda v: (A + a**2 * eye) @ v, a * b).value  # noqa: E731
    formula = lambda a: torch.linalg.inv(A + (a**2 + shift) * eye) @ (a * b)  # noqa: E731
    modes = (torch.func.jacfwd, torch.func.jacrev)
    for outer, inner in itertools.product(modes, modes):
        close(outer(inner(solved))(f64(0.7)), outer(inner(formula))(f64(0.7)), 1e-12)


# Sketches and preconditioners


def test_nystroem_is_its_dense_formula() -> None:
    A, b, rho = spd(20, 1e2), rhs(20), 0.3
    solver = linear.Nystroem(6, rho=rho)
    rows = solver.rows(20)
    assert rows == solver.rows(20) == sorted(set(rows))
    assert rows != linear.Nystroem(6, seed=1).rows(20)
    C, M = A[rows], A[rows][:, rows]
    close(solve(solver, A, b).value, torch.linalg.solve(C.T @ torch.linalg.solve(M, C) + rho * torch.eye(20, dtype=F64), b), 1e-11)


def test_nystroem_scales_rho_to_the_matrix() -> None:
    """A tiny rho below the effective rank is wrong by orders of magnitude; the default is not, and the residual says it."""
    A, b = spd(60, 1e4), rhs(60)
    exact = torch.linalg.solve(A, b)
    tiny, default = (solve(linear.Nystroem(20, rho=rho), A, b) for rho in (1e-8, None))
    assert (tiny.value - exact).norm() > 1e4 * exact.norm()
    assert tiny.residual_norm > 1e4
    assert (default.value - exact).norm() < exact.norm()
    assert default.residual_norm < 1.1
    for scale in (1e-6, 1e6):
        close(scale * solve(linear.Nystroem(20), scale * A, b).value, default.value, 1e-6)
    low_rank = torch.randn(60, 5, generator=generator(), dtype=F64)
    A = low_rank @ low_rank.T + 0.1 * torch.eye(60, dtype=F64)
    with_sketch = solve(linear.CG(60, tolerance=1e-10, preconditioner=linear.Nystroem(10)), A, b)
    close(with_sketch.value, torch.linalg.solve(A, b), 1e-8)


def test_an_exact_preconditioner_needs_one_step() -> None:
    A, b = spd(40, 1e5), rhs(40)
    solution = solve(linear.CG(1, preconditioner=linear.Dense()), A, b)
    close(solution.value, torch.linalg.solve(A, b), 1e-9)
    assert int(solution.num_products) == 41


def test_preconditioning_is_conjugate_gradients_on_the_scaled_system() -> None:
    scales = torch.logspace(-2, 2, 30, dtype=F64)
    A, b = scales[:, None] * spd(30, 10.0) * scales, rhs(30)
    diagonal = A.diagonal()

    class Exact(linear.Preconditioner):
        def inverse(self, matvec: Any, like: Tree) -> linear.Inverse:
            return linear.Inverse(lambda v: tree_map(torch.div, v, unravel(like, diagonal)), 0)

    root = diagonal.sqrt()
    for k in (1, 4, 9):
        scaled = solve(linear.CG(k), A / root[:, None] / root, b / root).value / root
        close(solve(linear.CG(k, preconditioner=Exact()), A, b).value, scaled, 1e-8)


def test_the_diagonal_saves_products_on_badly_scaled_systems() -> None:
    g = generator()
    A = torch.diag(torch.logspace(0, 5, 50, dtype=F64)) + 0.05 * spectral(torch.rand(50, generator=g, dtype=F64))
    b = rhs(50)
    plain, scaled = (solve(linear.CG(300, 1e-8, preconditioner=p), A, b) for p in (None, linear.Diagonal(2)))
    close(scaled.value, torch.linalg.solve(A, b), 1e-6)
    assert scaled.num_products < plain.num_products / 10


def test_the_diagonal_is_estimated_without_bias() -> None:
    A, n = spd(15, 10.0), 2000
    estimate = linear.Diagonal(n).estimate(lambda v: A @ v, torch.zeros(15, dtype=F64))
    deviation = ((A**2).sum(1) - A.diagonal() ** 2).sqrt() / n**0.5
    assert ((estimate - A.diagonal()).abs() < 5 * deviation).all()
    assert ((estimate - A.diagonal()).abs() > 0.01 * deviation).any(), "an estimate, not the truth"
    before = torch.get_rng_state()
    linear.Diagonal(2).estimate(lambda v: v, torch.zeros(3))
    linear.Nystroem(2).rows(9)
    assert torch.equal(torch.get_rng_state(), before)


# Implicit differentiation with each of them


RIDGE, CASE = PROBLEMS["ridge_scalar"], REFERENCE["ridge_scalar"]
EXACT_ON_RIDGE: dict[str, linear.LinearSolver] = {
    "Neumann": linear.Neumann(70, 0.98),
    "CG": linear.CG(3),
    "CG, Cholesky": linear.CG(1, preconditioner=linear.Dense("cholesky")),
    "CG, diagonal": linear.CG(3, preconditioner=linear.Diagonal(2)),
    "NormalCG": linear.NormalCG(6),
    "MINRES": linear.MINRES(4),
    "GMRES": linear.GMRES(3),
    "GMRES, restarted": linear.GMRES(6, restart=3),
    "BiCGSTAB": linear.BiCGSTAB(4),
    "Lanczos": linear.Lanczos(3),
    "Dense": linear.Dense(),
    "Cholesky": linear.Dense("cholesky"),
}


def at_solution(adjoint: Any, operator_problem: Any = RIDGE) -> metacal.HyperGradient:
    p, solver = operator_problem, metacal.stationary(operator_problem.inner)
    return metacal.hypergradient(p.outer, solver, adjoint)(solver.init(p.solution, p.hparams), p.hparams, p.steps(1), p.outer_batch)


@pytest.mark.parametrize("name", EXACT_ON_RIDGE)
def test_the_hypergradient_of_ridge_regression(name: str) -> None:
    hg = at_solution(adjoints.Implicit(EXACT_ON_RIDGE[name]))
    close(hg.hparams["lam"], f64(CASE["hypergrad"]), 1e-10)
    low, high = hg.stats["curvature_min"], hg.stats["curvature_max"]
    assert low.shape == high.shape == ()
    assert CASE["eig_H"][0] - 1e-9 <= low <= high <= CASE["eig_H"][-1] + 1e-9


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad(grad)": lambda fn: torch.func.grad(torch.func.grad(fn)),
    "jacfwd(grad)": lambda fn: torch.func.jacfwd(torch.func.grad(fn)),
    "hessian": torch.func.hessian,
    "vmap(grad(grad))": lambda fn: lambda lam: torch.func.vmap(torch.func.grad(torch.func.grad(fn)))(lam[None])[0],
    "autograd twice": lambda fn: lambda lam: torch.autograd.functional.hessian(fn, lam),
}


def second_derivative(transform: str, adjoint: Any) -> Tensor:
    """Of the outer objective at the solution of ridge regression, which moves with lam."""
    solver = metacal.stationary(RIDGE.inner)

    def value(lam: Tensor) -> Tensor:
        w = metacal.solve(solver, RIDGE.solution, {"lam": lam}, RIDGE.steps(1), adjoint)
        return RIDGE.outer(w, {"lam": lam}, RIDGE.outer_batch)

    return TRANSFORMS[transform](value)(f64(0.3))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", EXACT_ON_RIDGE)
def test_the_second_derivative_of_ridge_regression(name: str, transform: str) -> None:
    close(second_derivative(transform, adjoints.Implicit(EXACT_ON_RIDGE[name])), f64(CASE["second_derivative"]), 1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nystroem_of_full_rank_is_a_damping(transform: str) -> None:
    sketch, damped = adjoints.Implicit(linear.Nystroem(3, rho=0.1)), adjoints.Implicit(linear.Dense(), damping=0.1)
    close(at_solution(sketch).hparams, at_solution(damped).hparams, 1e-11)
    close(second_derivative(transform, sketch), second_derivative(transform, damped), 1e-9)


@pytest.mark.parametrize("name", EXACT_ON_RIDGE)
def test_an_estimate_in_lanes_can_be_differentiated_forward(name: str) -> None:
    """The params are the same in every lane, their tangents are not."""
    solver = metacal.stationary(RIDGE.inner)
    estimate = metacal.hypergradient(RIDGE.outer, solver, adjoints.Implicit(EXACT_ON_RIDGE[name]))

    def gradient(lam: Tensor) -> Tensor:
        hparams = {"lam": lam}
        return estimate(solver.init(RIDGE.solution, hparams), hparams, RIDGE.steps(1), RIDGE.outer_batch).hparams["lam"]

    lanes, d_lanes = f64(0.3, 0.3), f64(1.0, 3.0)
    found = torch.func.jvp(torch.func.vmap(gradient), (lanes,), (d_lanes,))[1]
    close(found, CASE["second_derivative"] * d_lanes, 1e-9)


@pytest.mark.parametrize("name", STARTS)
def test_warm_starts_go_on_from_the_last_solution(name: str) -> None:
    """The same system again and again, two steps at a time, reaches what two steps cannot."""
    solver = type(SOLVERS[name])(2)
    A, b = spd(10, 6.0) + (0.5 * (orthogonal(10) - orthogonal(10).T) if name in ("NormalCG", "GMRES", "BiCGSTAB") else 0), rhs(10)
    exact, x, errors = torch.linalg.solve(A, b), None, []
    for _ in range(30):
        x = solve(solver, A, b, x).value
        errors.append((x - exact).norm() / exact.norm())
    assert errors[-1] < 1e-3 < 1e-2 < errors[0]


@pytest.mark.parametrize("kind", [linear.CG, linear.Neumann], ids=["CG", "Neumann"])
def test_memory_carries_warm_starts_from_call_to_call(kind: Any) -> None:
    p = PROBLEMS["logistic_exp_reg"]
    solver = metacal.stationary(p.inner)
    state, ct = solver.init(p.solution, p.hparams), tree_map(torch.cos, p.solution)
    exact = torch.linalg.solve(second_order(p.inner, p.solution, p.hparams, p.batches[0])[1], ravel(ct))

    def call(adjoint: Any, memory: Tree, hparams: Tree = p.hparams) -> adjoints.Cotangents:
        return adjoint.vjp(solver, state, hparams, p.steps(1), memory=memory)[1](ct)

    warm, memory, errors = adjoints.Implicit(kind(1, warm_start=True)), (), []
    for _ in range(6):
        memory = call(warm, memory).memory
        errors.append(float((ravel(memory) - exact).norm()))
    assert errors[-1] < 0.3 * errors[0]
    cold = adjoints.Implicit(kind(1))
    assert call(cold, memory).memory == ()
    close(call(cold, memory).hparams, call(cold, ()).hparams, 0.0)


def test_derivatives_of_an_exact_estimate_do_not_know_where_it_began() -> None:
    p, adjoint = PROBLEMS["logistic_exp_reg"], adjoints.Implicit(linear.CG(4, warm_start=True))
    solver = metacal.stationary(p.inner)
    state, ct = solver.init(p.solution, p.hparams), tree_map(torch.cos, p.solution)

    def estimate(lam: Tensor, memory: Tree) -> Tensor:
        return adjoint.vjp(solver, state, {"lam": lam}, p.steps(1), memory=memory)[1](ct).hparams["lam"]

    for outermost in (torch.func.jacrev, torch.func.jacfwd):
        warm, cold = (outermost(estimate)(p.hparams["lam"], memory) for memory in ({"w": f64(0.3, -0.2, 0.5)}, ()))
        close(warm, cold, 1e-8)
        assert cold.abs().sum() > 0


def test_a_solver_may_leave_out_the_curvature() -> None:
    class Halving(linear.LinearSolver):
        def solve(self, matvec: Any, b: Tree, x0: Tree | None = None) -> linear.LinearSolution:
            return linear.LinearSolution(tree_map(lambda x: x / 2, b), f64(0.25), f64(0.0))

    hg = at_solution(adjoints.Implicit(Halving()))
    assert hg.stats["curvature_min"].isnan()
    close(hg.hparams["lam"], f64(CASE["identity"]["identity (T1-T2), -w.grad_f"]) / 2, 1e-12)


# Fixed points


@pytest.mark.parametrize(
    "solver",
    [linear.Dense(), linear.GMRES(5), linear.NormalCG(9), linear.BiCGSTAB(7), linear.Neumann(200, 1.0)],
    ids=kind_of,
)
def test_fixed_points_use_the_true_transpose(solver: linear.LinearSolver) -> None:
    """A deep equilibrium layer: reverse and forward mode against the dense Jacobian, and each other."""
    i = torch.arange(5, dtype=F64)
    W, U, x = 0.3 * torch.sin(1 + 5 * i[:, None] + i * i), torch.cos(i[:, None] + torch.arange(2, dtype=F64)), f64(0.5, -1.0)
    fixed = metacal.fixed_point(lambda z, h, b: torch.tanh(h @ z + U @ b))
    adjoint = adjoints.Implicit(solver)
    z = metacal.run(fixed, fixed.init(torch.zeros(5, dtype=F64), W), W, metacal.repeat(x, 200)).params
    slope = 1 - z**2
    v = torch.linalg.solve((torch.eye(5, dtype=F64) - slope[:, None] * W).T, 3 * z**2)
    truth = torch.outer(slope * v, z)

    def value(h: Tensor) -> Tensor:
        return (metacal.solve(fixed, z, h, [x], adjoint) ** 3).sum()

    close(torch.func.grad(value)(W), truth, 1e-9)
    close(torch.func.jacfwd(value)(W), truth, 1e-9)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("operator", [linear.Hessian(), linear.Jacobian()], ids=str)
@pytest.mark.parametrize("solver", [linear.Dense(), linear.CG(2)], ids=str)
def test_the_equation_holds_with_the_carry_at_the_end(solver: Any, operator: Any, transform: Any) -> None:
    """w* = 2 h with the carry that the first step leaves; with that of the start it would be h."""
    inner = metacal.descent(lambda w, h, b, c: (0.5 * ((w - h * c) ** 2).sum(), 0 * c + 2.0), metacal.optim.sgd(0.5), carry=f64(1.0))
    h, w, batches = f64(1.0, 3.0), torch.zeros(2, dtype=F64), metacal.repeat(None, 60)
    adjoint = adjoints.Implicit(solver, operator=operator, select=linear.every)

    def end(h: Tensor) -> Tensor:
        return metacal.solve(inner, w, h, batches, adjoint)

    close(transform(end)(h), 2 * torch.eye(2, dtype=F64), 1e-12)
    close(transform(torch.func.jacrev(lambda h: (end(h) ** 3).sum()))(h), torch.diag(48 * h), 1e-12)
    hg = metacal.hypergradient(lambda w, h, b: (w**2).sum(), inner, adjoint)(inner.init(w, h), h, batches, None)
    close(hg.hparams, 8 * h, 1e-12)
    assert hg.stats["residual_norm"] < 1e-12


# Gauss-Newton


def small_network() -> tuple[Any, Any, Any, Tree, Tree, tuple[Tensor, Tensor]]:
    g = generator()
    x, y = torch.randn(6, 3, generator=g, dtype=F64), torch.arange(6) % 2
    params = {"a": 0.5 * torch.randn(3, 4, generator=g, dtype=F64), "b": 0.5 * torch.randn(4, 2, generator=g, dtype=F64)}
    hparams = {"weights": torch.linspace(0.5, 1.5, 6, dtype=F64), "scale": f64(1.2)}

    def model(w: Tree, h: Tree, b: Any) -> Tensor:
        return torch.tanh(h["scale"] * b[0] @ w["a"]) @ w["b"]

    def loss(z: Tensor, h: Tree, b: Any) -> Tensor:
        return (h["weights"] * (torch.logsumexp(z, -1) - z.gather(-1, b[1][:, None])[:, 0])).mean()

    return model, loss, (lambda w, h, b: loss(model(w, h, b), h, b)), params, hparams, (x, y)


def dense_gauss_newton(model: Any, loss: Any, params: Tree, hparams: Tree, batch: Any) -> Tensor:
    z = model(params, hparams, batch).reshape(-1)
    J = torch.autograd.functional.jacobian(lambda w: model(unravel(params, w), hparams, batch).reshape(-1), ravel(params))
    H = torch.autograd.functional.hessian(lambda z: loss(z.reshape(6, 2), hparams, batch), z)
    return J.T @ H @ J


def test_gauss_newton_is_its_dense_formula() -> None:
    model, loss, inner, params, hparams, batch = small_network()
    operator = linear.GaussNewton(model, loss)
    solver = metacal.stationary(inner)
    truth = dense_gauss_newton(model, loss, params, hparams, batch)
    A = operator.matrix(solver, params, hparams, batch, ())
    for e in torch.eye(len(truth), dtype=F64):
        close(ravel(A(unravel(params, e))), truth @ e, 1e-11)
        close(ravel(A.transpose(unravel(params, e))), truth @ e, 1e-11)

    def outer(w: Tree, h: Tree, b: Any) -> Tensor:
        return (w["a"] ** 2).sum() + w["b"].sum()

    for solve_with in (linear.Dense("cholesky"), linear.CG(40), linear.MINRES(40)):
        adjoint = adjoints.Implicit(solve_with, operator=operator, damping=0.1)
        hg = metacal.hypergradient(outer, solver, adjoint)(solver.init(params, hparams), hparams, [batch], batch)
        inverse = lambda _, b: torch.linalg.solve(truth + 0.1 * torch.eye(len(truth), dtype=F64), b)  # noqa: E731
        close(hg.hparams, implicit_gradient(inner, outer, params, hparams, batch, batch, inverse).hparams, 1e-9)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    """Least squares: the hypergradient and its second derivative are those of the Hessian."""
    p = RIDGE
    operator = linear.GaussNewton(
        lambda w, h, b: {"fit": b[0] @ w["w"], "w": w["w"]},
        lambda z, h, b: 0.5 * ((z["fit"] - b[1]) ** 2).mean() + 0.5 * h["lam"] * (z["w"] ** 2).sum(),
    )
    for solver in (linear.Dense(), linear.CG(3)):
        adjoint = adjoints.Implicit(solver, operator=operator)
        close(at_solution(adjoint).hparams["lam"], f64(CASE["hypergrad"]), 1e-10)
        inner = metacal.stationary(p.inner)

        def value(lam: Tensor, adjoint: Any = adjoint, inner: Any = inner) -> Tensor:
            w = metacal.solve(inner, p.solution, {"lam": lam}, p.steps(1), adjoint)
            return p.outer(w, {"lam": lam}, p.outer_batch)

        for outermost in (torch.func.grad, torch.func.jacfwd):
            close(outermost(torch.func.grad(value))(f64(0.3)), f64(CASE["second_derivative"]), 1e-9)


def test_gauss_newton_sees_one_realisation_of_noise() -> None:
    """With dropout in the model, products agree with the dense matrix of one mask, for one batch and the mean over two."""
    model, loss, _, params, hparams, batch = small_network()

    def noisy(w: Tree, h: Tree, b: Any) -> Tensor:
        return nn.functional.dropout(model(w, h, b), 0.5)

    def noisy_inner(w: Tree, h: Tree, b: Any) -> Tensor:
        return loss(noisy(w, h, b), h, b)

    def outer(w: Tree, h: Tree, b: Any) -> Tensor:
        return (w["a"] ** 2).sum() + w["b"].sum()

    solver = metacal.stationary(noisy_inner)
    found = []
    for solve_with in (linear.Dense("cholesky"), linear.CG(60)):
        torch.manual_seed(3)
        adjoint = adjoints.Implicit(solve_with, operator=linear.GaussNewton(noisy, loss), damping=0.1, select=linear.every)
        hg = metacal.hypergradient(outer, solver, adjoint)(solver.init(params, hparams), hparams, [batch, batch], batch)
        found.append(hg.hparams)
    close(found[0], found[1], 1e-9)


# Stochastic products


def noisy_quadratic() -> tuple[Any, Any, Tree, Tree, list[Tensor]]:
    batches = [spd(4, 5.0, seed) / 6 for seed in range(3)]

    def inner(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
        return w @ A @ w / 2 - h @ w

    def outer(w: Tensor, h: Tensor, b: Any) -> Tensor:
        return torch.sin(w).sum()

    return inner, outer, rhs(4), rhs(4, seed=2), batches


def test_each_stochastic_product_reads_the_next_batch() -> None:
    """F_h = -I, so that the hypergradient is v itself: the product of (I - a A_k), term by term."""
    inner, outer, w, h, batches = noisy_quadratic()
    solver, step, ct = metacal.stationary(inner), 0.8, torch.cos(w)

    def estimate(order: list[Tensor], stochastic: bool = True) -> Tensor:
        adjoint = adjoints.Implicit(linear.Neumann(3, step), select=linear.every, stochastic=stochastic)
        return metacal.hypergradient(outer, solver, adjoint)(solver.init(w, h), h, order, ()).hparams

    def series(order: tuple[Tensor, ...]) -> Tensor:
        term = total = ct
        for A in order:
            term = term - step * A @ term
            total = total + term
        return step * total

    close(estimate(batches), series(tuple(batches)), 1e-12)
    close(estimate(batches[:2]), series((batches[0], batches[1], batches[0])), 1e-12)  # in a circle
    # Unbiased: the mean over all sequences of draws is the series of the mean matrix.
    draws = [estimate(list(order)) for order in itertools.product(batches, repeat=3)]
    close(torch.stack(draws).mean(0), estimate(batches, stochastic=False), 1e-12)
    mean = torch.stack(batches).mean(0)
    close(estimate(batches, stochastic=False), series((mean, mean, mean)), 1e-12)


def test_stochastic_estimates_can_be_differentiated() -> None:
    inner, _, w, h, batches = noisy_quadratic()
    solver = metacal.stationary(lambda w, h, A: inner(w, h["b"], h["scale"] * A))
    adjoint = adjoints.Implicit(linear.Neumann(3, 0.8), select=linear.every, stochastic=True)

    def estimate(scale: Tensor) -> Tensor:
        hparams = {"b": h, "scale": scale}
        _, pullback = adjoint.vjp(solver, solver.init(w, hparams), hparams, batches)
        return pullback(torch.cos(w)).hparams["b"]

    truth = (estimate(f64(1.0 + 1e-6)) - estimate(f64(1.0 - 1e-6))) / 2e-6
    close(torch.func.jvp(estimate, (f64(1.0),), (f64(1.0),))[1], truth, 1e-7)
    close(torch.func.vmap(estimate)(f64([1.0, 0.5]))[1], estimate(f64(0.5)), 1e-12)


# Warnings


def warned(adjoint: Any, H: Tensor, b: Tensor | None = None) -> list[str]:
    """What is said about the hypergradient of a quadratic with this Hessian."""
    b = torch.ones(len(H), dtype=F64) if b is None else b
    solver = metacal.stationary(lambda w, h, _: w @ H @ w / 2 - h @ w)
    estimate = metacal.hypergradient(lambda w, h, _: b @ w, solver, adjoint)
    w = torch.zeros(len(H), dtype=F64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate(solver.init(w, w), w, [()], ())
    assert all(issubclass(x.category, linear.UnreliableHypergradient) for x in caught)
    return [str(x.message) for x in caught]


SINGULAR, INDEFINITE, GOOD = (torch.diag(f64(*d)) for d in ((1.0, 2.0, 0.0), (1.0, 2.0, -0.5), (1.0, 2.0, 4.0)))
WARNINGS = {
    "CG, indefinite": (linear.CG(9), INDEFINITE, "not positive definite.*damping"),
    "CG, singular": (linear.CG(9), SINGULAR, "not positive definite.*damping"),
    "Cholesky, indefinite": (linear.Dense("cholesky"), INDEFINITE, "Cholesky.*damping"),
    "LU, singular": (linear.Dense(), SINGULAR, "singular.*damping"),
    "LU, almost singular": (linear.Dense(), spectral(f64(1.0, 2.0, 1e-18, 3.0)), "singular.*damping"),
    "MINRES, singular": (linear.MINRES(9), SINGULAR, "MINRES stopped.*singular"),
    "GMRES, singular": (linear.GMRES(9), SINGULAR, "GMRES stopped.*singular"),
    "NormalCG, singular": (linear.NormalCG(9), SINGULAR, "NormalCG stopped.*singular"),
    "Neumann, large step": (linear.Neumann(30, 0.6), GOOD, "series diverges.*`step_size` = 0.6"),
    "Neumann, indefinite": (linear.Neumann(90, 0.3), INDEFINITE, "linear_residual'\\] > 1"),
    "Nystroem, tiny rho": (linear.Nystroem(1, rho=1e-9), GOOD, "linear_residual'\\] > 1"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_trouble_is_said_in_words(case: str) -> None:
    solver, H, words = WARNINGS[case]
    (message,) = warned(adjoints.Implicit(solver), H)
    with pytest.warns(linear.UnreliableHypergradient, match=words):
        warnings.warn(message, linear.UnreliableHypergradient, stacklevel=1)
    if not isinstance(solver, linear.Neumann | linear.Nystroem):
        assert warned(adjoints.Implicit(solver, damping=1.0), H) == []


FIXED_POINT = metacal.fixed_point(lambda w, W, b: W @ w + torch.ones_like(w))


@pytest.mark.parametrize("kind", [linear.CG, linear.MINRES, linear.Lanczos, linear.Nystroem])
@pytest.mark.parametrize("seed", range(3))
def test_solvers_for_symmetric_matrices_speak_up_at_others(kind: Any, seed: int) -> None:
    """A fixed point's Jacobian I - W: what is not solved for is said, in words and by the residual; a symmetric one is solved."""
    skew = orthogonal(4, seed) - orthogonal(4, seed).T
    symmetric = 0.3 * indefinite(4, 2.0, seed) / 2
    estimate = metacal.hypergradient(lambda w, W, b: w.sum(), FIXED_POINT, adjoints.Implicit(kind(4)))

    def errors(W: Tensor) -> tuple[float, float]:
        w = torch.linalg.solve(torch.eye(4, dtype=F64) - W, torch.ones(4, dtype=F64))
        hg = estimate(FIXED_POINT.init(w, W), W, [()], ())
        v = torch.linalg.solve(torch.eye(4, dtype=F64) - W.T, torch.ones(4, dtype=F64))
        truth = torch.outer(v, w)
        return float((hg.hparams - truth).norm() / truth.norm()), float(hg.stats["linear_residual"])

    if kind is not linear.Nystroem:
        error, residual = errors(symmetric)
        assert error < 1e-9 > residual
        with pytest.warns(linear.UnreliableHypergradient, match=rf"linear\.{kind.__name__} is for symmetric matrices.*linear\.GMRES"):
            error, residual = errors(symmetric + 0.3 * skew)
        assert residual > 1e-3 < error
    assert warned(adjoints.Implicit(kind(3)), spectral(f64(1.0, 2.0, 4.0))) == []


def test_a_run_that_diverged_without_overflow_is_not_trusted() -> None:
    """Params of 1e20 in float32, whose squares overflow: what is returned is the derivative there, and a warning."""
    solver, h = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(10.0)), torch.tensor([1.0, -2.0])
    for linear_solver in (linear.CG(5), linear.MINRES(5), linear.GMRES(5), linear.Lanczos(5), linear.BiCGSTAB(5), linear.Dense()):
        estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum() / 2, solver, adjoints.Implicit(linear_solver))
        with pytest.warns(linear.UnreliableHypergradient, match="square overflows: the inner run has diverged"):
            hg = estimate(solver.init(0 * h, h), h, metacal.repeat(None, 16), None)
        close(hg.hparams / 1e20, hg.state.params / 1e20, 1e-6)
        assert hg.stats["residual_norm"] > 0.5


def test_loose_residuals_and_what_went_bad_before_are_not_warned_about() -> None:
    H = spd(20, 1e3)
    krylov_methods = (linear.CG(2), linear.MINRES(2), linear.GMRES(2), linear.BiCGSTAB(2))
    for solver in (*krylov_methods, linear.Neumann(1, 1e-4), linear.Neumann(2), linear.Identity()):
        assert warned(adjoints.Implicit(solver), H) == [], solver
    assert warned(adjoints.Implicit(linear.CG(3)), GOOD, f64(1.0, float("nan"), 1.0)) == []


def test_nothing_is_said_inside_transforms() -> None:
    """Where a warning would need the host; the stats say it."""
    solver = metacal.stationary(lambda w, h, _: w @ INDEFINITE @ w / 2 - h @ w)
    estimate = metacal.hypergradient(lambda w, h, _: w.sum(), solver, adjoints.Implicit(linear.CG(9)))
    w = torch.zeros(2, 3, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = torch.func.vmap(lambda w: estimate(solver.init(w, w), w, [()], ()).stats)(w)
    assert (stats["curvature_min"] <= 0).all()


# Bad input


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: linear.GMRES(5, restart=0), ValueError, "`restart`.*at least 1.*0"),
        (lambda: linear.CG(3, tolerance=-1.0), ValueError, "`tolerance`.*at least 0.*-1.0"),
        (lambda: linear.GMRES(3, "fine"), TypeError, "`tolerance`.*number.*'fine'"),  # type: ignore[arg-type]
        (lambda: linear.Dense(chunk_size=0), ValueError, "`chunk_size`.*at least 1.*0"),
        (lambda: linear.Nystroem(2, chunk_size=0), ValueError, "`chunk_size`.*at least 1.*0"),
        (lambda: linear.Neumann(3, "small"), TypeError, "`step_size`.*number.*'small'"),  # type: ignore[arg-type]
        (lambda: linear.GaussNewton(1, max), TypeError, "`model`.*function.*int"),  # type: ignore[arg-type]
        (lambda: linear.GaussNewton(max, 2), TypeError, "`loss`.*function.*int"),  # type: ignore[arg-type]
        (lambda: linear.KFAC(max, nn.MSELoss()), TypeError, "`module`.*nn.Module"),  # type: ignore[arg-type]
        (lambda: adjoints.Implicit(linear.CG(3), damping="a"), TypeError, "`damping`.*number.*'a'"),  # type: ignore[arg-type]
        (lambda: adjoints.Implicit(linear.CG(3), damping=-1.0), ValueError, "`damping`.*at least 0.*-1.0"),
        (lambda: adjoints.Implicit(linear.CG(3), select="last"), TypeError, "`select`.*function.*'last'"),  # type: ignore[arg-type]
        (lambda: at_solution(adjoints.Implicit(linear.CG(3), select=lambda batches: [])), ValueError, "`select`.*at least one batch.*none"),
        (lambda: linear.MINRES(0), ValueError, "`num_steps`.*at least 1.*0"),
        (lambda: linear.Neumann(3, power_steps=0), ValueError, "`power_steps`.*at least 1.*0"),
        (lambda: linear.Dense("qr"), ValueError, "`factorization`.*'qr'"),  # type: ignore[arg-type]
        (lambda: linear.Nystroem(0), ValueError, "`rank`.*at least 1.*0"),
        (lambda: linear.Nystroem(2, rho=0.0), ValueError, "`rho`.*positive.*0.0"),
        (lambda: linear.Diagonal(0), ValueError, "`num_probes`.*at least 1.*0"),
        (lambda: linear.CG(3, preconditioner=linear.MINRES(3)), TypeError, "`preconditioner`.*MINRES"),  # type: ignore[arg-type]
        (lambda: linear.KFAC(nn.Linear(1, 1), nn.MSELoss(), damping=0.0), ValueError, "`damping`.*positive.*0.0"),
        (lambda: adjoints.Implicit(linear.CG(3), operator="hessian"), TypeError, "`operator`.*Hessian.*str"),  # type: ignore[arg-type]
        (lambda: adjoints.Implicit(linear.CG(3), stochastic=True, select=linear.every), ValueError, "`stochastic`.*CG.*Neumann"),
        (lambda: adjoints.Implicit(linear.Neumann(3), stochastic=True), ValueError, "`stochastic`.*linear.every"),
        (lambda: solve(linear.Nystroem(9), spd(5, 2.0), rhs(5)), ValueError, "`rank`.*at most.*5.*9.*Dense"),
    ],
)
def test_bad_settings_are_named(build: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_complex_params_are_refused_by_name() -> None:
    inner = metacal.fixed_point(lambda w, h, b: {"z": 0.5 * h * w["z"]})
    w, h = {"z": torch.ones(2, dtype=torch.complex128)}, f64(1.0, 2.0)
    with pytest.raises(TypeError, match=r"`params` at 'z' should be real.*complex128.*view_as_real"):
        adjoints.Implicit(linear.CG(2)).vjp(inner, inner.init(w, h), h, [()])


# K-FAC


def classifier(*sizes: int) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    net = nn.Sequential(*layers).double()
    return net, metacal.functional(net), torch.randn(12, sizes[0], dtype=F64), torch.arange(12) % sizes[-1]


def test_kronecker_factors_of_one_layer_are_exact() -> None:
    """Least squares of a single layer: the Hessian is a Kronecker product, so K-FAC is a damped direct solve."""
    pytest.importorskip("curvlinops")
    net, f, x, _ = classifier(4, 3)
    y = torch.sin(torch.arange(36, dtype=F64)).reshape(12, 3)
    inner = lambda w, h, b: h * nn.functional.mse_loss(f.apply(w, b[0]), b[1])  # noqa: E731
    solver, h = metacal.stationary(inner), f64(1.0)
    state = solver.init(f.params, h)

    def estimate(linear_solver: linear.LinearSolver, damping: float = 0.0) -> metacal.HyperGradient:
        outer = lambda w, h, b: (w["0.weight"] ** 3).sum() + w["0.bias"].sum()  # noqa: E731
        return metacal.hypergradient(outer, solver, adjoints.Implicit(linear_solver, damping=damping))(state, h, [(x, y)], ())

    kfac = linear.KFAC(net, nn.MSELoss(), damping=0.2)
    close(estimate(kfac).hparams, estimate(linear.Dense(), damping=0.2).hparams, 1e-10)
    before = [p.detach().clone() for p in net.parameters()]
    preconditioned = estimate(linear.CG(1, preconditioner=kfac), damping=0.2)  # the exact inverse: one step
    close(preconditioned.hparams, estimate(linear.Dense(), damping=0.2).hparams, 1e-10)
    assert int(preconditioned.stats["num_products"]) == 1
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), before, strict=True))


def test_kronecker_factors_are_those_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net, f, x, y = classifier(4, 5, 3)
    at = adjoints.equation.Theta(f.params, (), (), [(x[:6], y[:6]), (x[6:], y[6:])])
    params = [dict(net.named_parameters())[name] for name in sorted(f.params)]
    factors = curvlinops.KFACLinearOperator(
        net, nn.CrossEntropyLoss(), params, at.batches, fisher_type="type-2", check_deterministic=False, separate_weight_and_bias=False
    )
    n = sum(p.numel() for p in params)
    dense = factors @ torch.eye(n, dtype=F64)
    b = rhs(n)
    exact = torch.linalg.solve(dense + 0.3 * torch.eye(n, dtype=F64), b)
    A = linear.LinearMap(lambda v: v, lambda v: v, at)
    solution = linear.KFAC(net, nn.CrossEntropyLoss(), damping=0.3).solve(A, unravel(f.params, b))
    close(ravel(solution.value), exact, 1e-10)
    assert int(solution.num_products) == 1
    close(solution.residual_norm, (exact - b).norm() / b.norm(), 1e-10)


def test_kronecker_factors_save_products() -> None:
    pytest.importorskip("curvlinops")
    net, f, x, y = classifier(6, 3)
    x = x * torch.logspace(-1, 1, 6, dtype=F64)
    inner = lambda w, h, b: h * nn.functional.cross_entropy(f.apply(w, b[0]), b[1])  # noqa: E731
    operator = linear.GaussNewton(lambda w, h, b: f.apply(w, b[0]), lambda z, h, b: h * nn.functional.cross_entropy(z, b[1]))
    solver, h = metacal.stationary(inner), f64(1.0)
    kfac = linear.KFAC(net, nn.CrossEntropyLoss(), damping=1e-3)
    found = []
    for preconditioner in (None, kfac):
        adjoint = adjoints.Implicit(linear.CG(120, 1e-8, preconditioner=preconditioner), operator=operator, damping=1e-3)
        outer = lambda w, h, b: (w["0.weight"] ** 2).sum() + w["0.bias"][0]  # noqa: E731
        found.append(metacal.hypergradient(outer, solver, adjoint)(solver.init(f.params, h), h, [(x, y)], ()))
    close(found[1].hparams, found[0].hparams, 1e-6)
    assert found[1].stats["num_products"] < 0.7 * found[0].stats["num_products"]


def test_kronecker_factors_say_what_they_cannot_do() -> None:
    pytest.importorskip("curvlinops")
    net, f, x, y = classifier(4, 3)
    kfac = linear.KFAC(net, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"LinearMap.*`at`.*Implicit"):
        kfac.solve(lambda v: v, f.params)
    A = linear.LinearMap(lambda v: v, lambda v: v, adjoints.equation.Theta(f.params, (), (), [(x, y)]))
    with pytest.raises(RuntimeError, match=r"KFAC.*torch.func.*Diagonal"):
        torch.func.vmap(lambda b: kfac.solve(A, {**f.params, "0.bias": b}).value)(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(ValueError, match=r"`module`.*by name.*'0.bias'.*functional"):
        linear.KFAC(nn.Linear(4, 3), nn.CrossEntropyLoss()).solve(A, f.params)


def test_to_look_for_symmetry_draws_nothing_of_the_run() -> None:
    """The products that it takes are of a noisy map: the generator stands afterwards where the run left it."""
    A = f64(0.0, 0.6, -0.6, 0.0).reshape(2, 2)
    noisy = metacal.fixed_point(lambda w, h, b: A @ w + h * (1 + 0.01 * torch.rand(2, dtype=F64)))
    h, batches = f64(1.0, 2.0), metacal.repeat(None, 5)
    torch.manual_seed(0)
    metacal.run(noisy, noisy.init(h, h), h, batches)
    after = torch.rand(())
    torch.manual_seed(0)
    estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum(), noisy, adjoints.Implicit(linear.CG(2)))
    with pytest.warns(linear.UnreliableHypergradient, match="is for symmetric matrices"):
        estimate(noisy.init(h, h), h, batches, None)
    assert torch.rand(()) == after
