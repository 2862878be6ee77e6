"""Single-loop and first-order algorithms: each against dense formulas written out here, closed forms and counted work.

The oracles are dense vectors and matrices from ``torch.autograd.functional``; they share no code with the package.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import metacal
from metacal import optim, single_loop, tree
from metacal.single_loop.f2sa import stencil
from problems import (
    F64,
    F_,
    H_,
    K_,
    PROBLEMS,
    REFERENCE,
    SOLVABLE,
    TRAIN_BINARY,
    VALID_BINARY,
    A,
    C,
    Problem,
    Tree,
    a,
    central_differences,
    close,
    derivative,
    f,
    f64,
    h_,
    leaf_grads,
    neumann_series,
    newton,
    ravel,
    relative_error,
    second_order,
    unravel,
)
from test_costs import flops, mlp

RATE = 0.3  # of v and of the series


@dataclass(frozen=True)
class Row:
    """An algorithm with settings, and what one step of it costs and reads."""

    name: str
    make: Callable[..., Any]
    settings: dict[str, Any]
    inner_batches: int
    gradients: int
    products: int
    outer_gradients: int
    indexed: bool = False
    draws: bool = False

    def build(self, outer: Any, solver: Any, optimizer: Any, **over: Any) -> metacal.BilevelOptimizer:
        return self.make(outer, solver, optimizer, **{**self.settings, **over})

    def feed(self, batches: Sequence[Tree], outer_batches: Sequence[Tree], t: int) -> tuple[list[Tree], Tree]:
        """What step t is given, in turn over the batches there are."""
        first = t * self.inner_batches
        inner = [((first + k) % len(batches), batches[(first + k) % len(batches)]) for k in range(self.inner_batches)]
        outer = (t % len(outer_batches), outer_batches[t % len(outer_batches)])
        return (inner, outer) if self.indexed else ([b for _, b in inner], outer[1])


ROWS = {
    row.name: row
    for row in (
        Row("soba", single_loop.soba, {"step_size": RATE}, 1, 1, 1, 1),
        Row("saba", single_loop.saba, {"step_size": RATE, "num_inner": 4, "num_outer": 2}, 1, 1, 1, 1, indexed=True),
        Row("amigo", single_loop.amigo, {"step_size": RATE, "num_linear_steps": 2}, 5, 2, 3, 1),
        Row("stocbio", single_loop.stocbio, {"step_size": RATE, "num_products": 3}, 6, 2, 4, 1),
        Row("fsla", single_loop.fsla, {"step_size": RATE, "outer_weight": 0.7}, 3, 1, 3, 2),
        Row("ttsa", single_loop.ttsa, {"step_size": RATE, "num_terms": 3}, 4, 1, -1, 1, draws=True),
        Row("mrbo", single_loop.mrbo, {"step_size": RATE, "num_products": 2, "inner_weight": 0.8, "outer_weight": 0.6}, 4, 2, 6, 2),
        Row("sustain", single_loop.sustain, {"step_size": RATE, "num_terms": 3, "inner_weight": 0.8}, 4, 2, -1, 2, draws=True),
        Row("f2sa", single_loop.f2sa, {"penalty": 5.0}, 3, 6, 0, 3),
        Row("f2sa-2", single_loop.f2sa, {"penalty": 5.0, "order": 2}, 3, 6, 0, 6),
        Row("bome", single_loop.bome, {"eta": 0.5}, 3, 4, 0, 1),
        Row("pbgd", single_loop.pbgd, {"penalty": 2.0}, 3, 4, 0, 1),
        Row("scalebio", single_loop.scalebio, {"penalty": 5.0}, 1, 2, 0, 1),
    )
}
every_algorithm = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


# A problem on minibatches, with a direct term: logistic regression with a penalty per coordinate.


def _bce(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    z = x @ w
    return (torch.logaddexp(z, torch.zeros_like(z)) - y * z).mean()


def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
    return _bce(p["w"], b) + 0.5 * (h["lam"].exp() * p["w"] ** 2).sum()


def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
    return _bce(p["w"], b) + 0.05 * ((h["lam"] + p["w"]) ** 2).sum()


def halves(data: tuple[Tensor, Tensor], n: int) -> list[Tree]:
    return list(zip(data[0].chunk(n), data[1].chunk(n), strict=True))


INNER, OUTER = halves(TRAIN_BINARY, 4), halves(VALID_BINARY, 2)
W0, H0 = f64(0.4, -0.7, 0.9), f64(-0.5, 0.2, -1.0)
START = ({"w": W0}, {"lam": H0})


def solver(lr: float = 0.2, momentum: float = 0.5) -> metacal.InnerSolver:
    return metacal.descent(inner, optim.sgd(lr, momentum=momentum))


def standard(row: Row, **over: Any) -> metacal.BilevelOptimizer:
    return row.build(outer, solver(), optim.sgd(0.3, momentum=0.4), **over)


def steps(row: Row, opt: metacal.BilevelOptimizer, state: Any, first: int, last: int) -> tuple[Any, Any]:
    hg = None
    for t in range(first, last):
        state, hg = opt.step(state, *row.feed(INNER, OUTER, t))
    return state, hg


# Law: a step is its formula. Two consecutive ones, written out with dense derivatives.


def g_w(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    return jacobian(lambda w: inner({"w": w}, {"lam": h}, b), w)


def g_h(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    return jacobian(lambda h: inner({"w": w}, {"lam": h}, b), h)


def H(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    return hessian(lambda w: inner({"w": w}, {"lam": h}, b), w)


def J(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    """g_hw, [hparams, params]."""
    return hessian(lambda w, h: inner({"w": w}, {"lam": h}, b), (w, h))[1][0]


def f_w(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    return jacobian(lambda w: outer({"w": w}, {"lam": h}, b), w)


def f_h(w: Tensor, h: Tensor, b: Tree) -> Tensor:
    return jacobian(lambda h: outer({"w": w}, {"lam": h}, b), h)


class Sgd:
    """Heavy-ball descent, as torch.optim has it."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum, self.buffer = lr, momentum, None

    def __call__(self, x: Tensor, direction: Tensor) -> Tensor:
        self.buffer = direction if self.buffer is None else self.momentum * self.buffer + direction
        return x - self.lr * self.buffer


class ByHand:
    """The variables of an algorithm, and its steps as the paper has them. ``p`` is the drawn truncation."""

    def __init__(self) -> None:
        self.w, self.h, self.v, self.t = W0, H0, torch.zeros(3, dtype=F64), 0
        self.u, self.old, self.d_w, self.d_h = W0, (W0, H0), torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
        self.move_w, self.move_h, self.move_u, self.move_both = Sgd(0.2, 0.5), Sgd(0.3, 0.4), Sgd(0.2, 0.5), Sgd(0.3, 0.4)
        self.rows: dict[str, Tensor] = {}

    def series(self, w: Tensor, h: Tensor, batches: Sequence[Tree], b: Tensor) -> Tensor:
        term, total = b, b
        for batch in batches:
            term = term - RATE * H(w, h, batch) @ term
            total = total + term
        return RATE * total

    def sampled(self, w: Tensor, h: Tensor, batches: Sequence[Tree], b: Tensor, num_terms: int) -> Tensor:
        for batch in batches:
            b = b - RATE * H(w, h, batch) @ b
        return num_terms * RATE * b

    def copy(self, batches: Sequence[Tree]) -> Tensor:
        """Plain steps from w with a fresh optimizer."""
        u, move = self.w, Sgd(0.2, 0.5)
        for batch in batches:
            u = move(u, g_w(u, self.h, batch))
        return u

    def both(self, d_w: Tensor, d_h: Tensor) -> Tensor:
        self.w, self.h = self.move_both(torch.cat([self.w, self.h]), torch.cat([d_w, d_h])).split(3)
        return d_h

    def soba(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        w, h, v = self.w, self.h, self.v
        direction = f_h(w, h, c) - J(w, h, b[0]) @ v
        self.v = v - RATE * (H(w, h, b[0]) @ v - f_w(w, h, c))
        self.w, self.h = self.move_w(w, g_w(w, h, b[0])), self.move_h(h, direction)
        return direction

    def saba(self, b: Sequence[tuple[int, Tree]], c: tuple[int, Tree], p: int) -> Tensor:
        w, h, v = self.w, self.h, self.v

        def saga(name: str, size: int, i: int, new: Tensor) -> Tensor:
            rows = self.rows.setdefault(name, torch.zeros(size, 3, dtype=F64))
            corrected = new - rows[i] + rows.mean(0)
            rows[i] = new
            return corrected

        (i, batch), (j, judge) = b[0], c
        gradient = saga("g", 4, i, g_w(w, h, batch))
        Hv, Jv = saga("H", 4, i, H(w, h, batch) @ v), saga("J", 4, i, J(w, h, batch) @ v)
        fw, fh = saga("fw", 2, j, f_w(w, h, judge)), saga("fh", 2, j, f_h(w, h, judge))
        self.v, self.w, self.h = v - RATE * (Hv - fw), self.move_w(w, gradient), self.move_h(h, fh - Jv)
        return fh - Jv

    def amigo(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        h = self.h
        for batch in b[:2]:
            self.w = self.move_w(self.w, g_w(self.w, h, batch))
        for batch in b[2:4]:
            self.v = self.v - RATE * (H(self.w, h, batch) @ self.v - f_w(self.w, h, c))
        direction = f_h(self.w, h, c) - J(self.w, h, b[4]) @ self.v
        self.h = self.move_h(h, direction)
        return direction

    def stocbio(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        h = self.h
        for batch in b[:2]:
            self.w = self.move_w(self.w, g_w(self.w, h, batch))
        direction = f_h(self.w, h, c) - J(self.w, h, b[5]) @ self.series(self.w, h, b[2:5], f_w(self.w, h, c))
        self.h = self.move_h(h, direction)
        return direction

    def fsla(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        w_old, v_old, h, h_old = self.w, self.v, self.h, self.old[1]
        self.w = self.move_w(self.w, g_w(self.w, h, b[0]))
        self.v = self.v - RATE * (H(self.w, h, b[1]) @ self.v - f_w(self.w, h, c))
        new = f_h(self.w, h, c) - J(self.w, h, b[2]) @ self.v
        old = f_h(w_old, h_old, c) - J(w_old, h_old, b[2]) @ v_old
        self.d_h = new if self.t == 0 else new + 0.3 * (self.d_h - old)
        self.old = (w_old, h)
        self.h = self.move_h(h, self.d_h)
        return self.d_h

    def ttsa(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        h = self.h
        self.w = self.move_w(self.w, g_w(self.w, h, b[0]))
        v = self.sampled(self.w, h, b[1 : 1 + p], f_w(self.w, h, c), 3)
        direction = f_h(self.w, h, c) - J(self.w, h, b[3]) @ v
        self.h = self.move_h(h, direction)
        return direction

    def momenta(self, b: Sequence[Tree], estimate: Callable[[Tensor, Tensor], Tensor], outer_weight: float) -> Tensor:
        w, h = self.w, self.h
        if self.t == 0:
            self.d_w, self.d_h = g_w(w, h, b[0]), estimate(w, h)
        else:
            self.d_w = g_w(w, h, b[0]) + 0.2 * (self.d_w - g_w(*self.old, b[0]))
            self.d_h = estimate(w, h) + (1 - outer_weight) * (self.d_h - estimate(*self.old))
        self.old = (w, h)
        self.w, self.h = self.move_w(w, self.d_w), self.move_h(h, self.d_h)
        return self.d_h

    def mrbo(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        return self.momenta(b, lambda w, h: f_h(w, h, c) - J(w, h, b[3]) @ self.series(w, h, b[1:3], f_w(w, h, c)), 0.6)

    def sustain(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        return self.momenta(b, lambda w, h: f_h(w, h, c) - J(w, h, b[3]) @ self.sampled(w, h, b[1 : 1 + p], f_w(w, h, c), 3), 0.5)

    def f2sa(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        h, lam = self.h, 5.0
        for batch in b[:2]:
            self.w = self.move_w(self.w, (f_w(self.w, h, c) + lam * g_w(self.w, h, batch)) / lam)
            self.u = self.move_u(self.u, g_w(self.u, h, batch))
        direction = f_h(self.w, h, c) + lam * (g_h(self.w, h, b[2]) - g_h(self.u, h, b[2]))
        self.h = self.move_h(h, direction)
        return direction

    def f2sa_2(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        h, nu = self.h, 0.2
        for batch in b[:2]:
            self.w = self.move_w(self.w, g_w(self.w, h, batch) + nu * f_w(self.w, h, c))
            self.u = self.move_u(self.u, g_w(self.u, h, batch) - nu * f_w(self.u, h, c))
        above = g_h(self.w, h, b[2]) + nu * f_h(self.w, h, c)
        below = g_h(self.u, h, b[2]) - nu * f_h(self.u, h, c)
        direction = (above - below) / (2 * nu)
        self.h = self.move_h(h, direction)
        return direction

    def bome(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        w, h, u = self.w, self.h, self.copy(b[:2])
        fg = torch.cat([f_w(w, h, c), f_h(w, h, c)])
        q = torch.cat([g_w(w, h, b[2]), g_h(w, h, b[2]) - g_h(u, h, b[2])])
        lam = max(float(0.5 * q @ q - fg @ q), 0.0) / float(q @ q)
        return self.both(*(fg + lam * q).split(3))

    def pbgd(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        w, h, u = self.w, self.h, self.copy(b[:2])
        return self.both(f_w(w, h, c) + 2 * g_w(w, h, b[2]), f_h(w, h, c) + 2 * (g_h(w, h, b[2]) - g_h(u, h, b[2])))

    def scalebio(self, b: Sequence[Tree], c: Tree, p: int) -> Tensor:
        w, u, h, alpha = self.w, self.u, self.h, 5.0
        direction = f_h(w, h, c) + alpha * (g_h(w, h, b[0]) - g_h(u, h, b[0]))
        self.w = self.move_w(w, (f_w(w, h, c) + alpha * g_w(w, h, b[0])) / alpha)
        self.u, self.h = self.move_u(u, g_w(u, h, b[0])), self.move_h(h, direction)
        return direction


@every_algorithm
def test_two_steps_are_the_formula(row: Row) -> None:
    opt, hand = standard(row), ByHand()
    state = opt.init(*START)
    for t in range(2):
        torch.manual_seed(t + 3)
        p = int(torch.randint(3, ()))
        torch.manual_seed(t + 3)
        state, hg = opt.step(state, *row.feed(INNER, OUTER, t))
        direction = getattr(hand, row.name.replace("-", "_"))(*row.feed(INNER, OUTER, t), p)
        hand.t += 1
        close(hg.hparams["lam"], direction, 1e-12)
        close(state.hparams["lam"], hand.h, 1e-12)
        close(state.inner.params["w"], hand.w, 1e-12)
        assert hg.params == ()
        assert int(state.step) == t + 1
        assert int(hg.stats["first_bad_step"]) == -1
    kept = {"soba": "", "amigo": "", "fsla": "v", "saba": "v"}
    if row.name in kept:
        v = tree.state_dict({"adjoint": state.adjoint})
        close(v["adjoint." + ".".join(filter(None, [kept[row.name], "w"]))], hand.v, 1e-12)


def test_bome_without_pull_or_without_gap_is_plain_descent_on_the_outer_objective() -> None:
    """lambda = 0 where f' already makes the gap fall, and where q' = 0."""
    row = ROWS["bome"]
    at_solution = newton(inner, START[0], START[1], TRAIN_BINARY)
    opt = standard(row)
    batches = [TRAIN_BINARY] * 3
    state = opt.init(at_solution, START[1])
    _, hg = opt.step(state, batches, OUTER[0])
    close(hg.hparams["lam"], f_h(at_solution["w"], H0, OUTER[0]), 1e-9)
    helpful = standard(row).step(opt.init(*START), batches, OUTER[0])[1].stats
    # The outer objective here is the inner one: its gradient is q' itself, up to the copy's part.
    same = row.build(lambda p, h, b: 3 * inner(p, h, TRAIN_BINARY), solver(), optim.sgd(0.1))
    _, hg = same.step(same.init(*START), batches, None)
    assert float(hg.stats["penalty"]) == 0.0
    close(hg.hparams["lam"], 3 * g_h(W0, H0, TRAIN_BINARY))
    assert float(helpful["penalty"]) > 0


def test_bome_makes_the_gap_fall_as_fast_as_asked() -> None:
    """<d, q'> = eta |q'|^2 where lambda > 0."""
    eta = 0.5
    opt = ROWS["bome"].build(outer, solver(), optim.sgd(1.0), eta=eta)
    state = opt.init(*START)
    after, hg = opt.step(state, [TRAIN_BINARY] * 3, VALID_BINARY)
    hand = ByHand()
    u = hand.copy([TRAIN_BINARY] * 2)
    q = torch.cat([g_w(W0, H0, TRAIN_BINARY), g_h(W0, H0, TRAIN_BINARY) - g_h(u, H0, TRAIN_BINARY)])
    d = torch.cat([W0 - after.inner.params["w"], H0 - after.hparams["lam"]])
    assert float(hg.stats["penalty"]) > 0
    close(d @ q, eta * q @ q, 1e-12)
    close(hg.stats["value_gap"], inner(*START, TRAIN_BINARY) - inner({"w": u}, START[1], TRAIN_BINARY), 1e-12)


# Law: at the exact variables, a step's hypergradient is the closed form, or exactly its known bias.


def still(problem: Problem) -> metacal.InnerSolver:
    return metacal.descent(problem.inner, optim.sgd(problem.step_size))


def dense(problem: Problem, inverse: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tree, Tree]:
    """``(inverse(g_ww, f_w), f_h - g_hw of it)`` at the solution, densely."""
    p, h = leaf_grads(problem.solution), leaf_grads(problem.hparams)
    value = problem.outer(p, h, problem.outer_batch)
    f_w, f_h = ravel(derivative(value, p, create_graph=True)).detach(), ravel(derivative(value, h)).detach()
    _, g_ww, g_wh = second_order(problem.inner, problem.solution, problem.hparams, problem.batches[0])
    v = inverse(g_ww, f_w)
    return unravel(problem.params, v), unravel(problem.hparams, f_h - g_wh.T @ v)


def at_solution(problem: Problem, opt: metacal.BilevelOptimizer, adjoint: Callable[[Any], Any]) -> Any:
    state = opt.init(problem.solution, problem.hparams)
    return state._replace(adjoint=adjoint(state.adjoint), step=torch.tensor(7))


@pytest.mark.parametrize("name", SOLVABLE)
@pytest.mark.parametrize("method", ["soba", "saba", "amigo", "fsla"])
def test_exact_at_the_solution(method: str, name: str) -> None:
    problem, row = PROBLEMS[name], ROWS[method]
    batch, judge, opt_h, rate = problem.batches[0], problem.outer_batch, optim.sgd(0.1), problem.step_size
    v, truth = dense(problem, lambda m, b: torch.linalg.solve(m, b))
    close(truth, problem.hypergradient)
    over = {"num_inner": 1, "num_outer": 1} if method == "saba" else {}
    opt = row.build(problem.outer, still(problem), opt_h, **{**over, "step_size": rate})
    if method == "fsla":
        state = at_solution(problem, opt, lambda m: {**m, "v": v, "direction": truth})
    else:
        state = at_solution(problem, opt, lambda m: {**m, "v": v} if method == "saba" else v)
    data = ([(0, batch)], (0, judge)) if row.indexed else ([batch] * row.inner_batches, judge)
    after, hg = opt.step(state, *data)
    close(hg.hparams, problem.hypergradient)
    close(hg.value, problem.outer(problem.solution, problem.hparams, judge))
    # Nothing moves but the hparams, and the statistics say that all is solved.
    close(after.inner.params, problem.solution, 1e-9)
    assert float(hg.stats["linear_residual"]) < 1e-10
    assert float(hg.stats["gradient_norm"]) < 1e-10
    assert 0 <= float(hg.stats["direct_share"]) <= 1


@pytest.mark.parametrize("name", SOLVABLE)
@pytest.mark.parametrize("method", ["stocbio", "mrbo"])
def test_at_the_solution_the_bias_is_that_of_the_series(method: str, name: str) -> None:
    problem, row, K = PROBLEMS[name], ROWS[method], 5
    rate = problem.step_size
    _, truth = dense(problem, neumann_series(K, rate))
    opt = row.build(problem.outer, still(problem), optim.sgd(0.1), step_size=rate, num_products=K)
    state = opt.init(problem.solution, problem.hparams)
    num_batches = K + 2
    for _ in range(1 if method == "stocbio" else 2):
        _, hg = opt.step(state, [problem.batches[0]] * num_batches, problem.outer_batch)
        close(hg.hparams, truth)
        if method == "mrbo":  # the second time through the recursion, old and new point alike
            state = state._replace(step=state.step + 1, adjoint={**state.adjoint, "direction": truth})


@pytest.mark.parametrize("method", ["ttsa", "sustain"])
def test_the_mean_over_the_truncations_is_the_series(method: str) -> None:
    """sum_p (1 / K) K a (I - aH)^p = a sum_{p < K} (I - aH)^p."""
    problem, row, K = PROBLEMS["multi_leaf"], ROWS[method], 4
    opt = row.build(problem.outer, still(problem), optim.sgd(0.1), step_size=0.5, num_terms=K)
    state = opt.init(problem.solution, problem.hparams)
    found: dict[int, Tree] = {}
    for seed in range(200):
        torch.manual_seed(seed)
        p = int(torch.randint(K, ()))
        if p in found:
            continue
        torch.manual_seed(seed)
        _, hg = opt.step(state, [problem.batches[0]] * (K + 1), problem.outer_batch)
        assert float(hg.stats["num_products"]) == (p + 1) * (2 if method == "sustain" else 1)
        found[p] = hg.hparams
    assert sorted(found) == list(range(K))
    close(sum(ravel(g) for g in found.values()) / K, ravel(dense(problem, neumann_series(K - 1, 0.5))[1]))


def test_saba_with_a_filled_table_has_no_noise_at_the_solution() -> None:
    """Every batch gives the gradient of the mean objective, whatever its own noise."""
    K, M = len(INNER), len(OUTER)
    mean_inner = lambda p, h, b: sum(inner(p, h, b) for b in INNER) / K  # noqa: E731
    mean_outer = lambda p, h, b: sum(outer(p, h, b) for b in OUTER) / M  # noqa: E731
    whole = Problem("mean", mean_inner, mean_outer, *START, (None,), None, 0.3, solution=newton(mean_inner, *START, None))
    v, truth = dense(whole, lambda m, b: torch.linalg.solve(m, b))
    row = ROWS["saba"]
    opt = row.build(outer, metacal.descent(inner, optim.sgd(0.0)), optim.sgd(0.0), step_size=1e-12)
    state = opt.init(whole.solution, START[1])
    state = state._replace(adjoint={**state.adjoint, "v": v})
    for t in range(K):
        state, noisy = opt.step(state, [(t, INNER[t])], (t % M, OUTER[t % M]))
    assert relative_error(noisy.hparams, truth) > 1e-3
    for i in (2, 0):
        state, hg = opt.step(state, [(i, INNER[i])], (1, OUTER[1]))
        close(hg.hparams, truth, 1e-9)
        assert float(hg.stats["gradient_norm"]) < 1e-10


# Finite differences of the value function


def copies(problem: Problem, nu: float, order: int) -> dict[int, Tree]:
    both = lambda j: lambda p, h, b: problem.inner(p, h, b) + j * nu * problem.outer(p, h, problem.outer_batch)  # noqa: E731
    return {j: newton(both(j), problem.solution, problem.hparams, problem.batches[0]) for j in stencil(order)}


def f2sa_at_solutions(problem: Problem, nu: float, order: int) -> Tree:
    opt = single_loop.f2sa(problem.outer, still(problem), optim.sgd(0.1), 1 / nu, order=order)
    solved = copies(problem, nu, order)
    state = opt.init(solved.pop(1), problem.hparams)
    others = {f"y{j}": state.inner._replace(params=w) for j, w in solved.items()}
    assert others.keys() == state.adjoint.keys()
    state, hg = opt.step(state._replace(adjoint=others), [problem.batches[0]] * 2, problem.outer_batch)
    return hg.hparams


@pytest.mark.parametrize(("order", "case"), [(1, "F2SA_forward_nu"), (2, "F2SA2_central_nu")])
def test_f2sa_reproduces_the_reference_values(order: int, case: str) -> None:
    for nu, value in REFERENCE["ridge_scalar"][case].items():
        close(f2sa_at_solutions(PROBLEMS["ridge_scalar"], float(nu), order), {"lam": f64(value)}, 1e-8)


@pytest.mark.parametrize("name", ["ridge_scalar", "logistic_exp_reg", "multi_leaf"])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_bias_of_f2sa_has_its_order(order: int, name: str) -> None:
    problem = PROBLEMS[name]
    nu = 0.02 if order < 4 else 0.1
    errors = [relative_error(f2sa_at_solutions(problem, step, order), problem.hypergradient) for step in (nu, nu / 2)]
    assert errors[0] > 1e-9
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["pbgd", "scalebio"])
def test_the_penalties_have_the_bias_of_f2sa(method: str) -> None:
    problem, nu = PROBLEMS["ridge_scalar"], 0.1
    y = copies(problem, nu, 1)
    opt = ROWS[method].build(problem.outer, metacal.descent(problem.inner, optim.sgd(1.0)), optim.sgd(0.1), penalty=1 / nu)
    state = opt.init(y[1], problem.hparams)
    if method == "scalebio":
        state = state._replace(adjoint=state.adjoint._replace(params=y[0]))
    _, hg = opt.step(state, [problem.batches[0]] * (71 if method == "pbgd" else 1), problem.outer_batch)
    close(hg.hparams, {"lam": f64(REFERENCE["ridge_scalar"]["F2SA_forward_nu"]["0.1"])}, 1e-8)
    gap = problem.inner(y[1], problem.hparams, problem.batches[0]) - problem.inner(y[0], problem.hparams, problem.batches[0])
    close(hg.stats["value_gap"], gap, 1e-8)


def test_a_growing_penalty_is_a_schedule_of_the_outer_step() -> None:
    opt = standard(ROWS["f2sa"], penalty=lambda t: 5.0 + 2 * t)
    state = opt.init(*START)
    for t in range(3):
        state, hg = opt.step(state, *ROWS["f2sa"].feed(INNER, OUTER, t))
        assert float(hg.stats["penalty"]) == 5.0 + 2 * t
    # ... or a tensor, which is the same number
    fixed, tensor = (standard(ROWS["f2sa"], penalty=x) for x in (7.0, f64(7.0)))
    close(*(steps(ROWS["f2sa"], o, o.init(*START), 0, 2)[0].hparams for o in (fixed, tensor)), 1e-14)


def test_stencils_differentiate_polynomials_of_their_order() -> None:
    for order in (1, 2, 4, 6):
        weights = stencil(order)
        assert list(weights)[-1] == 1
        for power in range(order + 1):
            assert sum(c * float(j) ** power for j, c in weights.items()) == pytest.approx(float(power == 1), abs=1e-12)
    for order in (0, 3, 2.0, True):
        with pytest.raises(ValueError, match="`order` should be"):
            stencil(order)  # type: ignore[arg-type]


# Law: the algorithms end where they should. Everything here is affine in x, so its root is one dense solve.


def root(field: Callable[[Tensor], Tensor]) -> Tensor:
    zero = torch.zeros(3, dtype=F64)
    return torch.linalg.solve(jacobian(field, zero), -field(zero))


def z_star(x: Tensor) -> Tensor:
    return -torch.linalg.solve(A, C.T @ x + a)


def implicit_field(inverse: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def field(x: Tensor) -> Tensor:
        z = z_star(x)
        return H_ @ x + K_ @ z + h_ - C @ inverse(A, F_ @ z + K_.T @ x + f)

    return field


def penalty_field(nu: float, order: int) -> Callable[[Tensor], Tensor]:
    def field(x: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=F64)
        for j, c in stencil(order).items():
            y = -torch.linalg.solve(A + j * nu * F_, C.T @ x + a + j * nu * (K_.T @ x + f))
            total = total + c * (C @ y / nu + j * (H_ @ x + K_ @ y + h_))
        return total

    return field


EXACT = implicit_field(lambda m, b: torch.linalg.solve(m, b))


@dataclass(frozen=True)
class Run:
    method: str
    settings: dict[str, Any]
    outer_rate: Any
    num_batches: int
    num_steps: int
    field: Callable[[Tensor], Tensor] = EXACT
    tolerance: float = 1e-4
    inner_rate: float = 0.45


RUNS = (
    Run("soba", {"step_size": 0.5}, 0.8, 1, 60),
    Run("saba", {"step_size": 0.5, "num_inner": 1, "num_outer": 1}, 0.8, 1, 60),
    Run("amigo", {"step_size": 0.5, "num_linear_steps": 2}, 0.8, 5, 35),
    Run("fsla", {"step_size": 0.5}, 0.7, 3, 45),
    Run("stocbio", {"step_size": 0.5, "num_products": 3}, 0.8, 9, 30, implicit_field(neumann_series(3, 0.5))),
    Run("ttsa", {"step_size": 0.5, "num_terms": 1}, 0.7, 2, 45, implicit_field(neumann_series(0, 0.5))),
    Run("mrbo", {"step_size": 0.5, "num_products": 1}, 0.7, 3, 45, implicit_field(neumann_series(1, 0.5)), 1e-3),
    Run("sustain", {"step_size": 0.5, "num_terms": 1}, 0.7, 2, 45, implicit_field(neumann_series(0, 0.5)), 1e-3),
    Run("f2sa", {"penalty": 100.0}, 0.8, 7, 40, penalty_field(0.01, 1)),
    Run("f2sa-2", {"penalty": 10.0}, 0.8, 7, 40, penalty_field(0.1, 2)),
    Run("pbgd", {"penalty": 2.0}, 0.4, 13, 70, penalty_field(0.5, 1), 1e-3, inner_rate=0.9),
    Run("scalebio", {"penalty": 5.0}, 0.18, 1, 150, penalty_field(0.2, 1), 1e-3),
    Run("bome", {}, lambda t: 1 / (1 + t) ** 0.75, 8, 150, tolerance=0.03, inner_rate=0.9),  # its rate is sublinear
)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.method)
def test_ends_at_the_stationary_point(run: Run) -> None:
    problem, row = PROBLEMS["quadratic_bilevel"], ROWS[run.method]
    inner_solver = metacal.descent(problem.inner, optim.sgd(run.inner_rate))
    opt = row.build(problem.outer, inner_solver, optim.sgd(run.outer_rate), **run.settings)
    state = opt.init(problem.params, problem.hparams)
    data = ([(0, ())], (0, ())) if row.indexed else ([()] * run.num_batches, ())
    for _ in range(run.num_steps):
        state, _ = opt.step(state, *data)
    target = root(run.field)
    assert relative_error(problem.hparams["x"], target) > 0.5, "starts far away"
    assert relative_error(state.hparams["x"], target) <= run.tolerance


def test_the_runs_cover_every_algorithm() -> None:
    assert sorted(run.method for run in RUNS) == sorted(ROWS)


# Law: on noisy batches the true value falls.


def noisy_problem() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tree], list[Tree], Tree, Tree]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator, dtype=F64)
    y = ((x @ f64(1.5, -1.0, 0.5, 0.0) + 0.8 * torch.randn(48, generator=generator, dtype=F64)) > 0).to(F64)
    train, valid = (x[:24], y[:24]), (x[24:], y[24:])

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return _bce(p["w"], b) + 0.5 * (h["lam"].exp() * p["w"] ** 2).sum()

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        return _bce(p["w"], b)

    return inner, outer, halves(train, 4), halves(valid, 2), train, valid


@every_algorithm
def test_the_true_value_falls_on_noisy_batches(row: Row) -> None:
    inner, outer, batches, judges, train, valid = noisy_problem()
    start = {"lam": f64(0.7, 0.7, 0.7, 0.7)}  # far too much regularisation

    def value(h: Tree) -> float:
        return float(outer(newton(inner, {"w": torch.zeros(4, dtype=F64)}, h, train, 6), h, valid))

    # Joint optimizers move the params at the same rate, which the penalty bounds.
    rate = {"bome": 0.6, "pbgd": 0.6, "scalebio": 1.0}.get(row.name, 2.0)
    opt = row.build(outer, metacal.descent(inner, optim.sgd(0.3)), optim.sgd(rate))
    state = opt.init({"w": torch.zeros(4, dtype=F64)}, start)
    for t in range(24):
        state, _ = opt.step(state, *row.feed(batches, judges, t))
    assert value(state.hparams) < value(start) - 0.01


# Law: vmap over problems is a loop over them.


@every_algorithm
def test_vmap_over_problems_is_a_loop(row: Row) -> None:
    opt = standard(row)
    ws, hs = torch.stack([W0, -W0, 0.5 * W0]), torch.stack([H0, H0 + 0.3, -H0])
    states = [opt.init({"w": w}, {"lam": h}) for w, h in zip(ws, hs, strict=True)]
    inner_batches, outer_batch = row.feed(INNER, OUTER, 0)
    if row.indexed:  # the index is a tensor of the batch
        inner_batches = [(torch.tensor([0, 2, 3]), tree.stack([INNER[i] for i in (0, 2, 3)]))]
        outer_batch = (torch.tensor([1, 0, 1]), tree.stack([OUTER[i] for i in (1, 0, 1)]))
        per_task = [tree.index((inner_batches, outer_batch), k) for k in range(3)]
    else:
        shifted = [[INNER[(i + k) % 4] for i in range(row.inner_batches)] for k in range(3)]
        per_task = [(bs, OUTER[k % 2]) for k, bs in enumerate(shifted)]
        inner_batches, outer_batch = tree.stack(shifted), tree.stack([o for _, o in per_task])
    single, stacked = states, tree.stack(states)
    for t in range(2):
        loop = []
        for k in range(3):
            torch.manual_seed(t)
            loop.append(opt.step(single[k], *per_task[k]))
        torch.manual_seed(t)
        stacked, hgs = torch.func.vmap(opt.step, randomness="same")(stacked, inner_batches, outer_batch)
        single = [s for s, _ in loop]
        close(tree.leaves(stacked), tree.leaves(tree.stack(single)), 1e-13)
        close(tree.leaves(hgs), tree.leaves(tree.stack([hg for _, hg in loop])), 1e-13)


# Law: a step is a pure, differentiable function; outside of transforms nothing is attached.


@every_algorithm
def test_the_derivative_of_a_step_is_that_of_central_differences(row: Row) -> None:
    opt = standard(row)
    before, _ = steps(row, opt, opt.init(*START), 0, 1)

    def judged(h: Tree) -> Tensor:
        torch.manual_seed(1)
        state, hg = opt.step(before._replace(hparams=h), *row.feed(INNER, OUTER, 1))
        return (hg.hparams["lam"] ** 2).sum() + (state.inner.params["w"] ** 2).sum() + (state.hparams["lam"] ** 3).sum()

    direction = {"lam": f64(1.0, -2.0, 0.5)}
    truth = central_differences(lambda s: judged(tree.axpy(s, direction, before.hparams)), f64(0.0))
    close(tree.vdot(torch.func.grad(judged)(before.hparams), direction), truth, 1e-8)
    close(torch.func.jvp(judged, (before.hparams,), (direction,))[1], truth, 1e-8)


@every_algorithm
def test_results_are_detached_and_the_input_is_left_alone(row: Row) -> None:
    opt = standard(row)
    params, hparams = leaf_grads(START[0]), leaf_grads(START[1])
    state = opt.init(params, hparams)
    kept = tree.clone(state)
    after, hg = opt.step(state, *row.feed(INNER, OUTER, 0))
    assert not any(leaf.requires_grad for leaf in tree.leaves((after, hg)))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(state), tree.leaves(kept), strict=True))


# Law: a state that was saved resumes bit by bit.


@every_algorithm
def test_a_saved_state_resumes_exactly(row: Row) -> None:
    opt = standard(row)
    torch.manual_seed(0)
    state, _ = steps(row, opt, opt.init(*START), 0, 2)
    file, noise = io.BytesIO(), torch.get_rng_state()
    torch.save(tree.state_dict(state), file)
    straight, hg = steps(row, opt, state, 2, 4)
    file.seek(0)
    again = standard(row)
    loaded = tree.load_state_dict(again.init(*tree.map(torch.zeros_like, START)), torch.load(file, weights_only=True))
    torch.set_rng_state(noise)
    resumed, hg_resumed = steps(row, again, loaded, 2, 4)
    pairs = zip(tree.leaves((straight, hg)), tree.leaves((resumed, hg_resumed)), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


# Law: the work is what the docstring says.


@every_algorithm
def test_work_is_as_documented(row: Row) -> None:
    """Calls of the objectives tell gradients and products together; their flops tell them apart."""
    apply, params, x = mlp()
    labels = torch.arange(8) % 4
    calls = {"inner": 0, "outer": 0}

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        calls["inner"] += 1
        return (h * F.cross_entropy(apply(p, b), labels, reduction="none")).mean()

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        calls["outer"] += 1
        return F.cross_entropy(apply(p, b), labels) + 0.1 * h.sum()

    def plain() -> None:
        p = {k: v.clone().requires_grad_() for k, v in params.items()}
        F.cross_entropy(apply(p, x), labels).backward()

    solver, h = metacal.descent(inner, optim.sgd(0.01)), torch.ones(8, dtype=F64)
    assert solver.descent is not None
    product = flops(lambda: solver.descent.products(params, h, x, (), params)) / flops(plain)
    assert 2 < product <= 3
    calls["inner"] = 0
    opt = row.build(outer, solver, optim.sgd(0.01))
    state = opt.init(params, h)
    data = ([(0, x)], (0, x)) if row.indexed else ([x] * row.inner_batches, x)
    torch.manual_seed(5)
    drawn = int(torch.randint(3, ()))
    torch.manual_seed(5)
    work = flops(lambda: opt.step(state, *data)) / flops(plain)
    products = row.products if not row.draws else (drawn + 1) * (row.gradients if row.name == "sustain" else 1)
    assert drawn > 0
    assert calls == {"inner": row.gradients + products, "outer": row.outer_gradients}
    assert work == pytest.approx(row.gradients + product * products + row.outer_gradients, rel=0.03)
    _, hg = opt.step(state, *data) if not row.draws else (None, None)
    assert hg is None or float(hg.stats["num_products"]) == products


# Law: where a batch is seen twice, so is its noise.


def noisy(p: Tree, h: Tree, b: Tree) -> Tensor:
    return 0.5 * (torch.rand(3, dtype=F64) * (p["w"] - h["lam"]) ** 2).sum()


NO_MOVE = (metacal.descent(noisy, optim.sgd(0.0)), optim.sgd(0.0))


@pytest.mark.parametrize("method", ["mrbo", "sustain"])
def test_momenta_see_one_realisation_at_both_points(method: str) -> None:
    """Where nothing moves, new - old is zero noise or not, and a momentum of weight ~0 stays what it was."""
    row = ROWS[method]
    opt = row.build(noisy, *NO_MOVE, inner_weight=1e-13, outer_weight=1e-13)
    first, hg = opt.step(opt.init(*START), [None] * row.inner_batches, None)
    second, again = opt.step(first, [None] * row.inner_batches, None)
    close(again.hparams, hg.hparams, 1e-12)
    close(second.adjoint["params_direction"], first.adjoint["params_direction"], 1e-12)


def test_the_momentum_of_fsla_sees_one_realisation_at_both_points() -> None:
    row = ROWS["fsla"]
    opt = row.build(noisy, *NO_MOVE, step_size=1e-14, outer_weight=1e-13)
    state = opt.init(*START)
    state = state._replace(adjoint={**state.adjoint, "v": {"w": f64(1.0, 2.0, 3.0)}})
    first, hg = opt.step(state, [None] * 3, None)
    _, again = opt.step(first, [None] * 3, None)
    close(again.hparams, hg.hparams, 1e-11)


@pytest.mark.parametrize("method", ["f2sa", "scalebio", "pbgd"])
def test_copies_see_one_realisation(method: str) -> None:
    """Equal copies cancel: what is left is the direct part."""
    row = ROWS[method]
    opt = row.build(outer, *NO_MOVE)
    _, hg = opt.step(opt.init(*START), [None] * row.inner_batches, OUTER[0])
    close(hg.hparams["lam"], f_h(W0, H0, OUTER[0]), 1e-12)


def test_copies_leave_the_generator_where_one_of_them_would() -> None:
    """No number that one copy drew is drawn again by the next step."""
    opt = single_loop.f2sa(noisy, *NO_MOVE, 5.0)
    torch.manual_seed(0)
    opt.step(opt.init(*START), [None] * 3, None)
    after = torch.rand(3, dtype=F64)
    torch.manual_seed(0)
    torch.rand(3 * 2 * 3, dtype=F64)  # three batches, g and f
    close(after, torch.rand(3, dtype=F64), 0)


def test_the_gradient_and_the_products_of_soba_see_one_realisation() -> None:
    """With v = w - h both are the same number."""
    opt = ROWS["soba"].build(lambda p, h, b: 0.5 * ((p["w"] - W0) ** 2).sum(), *NO_MOVE)
    state = opt.init(*START)
    _, hg = opt.step(state._replace(adjoint={"w": W0 - H0}), [None], None)
    close(hg.stats["linear_residual"], hg.stats["gradient_norm"], 1e-14)  # |H v - 0| and |g_w|


# Other inner and outer optimizers, carried state, micro-batches, logs


@every_algorithm
def test_any_optimizer_moves_either_level(row: Row) -> None:
    opt = row.build(outer, metacal.descent(inner, lambda h: optim.adam(0.05)), optim.adam(0.1))
    state, _ = steps(row, opt, opt.init(*START), 0, 2)
    assert bool(torch.isfinite(ravel(state.hparams)).all())
    assert not torch.equal(state.inner.params["w"], W0)
    assert not torch.equal(state.hparams["lam"], H0)


@every_algorithm
def test_micro_batches_are_the_whole_batch(row: Row) -> None:
    whole, pieces = (
        row.build(outer, metacal.descent(objective, optim.sgd(0.2)), optim.sgd(0.3))
        for objective in (inner, metacal.microbatched(inner, 2))
    )
    torch.manual_seed(0)
    one = steps(row, whole, whole.init(*START), 0, 2)
    torch.manual_seed(0)
    two = steps(row, pieces, pieces.init(*START), 0, 2)
    close(tree.leaves(one), tree.leaves(two), 1e-13)


@every_algorithm
def test_carried_state_and_logs(row: Row) -> None:
    """The carry counts the inner steps that the params took, and is never differentiated; logs of the outer objective arrive."""

    def counting(p: Tree, h: Tree, b: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        return inner(p, h, b), {"seen": carry["seen"] + 1}

    logged = metacal.with_aux(lambda p, h, b: (outer(p, h, b), {"norm": (p["w"] ** 2).sum()}))
    carried = metacal.descent(counting, optim.sgd(0.2), carry={"seen": f64(0.0)})
    opt = row.build(logged, carried, optim.sgd(0.3))
    state, hg = steps(row, opt, opt.init(*START), 0, 2)
    torch.manual_seed(0)
    per_step = {"amigo": 2, "stocbio": 2, "f2sa": 2, "f2sa-2": 2}.get(row.name, 1)
    assert float(state.inner.carry["seen"]) == 2 * per_step
    assert float(hg.aux["norm"]) > 0
    assert bool(torch.isfinite(hg.value))


@every_algorithm
def test_the_outer_objective_reads_the_carry(row: Row) -> None:
    """A carry that counts to one and an outer objective that multiplies by it: the steps of the objective without, bit by bit."""

    def ending_in_one(p: Tree, h: Tree, b: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        return inner(p, h, b), {"one": carry["one"] * 0 + 1}

    reading = metacal.with_carry(lambda p, h, b, carry: carry["one"] * outer(p, h, b))
    found = []
    for objective, carry in ((outer, None), (reading, {"one": f64(1.0)})):
        solver = metacal.descent(inner if carry is None else ending_in_one, optim.sgd(0.2), carry=carry)
        opt = row.build(objective, solver, optim.sgd(0.3))
        torch.manual_seed(0)
        state, hg = steps(row, opt, opt.init(*START), 0, 2)
        found.append((state.hparams, state.inner.params, hg.value, hg.hparams))
    close(tree.leaves(found[1]), tree.leaves(found[0]), 0.0)


def test_schedules_of_the_linear_rate_count_outer_steps() -> None:
    opt = standard(ROWS["soba"], step_size=lambda t: 0.3 * (t == 1))
    state, _ = steps(ROWS["soba"], opt, opt.init(*START), 0, 1)
    assert not state.adjoint["w"].any()
    state, _ = steps(ROWS["soba"], opt, state, 1, 2)
    assert state.adjoint["w"].all()


def test_empty_hparams_and_other_trees() -> None:
    """Nothing to learn: the inner variables still move. A 0-dim problem is covered by the closed forms."""
    for row in ROWS.values():
        opt = row.build(
            lambda p, h, b: (p["w"] ** 2).sum(), metacal.descent(lambda p, h, b: ((p["w"] - 1) ** 2).sum(), optim.sgd(0.1)), optim.sgd(0.1)
        )
        state, hg = opt.step(opt.init(START[0], {}), [(0, None)] if row.indexed else [None] * row.inner_batches, (0, None))
        assert hg.hparams == {}
        assert float(hg.stats["direct_share"]) == 0
        assert not torch.equal(state.inner.params["w"], W0)


# Trouble is reported, broken input raises


@every_algorithm
def test_a_nan_shows_in_the_statistics(row: Row) -> None:
    opt = standard(row)
    state = opt.init(*START)
    bad = (OUTER[0][0] * math.nan, OUTER[0][1])
    inner_batches, _ = row.feed(INNER, OUTER, 0)
    after, hg = opt.step(state, inner_batches, (0, bad) if row.indexed else bad)
    assert int(hg.stats["first_bad_step"]) >= 0
    assert bool(torch.isnan(hg.value))
    assert any(bool(torch.isnan(leaf).any()) for leaf in (after.inner.params["w"], *tree.leaves(after.adjoint), after.hparams["lam"]))


@pytest.mark.parametrize("method", ["amigo", "stocbio", "f2sa"])
def test_the_first_bad_inner_step_is_named(method: str) -> None:
    row = ROWS[method]
    batches, judge = row.feed(INNER, OUTER, 0)
    batches[1] = (batches[1][0] * math.nan, batches[1][1])
    opt = standard(row)
    _, hg = opt.step(opt.init(*START), batches, judge)
    assert int(hg.stats["first_bad_step"]) == 1


@every_algorithm
def test_a_solver_without_descent_is_refused(row: Row) -> None:
    with pytest.raises(ValueError, match=r"`solver` should have a `descent`.*fixed_point.*metacal\.descent"):
        row.build(outer, metacal.fixed_point(lambda w, h, b: w), optim.sgd(0.1))
    with pytest.raises(TypeError, match=r"`solver` should be an InnerSolver.*got SGD"):
        row.build(outer, torch.optim.SGD([torch.zeros(1)]), optim.sgd(0.1))
    with pytest.raises(TypeError, match="`optimizer` should be"):
        row.build(outer, solver(), torch.optim.SGD)


@every_algorithm
def test_decay_inside_the_inner_optimizer_is_refused(row: Row) -> None:
    opt = row.build(outer, metacal.descent(inner, optim.adamw(0.1)), optim.adamw(0.1))  # outside it is welcome
    with pytest.raises(ValueError, match=r"moves the params even where the gradient is zero.*Put the L2 term in the objective"):
        opt.init(*START)
    warm_up = row.build(outer, metacal.descent(inner, optim.adamw(lambda t: 0.1 * (t > 0))), optim.sgd(0.1))
    with pytest.raises(ValueError, match="moves the params even where the gradient is zero"):
        warm_up.init(*START)


@every_algorithm
def test_the_number_of_batches_is_checked(row: Row) -> None:
    opt = standard(row)
    state = opt.init(*START)
    batches, judge = row.feed(INNER, OUTER, 0)
    with pytest.raises(ValueError, match=r"`inner_batches` should hold .* in this order: .*Got 0\..*metacal\.repeat\(batch, \d+\)"):
        opt.step(state, [], judge)
    open_ended = row.name in ("amigo", "stocbio", "f2sa", "f2sa-2", "bome", "pbgd")
    if open_ended:
        opt.step(state, [*batches, batches[0]], judge)
    else:
        with pytest.raises(ValueError, match=rf"`inner_batches` should hold {row.inner_batches} batch.*Got {row.inner_batches + 1}"):
            opt.step(state, [*batches, batches[0]], judge)
    with pytest.raises(TypeError, match="`batches` should be a sequence"):
        opt.step(state, iter(batches), judge)
    with pytest.raises(TypeError, match=r"`state` should be a BilevelState.*init\(params, hparams\)"):
        opt.step(state.inner, batches, judge)


NUMBERS = {"step_size", "penalty", "eta", "inner_weight", "outer_weight"}


@every_algorithm
def test_numbers_out_of_range_are_refused(row: Row) -> None:
    for name in NUMBERS & {*row.settings, *({"inner_weight", "outer_weight"} if row.name in ("mrbo", "sustain") else ())}:
        for bad in (0.0, -0.1, math.nan):
            with pytest.raises(ValueError, match=f"`{name}` should be positive, got {bad}"):
                standard(row, **{name: bad})
        with pytest.raises(ValueError, match=f"`{name}` should be a 0-dim tensor"):
            standard(row, **{name: torch.ones(2)})
        if name.endswith("weight"):
            with pytest.raises(ValueError, match=f"`{name}` should be at most 1, got 1.5"):
                standard(row, **{name: 1.5})
    for name in {"num_products", "num_terms", "num_linear_steps", "num_inner", "num_outer"} & {*row.settings}:
        for wrong in (-1, 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}` should be an integer"):
                standard(row, **{name: wrong})


def test_indices_of_saba_are_checked() -> None:
    opt = standard(ROWS["saba"])
    state = opt.init(*START)
    with pytest.raises(TypeError, match=r"`inner_batches\[0\]` should be a pair \(index, batch\)"):
        opt.step(state, [None], (0, OUTER[0]))
    with pytest.raises(ValueError, match=r"`outer_batch` should have an index in 0 \.\.\. 1, got 2"):
        opt.step(state, [(0, INNER[0])], (2, OUTER[0]))
    with pytest.raises(TypeError, match=r"`inner_batches\[0\]` should start with an index.*shape \(2,\)"):
        opt.step(state, [(torch.tensor([0, 1]), INNER[0])], (0, OUTER[0]))
    with pytest.raises(TypeError, match=r"should start with an index.*got str"):
        opt.step(state, [("a", INNER[0])], (0, OUTER[0]))


@every_algorithm
def test_a_batch_that_requires_grad_is_refused(row: Row) -> None:
    opt = standard(row)
    batches, judge = row.feed(INNER, OUTER, 0)
    learned = (INNER[0][0].clone().requires_grad_(), INNER[0][1])
    with pytest.raises(ValueError, match=r"`batches`.*requires grad"):
        opt.step(opt.init(*START), [(0, learned) if row.indexed else learned] * row.inner_batches, judge)
    with pytest.raises(ValueError, match=r"`outer_batch`.*requires grad"):
        opt.step(opt.init(*START), batches, (0, learned) if row.indexed else learned)


@pytest.mark.parametrize("loop", ["mrbo", "sustain"])
def test_a_bad_inner_step_is_step_0_where_there_is_one(loop: str) -> None:
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum() * b, optim.sgd(0.1))
    number = {"num_products": 3} if loop == "mrbo" else {"num_terms": 4}
    make = getattr(single_loop, loop)
    w = torch.zeros(2, dtype=torch.float64)
    opt = make(lambda w, h, b: (w**2).sum(), solver, optim.sgd(0.1), 0.1, **number)
    one, bad = torch.ones((), dtype=torch.float64), torch.tensor(float("nan"), dtype=torch.float64)
    _, hg = opt.step(opt.init(w, w + 1), [bad, *[one] * 4], None)
    assert hg.stats["first_bad_step"] == 0


@pytest.mark.parametrize("loop", [single_loop.es, single_loop.pes])
def test_evolution_strategies_log_counts(loop: Any) -> None:
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.1))
    outer = metacal.with_aux(lambda w, h, b: (w.sum(), {"positive": (w > 0).sum()}))
    opt = loop(outer, solver, optim.sgd(0.1), 4, 0.1)
    _, hg = opt.step(opt.init(torch.zeros(2), torch.ones(2)), [None], None)
    assert hg.aux["positive"] == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_an_index_of_saba_is_of_any_integer_type(dtype: torch.dtype) -> None:
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.1))
    opt = single_loop.saba(lambda w, h, b: (w**2).sum(), solver, optim.sgd(0.1), 0.1, num_inner=2, num_outer=1)
    w = torch.zeros(2, dtype=torch.float64)
    one, other = (opt.step(opt.init(w, w + 1), [(i, None)], (0, None))[0] for i in (1, torch.tensor(1, dtype=dtype)))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(one), tree.leaves(other), strict=True))
