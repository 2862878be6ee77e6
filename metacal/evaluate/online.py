"""Scores while an encoder trains: cheap enough to follow, too small to report."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from metacal._typing import Tree
from metacal.data import Images, split_validation
from metacal.evaluate.encode import features
from metacal.evaluate.freeze import frozen
from metacal.evaluate.knn import knn
from metacal.evaluate.monitors import dimension_std, rank_me
from metacal.evaluate.probe import linear_probe
from metacal.tc2 import MethodState, Problem


def online(problem: Problem, state: MethodState, images: Images, *, neighbours: int = 20) -> dict[str, Tensor]:
    """Probe, neighbours and monitors of the encoder at ``state``, as 0-dim tensors to log.

    Half of ``images`` (stratified, the same half every time) teaches, the other is judged: ``online_probe`` (one L2 strength, 0.01),
    ``online_knn``, ``rank_me`` and ``dimension_std``. Uncalibrated representations, as downstream users get them; neither the state nor
    torch's generators change, so that a run goes on as it would have. A collapsed encoder gives the accuracy of guessing and shows in
    ``dimension_std``. Cost: one forward pass of the images and two small logistic regressions (1,000 images x 64: half a second).

    Args:
        images: labelled, at the encoder's own size and channels, not trained on; about 1,000.
        neighbours: k, at most half the images.

    Errors:
        ValueError: as :func:`check_online`; images of other channels than the encoder takes.

    >>> from metacal import nets, objectives, optim, tc2
    >>> net = tc2.network(nets.ConvEncoder(width=8, dim=8), objectives.SimCLR(), dim=8, d=8)
    >>> problem = Problem(net, objectives.SimCLR())
    >>> images = Images(torch.rand(40, 1, 8, 8), torch.arange(40) % 2, "noise", num_classes=2)
    >>> sorted(online(problem, tc2.base(problem, optim.adam(1e-3)).init(), images, neighbours=5))
    ['dimension_std', 'online_knn', 'online_probe', 'rank_me']
    """
    check_online(images, neighbours)
    learn, judge = _halves(images)
    theta: Tree = state.theta
    encode = frozen(lambda x: problem.network.encode(theta, x), learn.images)
    z, z_judge = (features(encode, part.images) for part in (learn, judge))
    if not (z.isfinite().all() and z_judge.isfinite().all()):  # the loop's owner decides, by the NaN in its log
        nan = torch.tensor(torch.nan)
        return {"online_probe": nan, "online_knn": nan, "rank_me": nan, "dimension_std": nan}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`train` has collapsed", RuntimeWarning)  # what dimension_std is here to show
        probe = linear_probe(z, learn.labels, z_judge, judge.labels, strengths=(1e-2,))
        nearest = knn(z, learn.labels, z_judge, judge.labels, k=neighbours)
    return {
        "online_probe": torch.tensor(probe.accuracy),
        "online_knn": torch.tensor(nearest),
        "rank_me": rank_me(z_judge),
        "dimension_std": dimension_std(z_judge),
    }


def check_online(images: Images, neighbours: int = 20) -> None:
    """Raises ValueError where :func:`online` has too few images, or a class one alone: to be told before training."""
    numbers = images.labels.unique(return_counts=True)[1]
    if not len(numbers) or numbers.min() < 2 or len(_halves(images)[0]) < neighbours:
        raise ValueError(
            f"`images` watched while training (setting evaluate.online) should be 2 of every class or more, and half of them at least "
            f"{neighbours} for as many neighbours; got {len(images)} of {len(numbers)} classes. Ask for "
            f"{max(4 * len(numbers), 3 * neighbours)} or more, or for none."
        )


def _halves(images: Images) -> tuple[Images, Images]:
    """(to learn from, to judge on)"""
    return split_validation(images, 0.5, seed=0)
