"""Ridge and logistic regression with one regulariser per feature, on text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Goal, Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import linear
from benchmarks.problems.scores import classified
from metacal._typing import Tree

# Features, documents, T.
DIMENSIONS: dict[Size, tuple[int, int, int]] = {"tiny": (8, 40, 30), "small": (200, 600, 30), "full": (2000, 7000, 300)}
apply, _ = linear(1, 1)


def penalty(w: Tree, h: Tree) -> Tensor:
    """``1/2 sum_f exp(h_f) |w_f|^2``."""
    return 0.5 * (h["log_decay"].exp()[:, None] * w["weight"] ** 2).sum()


def squares(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return 0.5 * ((apply(w, x) - y) ** 2).sum() / len(x)


def likelihood(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(apply(w, x), y)


def ridge(size: Size) -> Problem:
    """On the classes as vectors of zeros and a one. In float64; exact by the normal equations."""
    split, T = _split(size)
    classes = int(split.train[1].max()) + 1
    (x, y), (x_out, y_out) = ((x.double(), F.one_hot(y, classes).double()) for x, y in (split.train, split.validation))
    h = {"log_decay": torch.full((x.shape[1],), -2.0, dtype=torch.float64)}
    rate = _rate(x, 1.0)

    def exact() -> Tree:
        n, ones = len(x), torch.ones(len(x), 1, dtype=torch.float64)
        X = torch.cat([x, ones], 1)
        decay = torch.diag(torch.cat([h["log_decay"].exp(), torch.zeros(1, dtype=torch.float64)]))
        system = X.T @ X / n + decay
        solution = torch.linalg.solve(system, X.T @ y / n)
        X_out = torch.cat([x_out, torch.ones(len(x_out), 1, dtype=torch.float64)], 1)
        slope = X_out.T @ (X_out @ solution - y_out) / len(x_out)
        # d w* / d h_f = -system^-1 e_f exp(h_f) w*_f
        return {"log_decay": -h["log_decay"].exp() * (torch.linalg.solve(system, slope) * solution).sum(1)[:-1]}

    return Problem(
        f"ridge, {split.title}", lambda w, h, b: squares(w, h, b) + penalty(w, h), squares, _start(x, y.shape[1]), h, [(x, y)] * T,
        (x_out, y_out), Rule("sgd", rate, 0.9), exact=exact, step_size=rate,
    )  # fmt: skip


def logistic(size: Size) -> Problem:
    """Softmax regression, in float64."""
    split, T = _split(size)
    (x, y), (x_out, y_out) = ((x.double(), y) for x, y in (split.train, split.validation))
    h = {"log_decay": torch.full((x.shape[1],), -3.0, dtype=torch.float64)}
    rate = _rate(x, 0.5)  # the softmax's own curvature is at most a half
    return Problem(
        f"logistic regression, {split.title}", lambda w, h, b: likelihood(w, h, b) + penalty(w, h), likelihood,
        _start(x, int(split.train[1].max()) + 1), h, [(x, y)] * T, (x_out, y_out), Rule("sgd", rate, 0.9), step_size=rate,
        goal=Goal(classified(apply), (split.test[0].double(), split.test[1]), lr=0.1, restarts=False),
    )  # fmt: skip


def _split(size: Size) -> tuple[data.Split, int]:
    features, documents, T = DIMENSIONS[size]
    if size == "tiny":
        whole = data.image_split("digits", documents, documents // 2, data.NUM_TEST[size])
        parts = ((x[:, 20 : 20 + features], y % 3) for x, y in (whole.train, whole.validation, whole.test))
        return data.Split("digits", *parts), T
    return data.newsgroups(features, documents), T


def _start(x: Tensor, classes: int) -> Tree:
    return {name: value.double() for name, value in linear(x.shape[1], classes)[1].items()}


def _rate(x: Tensor, curvature: float) -> float:
    """One over a bound of the largest eigenvalue, regularisers of size 1 at most included."""
    X = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return 1 / (curvature * float(torch.linalg.matrix_norm(X, 2)) ** 2 / len(x) + 1.0)
