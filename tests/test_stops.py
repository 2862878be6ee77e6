"""What an objective makes a constant, or may not do, is seen for every objective by itself, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metacal
from metacal import adjoints, optim
from metacal.adjoints import Unrolled
from problems import F64, close

W, H = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.3, 0.4], dtype=F64)
T, RATE = 3, 0.1
Op = Callable[[Tensor], Tensor]


def name(adjoint: metacal.Adjoint) -> str:
    return type(adjoint).__name__


def cube(w: Tensor) -> Tensor:
    return w**3


def scaled(w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w**2
    return scale * w


def of_data(w: Tensor) -> Tensor:
    return w.data**2 * w


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def solver(op: Op) -> metacal.InnerSolver:
    """Of one code for every operation."""
    return metacal.descent(lambda w, h, b: (op(w) * h).sum(), optim.sgd(RATE))


def tied(op: Op) -> metacal.InnerSolver:
    return metacal.proximal(lambda w, h, b: (op(w) * h).sum(), optim.sgd(RATE), 0.0, anchor=lambda h: torch.zeros_like(W))


def estimate(solver: metacal.InnerSolver, mode: Any = "mixed") -> Callable[[Tensor], Tensor]:
    """The hypergradient of |w_T|^2."""
    found = metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, Unrolled(mode))
    return lambda h: found(solver.init(W, h), h, metacal.repeat(None, T), None).hparams


def by_hand(power: float) -> Tensor:
    """The same with ``power * w^2 h`` as the objective's gradient, whose w^2 is a constant if the power is 1 and not if it is 3."""
    w, dw = W, torch.zeros_like(W)
    for _ in range(T):
        dw = dw - RATE * power * (w**2 + 2 * w * dw * H if power == 3 else w**2)
        w = w - RATE * power * w**2 * H
    return 2 * w * dw


@pytest.mark.parametrize("make", [solver, tied])
@pytest.mark.parametrize("op", [scaled, of_data])
def test_constants_of_one_objective_are_not_those_of_another_of_like_code(make: Callable[[Op], metacal.InnerSolver], op: Op) -> None:
    harmless = estimate(make(cube))
    harmless(H)
    close(torch.func.vmap(harmless)(H[None])[0], by_hand(3.0), 1e-12)
    if op is scaled:
        close(torch.func.vmap(estimate(make(op)))(H[None])[0], by_hand(1.0), 1e-12)
    else:  # a constant to the first derivative only: torch.func.vjp of torch.func.grad sees it move
        for mode in ("mixed", "reverse"):
            with pytest.raises(RuntimeError, match=r"reads x.data.*Write x.detach"):
                torch.func.vmap(estimate(make(op), mode))(H[None])
    for mode in ("mixed", "reverse", "graph", "auto"):
        close(estimate(make(op), mode)(H), by_hand(1.0), 1e-12)
    h = H.clone().requires_grad_()
    w = metacal.solve(make(op), W, h, metacal.repeat(None, T))
    close(torch.autograd.grad((w**2).sum(), h, create_graph=True)[0], by_hand(1.0), 1e-12)


def test_an_objective_may_change_its_ways() -> None:
    frozen = False
    changing = estimate(solver(lambda w: scaled(w) if frozen else cube(w)))
    close(torch.func.vmap(changing)(H[None])[0], by_hand(3.0), 1e-12)
    frozen = True
    close(torch.func.vmap(changing)(H[None])[0], by_hand(1.0), 1e-12)


@pytest.mark.parametrize("make", [solver, tied])
def test_a_second_derivative_that_is_not_there_is_refused_after_one_that_was(make: Callable[[Op], metacal.InnerSolver]) -> None:
    estimate(make(cube))(H)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        estimate(make(Once.apply))(H)


@pytest.mark.parametrize(
    "adjoint", [Unrolled(), Unrolled("reverse"), Unrolled("graph"), Unrolled("auto"), Unrolled(segment=1), adjoints.FirstOrder()], ids=name
)
def test_a_carry_that_is_changed_in_place_is_refused(adjoint: metacal.Adjoint) -> None:
    """Steps are taken again from the carry that was saved, which would be another by then."""

    def growing(w: Tensor, h: Tensor, b: None, carry: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        carry["k"].add_(0.5)
        return ((w - h) ** 2).sum() * carry["k"], carry

    first = {"k": torch.ones((), dtype=F64)}
    inner = metacal.descent(growing, optim.sgd(RATE), carry=first)
    found = metacal.hypergradient(lambda w, h, b: (w**2).sum(), inner, adjoint)
    with pytest.raises(ValueError, match=r"`carry` at 'k' in place.*functional"):
        found(inner.init(W, H), H, metacal.repeat(None, T), None)
    assert float(first["k"]) == 1
    lacking = metacal.descent(lambda w, h, b, c: ((w - h) ** 2).sum(), optim.sgd(RATE), carry=first)
    with pytest.raises(TypeError, match=r"should return \(loss, carry\).*got Tensor"):
        metacal.run(lacking, lacking.init(W, H), H, [None])


def test_a_carry_that_is_returned_anew_is_welcome_under_transforms() -> None:
    inner = metacal.descent(lambda w, h, b, c: (((w - h) ** 2).sum() * c, c + 0.5), optim.sgd(RATE), carry=torch.ones((), dtype=F64))
    found = metacal.hypergradient(lambda w, h, b: (w**2).sum(), inner, Unrolled())
    fn = lambda h: found(inner.init(W, h), h, metacal.repeat(None, T), None).hparams  # noqa: E731
    close(torch.func.vmap(fn)(torch.stack([H, 2 * H])), torch.stack([fn(H), fn(2 * H)]), 1e-14)


def test_an_offloaded_run_is_differentiated_again() -> None:
    found = metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver(cube), Unrolled(offload=True))
    value = lambda h: found(solver(cube).init(W, h), h, metacal.repeat(None, T), None).value  # noqa: E731
    close(torch.func.grad(value)(H), by_hand(3.0), 1e-12)
    close(torch.func.jacfwd(value)(H), by_hand(3.0), 1e-12)


def test_complex_hparams_are_differentiated_or_refused() -> None:
    h = torch.tensor([0.5 + 1j], dtype=torch.complex128)
    inner = metacal.descent(lambda w, h, b: ((w - (h * h.conj()).real) ** 2).sum(), optim.sgd(RATE))

    def found(adjoint: metacal.Adjoint) -> Tensor:
        estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum(), inner, adjoint)
        return estimate(inner.init(torch.ones(1, dtype=F64), h), h, metacal.repeat(None, T), None).hparams

    # w_T = w_0 k + |h|^2 (1 - k), k = (1 - 2a)^T; d|h|^2 is 2 h in torch's convention.
    k = (1 - 2 * RATE) ** T
    truth = 2 * (k + 1.25 * (1 - k)) * (1 - k) * 2 * h
    close(torch.view_as_real(found(Unrolled())), torch.view_as_real(truth), 1e-12)
    for adjoint in (adjoints.Forward(), adjoints.ForwardSketch(2), adjoints.ZerothOrder(2)):
        with pytest.raises(TypeError, match="should be real"):
            found(adjoint)


def test_directions_are_drawn_beside_the_noise_of_the_objectives() -> None:
    def noisy(w: Tensor, h: Tensor, b: None) -> Tensor:
        return ((w - h - torch.randn_like(w)) ** 2).sum()

    inner = metacal.descent(noisy, optim.sgd(RATE))
    values = []
    for one in (adjoints.ForwardSketch(2), Unrolled()):
        torch.manual_seed(0)
        values.append(metacal.hypergradient(noisy, inner, one)(inner.init(W, H), H, metacal.repeat(None, T), None).value)
    close(values[0], values[1], 1e-14)


@pytest.mark.parametrize("adjoint", [adjoints.FiniteDifference(), adjoints.SAMA(), Unrolled()], ids=name)
def test_a_hypergradient_has_the_type_of_its_hparams(adjoint: metacal.Adjoint) -> None:
    h = torch.tensor(0.3)
    inner = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(RATE))
    estimate = metacal.hypergradient(lambda w, h, b: (w**2).sum(), inner, adjoint)
    assert estimate(inner.init(W, h), h, metacal.repeat(None, T), None).hparams.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_both_weight_norms_are_differentiated_twice() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=F64), torch.randn(6, 1, dtype=F64)
    for norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        net = torch.nn.Sequential(norm(torch.nn.Linear(4, 4)), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(F64)
        f = metacal.functional(net)

        def outer(w: Any, h: Tensor, b: None, f: Any = f) -> Tensor:
            return ((f.apply(w, x) - y) ** 2).mean()

        inner = metacal.descent(lambda w, h, b, outer=outer: outer(w, h, b) + h * sum((p**2).sum() for p in w.values()), optim.sgd(RATE))

        def value(h: Tensor, f: Any = f, inner: Any = inner, outer: Any = outer) -> Tensor:
            return outer(metacal.run(inner, inner.init(f.params, h), h, metacal.repeat(None, T)).params, h, None)

        h, eps = torch.tensor(0.1, dtype=F64), 1e-5
        found = metacal.hypergradient(outer, inner, Unrolled())(inner.init(f.params, h), h, metacal.repeat(None, T), None).hparams
        close(found, (value(h + eps) - value(h - eps)) / (2 * eps), 1e-7)


def test_a_module_wants_all_of_its_parameters_and_no_others() -> None:
    f = metacal.functional(torch.nn.Linear(2, 1))
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="'bias' is missing and 'bais' is none of them"):
        f.apply({"weight": torch.zeros(1, 2), "bais": torch.zeros(1)}, x)
    with pytest.raises(ValueError, match=r"'module\.bias' is none of them"):
        f.apply({f"module.{name}": w for name, w in f.params.items()}, x)
    with pytest.raises(ValueError, match=r"at 'weight' should have the module's shape \(1, 2\), got \(1,\)"):
        f.write({"weight": torch.zeros(1)})


def objective(w: Tensor, h: Tensor, b: None) -> Tensor:
    return ((w - h) ** 2).sum()


INNER = metacal.descent(objective, optim.sgd(RATE))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metacal.hypergradient(objective, INNER, "mixed"), TypeError, "`adjoint` should be one of metacal.adjoints.*'mixed'"),
        (lambda: metacal.hypergradient(objective, INNER, Unrolled), TypeError, "`adjoint` should be .* with its settings"),
        (lambda: metacal.nested(objective, INNER, "x", optim.sgd(0.1)), TypeError, "`adjoint`"),
        (lambda: metacal.solve(INNER, W, H, [None], "mixed"), TypeError, "`adjoint`"),
        (lambda: metacal.hypergradient(objective, optim.sgd(0.1), Unrolled()), TypeError, "`solver` should be an InnerSolver"),
        (lambda: metacal.descent(objective, 0.1), TypeError, "`optimizer`"),
        (lambda: metacal.descent(None, optim.sgd(0.1)), TypeError, "`objective` should be a function"),
        (lambda: metacal.microbatched(metacal.with_aux(objective), 2), TypeError, "`objective` should return a scalar"),
        (lambda: metacal.repeat(None, -1), ValueError, "`n` should be an integer of at least 0, got -1"),
        (lambda: metacal.take([None], -1), ValueError, "`n` should be an integer of at least 0, got -1"),
        (lambda: metacal.functional(lambda x: x), TypeError, "`module` should be an nn.Module, got function"),
    ],
)
def test_wrong_parts_are_named_where_they_are_handed_in(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_inference_mode_is_spoken_of() -> None:
    estimate = metacal.hypergradient(objective, INNER, Unrolled())
    with torch.inference_mode():
        made = torch.ones(2, dtype=F64)
        with pytest.raises(RuntimeError, match=r"inference_mode.*no_grad"):
            estimate(INNER.init(W, H), H, [None], None)
    with pytest.raises(TypeError, match=r"made under torch.inference_mode\(\).*clone"):
        INNER.init(made, H)
    logs = metacal.hypergradient(metacal.with_aux(objective), INNER, Unrolled())
    with pytest.raises(TypeError, match=r"should return \(loss, dict of tensors to log\)"):
        logs(INNER.init(W, H), H, [None], None)
