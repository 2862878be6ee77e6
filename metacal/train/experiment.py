"""A run: from its settings to a trained encoder, its scores and its folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacal import optim, tree
from metacal._device import wait
from metacal._typing import Tree
from metacal.data import Augmentation, Images, augmenter, batch_indices, load, resize, split_validation, views
from metacal.data.augment import families
from metacal.diagnostics import peak_bytes
from metacal.evaluate import online, transfer
from metacal.evaluate.parts import at_most, parts
from metacal.nets import ConvEncoder, ResNet18, ViT
from metacal.tasks import task_size
from metacal.tc2 import (
    Identity,
    Measurement,
    Method,
    MethodState,
    Network,
    PerTask,
    Problem,
    base,
    literal,
    lookahead,
    measure,
    network,
    paper,
    pcgrad,
    project_conflicts,
    stable,
    upgrad,
)
from metacal.train import checkpoint
from metacal.train._files import replacing
from metacal.train.config import Augmentations, Clusters, Config, Domains, EvaluateConfig, NetworkConfig, Objectives
from metacal.train.environment import resolve_device, seed_everything, write_environment
from metacal.train.loop import CHECKPOINTS, fit, refuse_existing
from metacal.train.settings import to_yaml

RESULTS = "results.json"
BUDGET = "budget.json"


def build(config: Config, channels: int, adapt: Callable[[Network], Network] = lambda net: net) -> tuple[Problem, Method]:
    """The problem and the training method of a configuration; draws the networks from torch's default generator.

    ``adapt`` may wrap the network's functions before anything is built on them.
    """
    c, t = config.tc2, config.train
    n = config.network
    objective = PerTask(c.tasks.objectives) if isinstance(c.tasks, Objectives) else config.objective
    encoder = _encoder(n, channels)
    if t.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    net = network(encoder, objective, dim=n.dim, d=n.d, hidden=n.hidden, norm="batch" if n.norm == "shared" else n.norm)
    net = net._replace(params=tree.to(net.params, resolve_device(config.device)))
    if t.bf16:
        net = _in_bfloat16(net)
    net = adapt(net)
    problem = Problem(
        net,
        objective,
        c.calibrator if c.reading in ("paper", "lookahead") else Identity(),
        c.where,
        c.num_tasks,
        c.split_by,
        t.momentum,
        # Domains and augmentations are made where images are drawn, task by task.
        deal="clusters" if isinstance(c.tasks, Clusters) else "given" if isinstance(c.tasks, Domains | Augmentations) else "random",
        statistics="batch" if n.norm == "shared" else "task",
    )
    return problem, training_method(config, problem)


def training_method(config: Config, problem: Problem) -> Method:
    """How a configuration trains a problem."""
    c = config.tc2
    outer, calibrator_outer = optim.adam(config.train.lr), optim.adam(c.calibrator_lr)
    calibration = stable(c.lambda_s, c.lambda_1) if c.form == "stable" else literal(c.lambda_s)
    if c.reading in ("base", "matched"):
        return base(problem, outer)
    if c.reading in ("pcgrad", "upgrad"):
        return project_conflicts(problem, outer, pcgrad if c.reading == "pcgrad" else upgrad)
    if c.reading == "lookahead":
        stages: dict[str, Any] = {"calibration": calibration, "encoder_stage": c.encoder_stage, "warmup": c.warmup}
        return lookahead(problem, outer, calibrator_outer, **stages)
    return paper(
        problem,
        outer,
        calibrator_outer,
        calibration=calibration,
        calibrator_stage=c.calibrator_stage,
        encoder_stage=c.encoder_stage,
        pairing=c.pairing,
        warmup=c.warmup,
        tasks=c.run_tasks,
    )


class Prepared(NamedTuple):
    """A run before its first iteration; torch's default generators stand where that iteration draws from them.

    Attributes:
        problem, method, state: what is trained, how, and from where.
        sample: ``sample(t)``: the views [N, m, C, H, W] of iteration t.
        measured: ``measured(state, t)``: conflict and transfer on a batch that iteration t might have had.
        monitors: ``monitors(state, t)``: what the log holds of the state after iteration t, besides the step's own metrics; mostly {}.
    """

    problem: Problem
    method: Method
    state: MethodState
    sample: Callable[..., Tensor]
    measured: Callable[[MethodState, int], Measurement]
    monitors: Callable[[MethodState, int], dict[str, Tensor]]


def prepare(config: Config) -> Prepared:
    """Sets a run up: seeds the default generators, reads the images, and draws the networks.

    Errors: a data set that is not there; a batch that does not split into tasks.
    """
    device = resolve_device(config.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    seed_everything(config.seed)
    images = training_images(config)
    problem, method = build(config, images.images.shape[1])
    state = _on(device, method.init())
    sample = _sampler(config, images.to(device))
    every = config.train.measure_every
    watched = _watched(config).to(device) if config.evaluate.online else None

    def measured(state: MethodState, t: int) -> Measurement:
        # Its own draws, so that measuring leaves the run as it would have been; at least 4 views, for support and query pairs.
        with _own_draws(device, config.seed):
            return measure(problem, state, sample(t, max(4, config.tc2.num_views)), lr=config.tc2.encoder_stage.lr)

    def monitors(state: MethodState, t: int) -> dict[str, Tensor]:
        if not every or (t + 1) % every:
            return {}
        found = measured(state, t)
        return {**found.scalars, **_pairs(found.cosines), **(online(problem, state, watched) if watched is not None else {})}

    return Prepared(problem, method, state, sample, measured, monitors)


def pretrain(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains an encoder as ``config`` says, judges it, and leaves everything in ``folder``.

    The folder holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints, environment.json and results.json. On a CPU the same
    configuration gives the same numbers, and so does a run that was killed and resumed.

    Errors: those of :func:`metacal.train.fit`; a data set that is not there; a batch that does not split into tasks.
    """
    folder = Path(folder)
    device = resolve_device(config.device)
    run = prepare(config)
    seconds: list[float] = []

    def step(state: MethodState, t: int) -> tuple[MethodState, dict[str, Tensor]]:
        x = run.sample(t)
        started = time.perf_counter()
        state, metrics = run.method.step(state, x)
        wait(device)
        seconds.append(time.perf_counter() - started)
        return state, {**metrics, **run.monitors(state, t)}

    write_settings(folder, config, resume)
    write_environment(folder, seed=config.seed, device=str(device))
    planned = _planned(config, folder, resume)
    t, steps = config.train, planned["steps"]
    state = fit(
        step,
        run.state,
        steps,
        folder,
        checkpoint_every=t.checkpoint_every,
        log_every=t.log_every,
        resume=resume,
        progress=progress,
    )
    last = _mean_measurement([run.measured(state, steps + i) for i in range(t.measure_batches)])
    results = {
        "cosines": last.cosines.tolist(),
        "transfer": last.transfer.tolist(),
        "measured": {name: float(value) for name, value in last.scalars.items()},
        "seconds_per_step": median(seconds) if seconds else None,
        **planned,
        "images_per_step": images_per_step(config),
        "scores": judge(config, state, config.evaluate),
    }
    write_results(folder, results)
    return results


def judge(config: Config, state: MethodState, evaluate: EvaluateConfig) -> dict[str, dict[str, float]]:
    """The frozen encoder's scores, by data set."""
    problem, _ = build(config, training_channels(config))
    device = resolve_device(config.device)
    theta = state.theta
    names = evaluate.data or (config.data.name,)
    size = training_size(config)
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        found = transfer(
            lambda x: problem.network.encode(theta, x),
            name,
            image_size=size,
            channels=training_channels(config),
            split=evaluate.split,
            labels=evaluate.labels,
            neighbours=evaluate.neighbours,
            root=config.data.root,
            download=config.data.download,
            device=device,
        )
        scores[name] = found._asdict()
    return scores


def restore(config: Config, folder: str | Path) -> MethodState:
    """The state of the newest checkpoint in a run's folder."""
    seed_everything(config.seed)
    _, method = build(config, training_channels(config))
    found = checkpoint.latest(Path(folder) / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"`folder` {folder} holds no checkpoint. Train first: metacal pretrain CONFIG --out {folder}")
    return tree.load_state_dict(_on(resolve_device(config.device), method.init()), found.tensors["state"])


def training_images(config: Config) -> Images:
    """The images to pretrain on: the training part without what is held out for validation."""
    images = load(config.data.name, "train", root=config.data.root, download=config.data.download)
    return split_validation(images, config.data.validation, seed=0)[0] if config.data.validation else images


def training_channels(config: Config) -> int:
    """Channels of the images that the encoder was built for."""
    return 3 if config.data.name.startswith("cifar") else 1


def training_size(config: Config) -> int:
    """Side of the images that the encoder was built for, in pixels."""
    return {"digits": 8, "cifar10": 32, "cifar100": 32}.get(config.data.name, 28)


def images_per_step(config: Config) -> int:
    """Images that pass forward through the encoder in one iteration, recomputation included: counted on a small batch."""
    small = 4 * config.tc2.num_tasks
    seen = 0

    def counting(net: Network) -> Network:
        def encode(theta: Tree, x: Tensor) -> Tensor:
            nonlocal seen
            seen += math.prod(x.shape[:-3])
            return net.encode(theta, x)

        return net._replace(encode=encode)

    # In a loop, because vmap hides the task axis from the count.
    counted = replace(config, device="cpu", tc2=replace(config.tc2, run_tasks="loop", warmup=0))
    with _own_draws(resolve_device(config.device), 0):
        _, method = build(counted, 1, counting)
        state, x = method.init(), torch.rand(small, config.tc2.num_views, 1, 8, 8)
        method.step(state, x)  # mixed mode looks at an objective once, see operators: no cost of an iteration
        seen = 0
        method.step(state, x)
    return seen * config.train.batch_size // small


def budget(config: Config) -> dict[str, Any]:
    """A run's ``steps``; with reading "matched" also ``matched_by``, what one iteration of "paper" and of this run costs.

    The cost is counted in images through the encoder (control 2), or timed: seconds of an iteration, its augmentation included,
    medians of a few that take turns (control 9).
    """
    if config.tc2.reading != "matched":
        return {"steps": config.train.steps}
    both = {"paper": replace(config, tc2=replace(config.tc2, reading="paper")), "matched": config}
    if config.tc2.budget == "seconds":
        cost: dict[str, float] = seconds_per_iteration(both)
    else:
        cost = {name: images_per_step(one) for name, one in both.items()}
    return {"steps": max(1, round(config.train.steps * cost["paper"] / cost["matched"])), "matched_by": {config.tc2.budget: cost}}


def seconds_per_iteration(configs: Mapping[str, Config], repeats: int = 7) -> dict[str, float]:
    """Median seconds of one iteration of each configuration, drawing of the views included; they take turns, so that load hits all."""
    trials = {name: _trial(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(repeats):
        for name, trial in trials.items():
            started = time.perf_counter()
            trial()
            wait(resolve_device(configs[name].device))
            seconds[name].append(time.perf_counter() - started)
    return {name: median(found) for name, found in seconds.items()}


def step_bytes(config: Config) -> int:
    """Peak of the bytes that one iteration allocates, above the state and the batch."""
    return peak_bytes(_trial(config, draw=False), resolve_device(config.device))


def _trial(config: Config, *, draw: bool = True) -> Callable[[], object]:
    """One iteration from the start, to be measured: again and again the same, and leaving torch's generators as they were."""
    device = resolve_device(config.device)

    def step() -> object:
        with _own_draws(device, config.seed):
            return method.step(state, sample(0) if draw else x)

    with _own_draws(device, config.seed):
        images = training_images(config).to(device)
        _, method = build(config, training_channels(config))
        state, sample = _on(device, method.init()), _sampler(config, images)
        x = sample(0)
        method.step(state, x)  # the first call allocates what stays
    return step


def write_results(folder: str | Path, results: dict[str, Any]) -> None:
    """Writes results.json in one stroke."""
    with replacing(Path(folder) / RESULTS) as file:
        file.write(json.dumps(results, indent=2).encode())


def _planned(config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """The run's :func:`budget`; a resumed run keeps the one it started with, since seconds are never measured alike twice."""
    path = folder / BUDGET
    if resume and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    planned = budget(config)
    with replacing(path) as file:
        file.write(json.dumps(planned).encode())
    return planned


def _watched(config: Config) -> Images:
    """Some of the images that ``metacal evaluate --split validation`` judges on, in the form that the encoder takes."""
    data = config.data
    validation = parts(data.name, "validation", data.root, data.download)[1]
    return resize(at_most(validation, config.evaluate.online), training_size(config), training_channels(config))


def _mean_measurement(found: list[Measurement]) -> Measurement:
    return tree.map(lambda *values: torch.stack(values).mean(0), *found)


def _pairs(cosines: Tensor) -> dict[str, Tensor]:
    """One cosine for every two of the K tasks, counted from 1."""
    K = len(cosines)
    return {f"cosine_{i + 1}_{j + 1}": cosines[i, j] for i in range(K) for j in range(i + 1, K)}


def _encoder(n: NetworkConfig, channels: int) -> nn.Module:
    if n.encoder == "conv":
        return ConvEncoder(channels, n.width, n.dim, stem_stride=n.stem_stride)
    if n.encoder == "vit":
        return ViT(channels, dim=n.dim, depth=n.depth)
    if n.dim != ResNet18.dim:
        raise ValueError(f"`network.dim` should be {ResNet18.dim} for the encoder resnet18, got {n.dim}.")
    return ResNet18(channels)


def write_settings(folder: Path, config: Config, resume: bool) -> None:
    """Writes config.yaml; refuses a folder that holds a run, or with ``resume`` one of other settings."""
    path, text = folder / "config.yaml", to_yaml(config)
    if not resume:
        refuse_existing(folder)
    elif path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} holds other settings than the ones given: resuming would give a run that neither describes. Resume with "
            f"`metacal pretrain {path} --out {folder} --resume`, or name another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def _sampler(config: Config, images: Images) -> Callable[..., Tensor]:
    """``sample(t)``: the views [N, m, C, H, W] of iteration t, where tasks are made of the data n of each, task by task."""
    K, kind = config.tc2.num_tasks, config.tc2.tasks
    n = task_size(config.train.batch_size, K)
    domains = _domains(config, images) if isinstance(kind, Domains) else [images]
    chosen: list[str | Augmentation] = [config.data.augmentation or config.data.name]
    if isinstance(kind, Augmentations):
        chosen = list(kind.families or families(images.images.shape[1]))
        _check_one_per_task("families", len(chosen), K)
    augments = [augmenter(augmentation, images.images.shape[-1], images.images.shape[1]) for augmentation in chosen]
    size = n if isinstance(kind, Domains) else config.train.batch_size

    def read(domain: Images, t: int) -> Tensor:
        return domain.batch(batch_indices(t, size, len(domain), config.seed).to(domain.images.device))

    def sample(t: int, num_views: int = config.tc2.num_views) -> Tensor:
        x = _joined([read(domain, t) for domain in domains])
        blocks = x.chunk(len(augments))
        return _joined([views(block, augment, num_views) for block, augment in zip(blocks, augments, strict=True)])

    return sample


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _domains(config: Config, images: Images) -> list[Images]:
    """The images of each task: groups of classes, or data sets in the form of ``images``."""
    kind, K = config.tc2.tasks, config.tc2.num_tasks
    assert isinstance(kind, Domains)
    if kind.sets:
        _check_one_per_task("sets", len(kind.sets), K)
        size, channels = images.images.shape[-1], images.images.shape[1]
        others = [training_images(replace(config, data=replace(config.data, name=name))) for name in kind.sets]
        return [resize(other, size, channels).to(images.images.device) for other in others]
    groups = kind.classes or tuple(tuple(run.tolist()) for run in images.labels.unique().tensor_split(K))
    _check_one_per_task("classes", len(groups), K)
    found = [images.select(torch.isin(images.labels, torch.tensor(group, device=images.labels.device))) for group in groups]
    for group, domain in zip(groups, found, strict=True):
        if len(domain) < config.train.batch_size // K:
            raise ValueError(
                f"`classes` should hold groups of at least n = {config.train.batch_size // K} training images, one task of a batch; "
                f"{list(group)} has {len(domain)}. Take a smaller batch, fewer tasks or larger groups."
            )
    return found


def _check_one_per_task(name: str, number: int, K: int) -> None:
    if number != K:
        raise ValueError(f"`{name}` should be one for each of the K = {K} tasks, got {number}. Set tc2.num_tasks to {number}.")


def _in_bfloat16(net: Network) -> Network:
    """The encoder in bfloat16, the heads as they are: they cost little, and normalise.

    By casts and not torch.autocast, under which GroupNorm has no forward-mode derivative, nor BatchNorm any under vmap.
    """

    def encode(theta: Tree, x: Tensor) -> Tensor:
        return net.encode(tree.to({"encoder": theta["encoder"]}, torch.bfloat16), x.bfloat16()).to(x.dtype)

    return net._replace(encode=encode)


def _on(device: torch.device, state: MethodState) -> MethodState:
    return tree.to(state, device)._replace(step=state.step)


@contextmanager
def _own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Draws from ``seed`` inside, and leaves torch's generators, the device's too (manual_seed reseeds it), as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
