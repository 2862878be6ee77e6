"""Few-shot learners against steps written out by hand, and episodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metacal import _fastest, bilevel, linear, optim, tree
from metacal.algorithms import accuracy, anil, first_order_maml, imaml, maml, meta_sgd, reptile
from metacal.data import Images
from metacal.data.episodes import Episodes
from problems import F64, central_differences, close, ravel, unravel

LR, STRENGTH, OUTER = 0.1, 0.7, 0.5


def tasks() -> tuple[Tensor, Tensor]:
    i = torch.arange(3 * 4 * 2, dtype=F64)
    return torch.sin(i).reshape(3, 4, 2), torch.cos(2 * i).reshape(3, 4, 2)


def params() -> dict[str, Tensor]:
    return {"body": torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=F64), "head": torch.tensor([0.5, -1.0], dtype=F64)}


def loss(w: Any, batch: Tensor) -> Tensor:
    return ((torch.tanh(batch @ w["body"]) @ w["head"] - batch.sum(-1)) ** 2).mean()


def gradient(w: dict[str, Tensor], batch: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss(w, batch), list(w.values()), create_graph=create_graph)
    return dict(zip(w, found, strict=True))


def meta_loss(w: dict[str, Tensor], rates: dict[str, Any], num_steps: int) -> Tensor:
    """mean_k l_k^q(theta'_k), differentiable, written out."""
    support, query = tasks()
    total = torch.zeros((), dtype=F64)
    for s, q in zip(support, query, strict=True):
        adapted = w
        for _ in range(num_steps):
            g = gradient(adapted, s, create_graph=True)
            adapted = {k: adapted[k] - rates[k] * g[k] for k in w}
        total = total + loss(adapted, q) / len(support)
    return total


def moved(learner: Any) -> tuple[Any, Any]:
    state = learner.init(params())
    return learner.step(state, *tasks())


def leaves_of(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in w.items()}


@pytest.mark.parametrize("how", ["loop", "vmap"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_maml_moves_along_the_meta_gradient(num_steps: int, how: Any) -> None:
    state, hg = moved(maml(loss, LR, optim.sgd(OUTER), num_steps=num_steps, tasks=how))
    w = leaves_of(params())
    value = meta_loss(w, dict.fromkeys(w, LR), num_steps)
    value.backward()
    close(hg.value, value.detach(), 1e-12)
    close(state.inner.params, {k: (v - OUTER * v.grad).detach() for k, v in w.items()}, 1e-12)


class Clock:
    """Stands still but for what a way says that it took."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def way(self, name: str, *seconds: float) -> Callable[[], None]:
        taken = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(taken)

        return run


def test_the_fastest_way_is_that_of_the_best_of_two_runs_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(_fastest.time, "perf_counter", lambda: clock.now)
    ways = {"steady": clock.way("steady", 3.0, 3.0), "warms up": clock.way("warms up", 9.0, 2.0), "fails": clock.way("fails")}
    assert _fastest.fastest(ways, torch.device("cpu")) == "warms up"
    assert clock.calls == ["steady", "warms up", "fails", "steady", "warms up"]
    with pytest.raises(StopIteration):
        _fastest.fastest({"fails": clock.way("fails")}, torch.device("cpu"))


@pytest.mark.parametrize("faster", ["loop", "vmap"])
def test_auto_stays_with_the_way_that_was_faster(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[list[str]] = []

    def chosen(ways: dict[str, Callable[[], Any]], device: torch.device) -> str:
        offered.append(sorted(ways))
        torch.rand(3)
        ways[faster]()
        return faster

    monkeypatch.setattr(bilevel, "fastest", chosen)
    learner = maml(loss, LR, optim.sgd(OUTER), num_steps=2, tasks="auto")
    by_hand = maml(loss, LR, optim.sgd(OUTER), num_steps=2, tasks=faster)
    state = expected = learner.init(params())
    before = torch.get_rng_state()
    for _ in range(2):
        state, expected = learner.step(state, *tasks())[0], by_hand.step(expected, *tasks())[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ravel(state.inner.params), ravel(expected.inner.params))
    assert offered == [["loop", "vmap"]], "once"


def test_auto_goes_in_a_loop_where_vmap_cannot() -> None:
    def reading(w: Any, batch: Tensor) -> Tensor:
        return loss(w, batch) * (1.0 if bool(batch.sum() > -1e9) else 0.0)  # asks the host

    state, _ = maml(reading, LR, optim.sgd(OUTER), tasks="auto").step(maml(reading, LR, optim.sgd(OUTER)).init(params()), *tasks())
    close(ravel(state.inner.params), ravel(moved(maml(loss, LR, optim.sgd(OUTER), tasks="loop"))[0].inner.params), 1e-12)


def test_first_order_maml_takes_the_gradient_where_the_steps_end() -> None:
    state, _ = moved(first_order_maml(loss, LR, optim.sgd(OUTER), num_steps=2, tasks="loop"))
    support, query = tasks()
    mean = {k: torch.zeros_like(v) for k, v in params().items()}
    for s, q in zip(support, query, strict=True):
        w = leaves_of(params())
        for _ in range(2):
            g = gradient(w, s)
            w = {k: (w[k] - LR * g[k]).detach().requires_grad_() for k in w}
        mean = {k: mean[k] + g / 3 for k, g in gradient(w, q).items()}
    close(state.inner.params, {k: v - OUTER * mean[k] for k, v in params().items()}, 1e-12)


def test_reptile_moves_towards_the_mean_of_the_adapted_params() -> None:
    learner = reptile(loss, LR, optim.sgd(OUTER), num_steps=3, tasks="loop")
    state, hg = moved(learner)
    assert hg.stats["first_bad_step"] == -1
    adapted = learner.adapt(learner.init(params()), tasks()[0])
    w = leaves_of(params())
    s = tasks()[0][1]
    for _ in range(3):
        g = gradient(w, s)
        w = {k: (w[k] - LR * g[k]).detach().requires_grad_() for k in w}
    close(tree.index(adapted, 1), tree.detach(w), 1e-12)
    close(state.inner.params, {k: v + OUTER * (adapted[k].mean(0) - v) for k, v in params().items()}, 1e-12)


def test_anil_adapts_the_head_and_learns_both() -> None:
    learner = anil(loss, LR, optim.sgd(OUTER), head=["head"], num_steps=2)
    state, _ = moved(learner)
    w = leaves_of(params())
    meta_loss(w, {"body": 0.0, "head": LR}, 2).backward()
    close(state.inner.params, {"head": (w["head"] - OUTER * w["head"].grad).detach()}, 1e-12)
    close(state.hparams, {"body": (w["body"] - OUTER * w["body"].grad).detach()}, 1e-12)
    adapted = learner.adapt(state, tasks()[0])
    assert adapted["body"].shape == (3, 2, 2)
    assert torch.equal(adapted["body"][0], adapted["body"][2])
    assert not torch.equal(adapted["head"][0], adapted["head"][2])
    with pytest.raises(ValueError, match="nose"):
        anil(loss, LR, optim.sgd(OUTER), head=["nose"]).init(params())


def test_meta_sgd_learns_the_rates_too() -> None:
    state, _ = moved(meta_sgd(loss, LR, optim.sgd(OUTER), num_steps=2))
    w = leaves_of(params())
    rates = {k: torch.full_like(v, LR).detach().requires_grad_() for k, v in w.items()}
    meta_loss(w, rates, 2).backward()
    close(state.inner.params, {k: (v - OUTER * v.grad).detach() for k, v in w.items()}, 1e-12)
    close(state.hparams, {k: (r - OUTER * r.grad).detach() for k, r in rates.items()}, 1e-12)


def test_imaml_differentiates_the_solution_of_the_tied_problem() -> None:
    """Against central differences of a solution found by many plain steps."""

    def solved(flat: Tensor) -> Tensor:
        start = unravel(params(), flat)
        total = torch.zeros((), dtype=F64)
        for s, q in zip(*tasks(), strict=True):
            w = leaves_of(start)
            for _ in range(400):
                g = gradient(w, s)
                w = {k: (w[k] - 0.3 * (g[k] + STRENGTH * (w[k] - start[k]))).detach().requires_grad_() for k in w}
            total = total + loss(w, q).detach() / 3
        return total

    learner = imaml(loss, 0.3, STRENGTH, optim.sgd(OUTER), num_steps=400, solver=linear.CG(6))
    state, hg = moved(learner)
    direction = torch.cos(torch.arange(6, dtype=F64))
    (slope,) = central_differences(lambda e: solved(ravel(params()) + e[0] * direction), (torch.zeros(1, dtype=F64),), step=1e-4)
    found = (ravel(params()) - ravel(state.inner.params)) / OUTER
    close(found @ direction, slope[0], 1e-6)
    assert float(hg.stats["residual_norm"]) < 1e-8


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_reptile_reports_the_first_bad_step(how: Any) -> None:
    learner = reptile(loss, 1e200, optim.sgd(OUTER), num_steps=4, tasks=how)
    _, hg = moved(learner)
    assert 0 < hg.stats["first_bad_step"] < 4


@pytest.mark.parametrize("build", [maml, first_order_maml, reptile, meta_sgd, partial(anil, head=["head"])])
def test_number_of_steps_is_checked(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="`num_steps` should be an integer of at least 1, got 0"):
        build(loss, LR, optim.sgd(OUTER), num_steps=0)


def numbered(classes: int = 7, per_class: int = 6) -> Images:
    """Images that say which class and drawing they are, marked in one corner."""
    images = torch.zeros(classes * per_class, 1, 4, 4)
    images[:, 0, 0, 0] = torch.arange(len(images)) / len(images)
    return Images(images, torch.arange(len(images)) % classes, "numbered", num_classes=classes)


@pytest.mark.parametrize("rotations", [False, True])
def test_an_episode_holds_disjoint_images_of_new_classes(rotations: bool) -> None:
    episodes = Episodes(numbered(), ways=4, shots=2, queries=3, rotations=rotations)
    episode = episodes.sample(step=5, num_tasks=8, seed=1)
    assert episode.support[0].shape == (8, 8, 1, 4, 4)
    assert episode.query[0].shape == (8, 12, 1, 4, 4)
    for k in range(8):
        which = {}
        for x, y in (tree.index(episode.support, k), tree.index(episode.query, k)):
            for image, label in zip(x, y.tolist(), strict=True):
                which.setdefault(label, []).append(round(float(image.sum()) * 42))
        assert sorted(which) == [0, 1, 2, 3]
        assert len({number for found in which.values() for number in found}) == 20, "an image is there twice"
        of_class = [{number % 7 for number in found} for found in which.values()]
        assert all(len(found) == 1 for found in of_class)
        assert len(set.union(*of_class)) == 4
    corners = {tuple(image.nonzero()[0, -2:].tolist()) for image in episode.support[0].flatten(0, 1) if image.sum() > 0}
    assert corners == ({(0, 0), (0, 3), (3, 0), (3, 3)} if rotations else {(0, 0)})
    again = episodes.sample(step=5, num_tasks=8, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(tuple(episode)), tree.leaves(tuple(again)), strict=True))
    assert not torch.equal(episode.support[0], episodes.sample(step=6, num_tasks=8, seed=1).support[0])


def test_bad_episodes() -> None:
    with pytest.raises(ValueError, match="7 classes"):
        Episodes(numbered(), ways=8, shots=1, queries=1)
    with pytest.raises(ValueError, match="6 images"):
        Episodes(numbered(), ways=2, shots=4, queries=3)
    with pytest.raises(ValueError, match="ways"):
        Episodes(numbered(), ways=1, shots=1, queries=1)


def test_accuracy_counts_by_task() -> None:
    w = {"scale": torch.tensor([1.0, -1.0])}
    x = torch.eye(3).expand(2, 3, 3)
    right = accuracy(lambda w, x: w["scale"] * x, w, (x, torch.arange(3).expand(2, 3)))
    assert right.tolist() == [1.0, 0.0]


def test_support_and_query_hold_the_same_tasks() -> None:
    learner = maml(lambda w, batch: ((w - batch) ** 2).sum(), 0.25, optim.sgd(0.5))
    with pytest.raises(ValueError, match=r"same tasks along the first axis.*'support': \{4\}, 'query': \{3\}"):
        learner.step(learner.init(torch.zeros(1)), torch.ones(4, 1), torch.ones(3, 1))
