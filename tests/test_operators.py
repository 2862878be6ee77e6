"""Products of second order against double backward passes written by hand, whatever derivatives torch has for an operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import metacal
from metacal import adjoints, derivatives, linear, operators, optim
from metacal.diagnostics import peak_bytes, work

W = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
H = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


class Cube(torch.autograd.Function):
    """Of the kind with setup_context, and without a jvp rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * ct


class OldCube(torch.autograd.Function):
    """Of the kind that torch.func cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * ct


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": lambda y: F.mse_loss(y, TARGET),
    "huber_loss": lambda y: F.huber_loss(y, TARGET),
    "soft_margin_loss": lambda y: F.soft_margin_loss(y, TARGET.sign()),
    "cross_entropy": lambda y: F.cross_entropy(y[None], torch.tensor([1])),
    "Function without jvp": lambda y: Cube.apply(y).square().mean(),
    "Function without setup_context": lambda y: OldCube.apply(y).square().mean(),
}
ANNOUNCED = {"soft_margin_loss", "Function without jvp", "Function without setup_context", "huber_loss"}


def loss_of(name: str, *, compiled: bool = False) -> operators.Loss:
    # Products of w and h, so that the mixed block is not zero; a new function each time, for what is remembered of it.
    return operators.Loss(lambda w, h, batch, carry: (LOSSES[name](w * h), carry), compiled=compiled)


def by_hand(name: str, d: Tensor) -> tuple[Tensor, Tensor]:
    w, h = W.clone().requires_grad_(), H.clone().requires_grad_()
    (g,) = torch.autograd.grad(LOSSES[name](w * h), w, create_graph=True)
    H_ww, H_hw = torch.autograd.grad(g, (w, h), d)
    return H_ww, H_hw


@pytest.mark.parametrize("name", LOSSES)
def test_products_equal_a_double_backward_pass(name: str) -> None:
    """One written by hand, and without a word where nobody differentiates them."""
    loss, d = loss_of(name), torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    products = operators.mixed_products(loss, W, H, None, (), d)
    again = operators.linearised(loss, W, H, None, ())
    assert again is not None
    H_ww, H_hw = by_hand(name, d)
    found = (*products, again.hessian(d), again.mixed(d), again.hessian(2 * d), again.gradient())
    (g,) = torch.autograd.grad(LOSSES[name]((w := W.clone().requires_grad_()) * H), w)
    for got, expected in zip(found, (H_ww, H_hw, H_ww, H_hw, 2 * H_ww, g), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


class OnceCube(torch.autograd.Function):
    """x^3 with a backward pass that torch must not differentiate, and for which it gives zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * ct


def test_a_function_that_is_differentiable_once_is_refused() -> None:
    """torch's own second derivative of it is None, which is taken for zero."""
    once = operators.Loss(lambda w, h, batch, carry: (OnceCube.apply(w * h).square().mean(), carry))
    w = W.clone().requires_grad_()
    (g,) = torch.autograd.grad(once.fn(w, H, None, ())[0], w, create_graph=True)
    assert torch.autograd.grad(g.sum(), w, allow_unused=True) == (None,)
    for product in (lambda: operators.mixed_products(once, W, H, None, (), W), lambda: operators.linearised(once, W, H, None, ())):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            product()


@pytest.mark.parametrize("mode", ["graph", "reverse", "mixed", "auto"])
def test_no_mode_takes_its_second_derivative_for_zero(mode: Any) -> None:
    solver = metacal.descent(lambda w, h, b: OnceCube.apply(w * h).square().mean(), optim.sgd(0.01))
    estimate = metacal.hypergradient(lambda w, h, b: w.square().sum(), solver, adjoints.Unrolled(mode=mode))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        estimate(solver.init(W, H), H, metacal.repeat(None, 2), None)


@pytest.mark.parametrize("name", LOSSES)
def test_products_by_forward_mode_equal_a_double_backward_pass(name: str) -> None:
    loss, d = loss_of(name, compiled=True), torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # what was learned of the loss at the first time is used at the second
            products = operators.mixed_products(loss, W, H, None, (), d)
        alone = operators.hessian_product(loss, W, H, None, (), d)
    for got, expected in zip((*products, alone), (*by_hand(name, d), by_hand(name, d)[0]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    told = [w for w in caught if issubclass(w.category, operators.NoForwardModeWarning)]
    assert len(told) <= 1  # once per loss, not once per step
    assert not told or name in ANNOUNCED
    if "Function" in name:
        assert told
        assert "double backward" in str(told[0].message)


@pytest.mark.parametrize("name", ["mse_loss", "Function without jvp"])
@pytest.mark.filterwarnings("ignore::metacal.operators.NoForwardModeWarning")
def test_every_adjoint_takes_losses_without_forward_mode(name: str) -> None:
    def inner(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return LOSSES[name](0.5 * w * h) + 0.5 * (w - batch).square().sum()

    solver = metacal.descent(inner, optim.sgd(0.05, momentum=0.5))
    state, batches = solver.init(W, H), metacal.repeat(TARGET, 4)

    def estimate(adjoint: adjoints.Adjoint) -> metacal.HyperGradient:
        return metacal.hypergradient(lambda w, h, b: w.square().sum(), solver, adjoint)(state, H, batches, None)

    exact = estimate(adjoints.Unrolled("graph"))
    for adjoint in (adjoints.Unrolled(), adjoints.Unrolled("reverse"), adjoints.Unrolled(segment=1)):
        torch.testing.assert_close(estimate(adjoint).hparams, exact.hparams, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(estimate(adjoint).params, exact.params, rtol=1e-12, atol=1e-14)
    dense, cg = (estimate(adjoints.Implicit(solver)).hparams for solver in (linear.Dense(), linear.CG(3)))
    torch.testing.assert_close(cg, dense, rtol=1e-9, atol=1e-12)

    def of_task(h: Tensor) -> Tensor:
        return metacal.hypergradient(lambda w, h, b: w.square().sum(), solver, adjoints.Unrolled())(
            solver.init(W, h), h, batches, None
        ).hparams

    tasks = torch.stack([H, 0.5 * H])
    torch.testing.assert_close(torch.func.vmap(of_task)(tasks), torch.stack([of_task(h) for h in tasks]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["mse_loss", "Function without jvp"])
@pytest.mark.filterwarnings("ignore::metacal.operators.NoForwardModeWarning")
def test_the_first_failed_attempt_draws_no_noise_of_its_own(name: str) -> None:
    def inner(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return LOSSES[name](F.dropout(0.5 * w * h, 0.5)) + 0.5 * (w - batch).square().sum()

    solver = metacal.descent(inner, optim.sgd(0.05))
    found = {}
    for mode in ("graph", "mixed"):
        torch.manual_seed(3)
        estimate = metacal.hypergradient(lambda w, h, b: w.square().sum(), solver, adjoints.Unrolled(mode))  # type: ignore[arg-type]
        found[mode] = estimate(solver.init(W, H), H, metacal.repeat(TARGET, 4), None)
    assert bool(found["graph"].hparams.any())
    torch.testing.assert_close(found["mixed"].hparams, found["graph"].hparams, rtol=1e-12, atol=1e-14)


def test_other_errors_are_not_taken_for_a_missing_rule() -> None:
    def broken(w: Tensor, h: Tensor, batch: Tensor, carry: Any) -> tuple[Tensor, Any]:
        raise RuntimeError("a mistake of the user")

    with pytest.raises(RuntimeError, match="a mistake of the user"):
        operators.hessian_product(operators.Loss(broken), W, H, None, (), W)


def test_gradient_accumulation_is_the_mean_over_pieces() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    whole = metacal.descent(lambda w, h, b: ((b @ (w * h)) ** 2).mean(), optim.sgd(0.1))
    parts = metacal.descent(metacal.microbatched(lambda w, h, b: ((b @ (w * h)) ** 2).mean(), 4), optim.sgd(0.1))
    for solver in (whole, parts):
        assert solver.descent is not None
    assert whole.descent is not None
    assert parts.descent is not None
    for got, expected in (
        (parts.descent.gradient(W, H, x, ())[0], whole.descent.gradient(W, H, x, ())[0]),
        (parts.descent.products(W, H, x, (), W), whole.descent.products(W, H, x, (), W)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"divisible by the 4 micro-batches"):
        parts.descent.gradient(W, H, x[:6], ())


def test_gradient_accumulation_saves_memory() -> None:
    x, w = torch.randn(4096, 64), torch.randn(64, 256)

    def loss(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return (b @ w).tanh().square().mean()

    def peak(objective: Any) -> int:
        solver = metacal.descent(objective, optim.sgd(0.1))
        assert solver.descent is not None
        gradient = solver.descent.gradient
        gradient(w, {}, x, ())
        return peak_bytes(lambda: gradient(w, {}, x, ()))

    assert peak(metacal.microbatched(loss, 8)) < 0.25 * peak(loss)


def test_work_counts_matrix_products() -> None:
    a, b = torch.ones(5, 7), torch.ones(7, 3)
    assert work(lambda: (a @ b) @ b.T) == 2 * 5 * 7 * 3 * 2


def stopped_by_no_grad(w: Any, h: Any, b: Any) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(w["x"] * h)
    return (w["x"] ** 2 * target).sum() + (h * w["x"]).sum()


def stopped_by_detach(w: Any, h: Any, b: Any) -> Tensor:
    return (w["x"] ** 2 * torch.tanh(w["x"] * h).detach()).sum() + (h * w["x"]).sum()


def test_what_is_computed_under_no_grad_is_a_constant_in_every_mode() -> None:
    """As ``detach`` makes it: mixed mode equals graph mode, the double backward of the written-out run."""
    h, state = torch.tensor([0.5, -0.3], dtype=torch.float64), {"x": torch.tensor([1.0, 0.7], dtype=torch.float64)}

    def hypergradient(inner: Any, adjoint: Any) -> Tensor:
        solver = metacal.descent(inner, metacal.optim.sgd(0.1))
        estimate = metacal.hypergradient(lambda w, h, b: (w["x"] ** 3).sum(), solver, adjoint)
        return estimate(solver.init(state, h), h, [None] * 3, None).hparams

    unrolled = [adjoints.Unrolled(mode=mode) for mode in ("mixed", "reverse", "graph")]  # type: ignore[arg-type]
    for adjoint in (*unrolled, adjoints.Implicit(linear.Dense())):
        found, truth = hypergradient(stopped_by_no_grad, adjoint), hypergradient(stopped_by_detach, adjoint)
        assert torch.allclose(found, truth, rtol=1e-12, atol=0), adjoint
    exact = hypergradient(stopped_by_detach, adjoints.Unrolled(mode="graph"))
    assert torch.allclose(hypergradient(stopped_by_no_grad, adjoints.Unrolled()), exact, rtol=1e-12, atol=0)


def test_aux_of_value_and_grad_may_hold_none_under_transforms() -> None:
    def of_one(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, nothing, _ = derivatives.value_and_grad(lambda w: ((w**2).sum(), None), w)
        value, aux, (gradient,) = derivatives.value_and_grad(lambda w: ((w**2).sum(), {"none": None, "w": 3 * w}), w)
        assert nothing is None
        assert aux["none"] is None
        return value, aux["w"], gradient

    w = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    for found, expected in zip(torch.func.vmap(of_one)(w), ((w**2).sum(1), 3 * w, 2 * w), strict=True):
        assert torch.equal(found, expected)


class ReturnsWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return (w * c).sum()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def test_a_gradient_hangs_on_no_graph_that_nobody_asked_for() -> None:
    c = H.clone().requires_grad_()
    value, _, (gradient,) = derivatives.value_and_grad(lambda w: (ReturnsWhatItSaved.apply(w, c), None), W)
    assert torch.equal(gradient, c)
    assert not gradient.requires_grad
    assert not value.requires_grad


def test_a_loss_of_one_element_is_a_scalar_in_every_engine() -> None:
    """Shape (1,), as of a last linear layer with one output: taken for a scalar in plain autograd, and so under transforms."""
    h = torch.tensor([0.3, 0.4], dtype=torch.float64)
    for keepdim in (False, True):
        solver = metacal.descent(lambda w, h, b, k=keepdim: ((w - h) ** 2).sum(0, keepdim=k), optim.sgd(0.25))
        estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum() / 2, solver, adjoints.Unrolled())
        call = lambda h: estimate(solver.init(torch.zeros_like(h), h), h, [None] * 2, None).hparams  # noqa: B023, E731
        found = torch.func.vmap(call)(h[None])[0], torch.func.jacrev(call)(h).diagonal()
        torch.testing.assert_close(found, (0.75**2 * h, torch.full_like(h, 0.75**2)), rtol=1e-14, atol=0)
