"""Which optimizers are refused: by the probe of foreign ones, for weight decay inside, and for bad input."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from metacal import optim, tree
from test_optim import F64, PARAMS, Row, close, every_row, loss, ours, outer

import torchopt  # isort: skip - after metacal, which silences its import of functorch

LR = {"lr": torch.tensor(0.1)}


class Noisy(NamedTuple):
    """A factory that takes no weak reference and returns another foreign optimizer each time."""

    def __call__(self, hparams: Any) -> Any:
        return foreign(lambda g, s, w: (tree.map(lambda x: x + torch.rand(()), g), s))


def foreign(rule: Callable[[Any, Any, Any], Any], start: Any = ()) -> Any:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return rule(updates, state, params)

    return torchopt.base.GradientTransformation(lambda params: start, update)


def writing(g: Any, s: Any, w: Any) -> Any:
    return tree.map(lambda x: x.mul_(2.0), g), s


builds = itertools.count(1)


def differently_each_time(hparams: Any) -> Any:
    rate = 0.1 * next(builds)
    return foreign(lambda g, s, w: (tree.scale(-rate, g), s))


ACCEPTED: dict[str, Any] = {
    "adam": torchopt.adam(1e-3),
    "adam, decay": torchopt.adam(1e-3, weight_decay=0.1),
    "adamw": torchopt.adamw(1e-3),
    "rmsprop": torchopt.rmsprop(1e-3),
    "rmsprop, centered": torchopt.rmsprop(1e-3, centered=True),
    "adagrad": torchopt.adagrad(1e-2),
    "sgd": torchopt.sgd(0.1),
    "sgd, decay": torchopt.sgd(0.1, weight_decay=0.1),
    "sgd, schedule": torchopt.sgd(torchopt.schedule.linear_schedule(0.1, 0.01, 10)),
    "learnable sgd": lambda h: torchopt.sgd(h["lr"]),
    "learnable adam": lambda h: torchopt.adam(h["lr"]),
    "mixed chain": torchopt.chain(optim.clip_by_global_norm(1.0), torchopt.adam(1e-3)),
    "by hand": foreign(lambda g, s, w: (tree.scale(-0.1, g), s)),
    "count in the state": foreign(lambda g, s, w: (tree.scale(-0.1, g), (s[0] + 1,)), (torch.zeros((), dtype=torch.int64),)),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "momentum": (torchopt.sgd(0.1, momentum=0.9), r"a second update .* hidden state.*another step.*metacal\.optim\.sgd\(lr, momentum"),
    "momentum, learnable": (lambda h: torchopt.sgd(h["lr"], momentum=0.9), r"hidden state.*metacal\.optim\.sgd\(lr, momentum"),
    "rmsprop, momentum": (torchopt.rmsprop(0.1, momentum=0.9), r"hidden state.*rmsprop\(\.\.\., momentum"),
    "clip": (
        torchopt.clip.clip_grad_norm(0.5),
        r"torchopt\.clip\.clip_grad_norm.*by? ?.*the gradient is not.*hypergradient would be wrong.*metacal\.optim\.clip_by_global_norm",
    ),
    "clip, rarely": (torchopt.clip.clip_grad_norm(1e3), r"the gradient is not"),
    "clip, in a chain": (torchopt.chain(torchopt.clip.clip_grad_norm(0.5), optim.sgd(0.1)), r"the gradient is not.*clip_by_global_norm"),
    "tensor betas": (lambda h: torchopt.adam(0.1, betas=(h["lr"], 0.99)), r"raised TypeError .*hyperparameters may be tensors"),
    "float(tensor)": (lambda h: torchopt.sgd(h["lr"].detach()), r"the hparams is not"),
    "detached state": (
        foreign(lambda g, s, w: (tree.add(g, s), tree.add(tree.detach(s), g)), {"a": torch.ones(3), "b": torch.ones(2, 2)}),
        r"the state is not",
    ),
    "detached params": (foreign(lambda g, s, w: (tree.axpy(0.1, tree.detach(w), g), s)), r"the params is not"),
    "writes": (foreign(writing), r"writes into its input"),
    "built differently": (differently_each_time, r"built anew, it gives another result.*hidden state"),
    "random": (Noisy(), r"hidden state"),
    "NaN": (foreign(lambda g, s, w: (tree.scale(math.nan, g), s)), r"is not"),
}


@pytest.mark.parametrize("optimizer", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_probe_accepts(optimizer: Any) -> None:
    before = torch.get_rng_state()
    optim.probe(optimizer, LR)
    assert optim.resolve(optimizer, LR).update is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("optimizer", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_the_probe_refuses(optimizer: Any, message: str) -> None:
    for _ in range(2):  # the second time too: probing used up momentum's hidden first call
        with pytest.raises(ValueError, match=message):
            optim.resolve(optimizer, LR)


@pytest.mark.cuda
def test_the_probe_with_hyperparameters_on_a_gpu() -> None:
    optim.probe(lambda h: torchopt.sgd(h["lr"]), {"lr": torch.tensor(0.1, device="cuda")})


@every_row
def test_the_probe_would_accept_ours(row: Row) -> None:
    if row.ours is not optim.muon:  # the probe has a vector
        optim.probe(row.build, row.tensors())
        optim.probe(optim.chain(optim.clip_by_global_norm(1.0), row.build()))


def test_each_foreign_optimizer_is_probed_once_and_not_kept_alive() -> None:
    calls = 0

    def factory(hparams: Any) -> Any:
        nonlocal calls
        calls += 1
        return torchopt.sgd(hparams["lr"])

    optim.resolve(factory, LR)
    assert calls > 2
    calls = 0
    optim.resolve(factory, LR)
    assert calls == 1
    gone = weakref.ref(factory)
    verdicts = len(optim.foreign._verdicts)
    del factory
    gc.collect()
    assert gone() is None
    assert len(optim.foreign._verdicts) == verdicts - 1


@pytest.mark.parametrize("join", [torchopt.chain, optim.chain, lambda a, b: a.chain(b)])
def test_ours_are_never_probed(join: Callable[..., Any]) -> None:
    calls = 0

    def factory(hparams: Any) -> Any:
        nonlocal calls
        calls += 1
        return join(optim.clip_by_global_norm(1.0), optim.sgd(hparams["lr"]))

    optim.resolve(factory, LR)
    assert calls == 1
    sgd = optim.sgd(0.1)
    assert optim.resolve(sgd, LR) is sgd


def test_probing_inside_transforms() -> None:
    def unrolled(lr: Tensor) -> Tensor:
        optimizer = optim.resolve(lambda h: torchopt.sgd(h["lr"]), {"lr": lr})
        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = optimizer.update(grad(loss)(params), state, params=params, inplace=False)
            params = optim.apply_updates(params, updates)
        return outer(params)

    rate = torch.tensor(0.1, dtype=F64)
    expected = grad(lambda lr: outer(ours(optim.sgd(lr), steps=2)))(rate)
    assert close(grad(unrolled)(rate), expected, 1e-14)
    assert close(jvp(unrolled, (rate,), (torch.ones_like(rate),))[1], expected, 1e-14)
    with torch.no_grad():
        optim.probe(lambda h: torchopt.adam(h["lr"]), LR)

    def scaled(s: Tensor) -> Tensor:
        optimizer = optim.resolve(lambda h: foreign(lambda g, state, w: (tree.scale(-h, g), state)), s)
        return optimizer.update(PARAMS["w"], ())[0].sum()

    rates = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    assert close(vmap(grad(scaled))(rates), -PARAMS["w"].sum().expand(3), 1e-14)


@pytest.mark.parametrize(
    ("optimizer", "moves"),
    [
        (optim.sgd(0.1, momentum=0.9), False),
        (optim.sgd(0.1, weight_decay=0.1), True),
        (optim.sgd(lambda t: 0.1 * t, weight_decay=0.1), True),
        (optim.adam(), False),
        (optim.adam(weight_decay=1e-4), True),
        (optim.adamw(), True),
        (optim.adamw(weight_decay=0.0), False),
        (optim.rmsprop(centered=True, momentum=0.9), False),
        (optim.rmsprop(weight_decay=0.1), True),
        (optim.adagrad(), False),
        (optim.adadelta(), False),
        (optim.adamax(), False),
        (optim.nadam(), False),
        (optim.nadam(weight_decay=0.1, decoupled_weight_decay=True), True),
        (optim.radam(), False),
        (optim.radam(weight_decay=0.1), True),
        (optim.asgd(), True),
        (optim.asgd(lambd=0.0), False),
        (optim.rprop(), False),
        (optim.lion(), False),
        (optim.lion(weight_decay=0.1), True),
        (optim.lars(0.1), True),
        (optim.lars(0.1, weight_decay=0.0), False),
        (optim.lamb(), False),
        (optim.lamb(weight_decay=0.1), True),
        (optim.adafactor(), False),
        (optim.adafactor(weight_decay=0.1), True),
        (optim.chain(optim.sgd(0.1), optim.add_decayed_weights(-0.01)), True),
        (optim.chain(optim.clip_by_value(1.0), optim.meta_sgd({"w": torch.ones(50, 2), "b": 0.1})), False),
        (optim.by_label({"matrix": optim.muon(), "rest": optim.sgd(0.1)}, {"w": "matrix", "b": "rest"}), True),
        (optim.by_label({"matrix": optim.muon(weight_decay=0.0), "rest": optim.sgd(0.1)}, {"w": "matrix", "b": "rest"}), False),
        (optim.learned(lambda theta, f: theta * f[..., 0], torch.tensor(1.0)), False),
        (optim.learned(optim.MLP(), optim.MLP().init()), True),
        (optim.chain(optim.clip_by_global_norm(1.0), optim.adamw()), True),
        (torchopt.adamw(1e-3, weight_decay=0.1), True),
        (torchopt.adam(1e-3), False),
        (lambda h: optim.sgd(h["lr"], weight_decay=h["lr"]), True),
        (lambda h: optim.sgd(h["lr"], weight_decay=0 * h["lr"]), False),
    ],
)
def test_moves_at_zero_gradient(optimizer: Any, moves: bool) -> None:
    params = {"w": torch.randn(50, 2), "b": torch.zeros(())}
    assert optim.moves_at_zero_gradient(optimizer, LR, params) is moves
    seen = []
    vmap(grad(lambda lr: (seen.append(optim.moves_at_zero_gradient(optimizer, {"lr": lr}, params)), lr)[1]))(torch.tensor([0.1, 0.2]))
    assert seen == [moves]


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (optim.adamw(1e-6), torch.float32),
        (optim.adamw(1e-5, weight_decay=1e-3), torch.float32),
        (optim.adamw(1e-3), torch.bfloat16),
        (optim.chain(optim.add_decayed_weights(0.01), optim.sgd(0.1)), torch.bfloat16),
        (lambda h: optim.sgd(h["lr"], weight_decay=1e-3), torch.float16),
    ],
)
def test_a_decay_that_one_step_rounds_away_moves_all_the_same(optimizer: Any, dtype: torch.dtype) -> None:
    params, rate = torch.zeros(2, dtype=dtype), {"lr": torch.tensor(1e-3, dtype=dtype)}
    assert optim.moves_at_zero_gradient(optimizer, rate, params)
    built = optim.resolve(optimizer, rate)
    ones = torch.ones_like(params)
    assert torch.equal(optim.moved(built, params, built.init(ones), ones)[0], ones)


def test_an_update_in_one_precision_is_looked_at_in_it() -> None:
    matrix = torch.eye(2)
    for rate, moves in ((0.0, False), (0.1, True)):
        rotated = foreign(lambda g, s, w, rate=rate: (-(matrix @ g) - rate * (matrix @ w), s))
        assert optim.moves_at_zero_gradient(rotated, (), torch.zeros(2)) is moves


# Bad input


def start(optimizer: optim.GradientTransformation) -> Any:
    return optimizer.update(PARAMS, optimizer.init(PARAMS), params=PARAMS)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: optim.sgd(-0.1), ValueError, r"`lr` should be at least 0, got -0\.1"),
        (lambda: optim.sgd(math.nan), ValueError, r"`lr` should be at least 0, got nan"),
        (lambda: optim.sgd(0.1, momentum=-1), ValueError, "`momentum`"),
        (lambda: optim.sgd(0.1, weight_decay=-1), ValueError, "`weight_decay`"),
        (lambda: optim.sgd(0.1, nesterov=True), ValueError, r"`nesterov` needs a momentum.*Set momentum"),
        (lambda: optim.sgd(0.1, 0.9, dampening=0.1, nesterov=True), ValueError, "`nesterov` needs .* no dampening"),
        (lambda: optim.sgd(torch.ones(1)), ValueError, r"`lr` should be a 0-dim tensor, got shape \(1,\).*reshape"),
        (lambda: optim.sgd({"lr": 0.1}), TypeError, r"`lr` should be a number, .* got dict\. .*hparams\['lr'\]"),
        (lambda: optim.adam(betas=(0.9, 1.0)), ValueError, r"`betas\[1\]` should be in \[0, 1\), got 1\.0"),
        (lambda: optim.adam(betas=(-0.1, 0.9)), ValueError, r"`betas\[0\]`"),
        (lambda: optim.adam(betas=0.9), TypeError, r"`betas` should be a pair"),
        (lambda: optim.adam(eps=-1.0), ValueError, "`eps`"),
        (lambda: optim.adamw(weight_decay=-1.0), ValueError, "`weight_decay`"),
        (lambda: optim.rmsprop(alpha=-1.0), ValueError, "`alpha`"),
        (lambda: optim.adagrad(lr_decay=-1.0), ValueError, "`lr_decay`"),
        (lambda: optim.adagrad(initial_accumulator_value=-1.0), ValueError, "`initial_accumulator_value`"),
        (lambda: optim.clip_by_global_norm(-1.0), ValueError, "`max_norm`"),
        (lambda: optim.adamw().update(PARAMS, optim.adamw().init(PARAMS)), ValueError, r"`params` should be given"),
        (lambda: optim.adam().init({"w": torch.ones(1, dtype=torch.complex64)}), TypeError, "`params` should be real.*view_as_real"),
        (lambda: optim.adadelta(rho=1.0), ValueError, r"`rho` should be in \[0, 1\), got 1\.0"),
        (lambda: optim.nadam(momentum_decay=-1.0), ValueError, "`momentum_decay`"),
        (lambda: optim.asgd(lambd=-1.0), ValueError, "`lambd`"),
        (lambda: optim.asgd(weight_decay=0.0).update(PARAMS, optim.asgd().init(PARAMS)), ValueError, r"`params` should be given"),
        (lambda: optim.rprop(etas=(1.0, 1.2)), ValueError, r"`etas\[0\]` should be in \[0, 1\), got 1\.0"),
        (lambda: optim.rprop(etas=(0.5, 0.9)), ValueError, r"`etas\[1\]` should be at least 1, got 0\.9"),
        (lambda: optim.rprop(step_sizes=1.0), TypeError, r"`step_sizes` should be a pair"),
        (lambda: optim.lion(smoothing=-1.0), ValueError, "`smoothing`"),
        (lambda: optim.lars(0.1, trust_coefficient=-1.0), ValueError, "`trust_coefficient`"),
        (lambda: optim.lamb().update(PARAMS, optim.lamb().init(PARAMS)), ValueError, r"`params` should be given"),
        (lambda: optim.muon().init(PARAMS), ValueError, r"`params` at 'b' should be a matrix .*got shape \(\).*by_label"),
        (lambda: optim.muon(ns_steps=100), ValueError, "`ns_steps`"),
        (lambda: optim.muon(ns_coefficients=(1.0, 2.0)), TypeError, "`ns_coefficients` should be three"),
        (lambda: optim.muon(adjust_lr_fn="rms"), ValueError, r"`adjust_lr_fn` should be None or one of \('original'"),
        (lambda: optim.adafactor(d=0.5), ValueError, "`d` should be at least 1"),
        (lambda: optim.adafactor(beta2_decay=0.8), ValueError, "`beta2_decay` should be at most 0"),
        (lambda: optim.adafactor(eps=1e-3), TypeError, "`eps` should be a pair"),
        (lambda: optim.clip_by_value(-1.0), ValueError, "`clip_value`"),
        (lambda: start(optim.scale({"v": 1.0})), ValueError, r"`factor` should be a tree like the params \['b', 'w'\].*got \['v'\]"),
        (lambda: start(optim.meta_sgd({"w": torch.ones(4), "b": 1.0})), ValueError, r"`rates` .*of their leaf, \(3,\); got \(4,\)"),
        (lambda: start(optim.meta_sgd(torch.ones(3))), ValueError, r"`rates` .*of their leaf, \(\); got \(3,\)"),
        (
            lambda: start(optim.by_label({"a": optim.sgd(1.0)}, {"w": "a", "b": "c"})),
            ValueError,
            r"`labels` at 'b' is 'c', which no .*\['a'\]",
        ),
        (lambda: start(optim.by_label({"a": optim.sgd(1.0)}, {"w": "a"})), ValueError, r"`labels` should be a tree like the params"),
        (lambda: start(optim.by_label({"a": optim.sgd(1.0)}, {"w": "a", "b": 1})), ValueError, r"`labels` at 'b' is 1, which no"),
        (lambda: optim.by_label({"a": optim.sgd}, "a"), TypeError, r"`transformations` at 'a' .*got function.*by_label"),
        (lambda: optim.learned(None, {}), TypeError, r"`apply` should be a function .*got NoneType"),
        (lambda: start(optim.learned(lambda th, f: f, {})), ValueError, r"`apply` should give one number per coordinate.*\(21,\)"),
        (lambda: optim.GradientFeatures(decays=(1.0,)), ValueError, r"`decays\[0\]`"),
        (lambda: optim.GradientFeatures(timescales=(0.0,)), ValueError, "`timescales` should be positive"),
        (lambda: optim.schedules.Step(0.1, every=0), ValueError, "`every` should be an integer of at least 1"),
        (lambda: optim.schedules.MultiStep(0.1, (5, 0.5)), ValueError, r"`milestones\[1\]`"),
        (lambda: optim.schedules.Cosine(0.1, 0), ValueError, "`num_steps` should be at least 1"),
        (lambda: optim.schedules.WarmupCosine(0.1, 10, 10), ValueError, r"`num_steps` counts the warm-up too.*10, got 10"),
        (lambda: optim.schedules.Linear({}, 0.1, 10), TypeError, "`start` should be a number"),
        (lambda: optim.resolve(torch.optim.SGD, {}), TypeError, r"`optimizer` should be .*got SGD.*metacal\.optim"),
        (lambda: optim.resolve(torch.optim.SGD([torch.ones(1)], 0.1), {}), TypeError, "got SGD"),
        (lambda: optim.resolve("adam", {}), TypeError, "`optimizer` should be .*got str"),
        (lambda: optim.resolve(lambda h: h, {}), TypeError, "the function returned dict"),
    ],
)
def test_bad_input_is_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
