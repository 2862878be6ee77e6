"""Few-shot episodes on frozen features: the nearest of a few examples' class means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metacal.data.splits import by_class
from metacal.evaluate._inputs import classes, matrix, scaled, warn_if_collapsed
from metacal.evaluate.intervals import Interval, mean_interval


def few_shot(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
) -> Interval:
    """Mean accuracy over episodes, with its 95% interval: the nearest prototype, by Euclidean distance, names a query's class.

    An episode draws ``ways`` classes, and of each ``shots`` examples, whose mean is the prototype, and ``queries`` others. Nothing is
    trained. The interval is over episodes, of one encoder: not over training seeds. Cost: ``episodes ways^2 queries d``.

    Args:
        features: ``[N, d]``, of classes and images that the encoder was not trained on with labels.
        labels: ``[N]``.
        seed: of the episodes; the same ones for every encoder.

    Errors:
        ValueError: fewer than ``ways`` classes with ``shots + queries`` rows each; NaN features; unlabelled rows.

    Source: prototypes, Snell et al. 2017 (arXiv 1703.05175), equations 1 and 2; 600 episodes and their interval as in that literature.

    >>> x = torch.eye(6).repeat(20, 1)
    >>> few_shot(x, torch.arange(120) % 6, episodes=10)
    Interval(mean=1.0, half_width=0.0)
    """
    x = matrix("features", features)
    y = classes("labels", labels, x, "features")
    if min(ways - 1, shots, queries, episodes - 1) < 1:
        raise ValueError(
            f"`ways` and `episodes` should be at least 2, `shots` and `queries` at least 1; got {ways}, {episodes}, {shots} and {queries}."
        )
    members = by_class(y)
    large = [rows for rows in members if len(rows) >= shots + queries]
    if len(large) < ways:
        raise ValueError(
            f"`features` should have at least {ways} classes of {shots + queries} rows (shots + queries); {len(large)} of its "
            f"{len(members)} classes are so large, the largest has {max(map(len, members))} rows. Ask for fewer queries or ways, or pass "
            "more rows."
        )
    warn_if_collapsed(x, "features")
    x = scaled(x)
    rng = np.random.default_rng(seed)
    target = torch.arange(ways, device=x.device)[:, None]
    accuracies = []
    for _ in range(episodes):
        drawn = [rng.choice(large[c], shots + queries, replace=False) for c in rng.choice(len(large), ways, replace=False)]
        task = x[torch.from_numpy(np.stack(drawn)).to(x.device)]  # [ways, shots + queries, d]
        prototypes = task[:, :shots].mean(1)
        nearest = torch.cdist(task[:, shots:], prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)  # [ways, queries]
        accuracies.append((nearest == target).double().mean())
    return mean_interval(torch.stack(accuracies).tolist())
