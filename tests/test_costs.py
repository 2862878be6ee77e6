"""Work and memory of the unrolled adjoints, counted and not timed.

Work is counted with torch's flop registry under a dispatch mode, in units of T plain training steps: forward and backward passes that
compute the same first gradients. Memory is the peak of allocated bytes in the profiler's record of the allocator, above what was
allocated when the call began.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import metacal
from metacal import adjoints, linear, optim
from problems import Tree, f64


class Flops(TorchDispatchMode):
    """Adds up what the registry knows: products and convolutions, forward, backward and tangent alike."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def flops(fn: Callable[[], Any]) -> int:
    with Flops() as counter:
        fn()
    return counter.total


def mlp() -> tuple[Callable[[Tree, Tensor], Tensor], Tree, Tensor]:
    sizes = [12, 16, 16, 4]
    params = {
        str(i): torch.sin(torch.arange(m * n, dtype=torch.float64)).reshape(m, n) / 4 for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }

    def net(p: Tree, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ p["0"]) @ p["1"]) @ p["2"]

    return net, params, torch.cos(torch.arange(8 * 12, dtype=torch.float64)).reshape(8, 12)


def conv() -> tuple[Callable[[Tree, Tensor], Tensor], Tree, Tensor]:
    shapes = {"a": (6, 3, 3, 3), "b": (6, 6, 3, 3), "c": (6, 6, 3, 3), "out": (6, 4)}
    params = {k: torch.sin(torch.arange(math.prod(s), dtype=torch.float64)).reshape(s) / 8 for k, s in shapes.items()}

    def net(p: Tree, x: Tensor) -> Tensor:
        for name in "abc":
            x = torch.tanh(F.conv2d(x, p[name], padding=1))
        return x.mean((-1, -2)) @ p["out"]

    return net, params, torch.cos(torch.arange(8 * 3 * 8 * 8, dtype=torch.float64)).reshape(8, 3, 8, 8)


NETS = {"mlp": mlp, "conv": conv}
LIMITS = {
    "mixed, every state kept": (adjoints.Unrolled(segment=1), 4.25),
    "mixed, default segments": (adjoints.Unrolled(), 5.25),
    "graph": (adjoints.Unrolled(mode="graph"), 3.25),
    "graph, in segments": (adjoints.Unrolled(mode="graph", segment=3), 4.25),
    "reverse": (adjoints.Unrolled(mode="reverse"), 4.25),
    "reverse, every state kept": (adjoints.Unrolled(mode="reverse", segment=1), 4.25),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("net", NETS)
def test_work(net: str, limit: str) -> None:
    apply, params, x = NETS[net]()
    labels, num_steps = torch.arange(8) % 4, 9
    hparams = {"weights": torch.ones(8, dtype=torch.float64), "lr": f64(0.1)}

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return (h["weights"] * F.cross_entropy(apply(p, b), labels, reduction="none")).mean()

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        return F.cross_entropy(apply(p, b), labels)

    def plain_step(objective: Any = inner) -> None:
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        objective(leaves, hparams, x).backward()

    adjoint, most = LIMITS[limit]
    solver = metacal.descent(inner, lambda h: optim.sgd(h["lr"], momentum=0.9))
    estimate = metacal.hypergradient(outer, solver, adjoint)
    state = solver.init(params, hparams)
    once = flops(plain_step)
    work = flops(lambda: estimate(state, hparams, [x] * num_steps, x)) - flops(lambda: plain_step(outer))
    assert once > 0
    ratio = work / (num_steps * once)
    assert ratio <= most
    # The run itself and something on top: a counter that does not see the sweep would pass any limit.
    assert ratio >= 2


def test_what_is_run_again() -> None:
    """To the operation: the last segment is not run again, nor is the last step of any where only states are wanted."""
    apply, params, x = mlp()
    labels, weights = torch.arange(8) % 4, torch.ones(8, dtype=torch.float64)

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return (h * F.cross_entropy(apply(p, b), labels, reduction="none")).mean()

    solver = metacal.descent(inner, optim.sgd(0.1, momentum=0.9))
    state = solver.init(params, weights)

    def steps(mode: Any, segment: int | None, num_steps: int = 9) -> float:
        estimate = metacal.hypergradient(inner, solver, adjoints.Unrolled(mode, segment=segment))
        return flops(lambda: estimate(state, weights, [x] * num_steps, x)) / flops(lambda: solver.step(state, weights, x))

    # Nine steps in segments of four: one, four and four.
    whole = steps("graph", None)
    for mode in ("graph", "reverse"):
        assert steps(mode, 4) - whole == pytest.approx(5)
        assert steps(mode, 1) - whole == pytest.approx(8)
    assert steps("reverse", None) - whole == pytest.approx(6)  # three of three
    assert steps("mixed", 4) - steps("mixed", 1) == pytest.approx(3)
    assert steps("mixed", None) - steps("mixed", 1) == pytest.approx(2 + 2 + 1)  # of three, three, two and one
    # Looking at a step beforehand costs one; where there is only one step it is not looked at.
    assert steps("auto", None) - min(steps("mixed", None), steps("graph", None)) >= 1
    assert steps("auto", None, 1) == steps("graph", None, 1)


@pytest.mark.parametrize("net", NETS)
def test_work_of_an_implicit_gradient(net: str) -> None:
    """A recorded gradient and K pulls of one to two, one of them more for the hparams, beside the run and the outer gradient."""
    apply, params, x = NETS[net]()
    labels, num_products, num_steps = torch.arange(8) % 4, 5, 2
    weights = torch.ones(8, dtype=torch.float64)

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return (h * F.cross_entropy(apply(p, b), labels, reduction="none")).mean()

    def plain_step() -> None:
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        inner(leaves, weights, x).backward()

    solver = metacal.descent(inner, optim.sgd(0.1))
    estimate = metacal.hypergradient(inner, solver, adjoints.Implicit(linear.Neumann(num_steps=num_products, step_size=0.01)))
    state = solver.init(params, weights)
    work = flops(lambda: estimate(state, weights, [x] * num_steps, x)) / flops(plain_step)
    assert num_products <= work - (num_steps + 1) <= 1 + 2.25 * (num_products + 1)


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The largest number of bytes held at once, above those held at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = fn()
    del kept
    held = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


def test_the_profiler_counts_bytes() -> None:
    def hold() -> Tensor:
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1
        del a
        return torch.cat([b, b])

    assert 3 * 8000 <= peak_bytes(hold) <= 3 * 8000 + 1000
    kept = torch.zeros(1000, dtype=torch.float64)
    assert peak_bytes(lambda: kept.add_(1).sum()) <= 1000, "what was there before does not count"


WIDE = 120
OPTIMIZERS: dict[str, tuple[Callable[[], Any], int]] = {
    "sgd": (lambda: optim.sgd(1e-3), 1),
    "momentum": (lambda: optim.sgd(1e-3, momentum=0.9), 2),
    "adam": (lambda: optim.adam(1e-3), 3),
}


def wide_problem() -> tuple[Any, Tree, Tree, Tensor]:
    """Weights of 115 kB each, activations of 1 kB: states are what is counted."""
    params = {k: torch.eye(WIDE, dtype=torch.float64) for k in ("a", "b")}
    x = torch.cos(torch.arange(WIDE, dtype=torch.float64))[None]

    def inner(p: Tree, h: Tree, b: Tensor) -> Tensor:
        return (h * torch.tanh(torch.tanh(b @ p["a"]) @ p["b"]) ** 2).mean()

    return inner, params, torch.ones(WIDE, dtype=torch.float64), x


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_peak_memory_of_mixed_mode_grows_as_the_square_root_of_the_steps(optimizer: str) -> None:
    """At most 2 ceil(sqrt T) + 2 states and gradients, and a constant that is that of one step."""
    inner, params, hparams, x = wide_problem()
    build, leaves_per_param = OPTIMIZERS[optimizer]
    solver = metacal.descent(inner, build())
    estimate = metacal.hypergradient(inner, solver, adjoints.Unrolled())
    state, size = solver.init(params, hparams), 2 * 8 * WIDE**2
    state_and_gradient = (leaves_per_param + 1) * size

    def over(num_steps: int) -> int:
        most = (2 * math.ceil(math.sqrt(num_steps)) + 2) * state_and_gradient
        return peak_bytes(lambda: estimate(state, hparams, [x] * num_steps, x)) - most

    estimate(state, hparams, [x], x)  # what is allocated once and kept
    excess = {num_steps: over(num_steps) for num_steps in (10, 25, 100)}
    constant = 2 * size + 100_000  # of a step's own gradients, tangents and products
    for num_steps, bytes_over in excess.items():
        assert bytes_over <= constant, f"T = {num_steps}: {bytes_over / size:.1f} params above the limit"
    assert excess[100] <= max(excess[10], 0) + size // 10


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_peak_memory_of_truncation_and_implicit_gradients_does_not_grow(mode: str) -> None:
    inner, params, hparams, x = wide_problem()
    solver = metacal.descent(inner, optim.sgd(1e-3, momentum=0.9))
    state = solver.init(params, hparams)
    chosen: tuple[Any, ...] = (adjoints.Unrolled(mode=mode, window=4),)  # type: ignore[arg-type]
    if mode == "mixed":
        chosen += (adjoints.Implicit(linear.CG(3)), adjoints.FirstOrder())
    for adjoint in chosen:
        estimate = metacal.hypergradient(inner, solver, adjoint)

        def peak(num_steps: int, estimate: Any = estimate) -> int:
            return peak_bytes(lambda: estimate(state, hparams, [x] * num_steps, x))

        peak(6)
        assert peak(40) <= peak(6) + 100_000, adjoint


def test_graph_mode_grows_with_the_steps_and_mixed_does_not() -> None:
    """The counters tell the modes apart."""
    inner, params, hparams, x = wide_problem()
    solver = metacal.descent(inner, optim.sgd(1e-3))
    state = solver.init(params, hparams)

    def peak(mode: Any, num_steps: int) -> int:
        estimate = metacal.hypergradient(inner, solver, adjoints.Unrolled(mode=mode))
        return peak_bytes(lambda: estimate(state, hparams, [x] * num_steps, x))

    size = 2 * 8 * WIDE**2  # of which a graph keeps at least the second layer's weights
    assert peak("graph", 144) - peak("graph", 16) >= 60 * size
    assert peak("mixed", 144) - peak("mixed", 16) <= 34 * size


PER_STEP = {
    "Neumann": (linear.Neumann, {"step_size": 0.01}, 1),
    "Neumann, estimated step": (linear.Neumann, {}, 1),
    "CG": (linear.CG, {}, 1),
    "CG, diagonal": (linear.CG, {"preconditioner": linear.Diagonal(2)}, 1),
    "NormalCG": (linear.NormalCG, {}, 2),
    "MINRES": (linear.MINRES, {}, 1),
    "GMRES": (linear.GMRES, {}, 1),
    "BiCGSTAB": (linear.BiCGSTAB, {}, 2),
    "Lanczos": (linear.Lanczos, {}, 1),
}


@pytest.mark.parametrize("operator", ["Hessian", "GaussNewton", "Jacobian"])
def test_a_system_of_many_batches_holds_the_graph_of_one(operator: str) -> None:
    apply, params, x = mlp()
    x = x.repeat(200, 1)  # the activations are what counts
    labels = torch.arange(len(x)) % 4

    def loss(z: Tensor, h: Tree, b: Tree) -> Tensor:
        return (h * F.cross_entropy(z, labels, reduction="none")).mean()

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return loss(apply(p, b), h, b) + 0.5 * sum((v**2).sum() for v in p.values())

    matrix = linear.GaussNewton(lambda p, h, b: apply(p, b), loss) if operator == "GaussNewton" else getattr(linear, operator)()
    adjoint = adjoints.Implicit(linear.CG(3), operator=matrix, select=linear.every)
    solver, weights = metacal.stationary(inner), torch.ones(len(x), dtype=torch.float64)
    estimate = metacal.hypergradient(inner, solver, adjoint)

    def peak(num_batches: int) -> int:
        return peak_bytes(lambda: estimate(solver.init(params, weights), weights, [x] * num_batches, x))

    peak(2)
    few, many = peak(2), peak(8)
    gradients = 6 * (weights.numel() * weights.element_size())  # of the mean over the batches: a term of F_h^T v for each
    assert many <= 1.05 * few + gradients


@pytest.mark.parametrize("operator", ["Hessian", "GaussNewton"])
@pytest.mark.parametrize("name", PER_STEP)
def test_a_linear_solvers_step_is_its_products(name: str, operator: str) -> None:
    """Two more steps of a Krylov method or a series are so many more products, each of 2.2 gradients at most, and nothing else."""
    apply, params, x = mlp()
    x = x.repeat(50, 1)  # a large batch, beside which the solvers' own inner products are nothing
    labels, weights = torch.arange(len(x)) % 4, torch.ones(len(x), dtype=torch.float64)

    def loss(z: Tensor, h: Tree, b: Tree) -> Tensor:
        return (h * F.cross_entropy(z, labels, reduction="none")).mean()

    def inner(p: Tree, h: Tree, b: Tree) -> Tensor:
        return loss(apply(p, b), h, b) + 0.5 * sum((v**2).sum() for v in p.values())  # convex enough for all of them

    def outer(p: Tree, h: Tree, b: Tree) -> Tensor:
        return sum(torch.sin(v).sum() for v in p.values())  # type: ignore[return-value]

    def plain_step() -> None:
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        inner(leaves, weights, x).backward()

    kind, settings, products_per_step = PER_STEP[name]
    solver = metacal.stationary(inner)
    matrix = linear.Hessian() if operator == "Hessian" else linear.GaussNewton(lambda p, h, b: apply(p, b), loss)
    damping = 0.0 if operator == "Hessian" else 0.01

    def work(num_steps: int) -> tuple[int, int]:
        adjoint = adjoints.Implicit(kind(num_steps, **settings), operator=matrix, damping=damping)
        estimate = metacal.hypergradient(outer, solver, adjoint)
        found: list[metacal.HyperGradient] = []
        total = flops(lambda: found.append(estimate(solver.init(params, weights), weights, [x], x)))
        return total, int(found[0].stats["num_products"])

    (less, fewer), (more, products) = work(2), work(4)
    assert products - fewer == 2 * products_per_step
    per_product = (more - less) / (products - fewer) / flops(plain_step)
    assert 1 <= per_product <= (2.2 if operator == "Hessian" else 2.05)


def test_work_of_a_matrix_times_a_vector() -> None:
    """torch's registry leaves it out, and a linear model in a vector would have done no work."""
    A, x, b = torch.ones(5, 3), torch.ones(3), torch.ones(5)
    for product in (lambda: A @ x, lambda: torch.mv(A, x), lambda: torch.addmv(b, A, x, alpha=2.0), lambda: x @ A.T):
        assert metacal.diagnostics.work(product) == 2 * 5 * 3
