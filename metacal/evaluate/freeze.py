"""An encoder as a function of each image alone: BatchNorm by statistics estimated once, whoever shares the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metacal._safe import wide
from metacal.data import to_float
from metacal.nets.fit import images_fit

_MOST = 4096  # images that statistics are estimated on
_BATCH = 256  # of those at once

_Statistics = list[tuple[Tensor, Tensor]]  # (mean, variance) [C] of each BatchNorm, in the order in which a pass comes to them


def frozen(encode: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """The encoder in evaluation mode and without gradients, every BatchNorm that takes the batch's statistics fixed to those of ``images``.

    They are torch's own, cumulative (``momentum=None``): the mean over batches of a batch's mean and unbiased variance, where earlier
    layers normalise by the batch. At most 4,096 images are read, in batches of at most 256, chosen by a hash of their pixels, which
    shuffles and which no order of storing changes. Pass *training* images of the data that is judged; no label is read. BatchNorm with
    running statistics keeps those.

    Cost: one pass over these images, where the first one is encoded; none if no BatchNorm takes the batch's statistics.

    Errors:
        ValueError: fewer than 2 images to estimate statistics of, where there are statistics to estimate.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 2; of the data at hand, Li et al. 2016 (arXiv 1603.04779).

    >>> net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False))
    >>> train, test = torch.rand(50, 1, 2, 2), torch.rand(9, 1, 2, 2)
    >>> encode = frozen(net, train)
    >>> torch.allclose(encode(test)[:1], encode(test[:1]))
    True
    """
    statistics: _Statistics = []

    def encoded(x: Tensor) -> Tensor:
        with torch.no_grad(), _evaluation_mode(encode):
            try:
                with _BatchNorms(_by(statistics)):
                    return encode(x)
            except _NoStatisticsError:
                statistics[:] = _estimated(encode, images, like=x)
            with _BatchNorms(_by(statistics)):
                return encode(x)

    return encoded


class _NoStatisticsError(Exception):
    """A pass came to a BatchNorm whose statistics are not known yet."""


_Normalise = Callable[[Tensor, "Tensor | None", "Tensor | None", float], Tensor]  # (x, weight, bias, eps) -> x normalised


class _BatchNorms(TorchFunctionMode):
    """Normalises by ``normalise`` wherever a network would normalise by the statistics of its batch."""

    def __init__(self, normalise: _Normalise) -> None:
        super().__init__()
        self.normalise = normalise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.batch_norm or not kwargs["training"]:
            return func(*args, **(kwargs or {}))
        return self.normalise(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"])


# torch.batch_norm and not nn.functional's, so that no _BatchNorms around an encoder that is frozen already takes these for its own.


def _by(statistics: _Statistics) -> _Normalise:
    left = iter(statistics)

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        mean, variance = next(left, (None, None))
        if mean is None or variance is None:
            raise _NoStatisticsError
        return torch.batch_norm(x, weight, bias, mean.to(x), variance.to(x), False, 0.0, eps, torch.backends.cudnn.enabled)

    return normalise


def _recorded(statistics: _Statistics) -> _Normalise:
    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        variance, mean = torch.var_mean(wide(x), [axis for axis in range(x.ndim) if axis != 1])
        statistics.append((mean, variance))
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)

    return normalise


def _estimated(encode: Callable[[Tensor], Tensor], images: Tensor, like: Tensor) -> _Statistics:
    if len(images) < 2:
        raise ValueError(
            f"`images` should be at least 2 to estimate the statistics of BatchNorm, got {len(images)}. Freeze the encoder on training "
            "images first: encode = metacal.evaluate.frozen(encode, train.images)."
        )
    chosen = _shuffled(images)[:_MOST]
    batches = chosen.tensor_split(math.ceil(len(chosen) / _BATCH))
    passes: list[_Statistics] = []
    for rows in batches:
        batch = images[rows.to(images.device)].to(like.device)
        found: _Statistics = []
        with images_fit(batch), _BatchNorms(_recorded(found)):
            encode(to_float(batch).to(like.dtype))
        passes.append(found)
    return [
        (torch.stack([mean for mean, _ in layer]).mean(0), torch.stack([variance for _, variance in layer]).mean(0))
        for layer in zip(*passes, strict=True)
    ]


def _shuffled(images: Tensor) -> Tensor:
    """The rows in an order that depends on what the images are, and not on where they stand."""
    pixels = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    keys = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


@contextmanager
def _evaluation_mode(encode: Callable[[Tensor], Tensor]) -> Iterator[None]:
    modes = [(module, module.training) for module in encode.modules()] if isinstance(encode, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
