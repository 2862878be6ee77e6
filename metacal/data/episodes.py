"""Few-shot episodes: small classification tasks drawn from a set of many classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacal.data.images import Images, to_float
from metacal.data.splits import by_class


class Episode(NamedTuple):
    """K tasks: images [K, ways * shots, C, H, W] with labels [K, ways * shots] in 0 ... ways - 1, and queries likewise."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Episodes:
    """N-way k-shot tasks from a labelled set, each with new classes under new labels.

    Args:
        images: at least ``ways`` classes with ``shots + queries`` images each.
        ways: classes per task.
        shots, queries: support and query images per class; no image is both.
        rotations: a class turned by 90, 180 and 270 degrees is another class (Santoro et al. 2016), as is usual for Omniglot.

    Errors:
        ValueError: too few classes, or a class with too few images.

    >>> digits = Images(torch.rand(40, 1, 8, 8), torch.arange(40) % 4, "noise", num_classes=4)
    >>> tasks = Episodes(digits, ways=3, shots=1, queries=2).sample(step=0, num_tasks=5, seed=0)
    >>> tasks.support[0].shape, tasks.query[1].shape
    (torch.Size([5, 3, 1, 8, 8]), torch.Size([5, 6]))
    """

    images: Images
    ways: int
    shots: int
    queries: int
    rotations: bool = False

    def __post_init__(self) -> None:
        if min(self.ways - 1, self.shots, self.queries) < 1:
            raise ValueError(
                f"`ways` should be at least 2, `shots` and `queries` at least 1; got {self.ways}, {self.shots} and {self.queries}."
            )
        counts = self.images.labels.bincount()
        counts = counts[counts > 0]
        if len(counts) < self.ways or int(counts.min()) < self.shots + self.queries:
            raise ValueError(
                f"`images` should have at least {self.ways} classes of {self.shots + self.queries} images (shots + queries); it has "
                f"{len(counts)} classes, the smallest of {int(counts.min())} images."
            )

    def sample(self, step: int, num_tasks: int, seed: int) -> Episode:
        """The tasks of global step ``step``: a pure function of its arguments, so that a resumed run needs no position."""
        rng = np.random.default_rng((seed, step))
        classes = by_class(self.images.labels)
        turns_per_class = 4 if self.rotations else 1
        chosen, turns = [], []
        for _ in range(num_tasks):
            # A class and its rotations are different classes, but not in one task.
            for label in rng.choice(len(classes), self.ways, replace=False):
                chosen.append(rng.choice(classes[label], self.shots + self.queries, replace=False))
                turns.append(rng.integers(turns_per_class))
        x = to_float(self.images.images[torch.from_numpy(np.stack(chosen))])  # [K ways, shots + queries, C, H, W]
        x = torch.stack([torch.rot90(images, int(turn), (-2, -1)) for images, turn in zip(x, turns, strict=True)])
        x = x.unflatten(0, (num_tasks, self.ways))
        labels = torch.arange(self.ways, device=x.device).expand(num_tasks, self.ways)
        support, query = x[:, :, : self.shots].flatten(1, 2), x[:, :, self.shots :].flatten(1, 2)
        return Episode((support, labels.repeat_interleave(self.shots, 1)), (query, labels.repeat_interleave(self.queries, 1)))
