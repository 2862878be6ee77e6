"""What optimizers are composed of: clipping, decay, scales, labels, schedules, learned rates and learned optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import metacal
from metacal import optim, tree
from metacal.optim import schedules
from problems import central_differences, relative_error
from test_optim import DATA, F64, MATRICES, PARAMS, ROWS, STEPS, Row, close, difference, every_row, loss, ours, outer, torchs

import torchopt  # isort: skip - after metacal, which silences its import of functorch

# Clipping and chains


def test_clipping_is_torchs() -> None:
    for max_norm in (0.5, 100.0):
        chained = optim.chain(optim.clip_by_global_norm(max_norm), optim.sgd(0.1, momentum=0.9))
        reference = torchs(
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), steps=20, prepare=lambda p, m=max_norm: torch.nn.utils.clip_grad_norm_(p, m)
        )
        assert close(ours(chained, steps=20), reference, 1e-14)
    assert close(ours(torchopt.chain(optim.clip_by_global_norm(100.0), optim.sgd(0.1, momentum=0.9)), steps=20), reference, 1e-14)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_clipping_coefficient_is_differentiated(max_norm: float) -> None:
    ct, x0 = torch.tensor([0.3, -1.0, 0.7], dtype=F64), torch.tensor([1.0, -2.0, 0.5], dtype=F64)

    def mine(g: Tensor, max_norm: float | Tensor) -> Tensor:
        clip = optim.clip_by_global_norm(max_norm)
        return ct @ clip.update({"w": g}, clip.init({"w": g}))[0]["w"]

    def torchs_clip(g: Tensor, max_norm: float) -> float:
        p = torch.zeros(3, dtype=F64, requires_grad=True)
        p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([p], max_norm)
        return float(ct @ p.grad)

    expected = [difference(lambda e, i=i: torchs_clip(x0 + e * torch.eye(3, dtype=F64)[i], max_norm)) for i in range(3)]
    by_max_norm = difference(lambda e: torchs_clip(x0, max_norm + e))
    got, got_max_norm = grad(mine, argnums=(0, 1))(x0, torch.tensor(max_norm, dtype=F64))
    assert close(got, torch.tensor(expected, dtype=F64), 1e-9)
    assert abs(float(got_max_norm) - by_max_norm) < 1e-9
    assert close(vmap(grad(mine), (0, None))(torch.stack([x0, x0 / 3]), max_norm)[0], got, 1e-14)


def test_clipping_a_zero_or_broken_gradient() -> None:
    clip = optim.clip_by_global_norm(1.0)

    def update(g: Tensor) -> Tensor:
        return clip.update(g, clip.init(g))[0]

    assert close(jacrev(update)(torch.zeros(2, dtype=F64)), torch.eye(2, dtype=F64), 0)
    assert update(torch.tensor([1.0, math.nan])).isnan().all()
    by_schedule = optim.clip_by_global_norm(lambda t: 1.0 + t)
    state = by_schedule.init(torch.ones(1))._replace(step=torch.tensor(2))
    assert by_schedule.update(torch.tensor([10.0]), state)[0].item() == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 10.0, 300.0])
def test_norms_in_half_precision(dtype: torch.dtype, size: float) -> None:
    """The square of 300 is infinite in float16, that of 1e-4 zero."""
    g = torch.full((1000,), size, dtype=dtype)  # of norm 31.6 size

    def update(optimizer: Any, g: Tensor) -> Tensor:
        w = torch.ones_like(g)
        return optimizer.update(g, optimizer.init(w), params=w)[0]

    clip, lars, lamb = optim.clip_by_global_norm(3.0 * size), optim.lars(1.0, 0.0, weight_decay=0.0), optim.lamb(1.0)
    for optimizer in (clip, lars, lamb) if 1e-3 <= size <= 10 else (clip, lars):  # lamb's state has squares of its own
        found = update(optimizer, g)
        assert found.dtype == dtype
        expected = update(optimizer, g.double())
        assert relative_error(found, expected) < 0.03  # a factor of 3e-6 has few digits in float16


def test_chains_of_ours_are_ours() -> None:
    clip, sgd = optim.clip_by_global_norm(1.0), optim.sgd(0.1)
    assert isinstance(optim.chain(clip, sgd), optim.DifferentiableTransformation)
    assert not isinstance(optim.chain(clip, torchopt.sgd(0.1)), optim.DifferentiableTransformation)
    assert isinstance(optim.chain(clip, torchopt.sgd(0.1)), optim.GradientTransformation)


@pytest.mark.parametrize("clip_value", [0.3, 100.0])
def test_clipping_by_value_is_torchs(clip_value: float) -> None:
    chained = optim.chain(optim.clip_by_value(clip_value), optim.sgd(0.1, momentum=0.9))
    reference = torchs(
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), steps=20, prepare=lambda p: torch.nn.utils.clip_grad_value_(p, clip_value)
    )
    assert close(ours(chained, steps=20), reference, 1e-14)

    def by_value(value: float) -> float:
        return float(outer(torchs(lambda p: torch.optim.SGD(p, 0.1), prepare=lambda p: torch.nn.utils.clip_grad_value_(p, value))))

    got = grad(lambda v: outer(ours(optim.chain(optim.clip_by_value(v), optim.sgd(0.1)))))(torch.tensor(clip_value, dtype=F64))
    expected = difference(lambda e: by_value(clip_value + e))
    assert abs(float(got) - expected) < 1e-9
    assert (abs(expected) > 1e-3) is (clip_value == 0.3)


def test_clipping_by_value_at_the_bound_and_a_nan() -> None:
    g = torch.tensor([2.0, 0.5, 0.25, -0.5, -3.0, math.nan], dtype=F64)
    clip = optim.clip_by_value(0.5)
    assert torch.equal(clip.update(g, clip.init(g))[0][:5], torch.tensor([0.5, 0.5, 0.25, -0.5, -0.5], dtype=F64))
    assert clip.update(g, clip.init(g))[0][5].isnan()
    diagonal = jacrev(lambda g: clip.update(g, clip.init(g))[0])(g[:5]).diagonal()
    assert diagonal.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


# Decay, scales


def test_decay_before_and_behind_an_optimizer() -> None:
    lr, decay = torch.tensor(0.07, dtype=F64), torch.tensor(0.05, dtype=F64)

    def decoupled(lr: Tensor, decay: Tensor) -> Tensor:
        return outer(ours(optim.chain(optim.adam(lr), optim.add_decayed_weights(-lr * decay))))

    def adamw(lr: Tensor, decay: Tensor) -> Tensor:
        return outer(ours(optim.adamw(lr, weight_decay=decay)))

    assert close(decoupled(lr, decay), adamw(lr, decay), 1e-14)
    assert close(grad(decoupled, (0, 1))(lr, decay), grad(adamw, (0, 1))(lr, decay), 1e-12)
    l2 = optim.chain(optim.add_decayed_weights(0.05), optim.adam(0.07))
    assert close(ours(l2), torchs(lambda p: torch.optim.Adam(p, 0.07, weight_decay=0.05)), 1e-14)
    warm = optim.chain(optim.sgd(0.1), optim.add_decayed_weights(lambda t: -0.01 * t))
    assert close(warm.update(PARAMS, warm.init(PARAMS), params=PARAMS)[0], tree.scale(-0.1, PARAMS), 0)


def test_meta_sgd_is_a_rate_for_every_coordinate() -> None:
    rates = {"w": torch.tensor([0.1, 0.02, 0.3], dtype=F64), "b": torch.tensor(0.05, dtype=F64)}

    def by_hand(rates: Any) -> Tensor:
        params = PARAMS
        for _ in range(STEPS):
            w, b = (p.clone().requires_grad_() for p in (params["w"], params["b"]))
            gw, gb = torch.autograd.grad(loss({"w": w, "b": b}), (w, b))
            params = {"w": params["w"] - rates["w"] * gw, "b": params["b"] - rates["b"] * gb}
        return outer(params)

    def learned(rates: Any) -> Tensor:
        return outer(ours(optim.meta_sgd(rates)))

    assert relative_error(grad(learned)(rates), central_differences(by_hand, rates)) < 1e-9
    assert close(learned(rates), by_hand(rates), 1e-14)
    assert close(learned({"w": 0.1, "b": rates["b"]}), by_hand({"w": 0.1, "b": rates["b"]}), 1e-14)  # a number, a 0-dim tensor
    assert close(learned(0.1), by_hand({"w": 0.1, "b": 0.1}), 1e-14)  # one for all
    assert close(ours(optim.meta_sgd(lambda t: 0.1 / (1 + t))), ours(optim.sgd(lambda t: 0.1 / (1 + t))), 1e-14)
    scales = torch.tensor([0.5, 1.0, 1.5], dtype=F64)
    assert close(vmap(lambda s: learned(tree.scale(s, rates)))(scales), torch.stack([learned(tree.scale(s, rates)) for s in scales]), 1e-14)


def test_a_prefix_of_rates_behind_adam() -> None:
    params = {"body": PARAMS, "head": {"b": torch.tensor(0.3, dtype=F64)}}
    gradient = tree.map(torch.sin, params)
    chained = optim.chain(optim.adam(1.0), optim.scale({"body": 0.1, "head": torch.tensor(0.2, dtype=F64)}))
    got = chained.update(gradient, chained.init(params), params=params)[0]
    for part, rate in (("body", 0.1), ("head", 0.2)):
        adam = optim.adam(rate)
        assert close(got[part], adam.update(gradient[part], adam.init(params[part]), params=params[part])[0], 1e-15)


# Labels


def test_labels_give_each_leaf_its_own_rule() -> None:
    params = {**MATRICES, "c": torch.tensor([0.2, -0.3], dtype=F64)}

    def objective(p: Any) -> Tensor:
        return loss({"w": p["w"], "b": p["b"] + p["c"]})

    def by_shape(params: Any) -> Any:
        return tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)

    lr = torch.tensor(0.05, dtype=F64)

    def grouped(lr: Tensor, labels: Any = by_shape) -> Any:
        transformations = {"matrix": optim.muon(lr, ns_steps=2), "rest": optim.adamw(2 * lr)}
        return ours(optim.by_label(transformations, labels), params, objective=objective)

    def by_hand(lr: Tensor) -> Any:
        muon, adamw = optim.muon(lr, ns_steps=2), optim.adamw(2 * lr)
        matrices, rest = MATRICES, {"c": params["c"]}
        s1, s2 = muon.init(matrices), adamw.init(rest)
        for _ in range(STEPS):
            g = grad(objective)({**matrices, **rest})
            u1, s1 = muon.update({k: g[k] for k in matrices}, s1, params=matrices)
            u2, s2 = adamw.update({"c": g["c"]}, s2, params=rest)
            matrices, rest = tree.add(matrices, u1), tree.add(rest, u2)
        return {**matrices, **rest}

    assert close(grouped(lr), by_hand(lr), 1e-14)
    assert close(grouped(lr, {"w": "matrix", "b": "matrix", "c": "rest"}), by_hand(lr), 1e-14)
    whole = lambda f: lambda lr: outer(f(lr)) + f(lr)["c"].sum()  # noqa: E731
    assert close(grad(whole(grouped))(lr), grad(whole(by_hand))(lr), 1e-12)
    lrs = torch.tensor([0.05, 0.1], dtype=F64)
    assert close(vmap(whole(grouped))(lrs), torch.stack([whole(by_hand)(x) for x in lrs]), 1e-13)


def test_labels_may_be_a_prefix_and_leave_a_rule_without_leaves() -> None:
    params = {"body": PARAMS, "head": {"b": torch.tensor(0.3, dtype=F64)}}
    transformations = {"slow": optim.sgd(0.1), "fast": optim.sgd(1.0), "idle": optim.adam()}
    optimizer = optim.by_label(transformations, {"body": "slow", "head": "fast"})
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params=params)
    assert close(updates, {"body": tree.scale(-0.1, PARAMS), "head": tree.scale(-1.0, params["head"])}, 0)
    assert state["idle"].step == 1
    assert tree.structure(state) == tree.structure(optimizer.init(params))
    clipped = optim.by_label({"slow": optim.clip_by_global_norm(1e-3), "fast": optim.sgd(1.0)}, {"body": "slow", "head": "fast"})
    assert tree.norm(clipped.update(params, clipped.init(params))[0]["body"]).item() == pytest.approx(1e-3, rel=1e-2)  # of its own leaves


def test_labels_in_a_chain_with_foreign_parts() -> None:
    parts = {"x": torchopt.adam(0.1), "y": optim.sgd(0.1)}
    optimizer = optim.chain(optim.clip_by_value(0.5), optim.by_label(parts, {"w": "x", "b": "y"}))
    assert isinstance(optimizer, optim.DifferentiableTransformation)
    assert ours(optimizer)["w"].isfinite().all()
    with pytest.raises(ValueError, match="hidden state"):
        optim.by_label({"x": torchopt.sgd(0.1, momentum=0.9)}, "x")


# Schedules

LR = torch.optim.lr_scheduler
SCHEDULES: dict[str, tuple[Callable[..., Any], dict[str, float], Callable[[Any], Any]]] = {
    "linear": (
        lambda start, end, n: schedules.Linear(start, end, n),
        {"start": 0.02, "end": 0.1, "n": 6.0},
        lambda o: LR.LinearLR(o, 0.2, 1.0, 6),
    ),
    "cosine": (
        lambda start, end, n: schedules.Cosine(start, n, end),
        {"start": 0.1, "end": 0.01, "n": 12.0},
        lambda o: LR.CosineAnnealingLR(o, 12, 0.01),
    ),
    "exponential": (schedules.Exponential, {"start": 0.1, "gamma": 0.9}, lambda o: LR.ExponentialLR(o, 0.9)),
    "step": (
        lambda start, gamma: schedules.Step(start, every=3, gamma=gamma),
        {"start": 0.1, "gamma": 0.5},
        lambda o: LR.StepLR(o, 3, 0.5),
    ),
    "multi-step": (
        lambda start, gamma: schedules.MultiStep(start, (2, 5, 6), gamma),
        {"start": 0.1, "gamma": 0.5},
        lambda o: LR.MultiStepLR(o, [2, 5, 6], 0.5),
    ),
    "constant": (schedules.Constant, {"value": 0.1}, lambda o: LR.ConstantLR(o, 1.0, 1)),
    "warm-up, cosine": (
        lambda peak, warm, n, start, end: schedules.WarmupCosine(peak, warm, n, start, end),
        {"peak": 0.1, "warm": 4.0, "n": 12.0, "start": 0.02, "end": 0.01},
        lambda o: LR.SequentialLR(o, [LR.LinearLR(o, 0.2, 1.0, 4), LR.CosineAnnealingLR(o, 8, 0.01)], [4]),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own call
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs_and_differentiated(name: str) -> None:
    make, numbers, torchs_scheduler = SCHEDULES[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler = torchs_scheduler(optimizer)
    schedule, expected = make(**numbers), []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    times = torch.arange(12, dtype=F64)
    values = torch.stack([schedule(t) for t in times])
    assert close(values, torch.tensor(expected, dtype=F64), 1e-14)
    assert close(vmap(schedule)(times), values, 1e-15)
    assert schedule(torch.tensor(1e9)).dtype == torch.float32
    assert schedule(torch.tensor(1e9)).isfinite()

    inside = torch.tensor([1.0, 5.0, 7.0], dtype=F64)  # between the corners

    def weighted(numbers: dict[str, Any]) -> Tensor:
        return sum((i + 1) * make(**numbers)(t) for i, t in enumerate(inside))

    leaves = {k: torch.tensor(v, dtype=F64) for k, v in numbers.items()}
    plain = central_differences(lambda x: weighted({k: float(v) for k, v in x.items()}), leaves)
    assert all(abs(float(leaf)) > 1e-4 for leaf in plain.values())
    assert relative_error(grad(weighted)(leaves), plain) < 1e-9


@pytest.mark.parametrize(
    "make", [schedules.Exponential, lambda a, g: schedules.Step(a, 1, g), lambda a, g: schedules.MultiStep(a, (1, 2), g)]
)
def test_a_factor_of_zero_has_a_second_derivative(make: Callable[..., Any]) -> None:
    """a g^n at g = 0: the second derivative by g is 2 a where n = 2, else 0."""
    for t in (0.0, 1.0, 2.0):
        value = lambda g, t=t: make(0.5, g)(torch.tensor(t, dtype=F64))  # noqa: E731
        zero = torch.tensor(0.0, dtype=F64)
        assert float(value(zero)) == (0.5 if t == 0 else 0.0)
        assert float(grad(value)(zero)) == (0.5 if t == 1 else 0.0)
        for second in (grad(grad(value)), jacfwd(grad(value)), jacrev(jacrev(value))):
            assert float(second(zero)) == (1.0 if t == 2 else 0.0)


def test_a_learned_peak_rate() -> None:
    """d / d peak of a run with warm-up, against torch.optim under the same factor."""

    def factor(t: int) -> float:
        return (t + 1) / 4 if t < 3 else 0.5 * (1 + math.cos(math.pi * (t - 3) / 5))

    def independent(e: float) -> float:
        return float(outer(torchs(lambda p: torch.optim.Adam(p, 0.07 + e), steps=7, schedule=factor)))

    def run(peak: Tensor) -> Tensor:
        return outer(ours(optim.adam(schedules.WarmupCosine(peak, 3, 8, start=peak / 4)), steps=7))

    assert abs(float(grad(run)(torch.tensor(0.07, dtype=F64))) - difference(independent)) < 1e-9


# Learned optimizers

MLP = optim.MLP(hidden=(6,))
FEATURES = optim.GradientFeatures(decays=(0.5, 0.9), square_decay=0.8, timescales=(2.0, 10.0))


def by_hand(theta: dict[str, Tensor], params: Any, objective: Any, steps: int, lr: float) -> Any:
    """The learned optimizer once more, coordinate by coordinate of the list of features, from its description."""
    state = {k: [torch.zeros_like(p) for _ in range(3)] for k, p in params.items()}
    for t in range(steps):
        moved = {}
        g_all = grad(objective)(params)
        for k, w in params.items():
            g, (m1, m2, v) = g_all[k], state[k]
            m1, m2, v = 0.5 * m1 + 0.5 * g, 0.9 * m2 + 0.1 * g, 0.8 * v + 0.2 * g**2
            state[k] = [m1, m2, v]
            root = torch.sqrt(v + 1e-6)
            columns = [g, w, m1, m2, v, m1 / root, m2 / root, 1 / root]
            columns = [c / torch.sqrt((c**2).mean() + 1e-5) for c in columns]
            columns += [torch.full_like(g, math.tanh(t / s - 1)) for s in (2.0, 10.0)]
            hidden = [
                torch.tanh(sum(theta["w0"][i, j] * c for i, c in enumerate(columns)) + theta["b0"][j]) for j in range(theta["b0"].numel())
            ]
            d, m = (sum(theta["w1"][i, j] * h for i, h in enumerate(hidden)) + theta["b1"][j] for j in (0, 1))
            moved[k] = w - lr * d * torch.exp(m / 1000)
        params = moved
    return params


def test_a_learned_optimizer_is_its_formula_and_is_differentiated() -> None:
    theta = MLP.init(FEATURES, generator=torch.Generator().manual_seed(1), dtype=F64)

    def learned(theta: Any) -> Tensor:
        return outer(ours(optim.learned(MLP, theta, FEATURES, lr=0.1), steps=3))

    assert close(learned(theta), outer(by_hand(theta, PARAMS, loss, 3, 0.1)), 1e-13)
    gradient = grad(learned)(theta)
    for name in theta:  # along one direction in each of the weights
        direction = {name: torch.randn(theta[name].shape, dtype=F64)}
        expected = difference(
            lambda e, d=direction: float(outer(by_hand({**theta, **tree.axpy(e, d, {n: theta[n] for n in d})}, PARAMS, loss, 3, 0.1)))
        )
        assert abs(expected) > 1e-5
        assert abs(float(tree.vdot({name: gradient[name]}, direction)) - expected) < 1e-9


def quadratics(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tasks |A (w - c)|^2 / 2 with curvatures between 0.1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, 4, generator=generator, dtype=F64)
    return 0.1 + 0.9 * torch.rand(n, 4, generator=generator, dtype=F64), centre


def test_meta_training_a_learned_optimizer_lowers_the_final_loss() -> None:
    def task(w: Tensor, theta: Any, batch: Any) -> Tensor:
        curvature, centre = batch
        return (curvature * (w - centre) ** 2).mean(0).sum() / 2

    solver = metacal.descent(task, lambda theta: optim.learned(MLP, theta, FEATURES, lr=0.1))
    estimate = metacal.hypergradient(task, solver, metacal.adjoints.Unrolled())
    theta = MLP.init(FEATURES, generator=torch.Generator().manual_seed(0), dtype=F64)
    outer_optimizer = optim.adam(0.02)
    outer_state = outer_optimizer.init(theta)
    values = []
    for step in range(18):
        curvature, centre = quadratics(1, step % 3)
        hg = estimate(solver.init(torch.zeros(4, dtype=F64), theta), theta, metacal.repeat((curvature, centre), 8), (curvature, centre))
        values.append(hg.value)
        updates, outer_state = outer_optimizer.update(hg.hparams, outer_state, params=theta)
        theta = optim.apply_updates(theta, updates)
    first, last = (torch.stack(values[i : i + 3]).mean() for i in (0, 15))
    assert last < 0.3 * first

    def unseen(theta: Any) -> Tensor:
        batch, state = quadratics(1, 99), solver.init(torch.zeros(4, dtype=F64), theta)
        return task(metacal.run(solver, state, theta, metacal.repeat(batch, 8)).params, theta, batch)

    fresh = MLP.init(FEATURES, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert unseen(theta) < 0.5 * unseen(fresh)


# Through the whole library


@pytest.mark.parametrize("name", ["amsgrad", "nadam", "lamb", "lion, smooth", "adafactor, matrices", "muon", "rprop", "adagrad"])
def test_hypergradients_by_all_numbers_and_all_modes(name: str) -> None:
    if name not in ROWS:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    row = ROWS[name]
    solver = metacal.descent(lambda w, h, batch: row.objective(w, batch), row.build)
    hyper, batches = row.tensors(), metacal.repeat(DATA, row.steps)
    results = [
        metacal.hypergradient(lambda w, h, batch: outer(w), solver, metacal.adjoints.Unrolled(mode=mode))(
            solver.init(row.params, hyper), hyper, batches, None
        )
        for mode in ("mixed", "reverse")
    ]
    expected = {k: difference(lambda e, k=k, v=v: float(outer(row.reference(hyper={**row.hyper, k: v + e})))) for k, v in row.hyper.items()}
    by_start = difference(lambda e: float(outer(row.reference({k: v + e * torch.cos(v) for k, v in row.params.items()}))))
    for hg in results:
        assert close(hg.hparams, {k: torch.tensor(v, dtype=F64) for k, v in expected.items()}, 1e-8)
        assert abs(float(tree.vdot(hg.params, tree.map(torch.cos, row.params))) - by_start) < 1e-8
    assert close(results[0].hparams, results[1].hparams, 1e-12)


@pytest.mark.parametrize("clipped", [True, False])
def test_a_scalar_in_float32_under_forward_mode(clipped: bool) -> None:
    """Learned are the clipping's bound and Adam's rate; torch's tangents of `number / x` and `number * x` are float64 there."""

    def optimizer(h: Any) -> optim.GradientTransformation:
        return optim.chain(optim.clip_by_global_norm(h), optim.sgd(0.1, momentum=0.9)) if clipped else optim.adam(h)

    def end(h: float) -> float:
        prepare = (lambda p: torch.nn.utils.clip_grad_norm_(p, h)) if clipped else None
        build = (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)) if clipped else (lambda p: torch.optim.Adam(p, h))
        start = {"w": torch.tensor(0.5, dtype=F64)}
        return float(torchs(build, start, 4, lambda p: (1.0 / p["w"] - 1) ** 2, prepare)["w"] ** 2)

    solver = metacal.descent(lambda w, h, batch: (1.0 / w - 1) ** 2, optimizer)
    h, w, batches = torch.tensor(0.1), torch.tensor(0.5), metacal.repeat(None, 4)
    solved = lambda h: metacal.solve(solver, w, h, batches) ** 2  # noqa: E731
    found = [
        metacal.hypergradient(lambda w, h, batch: w**2, solver, adjoint)(solver.init(w, h), h, batches, None).hparams
        for adjoint in (metacal.adjoints.Forward(), metacal.adjoints.Forward(chunk_size=1))
    ]
    by_hand = lambda h: ours(optimizer(h), w, 4, lambda w: (1.0 / w - 1) ** 2) ** 2  # noqa: E731
    found += [derivative(f)(h) for f in (solved, by_hand) for derivative in (jacfwd, lambda f: lambda h: jvp(f, (h,), (h / h,))[1])]
    expected = difference(lambda e: end(0.1 + e))
    assert abs(expected) > 0.1
    for derivative in found:
        assert derivative.dtype == torch.float32
        assert abs(float(derivative) - expected) <= 1e-5 * abs(expected)


# Laws over lanes and shapes


@every_row
def test_vmap_equals_a_loop(row: Row) -> None:
    scales, steps = torch.tensor([0.9, 0.8], dtype=F64), row.steps if row.steps > STEPS else 2

    def by_hyper(s: Tensor) -> Tensor:
        return outer(row.run({k: v * s for k, v in row.tensors().items()}, steps=steps))

    def by_params(s: Tensor) -> Tensor:
        return outer(row.run(params=tree.scale(s, row.params), steps=steps))

    def by_task(s: Tensor) -> Tensor:  # shared initial params and state, gradients per task
        return outer(row.run(objective=lambda p: row.objective(p, DATA * s), steps=steps))

    for f in (by_hyper, by_params, by_task):
        for g in (f, grad(f)):
            expected = torch.stack([g(s) for s in scales])
            assert expected.unique().numel() == 2 or row.flat
            assert close(vmap(g)(scales), expected, 1e-13), f.__name__


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([name for name, row in ROWS.items() if row.elementwise]),
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3),
    st.sampled_from([torch.float32, F64]),
    st.integers(1, 3),
)
def test_a_tree_moves_as_one_vector_of_its_leaves(name: str, shapes: list[list[int]], dtype: torch.dtype, steps: int) -> None:
    row = ROWS[name]
    params = {f"p{i}": torch.sin(1.0 + i + torch.arange(math.prod(shape), dtype=dtype)).reshape(shape) for i, shape in enumerate(shapes)}
    vector, unravel = tree.ravel(params)

    def end(start: Any) -> Any:
        optimizer, state = row.build(), row.build().init(start)
        for t in range(steps):
            updates, state = optimizer.update(tree.map(lambda p, t=t: torch.cos(3 * p + t), start), state, params=start)
            start = optim.apply_updates(start, updates)
        return start

    assert close(end(params), unravel(end(vector)), 1e-5 if dtype == torch.float32 else 1e-13)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([name for name, row in ROWS.items() if not row.elementwise and row.params is PARAMS]),
    st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_layerwise_rules_treat_each_leaf_on_its_own(name: str, shapes: list[list[int]], steps: int) -> None:
    optimizer = ROWS[name].build()
    params = {f"p{i}": torch.sin(1.0 + i + torch.arange(math.prod(shape), dtype=F64)).reshape(shape) for i, shape in enumerate(shapes)}

    def end(start: Any) -> Any:
        state = optimizer.init(start)
        for t in range(steps):
            updates, state = optimizer.update(tree.map(lambda p, t=t: torch.cos(3 * p + t), start), state, params=start)
            start = optim.apply_updates(start, updates)
        return start

    assert close(end(params), {k: end(p) for k, p in params.items()}, 1e-14)
