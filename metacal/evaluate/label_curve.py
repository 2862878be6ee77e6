"""Accuracy of the probe against the number of labels it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacal.data.splits import by_class
from metacal.evaluate._inputs import labelled
from metacal.evaluate.probe import linear_probe

PER_CLASS = (2, 5, 10, 20, 50, 100, 200, 400)
"""The default numbers of labels of each class."""


class LabelCurve(NamedTuple):
    """``labels``: how many training rows were labelled; ``accuracy``: the probe's, on the test rows."""

    labels: list[int]
    accuracy: list[float]


def label_curve(
    train: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    *,
    per_class: Sequence[int] = PER_CLASS,
    strengths: Sequence[float] = (1e-1, 1e-2, 1e-3),
    seed: int = 0,
) -> LabelCurve:
    """Linear probes on more and more labels: the first n rows of each class, in one random order, so that sets contain smaller ones.

    Sizes that the smallest class does not have are left out. Each probe chooses its strength on a fifth of its own labels. Cost: a
    :func:`metacal.evaluate.linear_probe` per size, the largest as dear as all others together.

    Errors:
        ValueError: no size fits, or one is below 2 (a probe holds a row of each class out); and as the probe.

    >>> x, y = torch.eye(4).repeat(10, 1) + 0.1 * torch.randn(40, 4), torch.arange(40) % 4
    >>> label_curve(x, y, x, y, per_class=(2, 5)).labels
    [8, 20]
    """
    x, y = labelled("train", train, train_labels)
    rng = np.random.default_rng(seed)
    members = [rng.permutation(rows) for rows in by_class(y)]
    smallest = min(map(len, members))
    sizes = sorted(n for n in per_class if n <= smallest)
    if not sizes or sizes[0] < 2:
        raise ValueError(f"`per_class` should hold sizes from 2 to the {smallest} rows of the smallest class, got {tuple(per_class)}.")
    curve = LabelCurve([], [])
    for n in sizes:
        rows = torch.from_numpy(np.concatenate([rows[:n] for rows in members])).to(x.device)
        curve.labels.append(len(rows))
        curve.accuracy.append(linear_probe(x[rows], y[rows], test, test_labels, strengths=strengths, seed=seed).accuracy)
    return curve
