"""Learned settings of training: a rate for every step, and how strongly to augment."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Goal, Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import cross_entropy, mlp
from benchmarks.problems.scores import classified
from metacal._typing import Tree

DIMENSIONS: dict[Size, tuple[int, int, int]] = {"tiny": (8, 10, 4), "small": (64, 100, 10), "full": (256, 100, 60)}  # hidden, batch, T


def learning_rates(size: Size) -> Problem:
    """One rate per step: with SGD it is the scale of the step's loss, which every library can differentiate by."""
    hidden, _, T = DIMENSIONS[size]
    split, batches = _batches(size)
    apply, params = mlp([split.train[0].shape[1], hidden, 10])

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, t = batch
        return h["log_rates"][t].exp() * F.cross_entropy(apply(w, x), y)

    rates = {"log_rates": torch.full((T,), math.log(0.05))}
    steps = [(x, y, torch.tensor(t)) for t, (x, y) in enumerate(batches)]
    outer = cross_entropy(apply)
    return Problem(
        f"learning rates, {split.title}", inner, outer, params, rates, steps, split.validation, Rule("sgd", 1.0), step_size=0.5,
        goal=Goal(classified(apply), split.test, lr=0.1),
    )  # fmt: skip


def augmentation(size: Size) -> Problem:
    """How strongly to change brightness and contrast, to shift and to add noise; each batch holds its draws."""
    hidden = DIMENSIONS[size][0]
    split, batches = _batches(size)
    side = math.isqrt(split.train[0].shape[1])
    apply, params = mlp([side**2, hidden, 10])
    g = torch.Generator().manual_seed(2)

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        x, y, draws, grain = batch
        strength = h["log_strength"].exp()
        contrast, brightness, across, down = (draws * strength[:4]).unsqueeze(-1).unbind(1)  # [n, 1] each
        maps = x.unflatten(1, (side, side))
        # A shift of less than a pixel, between an image and its neighbour, so that its size has a derivative.
        maps = maps + across.unsqueeze(-1) * (maps.roll(1, 2) - maps) + down.unsqueeze(-1) * (maps.roll(1, 1) - maps)
        changed = maps.flatten(1) * (1 + contrast) + brightness + strength[4] * grain
        return F.cross_entropy(apply(w, changed), y)

    steps = [(x, y, torch.randn(len(x), 4, generator=g), torch.randn(x.shape, generator=g)) for x, y in batches]
    strength = {"log_strength": torch.full((5,), math.log(0.1))}
    return Problem(
        f"augmentation, {split.title}", inner, cross_entropy(apply), params, strength, steps, split.validation, Rule("sgd", 0.02, 0.9),
        step_size=0.02, goal=Goal(classified(apply), split.test, lr=0.1),
    )  # fmt: skip


def _batches(size: Size) -> tuple[data.Split, list[tuple[Tensor, Tensor]]]:
    _, batch_size, T = DIMENSIONS[size]
    split = data.image_split("digits" if size == "tiny" else "mnist", T * batch_size, 5 * batch_size, data.NUM_TEST[size])
    x, y = split.train
    g = torch.Generator().manual_seed(1)
    where = [torch.randint(len(x), (batch_size,), generator=g) for _ in range(T)]
    return split, [(x[i], y[i]) for i in where]
