"""What would be another number without a word: refused by name, or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metacal
from metacal import adjoints, linear, optim
from metacal.adjoints import Implicit, Unrolled
from problems import F64, central_differences, close, f64

Estimate = Callable[[metacal.InnerSolver, Any, Any, Any], Any]
DOORS: dict[str, Estimate] = {
    "hypergradient": lambda solver, w, h, batches: metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, Unrolled())(
        solver.init(w, h), h, batches, None
    ),
    "solve": lambda solver, w, h, batches: metacal.solve(solver, w, h.clone().requires_grad_(), batches),
    "solve in one graph": lambda solver, w, h, batches: metacal.solve(solver, w, h.clone().requires_grad_(), batches, Unrolled("graph")),
    "torch.func": lambda solver, w, h, batches: torch.func.grad(lambda h: metacal.solve(solver, w, h, batches).sum())(h),
}


# An objective that changes what it is given


def clamping(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        w.clamp_(max=1.0)
    return ((w - h) ** 2).sum() / 2


def augmenting(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
    b += torch.randn_like(b)
    return ((w - h - b) ** 2).sum() / 2


def rescaling(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(0.5)
    return ((w - h) ** 2).sum() / 2


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("inner", "name", "remedy"), [
    (clamping, "params", "solver._replace"), (augmenting, "batch", r"x = x \+ noise"), (rescaling, "hparams", r"x = x \+ noise"),
])  # fmt: skip
def test_an_objective_that_changes_its_arguments_is_refused(inner: Any, name: str, remedy: str, door: str) -> None:
    solver = metacal.descent(inner, optim.sgd(0.5))
    with pytest.raises(ValueError, match=f"`objective` changed its `{name}`.* in place.*{remedy}"):
        DOORS[door](solver, torch.zeros(2), f64(2.0, 0.5).float(), [torch.ones(2)] * 3)


def test_a_dropout_in_place_on_the_batch_is_refused() -> None:
    net = metacal.functional(nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 1)))
    solver = metacal.descent(lambda w, h, b: h * net.apply(w, b["x"]).square().mean(), optim.sgd(0.1))
    h = torch.ones(())
    with pytest.raises(ValueError, match=r"`objective` changed its `batch` at 'x' in place.*inplace=True"):
        metacal.run(solver, solver.init(net.params, h), h, [{"x": torch.ones(4, 3)}])


# Modules in another mode when steps are taken again


@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled("reverse"), Unrolled(segment=1), Unrolled("graph")], ids=lambda a: f"{a.mode}")
@pytest.mark.parametrize("door", ["solve", "hypergradient"])
def test_steps_are_taken_again_in_the_mode_they_were_taken_in(door: str, adjoint: metacal.Adjoint) -> None:
    """The usual net.eval() between training and validation loss, before the backward pass."""
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)).double()
    f, x = metacal.functional(net, batch_norm="batch"), torch.randn(6, 3, dtype=F64)
    solver = metacal.descent(lambda w, h, b: (f.apply(w, b) - h).square().mean(), optim.sgd(0.2, momentum=0.9))

    def outer(w: Any, h: Tensor, b: Tensor) -> Tensor:
        net.eval()
        return f.apply(w, b).square().mean()

    def value(h: Tensor) -> Tensor:
        torch.manual_seed(0)
        net.train()
        return outer(metacal.solve(solver, f.params, h, [x] * 6, adjoint), h, x)

    h = f64(0.7).requires_grad_()
    truth = central_differences(value, h.detach())
    if door == "solve":
        found = torch.autograd.grad(value(h), h)[0]
    else:
        torch.manual_seed(0)
        net.train()
        found = metacal.hypergradient(outer, solver, adjoint)(solver.init(f.params, h), h.detach(), [x] * 6, x).hparams
    close(found, truth, 1e-8)
    assert not any(part.training for part in net.modules())  # as the outer objective left it


# Implicit differentiation of another equation


X, Y = torch.sin(1 + 3 * torch.arange(8, dtype=F64)[:, None] + torch.arange(3, dtype=F64)), torch.cos(torch.arange(8, dtype=F64))


def ridge(w: Tensor, h: Tensor, b: Any) -> Tensor:
    return 0.5 * ((X @ w - Y) ** 2).mean() + 0.5 * h * (w**2).sum()


def projected() -> metacal.InnerSolver:
    base = metacal.descent(ridge, optim.sgd(0.5))

    def step(state: metacal.InnerState, h: Any, b: Any) -> metacal.InnerState:
        after = base.step(state, h, b)
        return after._replace(params=after.params.clamp(min=0))

    return base._replace(step=step)


def after(solver: metacal.InnerSolver, adjoint: metacal.Adjoint, num_steps: int = 400) -> Tensor:
    w, h = torch.full((3,), 0.1, dtype=F64), f64(0.3)
    estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoint)
    found: Tensor = estimate(solver.init(w, h), h, [None] * num_steps, None).hparams
    return found


@pytest.mark.parametrize("operator", [linear.Hessian(), linear.Jacobian()], ids=["Hessian", "Jacobian"])
def test_a_projected_step_has_the_equation_of_its_own(operator: linear.Operator) -> None:
    """The gradient is not zero where a constraint holds: without the equation it is refused, with one it is the unroll's limit."""
    solver, implicit = projected(), Implicit(linear.GMRES(3), operator=operator)
    truth = after(solver, Unrolled())
    with pytest.raises(ValueError, match=r"`solver` has another step than its objective's.*metacal\.fixed_point"):
        after(solver, implicit)
    own = solver._replace(residual=lambda w, h, b: w - solver.step(solver.init(w, h), h, b).params)
    close(after(own, implicit), truth, 1e-10)
    assert abs(float(after(metacal.descent(ridge, optim.sgd(0.5)), implicit) - truth)) > 1e-3  # what it would have been


STEPWISE = [Unrolled(), Unrolled(window=1), adjoints.Forward(), adjoints.ForwardSketch(2), adjoints.ZerothOrder(2)]


@pytest.mark.parametrize("adjoint", STEPWISE, ids=lambda adjoint: type(adjoint).__name__)
def test_where_there_are_no_steps_none_are_derived(adjoint: metacal.Adjoint) -> None:
    solver, h = metacal.stationary(ridge), f64(0.3)
    with pytest.raises(ValueError, match=r"metacal.stationary.*would be zero.*Implicit"):
        metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)
    with pytest.raises(ValueError, match=r"metacal.stationary.*would be zero.*Implicit"):
        metacal.solve(solver, torch.zeros(3, dtype=F64), h, [None], adjoint)


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_a_learned_decay_is_refused_where_it_starts(decay: float) -> None:
    solver = metacal.descent(lambda w, h, b: ((w - h["t"]) ** 2).sum() / 2, lambda h: optim.sgd(0.5, weight_decay=h["decay"]))
    h = {"t": f64(1.0, 2.0), "decay": f64(decay)}
    with pytest.raises(ValueError, match="weight decay inside the optimizer"):
        metacal.hypergradient(lambda w, h, b: w.sum(), solver, Implicit(linear.CG(2)))(solver.init(h["t"], h), h, [None] * 9, None)


# What is learned and does not come through the hparams


@pytest.mark.parametrize("door", ["hypergradient", "solve"])
def test_a_setting_that_requires_grad_is_refused(door: str) -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    for optimizer in (optim.sgd(rate), lambda h: optim.sgd(0.1, momentum=rate), optim.adam(0.1, betas=(rate, 0.9))):
        solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optimizer)
        with pytest.raises(ValueError, match=r"`optimizer` was given a tensor that requires grad.*hparams\['lr'\]"):
            DOORS[door](solver, torch.zeros(2), torch.ones(2), [None] * 3)
    with pytest.raises(ValueError, match="`strength` requires grad"):
        metacal.proximal(lambda w, h, b: w.sum(), optim.sgd(0.1), rate, anchor=lambda h: h)


@pytest.mark.parametrize("adjoint", [Unrolled(), Implicit(linear.CG(2))], ids=["unrolled", "implicit"])
def test_the_strength_of_a_proximal_problem_is_learned_through_the_hparams(adjoint: metacal.Adjoint) -> None:
    """min (w - 1)^2 + s/2 (w - a)^2 is at (2 + s a) / (2 + s): d/ds = (2 a - 2) / (2 + s)^2."""
    solver = metacal.proximal(lambda w, h, b: ((w - 1) ** 2).sum(), optim.sgd(0.2), lambda h: h["s"], anchor=lambda h: h["a"])
    h = {"s": f64(0.5), "a": f64(0.0, 3.0)}
    found = metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)(solver.init(h["a"], h), h, [None] * 100, None).hparams
    close(found["s"], ((2 * h["a"] - 2) / (2 + h["s"]) ** 2).sum(), 1e-10)


# A number over a 0-dim float32 tensor, whose tangent torch makes float64


IN_FLOAT32 = [adjoints.Forward(), adjoints.ForwardSketch(1), Unrolled(), Implicit(linear.CG(1))]


@pytest.mark.parametrize("adjoint", IN_FLOAT32, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("optimizer", [optim.sgd(0.05), optim.adam(0.05)], ids=["sgd", "adam"])
def test_zero_dimensional_params_in_float32(optimizer: Any, adjoint: metacal.Adjoint) -> None:
    def estimate(dtype: torch.dtype, adjoint: metacal.Adjoint) -> Tensor:
        solver = metacal.descent(lambda w, h, b: (1.0 / w - h) ** 2 + 0.1 * w**2, optimizer)
        w, h = torch.tensor(2.0, dtype=dtype), torch.tensor(0.7, dtype=dtype)
        found: Tensor = metacal.hypergradient(lambda w, h, b: 1 / w, solver, adjoint)(solver.init(w, h), h, [None] * 5, None).hparams
        return found

    found = estimate(torch.float32, adjoint)
    assert found.dtype == torch.float32
    close(found, estimate(F64, Unrolled() if isinstance(adjoint, adjoints.ForwardSketch) else adjoint), 1e-4)


def test_a_number_times_a_sum_in_float32() -> None:
    """The float64 tangent of what has no dimensions reaches what has some."""

    def estimate(dtype: torch.dtype) -> Tensor:
        solver = metacal.fixed_point(lambda w, h, b: w - 0.1 * torch.func.grad(lambda w: (0.1 * w.sum()) ** 2 + ((w - h) ** 2).sum())(w))
        w, h = torch.ones(3, dtype=dtype), torch.tensor(0.7, dtype=dtype)
        found: Tensor = metacal.hypergradient(lambda w, h, b: w.square().sum(), solver, adjoints.Forward())(
            solver.init(w, h), h, [None] * 5, None
        ).hparams
        return found

    close(estimate(torch.float32), estimate(F64), 1e-5)


def test_a_hessian_of_a_solve_in_float32() -> None:
    solver = metacal.descent(lambda w, h, b: (1.0 / w - h) ** 2, optim.adam(0.05))

    def value(h: Tensor) -> Tensor:
        return F.softplus(metacal.solve(solver, torch.tensor(2.0, dtype=h.dtype), h, [None] * 4))

    close(torch.func.hessian(value)(torch.tensor(0.7)), torch.func.hessian(value)(f64(0.7)), 1e-3)


# Messages for what torch would say in its own words


def test_messages() -> None:
    solver, w, h = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.1)), torch.zeros(2), torch.ones(2)
    with pytest.raises(TypeError, match=r"got the module Linear.*dict\(module.named_parameters\(\)\)"):
        metacal.solve(solver, w, nn.Linear(2, 1), [None])
    with pytest.raises(TypeError, match=r"`batches` .*looks like one batch.*\[batch\]"):
        metacal.solve(solver, w, h, (torch.zeros(4, 2), torch.zeros(4)))
    with pytest.raises(RuntimeError, match=r"`fn` .*Use torch.func.grad in it, and not torch.autograd.grad"):
        differentiated(metacal.fixed_point(descending))
    with pytest.raises(RuntimeError, match=r"no second derivative.*_embedding_bag_backward.*FiniteDifference"):
        differentiated(metacal.descent(bag, optim.sgd(0.1)))


def descending(w: Tensor, h: Tensor, b: Any) -> Tensor:
    return w - 0.1 * torch.autograd.grad(((w - h) ** 2).sum(), w, create_graph=True)[0]


def bag(w: Tensor, h: Tensor, b: Any) -> Tensor:
    return h.mean() * F.embedding_bag(torch.tensor([[0, 1], [1, 0]]), w).square().sum()


def differentiated(solver: metacal.InnerSolver) -> None:
    metacal.solve(solver, torch.ones(2, 2), torch.ones(2, 2).requires_grad_(), [None] * 2).sum().backward()
