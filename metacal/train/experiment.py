"""A run: from its settings to a trained encoder, its scores and its folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metacal import optim, tree
from metacal._typing import Tree
from metacal.data import Images, augmenter, batch_indices, load, split_validation, views
from metacal.diagnostics import peak_bytes
from metacal.evaluate import transfer
from metacal.nets import ConvEncoder
from metacal.tc2 import (
    Identity,
    Measurement,
    Method,
    MethodState,
    Network,
    Problem,
    base,
    literal,
    lookahead,
    measure,
    network,
    paper,
    project_conflicts,
    stable,
)
from metacal.train import checkpoint
from metacal.train._files import replacing
from metacal.train.config import Config, EvaluateConfig
from metacal.train.environment import resolve_device, seed_everything, write_environment
from metacal.train.loop import CHECKPOINTS, fit, refuse_existing
from metacal.train.settings import to_yaml

RESULTS = "results.json"


def build(config: Config, channels: int, adapt: Callable[[Network], Network] = lambda net: net) -> tuple[Problem, Method]:
    """The problem and the training method of a configuration; draws the networks from torch's default generator.

    ``adapt`` may wrap the network's functions before anything is built on them.
    """
    c, t = config.tc2, config.train
    encoder = ConvEncoder(channels, config.network.width, config.network.dim, stem_stride=config.network.stem_stride)
    net = network(
        encoder, config.objective, dim=config.network.dim, d=config.network.d, hidden=config.network.hidden, norm=config.network.norm
    )
    net = net._replace(params=tree.to(net.params, resolve_device(config.device)))
    if t.bf16:
        net = _in_bfloat16(net)
    net = adapt(net)
    calibrated = c.reading in ("paper", "lookahead")
    problem = Problem(net, config.objective, c.calibrator if calibrated else Identity(), c.where, c.num_tasks, c.split_by, t.momentum)
    outer, calibrator_outer = optim.adam(t.lr), optim.adam(c.calibrator_lr)
    calibration = stable(c.lambda_s, c.lambda_1) if c.form == "stable" else literal(c.lambda_s)
    if c.reading in ("base", "matched"):
        return problem, base(problem, outer)
    if c.reading == "pcgrad":
        return problem, project_conflicts(problem, outer)
    if c.reading == "lookahead":
        stages: dict[str, Any] = {"calibration": calibration, "encoder_stage": c.encoder_stage, "warmup": c.warmup}
        return problem, lookahead(problem, outer, calibrator_outer, **stages)
    return problem, paper(
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


def pretrain(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains an encoder as ``config`` says, judges it, and leaves everything in ``folder``.

    The folder holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints, environment.json and results.json. On a CPU the same
    configuration gives the same numbers, and so does a run that was killed and resumed.

    Errors: those of :func:`metacal.train.fit`; a data set that is not there; a batch that does not split into tasks.
    """
    folder = Path(folder)
    device = resolve_device(config.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    seed_everything(config.seed)
    images = training_images(config)
    problem, method = build(config, images.images.shape[1])
    state = _on(device, method.init())
    sample = _sampler(config, images.to(device))
    seconds: list[float] = []
    every = config.train.measure_every

    def step(state: MethodState, t: int) -> tuple[MethodState, dict[str, Tensor]]:
        x = sample(t)
        started = time.perf_counter()
        state, metrics = method.step(state, x)
        _wait(device)
        seconds.append(time.perf_counter() - started)
        if every and (t + 1) % every == 0:
            metrics = {**metrics, **measured(state, t).scalars}
        return state, metrics

    def measured(state: MethodState, t: int) -> Measurement:
        # Its own draws, so that measuring leaves the run as it would have been; at least 4 views, for support and query pairs.
        with _own_draws(device, config.seed):
            return measure(problem, state, sample(t, max(4, config.tc2.num_views)), lr=config.tc2.encoder_stage.lr)

    _write_settings(folder, config, resume)
    write_environment(folder, seed=config.seed, device=str(device))
    t, steps = config.train, total_steps(config)
    state = fit(step, state, steps, folder, checkpoint_every=t.checkpoint_every, log_every=t.log_every, resume=resume, progress=progress)
    last = measured(state, steps)
    results = {
        "cosines": last.cosines.tolist(),
        "transfer": last.transfer.tolist(),
        "measured": {name: float(value) for name, value in last.scalars.items()},
        "steps": steps,
        "seconds_per_step": median(seconds) if seconds else None,
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
        method.step(method.init(), torch.rand(small, config.tc2.num_views, 1, 8, 8))
    return seen * config.train.batch_size // small


def total_steps(config: Config) -> int:
    """Iterations of a run; the reading "matched" takes as many as make the encoder passes of reading "paper" (control 2)."""
    if config.tc2.reading != "matched":
        return config.train.steps
    paper_config = replace(config, tc2=replace(config.tc2, reading="paper"))
    return max(1, round(config.train.steps * images_per_step(paper_config) / images_per_step(config)))


def step_bytes(config: Config) -> int:
    """Peak of the bytes that one iteration allocates, above the state and the batch."""
    device = resolve_device(config.device)
    with _own_draws(device, config.seed):
        images = training_images(config).to(device)
        _, method = build(config, training_channels(config))
        state, x = _on(device, method.init()), _sampler(config, images)(0)
        method.step(state, x)  # the first call allocates what stays
        return peak_bytes(lambda: method.step(state, x), device)


def write_results(folder: str | Path, results: dict[str, Any]) -> None:
    """Writes results.json in one stroke."""
    with replacing(Path(folder) / RESULTS) as file:
        file.write(json.dumps(results, indent=2).encode())


def _write_settings(folder: Path, config: Config, resume: bool) -> None:
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
    augment = augmenter(config.data.augmentation or config.data.name, images.images.shape[-1], images.images.shape[1])

    def sample(t: int, num_views: int = config.tc2.num_views) -> Tensor:
        chosen = batch_indices(t, config.train.batch_size, len(images), config.seed)
        return views(images.batch(chosen.to(images.images.device)), augment, num_views)

    return sample


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
