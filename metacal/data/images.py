"""A labelled set of images in memory, and how to bring one to another encoder's input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision turn colour into grey
_CHUNK = 4096  # images resized at once: a set of 60,000 in float32 would take gigabytes


def to_float(images: Tensor) -> Tensor:
    """Images as floating point in [0, 1]: uint8 is divided by 255, floating point is passed through.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class Images:
    """A labelled set of images that fits in memory.

    Args:
        images: ``[N, C, H, W]``, uint8, or floating point in [0, 1].
        labels: ``[N]``, int64, in [0, num_classes).
        name: the data set's name.
        num_classes: how many classes the labels come from.

    Errors:
        ValueError: shapes, dtypes, pixels or labels are not of this form.

    >>> pair = Images(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), "blank", num_classes=2)
    >>> len(pair), pair.batch(torch.tensor([1])).shape
    (2, torch.Size([1, 1, 4, 4]))
    """

    images: Tensor
    labels: Tensor
    name: str
    num_classes: int

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"`images` should be [N, C, H, W], uint8 or floating point; got {tuple(images.shape)} of {images.dtype}. "
                "For grey images of shape [N, H, W] pass images.unsqueeze(1)."
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"`labels` should be int64 of shape [{len(images)}], one per image; got {tuple(labels.shape)} of {labels.dtype}. "
                "Convert with labels.long()."
            )
        if images.is_floating_point() and len(images):
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):  # written so that NaN fails too
                raise ValueError(
                    f"`images` of floating point should lie in [0, 1]; got values from {low:g} to {high:g}. "
                    "Divide by the largest possible value, or keep them as uint8."
                )
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(
                f"`labels` should lie in [0, {self.num_classes}), got values from {labels.min()} to {labels.max()}. "
                "Drop the unlabelled images, or set `num_classes`."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Images:
        """The images at ``indices``, in that order; the classes keep their numbers."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` as floating point in [0, 1], ``[B, C, H, W]``."""
        return to_float(self.images[indices])

    def to(self, device: torch.device | str) -> Images:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def resize(images: Images, size: int, channels: int) -> Images:
    """Brings a set to an encoder's input: bilinear to ``size`` x ``size``, and 1 <-> 3 channels.

    Shrinking averages over the pixels it drops (antialiased); colour turns grey by ITU-R BT.601; grey turns to colour by
    repetition. The dtype stays. Nothing is copied where nothing changes.

    Errors:
        ValueError: ``channels`` is not 1 or 3 and differs from what the images have.

    >>> small = Images(torch.rand(5, 1, 8, 8), torch.arange(5), "noise", num_classes=5)
    >>> resize(small, 28, channels=3).images.shape
    torch.Size([5, 3, 28, 28])
    """
    have = images.images.shape[1]
    if channels != have and {channels, have} != {1, 3}:
        raise ValueError(f"`channels` should be {have} as in the images, or 1 <-> 3; got {channels}. Convert the images yourself first.")
    if size < 1:
        raise ValueError(f"`size` should be at least 1 pixel, got {size}.")
    if tuple(images.images.shape[1:]) == (channels, size, size):
        return images
    chunks = [_resized(chunk, size, channels) for chunk in images.images.split(_CHUNK)]
    return replace(images, images=torch.cat(chunks))


def _resized(images: Tensor, size: int, channels: int) -> Tensor:
    x = to_float(images)
    if channels < x.shape[1]:
        x = torch.einsum("nchw,c->nhw", x, x.new_tensor(_LUMA)).unsqueeze(1)
    if x.shape[-2:] != (size, size):
        x = interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    if channels > x.shape[1]:
        x = x.expand(-1, channels, -1, -1)
    x = x.clamp(0, 1)  # rounding may leave [0, 1] by one ulp
    return (x * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else x
