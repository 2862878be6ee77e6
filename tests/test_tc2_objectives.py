"""Every objective and encoder inside the training methods: heads, and state that moves once per iteration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metacal import objectives, optim, tc2, tree
from metacal.adjoints import FirstOrder, Unrolled
from metacal.objectives import DINO, MAE, MoCo, Outputs, SIGReg, SSLObjective, SwAV
from metacal.train import experiment
from metacal.train.build import build
from metacal.train.config import Config
from metacal.train.settings import load_config, packaged, to_yaml
from problems import close

OBJECTIVES = [
    MoCo(queue_size=12), SwAV(num_prototypes=5), DINO(), objectives.WMSE(0.1), objectives.DCL(), objectives.AlignUniform(),
    SIGReg(num_directions=6), objectives.VICRegL(),
]  # fmt: skip
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
METHODS = {
    "base": lambda p: tc2.base(p, optim.sgd(0.1)),
    "pcgrad": lambda p: tc2.project_conflicts(p, optim.sgd(0.1)),
    "paper": lambda p: tc2.paper(p, optim.sgd(0.1), optim.sgd(0.1)),
    "vmap": lambda p: tc2.paper(p, optim.sgd(0.1), optim.sgd(0.1), tasks="vmap", encoder_stage=tc2.Stage(0.05, adjoint=Unrolled())),
    "lookahead": lambda p: tc2.lookahead(p, optim.sgd(0.1), optim.sgd(0.1)),
    "first order": lambda p: tc2.lookahead(p, optim.sgd(0.1), optim.sgd(0.1), encoder_stage=tc2.Stage(0.05, adjoint=FirstOrder())),
}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(
    objective: SSLObjective, calibrator: tc2.Calibrator | None = None, num_tasks: int = 2, norm: str | None = None, **over: Any
) -> tc2.Problem:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
    net = tc2.network(encoder, objective, dim=6, d=4, hidden=5, norm=norm)
    return tc2.Problem(net, objective, tc2.Networks(n_f=2, hidden=5) if calibrator is None else calibrator, num_tasks=num_tasks, **over)


@every
@pytest.mark.parametrize("name", METHODS)
def test_methods_run_and_state_moves_once(objective: SSLObjective, name: str) -> None:
    method, x = METHODS[name](problem(objective)), torch.randn(12, 4, 1, 4, 4)
    first = method.init()
    second, metrics = method.step(first, x)
    third, _ = method.step(second, x)
    assert metrics["loss"].isfinite()
    assert all(leaf.isfinite().all() for leaf in tree.leaves(third))
    assert not any(leaf.requires_grad for leaf in tree.leaves(third.carry))
    assert tree.structure(first.carry) == tree.structure(third.carry)
    for a, b, c in zip(*map(tree.leaves, (first.carry, second.carry, third.carry)), strict=True):
        assert not torch.equal(a, b)
        assert not torch.equal(b, c)
    assert bool(tree.leaves(first.carry)) == isinstance(objective, (MoCo, DINO, SIGReg))
    scalars = tc2.measure(problem(objective), third, x).scalars
    assert all(value.isfinite() for value in scalars.values())


@pytest.mark.parametrize("statistics", ["task", "batch"])
@pytest.mark.parametrize("deal", ["random", "given", "clusters"])
def test_the_queue_holds_the_keys_of_the_iteration_and_the_loss_reads_the_old_one(deal: Any, statistics: Any) -> None:
    moco = MoCo(queue_size=100)
    p = problem(moco, tc2.Identity(), deal=deal, statistics=statistics)
    x = torch.randn(12, 4, 1, 4, 4)
    for name, views in (("base", 4), ("pcgrad", 4), ("paper", 2), ("lookahead", 2)):  # TC²: of the support views
        method = METHODS[name](p)
        state = method.init()._replace(carry={"queue": torch.nn.functional.normalize(torch.randn(100, 4), dim=1)})
        after, metrics = method.step(state, x)
        keys = nn.functional.normalize(p.represent(state.target, x[:, :views]), dim=-1).reshape(-1, 4)
        found = after.carry["queue"][: len(keys)]
        nearest = (found @ keys.T).max(1)  # in the order of the split
        assert nearest.values.min() > 1 - 1e-9
        assert sorted(nearest.indices.tolist()) == list(range(len(keys)))
        assert deal != "given" or name == "base" or nearest.indices.tolist() == list(range(len(keys)))
        assert torch.equal(after.carry["queue"][len(keys) :], state.carry["queue"][: 100 - len(keys)])
        if name == "base":
            z, target = p.represent(state.theta, x), p.represent(state.target, x)
            close(metrics["loss"], moco(Outputs(z, target=target), state.carry), 1e-12)


@pytest.mark.parametrize("objective", [MoCo(queue_size=12), DINO(), SwAV(num_prototypes=5)], ids=lambda o: type(o).__name__)
def test_without_calibration_steps_or_tasks_it_is_the_base_method(objective: SSLObjective) -> None:
    p = problem(objective, tc2.Identity(), num_tasks=1, norm="batch")
    still = {"calibrator_stage": tc2.Stage(0.0), "encoder_stage": tc2.Stage(0.0)}
    method, plain = tc2.paper(p, optim.sgd(0.1), optim.sgd(0.1), **still), tc2.base(p, optim.sgd(0.1))
    state = method.init()
    state = state._replace(carry=tree.map(torch.randn_like, state.carry))
    x = torch.randn(12, 4, 1, 4, 4)
    torch.manual_seed(1)
    after, _ = method.step(state, x)
    torch.manual_seed(1)
    order = torch.randperm(12)
    expected, _ = plain.step(state, x[order][:, 2:])
    close(after.theta, expected.theta, 1e-12)


def test_tasks_may_share_one_head_of_prototypes() -> None:
    swav = SwAV(num_prototypes=5)
    mixed, x = tc2.PerTask((swav, objectives.SimCLR())), torch.randn(12, 4, 1, 4, 4)
    p = problem(mixed, tc2.Identity())
    state = METHODS["base"](p).init()
    batch = p.batch(x, ())
    for k, objective in enumerate(mixed.objectives):
        task = tree.index(batch.support, k)
        z = p.represent(state.theta, task.x)
        expected = objective(Outputs(z, p.network.predict(state.theta, z)))
        close(p.loss(state.theta, {}, torch.zeros(()), task), expected, 1e-12)
    assert METHODS["paper"](p).step(state, x)[1]["loss"].isfinite()


def test_heads_that_nobody_builds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`objective` should have the heads projector.*got \('decoder',\).*MaskedAutoencoder"):
        problem(MAE())


ENCODERS = (("conv", 64), ("resnet18", 512), ("vit", 12))


@pytest.mark.parametrize(("encoder", "dim"), ENCODERS)
def test_encoders_are_a_setting(encoder: str, dim: int, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    options = ("--network.encoder", encoder, "--network.dim", str(dim), "--network.depth", "1", "--train.channels_last", "true")
    config = packaged("tc2_digits", *options, "--objective", "MoCo", "--objective.queue_size", "16", "--tc2.num_tasks", "2")
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    for bf16 in (False, True):
        p, method = build(replace(config, device="cpu", train=replace(config.train, bf16=bf16)), 1)
        state, metrics = method.step(method.init(), torch.rand(8, 4, 1, 8, 8))
        assert metrics["loss"].isfinite()
        assert p.network.encode(state.theta, torch.rand(2, 1, 8, 8)).shape == (2, dim)
    kernels = [w for w in tree.leaves(state.theta["encoder"]) if w.ndim == 4 and w.shape[1] > 1 and w.shape[-1] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def test_the_size_of_resnet_is_named() -> None:
    config = Config()
    with pytest.raises(ValueError, match=r"`network.dim` should be 512 for the encoder resnet18, got 64"):
        build(replace(config, network=replace(config.network, encoder="resnet18")), 1)


@pytest.mark.parametrize("name", ["MoCo", "SIGReg"])
def test_a_resumed_run_goes_on_with_the_objectives_state(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    small = ["--network.width", "8", "--network.dim", "8", "--network.d", "8", "--train.batch_size", "32", "--evaluate.labels", "200"]
    rhythm = ["--train.steps", "4", "--train.checkpoint_every", "2", "--train.measure_every", "0"]
    config = packaged("tc2_digits", "--objective", name, *small, *rhythm, "--device", "cpu")
    experiment.pretrain(config, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1].unlink()
    middle = experiment.restore(config, tmp_path / "cut")
    assert middle.step == 2
    experiment.pretrain(config, tmp_path / "cut", resume=True, progress=False)
    whole, cut = (experiment.restore(config, tmp_path / run) for run in ("whole", "cut"))
    assert not torch.equal(tree.leaves(middle.carry)[0], tree.leaves(whole.carry)[0])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(whole), tree.leaves(cut), strict=True))


@pytest.mark.parametrize("name", ["MoCo", "SwAV", "DINO", "WMSE", "DCL", "AlignUniform", "SIGReg", "VICRegL"])
def test_objectives_are_a_setting(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"objective: {{class_path: {name}}}\n")
    config = load_config(path)
    assert type(config.objective) is getattr(objectives, name)
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_losses_of_lightly_are_a_setting(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {class_path: Lightly, init_args: {loss: NTXentLoss, settings: {temperature: 0.3}}}\n")
    config = load_config(path)
    assert config.objective == objectives.Lightly("NTXentLoss", {"temperature": 0.3})
    path.write_text(to_yaml(config))
    assert load_config(path) == config
