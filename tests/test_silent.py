"""What would be another number without a word: refused by name, or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metacal
from metacal import adjoints, linear, optim, tree
from metacal.adjoints import Implicit, Unrolled
from problems import F64, central_differences, close, f64, relative_error

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


# What a torch.func level differentiates by, and a solver closes over


def closing_over(what: str, x: Tensor, adjoint: Any) -> Callable[[Tensor], Tensor]:
    """A function of x whose derivative is not zero, and which reaches the solver past its arguments."""
    w, h, batches = f64(0.0, 0.0), f64(1.0, 2.0), [None] * 5

    def solver(x: Tensor) -> metacal.InnerSolver:
        loss = lambda w, h, b: ((w - h * (x if what == "objective" else 1)) ** 2).sum()  # noqa: E731
        if what == "map":
            return metacal.fixed_point(lambda w, h, b: w - 0.1 * (w - h * x))
        return metacal.descent(loss, optim.sgd(x if what == "rate" else 0.25))

    def of_solve(x: Tensor) -> Tensor:
        return (metacal.solve(solver(x), w, h, batches, adjoint) ** 2).sum()

    def of_estimate(x: Tensor) -> Tensor:
        s = solver(x)
        estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum(), s, adjoint)
        return estimate(s.init(w, h), h, batches, None).value

    return of_estimate if isinstance(adjoint, Implicit) and what != "rate" else of_solve


@pytest.mark.parametrize("what", ["objective", "rate", "map"])
@pytest.mark.parametrize("adjoint", [Unrolled(), adjoints.Forward(), Implicit(linear.Dense())], ids=["unrolled", "forward", "implicit"])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(x.expand(2)),
        lambda f, x: torch.func.grad(lambda x: torch.func.vmap(lambda s: f(s * x))(torch.ones(2, dtype=F64)).sum())(x),
    ],
    ids=["grad", "jvp", "jacrev", "vmap of grad", "grad of vmap"],
)
def test_a_derivative_that_a_closure_would_lose_is_refused(what: str, adjoint: Any, derivative: Any) -> None:
    x = f64(0.2).reshape(())
    with pytest.raises(ValueError, match=r"closes over a tensor that a torch\.func transform differentiates by"):
        derivative(closing_over(what, x, adjoint), x)

    f = closing_over(what, x, adjoint)
    assert torch.func.grad(lambda x: f(x.detach()) + x)(x) == 1  # a constant, and says so


@pytest.mark.parametrize("what", ["hparams", "params"])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled("reverse"), Implicit(linear.CG(2))], ids=["mixed", "reverse", "implicit"])
def test_a_closure_over_what_the_arguments_come_from_is_refused(what: str, leaf: bool, adjoint: Any) -> None:
    origin = f64(1.0, 2.0).requires_grad_()
    given = origin if leaf else 2 * origin
    other, features = f64(0.5, -1.0), given**2
    w, h = (given, other) if what == "params" else (other, given)
    of = lambda features: metacal.descent(lambda w, h, b: ((w - h * features) ** 2).sum(), optim.sgd(0.1))  # noqa: E731
    with pytest.raises(ValueError, match=r"computed from the same one as its params or hparams.*detach it"):
        metacal.solve(of(features), w, h, [None] * 3, adjoint)
    solver = of(features)
    with pytest.raises(ValueError, match="a part of itself"):
        metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)(solver.init(w, h), h, [None] * 3, None)

    teacher = f64(3.0, 3.0).requires_grad_()  # as the parameters of a network that nobody froze
    for fixed in (features.detach(), teacher):
        w, h = (x.detach().requires_grad_() for x in (w, h))
        metacal.solve(of(fixed), w, h, [None] * 3, adjoint).sum().backward()
    assert teacher.grad is None


def test_one_graph_sees_through_closures() -> None:
    h = f64(1.0, 2.0).requires_grad_()

    def trained(h: Tensor) -> Tensor:
        features = h**2
        solver = metacal.descent(lambda w, h, b: ((w - h * features) ** 2).sum(), optim.sgd(0.1))
        return (metacal.solve(solver, f64(0.0, 0.0), h, [None] * 3, Unrolled("graph")) ** 2).sum()

    (g,) = torch.autograd.grad(trained(h), h)
    close(g, 6 * (1 - 0.8**3) ** 2 * h.detach() ** 5, 1e-12)  # w = (1 - 0.8^3) h^3


# The damping of a linear system


DAMPED = (
    linear.Dense(), linear.Neumann(80, 0.3), linear.CG(2), linear.MINRES(2), linear.GMRES(2), linear.BiCGSTAB(2), linear.NormalCG(2),
    linear.Lanczos(2),
)  # fmt: skip


@pytest.mark.parametrize("solver", DAMPED, ids=lambda solver: type(solver).__name__)
def test_the_derivative_by_the_damping(solver: Any) -> None:
    """sum h 2 / (2 + d): an outer gradient of h, a Hessian of 2."""
    h, d = f64(1.0, 2.0), f64(0.5).reshape(())
    inner = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.25))

    def hyper(d: Tensor) -> Tensor:
        estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum() / 2, inner, Implicit(solver, damping=d))
        return estimate(inner.init(torch.zeros_like(h), h), h, [None] * 60, None).hparams.sum()

    truth = -2 * h.sum() / (2 + d) ** 2
    assert relative_error(torch.func.grad(hyper)(d), truth) < 1e-9
    assert relative_error(torch.func.jvp(hyper, (d,), (torch.ones_like(d),))[1], truth) < 1e-9
    d.requires_grad_()
    leaf = h.clone().requires_grad_()
    w = metacal.solve(inner, torch.zeros_like(h), leaf, [None] * 60, Implicit(solver, damping=d))
    (g,) = torch.autograd.grad((w**2).sum() / 2, leaf, create_graph=True)
    assert relative_error(torch.autograd.grad(g.sum(), d)[0], truth) < 1e-9


# A solve inside of an inner objective, beneath a level of torch.func that has ended


@pytest.mark.parametrize(
    ("below", "steps", "c"), [(Unrolled(), 3, 1 - 0.4**3), (Implicit(linear.CG(2)), 40, 1.0)], ids=["steps", "solution"]
)
def test_a_solve_below_whatever_pulls_back_by_torch_func(below: Any, steps: int, c: float) -> None:
    """The solve below ends at v = c w h, so that the middle's minimiser is that of 2 (c w h - h)^2 + w^2."""
    low = metacal.descent(lambda v, q, b: ((v - q["w"] * q["h"]) ** 2).sum(), optim.sgd(0.3))

    def middle(w: Tensor, h: Tensor, b: None) -> Tensor:
        lower = metacal.solve(low, torch.zeros(2, dtype=F64), {"w": w, "h": h}, [None] * steps, below)
        return ((lower - h) ** 2).sum() + w**2

    plain = metacal.descent(middle, optim.sgd(0.35))
    iterated = metacal.fixed_point(lambda w, h, b: w - 0.35 * torch.func.grad(middle)(w, h, b))

    def hyper(solver: metacal.InnerSolver, adjoint: Any) -> Callable[[Tensor], Tensor]:
        estimate = metacal.hypergradient(lambda w, h, b: w**3 + h**2, solver, adjoint)
        return lambda h: estimate(solver.init(f64(0.3).reshape(()), h), h, [None] * 30, None).hparams

    h = f64(0.5).reshape(())
    w = lambda h: 2 * c * h**2 / (2 * c**2 * h**2 + 1)  # noqa: E731
    truth = torch.func.grad(lambda h: w(h) ** 3 + h**2)(h)
    GMRES, reverse = linear.GMRES(3), Unrolled(mode="reverse")
    for solver, adjoint in [(plain, Implicit(GMRES)), (iterated, Implicit(GMRES)), (plain, Implicit(GMRES, operator=linear.Jacobian()))]:
        assert relative_error(hyper(solver, adjoint)(h), truth) < 1e-7
    for adjoint in (reverse, Implicit(GMRES)):
        assert relative_error(torch.func.vmap(hyper(plain, adjoint))(h.expand(2)), truth.expand(2)) < 1e-7
        second = torch.func.grad(hyper(plain, adjoint))(h)
        eps = 1e-4
        difference = (hyper(plain, adjoint)(h + eps) - hyper(plain, adjoint)(h - eps)) / (2 * eps)
        assert relative_error(second, difference) < 1e-6
    assert relative_error(torch.func.vmap(hyper(iterated, Unrolled()))(h.expand(2)), truth.expand(2)) < 1e-7


# Sizes of the outer gradient


@pytest.mark.parametrize("adjoint", [adjoints.FiniteDifference(), adjoints.SAMA()], ids=["finite difference", "SAMA"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20])
def test_differences_along_a_direction_whose_square_is_no_float32(adjoint: Any, size: float) -> None:
    w, h = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2 * (1 + w**2)).sum(), optim.sgd(0.05))

    def hyper(size: float) -> Tensor:
        estimate = metacal.hypergradient(lambda w, h, b: size * (w**2).sum(), solver, adjoint)
        return estimate(solver.init(w, h), h, [None] * 3, None).hparams / size

    assert relative_error(hyper(size), hyper(1.0)) < 1e-5


# Optimizers whose first state holds the params


def test_a_first_state_of_the_params_is_refused() -> None:
    """The initial params act through it too, and meta-learning would leave it behind."""
    sgd = optim.sgd(0.05)

    def init(params: Any) -> Any:
        return sgd.init(params), params

    def update(g: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        u, fast = sgd.update(g, state[0], params=params, inplace=False)
        return tree.sub(tree.mean([tree.add(params, u), state[1]]), params), (fast, state[1])

    with pytest.raises(ValueError, match=r"its init puts values of the params into the state.*Begin with zeros"):
        metacal.descent(lambda w, h, b: (w**2).sum(), optim.GradientTransformation(init, update))
