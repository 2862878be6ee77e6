"""One protocol for judging a frozen encoder on a data set, the one it was trained on or another."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metacal.data import Images, load, resize, split_per_class, split_validation
from metacal.data.splits import stratified
from metacal.evaluate.encode import features
from metacal.evaluate.knn import knn
from metacal.evaluate.monitors import dimension_std, is_collapsed, rank_me
from metacal.evaluate.probe import linear_probe

OMNIGLOT_CHARACTERS = 100
_SPLIT_SEED = 0  # the same images for every encoder and seed


class Scores(NamedTuple):
    """Accuracies in [0, 1] and collapse monitors of the test features.

    ``probe`` is a linear classifier on frozen features, its strength chosen by ``probe_validation``; ``knn`` the weighted
    neighbours; ``rank_me`` the effective number of dimensions; ``dimension_std`` their mean deviation; ``collapsed`` 0 or 1.
    """

    probe: float
    probe_validation: float
    knn: float
    rank_me: float
    dimension_std: float
    collapsed: float


def transfer(
    encode: Callable[[Tensor], Tensor],
    name: str,
    *,
    image_size: int,
    channels: int,
    split: Literal["validation", "test"] = "test",
    labels: int = 4000,
    neighbours: int = 20,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    device: torch.device | str | None = None,
) -> Scores:
    """Probe and neighbours of a frozen encoder on a data set.

    The encoder sees the set's images at its own size and channels. Classifiers get at most ``labels`` training images, drawn
    once, stratified, the same for every encoder; the probe's strength is chosen on a fifth of them.

    With ``split="test"`` the set's own test images are read: do so once, for settings chosen with ``"validation"`` (a tenth of the
    training images, held out). Omniglot: 100 characters of the evaluation alphabets, 14 drawings of each to learn from, 3 to
    validate and 3 to test.

    Cost: encoding the images, and a few seconds for 4,000 x 64 features of 10 classes.

    >>> scores = transfer(lambda x: x.flatten(1), "digits", image_size=8, channels=1, labels=500)
    >>> scores.probe > 0.9
    True
    """
    train, test = _parts(name, split, root, download)
    if len(train) > labels:
        _, few = stratified(train.labels, labels / len(train), _SPLIT_SEED)
        train = train.select(few)
    learn, judge = (resize(part, image_size, channels) for part in (train, test))
    z_train, z_test = (features(encode, part.images, device=device) for part in (learn, judge))
    probe = linear_probe(z_train, learn.labels, z_test, judge.labels)
    nearest = knn(z_train, learn.labels, z_test, judge.labels, k=neighbours)
    return Scores(
        probe=probe.accuracy,
        probe_validation=probe.validation_accuracy,
        knn=float(nearest),
        rank_me=float(rank_me(z_test)),
        dimension_std=float(dimension_std(z_test).mean()),
        collapsed=float(is_collapsed(z_test)),
    )


def _parts(name: str, split: str, root: str | os.PathLike[str] | None, download: bool) -> tuple[Images, Images]:
    if name == "omniglot":
        characters = load(name, "test", root=root, download=download)
        few = characters.select((characters.labels < OMNIGLOT_CHARACTERS).nonzero().squeeze(1))
        train, validation, test = split_per_class(few, (14, 3, 3), seed=_SPLIT_SEED)
    else:
        train, validation = split_validation(load(name, "train", root=root, download=download), 0.1, seed=_SPLIT_SEED)
        test = load(name, "test", root=root, download=download) if split == "test" else validation
    return train, test if split == "test" else validation
