"""Random views of images: every sample draws its own transformation, on the batch's device (kornia)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Augmentation:
    """A distribution of image transformations, applied in the order of the fields; each default leaves the image as it is.

    Args:
        crop: smallest and largest share of the area that a random resized crop keeps (aspect ratio 3/4 to 4/3); (1, 1) is no crop.
        degrees: rotation drawn from [-degrees, degrees].
        translate: shift in each direction, at most this share of the side; what comes into view is black.
        zoom: smallest and largest factor of the drawn scale.
        flip: probability of a horizontal flip. Not for digits and letters.
        brightness: multiplies by a factor from [1 - brightness, 1 + brightness]; as in torchvision's ColorJitter.
        contrast: the same for the distance from the mean grey.
        saturation: the same for the distance from grey; colour only.
        hue: rotation of the hue, at most this share of the circle, up to 0.5; colour only.
        jitter: probability that a sample's brightness, contrast, saturation and hue change.
        grayscale: probability that a sample loses its colour; colour only.
        blur: probability of a Gaussian blur, 3 x 3, standard deviation 0.1 to 1 pixels.

    Errors:
        ValueError: a probability outside [0, 1] or a range that is not one.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    degrees: float = 0.0
    translate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        highest = {"degrees": 180.0, "hue": 0.5}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("crop", "zoom"):
                low, high = value
                limit = 1.0 if field.name == "crop" else float("inf")
                if not 0 < low <= high <= limit:
                    raise ValueError(f"`{field.name}` should be (low, high) with 0 < low <= high <= {limit:g}, got {value}.")
            elif not 0 <= value <= highest.get(field.name, 1.0):
                raise ValueError(f"`{field.name}` should lie in [0, {highest.get(field.name, 1.0):g}], got {value}.")


_DRAWN = Augmentation(crop=(0.5, 1.0), degrees=15, translate=0.1, zoom=(0.8, 1.1), brightness=0.4, contrast=0.4)
# The colour transformations of SimCLR at strength 0.5, as published code uses on CIFAR.
_CIFAR = Augmentation(crop=(0.2, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grayscale=0.2)

AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "digits": Augmentation(crop=(0.5, 1.0), degrees=10, translate=0.1, zoom=(0.9, 1.1), brightness=0.4, contrast=0.4),
        "mnist": _DRAWN,
        "fashion_mnist": Augmentation(crop=(0.4, 1.0), degrees=10, translate=0.05, flip=0.5, brightness=0.4, contrast=0.4, blur=0.2),
        "omniglot": _DRAWN,
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
    }
)
"""What each data set is augmented with by default (our choice; the CIFAR rows follow SimCLR's published code)."""


def families(channels: int) -> tuple[Augmentation, ...]:
    """Four augmentations of one kind each, for tasks that differ in what they are invariant to: place, pose, light, sharpness.

    Crops; rotation, shift and zoom; brightness and contrast, with 3 channels also saturation, hue and loss of colour; flips and blur.

    >>> [[name for name, value in vars(family).items() if value != getattr(Augmentation(), name)] for family in families(channels=1)]
    [['crop'], ['degrees', 'translate', 'zoom'], ['brightness', 'contrast', 'jitter'], ['flip', 'blur']]
    """
    light = Augmentation(brightness=0.6, contrast=0.6, jitter=1.0)
    return (
        Augmentation(crop=(0.3, 1.0)),
        Augmentation(degrees=30, translate=0.15, zoom=(0.7, 1.3)),
        replace(light, saturation=0.6, hue=0.15, grayscale=0.2) if channels == 3 else light,
        Augmentation(flip=0.5, blur=0.8),
    )


def augmenter(augmentation: str | Augmentation, image_size: int, channels: int) -> Callable[[Tensor], Tensor]:
    """Builds ``augment(x)`` for floating point ``x`` of ``[B, channels, image_size, image_size]`` in [0, 1]; same shape and range out.

    Every sample draws for itself, from torch's default generators only (the order of brightness, contrast, saturation and hue is
    drawn once per batch). Call it on plain batches, outside ``torch.func.vmap``: flatten tasks and views into the batch first.

    Cost on one CPU core, for 1,024 images with the defaults: digits 12 ms, 28 x 28 grey 70 ms, 32 x 32 colour 250 ms.

    Args:
        augmentation: an :class:`Augmentation`, or the name of a data set for its default in :data:`AUGMENTATIONS`.
        image_size: side of the square images, in pixels.
        channels: 1 or 3.

    Errors:
        ValueError: an unknown name, colour transformations for grey images, or a batch of another shape or dtype.

    >>> augment = augmenter("digits", image_size=8, channels=1)
    >>> augment(torch.rand(4, 1, 8, 8)).shape
    torch.Size([4, 1, 8, 8])
    """
    if isinstance(augmentation, str):
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"`augmentation` should be an Augmentation or one of {', '.join(AUGMENTATIONS)}; got {augmentation!r}.")
        augmentation = AUGMENTATIONS[augmentation]
    if channels not in (1, 3):
        raise ValueError(f"`channels` should be 1 or 3, got {channels}. Convert the images with metacal.data.resize.")
    coloured = [name for name in ("saturation", "hue", "grayscale") if getattr(augmentation, name)]
    if channels == 1 and coloured:
        raise ValueError(f"`augmentation` should leave colour alone for grey images; set {', '.join(coloured)} to 0.")
    transforms = _transforms(augmentation, image_size, channels)
    shape = (channels, image_size, image_size)

    def augment(x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != shape or not x.is_floating_point():
            raise ValueError(
                f"`x` should be floating point of shape [B, {channels}, {image_size}, {image_size}], got {tuple(x.shape)} of {x.dtype}. "
                "Convert with metacal.data.to_float, and sizes with metacal.data.resize."
            )
        return transforms(x).clamp(0, 1)  # interpolation may leave [0, 1] by rounding

    return augment


def _transforms(a: Augmentation, size: int, channels: int) -> nn.Module:
    import kornia.augmentation as K

    chosen: list[nn.Module] = []
    if a.crop != (1.0, 1.0):  # "slice", kornia's other mode, loops over the samples
        chosen.append(K.RandomResizedCrop((size, size), scale=a.crop, cropping_mode="resample"))
    if a.degrees or a.translate or a.zoom != (1.0, 1.0):
        chosen.append(K.RandomAffine(a.degrees, translate=(a.translate, a.translate), scale=a.zoom, p=1.0))
    if a.flip:
        chosen.append(K.RandomHorizontalFlip(p=a.flip))
    if channels == 1 and (a.brightness or a.contrast):
        chosen.append(_GreyJitter(a.brightness, a.contrast, a.jitter))
    elif a.brightness or a.contrast or a.saturation or a.hue:
        chosen.append(K.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue, p=a.jitter))
    if a.grayscale:
        chosen.append(K.RandomGrayscale(p=a.grayscale))
    if a.blur:
        chosen.append(K.RandomGaussianBlur((3, 3), (0.1, 1.0), p=a.blur))
    return nn.Sequential(*chosen)


class _GreyJitter(nn.Module):
    """Brightness, then contrast. kornia's (before 0.9) takes a grey image's mean over the whole batch: samples would mix."""

    def __init__(self, brightness: float, contrast: float, probability: float) -> None:
        super().__init__()
        self.brightness, self.contrast, self.probability = brightness, contrast, probability

    def forward(self, x: Tensor) -> Tensor:
        chosen, bright, sharp = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
        chosen = (chosen < self.probability).to(x.dtype)
        brightness = 1 + chosen * self.brightness * (2 * bright - 1)
        contrast = 1 + chosen * self.contrast * (2 * sharp - 1)
        x = (x * brightness).clamp(0, 1)
        mean = x.mean((1, 2, 3), keepdim=True)
        return (mean + contrast * (x - mean)).clamp(0, 1)


def views(x: Tensor, augment: Callable[[Tensor], Tensor], num_views: int) -> Tensor:
    """``num_views`` independent random views of every image: ``[B, C, H, W]`` -> ``[B, num_views, C, H, W]``, augmented in one call.

    Errors:
        ValueError: ``num_views`` is below 1.

    >>> views(torch.rand(4, 1, 8, 8), augmenter("digits", 8, 1), num_views=2).shape
    torch.Size([4, 2, 1, 8, 8])
    """
    if num_views < 1:
        raise ValueError(f"`num_views` should be at least 1, got {num_views}.")
    return augment(x.repeat_interleave(num_views, dim=0)).unflatten(0, (len(x), num_views))
