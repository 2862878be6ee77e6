"""Each peer's hypergradient against oracles that share no code with it: right where the peer is, and pinned where it is not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import problems
from benchmarks.methods import Method, Unsupported
from benchmarks.peers import peers
from benchmarks.problem import Problem, Rule, astype
from benchmarks.problems import PROBLEMS
from problems import F64, OPTIMIZERS, close, relative_error

PEERS = peers()
RULES = {
    "sgd": (Rule("sgd", 0.3), replace(OPTIMIZERS["sgd"], hyper={"lr": 0.3})),
    "momentum": (Rule("sgd", 0.1, 0.9), OPTIMIZERS["momentum0.9"]),
    "adam": (Rule("adam", 0.1), OPTIMIZERS["adam"]),
}
T, PRODUCTS, STEP_SIZE = 7, 20, 0.8
INVERSES = {"Neumann 20": problems.neumann_series(PRODUCTS, STEP_SIZE), "CG 20": problems.smallest_energy(PRODUCTS)}
IN_JAX = ["quadratic", "ridge", "cleaning-mnist-50-samples", "mlp", "conv"]


def _cross_entropy(p: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x @ p["layer.weight"] + p["bias"]
    return torch.logsumexp(z, -1) - z.gather(-1, y[:, None])[:, 0]


def _inner(p: Any, h: Any, b: Any) -> Tensor:
    x, y, index = b
    fit = (torch.sigmoid(h["weights"][index]) * _cross_entropy(p, x, y)).mean()
    return fit + 0.5 * h["log.decay"].exp() * sum((w**2).sum() for w in p.values())


def _outer(p: Any, h: Any, b: Any) -> Tensor:
    return _cross_entropy(p, *b).mean() + 0.01 * (h["log.decay"] - h["target"]) ** 2


def six(rule: Rule) -> Problem:
    """Six params in two leaves, not sorted and one with a dot in its name; hparams in the inner, the outer and in both objectives."""
    generator = torch.Generator().manual_seed(3)
    x, xv = torch.randn(9, 2, generator=generator, dtype=F64), torch.randn(5, 2, generator=generator, dtype=F64)
    minibatches = [(x[i], i % 2, i) for i in torch.arange(9).split(3)]
    return Problem(
        "six params",
        _inner,
        _outer,
        params={"layer.weight": torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=F64), "bias": torch.tensor([0.1, -0.1], dtype=F64)},
        hparams={
            "weights": torch.linspace(-1, 1, 9, dtype=F64),
            "log.decay": torch.tensor(-2.0, dtype=F64),
            "target": torch.tensor(-1.0, dtype=F64),
        },
        batches=[minibatches[t % 3] for t in range(T)],
        outer_batch=(xv, torch.arange(5) % 2),
        rule=rule,
        step_size=STEP_SIZE,
    )


def never_moved(rule: Rule, features: int = 2) -> Problem:
    """A coordinate that never has a gradient, as that of a pixel which is black in all images."""
    return Problem(
        "never moved",
        lambda p, h, b: ((b @ p["w"] - h["h"]) ** 2).sum(),
        lambda p, h, b: (p["w"] ** 2).sum(),
        params={"w": torch.tensor([0.5, 0.3], dtype=F64)[:features]},
        hparams={"h": torch.tensor(0.4, dtype=F64)},
        batches=[torch.tensor([[1.0, 0.0]], dtype=F64)[:, :features]] * T,
        outer_batch=(),
        rule=rule,
    )


def zero_dim(rule: Rule) -> Problem:
    """One 0-dim param."""
    return Problem(
        "0-dim",
        lambda p, h, b: h["h"].exp() * p["w"] ** 2 / 2 - p["w"],
        lambda p, h, b: p["w"] ** 3,
        params={"w": torch.tensor(0.5, dtype=F64)},
        hparams={"h": torch.tensor(-0.4, dtype=F64)},
        batches=[()] * T,
        outer_batch=(),
        rule=rule,
        step_size=STEP_SIZE,
    )


def written_out(problem: Problem, optimizer: problems.Optimizer) -> Any:
    """The exact hypergradient of the T steps."""
    return problems.unrolled_gradient(_oracle(problem), optimizer, T).hparams


def trained(problem: Problem, optimizer: problems.Optimizer) -> Any:
    start = problems.leaf_grads(problem.params)
    return problems.tree_map(torch.Tensor.detach, problems.loop(problem.inner, optimizer, start, problem.hparams, problem.batches))


def densely(problem: Problem, optimizer: problems.Optimizer, inverse: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The implicit hypergradient where the T steps end, by the matrix of the last batch."""
    p = problem
    return problems.implicit_gradient(p.inner, p.outer, trained(p, optimizer), p.hparams, p.batches[-1], p.outer_batch, inverse).hparams


def _oracle(problem: Problem) -> problems.Problem:
    p = problem
    return problems.Problem(p.name, p.inner, p.outer, p.params, p.hparams, tuple(p.batches), p.outer_batch, p.step_size)


def prepared(name: str, problem: Problem) -> Callable[[], Any]:
    """A peer's call, or a skip with the reason why the peer is not here."""
    if name not in PEERS:
        package = {"optax": "jaxopt"}.get(name.split()[0], name.split()[0])
        with pytest.raises(Unsupported) as refusal:
            PEERS[package].prepare(problem)
        pytest.skip(str(refusal.value))
    return PEERS[name].prepare(problem)


def agree(got: Any, truth: Any, tolerance: float) -> None:
    """Leaf by leaf: a large direct part must not hide a small indirect one."""
    assert list(got) == list(truth)
    for name in truth:
        close(got[name], truth[name], tolerance)


UNROLLED = ["autograd", "higher", "torchopt MetaOptimizer", "torchopt functional"]
ADAM_OF_ITS_OWN = ("higher", "torchopt")  # see below
IMPLICIT = [
    f"{library} {solver}" for library in ("autograd", "torchopt", "betty") for solver in INVERSES if (library, solver) != ("betty", "CG 20")
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", UNROLLED)
def test_an_unrolled_peer_is_exact(name: str, rule: str) -> None:
    ours, optimizer = RULES[rule]
    problem = six(ours)
    call, truth = prepared(name, problem), written_out(problem, optimizer)
    tolerance = 1e-4 if rule == "adam" and name.startswith(ADAM_OF_ITS_OWN) else 1e-12
    for _ in range(2):  # a second call starts where the first did
        agree(call(), truth, tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_peer_is_the_textbook_s(name: str, rule: str) -> None:
    ours, optimizer = RULES[rule]
    problem = six(ours)
    library, solver = name.split(" ", 1)
    call, truth = prepared(name, problem), densely(problem, optimizer, INVERSES[solver])
    tolerance = 1e-4 if rule == "adam" and library in ADAM_OF_ITS_OWN else 1e-11
    for _ in range(2):
        agree(call(), truth, tolerance)


def test_betty_s_darts_is_the_central_difference() -> None:
    ours, optimizer = RULES["momentum"]
    problem = six(ours)
    call = prepared("betty DARTS", problem)
    point = trained(problem, optimizer)
    truth = problems.difference_gradient(
        problem.inner, problem.outer, point, problem.hparams, problem.batches[-1], problem.outer_batch, radius=0.01
    ).hparams
    for _ in range(2):
        agree(call(), truth, 1e-10)


# Twins in JAX, on the benchmark's own problems at their smallest


@pytest.mark.parametrize("row", IN_JAX)
def test_jax_agrees(row: str) -> None:
    problem = astype(PROBLEMS[row].make("tiny"), F64)
    call = prepared("optax unrolled", problem)
    agree(call(), PEERS["autograd"].prepare(problem)(), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_jax_agrees_under_every_rule(rule: str) -> None:
    problem = replace(PROBLEMS["quadratic"].make("tiny"), rule=RULES[rule][0])
    for jax, plain in (("optax unrolled", "autograd"), ("jaxopt CG 20", "autograd CG 20")):
        call = prepared(jax, problem)
        agree(call(), PEERS[plain].prepare(problem)(), 1e-8)


def test_a_problem_that_changed_under_its_twin_is_noticed() -> None:
    problem = PROBLEMS["ridge"].make("tiny")
    changed = replace(problem, inner=lambda p, h, b: 2 * problem.inner(p, h, b))
    with pytest.raises(RuntimeError, match="write the twin again"):
        prepared("optax unrolled", changed)


def test_what_is_not_written_in_jax_is_refused() -> None:
    prepared("optax unrolled", PROBLEMS["quadratic"].make("tiny"))
    with pytest.raises(Unsupported, match="not written in JAX"):
        prepared("optax unrolled", six(RULES["sgd"][0]))


# Where a peer is wrong: facts about it, which an update of the peer may change


def test_higher_s_adam_adds_eps_before_it_corrects_the_bias() -> None:
    """As torch did once: its eps is larger than torch's by 1 / sqrt(1 - b2^t), 30 times at the first step."""

    def former(w: Tensor, g: Tensor, s: dict[str, Tensor], t: int, h: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return optimizer.step(w, g, s, t, {**h, "eps": h["eps"] / (1 - h["betas"][1] ** t) ** 0.5})

    ours, optimizer = RULES["adam"]
    problem = six(ours)
    found = prepared("higher", problem)()
    agree(found, written_out(problem, replace(optimizer, step=former)), 1e-12)
    assert relative_error(found, written_out(problem, optimizer)) > 1e-7


@pytest.mark.parametrize("name", ["torchopt MetaOptimizer", "torchopt functional"])
def test_torchopt_s_adam_corrects_the_bias_in_float32(name: str) -> None:
    ours, optimizer = RULES["adam"]
    problem = six(ours)
    assert 1e-9 < relative_error(prepared(name, problem)(), written_out(problem, optimizer)) < 1e-4


@pytest.mark.parametrize("name", UNROLLED)
def test_a_coordinate_without_gradient_under_adam(name: str) -> None:
    """The root of its second moment has no derivative at 0: torchopt's hypergradient is NaN, in all of it."""
    ours, optimizer = RULES["adam"]
    found = prepared(name, never_moved(ours))()
    if name.startswith("torchopt"):
        assert found["h"].isnan()
    else:  # the loop that is written out is NaN too: the oracle is without that coordinate, which changes nothing
        agree(found, written_out(never_moved(ours, features=1), optimizer), 1e-4 if name == "higher" else 1e-12)


def test_optax_s_adam_is_nan_there_too() -> None:
    problem = replace(PROBLEMS["logistic"].make("tiny"), rule=RULES["adam"][0])
    assert (problem.batches[0][0] == 0).all(0).any()
    found = prepared("optax unrolled", problem)()
    assert found["log_decay"].isnan().any()
    assert not PEERS["autograd"].prepare(problem)()["log_decay"].isnan().any()


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_zero_dim_param(name: str) -> None:
    """torchopt takes the single number for a matrix."""
    ours, optimizer = RULES["sgd"]
    problem = zero_dim(ours)
    call = prepared(name, problem)
    if name == "torchopt Neumann 20":
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            call()
    else:
        agree(call(), densely(problem, optimizer, INVERSES[name.split(" ", 1)[1]]), 1e-12)


def test_betty_s_cg_goes_on_from_the_old_residual() -> None:
    """So its directions are not conjugate, and no number of products gives the textbook's."""

    def theirs(matrix: Tensor, b: Tensor) -> Tensor:
        x, r, p = torch.zeros_like(b), b, b
        for _ in range(PRODUCTS):
            alpha = r @ r / (p @ matrix @ p)
            x, following = x + alpha * p, r - alpha * matrix @ p
            p, r = r + (following @ following / (r @ r)) * p, following
        return x

    ours, optimizer = RULES["sgd"]
    problem = six(ours)
    found = prepared("betty CG 20", problem)()
    agree(found, densely(problem, optimizer, theirs), 1e-8)
    assert relative_error(found, densely(problem, optimizer, INVERSES["CG 20"])) > 0.1


def test_betty_s_unrolled_problem_does_not_start() -> None:
    with pytest.raises(Unsupported, match="IterativeProblem does not start: KeyError: 'params'"):
        prepared("betty unrolled", six(RULES["sgd"][0]))


# What holds for every row


@pytest.mark.parametrize("name", PEERS)
def test_no_graph_outlives_a_call_and_float32_stays(name: str) -> None:
    problem = astype(six(RULES["momentum"][0]), torch.float32)
    try:
        call = PEERS[name].prepare(problem)
    except Unsupported as reason:
        pytest.skip(str(reason))
    call()
    gc.collect()
    gc.disable()  # nor does it wait in a cycle
    try:
        before = graphs()
        found = call()
        assert graphs() == before
    finally:
        gc.enable()
    held = [x.requires_grad_() * 2 for x in found.values()]  # what this test would see
    assert graphs() == before + len(held)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found.values())


def graphs() -> int:
    return sum(issubclass(type(x), Tensor) and x.grad_fn is not None for x in gc.get_objects())


def test_a_missing_package_is_a_row_that_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.higher_peer", raising=False)
    found = peers()
    assert found.keys() >= {"autograd", "torchopt functional"}
    assert isinstance(found["higher"], Method)
    with pytest.raises(Unsupported, match="pip install higher"):
        found["higher"].prepare(six(RULES["sgd"][0]))
