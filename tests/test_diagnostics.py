"""`check` finds planted defects and lets right numbers pass; `compare` measures what can be computed by hand; `advise` chooses."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import metacal
from metacal import adjoints, linear, optim, tree
from metacal.adjoints import Adjoint, Cotangents
from metacal.diagnostics import CheckResult, advise, check, compare, measure, work
from metacal.diagnostics.differences import central_difference, close_difference
from metacal.diagnostics.verdict import describe
from metacal.estimate import Estimate
from metacal.registry import METHODS, Sizes
from problems import F64, OPTIMIZERS, PROBLEMS, Problem, Tree, direct_solve, f64, implicit_gradient, relative_error, unrolled_gradient

# Differences


@pytest.mark.parametrize(
    ("fn", "truth"),
    [
        (lambda s: math.exp(2 * s), 2.0),
        (lambda s: math.sin(5 * s) + 100, 5.0),
        (lambda s: 3.0, 0.0),
        (lambda s: s**3 - s, -1.0),
        (lambda s: math.sqrt(0.01 + s) if s > -0.01 else math.nan, 5.0),
        (lambda s: 1 / (1e-4 + s * s), 0.0),
    ],
)
def test_a_difference_is_within_the_error_that_it_states(fn: Callable[[float], float], truth: float) -> None:
    value, error = central_difference(fn, F64)
    assert abs(value - truth) <= error


def test_the_stated_error_is_small_for_smooth_functions_and_large_for_kinks() -> None:
    assert central_difference(math.exp, F64).error < 1e-10
    assert central_difference(lambda s: abs(s - 0.001), F64).error > 0.01
    single = central_difference(lambda s: float(torch.tensor(3 * s).sin() + 1), torch.float32)
    assert abs(single.value - 3) <= single.error <= 1e-2
    assert math.isnan(central_difference(lambda s: math.nan, F64).value)


# check: what is right


def sgd(p: Problem) -> metacal.InnerSolver:
    return metacal.descent(p.inner, optim.sgd(p.step_size))


def checked(p: Problem, adjoint: Adjoint, num_steps: int = 3, solver: metacal.InnerSolver | None = None, **options: Any) -> CheckResult:
    solver = sgd(p) if solver is None else solver
    estimate = metacal.hypergradient(p.outer, solver, adjoint)
    return of(estimate, p, num_steps, **options)


def of(estimate: Estimate, p: Problem, num_steps: int = 3, **options: Any) -> CheckResult:
    state = estimate.solver.init(p.params, p.hparams)
    return check(estimate, state, p.hparams, p.steps(num_steps), p.outer_batch, **{"num_directions": 2, **options})


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled(), adjoints.Unrolled(mode="graph"), adjoints.Forward()], ids=describe)
@pytest.mark.parametrize("problem", ["ridge_scalar", "multi_leaf", "zero_dim", "mlp_reweighting"])
def test_exact_methods_are_right(problem: str, adjoint: Adjoint) -> None:
    result = checked(PROBLEMS[problem], adjoint, solver=metacal.descent(PROBLEMS[problem].inner, optim.adam(0.05)))
    assert (result.verdict, result.ok) == ("right", True), result
    assert result.relative_error < 1e-10
    assert {d.which for d in result.directions} == ({"hparams"} if isinstance(adjoint, adjoints.Forward) else {"hparams", "params"})
    for d in result.directions:
        assert abs(d.estimate - d.exact.value) <= 1e-6 * d.size + 3 * d.exact.error


BIASED = [
    adjoints.Unrolled(window=2),
    adjoints.FirstOrder(),
    adjoints.FiniteDifference(radius=0.1, step_size=0.3),
    adjoints.SAMA(),
    adjoints.Implicit(linear.Identity()),
    adjoints.Implicit(linear.Dense()),
    adjoints.Implicit(linear.CG(1), damping=0.1),
    adjoints.Implicit(linear.Neumann(3, 0.2)),
    adjoints.Implicit(linear.Neumann(3, 0.2), select=linear.every, stochastic=True),
    adjoints.Implicit(linear.GMRES(2)),
    adjoints.Implicit(linear.Nystroem(2)),
]


@pytest.mark.parametrize("adjoint", BIASED, ids=describe)
@pytest.mark.parametrize("problem", ["logistic_exp_reg", "multi_leaf"])
def test_biased_methods_are_not_called_wrong(problem: str, adjoint: Adjoint) -> None:
    result = checked(PROBLEMS[problem], adjoint, num_directions=1)
    assert (result.verdict, result.ok) == ("biased", True), result
    assert result.relative_error > 1e-3
    assert "By definition" in str(result)


def test_the_distance_to_the_exact_unroll_is_that_of_independent_numbers() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    exact = unrolled_gradient(p, dataclasses.replace(OPTIMIZERS["sgd"], hyper={"lr": p.step_size}), 3).hparams
    end = metacal.run(sgd(p), sgd(p).init(p.params, p.hparams), p.hparams, p.steps(3)).params
    implicit = implicit_gradient(p.inner, p.outer, end, p.hparams, p.batches[0], p.outer_batch, direct_solve).hparams
    result = checked(p, adjoints.Implicit(linear.Dense()))
    assert result.relative_error == pytest.approx(relative_error(implicit, exact), rel=1e-9)
    a, b = implicit["lam"], exact["lam"]
    assert result.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-9)


def test_an_implicit_method_is_right_once_the_inner_problem_is_solved_and_says_so_before() -> None:
    p, adjoint = PROBLEMS["one_element"], adjoints.Implicit(linear.CG(1))
    assert checked(p, adjoint, 40).verdict == "right"
    early = checked(p, adjoint, 3)
    assert early.verdict == "biased"
    assert "right for the solution" in early.headline
    assert "not converged (residual_norm" in str(early)
    assert early.stats["residual_norm"] > 1e-3


def test_the_parts_of_a_bias_are_named() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    assert "Damping 0.3" in str(checked(p, adjoints.Implicit(linear.Dense(), damping=0.3)))
    unsolved = checked(p, adjoints.Implicit(linear.CG(1)))
    assert "linear system is not solved (residual" in str(unsolved)
    assert unsolved.linear_residual == pytest.approx(unsolved.stats["linear_residual"], rel=1e-9)
    still = checked(p, adjoints.Implicit(linear.Dense()), solver=metacal.stationary(p.inner))
    assert "do not move the params" in str(still)


def test_a_bias_can_be_limited() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    found = checked(p, adjoints.Unrolled(window=2)).relative_error
    assert checked(p, adjoints.Unrolled(window=2), bias=1.1 * found).ok
    result = checked(p, adjoints.Unrolled(window=2), bias=0.9 * found)
    assert (result.verdict, result.ok) == ("biased", False)
    assert "`bias` allows" in str(result)


def test_factors_and_a_gauss_newton_matrix_are_held_to_what_they_invert() -> None:
    module, p = torch.nn.Linear(3, 1, bias=False).double(), PROBLEMS["ridge_scalar"]
    model = lambda w, h, b: torch.func.functional_call(module, w, (b[0],)).squeeze(-1)  # noqa: E731
    loss = lambda z, h, b: h["lam"] * ((z - b[1]) ** 2).mean()  # noqa: E731
    regression = dataclasses.replace(
        p,
        inner=lambda w, h, b: loss(model(w, h, b), h, b) + 0.1 * (w["weight"] ** 2).sum(),
        outer=lambda w, h, b: ((model(w, h, b) - b[1]) ** 2).mean(),
        params={"weight": torch.full((1, 3), 0.2, dtype=F64)},
    )
    result = checked(regression, adjoints.Implicit(linear.CG(3), operator=linear.GaussNewton(model, loss), damping=0.01))
    assert result.verdict == "biased", result
    assert "another matrix than the Hessian (GaussNewton)" in str(result)
    pytest.importorskip("curvlinops")
    data = lambda h, b: (b[0], b[1][:, None])  # noqa: E731
    result = checked(regression, adjoints.Implicit(linear.KFAC(module, torch.nn.MSELoss(), data=data)))
    assert result.verdict in ("biased", "unreliable"), result
    assert result.linear_residual == pytest.approx(result.stats["linear_residual"], rel=1e-6)


def test_an_equation_of_ones_own_is_what_an_implicit_method_is_held_to() -> None:
    """A projected descent whose residual is that of the projected step: w = max(h, 0), coordinate by coordinate."""
    A, v, h = torch.diag(f64(1.0, 2.0)), f64(3.0, 5.0), f64(1.0, -1.0)
    inner = lambda w, h, b: (A @ (w - h)).dot(w - h) / 2  # noqa: E731
    plain = metacal.descent(inner, optim.sgd(0.4))

    def step(state: metacal.InnerState, h: Tensor, batch: None) -> metacal.InnerState:
        return state._replace(params=plain.step(state, h, batch).params.clamp(min=0))

    def residual(w: Tensor, h: Tensor, batch: None) -> Tensor:
        return w - (w - torch.func.grad(inner)(w, h, batch)).clamp(min=0)

    solver = plain._replace(step=step, residual=residual)
    estimate = metacal.hypergradient(lambda w, h, b: w.dot(v), solver, adjoints.Implicit(linear.GMRES(2)))
    problem = solver.init(torch.ones_like(h), h), h, metacal.repeat(None, 60), None
    assert relative_error(estimate(*problem).hparams, f64(3.0, 0.0)) <= 1e-10
    assert check(estimate, *problem).verdict == "right"


def test_a_window_of_all_the_steps_is_exact() -> None:
    assert checked(PROBLEMS["ridge_scalar"], adjoints.Unrolled(window=3)).verdict == "right"


@pytest.mark.parametrize("adjoint", [adjoints.ForwardSketch(1), adjoints.ZerothOrder(1)], ids=describe)
def test_random_methods_are_held_to_their_mean(adjoint: Adjoint) -> None:
    result = checked(PROBLEMS["logistic_exp_reg"], adjoint, num_draws=16)
    assert (result.verdict, result.ok) == ("random", True), result
    assert all(d.standard_error > 0 for d in result.directions)


def test_what_only_shapes_the_path_is_pointed_out() -> None:
    p = PROBLEMS["ridge_scalar"]
    learned = dataclasses.replace(p, hparams={**p.hparams, "lr": f64(0.5)})
    solver = metacal.descent(p.inner, lambda h: optim.sgd(h["lr"]))
    result = checked(learned, adjoints.Implicit(linear.CG(3)), solver=solver)
    assert result.verdict == "biased"
    assert "`hparams` at 'lr'" in str(result)
    assert "only shapes the path" in str(result)
    assert checked(learned, adjoints.Unrolled(), solver=solver).verdict == "right"


def test_single_precision_limits_what_can_be_said() -> None:
    p = PROBLEMS["logistic_exp_reg"]
    single = dataclasses.replace(
        p, **{name: tree.to(getattr(p, name), torch.float32) for name in ("params", "hparams", "batches", "outer_batch")}
    )
    right = checked(single, adjoints.Unrolled())
    assert right.verdict == "right", right
    assert checked(single, Scaled(adjoints.Unrolled(), 1.3)).verdict == "wrong"
    rough = dataclasses.replace(single, outer=lambda w, h, b: p.outer(w, h, b) + 1e4)
    result = checked(rough, adjoints.Unrolled())
    assert (result.verdict, result.ok) == ("undecided", False), result
    assert "float32" in str(result)


def test_a_check_leaves_the_generators_alone_and_repeats_itself() -> None:
    p = noisy()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = checked(p, adjoints.Unrolled())
    assert torch.equal(torch.get_rng_state(), before)
    assert str(first) == str(checked(p, adjoints.Unrolled()))
    assert first.verdict == "right", first


# check: planted defects


class Wrapped(Adjoint):
    """An adjoint whose cotangents pass through a function: the base of the defects."""

    def __init__(self, inner: Adjoint) -> None:
        self.inner = inner

    def spoiled(self, found: Cotangents) -> Cotangents:
        raise NotImplementedError

    def vjp(self, *args: Any, **options: Any) -> Any:
        state, pullback = self.inner.vjp(*args, **options)
        return state, lambda ct: self.spoiled(pullback(ct))


class Scaled(Wrapped):
    def __init__(self, inner: Adjoint, factor: float) -> None:
        self.inner, self.factor = inner, factor

    def spoiled(self, found: Cotangents) -> Cotangents:
        return found._replace(hparams=tree.scale(self.factor, found.hparams))


class Drawing(Wrapped):
    generator = torch.Generator().manual_seed(0)

    def spoiled(self, found: Cotangents) -> Cotangents:
        return found._replace(hparams=tree.map(lambda x: x * torch.rand((), generator=self.generator), found.hparams))


class ZerosForNaN(Wrapped):
    def spoiled(self, found: Cotangents) -> Cotangents:
        return found._replace(hparams=tree.map(torch.nan_to_num, found.hparams), params=tree.map(torch.zeros_like, found.params))


class LosesALeaf(Wrapped):
    def spoiled(self, found: Cotangents) -> Cotangents:
        scale = torch.zeros_like(found.hparams["target"]["scale"])
        return found._replace(hparams={**found.hparams, "target": {"scale": scale}})


class DampsTwice(adjoints.Implicit):
    def vjp(self, *args: Any, **options: Any) -> Any:
        return adjoints.Implicit(self.solver, damping=2 * self.damping).vjp(*args, **options)


class WithoutDirectTerm(Estimate):
    def __call__(self, state: Any, hparams: Tree, inner_batches: Any, outer_batch: Tree) -> metacal.HyperGradient:
        hg = Estimate.__call__(self, state, hparams, inner_batches, outer_batch)
        direct = torch.func.grad(lambda h: self.outer(hg.state.params, h, outer_batch))(hparams)
        return hg._replace(hparams=tree.sub(hg.hparams, direct))


class DrawsAgain(Adjoint):
    """Runs the steps again for the backward pass, on other noise."""

    def vjp(self, solver: Any, state: Any, hparams: Tree, batches: Any, *, memory: Any = None) -> Any:
        final = metacal.run(solver, state, hparams, batches)

        def pullback(ct: Tree) -> Cotangents:
            return adjoints.Unrolled().vjp(solver, state, hparams, batches)[1](ct)

        return final, pullback


def noisy() -> Problem:
    def inner(w: Tensor, h: Tensor, b: Any) -> Tensor:
        return ((w - h) ** 2 * (1 + torch.rand_like(w))).sum() + (w**4).sum() / 4

    start, h = f64(0.5, -0.3), f64(1.0, 2.0)
    return dataclasses.replace(
        PROBLEMS["zero_dim"], inner=inner, outer=lambda w, h, b: (w**3).sum() + (h**2).sum(), params=start, hparams=h, step_size=0.1
    )


INDIRECT = "the indirect part, through the inner params,"
QUADRATIC, LEAVES = PROBLEMS["quadratic_bilevel"], PROBLEMS["multi_leaf"]
DEFECTS: dict[str, tuple[Callable[[], CheckResult], str]] = {
    "direct term dropped": (
        lambda: of(WithoutDirectTerm(QUADRATIC.outer, sgd(QUADRATIC), adjoints.Unrolled()), QUADRATIC),
        "the direct part, d outer / d hparams, were missing",
    ),
    "indirect term dropped": (lambda: checked(QUADRATIC, Scaled(adjoints.Unrolled(), 0.0)), f"{INDIRECT} were missing"),
    "scaled by 1.01": (lambda: checked(QUADRATIC, Scaled(adjoints.Unrolled(), 1.01)), f"{INDIRECT} were scaled by 1.01"),
    "wrong sign": (lambda: checked(QUADRATIC, Scaled(adjoints.Forward(), -1.0)), f"{INDIRECT} had the wrong sign"),
    "implicit, scaled": (lambda: checked(QUADRATIC, _scaled_implicit(1.01)), "is not what it defines"),
    "damped twice": (lambda: checked(QUADRATIC, DampsTwice(linear.Dense(), damping=0.1)), "is not what it defines"),
    "a leaf detached": (lambda: checked(LEAVES, LosesALeaf(adjoints.Unrolled())), "at 'target.scale' the hypergradient is exactly zero"),
    "detached in the objective": (
        lambda: checked(dataclasses.replace(QUADRATIC, inner=_detached, outer=_of_params), adjoints.Unrolled()),
        "exactly zero and the value changes: something is detached",
    ),
    "noise drawn again": (lambda: checked(noisy(), DrawsAgain()), "draw random numbers"),
    "sketch with a factor": (lambda: checked(QUADRATIC, Scaled(adjoints.ForwardSketch(1), 3.0)), "is not the derivative of the steps"),
}  # fmt: skip


def _scaled_implicit(factor: float) -> Adjoint:
    class Off(adjoints.Implicit):
        def vjp(self, *args: Any, **options: Any) -> Any:
            return Scaled(adjoints.Implicit(self.solver), factor).vjp(*args, **options)

    return Off(linear.CG(4))


def _detached(w: Tree, h: Tree, b: Any) -> Tensor:
    return QUADRATIC.inner(w, tree.detach(h), b)


def _of_params(w: Tree, h: Tree, b: Any) -> Tensor:
    return (w["z"] ** 2).sum()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str) -> None:
    run, words = DEFECTS[defect]
    result = run()
    assert (result.verdict, result.ok) == ("wrong", False), result
    assert words in str(result), result


class BadSquare(torch.autograd.Function):
    """x^2, whose backward pass says 3x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * g


BAD: Callable[[Tensor], Tensor] = BadSquare.apply


def of_leaves(inner: Callable[[Tree, Tree], Tensor], outer: Callable[[Tree, Tree], Tensor], params: Tree, **hparams: Tensor) -> Problem:
    p, off_batches = PROBLEMS["zero_dim"], lambda fn: lambda w, h, b: fn(w, h)
    return dataclasses.replace(p, inner=off_batches(inner), outer=off_batches(outer), params=params, hparams=hparams, step_size=0.1)


def pulled(w: Tensor, h: Tree) -> Tensor:
    return (w - h["large"]).square().sum() / 2


def direct(influence: float) -> Problem:
    outer = lambda w, h: w.square().sum() + influence * BAD(h["small"])  # noqa: E731
    return of_leaves(pulled, outer, f64(0.0, 0.0), large=f64(10.0, 20.0), small=f64(0.3))


SMALL_AND_WRONG: dict[str, tuple[Problem, str]] = {
    "on the way": (
        of_leaves(
            lambda w, h: pulled(w, h) + 5e-5 * BAD(h["small"]) * w.sum(),
            lambda w, h: w.square().sum(),
            f64(0.0, 0.0),
            large=f64(100.0, 200.0),
            small=f64(0.3),
        ),
        "`hparams` at 'small'",
    ),
    "direct": (direct(1e-6), "`hparams` at 'small'"),
    "initial params": (
        of_leaves(
            lambda w, h: pulled(w["large"], h) + w["small"] ** 2,
            lambda w, h: w["large"].sum() ** 2 + 1e-6 * BAD(w["small"]),
            {"large": f64(0.0, 0.0), "small": f64(0.3)},
            large=f64(10.0, 20.0),
        ),
        "`params` at 'small'",
    ),
}


@pytest.mark.parametrize("name", SMALL_AND_WRONG)
def test_a_leaf_is_judged_by_its_own_part_of_the_gradient(name: str) -> None:
    """It is half too large, and below a millionth of the whole."""
    p, where = SMALL_AND_WRONG[name]
    result = checked(p, adjoints.Unrolled(), 5)
    assert (result.verdict, result.ok) == ("wrong", False), result
    assert where in result.headline, result
    (d,) = (d for d in result.directions if str(d) == where)
    assert d.estimate == pytest.approx(1.5 * d.promised.value, rel=0.05)
    assert abs(d.estimate) <= 1e-6 * max(abs(d.estimate) for d in result.directions)


@pytest.mark.parametrize(("influence", "verdict"), [(3e-9, "undecided"), (1e-18, "right")])
def test_a_leaf_that_rounding_hides_is_undecided_and_named(influence: float, verdict: str) -> None:
    """Whether it is hidden from the small steps alone, which then cannot confirm what large ones say, or from all."""
    result = checked(direct(influence), adjoints.Unrolled(), 5)
    assert result.verdict == verdict, result
    assert "Undecided along `hparams` at 'small'" in str(result)
    assert ("over larger steps" in result.headline) == (verdict == "undecided")


def test_sixteen_leaves_have_a_direction_of_their_own_those_without_a_gradient_first() -> None:
    def inner(w: Tensor, h: Tree, b: Any) -> Tensor:
        return sum(((w - (x if i % 7 else x.detach())) ** 2 for i, x in enumerate(h)), f64(0.0))

    h = [f64(0.1 * i + 0.1) for i in range(40)]
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=inner, outer=lambda w, h, b: w**2, hparams=h, step_size=0.01)
    first, second, other = (checked(p, adjoints.Unrolled(), num_directions=1, seed=seed) for seed in (0, 0, 1))
    leaves = [[int(d.path) for d in result.directions if d.path] for result in (first, second, other)]
    assert leaves[0] == leaves[1] != leaves[2]
    assert all(len(set(found)) == 16 and found == sorted(found) and set(found) >= set(range(0, 40, 7)) for found in leaves)
    assert first.verdict == "wrong"


def test_where_differences_cannot_tell_the_exact_unroll_has_to_agree() -> None:
    """An offset whose rounding in float32 leaves differences good to some percent: an error of one percent is within them."""
    p = PROBLEMS["logistic_exp_reg"]
    names = ("params", "hparams", "batches", "outer_batch")
    offset = dataclasses.replace(
        p, outer=lambda w, h, b: p.outer(w, h, b) + 10, **{name: tree.to(getattr(p, name), torch.float32) for name in names}
    )
    off = checked(offset, Scaled(adjoints.Unrolled(), 1.01), num_directions=4)
    assert (off.verdict, off.ok) == ("undecided", False), off
    assert off.relative_error < 3e-3, "the hparams' error is hidden by the params' part"
    assert "the exact unroll" in off.headline
    assert "float32" in str(off)
    for right in (adjoints.Unrolled(mode="graph"), adjoints.Forward()):
        assert checked(offset, right, num_directions=4).verdict == "right"


def test_a_method_may_be_right_where_the_exact_unroll_is_not() -> None:
    """All of the gradient is half too large in the objective's own backward pass, and the method takes that back."""
    inner = lambda w, h, b: (w - BAD(h)) ** 2  # noqa: E731
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=inner, outer=lambda w, h, b: w**2, params=f64(0.0), hparams=f64(0.7))
    result = checked(p, Scaled(adjoints.Unrolled(), 2 / 3))
    assert result.verdict == "right", result
    assert result.relative_error == pytest.approx(1 / 3, rel=0.01)
    assert float(result.headline.rsplit(" ", 1)[1].rstrip(".")) < 1e-6, result
    assert checked(p, adjoints.Unrolled()).verdict == "wrong"


@pytest.mark.parametrize("name", ["a stationary point", "signs"])
def test_a_derivative_that_is_zero_need_not_be_a_closure(name: str) -> None:
    """What central differences say: w_T - 3 is zero for h = 3, and steps that take signs do not see a small change."""
    start = f64(3.0, 3.0) if name == "a stationary point" else f64(0.0, 0.0)
    p = dataclasses.replace(
        PROBLEMS["zero_dim"], inner=lambda w, h, b: ((w - h) ** 2).sum(), outer=lambda w, h, b: ((w - 3) ** 2).sum(), params=start,
        hparams=f64(3.0, 3.0),
    )  # fmt: skip
    solver = metacal.descent(p.inner, optim.sgd(0.1) if name == "a stationary point" else optim.lion(0.1))
    result = checked(p, adjoints.Forward(), solver=solver)
    assert (result.verdict, result.ok) == ("no effect", False), result
    assert "does not change" not in str(result)
    assert "derivative zero here: at a stationary point of the outer value, or behind steps that take signs" in str(result)


def test_without_a_run_there_is_nothing_to_compare_with() -> None:
    p = PROBLEMS["one_element"]
    for bias in (None, 0.1):
        result = checked(p, adjoints.Implicit(linear.CG(1)), 1, solver=metacal.stationary(p.inner), bias=bias)
        assert (result.verdict, result.ok) == ("biased", bias is None), result
        assert math.isnan(result.relative_error)
        assert "nan" not in str(result)


def test_hparams_may_require_grad() -> None:
    p = PROBLEMS["multi_leaf"]
    params, hparams = tree.map(lambda x: x.clone().requires_grad_(), (p.params, p.hparams))
    learned = dataclasses.replace(p, params=params, hparams=hparams)
    for adjoint in (adjoints.Unrolled(), adjoints.SAMA(), adjoints.Implicit(linear.CG(2))):
        assert str(checked(learned, adjoint)) == str(checked(p, adjoint))


def test_params_may_be_large_beside_the_length_over_which_the_value_varies() -> None:
    """Then their own rounding is that of the value: 1e-10 of params of 1e6, whatever the value's size."""
    inner, outer = lambda w, h, b: ((w - h) ** 2).sum(), lambda w, h, b: w.sin().sum()
    far = dataclasses.replace(PROBLEMS["zero_dim"], inner=inner, outer=outer, params=f64(0.0, 0.0), hparams=f64(1e6, 1e6), step_size=0.1)
    assert checked(far, adjoints.Unrolled(), 50).verdict in ("right", "undecided")
    assert checked(far, Scaled(adjoints.Unrolled(), 1.01), 50).verdict == "wrong"
    for difference in (central_difference, close_difference):
        value, error = difference(lambda s: math.sin((1e6 + 1e-5 * s) - 1e6), F64, 1e6)
        assert abs(value - 1e-5) <= 3 * error


def test_a_nan_that_became_a_number_is_found() -> None:
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=lambda w, h, b: -(w**4) - w * h)
    solver = metacal.descent(p.inner, optim.sgd(5.0))
    honest, hidden = (checked(p, a, 12, solver=solver) for a in (adjoints.Unrolled(), ZerosForNaN(adjoints.Unrolled())))
    steps = metacal.run(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(12))
    assert not bool(torch.isfinite(steps.params))
    first = int(
        adjoints.Unrolled().vjp(solver, solver.init(p.params, p.hparams), p.hparams, p.steps(12))[1](p.params).stats["first_bad_step"]
    )
    for result in (honest, hidden):
        assert (result.verdict, result.ok) == ("not finite", False), result
        assert f"after step {first}" in str(result)
    assert "hides the trouble" not in str(honest)


def test_a_derivative_that_is_infinite_where_the_value_is_finite_is_found() -> None:
    p = dataclasses.replace(PROBLEMS["zero_dim"], outer=lambda w, h, b: (w * 0).sqrt() + h)
    result = checked(p, adjoints.Unrolled())
    assert (result.verdict, result.ok) == ("not finite", False), result
    assert "infinite derivative" in str(result)


@pytest.mark.parametrize("source", ["generator", "numpy"])
def test_noise_that_cannot_be_replayed_is_found(source: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.rand((), generator=generator, dtype=F64) if source == "generator" else f64(np.random.rand())  # noqa: NPY002

    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=lambda w, h, b: (w - h * draw()) ** 2)
    result = checked(p, adjoints.Unrolled())
    assert (result.verdict, result.ok) == ("not repeatable", False), result
    assert "default generators" in str(result)


def test_an_adjoint_with_a_generator_of_its_own_is_found() -> None:
    result = checked(PROBLEMS["zero_dim"], Drawing(adjoints.Unrolled()))
    assert (result.verdict, result.ok) == ("not repeatable", False), result
    assert "the runs are equal" in str(result)


def test_directions_and_noise_from_one_generator_are_not_judged() -> None:
    for adjoint in (adjoints.ForwardSketch(1), adjoints.ZerothOrder(1)):
        result = checked(noisy(), adjoint)
        assert (result.verdict, result.ok) == ("undecided", False), result
        assert "dropout" in str(result)


@pytest.mark.parametrize(
    "adjoint",
    [adjoints.Unrolled(), adjoints.Unrolled(window=2), adjoints.FirstOrder(), adjoints.Forward(), adjoints.Implicit(linear.CG(3))],
    ids=describe,
)
def test_a_closure_is_found(adjoint: Adjoint) -> None:
    """Also by a method that estimates the initial params, whose part is right and not zero."""
    p, copy = PROBLEMS["ridge_scalar"], PROBLEMS["ridge_scalar"].hparams
    result = checked(dataclasses.replace(p, inner=lambda w, h, b: p.inner(w, copy, b)), adjoint)
    assert (result.verdict, result.ok) == ("no effect", False), result
    assert "close over a copy" in str(result)


def test_a_leaf_that_nothing_uses_is_pointed_out() -> None:
    p = PROBLEMS["ridge_scalar"]
    unused = dataclasses.replace(p, hparams={**p.hparams, "unused": f64(1.0)})
    result = checked(unused, adjoints.Unrolled())
    assert result.verdict == "right"
    assert "`hparams` at 'unused' nothing changes" in str(result)


def test_nothing_to_check_says_so() -> None:
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=lambda w, h, b: w**2, outer=lambda w, h, b: w, hparams={})
    assert checked(p, adjoints.Unrolled(window=1)).verdict == "no effect"
    assert checked(p, adjoints.Unrolled()).verdict == "right"


def test_a_start_that_is_forgotten_agrees_to_rounding() -> None:
    """One step solves the inner problem: the derivative by the initial params is zero, and so is every error of it."""
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=lambda w, h, b: (w - h) ** 2, outer=lambda w, h, b: w**3)
    result = checked(p, adjoints.Unrolled(), solver=metacal.descent(p.inner, optim.sgd(0.5)))
    assert result.verdict == "right"
    assert all(d.estimate == 0 for d in result.directions if d.which == "params")
    found = result.headline.rsplit(" ", 1)[1].rstrip(".")
    assert float(found) < 1e-6, result


class Conjugating(Wrapped):
    def spoiled(self, found: Cotangents) -> Cotangents:
        return found._replace(hparams=found.hparams.conj().resolve_conj())


def test_complex_hparams_are_checked_in_both_of_their_parts() -> None:
    h = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)
    inner = lambda w, h, b: (w - h.abs() ** 2).square().sum() + (w * h.imag).sum()  # noqa: E731
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=inner, outer=lambda w, h, b: w.square().sum(), params=f64(0.1, 0.2), hparams=h)
    solver = metacal.descent(inner, optim.sgd(0.1))
    right = checked(p, adjoints.Unrolled(), solver=solver)
    assert right.verdict == "right", right
    assert right.relative_error < 1e-10
    wrong = checked(p, Conjugating(adjoints.Unrolled()), solver=solver)
    assert (wrong.verdict, wrong.ok) == ("wrong", False), wrong
    assert wrong.relative_error > 0.1


class Lying(linear.LinearSolver):
    """Half a solution, said to be whole."""

    def solve(self, matvec: Any, b: Tree, x0: Tree | None = None) -> linear.LinearSolution:
        found = linear.Dense().solve(matvec, b)
        return found._replace(value=tree.scale(0.5, found.value))


TROUBLE: dict[str, tuple[Adjoint, str]] = {
    "indefinite Hessian under CG": (adjoints.Implicit(linear.CG(8)), "not positive definite"),
    "series that diverges": (adjoints.Implicit(linear.Neumann(6, 300.0)), "diverges"),
    "solver that lies": (adjoints.Implicit(Lying()), "measured by one more product it is 0.5"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_a_linear_system_in_trouble_is_reported(name: str) -> None:
    adjoint, words = TROUBLE[name]
    p = PROBLEMS["mlp_reweighting"]
    result = checked(p, adjoint, num_directions=1)
    assert (result.verdict, result.ok) == ("unreliable", False), result
    assert words in str(result)


def test_a_singular_system_is_reported() -> None:
    p = dataclasses.replace(PROBLEMS["ridge_scalar"], inner=lambda w, h, b: (w["w"].sum() - h["lam"]) ** 2)
    for factorization in ("lu", "cholesky"):
        result = checked(p, adjoints.Implicit(linear.Dense(factorization)), num_directions=1)
        assert not result.ok, result
        assert "singular" in str(result)


def test_an_ill_conditioned_system_is_not_called_wrong() -> None:
    """Twenty steps on an indefinite matrix: rounding alone moves the iterates."""
    result = checked(PROBLEMS["mlp_reweighting"], adjoints.Implicit(linear.BiCGSTAB(15)), 6, num_directions=1)
    assert result.verdict in ("biased", "unreliable"), result


def test_bad_input_raises() -> None:
    p = PROBLEMS["zero_dim"]
    state = sgd(p).init(p.params, p.hparams)
    with pytest.raises(TypeError, match=r"`estimate` should be made by metacal.hypergradient"):
        check(lambda *args: None, state, p.hparams, p.steps(1), ())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_directions` should be at least 1"):
        checked(p, adjoints.Unrolled(), num_directions=0)
    with pytest.raises(TypeError, match="`batches` should be a sequence"):
        check(metacal.hypergradient(p.outer, sgd(p), adjoints.Unrolled()), state, p.hparams, (b for b in [()]), ())  # type: ignore[arg-type]


def test_a_method_is_described_as_one_would_write_it() -> None:
    assert describe(adjoints.Unrolled()) == "Unrolled()"
    adjoint = adjoints.Implicit(linear.Neumann(3, torch.tensor(0.5)), damping=0.1, select=linear.every)
    assert describe(adjoint) == "Implicit(Neumann(num_steps=3, step_size=0.5), damping=0.1, select=every)"


# compare, on L = mean (x w - h)^2 + |w|^2 with x = I_2: a step of 0.1 is w <- 0.7 w + 0.1 h, the solution h / 3.

STEPS = 3
KEPT = 0.7**STEPS  # w_T = KEPT w_0 + (1 - KEPT) h / 3


def by_hand(dtype: torch.dtype = F64) -> tuple[metacal.InnerSolver, Callable[..., Tensor], tuple[Any, ...]]:
    def inner(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return ((x @ w - h) ** 2).mean() + (w**2).sum()

    def outer(w: Tensor, h: Tensor, b: Any) -> Tensor:
        return (w**2).sum()

    solver = metacal.descent(inner, optim.sgd(0.1))
    w, h = torch.full((2, 1), 0.5, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    return solver, outer, (solver.init(w, h), h, [torch.eye(2, dtype=dtype)] * STEPS, None)


def table(methods: dict[str, Adjoint], dtype: torch.dtype = F64, **options: Any) -> metacal.diagnostics.Comparison:
    solver, outer, problem = by_hand(dtype)
    estimates = {name: metacal.hypergradient(outer, solver, adjoint) for name, adjoint in methods.items()}
    return compare(estimates, *problem, **{"repeats": 1, **options})


def test_errors_are_those_computed_by_hand() -> None:
    methods = {"unrolled": adjoints.Unrolled(), "implicit": adjoints.Implicit(linear.CG(2)), "first order": adjoints.FirstOrder()}
    unrolled, implicit, first = table(methods).rows
    assert unrolled.relative_error == pytest.approx(0, abs=1e-15)
    assert unrolled.params_relative_error == pytest.approx(0, abs=1e-15)
    # dw*/dh = 1/3 instead of dw_T/dh = (1 - KEPT) / 3
    assert implicit.relative_error == pytest.approx(1 / (1 - KEPT) - 1, rel=1e-12)
    assert implicit.cosine == pytest.approx(1, rel=1e-12)
    assert math.isnan(implicit.params_relative_error)
    assert implicit.products == implicit.stats["num_products"] == 1
    # No indirect term, and the identity instead of KEPT
    assert first.relative_error == pytest.approx(1, rel=1e-12)
    assert math.isnan(first.cosine)
    assert first.params_relative_error == pytest.approx(1 / KEPT - 1, rel=1e-12)
    assert math.isnan(first.products)


def test_work_is_counted_in_plain_training_steps() -> None:
    methods = {
        "first order": adjoints.FirstOrder(),
        "every state kept": adjoints.Unrolled(segment=1),
        "window": adjoints.Unrolled(window=1),
    }
    first, unrolled, window = (row.work for row in table(methods).rows)
    assert first == STEPS
    assert 2 * STEPS <= unrolled <= 4.05 * STEPS
    assert window - first == pytest.approx((unrolled - first) / STEPS)


def test_peak_bytes_grow_with_what_is_kept() -> None:
    solver, outer, (state, h, _, _) = by_hand()
    x = torch.eye(2, dtype=F64).repeat(500, 1)
    methods = {"graph": adjoints.Unrolled(mode="graph"), "first order": adjoints.FirstOrder()}
    estimates = {name: metacal.hypergradient(outer, solver, a) for name, a in methods.items()}
    graph, first = compare(estimates, state, h, [x] * 20, None, repeats=1).rows
    assert graph.peak_bytes > 20 * 8 * len(x) > first.peak_bytes > 8 * len(x)


def test_the_exact_one_may_be_given() -> None:
    solver, outer, _ = by_hand()
    exact = metacal.hypergradient(outer, solver, adjoints.Implicit(linear.Dense()))
    unrolled, implicit = table({"unrolled": adjoints.Unrolled(), "implicit": adjoints.Implicit(linear.CG(2))}, exact=exact).rows
    assert implicit.relative_error < 1e-12
    assert unrolled.relative_error == pytest.approx(KEPT, rel=1e-12)


def test_single_precision_is_compared_with_double() -> None:
    result = table({"unrolled": adjoints.Unrolled()}, torch.float32)
    assert result.exact.endswith("in float64")
    assert 0 < result.rows[0].relative_error < 1e-6
    # A problem that closes over float32 stays in it.
    _, outer, problem = by_hand(torch.float32)
    closed = metacal.descent(lambda w, h, b: ((torch.eye(2) @ w - h) ** 2).mean() + (w**2).sum(), optim.sgd(0.1))
    result = compare({"unrolled": metacal.hypergradient(outer, closed, adjoints.Unrolled())}, *problem, repeats=1)
    assert result.exact == "Unrolled() of the same run"
    assert result.rows[0].relative_error == 0


def test_a_method_that_raises_is_a_row_that_says_why() -> None:
    result = table(
        {"refused": adjoints.Forward(max_hparams=1), "too many": adjoints.Implicit(linear.Nystroem(9)), "fine": adjoints.Unrolled()}
    )
    _, too_many, fine = result.rows
    assert too_many.error.startswith("ValueError: `rank`")
    assert math.isnan(too_many.seconds)
    assert not fine.error
    assert fine.seconds > 0
    assert f"too many: {too_many.error}" in str(result)


def test_methods_take_turns_on_one_realisation_of_noise() -> None:
    p, order, drawn = noisy(), [], []
    solver = sgd(p)

    @dataclasses.dataclass(frozen=True)
    class Watched(Estimate):
        name: str = ""

        def __call__(self, state: Any, hparams: Tree, inner_batches: Any, outer_batch: Tree) -> metacal.HyperGradient:
            order.append(self.name)
            drawn.append(torch.get_rng_state())
            return Estimate.__call__(self, state, hparams, inner_batches, outer_batch)

    estimates = {name: Watched(p.outer, solver, adjoints.Unrolled(), name) for name in "AB"}
    before = torch.get_rng_state()
    result = compare(estimates, solver.init(p.params, p.hparams), p.hparams, p.steps(2), p.outer_batch, repeats=3)
    assert order[-6:] == list("ABABAB")
    assert all(torch.equal(state, before) for state in drawn)
    assert torch.equal(torch.get_rng_state(), before)
    for row in result.rows:
        assert row.relative_error == pytest.approx(0, abs=1e-15)
        assert row.fastest <= row.seconds <= row.slowest
        assert math.isnan(row.work), "no matrix product in it"


def test_the_table_prints_and_becomes_a_data_frame() -> None:
    result = table({"unrolled": adjoints.Unrolled(), "implicit": adjoints.Implicit(linear.CG(2))})
    header, first, second, note = str(result).splitlines()
    assert header.split()[:3] == ["method", "cosine", "error"]
    assert "products" in header
    assert first.startswith("unrolled")
    assert f"{1 / (1 - KEPT) - 1:.1e}" in second
    assert note == "Errors are relative to Unrolled() of the same run in float64."
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert list(frame["name"]) == ["unrolled", "implicit"]
    assert frame["stats.num_products"][1] == 1
    assert frame["relative_error"][1] == result.rows[1].relative_error


def test_without_pandas_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        table({"unrolled": adjoints.Unrolled()}).to_dataframe()


def test_the_picture_has_a_point_for_every_method(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    result = table(
        {"unrolled": adjoints.Unrolled(), "implicit": adjoints.Implicit(linear.CG(2)), "rank": adjoints.Implicit(linear.Nystroem(9))}
    )
    result.plot(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    spent, memory = axes = Figure().subplots(1, 2)
    result.plot(axes)
    drawn = [tuple(points.get_offsets()[0]) for points in spent.collections]
    assert drawn == [(row.work, max(row.relative_error, 1e-16)) for row in result.rows[:2]]
    assert [float(points.get_offsets()[0][0]) for points in memory.collections] == [row.peak_bytes for row in result.rows[:2]]
    with pytest.raises(ValueError, match="two axes"):
        result.plot([spent])


def test_compare_refuses_bad_input() -> None:
    solver, outer, problem = by_hand()
    with pytest.raises(ValueError, match="`estimates` should map names"):
        compare({}, *problem)
    with pytest.raises(ValueError, match="`repeats` should be at least 1"):
        compare({"a": metacal.hypergradient(outer, solver, adjoints.Unrolled())}, *problem, repeats=0)
    with pytest.raises(TypeError, match="Pass `exact`"):
        compare({"a": lambda *args: None}, *problem)  # type: ignore[dict-item, return-value]


# advise

MB = 1_000_000
SMALL = Sizes(num_steps=20, num_params=1000, num_hparams=10, params_bytes=4000, state_bytes=8000, activation_bytes=100_000)
LARGE = Sizes(num_steps=1000, num_params=10**8, num_hparams=10**6, params_bytes=400 * MB, state_bytes=1200 * MB, activation_bytes=4000 * MB)


def best(sizes: Sizes, **wanted: Any) -> str:
    return advise(sizes, **wanted).best.method.code


def test_clear_cases_have_clear_answers() -> None:
    assert best(SMALL) == 'Unrolled(mode="graph")'
    assert best(SMALL, memory=1 * MB) == "Unrolled(segment=1)"
    assert best(SMALL, memory=0.4 * MB) == "Unrolled()"
    assert best(SMALL, memory=0.32 * MB) == "Unrolled(offload=True)"
    assert best(SMALL._replace(num_hparams=1)) == "Forward()"
    # Solved, and long: the solution's derivative does not pay for the steps.
    assert best(SMALL._replace(num_steps=2000), converged=True) == "Implicit(linear.CG(n))"
    assert best(SMALL._replace(num_steps=2000)) == 'Unrolled(mode="graph")'
    # A fixed point's Jacobian is not symmetric.
    assert best(SMALL._replace(num_steps=2000), converged=True, symmetric=False) == "Implicit(linear.Neumann(K, a))"
    # Learned rates: nothing implicit, whatever the steps reach.
    assert best(SMALL._replace(num_steps=2000), converged=True, path=True) == 'Unrolled(mode="graph")'
    assert best(SMALL, initial_params=True, memory=0.32 * MB) == "Unrolled(offload=True)"
    assert best(SMALL, differentiable=False) == "ZerothOrder(k, radius)"
    # 10^8 params, 1000 steps, 16 GB: 2 sqrt(1000) states do not fit, a few copies do.
    assert best(LARGE, memory=16_000 * MB, converged=True) == "Implicit(linear.CG(n))"
    assert best(LARGE, memory=14_000 * MB, path=True) == "Unrolled(offload=True)"
    assert best(LARGE, loops=True, memory=16_000 * MB, converged=True) == "soba(a)"


def test_advice_gives_reasons_and_refusals() -> None:
    advice = advise(SMALL, initial_params=True)
    assert all(r.method.initial_params for r in advice.ranking)
    assert "does not estimate the derivative by the initial params" in advice.refused["Forward()"]
    assert str(advice).startswith('Take Unrolled(mode="graph"): exact')
    assert "Not Forward()" in str(advice)
    assert "more memory than the 1 MB at hand" in advise(SMALL, memory=1 * MB).refused['Unrolled(mode="graph")']
    kinds = [r.method.kind for r in advise(SMALL).ranking]
    order = ["exact", "solution", "unbiased", "biased"]
    assert kinds == sorted(kinds, key=order.index)
    assert str(advise(SMALL)) == str(advise(SMALL)), "deterministic"


def test_nothing_fits_is_said() -> None:
    assert advise(SMALL, initial_params=True, differentiable=False).best.method.code == "FirstOrder()"
    advice = advise(SMALL, initial_params=True, path=True, differentiable=False)
    assert not advice.ranking
    assert str(advice).startswith("Nothing fits.")
    with pytest.raises(ValueError, match="No method can serve"):
        _ = advice.best
    with pytest.raises(ValueError, match=r"`sizes.num_steps` should not be negative"):
        advise(SMALL._replace(num_steps=-1))
    with pytest.raises(ValueError, match=r"`sizes.number` should be at least 1"):
        advise(SMALL._replace(number=0))


def test_measured_sizes_are_those_of_the_problem() -> None:
    solver, _, (state, h, batches, _) = by_hand()
    x = torch.eye(2, dtype=F64).repeat(5000, 1)
    before = torch.get_rng_state()
    sizes = measure(solver, state, h, [x] * 7, number=4)
    assert sizes[:5] == (7, 2, 1, 16, 16)
    assert sizes.number == 4
    assert 8 * len(x) <= sizes.activation_bytes <= 8 * 8 * len(x)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="`inner_batches` should hold at least one batch"):
        measure(solver, state, h, batches[:0])


def test_every_adjoint_of_the_registry_is_ranked_or_refused() -> None:
    advice = advise(SMALL, loops=True)
    codes = {r.method.code for r in advice.ranking} | set(advice.refused)
    assert codes == {row.code for row in METHODS if row.family != "initialisation"}


@pytest.mark.parametrize("transposed", [False, True])
def test_work_of_grouped_convolutions(transposed: bool) -> None:
    """A gradient by images and weights is three times the convolution, groups or not; under vmap it is that of the loop."""
    convolve = F.conv_transpose2d if transposed else F.conv2d
    for groups in (1, 4):
        x, w = torch.ones(2, 8, 10, 10, requires_grad=True), torch.ones(8, 8 // groups, 3, 3, requires_grad=True)
        once = work(lambda x=x, w=w, groups=groups: convolve(x, w, groups=groups))
        assert work(lambda x=x, w=w, groups=groups: convolve(x, w, groups=groups).sum().backward()) == 3 * once
    gradient, x, w = torch.func.grad(lambda w, x: convolve(x, w).square().sum()), torch.ones(5, 2, 3, 8, 8), torch.ones(5, 3, 3, 3, 3)
    assert work(lambda: torch.func.vmap(gradient)(w, x)) == 5 * work(lambda: gradient(w[0], x[0]))


def test_the_profiler_does_not_talk() -> None:
    """Its C++ logs to stderr unless it is told not to; in a process of its own, for it asks once."""
    code = "import torch; from metacal.diagnostics import peak_bytes; print(peak_bytes(lambda: torch.ones(1000)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) >= 4000
    assert ran.stderr == ""


def test_noise_is_the_same_noise_only_in_one_precision() -> None:
    """Normal numbers are drawn by another rule in float64: the truth of a run with noise is that of the same run."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    solver = metacal.descent(lambda w, h, b: ((b + 0.5 * torch.randn_like(b)) @ (w - h)).square().mean(), optim.sgd(0.02))
    outer = lambda w, h, b: (w - 5).square().sum()  # noqa: E731
    exact = {mode: metacal.hypergradient(outer, solver, adjoints.Unrolled(mode)) for mode in ("mixed", "graph")}
    table = compare(exact, solver.init(torch.zeros(4), torch.ones(4)), 0.1 * torch.ones(4), [x] * 3, None, repeats=1)
    assert table.exact == "Unrolled() of the same run"
    assert all(row.relative_error < 1e-6 for row in table.rows)


def test_what_is_not_finite_is_said() -> None:
    w, h = torch.zeros(3), torch.ones(3)
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(30.0))
    diverged = {"diverged": metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoints.Unrolled())}
    table = compare(diverged, solver.init(w, h), h, [None] * 60, None, repeats=1)
    assert not table.rows[0].finite
    assert "diverged: not finite, as the params are from step" in str(table)


def test_the_precision_of_the_truth_is_that_of_all_solvers() -> None:
    w, h, c = torch.zeros(3), torch.ones(3), torch.eye(3)
    outer = lambda w, h, b: (w**2).sum()  # noqa: E731
    plain = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.1))
    closing = metacal.descent(lambda w, h, b: ((c @ (w - h)) ** 2).sum(), optim.sgd(0.1))  # over a float32 tensor
    pair = [(name, metacal.hypergradient(outer, solver, adjoints.Unrolled())) for name, solver in (("a", plain), ("b", closing))]
    for order in (pair, pair[::-1]):
        assert compare(dict(order), plain.init(w, h), h, [None] * 3, None, repeats=1).exact.endswith(", in float64 for some")


# check: kinks


@pytest.mark.parametrize("at", [1e-2, 1e-4, -3e-6, 2e-8])
def test_close_differences_see_past_kinks_and_jumps_on_either_side(at: float) -> None:
    for off in (abs, lambda s: math.copysign(1.0, s)):
        value, error = close_difference(lambda s: math.sin(3 * s) + off(s - at), F64)  # noqa: B023
        truth = 3 - math.copysign(1.0, at) * (off is abs)
        assert abs(value - truth) <= error <= 1e-4


def test_close_differences_say_that_they_cannot_tell() -> None:
    assert close_difference(lambda s: abs(s) + s, F64).error >= 1
    assert close_difference(lambda s: math.copysign(1.0, s) + s, F64).error >= 1
    assert math.isnan(close_difference(lambda s: math.nan, F64).value)
    single = close_difference(lambda s: float(torch.tensor(3 * s).sin() + 1), torch.float32)
    assert abs(single.value - 3) <= single.error <= 1e-2


def kinked(name: str, seed: int, dtype: torch.dtype = F64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64).to(dtype)  # noqa: E731
    x, y = draw(100, 10), draw(100)
    network: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "leaky_relu": F.leaky_relu, "relu, l1": torch.relu}
    params = {"a": draw(10, 32) / 3, "b": draw(32) / 6} if name in network else {"b": draw(10) / 2}
    penalty: Callable[[Tensor], Tensor] = {
        "huber": lambda r: F.huber_loss(r, torch.zeros_like(r), delta=0.5),
        "l1": lambda r: r.abs().mean(),
        "relu, l1": lambda r: r.abs().mean(),
    }.get(name, lambda r: r.square().mean())

    def loss(w: Tree, h: Tree, b: Any) -> Tensor:
        return penalty((network[name](b[0] @ w["a"]) if "a" in w else b[0]) @ w["b"] - b[1])

    def inner(w: Tree, h: Tree, b: Any) -> Tensor:
        return loss(w, h, b) + h["decay"].exp() * sum((p**2).sum() for p in w.values())

    hparams, judged = {"decay": torch.tensor(-4.0, dtype=dtype)}, (x.flip(0)[:50], y[:50])
    p = PROBLEMS["zero_dim"]
    return dataclasses.replace(
        p, inner=inner, outer=loss, params=params, hparams=hparams, batches=((x, y),), outer_batch=judged, step_size=0.05
    )


KINKED = ["relu", "leaky_relu", "relu, l1", "l1", "huber"]


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINKED)
def test_kinks_do_not_make_a_right_method_wrong_nor_hide_a_wrong_one(name: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        p = kinked(name, seed, dtype)
        right = checked(p, adjoints.Unrolled(), 5)
        assert right.verdict in ("right", "undecided"), right
        for factor in (1.3, 0.0, -1.0):
            wrong = checked(p, Scaled(adjoints.Unrolled(), factor), 5)
            assert (wrong.verdict, wrong.ok) == ("wrong", False), wrong
            assert "scaled by 1." not in str(wrong) or factor == 1.3


def test_the_closer_look_decides_and_says_that_it_did() -> None:
    result = checked(kinked("relu", 0), adjoints.Unrolled(), 5)
    assert (result.verdict, result.ok) == ("right", True), result
    assert "Kinks or jumps are close" in str(result)
    assert "tell along 6 of 6 directions" in str(result)
    for d in result.directions:
        assert abs(d.estimate - d.promised.value) <= 1e-6 * d.size + 3 * d.promised.error
        assert d.promised.error <= 1e-3 * d.size
    assert checked(kinked("relu", 0), Scaled(adjoints.Unrolled(), 1.01), 5).verdict == "wrong"
    assert checked(kinked("relu", 0), adjoints.Unrolled(window=2), 5).verdict == "biased"


def test_a_kink_at_the_point_itself_is_undecided() -> None:
    p = dataclasses.replace(PROBLEMS["zero_dim"], inner=lambda w, h, b: ((w - torch.relu(h)) ** 2).sum(), outer=lambda w, h, b: w.sum())
    p = dataclasses.replace(p, params=f64(1.0, 1.0, 1.0), hparams=f64(0.0, 0.0, 0.0))
    result = checked(p, adjoints.Unrolled(), solver=metacal.descent(p.inner, optim.sgd(0.1)))
    assert (result.verdict, result.ok) == ("undecided", False), result
    assert "Kinks or jumps are close" in str(result)


def test_kinks_in_a_problem_that_runs_in_float32_alone() -> None:
    for seed in range(4):
        p = kinked("relu", seed, torch.float32)
        closing = dataclasses.replace(p, inner=lambda w, h, b, p=p: p.inner(w, h, p.batches[0]))  # over float32 tensors
        assert checked(closing, adjoints.Unrolled(), 5).verdict in ("right", "undecided")
    c = torch.eye(10)
    smooth = dataclasses.replace(closing, inner=lambda w, h, b: h["decay"].exp() * ((c @ w["a"]).square().sum() + w["b"].square().sum()))
    assert checked(smooth, Scaled(adjoints.Unrolled(), -1.0), 5).verdict == "wrong"


def test_a_closer_look_is_taken_only_before_a_method_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    looking = lambda *args: looks.append(args) or close_difference(*args)  # noqa: E731
    monkeypatch.setattr(sys.modules["metacal.diagnostics.check"], "close_difference", looking)
    for adjoint in (adjoints.Unrolled(), adjoints.Unrolled(window=2), adjoints.Implicit(linear.CG(4))):
        checked(QUADRATIC, adjoint)
    assert not looks
    checked(QUADRATIC, Scaled(adjoints.Unrolled(), 1.3))
    assert looks
