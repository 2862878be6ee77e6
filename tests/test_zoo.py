"""Every adjoint through the module zoo: what real modules do (sharing, recurrence, normalisation, attention, noise) x methods.

Three references that share no code with the package: a loop on plain autograd (torch's own double backward), plain training of the
module itself by ``torch.optim`` with central differences around it, and dense second derivatives at the last state.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metacal
from metacal import adjoints, linear, optim
from problems import (
    F64,
    OPTIMIZERS,
    Tree,
    close,
    derivative,
    difference_gradient,
    direct_solve,
    f64,
    implicit_gradient,
    leaf_grads,
    loop,
    neumann_series,
    ravel,
    tree_map,
    unravel,
)

LR, MOMENTUM, NUM_STEPS, NUM_SAMPLES = 0.1, 0.5, 2, 4
MOMENTUM_SGD = OPTIMIZERS["momentum0.9"]
HYPER = {"lr": LR, "momentum": MOMENTUM}


# The zoo. Each returns predictions of shape [n, 2].


class SharedSubModule(nn.Module):
    """One layer under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))))


class TiedLinear(nn.Module):
    """Two layers with one weight and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))[:, :2]


class PartiallyUsed(nn.Module):
    """A parameter of which one row counts, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.unused, self.out = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x * self.rows[1]))


class Recurrent(nn.Module):
    """The last output of a recurrent layer plus its last state: a tuple, for LSTM a nested one."""

    def __init__(self, kind: type[nn.Module], bidirectional: bool = False) -> None:
        super().__init__()
        self.cell = kind(2, 2, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.cell(x)
        return out[:, -1, :2] + 0.5 * (state[0] if isinstance(state, tuple) else state)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = torch.tanh(self.body(x))
        return self.mean(z), {"scale": torch.sigmoid(self.scale(z))}


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].requires_grad_(False)
    return net


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))


def perceptron(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2))


def vectors(n: int) -> Tensor:
    return torch.randn(n, 3)


def written_out(module: nn.Module) -> nn.Module:
    """torch's fused weight norm has a wrong second derivative; its formula has not."""
    for m in module.modules():
        if type(m).__name__ == "_WeightNorm":
            m.forward = lambda g, v: g * v / (v * v).sum(1, keepdim=True).sqrt()  # type: ignore[method-assign]
    return module


@dataclass(frozen=True)
class Exhibit:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = vectors
    predict: Callable[[Any], Tensor] = lambda out: out


ZOO = {
    "shared sub-module": Exhibit(SharedSubModule),
    "tied linear": Exhibit(TiedLinear),
    "partially used": Exhibit(PartiallyUsed),
    "frozen layer": Exhibit(frozen),
    "rnn": Exhibit(lambda: Recurrent(nn.RNN), lambda n: torch.randn(n, 3, 2)),
    "gru": Exhibit(lambda: Recurrent(nn.GRU, bidirectional=True), lambda n: torch.randn(n, 3, 2)),
    "lstm": Exhibit(lambda: Recurrent(nn.LSTM), lambda n: torch.randn(n, 3, 2)),
    "batch norm": Exhibit(lambda: perceptron(nn.BatchNorm1d(4))),
    "group norm": Exhibit(lambda: perceptron(nn.GroupNorm(2, 4))),
    "layer norm": Exhibit(lambda: perceptron(nn.LayerNorm(4))),
    "attention": Exhibit(Attention, lambda n: torch.randn(n, 3, 4)),
    "conv": Exhibit(convolutional, lambda n: torch.randn(n, 1, 4, 4)),
    "embedding": Exhibit(embedding, lambda n: torch.arange(2 * n).reshape(n, 2) % 5),
    "dropout": Exhibit(lambda: perceptron(nn.Dropout(0.4))),
    "weight norm": Exhibit(weight_norm),
    "tuple outputs": Exhibit(TwoOutputs, predict=lambda out: out[0] * out[1]["scale"]),
}


class Hung:
    """An exhibit as a bi-level problem: samples are weighted and targets scaled by the hyperparameters."""

    def __init__(self, name: str) -> None:
        self.name, self.exhibit = name, ZOO[name]
        torch.manual_seed(1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(F64)
        try:
            self.module = self.exhibit.make()
            self.batches = [
                {"x": self.exhibit.inputs(NUM_SAMPLES), "y": torch.randn(NUM_SAMPLES, 2), "i": torch.arange(NUM_SAMPLES)}
                for _ in range(NUM_STEPS)
            ]
            self.outer_batch = {"x": self.exhibit.inputs(3), "y": torch.randn(3, 2)}
        finally:
            torch.set_default_dtype(before)
        self.hparams = {"weights": torch.linspace(-0.5, 0.5, NUM_SAMPLES, dtype=F64), "scale": f64(0.8)}
        self.pristine = written_out(copy.deepcopy(self.module))
        self.pure = metacal.functional(self.module, batch_norm="batch" if name == "batch norm" else "carry")
        self.params = {k: p.detach().clone() for k, p in self.module.named_parameters() if p.requires_grad}
        assert self.pure.params.keys() == self.params.keys()

    # The objectives of an arbitrary way to call the module: the package's, torch's own functional_call, or the module itself.

    def loss(self, out: Any, h: Tree, b: Tree) -> Tensor:
        error = self.exhibit.predict(out) - h["scale"] * b["y"]
        return (h["weights"].exp()[b["i"]] * (error**2).sum(1)).mean()

    def score(self, out: Any, h: Tree, b: Tree) -> Tensor:
        return ((self.exhibit.predict(out) - b["y"]) ** 2).mean() + 0.1 * h["scale"] ** 2

    def inner(self, p: Tree, h: Tree, b: Tree) -> Tensor:
        return self.loss(self.pure.apply(p, b["x"]), h, b)

    def outer(self, p: Tree, h: Tree, b: Tree) -> Tensor:
        return self.score(self.pure.apply(p, b["x"]), h, b)

    def torch_call(self, p: Tree, b: Tree) -> Any:
        # On a copy: torch's functional_call leaves a module that holds a sub-module twice with the values it was called with.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(copy.deepcopy(self.pristine), p, (b["x"],))

    def torch_inner(self, p: Tree, h: Tree, b: Tree) -> Tensor:
        return self.loss(self.torch_call(p, b), h, b)

    def torch_outer(self, p: Tree, h: Tree, b: Tree) -> Tensor:
        return self.score(self.torch_call(p, b), h, b)

    def trained(self, h: Tree) -> Tensor:
        """The outer value after plain training of the module."""
        net = copy.deepcopy(self.module)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR, momentum=MOMENTUM)
        torch.manual_seed(5)
        for b in self.batches:
            optimizer.zero_grad()
            self.loss(net(b["x"]), h, b).backward()
            optimizer.step()
        return self.score(net(self.outer_batch["x"]), h, self.outer_batch).detach()

    # References, from one seed

    @functools.cached_property
    def end(self) -> Tree:
        return self.run(self.hparams)[0]

    def run(self, h: Tree) -> tuple[Tree, Tensor]:
        """The last params and what the generator holds then."""
        torch.manual_seed(5)
        w = loop(self.torch_inner, MOMENTUM_SGD, leaf_grads(self.params), h, self.batches, HYPER)
        return tree_map(torch.Tensor.detach, w), torch.get_rng_state()

    @functools.cached_property
    def unrolled(self) -> tuple[Tensor, Tree, Tree]:
        p, h = leaf_grads(self.params), leaf_grads(self.hparams)
        torch.manual_seed(5)
        value = self.torch_outer(loop(self.torch_inner, MOMENTUM_SGD, p, h, self.batches, HYPER), h, self.outer_batch)
        return value.detach(), derivative(value, p, create_graph=True), derivative(value, h)

    def implicit(self, inverse: Callable[[Tensor, Tensor], Tensor], damping: float = 0.0) -> Tree:
        return implicit_gradient(
            self.torch_inner, self.torch_outer, self.end, self.hparams, self.batches[-1], self.outer_batch, inverse, damping
        ).hparams

    def direct(self) -> tuple[Tree, Tree]:
        """d outer / d params and d outer / d hparams at the last state."""
        p, h = leaf_grads(self.end), leaf_grads(self.hparams)
        torch.set_rng_state(self.run(self.hparams)[1])
        value = self.torch_outer(p, h, self.outer_batch)
        return derivative(value, p, create_graph=True), derivative(value, h)

    def difference(self, radius: float, step_size: float) -> Tree:
        args = self.torch_inner, self.torch_outer, self.end, self.hparams, self.batches[-1], self.outer_batch, radius
        return difference_gradient(*args, lambda ct: tree_map(lambda x: step_size * x, ct)).hparams


@functools.cache
def hung(name: str) -> Hung:
    return Hung(name)


def estimate(p: Hung, adjoint: Any, hparams: Tree | None = None, **over: Any) -> metacal.HyperGradient:
    solver = metacal.descent(over.get("inner", p.inner), optim.sgd(LR, momentum=MOMENTUM))
    hparams = p.hparams if hparams is None else hparams
    torch.manual_seed(5)
    with warnings.catch_warnings():
        # A few terms of a series on the indefinite Hessian of a network: said to be unreliable, and exactly the series.
        warnings.simplefilter("ignore", linear.UnreliableHypergradient)
        return metacal.hypergradient(over.get("outer", p.outer), solver, adjoint)(
            solver.init(p.params, hparams), hparams, p.batches, p.outer_batch
        )


# The columns


@dataclass(frozen=True)
class Column:
    adjoint: Any
    truth: Callable[[Hung], Tree]
    tolerance: float = 1e-10


COLUMNS = {
    **{f"unrolled {mode}": Column(adjoints.Unrolled(mode=mode), lambda p: p.unrolled[2]) for mode in ("mixed", "reverse", "graph", "auto")},
    # Damped: redundant parameters (the two biases of a recurrent layer, one that nothing reads) make many of these Hessians singular.
    "implicit dense": Column(adjoints.Implicit(linear.Dense(), damping=0.3), lambda p: p.implicit(direct_solve, 0.3), 1e-9),
    "implicit Neumann": Column(adjoints.Implicit(linear.Neumann(3, 0.1)), lambda p: p.implicit(neumann_series(3, 0.1))),
    "implicit identity": Column(adjoints.Implicit(linear.Identity()), lambda p: p.implicit(lambda matrix, b: b)),
    # The last update moves by lr times the new gradient, whatever the momentum.
    "finite difference": Column(adjoints.FiniteDifference(radius=0.05), lambda p: p.difference(0.05, 1.0), 1e-9),
    "SAMA": Column(adjoints.SAMA(radius=0.05), lambda p: p.difference(0.05, LR), 1e-9),
    "forward": Column(adjoints.Forward(), lambda p: p.unrolled[2]),
    "first order": Column(adjoints.FirstOrder(), lambda p: p.direct()[1], 1e-12),
}
NOISE = "one linear solve draws noise of its own, that of no step: law 8 compares solvers on it"
NOT_APPLICABLE = {
    **{(name, "dropout"): NOISE for name in COLUMNS if name.startswith("implicit") or name in ("finite difference", "SAMA")},
}


def cells() -> list[Any]:
    return [
        pytest.param(
            column,
            name,
            id=f"{name} | {column}",
            marks=[pytest.mark.not_applicable(reason=NOT_APPLICABLE[column, name])] if (column, name) in NOT_APPLICABLE else [],
        )
        for name in ZOO
        for column in COLUMNS
    ]


@pytest.mark.parametrize("name", ZOO)
def test_the_references_agree(name: str) -> None:
    """torch's double backward through the loop is the slope of plain training of the module itself."""
    p = hung(name)
    value, _, d_hparams = p.unrolled
    close(p.trained(p.hparams), value, 1e-12)
    at = ravel(p.hparams)
    e, u = 1e-3, torch.cos(1 + torch.arange(len(at), dtype=F64))
    at_distance = {k: p.trained(unravel(p.hparams, at + k * e * u)) for k in (-2, -1, 1, 2)}
    slope = (8 * (at_distance[1] - at_distance[-1]) - (at_distance[2] - at_distance[-2])) / (12 * e)
    close(slope, ravel(d_hparams) @ u, 1e-8)


@pytest.mark.parametrize(("column", "name"), cells())
def test_hypergradient(column: str, name: str) -> None:
    p, row = hung(name), COLUMNS[column]
    own = dict(p.module.state_dict(keep_vars=True))
    before = {k: v.detach().clone() for k, v in own.items()}
    hg = estimate(p, row.adjoint)
    close(hg.value, p.unrolled[0], 1e-12)
    close(hg.hparams, row.truth(p), row.tolerance)
    if column.startswith("unrolled"):
        close(hg.params, p.unrolled[1])
    if column == "first order":
        close(hg.params, p.direct()[0], 1e-12)
    assert int(hg.stats["first_bad_step"]) == -1
    for k, v in p.module.state_dict(keep_vars=True).items():
        assert v is own[k], f"{k} is another tensor"
        assert torch.equal(v, before[k]), k
        assert v.grad is None, k


@pytest.mark.parametrize("mode", ["mixed", "reverse", "graph"])
def test_batch_norm_as_carry(mode: Any) -> None:
    """Law 13: params and running statistics as plain training leaves them, the hypergradient as the loop has it."""
    p = hung("batch norm")
    f = metacal.functional(p.module)

    def inner(w: Tree, h: Tree, b: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        out, carry = f.apply(w, b["x"], carry=carry)
        return p.loss(out, h, b), carry

    solver = metacal.descent(inner, optim.sgd(LR, momentum=MOMENTUM), carry=f.buffers)
    run = metacal.hypergradient(lambda w, h, b: p.score(f.apply(w, b["x"]), h, b), solver, adjoints.Unrolled(mode=mode))
    hg = run(solver.init(f.params, p.hparams), p.hparams, p.batches, p.outer_batch)
    close(hg.hparams, p.unrolled[2])
    close(hg.params, p.unrolled[1])
    net = copy.deepcopy(p.module)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    for b in p.batches:
        optimizer.zero_grad()
        p.loss(net(b["x"]), p.hparams, b).backward()
        optimizer.step()
    close(hg.state.params, {k: v.detach() for k, v in net.named_parameters()}, 1e-12)
    assert hg.state.carry.keys() == dict(net.named_buffers()).keys()
    for name, buffer in net.named_buffers():
        close(hg.state.carry[name].to(F64), buffer.to(F64), 1e-13)


@pytest.mark.parametrize("name", ["shared sub-module", "gru", "batch norm", "attention", "embedding"])
def test_random_directions(name: str) -> None:
    """With one hyperparameter a sign is its own inverse: the sketch is exact, the zeroth order a plain central difference."""
    p, scale, radius = hung(name), {"scale": f64(0.8)}, 0.05

    def whole(h: Tree) -> Tree:
        return {"scale": h["scale"], "weights": p.hparams["weights"]}

    def run(adjoint: Any) -> Tensor:
        hg = estimate(
            p, adjoint, scale, inner=lambda w, h, b: p.inner(w, whole(h), b), outer=lambda w, h, b: p.score(p.pure.apply(w, b["x"]), h, b)
        )
        return hg.hparams["scale"]

    close(run(adjoints.ForwardSketch(num_directions=1)), p.unrolled[2]["scale"])
    d_params, d_hparams = p.direct()
    ends = [ravel(p.run(whole({"scale": scale["scale"] + sign * radius}))[0]) for sign in (1, -1)]
    truth = d_hparams["scale"] + ravel(d_params).detach() @ (ends[0] - ends[1]) / (2 * radius)
    close(run(adjoints.ZerothOrder(num_directions=2, radius=radius)), truth, 1e-9)


def test_an_operation_without_forward_mode() -> None:
    """The LSTM of a CPU in single precision: mixed mode needs none, forward mode refuses."""
    p = hung("lstm")
    f = metacal.functional(copy.deepcopy(p.module).float())
    single = metacal.tree.to((p.hparams, p.batches, p.outer_batch), torch.float32)
    hparams, batches, outer_batch = single
    solver = metacal.descent(lambda w, h, b: p.loss(f.apply(w, b["x"]), h, b), optim.sgd(LR, momentum=MOMENTUM))
    state = solver.init(f.params, hparams)

    def run(adjoint: Any) -> Tree:
        return metacal.hypergradient(lambda w, h, b: p.score(f.apply(w, b["x"]), h, b), solver, adjoint)(
            state, hparams, batches, outer_batch
        ).hparams

    close(run(adjoints.Unrolled()), p.unrolled[2], 1e-5)
    with pytest.raises(RuntimeError, match=r"(?s)forward.*Unrolled\(mode='reverse'\)"):
        run(adjoints.Forward())
