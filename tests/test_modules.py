"""``functional``: a module as a pure function, and back."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metacal
from metacal import adjoints, linear, optim
from problems import OPTIMIZERS, close, direct_solve, f64, implicit_gradient, loop, relative_error, tree_map


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert all(p.grad is None for p in module.parameters())


def test_equals_the_module_and_its_gradient() -> None:
    net, x = normalised().eval(), torch.randn(7, 3)
    f = metacal.functional(net)
    assert list(f.params) == [name for name, _ in net.named_parameters()]
    close(f.apply(f.params, x), net(x), 0.0)
    got = torch.func.grad(lambda p: f.apply(p, x).square().sum())(f.params)
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        close(got[name], p.grad, 1e-14)


def test_params_are_detached_copies() -> None:
    net = normalised()
    f, before = metacal.functional(net), snapshot(net)
    for value in (*f.params.values(), *f.buffers.values()):
        assert not value.requires_grad
        assert value.grad_fn is None
        value.add_(1)
    unchanged(net, before)
    with torch.no_grad():
        next(net.parameters()).zero_()
    assert f.params["0.weight"].abs().max() > 0


def test_keyword_arguments_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Tensor]:
            return {"scaled": self.scale * x, "shifted": x + shift}

    f = metacal.functional(Two())
    out = f.apply(f.params, torch.ones(2), shift=3.0)
    assert out["scaled"].tolist() == [2.0, 2.0]
    assert out["shifted"].tolist() == [4.0, 4.0]


def test_buffers_are_carried_and_never_written_in_place() -> None:
    net = normalised()
    f, before, x = metacal.functional(net), snapshot(net), torch.randn(7, 3)
    start = {k: v.clone() for k, v in f.buffers.items()}
    out, carry = f.apply(f.params, x, carry=f.buffers)
    unchanged(net, before)
    assert all(torch.equal(start[k], f.buffers[k]) for k in start)
    reference = copy.deepcopy(net)
    close(out, reference(x), 0.0)
    for name, buffer in reference.named_buffers():
        assert torch.equal(carry[name], buffer), name
    assert not torch.equal(carry["1.running_mean"], start["1.running_mean"])
    # Without a carry the updates are dropped: two calls agree.
    close(f.apply(f.params, x), out, 0.0)
    assert all(torch.equal(start[k], f.buffers[k]) for k in start)


def test_training_mode_is_read_at_each_call() -> None:
    net, x = normalised(), torch.randn(7, 3)
    f = metacal.functional(net)
    train = f.apply(f.params, x)
    net.eval()
    assert relative_error(f.apply(f.params, x), train) > 1e-3
    net.train()
    close(f.apply(f.params, x), train, 0.0)


def test_tied_weights_appear_once_and_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.encoder(x)))

    net, x = Tied(), torch.randn(5, 4)
    f = metacal.functional(net)
    assert list(f.params) == ["encoder.weight"]
    got = torch.func.grad(lambda p: f.apply(p, x).square().sum())(f.params)
    net(x).square().sum().backward()
    close(got["encoder.weight"], net.encoder.weight.grad, 1e-14)
    f.write({"encoder.weight": torch.ones(4, 4)})
    assert net.decoder.weight is net.encoder.weight
    assert bool((net.decoder.weight == 1).all())

    solver = metacal.descent(lambda p, h, b: f.apply(p, b).square().mean() * h, optim.sgd(0.05))
    estimate = metacal.hypergradient(lambda p, h, b: f.apply(p, b).mean(), solver, adjoints.Unrolled())
    hg = estimate(solver.init(f.params, f64(1.0)), f64(1.0), [x, x], x)

    def written_out(h: Tensor) -> Tensor:
        w = f.params["encoder.weight"]
        for _ in range(2):
            w = w - 0.05 * torch.func.grad(lambda w: (torch.tanh(x @ w.T) @ w.T).square().mean() * h)(w)
        return (torch.tanh(x @ w.T) @ w.T).mean()

    close(hg.hparams, torch.func.grad(written_out)(f64(1.0)))


@pytest.mark.parametrize("batch_norm", ["carry", "batch"])
def test_frozen_parameters_are_constants(batch_norm: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    f, before, x = metacal.functional(net, batch_norm=batch_norm), snapshot(net), torch.randn(5, 3)
    assert list(f.params) == ["2.weight", "2.bias"]
    close(f.apply(f.params, x), net(x), 0.0)
    grads = torch.func.grad(lambda p: f.apply(p, x).square().sum())(f.params)
    assert grads.keys() == f.params.keys()
    f.write({k: v + 1 for k, v in f.params.items()})
    assert torch.equal(net.state_dict()["0.weight"], before["0.weight"])
    assert not net[0].weight.requires_grad
    close(net.state_dict()["2.weight"], before["2.weight"] + 1, 0.0)


def test_write_puts_values_and_statistics_back() -> None:
    net = normalised()
    pointers = {k: v.data_ptr() for k, v in net.state_dict().items()}
    f, x = metacal.functional(net), torch.randn(7, 3)
    params = {k: 2 * v for k, v in f.params.items()}
    _out, carry = f.apply(params, x, carry=f.buffers)
    f.write(params, carry)
    for name, value in {**params, **carry}.items():
        assert torch.equal(net.state_dict()[name], value), name
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == pointers, "written in place: an optimizer holding the module sees it"
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match=r"2.wieght"):
        f.write({"2.wieght": torch.zeros(2, 5)})


def test_write_of_params_alone_leaves_the_statistics() -> None:
    net = normalised()
    f = metacal.functional(net)
    before = snapshot(net)
    f.write({k: v + 1 for k, v in f.params.items()})
    assert torch.equal(net.state_dict()["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])


def test_batch_statistics_need_no_carry_and_work_under_vmap() -> None:
    net, x = normalised(), torch.randn(6, 7, 3)
    before = snapshot(net)
    f = metacal.functional(net, batch_norm="batch")
    assert not any("running" in name for name in f.buffers)

    def by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
        z = x @ p["0.weight"].T + p["0.bias"]
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
        return torch.tanh(z) @ p["3.weight"].T + p["3.bias"]

    close(f.apply(f.params, x[0]), by_hand(f.params, x[0]), 1e-13)
    mapped = torch.func.vmap(lambda x: torch.func.grad(lambda p: f.apply(p, x).square().mean())(f.params))(x)
    for i in range(len(x)):
        one = torch.func.grad(lambda p, i=i: by_hand(p, x[i]).square().mean())(f.params)
        # BatchNorm makes the first bias' derivative zero: compare with the norm of all.
        close({k: v[i] for k, v in mapped.items()}, one, 1e-12)
    unchanged(net, before)
    # Evaluation too uses the batch: there is nothing else to use.
    net.eval()
    close(f.apply(f.params, x[0]), by_hand(f.params, x[0]), 1e-13)


@pytest.mark.parametrize("dropping", [False, True])
def test_batch_statistics_leave_each_part_its_own_mode(dropping: bool) -> None:
    """In training mode the module's own BatchNorm normalises by the batch as well: it is the reference."""
    net, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)), torch.randn(7, 3)
    f = metacal.functional(net, batch_norm="batch")
    net.train(not dropping)
    net[1].train()
    net[2].train(dropping)
    torch.manual_seed(1)
    got = f.apply(f.params, x)
    torch.manual_seed(1)
    close(got, net(x), 1e-14)
    assert bool((got == 0).any()) == dropping


def test_unknown_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_norm`.*'carry'.*'batch'.*'bacth'"):
        metacal.functional(normalised(), batch_norm="bacth")  # type: ignore[arg-type]


# Law 13


@pytest.mark.parametrize("optimizer", ["sgd", "momentum0.9", "adam"])
def test_law_13_batchnorm_as_carry_equals_a_plain_torch_loop(optimizer: str) -> None:
    # No bias before the normalisation: its derivative is 0 up to rounding, which Adam would turn into steps of its own.
    row, net = OPTIMIZERS[optimizer], nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    xs, ys = torch.randn(6, 8, 3), torch.randint(0, 2, (6, 8))
    f, before = metacal.functional(net), snapshot(net)

    def inner(p: Any, h: Any, b: Any, carry: Any) -> tuple[Tensor, Any]:
        out, carry = f.apply(p, b[0], carry=carry)
        return nn.functional.cross_entropy(out, b[1]), carry

    solver = metacal.descent(inner, row.build(), carry=f.buffers)
    end = metacal.run(solver, solver.init(f.params, {}), {}, list(zip(xs, ys, strict=True)))
    unchanged(net, before)

    torch_optimizer = row.torch(list(net.parameters()))
    for x, y in zip(xs, ys, strict=True):
        torch_optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        torch_optimizer.step()
    for name, value in net.state_dict().items():
        got = {**end.params, **end.carry}[name]
        assert got.dtype == value.dtype, name
        close(got, value, 1e-12)
    assert int(end.carry["1.num_batches_tracked"]) == 6


@pytest.mark.parametrize("adjoint", ["mixed", "reverse", "graph", "implicit"])
def test_hypergradients_with_batchnorm_as_carry(adjoint: str) -> None:
    """Normalised by the batch, the statistics do not enter the loss: they come back right and change no derivative."""
    net = normalised()
    xs, ys, xv, yv = torch.randn(3, 8, 3), torch.randint(0, 2, (3, 8)), torch.randn(8, 3), torch.randint(0, 2, (8,))
    f, before = metacal.functional(net), snapshot(net)
    cross_entropy = nn.functional.cross_entropy

    def inner(p: Any, h: Any, b: Any, carry: Any) -> tuple[Tensor, Any]:
        out, carry = f.apply(p, b[0] * h["scale"], carry=carry)
        return cross_entropy(out, b[1]) + 0.05 * sum(v.square().sum() for v in p.values()), carry

    def outer(p: Any, h: Any, b: Any) -> Tensor:
        return cross_entropy(f.apply(p, b[0]), b[1])

    chosen = adjoints.Implicit(linear.Dense()) if adjoint == "implicit" else adjoints.Unrolled(mode=adjoint)  # type: ignore[arg-type]
    hparams, batches = {"scale": torch.ones(3)}, list(zip(xs, ys, strict=True))
    solver = metacal.descent(inner, optim.sgd(0.1), carry=f.buffers)
    hg = metacal.hypergradient(outer, solver, chosen)(solver.init(f.params, hparams), hparams, batches, (xv, yv))
    unchanged(net, before)

    def pure(p: Any, h: Any, b: Any) -> Tensor:
        return inner(p, h, b, f.buffers)[0]

    h = {"scale": torch.ones(3, requires_grad=True)}
    if adjoint != "implicit":
        w = loop(pure, OPTIMIZERS["sgd"], tree_map(torch.clone, f.params), h, batches)
        (truth,) = torch.autograd.grad(outer(w, h, (xv, yv)), h["scale"])
        close(hg.hparams["scale"], truth)
    else:
        w = tree_map(torch.Tensor.detach, loop(pure, OPTIMIZERS["sgd"], tree_map(torch.clone, f.params), h, batches))
        close(hg.hparams, implicit_gradient(pure, outer, w, h, batches[-1], (xv, yv), direct_solve).hparams, 1e-9)
    reference = copy.deepcopy(net)
    plain = optim_loop(reference, batches)
    close(hg.state.carry["1.running_mean"], plain["1.running_mean"], 1e-12)
    close(hg.state.carry["1.running_var"], plain["1.running_var"], 1e-12)


@pytest.mark.parametrize("adjoint", ["mixed", "reverse", "graph", "forward", "implicit", "first order"])
@pytest.mark.parametrize("logs", [False, True])
def test_an_outer_objective_in_evaluation_mode_reads_the_statistics_that_the_run_left(adjoint: str, logs: bool) -> None:
    """Value, hypergradient and direct term are those of a plain loop's network in eval mode, its statistics held constant."""
    net = normalised()
    judged = copy.deepcopy(net).eval()
    xs, ys, xv, yv = torch.randn(3, 8, 3), torch.randint(0, 2, (3, 8)), torch.randn(8, 3), torch.randint(0, 2, (8,))
    f, judge, cross_entropy = metacal.functional(net), metacal.functional(judged), nn.functional.cross_entropy

    def inner(p: Any, h: Any, b: Any, carry: Any) -> tuple[Tensor, Any]:
        out, carry = f.apply(p, b[0] * h["scale"], carry=carry)
        return cross_entropy(out, b[1]) + 0.05 * sum(v.square().sum() for v in p.values()), carry

    def judgement(p: Any, h: Any, b: Any, carry: Any) -> Any:
        loss = cross_entropy(judge.apply(p, b[0] * h["scale"], carry=carry)[0], b[1])
        return (loss, {"seen": carry["1.num_batches_tracked"].double()}) if logs else loss

    outer: Any = metacal.with_carry(judgement)
    outer = metacal.with_aux(outer) if logs else outer
    chosen: Any = {
        "implicit": adjoints.Implicit(linear.Dense()), "forward": adjoints.Forward(), "first order": adjoints.FirstOrder()
    }.get(adjoint) or adjoints.Unrolled(mode=adjoint)  # type: ignore[arg-type]  # fmt: skip
    hparams, batches = {"scale": torch.full((3,), 1.1)}, list(zip(xs, ys, strict=True))
    solver = metacal.descent(inner, optim.sgd(0.1), carry=f.buffers)
    hg = metacal.hypergradient(outer, solver, chosen)(solver.init(f.params, hparams), hparams, batches, (xv, yv))
    assert hg.aux == ({"seen": 3.0} if logs else {})

    reference = copy.deepcopy(net)
    optim_loop(reference, [(x * 1.1, y) for x, y in batches])
    reference.eval()
    close(hg.value, cross_entropy(reference(xv * 1.1), yv), 1e-12)
    last = {name: b.clone() for name, b in reference.named_buffers()}

    def plain(p: Any, h: Any, b: Any) -> Tensor:
        values = {**p, **last}
        return cross_entropy(torch.func.functional_call(reference, values, b[0] * h["scale"]), b[1])

    def pure(p: Any, h: Any, b: Any) -> Tensor:
        return inner(p, h, b, f.buffers)[0]

    h = {"scale": torch.full((3,), 1.1, requires_grad=True)}
    w = loop(pure, OPTIMIZERS["sgd"], tree_map(torch.clone, f.params), h, batches)
    if adjoint == "implicit":
        w = tree_map(torch.Tensor.detach, w)
        close(hg.hparams, implicit_gradient(pure, plain, w, h, batches[-1], (xv, yv), direct_solve).hparams, 1e-9)
        return
    w = tree_map(torch.Tensor.detach, w) if adjoint == "first order" else w
    (truth,) = torch.autograd.grad(plain(w, h, (xv, yv)), h["scale"])
    close(hg.hparams["scale"], truth)
    if adjoint == "mixed" and not logs:
        report = metacal.check(metacal.hypergradient(outer, solver, chosen), solver.init(f.params, hparams), hparams, batches, (xv, yv))
        assert report.verdict == "right"


def test_evaluation_mode_with_its_statistics_as_carry_says_what_to_do_under_vmap() -> None:
    f = metacal.functional(normalised().eval())
    x, y = torch.randn(2, 5, 3), torch.randint(0, 2, (2, 5))

    def inner(p: Any, h: Any, b: Any, carry: Any) -> tuple[Tensor, Any]:
        out, carry = f.apply(p, b[0], carry=carry)
        return nn.functional.cross_entropy(out, b[1]), carry

    def plain(p: Any, h: Any, b: Any) -> Tensor:
        return nn.functional.cross_entropy(f.apply(p, b[0]), b[1])

    def step(solver: Any, tasks: Any) -> Any:
        maml = metacal.meta_initialisation(plain, solver, adjoints.Unrolled(), optim.sgd(0.1), tasks=tasks)
        return maml.step(maml.init(f.params, {}), metacal.repeat((x, y), 2), (x, y))[1]

    carried, alone = metacal.descent(inner, optim.sgd(0.1), carry=f.buffers), metacal.descent(plain, optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"BatchNorm in evaluation mode .* as `carry`.*Leave `carry` out"):
        step(carried, "vmap")
    close(step(carried, "loop").params, step(alone, "vmap").params, 1e-12)


def test_with_carry_goes_inside_of_with_aux() -> None:
    with pytest.raises(TypeError, match=r"with_aux\(with_carry\(outer\)\)"):
        metacal.with_carry(metacal.with_aux(lambda w, h, b, c: (w.sum(), {})))
    inner = metacal.with_aux(metacal.with_carry(lambda w, h, b, c: (w.sum(), {})))
    with pytest.raises(TypeError, match="marked by with_carry, which is for outer objectives"):
        metacal.descent(inner, optim.sgd(0.1))


def optim_loop(net: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """The same inner training on the module itself."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y) + 0.05 * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        optimizer.step()
    return net.state_dict()


# Buffers that forward assigns anew


class Assigning(nn.Module):
    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        self.mean, self.count = 0.9 * self.mean + 0.1 * z.mean(0), self.count + 1
        return z - self.mean.detach()


@pytest.mark.parametrize("compile", [False, "eager"])
def test_assigned_buffers_are_carried(compile: Any) -> None:
    """The run is that of the module in a plain torch loop, and each derivative that of the loop, the buffers held constant."""
    net, xs, ones = Assigning(), list(torch.randn(4, 5, 3)), torch.ones(3)
    f, before = metacal.functional(net), snapshot(net)

    def inner(p: Any, h: Any, b: Any, carry: Any) -> tuple[Tensor, Any]:
        out, carry = f.apply(p, b * h, carry=carry)
        return out.square().mean(), carry

    def outer(p: Any, h: Any, b: Any) -> Tensor:
        return f.apply(p, b).square().mean()

    solver = metacal.descent(inner, optim.sgd(0.1), carry=f.buffers, compile=compile)
    got = [
        metacal.hypergradient(outer, solver, adjoint)(solver.init(f.params, ones), ones, xs, xs[0])
        for adjoint in (adjoints.Unrolled(), adjoints.Unrolled(mode="reverse"), adjoints.Unrolled(mode="graph"), adjoints.Forward())
    ]
    unchanged(net, before)

    weight, bias, mean = *(f.params[k].clone().requires_grad_() for k in ("layer.weight", "layer.bias")), torch.ones(2)
    h = torch.ones(3, requires_grad=True)
    for x in xs:
        z = (x * h) @ weight.T + bias
        mean = 0.9 * mean + 0.1 * z.detach().mean(0)
        g = torch.autograd.grad((z - mean).square().mean(), (weight, bias), create_graph=True)
        weight, bias = weight - 0.1 * g[0], bias - 0.1 * g[1]
    z = xs[0] @ weight.T + bias
    (truth,) = torch.autograd.grad((z - 0.9 * torch.ones(2) - 0.1 * z.detach().mean(0)).square().mean(), h)
    for hg in got:
        close(hg.hparams, truth)
        close(hg.state.params["layer.weight"], weight.detach(), 1e-12)
        close(hg.state.carry["mean"], mean, 1e-12)
        assert int(hg.state.carry["count"]) == 4

    # Without a carry they are dropped.
    close(f.apply(f.params, xs[0]), f.apply(f.params, xs[0]), 0.0)
    unchanged(net, before)


def test_assigned_buffers_under_vmap_are_those_of_each_run() -> None:
    f, xs = metacal.functional(Assigning()), torch.randn(4, 5, 3)
    mapped = torch.func.vmap(lambda x: f.apply(f.params, x, carry=f.buffers)[1]["mean"])(xs)
    close(mapped, torch.stack([0.9 + 0.1 * (x @ f.params["layer.weight"].T + f.params["layer.bias"]).mean(0) for x in xs]), 1e-14)


class Shared(nn.Module):
    """One buffer in two places."""

    total: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.child: Any = nn.Module()
        self.register_buffer("total", torch.zeros(()))
        self.child.register_buffer("total", self.total)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.child.total += x
        else:
            self.child.total = self.child.total + x
            if self.how == "both":
                self.total = self.child.total
        return self.total


@pytest.mark.parametrize("how", ["in place", "both", "one"])
def test_a_shared_buffer_stays_one(how: str) -> None:
    f = metacal.functional(Shared(how))
    assert list(f.buffers) == ["total"]
    if how == "one":
        with pytest.raises(RuntimeError, match=r"one buffer in two places, 'total' and 'child.total'.*[Aa]ssign it to both"):
            f.apply(f.params, torch.ones(()), carry=f.buffers)
        return
    carry = f.buffers
    for _ in range(3):
        out, carry = f.apply(f.params, torch.ones(()), carry=carry)
    assert (out, carry) == (3, {"total": 3})


# Names


def test_params_and_carry_are_refused_unless_they_hold_every_name() -> None:
    net, x = normalised(), torch.randn(7, 3)
    f, before = metacal.functional(net), snapshot(net)
    misspelt = {name.replace("running_mean", "runing_mean"): b for name, b in f.buffers.items()}
    for params, carry, message in [
        ({}, None, r"`params`.*functional\(module\).params is: '0.bias' is missing"),
        ({**f.params, "bais": x}, None, r"`params`.*: 'bais' is none of them"),
        (f.params, {}, r"`carry`.*functional\(module\).buffers is: '1.num_batches_tracked' is missing"),
        (f.params, misspelt, r"`carry`.*: '1.running_mean' is missing and '1.runing_mean' is none of them"),
    ]:
        with pytest.raises(ValueError, match=message):
            f.apply(params, x, carry=carry)
    with pytest.raises(TypeError, match=r"`params` should be a dict by name, as metacal.functional\(module\).params is, got list"):
        f.apply([x], x)
    with pytest.raises(TypeError, match=r"`carry` should be a dict by name, as metacal.functional\(module\).buffers is, got list"):
        f.apply(f.params, x, carry=[x])
    unchanged(net, before)


# Parameters that forward changes


class Moving(nn.Module):
    """A student and its teacher, which follows it in forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.how = nn.Linear(3, 2, bias=False), how
        self.teacher: Any = nn.Module()
        start = 2 * self.student.weight.detach()
        if how == "buffer":
            self.teacher.register_buffer("weight", start)
        else:
            self.teacher.weight = nn.Parameter(start, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.how == "constraint":
                self.student.weight.clamp_(-1, 1)
            elif self.how == "data":
                self.teacher.weight.data = (self.teacher.weight.data + self.student.weight.data) / 2
            elif self.how == "assigned":
                self.teacher.weight = nn.Parameter((self.teacher.weight + self.student.weight) / 2, requires_grad=False)
            else:
                self.teacher.weight.add_(self.student.weight.detach()).div_(2)
        return (self.student(x) - x @ self.teacher.weight.T).square().mean()


@pytest.mark.parametrize(
    ("how", "transformed"),  # torch.func refuses the first by itself, and fails at the second
    [("in place", False), ("data", False), ("assigned", False), ("assigned", True), ("constraint", False), ("constraint", True)],
)
def test_a_parameter_that_forward_changes_is_refused(how: str, transformed: bool) -> None:
    f, x = metacal.functional(Moving(how)), torch.randn(5, 3)
    name = "student" if how == "constraint" else "teacher"
    with pytest.raises(RuntimeError, match=rf"'{name}.weight' in forward.*as a buffer and carry it.*as a function"):
        (torch.func.grad(f.apply) if transformed else f.apply)(f.params, x)


def test_a_moving_teacher_is_carried_as_a_buffer() -> None:
    """The remedy: every mode replays the same steps."""
    net, xs, h = Moving("buffer"), list(torch.randn(3, 5, 3)), torch.ones(3)
    f = metacal.functional(net)
    solver = metacal.descent(lambda p, h, b, c: f.apply(p, b * h, carry=c), optim.sgd(0.1), carry=f.buffers)
    weight, teacher = f.params["student.weight"].clone().requires_grad_(), net.teacher.weight.clone()
    hand = torch.ones(3, requires_grad=True)
    for x in xs:
        teacher = (teacher + weight.detach()) / 2
        weight = weight - 0.1 * torch.autograd.grad(((x * hand) @ (weight - teacher).T).square().mean(), weight, create_graph=True)[0]
    (truth,) = torch.autograd.grad(weight.square().sum(), hand)
    for adjoint in (adjoints.Unrolled(), adjoints.Unrolled(mode="reverse"), adjoints.Unrolled(mode="graph"), adjoints.Forward()):
        estimate = metacal.hypergradient(lambda p, h, b: p["student.weight"].square().sum(), solver, adjoint)
        hg = estimate(solver.init(f.params, h), h, xs, None)
        close(hg.hparams, truth)
        close(hg.state.carry["teacher.weight"], teacher, 1e-12)


def test_inference_tensors_are_evaluated() -> None:
    """They count no versions."""
    net, x = normalised().eval(), torch.randn(7, 3)
    f = metacal.functional(net)
    with torch.inference_mode():
        params = {name: p.clone() for name, p in f.params.items()}
        close(f.apply(params, x), net(x), 0.0)
    close(f.apply(params, x), net(x).detach(), 0.0)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_without_dense_constant_weights_are_refused(kind: Any) -> None:
    for layer, message in [
        (kind(5, 2, sparse=True), "sparse=True.*Set sparse=False"),
        (kind(5, 2, max_norm=1.0), "max_norm=1.0.*Set max_norm=None"),
    ]:
        with pytest.raises(ValueError, match=rf"`module` at '0' is an {kind.__name__} with {message}"):
            metacal.functional(nn.Sequential(layer, nn.Linear(2, 1)))
    frozen = nn.Sequential(kind(5, 2, sparse=True).requires_grad_(False), nn.Linear(2, 1))
    f, x = metacal.functional(frozen), torch.tensor([[1, 2], [3, 4]])
    close(f.apply(f.params, x), frozen(x), 0.0)


# Weight normalisation by the norm of the whole


@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_of_the_whole_weight_in_forward_mode(weight_norm: Any) -> None:
    f, x = metacal.functional(weight_norm(nn.Linear(3, 2, bias=False), dim=None)), torch.randn(5, 3)
    g, v = sorted(f.params, key=lambda name: f.params[name].ndim)

    def by_hand(p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x @ (p[g] * p[v] / p[v].square().sum().sqrt()).T).sum()

    def called(p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(f.apply(p, x)).sum()

    close(torch.func.jacfwd(called)(f.params), torch.func.jacrev(by_hand)(f.params))
    second, expected = torch.func.jacfwd(torch.func.grad(called))(f.params), torch.func.jacrev(torch.func.grad(by_hand))(f.params)
    for row in (g, v):
        close(second[row], expected[row])


# Activation checkpointing inside the module


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.use_reentrant = nn.Linear(3, 4), nn.Linear(4, 2), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda z: torch.tanh(self.body(z)), x, use_reentrant=self.use_reentrant))


HOW = ("apply and backward", "func.grad", "unrolled mixed", "unrolled reverse", "unrolled graph", "implicit", "solve")


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("through_input", [False, True], ids=["", "through the input"])
@pytest.mark.parametrize("evaluated_before", [False, True], ids=["", "evaluated before"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointing_modules_are_refused(use_reentrant: bool, through_input: bool, evaluated_before: bool, how: str) -> None:
    """Both kinds, whether or not a derivative reaches the block's input (the reentrant kind drops its parameters' silently if not)."""
    f = metacal.functional(Checkpointed(use_reentrant))
    x, h = torch.randn(5, 3), torch.tensor(1.0)
    remedy = pytest.raises(RuntimeError, match=r"checkpoint.*gradient_checkpointing_disable")

    def loss(p: Any, h: Any, b: Any) -> Tensor:
        return f.apply(p, b * p["head.bias"].mean() if through_input else b).square().mean() * h

    if evaluated_before:
        # Harmless where nothing is differentiated, and so allowed; what comes after is refused all the same.
        with contextlib.suppress(RuntimeError), torch.no_grad():
            f.apply(f.params, x)
    with remedy:
        if how == "apply and backward":
            loss({k: v.requires_grad_() for k, v in f.params.items()}, h, x).backward()
        elif how == "func.grad":
            torch.func.grad(lambda p: loss(p, h, x))(f.params)
        elif how == "solve":
            solver = metacal.descent(loss, optim.sgd(0.1))
            metacal.solve(solver, f.params, h.requires_grad_(), [x])["head.weight"].sum().backward()
        else:
            kind, _, mode = how.partition(" ")
            adjoint = adjoints.Unrolled(mode=mode) if kind == "unrolled" else adjoints.Implicit(linear.CG(2))  # type: ignore[arg-type]
            solver = metacal.descent(loss, optim.sgd(0.1))
            metacal.hypergradient(loss, solver, adjoint)(solver.init(f.params, h), h, [x], x)
