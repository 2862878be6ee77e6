"""A device without a GPU: on "meta" a tensor that meets one of the host raises, as on CUDA, and whoever reads a value is counted.

Nothing is computed there, so these tests say nothing about numbers; a read waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metacal
from metacal import nets, objectives, optim, tc2, tree
from metacal.adjoints import Unrolled
from metacal.algorithms import few_shot
from metacal.data.augment import augmenter
from metacal.registry import METHODS
from metacal.registry.row import Method, Setting

META = torch.device("meta")
STEPS, TASKS = 4, 3


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What read a value from the device: it is told zeros."""
    asked: list[str] = []

    def answering(name: str, answer: Callable[[Tensor], Any]) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor) -> Any:
            if self.device != META:
                return original(self)
            asked.append(name)
            return answer(torch.zeros(self.shape, dtype=self.dtype))

        monkeypatch.setattr(Tensor, name, read)

    answers: dict[str, Callable[[Tensor], Any]] = {"item": Tensor.item, "tolist": Tensor.tolist, "__bool__": bool, "__float__": float}
    for name, answer in answers.items():
        answering(name, answer)
    return asked


def everywhere(value: Any) -> set[torch.device]:
    return {leaf.device for leaf in tree.leaves(value)}


def network() -> tuple[nn.Module, metacal.Functional]:
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(META)
    return module, metacal.functional(module)


def batch(*lanes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*lanes, 6, 5, device=META), torch.zeros(*lanes, 6, dtype=torch.long, device=META)


class Bilevel:
    """A classifier with learned decays of its biases and of its weights."""

    def __init__(self) -> None:
        self.module, self.net = network()
        self.loss = nn.CrossEntropyLoss()
        self.solver = metacal.descent(self.inner, optim.adam(0.1, betas=(0.9, torch.tensor(0.99, device=META))))
        self.hparams = {"decay": torch.zeros(2, device=META)}
        self.setting = Setting(
            number=3,
            num_batches=STEPS,
            model=self.model,
            outputs_loss=lambda z, h, b: self.loss(z, b[1]),
            module=self.module,
            loss=self.loss,
        )

    def model(self, w: Any, h: Any, b: Any) -> Tensor:
        return self.net.apply(w, b[0])

    def outer(self, w: Any, h: Any, b: Any) -> Tensor:
        return self.loss(self.model(w, h, b), b[1])

    def inner(self, w: Any, h: Any, b: Any) -> Tensor:
        return self.outer(w, h, b) + sum(h["decay"].exp()[x.ndim - 1] * (x**2).sum() for x in w.values())


# KFAC reads its factors' values; what is offloaded is copied to the host, which nothing can be from here.
ADJOINTS = [
    row
    for row in METHODS
    if (row.family in ("exact", "approximate", "implicit") and not row.by_hand and "offload" not in row.code) or "GaussNewton" in row.code
]
LOOPS = [row for row in METHODS if row.family == "single loop" and "saba" not in row.code]


@pytest.mark.parametrize("row", ADJOINTS, ids=lambda row: row.code)
def test_hypergradients_stay_on_the_device(row: Method, reads: list[str]) -> None:
    p = Bilevel()
    estimate = metacal.hypergradient(p.outer, p.solver, row.make(p.setting))

    def at(decay: Tensor) -> metacal.HyperGradient:
        hparams = {"decay": decay}
        return estimate(p.solver.init(p.net.params, hparams), hparams, [batch()] * STEPS, batch())

    hg = at(p.hparams["decay"])
    assert everywhere((hg.value, hg.hparams, hg.params, hg.state.params, hg.state.opt_state)) == {META}
    # Does the optimizer come to rest, and is the linear solve to be trusted?
    assert len(reads) == (2 if row.family == "implicit" else 0)
    if 'mode="graph"' not in row.code:
        assert torch.func.vmap(lambda decay: at(decay).hparams["decay"], randomness="same")(torch.zeros(3, 2, device=META)).device == META


@pytest.mark.parametrize("row", LOOPS, ids=lambda row: row.code)
def test_single_loops_stay_on_the_device(row: Method, reads: list[str]) -> None:
    p = Bilevel()
    loop = row.make(p.outer, p.solver, optim.adam(0.1), p.setting)
    state = loop.init(p.net.params, p.hparams)
    reads.clear()  # at the start the optimizer is looked at
    for _ in range(2):
        state, hg = loop.step(state, [batch()] * row.batches_per_step(STEPS, 3), batch())
    assert everywhere((state.inner.params, state.hparams, hg.hparams, hg.value)) == {META}
    assert not reads


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["maml", "first_order_maml", "reptile", "meta_sgd", "anil", "imaml"])
def test_few_shot_learners_stay_on_the_device(name: str, tasks: Any, reads: list[str]) -> None:
    _, net = network()
    more: dict[str, dict[str, Any]] = {"anil": {"head": ["2.weight", "2.bias"]}, "imaml": {"strength": 2.0, "num_steps": 2}}
    loss = nn.CrossEntropyLoss()
    learner = getattr(few_shot, name)(
        lambda w, b: loss(net.apply(w, b[0]), b[1]), 0.1, optimizer=optim.adam(0.1), tasks=tasks, **more.get(name, {})
    )
    state = learner.init(net.params)
    for _ in range(2):
        state, hg = learner.step(state, batch(TASKS), batch(TASKS))
    assert everywhere((state.inner.params, hg.params, learner.adapt(state, batch(TASKS)))) == {META}
    assert bool(reads) == (name == "imaml")


OBJECTIVES: dict[str, Callable[[], Any]] = {
    name: getattr(objectives, name)
    for name in ("SimCLR", "BYOL", "BarlowTwins", "VICReg", "SimSiam", "SwAV", "DINO", "WMSE", "DCL", "AlignUniform", "SIGReg", "VICRegL")
} | {"MoCo": lambda: objectives.MoCo(queue_size=64)}
METHOD_OF: dict[str, Callable[..., tc2.Method]] = {
    "base": lambda p, fast, slow: tc2.base(p, fast),
    "paper": lambda p, fast, slow: tc2.paper(p, fast, slow),
    "vmap": lambda p, fast, slow: tc2.paper(p, fast, slow, encoder_stage=tc2.Stage(0.1, adjoint=Unrolled()), tasks="vmap"),
    "lookahead": lambda p, fast, slow: tc2.lookahead(p, fast, slow),
    "pcgrad": lambda p, fast, slow: tc2.project_conflicts(p, fast),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, "paper") for name in OBJECTIVES] + [("SimCLR", kind) for kind in METHOD_OF if kind != "paper"]
)
def test_tc2_stays_on_the_device(name: str, kind: str, reads: list[str]) -> None:
    net = tc2.network(nets.ConvEncoder(width=8, dim=8), OBJECTIVES[name](), dim=8, d=8, hidden=16)
    net = net._replace(params=tree.to(net.params, META))
    problem = tc2.Problem(net, OBJECTIVES[name](), tc2.Networks(n_f=4), num_tasks=2)
    method = METHOD_OF[kind](problem, optim.sgd(0.1, momentum=0.9), optim.adam(0.1))
    state = method.init()
    for _ in range(2):
        state, metrics = method.step(state, torch.rand(16, 4, 1, 28, 28, device=META))
    assert everywhere((state.theta, state.phi, state.target, state.carry, metrics["loss"])) == {META}
    assert not reads


@pytest.mark.parametrize(("name", "channels", "size"), [("digits", 1, 8), ("fashion_mnist", 1, 28), ("cifar10", 3, 32)])
def test_augmentation_stays_on_the_device(name: str, channels: int, size: int, reads: list[str]) -> None:
    assert augmenter(name, size, channels)(torch.rand(4, channels, size, size, device=META)).device == META
    assert not reads
