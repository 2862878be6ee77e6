"""What an iteration costs - images, seconds, bytes - and how many of them a run takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metacal._device import wait
from metacal._typing import Tree
from metacal.diagnostics import peak_bytes
from metacal.tc2 import Network
from metacal.train._files import replacing
from metacal.train.build import build, initial_state
from metacal.train.config import Config, Reading
from metacal.train.environment import own_draws, resolve_device
from metacal.train.sampling import image_channels, sampler, training_images

BUDGET = "budget.json"


def budget(config: Config) -> dict[str, Any]:
    """A run's ``steps``; with reading "matched" also ``matched_by``, what one iteration of "paper" and of this run costs.

    The cost is counted in images through the encoder (control 2), or timed: seconds of an iteration, its augmentation included,
    medians of a few that take turns (control 9). An iteration of "paper" in its warm-up is one of "tasks", whose cost is then there
    too. With the heads' statistics "shared" the images that a task only borrows for them count, for they are encoded.
    """
    steps, warmup = config.train.steps, min(config.tc2.warmup, config.train.steps)
    if config.tc2.reading != "matched":
        return {"steps": steps}
    readings: tuple[Reading, ...] = ("paper", "tasks", "matched") if warmup else ("paper", "matched")
    compared: dict[str, Config] = {reading: replace(config, tc2=replace(config.tc2, reading=reading, warmup=0)) for reading in readings}
    if config.tc2.budget == "seconds":
        cost: dict[str, float] = seconds_per_iteration(compared)
    else:
        cost = {name: images_per_step(one) for name, one in compared.items()}
    total = (steps - warmup) * cost["paper"] + warmup * cost.get("tasks", 0)
    return {"steps": max(1, round(total / cost["matched"])), "matched_by": {config.tc2.budget: cost}}


def kept_budget(config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """The run's :func:`budget`; a resumed run keeps the one it started with, since seconds are never measured alike twice."""
    path = folder / BUDGET
    if resume and path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    planned = budget(config)
    with replacing(path) as file:
        file.write(json.dumps(planned).encode())
    return planned


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
    with own_draws(resolve_device(config.device), 0):
        _, method = build(counted, 1, counting)
        state, x = method.init(), torch.rand(small, config.tc2.num_views, 1, 8, 8)
        method.step(state, x)  # mixed mode looks at an objective once, see operators: no cost of an iteration
        seen = 0
        method.step(state, x)
    return seen * config.train.batch_size // small


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
        with own_draws(device, config.seed):
            return method.step(state, sample(0) if draw else x)

    with own_draws(device, config.seed):
        images = training_images(config).to(device)
        _, method = build(config, image_channels(config))
        state, sample = initial_state(config, method), sampler(config, images)
        x = sample(0)
        method.step(state, x)  # the first call allocates what stays
    return step
