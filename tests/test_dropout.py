"""Noise in an order of memory: dropout of a tensor that is not contiguous is one realisation, whoever looks at the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import metacal
from metacal import _dropout, adjoints, linear, optim
from metacal.adjoints import Implicit
from problems import F64, central_differences, close

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda x: x.permute(2, 0, 1),
    "transposed": lambda x: x.transpose(1, 2),
    "every other": lambda x: x[:, ::2],
    "both": lambda x: x[:, ::2].transpose(0, 2),
    "expanded": lambda x: x[:, :1].expand(2, 4, 3),
    "contiguous": lambda x: x,
}
DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: _dropout.as_eager(F.dropout, x, 0.5),
    "alpha_dropout": lambda x: _dropout.as_eager(F.alpha_dropout, x, p=0.5, training=True),
    "in place": lambda x: _dropout.as_eager(F.dropout, x * 1, 0.5, inplace=True),
}
EAGER = {"dropout": F.dropout, "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, training=True), "in place": F.dropout}


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_every_transform_draws_the_mask_of_eager_code(view: str, dropout: str) -> None:
    x = torch.arange(1.0, 25.0).reshape(2, 4, 3)
    found = {
        "vjp": lambda fn: torch.func.vjp(fn, x)[0],
        "jvp": lambda fn: torch.func.jvp(fn, (x,), (x,))[0],
        "vmap": lambda fn: torch.func.vmap(fn, randomness="same")(torch.stack([x, x]))[0],
    }
    torch.manual_seed(0)
    truth = EAGER[dropout](VIEWS[view](x), 0.5)
    for draw in found.values():
        torch.manual_seed(0)
        close(draw(lambda x: DROPOUTS[dropout](VIEWS[view](x))), truth, 1e-6)


W0, C = torch.arange(12, dtype=F64).reshape(4, 3) / 10, torch.linspace(-1, 2, 12, dtype=F64).reshape(4, 3)
METHODS = {
    "mixed": adjoints.Unrolled(), "reverse": adjoints.Unrolled("reverse"), "segment=1": adjoints.Unrolled(segment=1),
    "auto": adjoints.Unrolled("auto"), "Forward": adjoints.Forward(), "Implicit": adjoints.Implicit(linear.Dense()),
}  # fmt: skip


def dropping(w: Tensor, h: Tensor, b: Any) -> Tensor:
    return ((F.dropout(w.T, 0.5) - h) ** 2).sum() / 2 + (w**4).sum() / 4


def value(h: Tensor, adjoint: metacal.Adjoint, inner: Any = dropping) -> Tensor:
    torch.manual_seed(0)
    return (C * metacal.solve(metacal.descent(inner, optim.sgd(0.1)), W0, h, metacal.repeat(None, 5), adjoint)).sum()


@pytest.mark.parametrize("name", METHODS)
def test_one_realisation_of_dropout_in_every_way_to_a_derivative(name: str) -> None:
    """Backward once and twice, and by torch.func: the derivative of the run that took place."""
    adjoint, h = METHODS[name], torch.tensor(1.0, dtype=F64, requires_grad=True)
    (plain,) = torch.autograd.grad(value(h, adjoint), h)
    (first,) = torch.autograd.grad(value(h, adjoint), h, create_graph=True)
    (second,) = torch.autograd.grad(first, h)
    found = [plain, first, torch.func.grad(lambda h: value(h, adjoint))(h.detach())]
    close(found, [plain] * 3, 1e-12)
    if name != "Implicit":  # its equation is not the run's
        close(plain, central_differences(lambda h: value(h, adjoint), h.detach()), 1e-9)
        close(second, torch.autograd.functional.hessian(lambda h: value(h, adjoints.Unrolled("graph")), h.detach()), 1e-10)


def test_compiled_steps_refuse_what_they_would_draw_otherwise() -> None:
    solver = metacal.descent(dropping, optim.sgd(0.1), compile="aot_eager")
    h = torch.ones((), dtype=F64)
    with pytest.raises(RuntimeError, match=r"not contiguous.*Write dropout\(x.contiguous\(\)\)"):
        metacal.run(solver, solver.init(W0, h), h, metacal.repeat(None, 2))


def penalised(w: Tensor, h: Tensor, b: Any) -> Tensor:
    """A gradient penalty, whose objective differentiates by its own input."""
    x = torch.ones(3, dtype=F64).requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(w @ x).sum(), x, create_graph=True)
    return ((slope - h) ** 2).sum() / 2 + (w**4).sum() / 4


def checkpointed(w: Tensor, h: Tensor, b: Any) -> Tensor:
    hidden = torch.utils.checkpoint.checkpoint(lambda w: torch.tanh(w).square(), w, use_reentrant=False)
    return ((hidden - h) ** 2).sum() / 2 + (w**4).sum() / 4


@pytest.mark.parametrize("inner", [penalised, checkpointed], ids=["gradient penalty", "checkpoint"])
def test_a_second_backward_pass_asks_of_an_objective_what_the_first_does(inner: Any) -> None:
    """No torch.func transform where the user asks for none: it would refuse requires_grad_() and saved tensor hooks."""
    h = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(value(h, adjoints.Unrolled(), inner), h, create_graph=True)
    (second,) = torch.autograd.grad(first, h)
    close(first, central_differences(lambda h: value(h, adjoints.Unrolled(), inner), h.detach()), 1e-9)

    def slope(h: Tensor) -> Tensor:
        h = h.requires_grad_()
        return torch.autograd.grad(value(h, adjoints.Unrolled(), inner), h)[0]

    close(second, central_differences(slope, h.detach()), 1e-8)
    implicit = Implicit(linear.GMRES(12))
    plain, attached = (torch.autograd.grad(value(h, implicit, inner), h, create_graph=again)[0] for again in (False, True))
    close(attached, plain, 1e-12)


def test_a_checkpoint_under_a_transform_names_the_remedy() -> None:
    h, solver = torch.tensor(0.3, dtype=F64), metacal.descent(checkpointed, optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"torch.utils.checkpoint.*Unrolled\(\)"):
        torch.func.grad(lambda h: metacal.run(solver, solver.init(W0, h), h, [None]).params.sum())(h)
    with pytest.raises(RuntimeError, match=r"torch.utils.checkpoint.*Unrolled\(\)"):
        torch.autograd.grad(value(h.requires_grad_(), adjoints.Forward(), checkpointed), h)
    checkpoint = torch.utils.checkpoint.checkpoint
    solver = metacal.descent(lambda w, h, b: checkpoint(lambda w: w["w"].sum(), w, use_reentrant=True), optim.sgd(0.1))
    with pytest.raises(ValueError, match="use_reentrant=False"), pytest.warns(UserWarning, match="None of the inputs"):
        metacal.solve(solver, {"w": W0}, torch.ones(()), [None])
