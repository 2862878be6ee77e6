"""Law 7, compiled equals eager: the step, its pullback and the products are each one graph, compiled once and used at every step.

Graphs are counted with the backend that runs what was traced without generating code; one test goes through code generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

import metacal
from metacal import adjoints, optim
from problems import F64, PROBLEMS, close, f64

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda h: optim.sgd(h["lr"]),
    "momentum": lambda h: optim.sgd(h["lr"], momentum=0.9),
    "adam": lambda h: optim.adam(h["lr"], betas=(h["beta"], 0.99)),
    "adamw": lambda h: optim.adamw(h["lr"], weight_decay=0.01),
    "rmsprop": lambda h: optim.rmsprop(h["lr"], momentum=0.5, centered=True),
    "adagrad": lambda h: optim.adagrad(h["lr"], lr_decay=h["beta"]),
}
CASE = PROBLEMS["ridge_scalar"]
HPARAMS = {"lr": f64(0.05), "beta": f64(0.8), "task": CASE.hparams}
BATCHES = [CASE.batches[t % len(CASE.batches)] for t in range(4)]


def inner(p: Any, h: Any, b: Any) -> Tensor:
    return CASE.inner(p, h["task"], b)


def outer(p: Any, h: Any, b: Any) -> Tensor:
    return CASE.outer(p, h["task"], b)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """How many graphs were compiled since the test began; none of them may have been broken off."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_and_its_pullback_are_compiled_once(optimizer: str) -> None:
    eager, compiled = (metacal.descent(inner, OPTIMIZERS[optimizer], compile=c) for c in (False, "eager"))
    one, two = (metacal.hypergradient(outer, solver, adjoints.Unrolled()) for solver in (eager, compiled))
    state, hparams = eager.init(CASE.params, HPARAMS), HPARAMS
    for outer_step in range(3):
        expected, got = (estimate(state, hparams, BATCHES, CASE.outer_batch) for estimate in (one, two))
        close((got.hparams, got.params), (expected.hparams, expected.params), 1e-12)
        close(got.state.params, expected.state.params, 1e-13)
        assert graphs() == 2, f"outer step {outer_step}"
        state, hparams = expected.state, metacal.tree.axpy(-0.01, expected.hparams, hparams)


def test_the_parts_that_implicit_adjoints_use_are_compiled() -> None:
    p = PROBLEMS["ridge_scalar"]
    eager, compiled = (metacal.descent(p.inner, optim.sgd(0.1), compile=c) for c in (False, "eager"))
    assert eager.descent is not None
    assert compiled.descent is not None
    batch, d = p.batches[0], {"w": f64(1.0, -2.0, 0.5)}
    at = (p.params, p.hparams, batch, ())
    for name, part in {
        "hessian": lambda descent: descent.linearised(*at).hessian(d),
        "products": lambda descent: descent.products(*at, d),
        "gradient": lambda descent: descent.gradient(*at),
    }.items():
        before = graphs()
        for _ in range(3):
            close(part(compiled.descent), part(eager.descent), 1e-13)
        assert graphs() == before + 1, name
    before = graphs()
    close(compiled.residual(p.params, p.hparams, batch), eager.residual(p.params, p.hparams, batch), 1e-13)
    assert graphs() == before


def test_eager_code_runs_where_somebody_differentiates_it() -> None:
    p = PROBLEMS["ridge_scalar"]
    eager, compiled = (metacal.descent(p.inner, optim.sgd(0.1), compile=c) for c in (False, "eager"))

    def value(solver: metacal.InnerSolver, lam: Tensor) -> Tensor:
        h = {"lam": lam}
        return metacal.hypergradient(p.outer, solver, adjoints.Unrolled())(solver.init(p.params, h), h, p.steps(2), p.outer_batch).hparams[
            "lam"
        ]

    for transform, at in ((torch.func.grad, f64(0.3)), (torch.func.vmap, f64(0.3, 0.5)), (torch.func.jacfwd, f64(0.3))):
        close(transform(lambda x: value(compiled, x))(at), transform(lambda x: value(eager, x))(at), 1e-12)
    lam = f64(0.3).requires_grad_()
    w = metacal.solve(compiled, p.params, {"lam": lam}, p.steps(2), adjoints.Unrolled("graph"))["w"]
    torch.autograd.grad(w.sum(), lam)
    assert graphs() == 0


@torch._dynamo.config.patch(recompile_limit=1)
def test_every_solver_has_recompilations_of_its_own() -> None:
    """torch allows a function eight graphs and then falls back to eager code; another solver is another function."""
    for rate in (0.1, 0.2, 0.3):
        solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(rate), compile="eager")
        state = metacal.run(solver, solver.init(f64(1.0, 2.0), f64(0.0)), f64(0.0), [None] * 2)
        close(state.params, (1 - 2 * rate) ** 2 * f64(1.0, 2.0), 1e-14)
    assert graphs() == 3


def test_an_objective_that_cannot_be_compiled_is_refused_with_torchs_reason() -> None:
    def printing(w: Tensor, h: Tensor, b: Any) -> Tensor:
        print(end="")
        return ((w - h) ** 2).sum()

    def mistaken(w: Tensor, h: Tensor, b: Any) -> Tensor:
        return (w - h) ** 2

    for objective, kind, words in (
        (printing, RuntimeError, r"(?s)cannot be compiled as one graph.*print.*compile=False"),
        (mistaken, ValueError, r"`objective` should return a scalar, got a tensor of shape \(2,\)"),
    ):
        solver = metacal.descent(objective, optim.sgd(0.1), compile="eager")
        with pytest.raises(kind, match=words):
            metacal.run(solver, solver.init(f64(1.0, 2.0), f64(0.0)), f64(0.0), [None] * 2)


def test_cuda_graphs_want_a_cuda_device() -> None:
    with pytest.raises(ValueError, match=r"cuda-graphs.*CUDA device.*compile=True"):
        metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.1), compile="cuda-graphs").init(f64(1.0), f64(0.0))


class Cube(torch.autograd.Function):
    """Without a forward-mode derivative."""

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


@pytest.mark.filterwarnings("ignore::metacal.operators.NoForwardModeWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_order_products_without_forward_mode_stay_eager(backend: str) -> None:
    """Traced, they would miss the second derivative of the Function: 64% off here, without a word."""
    w, h = f64(0.5, -0.4, 0.3), f64(1.0, 0.8, 0.5)

    def estimate(cube: Callable[[Tensor], Tensor], compile: Any) -> metacal.HyperGradient:
        solver = metacal.descent(lambda w, h, b: cube(w * h).sum() + (w**2).sum(), optim.sgd(0.05), compile=compile)
        run = metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoints.Unrolled())
        for _ in range(2):
            found = run(solver.init(w, h), h, [None] * 3, None)
        return found

    truth = estimate(lambda x: x**3, False).hparams
    with pytest.warns(metacal.operators.NoForwardModeWarning, match="double backward"):
        close(estimate(Cube.apply, backend).hparams, truth, 1e-13)
    assert graphs() == 1  # the step


def noisy_attention() -> tuple[Callable[..., Tensor], Any, Tensor]:
    params = {k: torch.eye(4, dtype=F64) + 0.3 * torch.randn(4, 4, dtype=F64) for k in "qkv"}

    def objective(p: Any, h: Any, b: Tensor) -> Tensor:
        b = F.dropout(b, 0.3)
        out = F.scaled_dot_product_attention(*(b @ p[k] for k in "qkv"), dropout_p=0.2)  # [2, 3, 4]
        return (h["weights"] * out.square().mean((0, 1))).sum()

    return objective, params, torch.randn(2, 3, 4, dtype=F64)


@pytest.mark.parametrize("compile", ["aot_eager", pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_attention_draws_the_noise_of_eager_code(compile: Any) -> None:
    """Step and pullback see one realisation of dropout, which is that of the eager run."""
    objective, params, x = noisy_attention()
    hparams = {"weights": torch.ones(4, dtype=F64), "lr": f64(0.05)}
    found = []
    for how in (False, compile):
        solver = metacal.descent(objective, lambda h: optim.sgd(h["lr"], momentum=0.9), compile=how)
        torch.manual_seed(5)
        found.append(metacal.hypergradient(objective, solver, adjoints.Unrolled())(solver.init(params, hparams), hparams, [x] * 4, x))
        found.append(torch.rand(()))
    eager, eager_next, compiled, compiled_next = found
    close(compiled.state.params, eager.state.params, 1e-12)
    close((compiled.hparams, compiled.params), (eager.hparams, eager.params), 1e-10)
    assert eager_next == compiled_next
    assert graphs() == 2


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [True, "cuda-graphs"])
def test_compiled_on_a_device_equals_eager(compile: Any) -> None:
    objective, params, x = noisy_attention()
    hparams = {"weights": torch.ones(4, dtype=F64), "lr": f64(0.05)}
    params, hparams, x = (metacal.tree.to(t, "cuda") for t in (params, hparams, x))
    found = []
    for how in (False, compile):
        solver = metacal.descent(objective, lambda h: optim.adam(h["lr"]), compile=how)
        estimate = metacal.hypergradient(objective, solver, adjoints.Unrolled())
        state = solver.init(params, hparams)
        for outer_step in range(4):  # CUDA graphs warm up, are recorded, and are replayed
            torch.manual_seed(outer_step)
            hg = estimate(state, hparams, [x] * 7, x)
            found.append(metacal.tree.clone((hg.hparams, hg.params, hg.state.params)))
            state = hg.state
    for eager, compiled in zip(found[:4], found[4:], strict=True):
        close(compiled, eager, 1e-9)
