"""The differentiable optimizers: trajectories and derivatives against torch.optim itself, or a published formula in its manner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from metacal import optim, tree

F64 = torch.float64
STEPS = 5
PARAMS = {"w": torch.tensor([0.8, -0.5, 0.3], dtype=F64), "b": torch.tensor(0.4, dtype=F64)}
MATRICES = {
    "w": torch.tensor([[0.8, -0.5], [0.3, 0.6], [-0.2, 0.9]], dtype=F64),
    "b": torch.tensor([[0.4, -0.7]], dtype=F64),
}
DATA = torch.tensor([[1.0, -0.4, 0.7], [0.2, 0.9, -1.1], [-0.6, 0.5, 0.4]], dtype=F64)


def loss(params: dict[str, Tensor], data: Tensor = DATA) -> Tensor:
    z = data @ params["w"] + params["b"]
    return (z.cosh().log() + 0.1 * z**3).sum() + 0.3 * (params["w"] ** 4).sum()


def growing(params: dict[str, Tensor], data: Tensor = DATA) -> Tensor:
    """Descending on it, the gradient grows."""
    return -0.2 * loss(params, data)


def outer(params: dict[str, Tensor]) -> Tensor:
    return (params["w"] - 0.2).square().sum() + params["b"].sin().sum()


# Published formulas that torch.optim does not have, as a torch optimizer writes them: in place, tensor by tensor.


class Published(torch.optim.Optimizer):
    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                self.move(p, p.grad, state, **{k: v for k, v in group.items() if k != "params"})

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], **settings: Any) -> None:
        raise NotImplementedError


class LARS(Published):
    def move(self, p, g, state, lr, momentum=0.9, weight_decay=1e-4, trust_coefficient=1e-3, eps=0.0):
        local = 1.0
        if float(p.norm()) > 0 and float(g.norm()) > 0:
            local = trust_coefficient * float(p.norm()) / (float(g.norm()) + weight_decay * float(p.norm()) + eps)
        v = state.setdefault("v", torch.zeros_like(p))
        v.mul_(momentum).add_(lr * local * (g + weight_decay * p))
        p.sub_(v)


class LAMB(Published):
    def move(self, p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g.square(), 1 - betas[1])
        n = state["step"]
        r = (m / (1 - betas[0] ** n)).div((v / (1 - betas[1] ** n)).sqrt() + eps) + weight_decay * p
        ratio = float(p.norm()) / float(r.norm()) if float(p.norm()) > 0 and float(r.norm()) > 0 else 1.0
        p.sub_(lr * ratio * r)


class Lion(Published):
    def move(self, p, g, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, smoothing=0.0):
        m = state.setdefault("m", torch.zeros_like(p))
        c = torch.lerp(g, m, betas[0])
        p.mul_(1 - lr * weight_decay).sub_(lr * (torch.sign(c) if smoothing == 0 else torch.tanh(c / smoothing)))
        m.lerp_(g, 1 - betas[1])


def zeropower_by_svd(d: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration is a polynomial of every singular value."""
    a, b, c = coefficients
    u, s, v = torch.linalg.svd(d / max(float(d.norm()), eps), full_matrices=False)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@dataclass(frozen=True)
class Row:
    """One optimizer: our constructor, its reference, its numbers (each is differentiated) and its flags."""

    ours: Callable[..., Any]
    torchs: Callable[..., torch.optim.Optimizer]
    hyper: dict[str, float]
    flags: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=lambda: PARAMS)
    objective: Callable[..., Tensor] = loss
    elementwise: bool = True
    steps: int = STEPS
    flat: bool = False  # piecewise constant in the gradient

    def arguments(self, hyper: dict[str, Any]) -> dict[str, Any]:
        """With "betas[0]" and "betas[1]" as one argument, a pair."""
        grouped: dict[str, list[Any]] = {}
        for name, value in hyper.items():
            grouped.setdefault(name.split("[")[0], []).append(value)
        return {**{k: tuple(v) if f"{k}[0]" in hyper else v[0] for k, v in grouped.items()}, **self.flags}

    def build(self, hyper: dict[str, Any] | None = None) -> optim.GradientTransformation:
        return self.ours(**self.arguments(self.hyper if hyper is None else hyper))

    def reference(self, params: Any = None, hyper: dict[str, Any] | None = None, **how: Any) -> Any:
        arguments = self.arguments(self.hyper if hyper is None else hyper)
        return torchs(
            lambda p: self.torchs(p, **arguments), params or self.params, **{"objective": self.objective, "steps": self.steps, **how}
        )

    def run(self, hyper: dict[str, Any] | None = None, params: Any = None, **how: Any) -> Any:
        return ours(self.build(hyper), params or self.params, **{"objective": self.objective, "steps": self.steps, **how})

    def tensors(self) -> dict[str, Tensor]:
        return {k: torch.tensor(v, dtype=F64) for k, v in self.hyper.items()}


ADAM = {"lr": 0.07, "betas[0]": 0.8, "betas[1]": 0.95, "eps": 0.02, "weight_decay": 0.05}
AMSGRAD = {**ADAM, "betas[1]": 0.8}  # short enough that v falls, from the fourth step on
RMSPROP = {"lr": 0.04, "alpha": 0.9, "eps": 0.03, "weight_decay": 0.05}
RPROP = {"lr": 0.3, "etas[0]": 0.4, "etas[1]": 1.4, "step_sizes[0]": 0.08, "step_sizes[1]": 0.32}
RADAM = {**ADAM, "betas[1]": 0.9}  # rectified from its sixth step on
NADAM = {**ADAM, "momentum_decay": 0.3}
LAYERWISE = {"lr": 0.4, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.1, "eps": 0.05}
ADAFACTOR = {"lr": 0.1, "beta2_decay": -0.7, "eps[0]": 0.28, "eps[1]": 0.58, "d": 1.03, "weight_decay": 0.05}
MUON = {
    "lr": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.6,
    "eps": 4.0,
    **{f"ns_coefficients[{i}]": c for i, c in enumerate((3.4445, -4.775, 2.0315))},
}
DECOUPLED = {"decoupled_weight_decay": True}
ROWS = {
    "sgd": Row(optim.sgd, torch.optim.SGD, {"lr": 0.1}),
    "sgd, decay": Row(optim.sgd, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": Row(optim.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampened": Row(optim.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": Row(optim.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}, {"nesterov": True}),
    "asgd": Row(optim.asgd, torch.optim.ASGD, {"lr": 0.1, "lambd": 0.3, "alpha": 0.75, "weight_decay": 0.05}, {"t0": 2.0}),
    "adam": Row(optim.adam, torch.optim.Adam, ADAM),
    "adamw": Row(optim.adamw, torch.optim.AdamW, ADAM),
    "amsgrad": Row(optim.adam, torch.optim.Adam, AMSGRAD, {"amsgrad": True}),
    "amsgrad, decoupled": Row(optim.adamw, torch.optim.AdamW, AMSGRAD, {"amsgrad": True}),
    "adamax": Row(optim.adamax, torch.optim.Adamax, ADAM),
    "nadam": Row(optim.nadam, torch.optim.NAdam, NADAM),
    "nadam, decoupled": Row(optim.nadam, torch.optim.NAdam, NADAM, DECOUPLED),
    "radam": Row(optim.radam, torch.optim.RAdam, RADAM, steps=8),
    "radam, decoupled": Row(optim.radam, torch.optim.RAdam, RADAM, DECOUPLED, steps=8),
    "rmsprop": Row(optim.rmsprop, torch.optim.RMSprop, RMSPROP),
    "rmsprop, momentum": Row(optim.rmsprop, torch.optim.RMSprop, {**RMSPROP, "momentum": 0.7}),
    "rmsprop, centered": Row(optim.rmsprop, torch.optim.RMSprop, {**RMSPROP, "momentum": 0.7}, {"centered": True}),
    "adagrad": Row(
        optim.adagrad,
        torch.optim.Adagrad,
        {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.3, "eps": 0.02},
    ),
    "adadelta": Row(optim.adadelta, torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 0.1, "weight_decay": 0.05}),
    "rprop": Row(optim.rprop, torch.optim.Rprop, RPROP, steps=8, flat=True),
    "adafactor": Row(optim.adafactor, torch.optim.Adafactor, ADAFACTOR, objective=growing, elementwise=False),
    "adafactor, matrices": Row(
        optim.adafactor, torch.optim.Adafactor, {**ADAFACTOR, "eps[0]": 0.25}, {}, MATRICES, growing, elementwise=False
    ),
    "lars": Row(optim.lars, LARS, LAYERWISE, elementwise=False),
    "lamb": Row(optim.lamb, LAMB, ADAM, elementwise=False),
    "lion": Row(optim.lion, Lion, {"lr": 0.1, "weight_decay": 0.05}, {"betas": (0.8, 0.95)}, flat=True),  # its betas have derivative 0
    "lion, smooth": Row(optim.lion, Lion, {"lr": 0.1, "betas[0]": 0.8, "betas[1]": 0.9, "weight_decay": 0.05, "smoothing": 0.6}),
}
if hasattr(torch.optim, "Muon"):  # torch >= 2.9

    class ExactMuon(torch.optim.Muon):
        """torch's, without rounding to bfloat16, and with singular values in the place of an iteration."""

        def step(self, closure: Any = None) -> Any:
            with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", zeropower_by_svd):
                return super().step(closure)

    few = {"ns_steps": 2}  # the iteration amplifies: five steps leave little to finite differences
    other = {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    ROWS["muon"] = Row(optim.muon, ExactMuon, MUON, few, MATRICES, elementwise=False)
    ROWS["muon, other rate"] = Row(optim.muon, ExactMuon, {**MUON, "eps": 9.0}, {**few, **other}, MATRICES, elementwise=False)
DEFAULTS = {
    "sgd": (optim.sgd(lr=1e-3), torch.optim.SGD),
    **{
        name: (getattr(optim, name.lower())(), getattr(torch.optim, name))
        for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "Adafactor")
    },
    "amsgrad": (optim.adam(amsgrad=True), lambda p: torch.optim.Adam(p, amsgrad=True)),
    "amsgrad, decoupled": (optim.adamw(amsgrad=True), lambda p: torch.optim.AdamW(p, amsgrad=True)),
    "lars": (optim.lars(lr=0.1), lambda p: LARS(p, lr=0.1)),
    "lamb": (optim.lamb(), LAMB),
    "lion": (optim.lion(), Lion),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def ours(optimizer: optim.GradientTransformation, params: Any = PARAMS, steps: int = STEPS, objective: Any = loss) -> Any:
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grad(objective)(params), state, params=params)
        params = optim.apply_updates(params, updates)
    return params


@contextmanager
def double_by_default() -> Iterator[None]:
    """torch's optimizers keep their 0-dim numbers (NAdam's product, ASGD's rate) in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def torchs(
    build: Callable[..., Any], params: Any = PARAMS, steps: int = STEPS, objective: Any = loss, prepare: Any = None, schedule: Any = None
) -> Any:
    params = {k: v.clone().requires_grad_() for k, v in params.items()}
    with double_by_default():
        optimizer = build(list(params.values()))
        scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        for _ in range(steps):
            optimizer.zero_grad()
            objective(params).backward()
            if prepare:
                prepare(list(params.values()))
            optimizer.step()
            if scheduler:
                scheduler.step()
    return {k: v.detach() for k, v in params.items()}


def close(a: Any, b: Any, tolerance: float) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(x.shape == y.shape and bool(((x - y).abs() <= tolerance * (1 + y.abs())).all()) for x, y in pairs)


def difference(f: Callable[[float], float], h: float = 1e-4) -> float:
    """f'(0) from four values, to h^4."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


# Trajectories


@every_row
def test_trajectories_are_torchs(row: Row) -> None:
    reference = row.reference(steps=20)
    assert close(row.run(steps=20), reference, 1e-14)
    assert close(row.run(row.tensors(), steps=20), reference, 1e-14)  # numbers and tensors alike
    assert close(row.run({k: lambda t, v=v: v for k, v in row.hyper.items()}, steps=20), reference, 1e-14)
    assert not close(reference, row.params, 1e-2)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_torchs(name: str) -> None:
    mine, its = DEFAULTS[name]
    assert close(ours(mine, steps=20), torchs(its, steps=20), 1e-14)


@every_row
def test_update_leaves_its_input_alone(row: Row) -> None:
    optimizer, params = row.build(), row.params
    state, gradient = optimizer.init(params), tree.map(torch.sin, params)
    before = tree.clone((state, gradient, params))
    first = optimizer.update(gradient, state, params=params, inplace=True)
    assert close((state, gradient, params), before, 0)
    assert close(optimizer.update(gradient, state, params=params, inplace=True), first, 0)
    assert tree.structure(first[1]) == tree.structure(state)
    assert first[1].step.dtype == torch.int64
    assert first[1].step == 1


@every_row
def test_moved_is_params_plus_updates(row: Row) -> None:
    """With numbers, tensors and inside a chain; in bfloat16 the state and the params keep their type."""
    gradient = grad(row.objective)(row.params)
    for optimizer in (row.build(), row.build(row.tensors()), optim.chain(optim.clip_by_global_norm(0.5), row.build())):
        updates, state = optimizer.update(gradient, optimizer.init(row.params), params=row.params)
        found, found_state = optim.moved(optimizer, gradient, optimizer.init(row.params), row.params)
        assert close(found, optim.apply_updates(row.params, updates), 1e-15)
        assert close(found_state, state, 0)
    low = tree.to((gradient, row.params), torch.bfloat16)
    found, _ = optim.moved(row.build(), low[0], row.build().init(low[1]), low[1])
    assert {x.dtype for x in tree.leaves(found)} == {torch.bfloat16}


class _Passes(TorchDispatchMode):
    """Counts the operations that make a tensor of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and out.shape == self.shape
        return out


def test_moved_is_one_pass() -> None:
    w = torch.ones(7, 5)
    for optimizer, passes in ((optim.sgd(0.1), 1), (optim.sgd(0.1, momentum=0.9), 2)):
        state = optimizer.init(w)
        with _Passes(w.shape) as counter:
            optim.moved(optimizer, w, state, w)
        assert counter.count == passes


@pytest.mark.cuda
@every_row
def test_hyperparameters_on_the_cpu_serve_params_on_a_gpu(row: Row) -> None:
    on_gpu = row.run(row.tensors(), tree.to(row.params, "cuda"), objective=lambda p: row.objective(p, DATA.cuda()))
    assert close(tree.to(on_gpu, "cpu"), row.run(), 1e-12)


def test_schedules_are_lambda_lr() -> None:
    def factor(t: Any) -> Any:
        return 0.8**t

    for name in ("momentum", "adam"):
        row = ROWS[name]
        reference = row.reference(steps=20, schedule=factor)
        assert close(row.run({**row.hyper, "lr": lambda t, row=row: row.hyper["lr"] * factor(t)}, steps=20), reference, 1e-14)
        assert not close(row.run(steps=20), reference, 1e-3)


def test_a_schedule_may_look_values_up_and_is_differentiated() -> None:
    rates = torch.tensor([0.1, 0.2, 0.05], dtype=F64)

    def by_rates(rates: Tensor) -> Tensor:
        return outer(ours(optim.sgd(lambda t: rates[t.long()]), steps=3))

    def by_hand(rates: list[float]) -> float:
        params = PARAMS
        for rate in rates:
            params = tree.axpy(-rate, grad(loss)(params), params)
        return float(outer(params))

    expected = [difference(lambda e, i=i: by_hand([float(r) + e * (i == j) for j, r in enumerate(rates)])) for i in range(3)]
    assert close(grad(by_rates)(rates), torch.tensor(expected, dtype=F64), 1e-9)


def test_precision_and_shape_follow_the_params() -> None:
    params = {"a": torch.tensor(0.5), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(1, 2, dtype=F64)}
    for row in ROWS.values():
        some = params if row.params is PARAMS else tree.map(lambda p: p.reshape(1, -1), params)
        optimizer = row.build(row.tensors())
        start = optimizer.init(some)
        updates, state = optimizer.update(tree.map(torch.sin, some), start, params=some)
        for old, new in zip(tree.leaves((some, start)), tree.leaves((updates, state)), strict=True):
            assert (old.dtype, old.shape) == (new.dtype, new.shape)
            assert new.isfinite().all()
        in_double = tree.to(some, F64)
        expected, _ = optimizer.update(tree.map(torch.sin, in_double), optimizer.init(in_double), params=in_double)
        for leaf, tolerance in (("a", 1e-6), ("b", 0.05), ("c", 1e-14)):
            torch.testing.assert_close(updates[leaf].to(F64), expected[leaf], rtol=tolerance, atol=1e-9)


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_a_very_long_run_counts_on(row: Row, dtype: torch.dtype) -> None:
    params = tree.to(row.params, dtype)
    optimizer = row.build()
    state = optimizer.init(params)._replace(step=torch.tensor(2**60))
    updates, state = optimizer.update(params, state, params=params)
    assert state.step == 2**60 + 1
    assert all(leaf.isfinite().all() for leaf in tree.leaves((updates, state)))


def test_adam_in_float32_loses_no_digits_to_its_bias_correction() -> None:
    def first_update(dtype: torch.dtype) -> Tensor:
        params = {"w": torch.tensor([0.5, -0.25], dtype=dtype)}
        optimizer = optim.adam(lr=1.0, eps=1e-12)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params=params)
        return updates["w"]

    assert close(first_update(torch.float32).double(), first_update(F64), 5e-7)


def test_a_long_run_in_bfloat16_counts_on() -> None:
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    optimizer = optim.sgd(lambda t: t)
    state = optimizer.init(params)._replace(step=torch.tensor(301))
    updates, _ = optimizer.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, params=params)
    assert updates["w"].item() == float(torch.tensor(-301.0).bfloat16())
    assert optim.sgd(lambda t: t - 300).update({"w": torch.ones(1).bfloat16()}, state)[0]["w"].item() == -1.0


def test_an_empty_tree_and_a_single_tensor() -> None:
    for optimizer in (optim.adam(), optim.clip_by_global_norm(1.0)):
        assert optimizer.update({}, optimizer.init({}))[0] == {}
        one = torch.ones(())
        assert optimizer.update(one, optimizer.init(one), params=one)[0].shape == ()


@pytest.mark.parametrize("name", ["amsgrad", "amsgrad, decoupled"])
def test_amsgrad_keeps_the_largest_square(name: str) -> None:
    """Of a run in which they first rise and then fall; without the flag not a number more is kept than the two means."""
    row = ROWS[name]
    optimizer, params = row.build(), PARAMS
    state, squares, falls = optimizer.init(params), [], []
    for _ in range(STEPS):
        updates, state = optimizer.update(grad(loss)(params), state, params=params)
        params = optim.apply_updates(params, updates)
        squares.append(state.square)
        falls.append(tree.ravel(state.square)[0] < tree.ravel(state.largest)[0])
        assert close(state.largest, tree.map(lambda *v: torch.stack(v).amax(0), *squares), 0)
    assert not torch.stack(falls[:3]).any()
    assert falls[-1].all()
    off = row.ours(**{**row.arguments(row.hyper), "amsgrad": False})
    assert not close(row.run(), ours(off), 1e-3)
    assert tree.num_elements(state) == 1 + 3 * tree.num_elements(PARAMS)
    assert tree.num_elements(off.init(PARAMS)) == 1 + 2 * tree.num_elements(PARAMS)


@every_row
def test_a_run_goes_on_from_a_saved_state(row: Row) -> None:
    """Through a flat dict of tensors, to the last bit."""
    optimizer, params = row.build(), row.params
    state = optimizer.init(params)
    for step in range(4):
        if step == 2:
            saved = tree.clone((tree.state_dict(state), params))
        updates, state = optimizer.update(grad(row.objective)(params), state, params=params)
        params = optim.apply_updates(params, updates)
    again, resumed = saved[1], tree.load_state_dict(optimizer.init(row.params), saved[0])
    for _ in range(2):
        updates, resumed = optimizer.update(grad(row.objective)(again), resumed, params=again)
        again = optim.apply_updates(again, updates)
    assert close((again, resumed), (params, state), 0)


def test_complex_params_are_refused_by_every_rule() -> None:
    for row in ROWS.values():
        with pytest.raises(TypeError, match=r"`params` should be real, as all rules.*got torch.complex64 at 'z'.*view_as_real") as error:
            row.build().init({**row.params, "z": torch.ones(1, 1, dtype=torch.complex64)})
        assert "square" not in str(error.value)  # as sgd does not


def test_muon_is_torchs_up_to_its_rounding() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    for rate in (None, "original", "match_rms_adamw"):
        mine = ours(optim.muon(0.1, adjust_lr_fn=rate), MATRICES)
        reference = torchs(lambda p, rate=rate: torch.optim.Muon(p, 0.1, adjust_lr_fn=rate), MATRICES)
        assert close(mine, reference, 0.02)  # bfloat16: 1/256
        assert not close(mine, MATRICES, 0.05)


def test_muon_brings_the_singular_values_near_one() -> None:
    g = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0] @ torch.diag(torch.logspace(0, -2, 6, dtype=F64)) @ torch.randn(6, 4, dtype=F64)
    for d in (g, g.T):
        optimizer = optim.muon(1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="spectral_unclamped")
        u = optimizer.update(d, optimizer.init(d), params=d)[0] / math.sqrt(d.shape[0] / d.shape[1])
        assert bool(((torch.linalg.svdvals(u) - 1).abs() < 0.35).all())


@pytest.mark.parametrize("t0", [0.0, 2.5, 1e6])
def test_asgd_averages_as_torch_does(t0: float) -> None:
    optimizer, params = optim.asgd(0.1, t0=t0), PARAMS
    state = optimizer.init(params)
    theirs = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    with double_by_default():
        torchs_asgd = torch.optim.ASGD(list(theirs.values()), 0.1, t0=t0)
        for _ in range(6):
            updates, state = optimizer.update(grad(loss)(params), state, params=params)
            params = optim.apply_updates(params, updates)
            torchs_asgd.zero_grad()
            loss(theirs).backward()
            torchs_asgd.step()
        assert close(state.average, {k: torchs_asgd.state[p]["ax"] for k, p in theirs.items()}, 1e-14)
    assert close(state.average, params, 1e-14) is (t0 > 6)


def test_layerwise_rates_are_one_where_a_norm_is_zero() -> None:
    g = {"from zero": torch.tensor([3.0, 4.0], dtype=F64), "to zero": torch.zeros(2, dtype=F64)}
    w = {"from zero": torch.zeros(2, dtype=F64), "to zero": torch.tensor([6.0, 8.0], dtype=F64)}
    updates, _ = (o := optim.lars(0.1, weight_decay=0.5)).update(g, o.init(w), params=w)
    assert close(updates, {"from zero": -0.1 * g["from zero"], "to zero": -0.05 * w["to zero"]}, 1e-15)
    updates, _ = (o := optim.lamb(0.1, eps=1.0)).update(g, o.init(w), params=w)
    assert close(updates, {"from zero": -0.1 * g["from zero"] / (g["from zero"] + 1), "to zero": 0 * w["to zero"]}, 1e-15)


def test_the_smooth_lion_tends_to_lion() -> None:
    g = torch.tensor([-2.0, -0.1, 0.0, 0.03, 1.0], dtype=F64)
    exact = optim.lion(1.0, (0.0, 0.9)).update(g, optim.lion().init(g))[0]
    for s in (1.0, 0.1, 0.01):
        smooth = optim.lion(1.0, (0.0, 0.9), smoothing=s).update(g, optim.lion().init(g))[0]
        assert bool(((smooth - exact).abs() <= 2 * torch.exp(-2 * g.abs() / s) + 1e-15).all())
        assert s == 0.01 or not close(smooth, exact, 1e-3)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.flat])
def test_a_sign_has_derivative_zero(name: str) -> None:
    row = ROWS[name]
    by_data = grad(lambda d: outer(row.run(objective=lambda p: row.objective(p, d))))(DATA)
    assert torch.equal(by_data, torch.zeros_like(by_data))
    moved = row.run(objective=lambda p: row.objective(p, DATA + 1e-7))
    assert close(moved, row.run(), 1e-14)  # and it is the truth


def test_adafactor_keeps_a_row_and_a_column() -> None:
    params = {"matrix": torch.zeros(7, 5), "stack": torch.zeros(2, 7, 5), "vector": torch.zeros(6), "scalar": torch.zeros(())}
    shapes = {k: [tuple(x.shape) for x in v] for k, v in optim.adafactor().init(params).square.items()}
    assert shapes == {"matrix": [(7, 1), (1, 5)], "stack": [(2, 7, 1), (2, 1, 5)], "vector": [(6,)], "scalar": [()]}


# Derivatives


# By how much each number moves, relatively, where the second derivative is taken: less where it is close to a bound or a switch.
DIRECTION = {
    "betas[0]": 0.1,
    "betas[1]": 0.1,
    "alpha": 0.1,
    "rho": 0.1,
    "d": 0.05,
    "eps[0]": 0.1,
    **{f"ns_coefficients[{i}]": 0.1 for i in range(3)},
}


@every_row
def test_derivatives_by_every_number_are_those_of_a_loop_with_torch_optim(row: Row) -> None:
    def independent(hyper: dict[str, float]) -> float:
        return float(outer(row.reference(hyper=hyper)))

    def unrolled(hyper: dict[str, Tensor]) -> Tensor:
        return outer(row.run(hyper))

    hyper = row.tensors()
    gradient = grad(unrolled)(hyper)
    leaves = {k: v.clone().requires_grad_() for k, v in hyper.items()}
    plain = torch.autograd.grad(unrolled(leaves), list(leaves.values()))
    assert close(dict(zip(leaves, plain, strict=True)), gradient, 1e-13)
    for name, value in row.hyper.items():
        expected = difference(lambda e, name=name, value=value: independent({**row.hyper, name: value + e}))
        assert abs(expected) > 1e-5, f"{name} has no effect: the test would not see a lost derivative"
        assert abs(float(gradient[name]) - expected) <= 1e-8 * (1 + abs(expected)), name
        tangent = {k: torch.tensor(float(k == name), dtype=F64) for k in hyper}
        assert abs(float(jvp(unrolled, (hyper,), (tangent,))[1]) - expected) <= 1e-8 * (1 + abs(expected)), name

    # Second order, along one direction through all of them: s -> outer(hyper (1 + s d)).
    d = {k: v * DIRECTION.get(k, 0.7) for k, v in row.hyper.items()}

    def along(s: float) -> float:
        return independent({k: v + s * d[k] for k, v in row.hyper.items()})

    h = 0.005
    second = (16 * (along(h) + along(-h)) - (along(2 * h) + along(-2 * h)) - 30 * along(0.0)) / (12 * h * h)
    direction = {k: torch.tensor(v, dtype=F64) for k, v in d.items()}
    forward_over_reverse = tree.vdot(jvp(grad(unrolled), (hyper,), (direction,))[1], direction)
    assert abs(float(forward_over_reverse) - second) <= 2e-6 * (1 + abs(second))
    twice = grad(lambda x: tree.vdot(grad(unrolled)(x), direction))(hyper)
    assert abs(float(tree.vdot(twice, direction)) - second) <= 2e-6 * (1 + abs(second))


@every_row
def test_derivative_by_the_initial_params(row: Row) -> None:
    def independent(e: float) -> float:
        return float(outer(row.reference({k: v + e * torch.cos(v) for k, v in row.params.items()})))

    gradient = jacrev(lambda p: outer(row.run(params=p)))(row.params)
    assert abs(float(tree.vdot(gradient, tree.map(torch.cos, row.params))) - difference(independent)) <= 1e-8


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_have_the_type_of_their_params(row: Row, dtype: torch.dtype) -> None:
    """And are those of float64, rounded. torch's tangent of `number * x` is float64 for a 0-dim x, and so may a gradient's be."""
    like = tree.map(lambda p: p.flatten()[0].reshape((1,) * p.ndim if row.params is MATRICES else ()), row.params)
    constant = {k: v for k, v in row.hyper.items() if k != "lr"}  # numbers, but for the rate

    def of_scalars(params: dict[str, Tensor]) -> Tensor:
        w, b = (p.sum() for p in params.values())
        return 1.0 / (2.0 + 0.3 * w * b) + torch.cosh(0.7 * w - 0.4 * b) - 0.2 * torch.cos(2.1 * b)

    def end(start: Any, lr: Tensor) -> Any:
        optimizer, params = optim.chain(optim.clip_by_global_norm(0.5), row.build({"lr": lr, **constant})), start
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grad(of_scalars)(params), state, params=params)
            params = optim.apply_updates(params, updates)
        return params, tree.partition(state)[0]

    def along(dtype: torch.dtype) -> Any:
        primals = tree.to((like, torch.tensor(row.hyper["lr"])), dtype)
        directions = tree.map(lambda x: torch.stack([torch.cos(x), torch.sin(x)]), primals)
        return end(*primals), vmap(lambda d: jvp(end, primals, d)[1])(directions), jvp(end, primals, tree.index(directions, 0))[1]

    (values, lanes, tangents), (_, exact, _) = along(dtype), along(F64)
    assert {value.dtype for value in tree.leaves(values[0])} == {dtype}
    for value, lane, tangent, expected in zip(*map(tree.leaves, (values, lanes, tangents, exact)), strict=True):
        assert value.dtype == lane.dtype == tangent.dtype
        assert tangent.isfinite().all()
        assert dtype == torch.bfloat16 or close(lane.to(F64), expected, 1e-3)
        assert dtype == torch.bfloat16 or close(tangent.to(F64), expected[0], 1e-3)


@every_row
def test_an_empty_leaf_takes_nothing_away(row: Row) -> None:
    """The derivatives by the numbers, of first and second order, are those of the other leaves' run on their own."""
    empty = torch.zeros((0, 2) if row.params is MATRICES else (0,), dtype=F64)
    more = {"z": empty, **({"y": empty.mT} if row.params is MATRICES and row.ours is not optim.muon else {})}  # muon needs columns

    def unrolled(hyper: dict[str, Tensor], params: Any) -> Tensor:
        end = row.run(hyper, params, objective=lambda p: row.objective({"w": p["w"], "b": p["b"]}), steps=2)
        return outer(end) + sum(end[name].sum() for name in more if name in end)

    hyper = row.tensors()
    direction = tree.scale(0.1, hyper)
    for derivative in (lambda p: grad(unrolled)(hyper, p), lambda p: jvp(lambda h: grad(unrolled)(h, p), (hyper,), (direction,))[1]):
        assert close(derivative({**row.params, **more}), derivative(row.params), 1e-13)
    params = {**row.params, **more}
    _, state = row.build().update(params, row.build().init(params), params=params)
    assert all(x.isfinite().all() for x in tree.leaves(state))


ADAPTIVE = {
    "adam": lambda lr, eps: optim.adam(lr, eps=eps),
    "adamw": lambda lr, eps: optim.adamw(lr, eps=eps),
    "amsgrad": lambda lr, eps: optim.adam(lr, eps=eps, amsgrad=True),
    "adamax": lambda lr, eps: optim.adamax(lr, eps=eps),
    "nadam": lambda lr, eps: optim.nadam(lr, (0.0, 0.999), eps=eps),
    "rmsprop": lambda lr, eps: optim.rmsprop(lr, eps=eps),
    "rmsprop, centered": lambda lr, eps: optim.rmsprop(lr, eps=eps, centered=True, momentum=0.9),
    "adagrad": lambda lr, eps: optim.adagrad(lr, eps=eps),
    "lamb": lambda lr, eps: optim.lamb(lr, eps=eps),
    "lion": lambda lr, eps: optim.lion(lr, (0.0, 0.9), smoothing=eps),
}


@pytest.mark.parametrize("build", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_a_zero_gradient_has_the_right_derivative(build: Callable[..., Any]) -> None:
    lr, eps = 0.1, 1e-8
    optimizer = build(lr, eps)
    zero = {"w": torch.zeros(2, dtype=F64)}
    state = optimizer.init(zero)

    def update(g: Tensor) -> Tensor:
        return optimizer.update({"w": g}, state, params=zero)[0]["w"]

    # u(g) = -lr g / (c |g| + eps) has the slope -lr / eps at 0.
    at_zero = torch.tensor([0.0, 0.3], dtype=F64)
    assert jacrev(update)(at_zero)[0, 0].item() == pytest.approx(-lr / eps, rel=1e-12)
    assert jvp(update, (at_zero,), (torch.tensor([1.0, 0.0], dtype=F64),))[1][0].item() == pytest.approx(-lr / eps, rel=1e-12)

    # A coordinate that never has a gradient takes nothing away from the others' hypergradient.
    def unrolled(lr: Tensor, dead: int) -> Tensor:
        params = {"w": torch.cat([PARAMS["w"], torch.zeros(dead, dtype=F64)]), "b": PARAMS["b"]}
        objective = lambda p: loss({"w": p["w"][:3], "b": p["b"]})  # noqa: E731
        end = ours(build(lr, 1e-3), params, objective=objective)
        return outer({"w": end["w"][:3], "b": end["b"]}) + end["w"].sum()

    rate = torch.tensor(lr, dtype=F64)
    for derivative in (grad, lambda f: lambda x: jvp(grad(f), (x,), (torch.ones_like(x),))[1]):
        without = derivative(lambda x: unrolled(x, 0))(rate)
        assert without.isfinite()
        assert close(derivative(lambda x: unrolled(x, 2))(rate), without, 1e-13)


@every_row
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_leaf_without_gradient_takes_nothing_away(row: Row, start: float) -> None:
    """The derivatives by the numbers are finite, and those of the other leaves' run on their own."""
    dead = torch.full_like(row.params["b"], start)

    def unrolled(hyper: dict[str, Tensor], params: Any) -> Tensor:
        end = row.run(hyper, params, objective=lambda p: row.objective({"w": p["w"], "b": p["b"]}), steps=2)
        return outer(end) + sum(leaf.sum() for name, leaf in end.items() if name == "z")

    hyper = row.tensors()
    direction = tree.scale(0.1, hyper)
    with_it, alone = ({**row.params, "z": dead}, row.params)
    for derivative in (lambda p: grad(unrolled)(hyper, p), lambda p: jvp(lambda h: grad(unrolled)(h, p), (hyper,), (direction,))[1]):
        found = derivative(with_it)
        assert all(leaf.isfinite() for leaf in tree.leaves(found))
        if start == 0.0:
            assert close(found, derivative(alone), 1e-12)
    tangent = jvp(lambda h: unrolled(h, with_it), (hyper,), (hyper,))[1]
    assert close(tangent, tree.vdot(grad(unrolled)(hyper, with_it), hyper), 1e-11)


@every_row
def test_a_nan_stays_a_nan(row: Row) -> None:
    optimizer, params = row.build(), row.params
    broken = torch.arange(params["w"].numel()).reshape(params["w"].shape) == 1
    expected = broken if row.elementwise else torch.ones_like(broken)
    gradient = {"w": torch.where(broken, math.nan, params["w"]), "b": torch.full_like(params["b"], 0.1)}
    state = optimizer.init(params)
    remembers = not close(optimizer.update(gradient, optimizer.update(params, state, params=params)[1], params=params)[0]["b"],
                          optimizer.update(gradient, state, params=params)[0]["b"], 1e-9)  # fmt: skip
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, params=params)
        assert torch.equal(updates["w"].isnan(), expected)
        assert not updates["b"].isnan().any()
        gradient = tree.zeros_like(gradient) if remembers and row.ours is not optim.asgd else gradient  # it stays in the state
    through = grad(lambda g: optimizer.update({"w": g, "b": params["b"]}, optimizer.init(params), params=params)[0]["w"].square().sum())
    assert torch.equal(through(torch.where(broken, math.nan, params["w"])).isnan(), expected)
