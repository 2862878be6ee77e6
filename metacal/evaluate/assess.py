"""A frozen encoder's scores on a data set, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.data import Images, resize
from metacal.evaluate.cka import cka
from metacal.evaluate.encode import features
from metacal.evaluate.few_shot import few_shot
from metacal.evaluate.fine_tune import fine_tune
from metacal.evaluate.flat_map import flat_map
from metacal.evaluate.freeze import frozen
from metacal.evaluate.h_score import h_score
from metacal.evaluate.knn import knn
from metacal.evaluate.label_curve import PER_CLASS, LabelCurve, label_curve
from metacal.evaluate.leep import leep, nce
from metacal.evaluate.logme import logme
from metacal.evaluate.monitors import dimension_std, is_collapsed, rank_me
from metacal.evaluate.parts import Root, Split, at_most, episode_images, parts, share
from metacal.evaluate.probe import class_probabilities, held_out_probabilities, linear_probe
from metacal.evaluate.transrate import transrate

Score: TypeAlias = Literal[
    "probe", "knn", "monitors", "few_shot", "fine_tune", "logme", "h_score", "transrate", "leep", "nce", "cka"
]  # fmt: skip
SCORES: tuple[Score, ...] = get_args(Score)
"""The scores that :func:`assess` knows; all but fine_tune read frozen features only."""

NEIGHBOURS = 200
_EPISODE_IMAGES = 4000  # that few-shot episodes are drawn from, at most
_STATISTICS_IMAGES = 4000  # training images that the statistics of BatchNorm are estimated on, at most
_MAP_POINTS = 1000
_PLENTY = 400  # labels: two and more of every class of every set that there is


class Encoder(NamedTuple):
    """An encoder as a pure function ``encode(params, x [B, channels, image_size, image_size]) -> [B, d]`` of its params."""

    encode: Callable[[Tree, Tensor], Tensor]
    params: Tree
    image_size: int
    channels: int


@dataclass(frozen=True)
class Case:
    """An encoder, the images it is judged on, and their features; what nobody asks for is never computed.

    Args:
        encoder: what is judged.
        data: the data set's name.
        split: "validation" to choose settings, "test" to report, once.
        labels: training images with labels, at most (fine-tuning takes its share of all, episodes are drawn from others); the same ones
            for every encoder.
        neighbours: k of the weighted kNN, besides 200.
        source: the data set whose classes LEEP and NCE translate; the one pretrained on.
        against: the encoder that CKA compares with.
        root, download: where data sets are, and whether to fetch missing ones.

    BatchNorm that would take the statistics of the batch has those of the data set's training images (without their labels), so that an
    image's features are its own: see :func:`metacal.evaluate.frozen`.

    Errors:
        ValueError: fewer than 2 ``labels``, or no ``neighbours``.
    """

    encoder: Encoder
    data: str
    split: Split = "test"
    labels: int = 4000
    neighbours: int = 20
    source: str | None = None
    against: Encoder | None = None
    root: Root = None
    download: bool = False

    def __post_init__(self) -> None:
        for name, least in (("labels", 2), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` should be at least {least}, got {getattr(self, name)}.")

    @cached_property
    def everything(self) -> tuple[Images, Images]:
        """All images (to learn from, to judge on), as they are stored."""
        return parts(self.data, self.split, self.root, self.download)

    @cached_property
    def train(self) -> Images:
        return self.fitted(at_most(self.everything[0], self.labels))

    @cached_property
    def test(self) -> Images:
        return self.fitted(self.everything[1])

    @cached_property
    def z_train(self) -> Tensor:
        return self.encoded(self.train)

    @cached_property
    def z_test(self) -> Tensor:
        return self.encoded(self.test)

    @cached_property
    def source_probabilities(self) -> Tensor:
        """p(z | x) of the training images, by a probe on the source set's labels, never on the image itself."""
        if self.source is None:
            raise ValueError("`source` should name the data set whose classes LEEP and NCE translate, got None. Pass the pretraining set.")
        if self.source == self.data:
            return held_out_probabilities(self.z_train, self.train.labels)
        known = self.fitted(at_most(parts(self.source, "validation", self.root, self.download)[0], self.labels))
        return class_probabilities(self.encoded(known), known.labels, self.z_train)

    def fitted(self, images: Images) -> Images:
        return resize(images, self.encoder.image_size, self.encoder.channels)

    def encoded(self, images: Images, encoder: Encoder | None = None) -> Tensor:
        chosen = encoder or self.encoder
        device = next((leaf.device for leaf in tree.leaves(chosen.params)), None)
        return features(self._frozen if encoder is None else self._freeze(encoder), images.images, device=device)

    @cached_property
    def _frozen(self) -> Callable[[Tensor], Tensor]:
        return self._freeze(self.encoder)

    def _freeze(self, encoder: Encoder) -> Callable[[Tensor], Tensor]:
        seen = resize(at_most(self.everything[0], _STATISTICS_IMAGES), encoder.image_size, encoder.channels)
        return frozen(lambda x: encoder.encode(encoder.params, x), seen.images)

    def check(self, scores: Sequence[str]) -> None:
        """Raises ValueError where a score lacks something, or images of the data set for ``labels`` or ``neighbours``; encodes nothing."""
        unknown = [name for name in scores if name not in SCORES]
        if unknown:
            raise ValueError(f"`scores` should be some of {', '.join(SCORES)}; got {unknown[0]!r}.")
        if "cka" in scores and self.against is None:
            raise ValueError("`against` should be the encoder to compare with, got None. On the command line name its run: --against RUN.")
        if self.labels >= _PLENTY >= self.neighbours:
            return  # and the images are not read for this
        few, everything = at_most(self.everything[0], self.labels), self.everything[0]
        smallest = int(few.labels.unique(return_counts=True)[1].min())
        by_itself = [name for name in ("leep", "nce") if name in scores and self.source == self.data]
        probing = [*(["probe"] if "probe" in scores else []), *by_itself]
        if probing and smallest < 2:
            least = math.ceil(2 * len(everything) / int(everything.labels.unique(return_counts=True)[1].min()))
            raise ValueError(
                f"`labels` should give every class of {self.data} at least 2 training images, of which a probe holds one out; "
                f"{self.labels} give a class only {smallest}. Ask for {least} or more, or leave out {' and '.join(probing)}."
            )
        if "knn" in scores and self.neighbours > len(few):
            raise ValueError(
                f"`neighbours` should be at most the {len(few)} training images of {self.data} with labels, got {self.neighbours}. Take "
                "fewer, or more `labels` where there are more."
            )

    def curve(self) -> LabelCurve:
        """The probe's accuracy against the number of labels; empty where a class has too few for the smallest size."""
        if int(self.train.labels.unique(return_counts=True)[1].min()) < min(PER_CLASS):
            return LabelCurve([], [])
        return label_curve(self.z_train, self.train.labels, self.z_test, self.test.labels)

    def map(self, method: Literal["pca", "tsne"] = "pca") -> tuple[Tensor, Tensor]:
        """(points [N, 2], their labels) of at most 1,000 test images."""
        chosen = torch.arange(0, len(self.z_test), -(-len(self.z_test) // _MAP_POINTS))
        return flat_map(self.z_test[chosen], method), self.test.labels[chosen]


def assess(case: Case, scores: Sequence[Score] = ("probe", "knn", "monitors")) -> dict[str, float]:
    """The named scores, as numbers by name; accuracies are shares in [0, 1].

    ===========  ==================================================================================================
    score        numbers
    ===========  ==================================================================================================
    probe        ``probe``, ``probe_validation``
    knn          ``knn`` and, of 200 neighbours (or all training images where there are fewer), ``knn_200``
    monitors     ``rank_me``, ``dimension_std``, ``collapsed`` (0 or 1) of the test features
    few_shot     ``few_shot_1``, ``few_shot_5`` (5-way, 15 queries) and their intervals over 600 episodes, ``few_shot_1_95`` ...
    fine_tune    ``fine_tune_1``, ``fine_tune_10``: 1% and 10% of all labels, at least one of each class
    logme ...    the score of the training features
    cka          with the encoder ``case.against``, on the test images
    ===========  ==================================================================================================

    Cost: encoding the images, once; the probe, kNN and episodes take seconds, the label-based scores less, and fine-tuning two times
    200 steps of 64 images.

    Errors:
        ValueError: an unknown score; LEEP or NCE without ``source``, CKA without ``against``; a data set too small for a score.

    >>> case = Case(Encoder(lambda params, x: x.flatten(1) * params["scale"], {"scale": torch.ones(())}, 8, 1), "digits", labels=300)
    >>> sorted(assess(case, ["knn", "h_score"]))
    ['h_score', 'knn', 'knn_200']
    """
    case.check(scores)
    found: dict[str, float] = {}
    for name in scores:
        found |= _TABLE[name](case)
    return found


def _probe(case: Case) -> dict[str, float]:
    result = linear_probe(case.z_train, case.train.labels, case.z_test, case.test.labels)
    return {"probe": result.accuracy, "probe_validation": result.validation_accuracy}


def _knn(case: Case) -> dict[str, float]:
    def accuracy(k: int) -> float:
        return knn(case.z_train, case.train.labels, case.z_test, case.test.labels, k=k)

    return {"knn": accuracy(case.neighbours), "knn_200": accuracy(min(NEIGHBOURS, len(case.train)))}


def _monitors(case: Case) -> dict[str, float]:
    z = case.z_test
    return {"rank_me": float(rank_me(z)), "dimension_std": float(dimension_std(z)), "collapsed": float(is_collapsed(z))}


def _few_shot(case: Case) -> dict[str, float]:
    images = case.fitted(episode_images(case.data, case.split, _EPISODE_IMAGES, case.root, case.download))
    z = case.encoded(images)
    found: dict[str, float] = {}
    for shots in (1, 5):
        mean, half_width = few_shot(z, images.labels, shots=shots)
        found |= {f"few_shot_{shots}": mean, f"few_shot_{shots}_95": half_width}
    return found


def _fine_tune(case: Case) -> dict[str, float]:
    def accuracy(percent: int) -> float:
        few = case.fitted(share(case.everything[0], percent / 100))
        encoder = case.encoder
        return fine_tune(encoder.encode, encoder.params, few.images, few.labels, case.test.images, case.test.labels).accuracy

    return {f"fine_tune_{percent}": accuracy(percent) for percent in (1, 10)}


def _cka(case: Case) -> dict[str, float]:
    assert case.against is not None  # as checked
    theirs = resize(case.everything[1], case.against.image_size, case.against.channels)
    return {"cka": cka(case.z_test, case.encoded(theirs, case.against))}


_TABLE: dict[str, Callable[[Case], dict[str, float]]] = {
    "probe": _probe,
    "knn": _knn,
    "monitors": _monitors,
    "few_shot": _few_shot,
    "fine_tune": _fine_tune,
    "logme": lambda case: {"logme": logme(case.z_train, case.train.labels)},
    "h_score": lambda case: {"h_score": h_score(case.z_train, case.train.labels, shrinkage=len(case.train) <= case.z_train.shape[1])},
    "transrate": lambda case: {"transrate": transrate(case.z_train, case.train.labels)},
    "leep": lambda case: {"leep": leep(case.source_probabilities, case.train.labels)},
    "nce": lambda case: {"nce": nce(case.source_probabilities.argmax(1), case.train.labels)},
    "cka": _cka,
}
