"""Data hyper-cleaning: a part of the labels is wrong, and weights are learned so that what is trained on them does well on clean data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Goal, Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import linear, mlp
from benchmarks.problems.scores import accuracy, f1
from metacal._typing import Tree

Weights = Literal["samples", "network"]
# Training images, validation images, T.
DIMENSIONS: dict[Size, tuple[int, int, int]] = {"tiny": (12, 10, 5), "small": (600, 300, 20), "full": (5000, 5000, 100)}
DECAY, HIDDEN = 1e-3, 16


def cleaning(name: str, corruption: float, weights: Weights, size: Size) -> Problem:
    """Softmax regression on all of the training images at once, each loss times its weight.

    One weight per sample, a sigmoid; or the weight network of Shu et al. 2019 (arXiv 1902.07379), which sees a sample's loss (and is
    here differentiated by it: then the weighted loss has a gradient, and the oracle is the derivative of the run).
    """
    n, num_validation, T = DIMENSIONS[size]
    split = data.image_split("digits" if size == "tiny" else name, n, num_validation, data.NUM_TEST[size])
    x, y = split.train
    corrupted, wrong = corrupt(y, corruption)
    apply, params = linear(x.shape[1], 10)
    weigh, weigher = mlp([1, HIDDEN, 1])

    def losses(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(apply(w, batch[0]), batch[1], reduction="none")

    def logits(h: Tree, each: Tensor) -> Tensor:
        given: Tensor = h["logits"] if weights == "samples" else weigh(h, each[:, None])[:, 0]
        return given

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = losses(w, batch)
        return (torch.sigmoid(logits(h, each)) * each).mean() + DECAY * sum((v**2).sum() for v in w.values())

    def outer(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(w, batch).mean()

    def scores(w: Tree, h: Tree, test: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
        x, y, *batch, corrupted = test
        return {"accuracy": accuracy(apply(w, x), y), "f1": f1(logits(h, losses(w, (batch[0], batch[1]))), corrupted)}

    h = {"logits": torch.zeros(len(y))} if weights == "samples" else weigher
    kind = "a weight per sample" if weights == "samples" else "a weight network"
    title = f"hyper-cleaning, {split.title}, {100 * corruption:.0f}%, {kind}"
    rule, rate = Rule("sgd", 0.1, 0.9), 0.05
    goal = Goal(scores, (*split.test, x, wrong, corrupted), lr=0.3 if weights == "samples" else 0.03, restarts=False)
    return Problem(title, inner, outer, params, h, [(x, wrong)] * T, split.validation, rule, step_size=rate, goal=goal)


def corrupt(labels: Tensor, share: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Which labels are wrong, that share of them, and the labels with those replaced by another class, each as likely."""
    g = torch.Generator().manual_seed(seed)
    corrupted = torch.zeros(len(labels), dtype=torch.bool)
    corrupted[torch.randperm(len(labels), generator=g)[: round(share * len(labels))]] = True
    other = (labels + torch.randint(1, 10, labels.shape, generator=g)) % 10
    return corrupted, torch.where(corrupted, other, labels)
