"""The unrolled adjoints on real networks: the choice of the smaller memory, attention, mixed precision, what torch has no rule for."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metacal
from metacal import adjoints, linear, operators, optim
from metacal.inner import DescentStep
from problems import F64, PROBLEMS, Tree, close, f64
from test_costs import peak_bytes

# The choice of the smaller memory


class Encoder(nn.Module):
    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:  # x: [n, length, 8]
        return self.head(self.layer(self.embed(x)).mean(1))


def mlp(*sizes: int) -> nn.Module:
    layers = [layer for m, n in itertools.pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def conv() -> nn.Module:
    first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 4))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(64, 128, 128, 4), torch.randn(64, 64)),
    "conv": lambda: (conv(), torch.randn(8, 3, 8, 8)),
    "transformer": lambda: (Encoder(), torch.randn(8, 10, 8)),
    "wide layers, tiny batch": lambda: (mlp(128, 128, 4), torch.randn(2, 128)),
    "narrow layers, big batch": lambda: (mlp(8, 8, 8, 4), torch.randn(512, 8)),
}


def weighted(net: str, dtype: torch.dtype = torch.float32, optimizer: Any = None) -> tuple[Callable[..., Any], Any, Any]:
    """A net with learned sample weights: ``estimate(adjoint, num_steps)``, the solver and the state."""
    module, x = NETS[net]() if net in NETS else (Encoder(dropout=0.1), torch.randn(8, 10, 8))
    module, x, y = module.to(dtype), x.to(dtype), torch.arange(len(x)) % 4
    model, weights = metacal.functional(module), torch.ones(len(x), dtype=dtype)

    def inner(p: Tree, h: Tree, b: Any) -> Tensor:
        return (h * F.cross_entropy(model.apply(p, b[0]), b[1], reduction="none")).mean()

    def outer(p: Tree, h: Tree, b: Any) -> Tensor:
        return F.cross_entropy(model.apply(p, b[0]), b[1])

    solver = metacal.descent(inner, optim.sgd(0.05, momentum=0.9) if optimizer is None else optimizer)
    state = solver.init(model.params, weights)

    def estimate(adjoint: Any, num_steps: int) -> metacal.HyperGradient:
        return metacal.hypergradient(outer, solver, adjoint)(state, weights, [(x, y)] * num_steps, (x, y))

    return estimate, solver, state


GRAPH_IS_SMALLER = {  # at T = 1, 5, 50, 200
    "mlp": (True, False, False, False),
    "conv": (True, False, False, False),
    "transformer": (True, False, False, False),
    "wide layers, tiny batch": (True, True, True, True),
    "narrow layers, big batch": (True, False, False, False),
}


# What is recorded to count the bytes of long runs takes its time: T = 50 and 200 where a step is cheap.
STEPS = [(net, which, t) for net in NETS for which, t in enumerate((1, 5))]
STEPS += [(net, 2, 50) for net in NETS if net != "transformer"] + [("mlp", 3, 200), ("wide layers, tiny batch", 3, 200)]


@pytest.mark.parametrize(("net", "which", "num_steps"), STEPS)
def test_auto_takes_the_smaller_peak(net: str, which: int, num_steps: int) -> None:
    estimate, *_ = weighted(net)

    def peak(mode: Any) -> int:
        estimate(adjoints.Unrolled(mode), 1)  # what is allocated once and kept
        return peak_bytes(lambda: estimate(adjoints.Unrolled(mode), num_steps))

    peaks = {mode: peak(mode) for mode in ("graph", "mixed")}
    assert (peaks["graph"] < peaks["mixed"]) == GRAPH_IS_SMALLER[net][which], peaks
    assert peak("auto") <= 1.1 * min(peaks.values())


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("net", ["dropout", "wide layers, tiny batch"])
def test_auto_is_mixed_in_number_noise_and_generator(net: str, window: int | None) -> None:
    estimate, *_ = weighted(net, F64)
    found, after = {}, {}
    for mode in ("mixed", "auto"):
        torch.manual_seed(1)
        found[mode] = estimate(adjoints.Unrolled(mode, window=window), 7)  # type: ignore[arg-type]
        after[mode] = torch.rand(())
    auto, mixed = found["auto"], found["mixed"]
    close((auto.hparams, auto.params), (mixed.hparams, mixed.params))
    close(auto.state.params, mixed.state.params, 1e-14)
    assert after["auto"] == after["mixed"]
    assert int(auto.stats["first_bad_step"]) == -1
    assert int(auto.stats["kept_graph"]) == (net != "dropout" or window == 1)
    assert not any(leaf.requires_grad for leaf in metacal.tree.leaves(tuple(auto)))


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled("graph"), adjoints.Unrolled("graph", segment=3)], ids=["whole", "in segments"])
def test_a_graph_where_somebody_differentiates_the_result(adjoint: Any) -> None:
    """In plain autograd, through `solve`: the first and the second derivative are those of `mixed`."""
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.sgd(0.1, momentum=0.9))

    def both_orders(adjoint: Any) -> list[Tensor]:
        h = metacal.tree.map(lambda x: x.clone().requires_grad_(), p.hparams)
        value = p.outer(metacal.solve(solver, p.params, h, p.steps(7), adjoint), h, p.outer_batch)
        first = torch.autograd.grad(value, metacal.tree.leaves(h), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), metacal.tree.leaves(h))
        return [*metacal.tree.detach(first), *second]

    expected = both_orders(adjoints.Unrolled())
    assert all(bool(g.abs().max() > 0) for g in expected)
    close(both_orders(adjoint), expected)


@pytest.mark.parametrize("adjoint", [*(adjoints.Unrolled(m) for m in ("mixed", "reverse", "graph")), adjoints.Unrolled(window=4)], ids=str)
def test_a_pullback_may_be_called_again(adjoint: Any) -> None:
    """The first call uses up what was kept of the run; another runs it again, with the noise that it saw."""
    w, h, x = torch.linspace(-1, 1, 6, dtype=F64), torch.ones(6, dtype=F64), torch.ones(20, 6, dtype=F64)
    solver = metacal.descent(lambda w, h, b: (h * torch.tanh(F.dropout(b) @ w)[:, None] ** 2).mean(), optim.sgd(0.3, momentum=0.9))
    torch.manual_seed(0)
    _, pullback = adjoint.vjp(solver, solver.init(w, h), h, [x] * 7)
    ct = torch.cos(w)
    first, other, again = pullback(ct), pullback(torch.sin(w)), pullback(2 * ct)
    close((again.hparams, again.params), metacal.tree.scale(2.0, (first.hparams, first.params)), 1e-14)
    assert float((other.hparams - first.hparams).abs().max()) > 1e-6
    assert int(again.stats["first_bad_step"]) == -1


def test_a_segment_at_a_time_is_in_memory() -> None:
    """Of 48 steps' graphs 6 are kept, and what is recorded again sees the noise of the first time."""
    estimate, *_ = weighted("narrow layers, big batch")
    whole, segments = (adjoints.Unrolled("graph", segment=segment) for segment in (None, 6))
    assert peak_bytes(lambda: estimate(segments, 48)) <= 0.25 * peak_bytes(lambda: estimate(whole, 48))
    noisy, *_ = weighted("dropout", F64)
    found = []
    for adjoint in (whole, segments, adjoints.Unrolled("graph", segment=6, offload=True)):
        torch.manual_seed(1)
        found.append((noisy(adjoint, 10).hparams, torch.rand(())))
    close(found[1], found[0], 1e-14)
    close(found[2], found[0], 1e-14)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_auto_at_every_door(num_steps: int) -> None:
    """Under transforms, where somebody differentiates the estimate, by `solve`, and for maps that are no descent."""
    p = PROBLEMS["mlp_reweighting"]
    solver = metacal.descent(p.inner, optim.sgd(0.1, momentum=0.9))
    fixed = metacal.fixed_point(
        lambda w, h, b: metacal.tree.axpy(-0.1, metacal.derivatives.value_and_grad(_with_no_aux(p, h, b), w)[2][0], w)
    )
    auto, mixed = adjoints.Unrolled("auto"), adjoints.Unrolled()

    def estimate(solver: metacal.InnerSolver, adjoint: Any, h: Tree) -> metacal.HyperGradient:
        return metacal.hypergradient(p.outer, solver, adjoint)(solver.init(p.params, h), h, p.steps(num_steps), p.outer_batch)

    for which in (solver, fixed):
        close(estimate(which, auto, p.hparams).hparams, estimate(which, mixed, p.hparams).hparams)

    def size(adjoint: Any) -> Callable[[Tree], Tensor]:
        return lambda h: metacal.tree.vdot(*[estimate(solver, adjoint, h).hparams] * 2)

    close(torch.func.grad(size(auto))(p.hparams), torch.func.grad(size(mixed))(p.hparams))
    tasks = metacal.tree.stack([p.hparams, metacal.tree.scale(0.5, p.hparams)])
    close(torch.func.vmap(size(auto))(tasks), torch.func.vmap(size(mixed))(tasks))

    def by_solve(adjoint: Any, create_graph: bool) -> list[Tensor]:
        h = metacal.tree.map(lambda x: x.clone().requires_grad_(), p.hparams)
        value = p.outer(metacal.solve(solver, p.params, h, p.steps(num_steps), adjoint), h, p.outer_batch)
        grads = torch.autograd.grad(value, metacal.tree.leaves(h), create_graph=create_graph)
        if not create_graph:
            return list(grads)
        return list(torch.autograd.grad(sum((g**2).sum() for g in grads), metacal.tree.leaves(h)))

    for create_graph in (False, True):
        close(by_solve(auto, create_graph), by_solve(mixed, create_graph))


def _with_no_aux(p: Any, h: Tree, b: Tree) -> Callable[[Tree], tuple[Tensor, tuple[()]]]:
    return lambda w: (p.inner(w, h, b), ())


def test_auto_does_not_count_what_the_objective_closes_over() -> None:
    """A frozen matrix of 2.4 MB: each step's graph has saved it, all of them share it, and the states are smaller than that."""
    frozen, x = torch.randn(300, 2000) / 300, torch.randn(1, 300)

    def inner(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return (h * torch.tanh(torch.tanh(b @ w) @ frozen) ** 2).mean()

    solver, w, h = metacal.descent(inner, optim.sgd(0.1)), torch.eye(300), torch.ones(2000)

    def estimate(mode: Any) -> metacal.HyperGradient:
        return metacal.hypergradient(lambda w, h, b: (w**2).mean(), solver, adjoints.Unrolled(mode))(solver.init(w, h), h, [x] * 20, None)

    assert int(estimate("auto").stats["kept_graph"]) == 1
    graph, mixed, auto = (peak_bytes(lambda mode=mode: estimate(mode)) for mode in ("graph", "mixed", "auto"))
    assert graph < mixed
    assert auto <= 1.1 * graph
    close(estimate("auto").hparams, estimate("graph").hparams, 1e-6)


# Attention

QKV = 0.3 * torch.randn(3, 2, 5, 8, dtype=F64, generator=torch.Generator().manual_seed(0))


def _module(module: nn.Module, training: bool) -> tuple[Callable[[Tree, Tensor], Tensor], Tree]:
    model = metacal.functional(module.to(F64).train(training))
    if isinstance(module, nn.MultiheadAttention):
        return lambda p, x: model.apply(p, x, x, x)[0], model.params
    return model.apply, model.params


ATTENTION: dict[str, Callable[[], tuple[Callable[[Tree, Tensor], Tensor], Tree]]] = {
    "causal, scaled_dot_product_attention": lambda: (
        lambda p, x: F.scaled_dot_product_attention(*(p[k] * x for k in "qkv"), is_causal=True),
        {k: QKV[i, 0, 0] + 1 for i, k in enumerate("qkv")},
    ),
    "MultiheadAttention": lambda: _module(nn.MultiheadAttention(8, 2, batch_first=True), True),
    "MultiheadAttention, eval": lambda: _module(nn.MultiheadAttention(8, 2, batch_first=True), False),
    "TransformerEncoderLayer": lambda: _module(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True), True),
    "TransformerEncoderLayer, eval": lambda: _module(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True), False),
}


def test_attention_is_fused_where_nobody_differentiates_its_gradient() -> None:
    """A plain run trains as torch does; what is differentiated again is computed by the mathematics."""
    fused: list[bool] = []

    def inner(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
        fused.append(torch.backends.cuda.flash_sdp_enabled())  # of every device, in spite of its name
        return (h * w**2).sum()

    solver, w, h = metacal.descent(inner, optim.sgd(0.1)), torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)

    def seen(call: Callable[[], Any]) -> list[bool]:
        fused.clear()
        call()
        return list(fused)

    def estimate(adjoint: Any) -> Callable[[], Any]:
        return lambda: metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)(solver.init(w, h), h, [QKV] * 2, None)

    assert seen(lambda: metacal.run(solver, solver.init(w, h), h, [QKV] * 3)) == [False, True, True]  # the first shows if it draws
    assert seen(estimate(adjoints.Unrolled("graph"))) == [False, False]
    assert seen(estimate(adjoints.Unrolled())) == [True, True, False, False]
    assert seen(estimate(adjoints.Unrolled("reverse"))) == [False, False]  # the last segment is recorded at once
    assert seen(estimate(adjoints.Implicit(linear.Identity())))[:2] == [True, True]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_of_what_draws_noise_is_never_fused() -> None:
    """Fused kernels may drop out other entries: not even where an objective begins to draw after it was looked at."""
    fused: list[bool] = []
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double()
    f, x = metacal.functional(net), torch.ones(3, 2, dtype=F64)

    def inner(w: Any, h: Tensor, b: Tensor) -> Tensor:
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return (h * f.apply(w, b) ** 2).sum()

    def estimate() -> metacal.HyperGradient:
        torch.manual_seed(0)
        fused.clear()
        estimate = metacal.hypergradient(lambda w, h, b: w["0.weight"].sum(), solver, adjoints.Unrolled())
        return estimate(solver.init(f.params, h), h, [x] * 3, None)

    solver, h = metacal.descent(inner, optim.sgd(0.1)), torch.ones(2, dtype=F64)
    truth = estimate()
    assert not any(fused)
    solver = metacal.descent(inner, optim.sgd(0.1))
    net.eval()
    estimate()
    assert fused[:3] == [False, True, True]
    net.train()
    close(estimate()[:3], truth[:3], 1e-14)
    assert fused[:3] == [True] * 3  # the run that is thrown away
    assert not any(fused[3:])


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    apply, params = ATTENTION[name]()
    x = QKV[0]

    def inner(p: Tree, h: Tensor, b: Tensor) -> Tensor:
        return (h * apply(p, b).square().mean((0, 1))).sum() + 0.5 * sum((w**2).sum() for w in p.values())

    def outer(p: Tree, h: Tensor, b: Tensor) -> Tensor:
        return apply(p, b + 1).sum()

    def run(adjoint: Any, h: Tensor) -> metacal.HyperGradient:
        torch.manual_seed(2)
        solver = metacal.descent(inner, optim.sgd(0.05))
        return metacal.hypergradient(outer, solver, adjoint)(solver.init(params, h), h, [x] * 3, x)

    h = torch.linspace(0.5, 1.0, 8, dtype=F64)
    truth = run(adjoints.Unrolled("reverse"), h).hparams
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second-order product may take the long way
        for adjoint in (adjoints.Unrolled(), adjoints.Unrolled("graph"), adjoints.Unrolled("auto")):
            close(run(adjoint, h).hparams, truth)
        torch.manual_seed(2)
        learned = h.clone().requires_grad_()
        solved = metacal.solve(metacal.descent(inner, optim.sgd(0.05)), params, learned, [x] * 3, adjoints.Unrolled("graph"))
        close(torch.autograd.grad(outer(solved, learned, x), learned)[0], truth)
        d = torch.cos(torch.arange(8, dtype=F64))
        there, back = (run(adjoints.Unrolled(), h + s * 1e-4 * d).value for s in (1, -1))
        close((truth @ d), (there - back) / 2e-4, 1e-6)
        implicit = run(adjoints.Implicit(linear.CG(20), damping=1e4), h)
    assert float(implicit.stats["linear_residual"]) < 1e-6
    # F_h^T (H + 1e4 I)^-1 ct, where H is small beside 1e4: the first term of its series is within a percent.
    close(implicit.hparams, run(adjoints.Implicit(linear.Identity()), h).hparams / 1e4, 0.01)


# Mixed precision


@pytest.mark.parametrize("adjoint", [adjoints.Unrolled(), adjoints.Unrolled("reverse"), adjoints.Unrolled("graph")], ids=lambda a: a.mode)
def test_an_autocast_objective_keeps_its_derivatives_in_float32(adjoint: Any) -> None:
    module, x = mlp(6, 16, 16, 3), torch.randn(32, 6)
    y = torch.arange(32) % 3

    def estimate(dtype: torch.dtype, autocast: bool) -> metacal.HyperGradient:
        model = metacal.functional(module.to(dtype))
        hparams = {"weights": torch.linspace(0.5, 1.5, 32, dtype=dtype), "lr": torch.tensor(0.2, dtype=dtype)}

        def inner(p: Tree, h: Tree, b: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model.apply(p, b)
            assert logits.dtype == (torch.bfloat16 if autocast else dtype)
            return (h["weights"] * F.cross_entropy(logits.to(dtype), y, reduction="none")).mean()

        solver = metacal.descent(inner, lambda h: optim.sgd(h["lr"], momentum=0.5))
        outer = metacal.hypergradient(lambda p, h, b: F.cross_entropy(model.apply(p, b), y), solver, adjoint)
        assert solver.descent is not None
        parts = (model.params, hparams, x.to(dtype), ())
        for tree in (solver.descent.gradient(*parts)[0], *solver.descent.products(*parts, model.params)):
            assert {leaf.dtype for leaf in metacal.tree.leaves(tree)} == {dtype}
        return outer(solver.init(model.params, hparams), hparams, [x.to(dtype)] * 12, x.to(dtype))

    exact, rounded = estimate(F64, False), estimate(torch.float32, True)
    for a, b in ((rounded.hparams["lr"], exact.hparams["lr"]), (rounded.hparams["weights"], exact.hparams["weights"])):
        close(a, b, 0.05)  # some ten roundings to 8 bits
    assert {leaf.dtype for leaf in metacal.tree.leaves((rounded.hparams, rounded.params, rounded.state.params))} == {torch.float32}


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_sums_over_steps_and_micro_batches_outlive_bfloat16(mode: Any) -> None:
    """Four hundred equal terms: a sum in bfloat16 stops at 256 of them."""
    steps, low = 400, torch.bfloat16
    solver = metacal.descent(lambda w, h, b: (w * h.to(w.dtype)).sum(), optim.sgd(1.0))
    w, h = torch.zeros(1), torch.ones(1, dtype=low)
    found = metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoints.Unrolled(mode))(solver.init(w, h), h, [None] * steps, None)
    assert found.hparams.dtype == low
    assert float(found.hparams) == -steps

    pieces = metacal.descent(metacal.microbatched(lambda w, h, b: (w * b).sum(), steps), optim.sgd(1.0))
    assert pieces.descent is not None
    gradient, _ = pieces.descent.gradient(torch.zeros(1, dtype=low), {}, torch.ones(steps, dtype=low), ())
    assert gradient.dtype == low
    assert float(gradient) == 1.0


# What torch has no rule for


class Opaque(torch.autograd.Function):
    """A cube of the kind that torch.func cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * ct


W, D = f64(0.5, -1.0, 0.7), f64(1.0, -2.0, 0.3)


@pytest.mark.filterwarnings("ignore::metacal.operators.NoForwardModeWarning")
@pytest.mark.parametrize("learned", ["params", "hparams", "direction"])
def test_a_double_backward_product_stays_attached(learned: str) -> None:
    """To whichever of its arguments requires grad: d/dh of sum (h w^3)'' d = 6 h w d."""

    def product(w: Tensor, h: Tensor, d: Tensor) -> Tensor:
        loss = operators.Loss(lambda w, h, b, c: ((h * Opaque.apply(w)).sum(), c))
        operators.hessian_product(loss, w.detach(), h.detach(), None, (), d.detach())  # learns that there is no forward mode
        return operators.hessian_product(loss, w, h, None, (), d)

    values = {"params": W, "hparams": f64(1.0, 2.0, 0.5), "direction": D}
    values[learned] = values[learned].clone().requires_grad_()
    w, h, d = values.values()
    got = product(w, h, d)
    close(got, 6 * h * w * d, 1e-13)
    (grad,) = torch.autograd.grad(got.sum(), values[learned])
    close(grad, {"params": 6 * h * d, "hparams": 6 * w * d, "direction": 6 * h * w}[learned], 1e-13)


@pytest.mark.filterwarnings("ignore::metacal.operators.NoForwardModeWarning")
def test_a_function_without_setup_context_is_right_or_refused_with_the_remedy() -> None:
    def estimate(h: Tensor, cube: Callable[[Tensor], Tensor], adjoint: Any, which: str = "descent") -> Tensor:
        inner = lambda w, h, b: (h * cube(w)).sum() + (w**2).sum()  # noqa: E731
        solver = metacal.descent(inner, optim.sgd(0.05))
        if which == "fixed_point":
            solver = metacal.fixed_point(lambda w, h, b: 0.3 * cube(w) + h)
        return metacal.hypergradient(lambda w, h, b: w.sum(), solver, adjoint)(solver.init(W, h), h, [None] * 3, None).hparams

    h, plain = f64(0.2, 0.1, 0.3), lambda w: w**3
    for adjoint in (adjoints.Unrolled(), adjoints.Unrolled("reverse"), adjoints.Unrolled("auto"), adjoints.Implicit(linear.CG(3))):
        close(estimate(h, Opaque.apply, adjoint), estimate(h, plain, adjoint), 1e-12)
        for transform, at in ((torch.func.vmap, torch.stack([h, h])), (torch.func.jacrev, h), (torch.func.jacfwd, h)):
            with pytest.raises(RuntimeError, match=r"torch\.autograd\.Function without setup_context.*generate_vmap_rule.*loop over tasks"):
                transform(lambda x, adjoint=adjoint: estimate(x, Opaque.apply, adjoint))(at)
    with pytest.raises(RuntimeError, match="without setup_context"):
        estimate(h, Opaque.apply, adjoints.Implicit(linear.CG(3)), "fixed_point")


# States in host memory


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_offloaded_states_leave_the_device(mode: Any) -> None:
    from metacal.diagnostics import peak_bytes as peak_bytes_on

    w, h, x = (t.cuda() for t in (torch.eye(256, dtype=F64), torch.ones(256, dtype=F64), torch.linspace(-1, 1, 256, dtype=F64)[None]))
    solver = metacal.descent(lambda w, h, b: (h * torch.tanh(b @ w) ** 2).mean(), optim.sgd(0.1, momentum=0.9))
    state, steps = solver.init(w, h), 36

    def estimate(offload: bool) -> metacal.HyperGradient:
        adjoint = adjoints.Unrolled(mode, segment=1, offload=offload)
        return metacal.hypergradient(lambda w, h, b: (w**2).mean(), solver, adjoint)(state, h, [x] * steps, None)

    close(estimate(True).hparams, estimate(False).hparams, 1e-15)
    assert {leaf.device.type for leaf in metacal.tree.leaves(tuple(estimate(True)[1:4]))} == {"cuda"}
    kept, moved = (peak_bytes_on(lambda offload=offload: estimate(offload), "cuda") for offload in (False, True))
    assert kept - moved >= (steps - 4) * metacal.tree.num_bytes(state)


def test_offloaded_states_are_on_the_host_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device there is nothing to move: what is asked for is counted."""
    asked: list[str] = []
    to = metacal.tree.to
    monkeypatch.setattr(metacal.tree, "to", lambda x, target, **more: (asked.append(str(target)), to(x, target, **more))[1])
    p = PROBLEMS["multi_leaf"]
    solver = metacal.descent(p.inner, optim.adam(0.1))
    run = (solver.init(p.params, p.hparams), p.hparams, p.steps(9), p.outer_batch)
    metacal.hypergradient(p.outer, solver, adjoints.Unrolled())(*run)
    assert not asked
    metacal.hypergradient(p.outer, solver, adjoints.Unrolled(offload=True))(*run)
    # In segments of 3, 3, 2 and 1: four starts and nine steps go out; three starts and nine steps, each with its gradient, come back.
    assert len(asked) == 4 + 9 + 2 * (3 + 9)
    assert set(asked) == {"cpu"}


@pytest.mark.parametrize("mode", ["mixed", "reverse", "auto"])
def test_a_second_backward_through_solve_gives_the_number_of_the_first(mode: Any) -> None:
    """The states of the forward run are used up by the first: the second runs again, with the noise of that run."""

    def inner(w: Tensor, h: Tensor, b: Any) -> Tensor:
        return ((w - h) ** 2 * torch.rand(2, dtype=torch.float64)).sum()

    solver = metacal.descent(inner, optim.sgd(0.3))
    h = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = metacal.solve(solver, torch.zeros(2, dtype=torch.float64), h, [None] * 5, adjoints.Unrolled(mode)).sin().sum()
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    torch.rand(3)
    (second,) = torch.autograd.grad(loss, h)
    assert first.norm() > 0
    assert torch.allclose(first, second, rtol=1e-12, atol=0)


def test_four_parts_make_a_descent() -> None:
    """A step of one's own: what follows from gradient, products and update is filled in."""
    w, h = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.3, 0.4], dtype=F64)
    made = metacal.descent(lambda w, h, b: (w**3 * h).sum(), optim.sgd(0.1, momentum=0.9))
    assert made.descent is not None
    parts = metacal.Descent(lambda w, h, b: (w**3 * h).sum(), *made.descent[1:4])  # the objective as users write it
    own = made._replace(descent=parts, step=DescentStep(parts))
    assert own.taken_apart is parts
    adjoints_ = (metacal.adjoints.Unrolled(), metacal.adjoints.Unrolled("auto"), metacal.adjoints.SAMA())
    for adjoint in (*adjoints_, metacal.adjoints.Implicit(metacal.linear.Neumann(3, 0.01))):
        found = [
            metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoint)(
                solver.init(w, h), h, metacal.repeat(None, 3), None
            ).hparams
            for solver in (made, own)
        ]
        close(found[1], found[0], 1e-14)


# Steps that somebody wrapped


def clamped(base: metacal.InnerSolver) -> metacal.InnerSolver:
    """The same with a projection behind every step."""

    def step(state: metacal.InnerState, h: Tree, b: Tree) -> metacal.InnerState:
        after = base.step(state, h, b)
        return after._replace(params=after.params.clamp(-0.5, 0.5))

    return base._replace(step=step)


@pytest.mark.parametrize("mode", ["mixed", "reverse", "graph", "auto"])
def test_a_wrapped_step_is_the_step_that_is_differentiated(mode: Any) -> None:
    """Also where a step would be taken apart: under transforms, and with micro-batches. One coordinate runs into the wall at 0.5."""
    h, x = f64(1.0, 0.2), f64(1.0, 1.0)
    share = 1 - 0.4**5  # w_2 = share h_2; w_1 = 0.5 whatever h_1 is
    truth = f64(0.0, 3 * (share * 0.2) ** 2 * share)

    def objective(w: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return ((w - h) ** 2 * b[:, None]).mean(0).sum()

    def call(h: Tensor, inner: Any = objective) -> Tensor:
        solver = clamped(metacal.descent(inner, optim.sgd(0.3)))
        assert solver.taken_apart is None
        estimate = metacal.hypergradient(lambda w, h, b: (w**3).sum(), solver, adjoints.Unrolled(mode))
        return estimate(solver.init(torch.zeros_like(h), h), h, metacal.repeat(x, 5), None).hparams

    close(call(h), truth, 1e-14)
    close(call(h, metacal.microbatched(objective, 2)), truth, 1e-14)
    if mode != "graph":
        close(torch.func.vmap(call)(h[None])[0], truth, 1e-14)


def test_what_takes_a_step_apart_refuses_a_wrapped_one() -> None:
    solver = clamped(metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.3)))
    h = f64(1.0, 0.2)
    with pytest.raises(ValueError, match="`solver` should take the step that its descent makes"):
        adjoints.SAMA().vjp(solver, solver.init(h, h), h, [None])
    with pytest.raises(ValueError, match="`solver` should take the step that its descent makes"):
        metacal.single_loop.soba(lambda w, h, b: (w**2).sum(), solver, optim.sgd(0.1), step_size=0.1)


def test_new_parts_have_what_follows_from_them() -> None:
    made = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.25)).descent
    assert made is not None
    halved = made._replace(gradient=lambda *at: ((g := made.gradient(*at))[0] / 2, g[1]))
    w, h = f64(0.0), f64(1.0)
    after, grads = halved.step(metacal.InnerState(w, optim.sgd(0.25).init(w)), h, None)
    close(grads, f64(-1.0), 0)
    close(after.params, f64(0.25), 0)
    assert made._replace(step=halved.step)[:5] == made[:5]  # what is replaced is what is given


# Batches that are drawn where they are read


class Drawn:
    """Six batches of noise: a data set with random augmentations is such a sequence."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < 6:
            raise IndexError(i)
        return torch.randn(4, dtype=F64)


RUNS = [adjoints.Unrolled(), adjoints.Unrolled(segment=1), adjoints.Unrolled("reverse"), adjoints.Unrolled("auto"), adjoints.Forward()]


@pytest.mark.parametrize("adjoint", RUNS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches_that_are_drawn_where_they_are_read(adjoint: metacal.Adjoint, dropout: float) -> None:
    """Noise of the batches and of the objective come from one generator: each replay finds it where the first pass did."""
    w, h = f64(1.0, 2.0, 3.0, 4.0), f64(0.5, 1.0, -1.0, 2.0)

    def inner(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return (F.dropout(w * x - h, dropout) ** 2).mean() + 0.1 * (w**4).sum()

    solver = metacal.descent(inner, optim.sgd(0.05, momentum=0.5))
    torch.manual_seed(0)
    v = torch.randn(4, dtype=F64)

    def value(s: float) -> Tensor:
        torch.manual_seed(0)
        return (metacal.run(solver, solver.init(w, h + s * v), h + s * v, Drawn()).params ** 2).sum()

    slope, after = (value(1e-5) - value(-1e-5)) / 2e-5, torch.rand(())
    torch.manual_seed(0)
    found = metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoint)(solver.init(w, h), h, Drawn(), None)
    close(torch.rand(()), after, 0)  # the generator stands where a plain run leaves it
    close(found.value, value(0.0), 1e-12)
    close((found.hparams * v).sum(), slope, 1e-8)


@pytest.mark.parametrize("adjoint", [adjoints.Implicit(linear.CG(3)), adjoints.FiniteDifference(), adjoints.SAMA()])
def test_a_system_of_drawn_batches_draws_apart(adjoint: metacal.Adjoint) -> None:
    w, h = f64(1.0, 2.0, 3.0, 4.0), f64(0.5, 1.0, -1.0, 2.0)
    solver = metacal.descent(lambda w, h, x: ((w * x - h) ** 2).mean() + 0.1 * (w**4).sum(), optim.sgd(0.05))
    torch.manual_seed(0)
    metacal.run(solver, solver.init(w, h), h, Drawn())
    after = torch.rand(())
    torch.manual_seed(0)
    metacal.hypergradient(lambda w, h, b: (w**2).sum(), solver, adjoint)(solver.init(w, h), h, Drawn(), None)
    close(torch.rand(()), after, 0)


# A backward pass that comes later


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
@pytest.mark.parametrize("segment", [None, 1])
def test_steps_are_taken_again_in_the_precision_in_which_they_were_taken(mode: Any, segment: int | None) -> None:
    """Forward under autocast, backward outside of it, which is how torch wants it: as in a graph, which keeps what it computed."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(32, 8)
    model, h = metacal.functional(net), torch.zeros(32, requires_grad=True)
    solver = metacal.descent(lambda w, h, b: (h.sigmoid() * model.apply(w, b)[:, 0].float() ** 2).mean(), optim.sgd(0.5))

    def gradient(adjoint: metacal.Adjoint) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            w = metacal.solve(solver, model.params, h, metacal.repeat(x, 4), adjoint)
            loss = model.apply(w, x).float().square().mean()
        (found,) = torch.autograd.grad(loss, h)
        return found

    truth = gradient(adjoints.Unrolled("graph"))
    close(gradient(adjoints.Unrolled(mode, segment=segment)), truth, 1e-5)
    assert not torch.is_autocast_enabled("cpu")
