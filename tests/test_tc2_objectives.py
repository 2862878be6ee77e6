"""Every objective and encoder inside the training methods: heads, and state that moves once per iteration."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import metacal
from metacal import nets, objectives, optim, tc2, tree
from metacal._typing import Tree
from metacal.adjoints import FirstOrder, Unrolled
from metacal.nets.vit import positions
from metacal.objectives import BYOL, DINO, MAE, MoCo, Outputs, SIGReg, SimCLR, SSLObjective, SwAV
from metacal.train import experiment
from metacal.train.build import build
from metacal.train.config import Config
from metacal.train.settings import load_config, packaged, to_yaml
from problems import central_differences, close, derivative, leaf_grads

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


@pytest.mark.parametrize("others", [(objectives.SimCLR(), MAE()), (MAE(), objectives.SimCLR())])
def test_heads_that_nobody_builds_are_refused(others: tuple[SSLObjective, ...]) -> None:
    with pytest.raises(ValueError, match=r"`objective` should have the heads projector.*or a decoder alone.*got \(.*'decoder'.*by hand"):
        problem(tc2.PerTask(others))


# Masked autoencoding: the encoder's tokens are the representations.


def masked(calibrator: tc2.Calibrator | None = None, objective: SSLObjective | None = None, **over: Any) -> tc2.Problem:
    torch.manual_seed(0)
    objective = MAE(visible=0.4) if objective is None else objective  # 4 of 9 patches
    net = tc2.network(nets.ViT(2, patch=2, dim=8, depth=1, heads=2), objective, dim=8, hidden=4)
    return tc2.Problem(net, objective, tc2.Networks(n_f=3, hidden=5) if calibrator is None else calibrator, num_tasks=2, **over)


def drawn(p: tc2.Problem, views: int = 4) -> tuple[Tree, Tree, Tensor, tc2.problem.Batch]:
    """Params theta and phi away from their special start, the factors, and a batch."""
    torch.manual_seed(1)
    theta, phi = tree.map(lambda leaf: leaf + 0.2 * torch.randn_like(leaf), (p.network.params, p.calibrator.init(8)))
    V = p.calibrator.factors(phi, torch.randn(40, 8))
    return theta, phi, V, p.batch(torch.randn(6, views, 2, 6, 6), ())


def reconstruction(p: tc2.Problem, theta: Tree, calibrate: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """MAE's loss of one task, image by image, every token at its place in the image: nothing is gathered, and no order is made."""
    net = nets.MaskedAutoencoder(nets.ViT(2, patch=2, dim=8, depth=1, heads=2), 2, dim=4, heads=4)
    net.load_state_dict({f"{part}.{name}": value for part, params in theta.items() for name, value in params.items()})
    places, losses = positions(3, 3, 8), []
    for view in views.flatten(0, 1):
        cut = nn.functional.unfold(view[:2], 2, stride=2).T  # [9, 8]
        seen = view[2, ::2, ::2].flatten().bool()
        tokens = calibrate(net.encoder.encode((net.encoder.embed(cut) + places)[seen]))
        everywhere = net.decoder.mask_token.expand(9, 4).clone()
        everywhere[seen] = net.decoder.widen(tokens)
        predicted = net.decoder.pixels(net.decoder.blocks(everywhere + positions(3, 3, 4)))[~seen]
        truth = (cut - cut.mean(1, keepdim=True)) / (cut.var(1, keepdim=True) + 1e-6).sqrt()
        losses.append((predicted - truth[~seen]).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("statistics", ["task", "batch"])
@pytest.mark.parametrize("where", ["projector", "encoder"])
@pytest.mark.parametrize("split_by", ["views", "samples"])
def test_the_masked_loss_is_the_autoencoders(split_by: Any, where: Any, statistics: Any) -> None:
    p = masked(split_by=split_by, where=where, statistics=statistics)
    theta, phi, V, batch = drawn(p)
    for side in batch:
        for k in range(2):
            task = tree.index(side, k)
            own = task.x[: len(task.x) // (2 if statistics == "batch" else 1)]
            calibrated = reconstruction(p, theta, lambda z: p.calibrator.calibrate(phi, z, V), own)
            before = torch.get_rng_state()
            loss = p.loss(theta, phi, V, task)
            close(loss, calibrated, 1e-12)
            assert torch.equal(p.loss(theta, phi, V, task), loss)  # the mask is the batch's
            assert torch.equal(torch.get_rng_state(), before)
            plain = replace(p, calibrator=tc2.Identity()).loss(theta, {}, V, task)
            close(plain, reconstruction(p, theta, lambda z: z, own), 1e-12)
            assert abs(plain - loss) > 1e-6
    assert p.represent_tasks(theta, batch.support.x).shape[3:] == (4, 8)
    Z = p.pooled(*(p.represent_tasks(theta, side.x) for side in batch))
    assert Z.shape == (6 * 4 * 4, 8)  # samples, views, visible patches


def test_the_autoencoder_by_hand_has_the_same_loss() -> None:
    p = masked()
    theta, phi, V, batch = drawn(p)
    net = nets.MaskedAutoencoder(nets.ViT(2, patch=2, dim=8, depth=1, heads=2), 2, visible=0.4, dim=4, heads=4)
    f = metacal.functional(net)
    params = {f"{part}.{name}": value for part, own in theta.items() for name, value in own.items()}
    task = tree.index(batch.support, 0)
    masks = task.x[:, :, 2, ::2, ::2].reshape(6, 9).bool()
    order = torch.stack([torch.cat([seen.nonzero(), (~seen).nonzero()]) for seen in masks]).reshape(3, 2, 9)
    made = f.apply(params, task.x[:, :, :2], order, calibrate=lambda z: p.calibrator.calibrate(phi, z, V))
    close(p.loss(theta, phi, V, task), MAE()(Outputs(made.tokens, made.p, made.target)), 1e-12)


def test_masks_are_drawn_where_a_batch_is_made() -> None:
    p, x = masked(deal="given"), torch.randn(6, 4, 2, 6, 6)
    batch = p.batch(x, ())
    for seen in (batch.support.x, batch.query.x, p.together(x, ()).x[None]):
        images, mask = seen[..., :2, :, :], seen[..., 2, :, :]
        grid = mask[..., ::2, ::2]
        assert torch.equal(grid.repeat_interleave(2, -1).repeat_interleave(2, -2), mask)  # whole patches
        assert torch.equal(grid.sum((-2, -1)), torch.full(grid.shape[:-2], 4.0))
        assert len(grid.flatten(0, 2).flatten(1).unique(dim=0)) > 6  # a draw for every image and view
        assert images.shape[2] < 4 or torch.equal(images[0], x)
    assert not torch.equal(p.batch(x, ()).support.x, batch.support.x)
    many = nets.autoencoder.with_mask(torch.zeros(2000, 1, 6, 6), 2, 0.4)[:, 1, ::2, ::2].mean(0)
    assert (many - 4 / 9).abs().max() < 5 * (20 / 81 / 2000) ** 0.5  # each patch as often as the others
    wide = p.together(torch.randn(6, 1, 2, 4, 8), ())
    assert wide.x[:, :, 2, ::2, ::2].sum((-2, -1)).tolist() == [[3.0]] * 6
    assert replace(p, calibrator=tc2.Identity()).loss(p.network.params, {}, torch.zeros(()), wide).isfinite()
    clustered = replace(p, deal="clusters").split(x, p.network.params)
    assert clustered.shape == (2, 3, 4, 2, 6, 6)  # by the outputs of whole images


def test_masked_tasks_are_mapped_as_they_are_looped() -> None:
    p = masked()
    theta, phi, V, batch = drawn(p)
    looped = torch.stack([p.loss(theta, phi, V, tree.index(batch.support, k)) for k in range(2)])
    mapped = torch.func.vmap(lambda x: p.loss(theta, phi, V, tc2.Views(x, x)))(batch.support.x)
    close(mapped, looped, 1e-13)


def test_masked_iterations_do_not_depend_on_how_they_are_run() -> None:
    found = []
    for name, over in (("paper", {}), ("vmap", {}), ("paper", {"where": "encoder"}), ("paper", {"statistics": "batch"})):
        p = masked(**over)
        torch.manual_seed(2)
        state = METHODS[name](p).init()
        found.append(METHODS[name](p).step(state, torch.randn(6, 4, 2, 6, 6))[0])
    for other in found[1:]:  # there is no projector and no BatchNorm
        close((other.theta, other.phi), (found[0].theta, found[0].phi), 1e-12)


def test_the_masked_gradient_is_that_of_central_differences() -> None:
    p = masked()
    theta, phi, V, batch = drawn(p)
    task = tree.index(batch.support, 0)
    start = leaf_grads((theta, phi))
    gradient = derivative(p.loss(*start, V, task), start)
    assert all(leaf.abs().max() > 0 for leaf in tree.leaves((gradient[0], gradient[1]["weight"])))
    for seed in range(4):
        torch.manual_seed(seed)
        along = tree.map(lambda leaf: 0.1 * torch.randn_like(leaf), (theta, phi))
        slope = central_differences(lambda t, along=along: p.loss(*tree.axpy(float(t), along, (theta, phi)), V, task), torch.zeros(1))
        close(torch.stack([tree.vdot(gradient, along)]), slope, 1e-8)


@pytest.mark.parametrize("name", [*METHODS, "tasks"])
def test_every_method_trains_a_masked_autoencoder(name: str) -> None:
    p = masked(tc2.Identity()) if name == "tasks" else masked()
    method, x = METHODS["paper" if name == "tasks" else name](p), torch.randn(6, 4, 2, 6, 6)
    first = method.init()
    second, metrics = method.step(first, x)
    third, _ = method.step(second, x)
    assert metrics["loss"].isfinite()
    moved = tree.sub(second.theta, first.theta)
    assert all(leaf.isfinite().all() and leaf.abs().max() > 0 for leaf in tree.leaves(moved))
    calibrated = tree.sub(third.phi, second.phi)  # in the first step the last layers are zero, and the hidden ones stay
    assert bool(tree.leaves(calibrated)) == (name != "tasks")
    assert all(leaf.isfinite().all() for leaf in tree.leaves(calibrated))
    if name not in ("base", "pcgrad"):
        assert all(leaf.abs().max() > 0 for leaf in tree.leaves(calibrated))
    scalars = tc2.measure(p, third, x).scalars
    assert all(value.isfinite() for value in scalars.values())


def test_every_pass_of_an_iteration_sees_its_masks() -> None:
    """The hypergradient of the calibrator, written out with the masks of one batch."""
    p, x = masked(deal="given"), torch.randn(6, 4, 2, 6, 6)
    calibration = tc2.stable()
    theta, phi, _, _ = drawn(p)
    torch.manual_seed(2)
    support, query = p.batch(x, ())
    Z = p.pooled(*(p.represent_tasks(theta, side.x) for side in (support, query))).detach()
    start = leaf_grads((theta, phi))

    def ssl(theta: Tree, phi: Tree, side: tc2.Views) -> Tensor:
        V = p.calibrator.factors(phi, Z)
        return torch.stack([p.loss(theta, phi, V, tree.index(side, k)) for k in range(2)]).mean()

    adapted = tree.axpy(-0.05, derivative(ssl(*start, support), start[0], create_graph=True), start[0])
    V = p.calibrator.factors(start[1], Z)
    outer = ssl(adapted, start[1], query) + calibration(Z, V, p.calibrator.weights(start[1], Z, V))[0]
    expected = derivative(outer, start[1])
    for adjoint in (Unrolled(mode="graph"), Unrolled(mode="reverse"), Unrolled()):
        method = tc2.lookahead(p, optim.sgd(0.1), optim.sgd(1.0), calibration=calibration, encoder_stage=tc2.Stage(0.05, adjoint=adjoint))
        state = method.init()._replace(theta=theta, phi=phi)
        torch.manual_seed(2)
        after, _ = method.step(state, x)
        close(tree.sub(phi, after.phi), expected, 1e-9)


@dataclass(frozen=True)
class Recording(SSLObjective):
    """MAE that keeps what it reads, and carries a mean of what was predicted."""

    heads: ClassVar[tuple[str, ...]] = ("decoder",)
    visible: float = 0.4
    seen: list[Outputs] = field(default_factory=list)

    def __call__(self, outputs: Outputs, carry: Any = ()) -> Tensor:
        self.seen.append(outputs)
        return MAE()(outputs)

    def init_carry(self, d: int) -> Tree:
        return {"mean": torch.zeros(())}

    def update(self, outputs: Outputs, carry: Tree) -> Tree:
        assert outputs.p is not None
        return {"mean": outputs.p.mean()}


def test_calibration_changes_tokens_and_what_is_made_of_them() -> None:
    p = masked(objective=Recording())
    theta, phi, V, batch = drawn(p)
    task = tree.index(batch.query, 1)
    replace(p, calibrator=tc2.Identity()).loss(theta, {}, V, task)
    p.loss(theta, phi, V, task)
    plain, calibrated = p.objective.seen  # type: ignore[attr-defined]
    assert torch.equal(plain.z, p.represent(theta, task.x))
    close(calibrated.z, p.calibrator.calibrate(phi, plain.z, V), 1e-14)
    assert torch.equal(plain.target, calibrated.target)
    assert not torch.allclose(plain.p, calibrated.p)
    carry = replace(p, carry={"mean": torch.zeros(())}).next_carry(theta, phi, V, tree.map(lambda x: x[None], task))
    close(carry["mean"], calibrated.p.mean(), 1e-12)


def test_users_get_the_mean_over_all_patches() -> None:
    p = masked()
    theta, _, _, batch = drawn(p)
    vit = nets.ViT(2, patch=2, dim=8, depth=1, heads=2)
    vit.load_state_dict(theta["encoder"])
    images = batch.support.x[0, :, 0, :2]
    assert torch.equal(p.network.encode(theta, images), vit(images))
    p.network.write(theta)


def test_masked_autoencoders_of_another_kind_are_refused() -> None:
    encoder = nets.ViT(1, dim=12, depth=1)
    with pytest.raises(ValueError, match=r"`encoder` should be a metacal.nets.ViT of dim = 6 where the objective has a decoder, got Seq"):
        problem(MAE())
    with pytest.raises(ValueError, match=r"a metacal.nets.ViT of dim = 16 .*got ViT of dim = 12"):
        tc2.network(encoder, MAE(), dim=16)
    with pytest.raises(ValueError, match=r"`hidden` should be a multiple of 4, as the width of a decoder with 4 heads, got 10"):
        tc2.network(encoder, MAE(), dim=12, hidden=10)

    @dataclass(frozen=True)
    class WithTarget(Recording):
        ema_target: ClassVar[bool] = True

    with pytest.raises(ValueError, match=r"or a decoder alone and no EMA target, got \('decoder',\), ema_target=True"):
        tc2.network(encoder, WithTarget(), dim=12)
    method = tc2.base(tc2.Problem(tc2.network(encoder, MAE(), dim=12), MAE()), optim.sgd(0.1))
    with pytest.raises(ValueError, match=r"`x` should be images of at least 2 patches.*got 1. Resize"):
        method.step(method.init(), torch.rand(8, 2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"patches of 4 x 4 tile, got \(8, 2, 1, 10, 8\)"):
        method.step(method.init(), torch.rand(8, 2, 1, 10, 8))
    with pytest.raises(ValueError, match=r"have other channels or another size than the encoder takes"):
        method.step(method.init(), torch.rand(8, 2, 3, 8, 8))


def test_tasks_may_share_one_decoder() -> None:
    with pytest.raises(ValueError, match=r"`objectives` should agree on `visible`.*got \[0.25, 0.5\]"):
        tc2.PerTask((MAE(), MAE(visible=0.5)))
    mixed = tc2.PerTask((MAE(visible=0.4), MAE(normalise=False, visible=0.4)))
    p = masked(objective=mixed)
    theta, phi, V, batch = drawn(p)
    for k, objective in enumerate(mixed.objectives):
        task = tree.index(batch.support, k)
        close(p.loss(theta, phi, V, task), replace(p, objective=objective).loss(theta, phi, V, task._replace(task=())), 1e-12)


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


MASKED = ("--objective", "MAE", "--network.encoder", "vit", "--network.dim", "12", "--network.depth", "1", "--network.hidden", "8")


@pytest.mark.parametrize("reading", ["base", "tasks", "paper", "lookahead"])
def test_a_masked_autoencoder_is_a_configuration(reading: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    rhythm = ("--train.steps", "2", "--train.batch_size", "16", "--train.bf16", "true", "--evaluate.labels", "60")
    config = packaged("tc2_digits", *MASKED, *rhythm, "--tc2.reading", reading, "--tc2.tasks", "Clusters", "--device", "cpu")
    results = experiment.pretrain(config, tmp_path / "run", progress=False)
    assert 0 < results["scores"]["digits"]["probe"] <= 1
    passes = {"base": 4, "tasks": 1 + 2 + 2, "paper": 1 + 4 + 2 + 2, "lookahead": 1 + 4 + 2 + 2 + 2}  # clusters cost one
    assert results["images_per_step"] == passes[reading] * 16
    state = experiment.restore(config, tmp_path / "run")
    encoder = experiment.encoder(replace(config, train=replace(config.train, bf16=False)), state.theta)
    vit = nets.ViT(1, dim=12, depth=1)
    vit.load_state_dict(state.theta["encoder"])
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(encoder.encode(encoder.params, x), vit(x))


@pytest.mark.parametrize("name", ["MoCo", "SIGReg", "MAE"])
def test_a_resumed_run_goes_on_with_the_objectives_state(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    small = ["--network.width", "8", "--network.dim", "8", "--network.d", "8", "--train.batch_size", "32", "--evaluate.labels", "200"]
    rhythm = ["--train.steps", "4", "--train.checkpoint_every", "2", "--train.measure_every", "0"]
    masks = MASKED if name == "MAE" else ()  # its state is torch's generator, which draws them
    config = packaged("tc2_digits", "--objective", name, *small, *rhythm, *masks, "--device", "cpu")
    experiment.pretrain(config, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1].unlink()
    middle = experiment.restore(config, tmp_path / "cut")
    assert middle.step == 2
    experiment.pretrain(config, tmp_path / "cut", resume=True, progress=False)
    whole, cut = (experiment.restore(config, tmp_path / run) for run in ("whole", "cut"))
    moving = "theta" if name == "MAE" else "carry"
    assert not torch.equal(*(tree.leaves(getattr(state, moving))[0] for state in (middle, whole)))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(whole), tree.leaves(cut), strict=True))


@pytest.mark.parametrize("name", ["MoCo", "SwAV", "DINO", "WMSE", "DCL", "AlignUniform", "SIGReg", "VICRegL", "MAE"])
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


@pytest.mark.parametrize("objective", [BYOL(), MoCo(queue_size=12), DINO(), SimCLR()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("name", METHODS)
def test_without_a_calibrator_it_is_all_one_where_it_would_be(name: str, objective: SSLObjective) -> None:
    """Also for the target network, whose own projector ends what it makes: both ways are one function of the images."""
    x, states = torch.randn(12, 4, 1, 4, 4), []
    for where in ("projector", "encoder"):
        torch.manual_seed(0)
        p = problem(objective, tc2.Identity(), where=where, momentum=0.5)
        method = METHODS[name](p)
        state = method.init()
        for _ in range(3):
            state, _ = method.step(state, x)
        states.append((state.theta, state.target))
        assert all(value.isfinite() for value in tc2.measure(p, state, x).scalars.values())
    close(states[1], states[0], 1e-12)


def test_a_calibrated_encoder_asks_for_the_target_network() -> None:
    p = problem(BYOL(), tc2.Identity(), where="encoder")
    state = tc2.base(p, optim.sgd(0.1)).init()
    batch = p.together(torch.randn(6, 4, 1, 4, 4), state.target)
    with pytest.raises(ValueError, match="`target` should hold the EMA target network's params"):
        p.loss(state.theta, {}, torch.zeros(()), batch)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("where", "enc", "`where` should be one of 'projector', 'encoder', got 'enc'"),
        ("deal", "cluster", "`deal` should be one of 'random', 'given', 'clusters', got 'cluster'"),
        ("statistics", "tasks", "`statistics` should be one of 'task', 'batch', got 'tasks'"),
        ("split_by", "view", "`split_by` should be one of 'views', 'samples', got 'view'"),
        ("num_tasks", 0, "`num_tasks` should be an integer of at least 1, got 0"),
        ("momentum", 2.0, "`momentum` should lie between 0 .* and 1"),
    ],
)
def test_a_field_of_a_problem_is_looked_at_where_it_is_stored(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(SimCLR(), tc2.Identity(), **{field: value})


def test_stages_and_sizes_are_looked_at_too() -> None:
    with pytest.raises(ValueError, match=r"`strength` should be at least 0, got -1\.0"):
        tc2.Stage(0.1, strength=-1.0)
    with pytest.raises(ValueError, match="`steps` should be an integer"):
        tc2.Stage(0.1, steps=1.5)
    with pytest.raises(ValueError, match="`strength` should not be negative"):
        metacal.proximal(lambda w, h, b: w.sum(), optim.sgd(0.1), -1.0, anchor=lambda h: h)
    net = tc2.network(nets.ConvEncoder(1, 8, 8), SimCLR(), dim=16)
    with pytest.raises(ValueError, match=r"`encoder` should map \[b, C, H, W\] to \[b, 16\]"):
        net.encode(net.params, torch.zeros(2, 1, 8, 8))
