"""Stratified splits: each class is shuffled and divided for itself, by a generator that nothing else uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from metacal.data.images import Images


def split_validation(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Divides a set into (training, validation), stratified: ``fraction`` of every class is held out.

    Each class rounds for itself and has at least one image on either side. The same arguments give the same split.

    Errors:
        ValueError: ``fraction`` is not in (0, 1), or a class has a single image.

    >>> digits = Images(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, "noise", num_classes=2)
    >>> train, validation = split_validation(digits, 0.2, seed=0)
    >>> train.labels.bincount().tolist(), validation.labels.bincount().tolist()
    ([8, 8], [2, 2])
    """
    train, validation = stratified(images.labels, fraction, seed)
    return images.select(train), images.select(validation)


def split_per_class(images: Images, sizes: Sequence[int], seed: int) -> tuple[Images, ...]:
    """Divides a set into disjoint parts with ``sizes[0], sizes[1], ...`` images of every class; what is left over is dropped.

    Omniglot has 20 drawings of each character: ``sizes=(14, 3, 3)`` makes training, validation and test parts to probe on.

    Errors:
        ValueError: a size below 1, or a class with fewer than ``sum(sizes)`` images.

    >>> few = Images(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, "noise", num_classes=2)
    >>> [len(part) for part in split_per_class(few, (6, 2, 2), seed=0)]
    [12, 4, 4]
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"`sizes` should hold one positive number of images per class and part, got {tuple(sizes)}.")
    parts: list[list[Tensor]] = [[] for _ in sizes]
    for label, members in shuffled_classes(images.labels, seed):
        if len(members) < sum(sizes):
            raise ValueError(
                f"`sizes` = {tuple(sizes)} needs {sum(sizes)} images per class; class {label} has {len(members)}. Ask for fewer."
            )
        for part, chosen in zip(parts, members[: sum(sizes)].split(list(sizes)), strict=True):
            part.append(chosen)
    return tuple(images.select(torch.cat(part).sort().values) for part in parts)


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of (the rest, ``fraction`` of every class)."""
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` should lie between 0 and 1, both excluded; got {fraction}. For a tenth pass 0.1.")
    rest, taken = [], []
    for label, members in shuffled_classes(labels, seed):
        if len(members) < 2:
            raise ValueError(f"`images` should have at least 2 images of every class to split; class {label} has 1. Drop that class.")
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(members[:size])
        rest.append(members[size:])
    return torch.cat(rest).sort().values, torch.cat(taken).sort().values


def by_class(labels: Tensor) -> list[np.ndarray]:
    """The rows of each class present, in the order of its label; each ascending.

    >>> [rows.tolist() for rows in by_class(torch.tensor([5, 2, 5]))]
    [[1], [0, 2]]
    """
    found = labels.numpy(force=True)
    order = np.argsort(found, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(found[order])) + 1)


def shuffled_classes(labels: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Each class present, in the order of its label, with the shuffled indices of its images (on the labels' device)."""
    if not len(labels):
        raise ValueError("`images` should not be empty: there is nothing to split.")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same split on every device
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        yield label, members[torch.randperm(len(members), generator=generator).to(members.device)]
