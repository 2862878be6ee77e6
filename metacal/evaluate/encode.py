"""The features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metacal.data import to_float
from metacal.evaluate.freeze import frozen
from metacal.nets.fit import images_fit


def features(
    encode: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 512, *, device: torch.device | str | None = None
) -> Tensor:
    """Encodes images batch by batch, without gradients: ``[N, C, H, W]`` -> ``[N, d]`` on the CPU.

    uint8 images are divided by 255. An ``nn.Module`` runs in evaluation mode and gets each submodule's mode back afterwards. Neither the
    order of the images nor ``batch_size`` matters to an image's features: where BatchNorm takes the statistics of the batch, it is given
    those of ``images``, see :func:`metacal.evaluate.frozen`. To compare sets (training and test images), freeze on one of them first.

    Args:
        encode: an ``nn.Module``, or any function of a floating-point batch, that returns ``[B, d]``.
        images: uint8, or floating point in [0, 1].
        batch_size: images encoded at once.
        device: where each batch is moved before it is encoded; by default it stays where ``images`` is.

    Errors:
        ValueError: no images, images of other channels or sizes than ``encode`` takes, or an encoder that returns anything but ``[B, d]``.

    >>> features(torch.nn.Flatten(), torch.zeros(5, 1, 8, 8), batch_size=2).shape
    torch.Size([5, 64])
    """
    if not len(images):
        raise ValueError(f"`images` should not be empty, got {tuple(images.shape)}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be at least 1, got {batch_size}.")
    encode = frozen(encode, images)
    encoded = []
    for batch in images.split(batch_size):
        batch = batch.to(device) if device is not None else batch
        with images_fit(batch):
            z = encode(to_float(batch))
        if z.ndim != 2 or len(z) != len(batch):
            raise ValueError(f"`encode` should return [{len(batch)}, d], got {tuple(z.shape)}. Pool or flatten the maps in it.")
        encoded.append(z.cpu())
    return torch.cat(encoded)
