"""Which images of a data set an encoder is judged on: the same ones for every encoder and seed."""

from __future__ import annotations

import math
import os
from typing import Literal, TypeAlias

import torch

from metacal.data import Images, load, split_per_class, split_validation
from metacal.data.splits import shuffled_classes, stratified

Split: TypeAlias = Literal["validation", "test"]
Root: TypeAlias = "str | os.PathLike[str] | None"

OMNIGLOT_CHARACTERS = 100
_SEED = 0


def parts(name: str, split: Split, root: Root = None, download: bool = False) -> tuple[Images, Images]:
    """(to learn from, to judge on): "validation" is a tenth of the training images, held out from both.

    Omniglot: 100 characters of the evaluation alphabets, 14 drawings of each to learn from, 3 to validate and 3 to test.
    """
    if name == "omniglot":
        few = _characters(load(name, "test", root=root, download=download))
        train, validation, test = split_per_class(few, (14, 3, 3), seed=_SEED)
    else:
        train, validation = split_validation(load(name, "train", root=root, download=download), 0.1, seed=_SEED)
        test = load(name, "test", root=root, download=download) if split == "test" else validation
    return train, test if split == "test" else validation


def episode_images(name: str, split: Split, most: int, root: Root = None, download: bool = False) -> Images:
    """Images to draw few-shot episodes from, at most ``most``: test images, or for "validation" training images.

    Omniglot: whole characters, of the evaluation or the background alphabets.
    """
    images = load(name, "test" if split == "test" else "train", root=root, download=download)
    return _characters(images) if name == "omniglot" else at_most(images, most)


def at_most(images: Images, most: int, name: str = "labels") -> Images:
    """``most`` of the images, or all where there are fewer: each class's share, rounded by the largest remainder, and at least one of each.

    Errors:
        ValueError: there are more classes than ``most``, which ``name`` is the setting of.
    """
    if len(images) <= most:
        return images
    classes = [rows for _, rows in shuffled_classes(images.labels, _SEED)]
    if most < len(classes):
        raise ValueError(f"`{name}` should be at least {len(classes)}, one image of every class of {images.name}; got {most}.")
    rows = torch.cat(classes)
    # The i-th image of a class is as urgent as its class's share exceeds i; the first of each are most of all.
    urgency = torch.cat([len(of) * most / len(rows) - torch.arange(1.0, len(of) + 1, dtype=torch.float64) for of in classes])
    urgency[torch.tensor([0, *map(len, classes[:-1])]).cumsum(0)] = math.inf
    return images.select(rows[urgency.argsort(descending=True, stable=True)[:most].to(rows.device)].sort().values)


def share(images: Images, fraction: float) -> Images:
    """That share of every class, at least one image of each."""
    return images.select(stratified(images.labels, fraction, _SEED)[1])


def _characters(images: Images) -> Images:
    return images.select((images.labels < OMNIGLOT_CHARACTERS).nonzero().squeeze(1))
