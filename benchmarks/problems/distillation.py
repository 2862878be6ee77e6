"""Data distillation: a few learned images on which a network trains to do well on real ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Goal, Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import cross_entropy, mlp
from benchmarks.problems.scores import classified
from metacal._typing import Tree

DIMENSIONS: dict[Size, tuple[int, int, int]] = {"tiny": (8, 20, 4), "small": (64, 500, 15), "full": (256, 5000, 100)}  # hidden, images, T


def distillation(size: Size) -> Problem:
    """One image per class, from noise; their labels are fixed."""
    hidden, num_images, T = DIMENSIONS[size]
    split = data.image_split("digits" if size == "tiny" else "mnist", num_images, num_images, data.NUM_TEST[size])
    features = split.train[0].shape[1]
    apply, params = mlp([features, hidden, 10])

    def model(w: Tree, h: Tree, labels: Tensor) -> Tensor:
        return apply(w, h["images"])

    def loss(outputs: Tensor, h: Tree, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def inner(w: Tree, h: Tree, labels: Tensor) -> Tensor:
        return loss(model(w, h, labels), h, labels)

    learned = {"images": 0.5 + 0.25 * torch.randn(10, features, generator=torch.Generator().manual_seed(0))}
    labels = torch.arange(10)
    return Problem(
        f"distillation, {split.title}", inner, cross_entropy(apply), params, learned, [labels] * T, split.train, Rule("sgd", 0.02, 0.9),
        step_size=0.02, parts=(model, loss), goal=Goal(classified(apply), split.test, lr=0.03),
    )  # fmt: skip
