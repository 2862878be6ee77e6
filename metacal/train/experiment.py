"""A run: from its settings to a trained encoder, its scores and its folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._device import wait
from metacal._typing import Tree
from metacal.evaluate import Case, Encoder, assess, check_online, online
from metacal.tc2 import Measurement, Method, MethodState, Problem, measure
from metacal.train import checkpoint
from metacal.train._files import replacing
from metacal.train.budget import images_per_step, kept_budget
from metacal.train.build import build, initial_state
from metacal.train.config import Config
from metacal.train.environment import own_draws, resolve_device, seed_everything, write_environment
from metacal.train.loop import CHECKPOINTS, fit, refuse_existing
from metacal.train.results import CONFIG, read_results, with_scores, write_results
from metacal.train.sampling import image_channels, image_size, sampler, training_images, watched_images
from metacal.train.settings import to_yaml


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

    Errors: a data set that is not there; a batch that does not split into tasks; too few images for what `evaluate` asks for.
    """
    device = resolve_device(config.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    seed_everything(config.seed)
    images = training_images(config)
    problem, method = build(config, images.images.shape[1])
    state = initial_state(config, method)
    sample = sampler(config, images.to(device))
    every = config.train.measure_every
    watched = watched_images(config).to(device) if config.evaluate.online else None
    if watched is not None:
        check_online(watched)
    judged = Encoder(problem.network.encode, state.theta, image_size(config), image_channels(config))
    for case in _cases(config, judged).values():
        case.check(config.evaluate.scores)  # now, and not after hours

    def measured(state: MethodState, t: int) -> Measurement:
        # Its own draws, so that measuring leaves the run as it would have been; at least 4 views, for support and query pairs.
        with own_draws(device, config.seed):
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

    A finished run that is resumed keeps what it holds besides: scores of `metacal evaluate`, seconds per step.

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
    planned = kept_budget(config, folder, resume)
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
    before = read_results(folder) if resume else {}
    results = {
        **before,
        "cosines": last.cosines.tolist(),
        "transfer": last.transfer.tolist(),
        "measured": {name: float(value) for name, value in last.scalars.items()},
        "seconds_per_step": median(seconds) if seconds else before.get("seconds_per_step", math.nan),
        **planned,
        "images_per_step": images_per_step(config),
        "split": config.evaluate.split,
        "labels": config.evaluate.labels,
        "neighbours": config.evaluate.neighbours,
    }
    results = with_scores(results, judge(config, state), config.evaluate.split)
    write_results(folder, results)
    return results


def judge(config: Config, state: MethodState) -> dict[str, dict[str, float]]:
    """The frozen encoder's scores, by data set, as ``config.evaluate`` asks for them."""
    cases = _cases(config, encoder(config, state.theta))
    return {name: assess(case, config.evaluate.scores) for name, case in cases.items()}


def _cases(config: Config, judged: Encoder) -> dict[str, Case]:
    asked, data = config.evaluate, config.data

    def case(name: str) -> Case:
        return Case(judged, name, asked.split, asked.labels, asked.neighbours, data.name, root=data.root, download=data.download)

    return {name: case(name) for name in asked.data or (data.name,)}


def encoder(config: Config, theta: Tree) -> Encoder:
    """The encoder of a run's params: its images have the size and the channels that it was trained on."""
    channels = image_channels(config)
    problem, _ = build(config, channels)
    return Encoder(problem.network.encode, {"encoder": theta["encoder"]}, image_size(config), channels)


def restore(config: Config, folder: str | Path) -> MethodState:
    """The state of the newest checkpoint in a run's folder."""
    seed_everything(config.seed)
    _, method = build(config, image_channels(config))
    found = checkpoint.latest(Path(folder) / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"`folder` {folder} holds no checkpoint. Train first: metacal pretrain CONFIG --out {folder}")
    return tree.load_state_dict(initial_state(config, method), found.tensors["state"])


def unfinished(config: Config, folder: str | Path, state: MethodState) -> str | None:
    """What to say of a run whose restored state is not that of its results; None where it is."""
    folder, step = Path(folder), int(state.step)
    steps = read_results(folder).get("steps")
    if step == steps:
        return None
    steps = steps or kept_budget(config, folder, resume=True)["steps"]
    return (
        f"The run {folder} is not finished: its newest readable checkpoint is of step {step} of {steps}. Go on with "
        f"`metacal pretrain {folder / CONFIG} --out {folder} --resume`."
    )


def write_settings(folder: Path, config: Config, resume: bool) -> None:
    """Writes config.yaml; refuses a folder that holds a run, or with ``resume`` one of other settings."""
    path, text = folder / CONFIG, to_yaml(config)
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


def _mean_measurement(found: list[Measurement]) -> Measurement:
    return tree.map(lambda *values: torch.stack(values).mean(0), *found)


def _pairs(cosines: Tensor) -> dict[str, Tensor]:
    """One cosine for every two of the K tasks, counted from 1."""
    K = len(cosines)
    return {f"cosine_{i + 1}_{j + 1}": cosines[i, j] for i in range(K) for j in range(i + 1, K)}
