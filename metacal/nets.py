"""Small networks that stay pure functions under torch.func: no dropout, no running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

_CHANNELS_PER_GROUP = 8  # > 1, so that GroupNorm leaves something of the 1 x 1 maps that 8 x 8 images end in


class ConvEncoder(nn.Module):
    """Three 3 x 3 convolutions with GroupNorm, global average pooling, a linear layer: [..., C, H, W] -> [..., dim].

    The channels are width, 2 width, 2 width, the strides 2, 2, 2: 8 x 8 images end in 1 x 1 maps, 28 x 28 and 32 x 32 in
    4 x 4. At width 32 a 28 x 28 image costs 1.6 M multiplications forward. Every leading axis is a batch axis, and no image
    sees another: the same function alone, in a batch and under ``torch.func`` transforms, with double backward and
    forward-mode derivatives.

    Args:
        in_channels: C.
        width: channels of the first layer, a multiple of 8.
        dim: entries of the representation; also the attribute ``dim``.
        stem_stride: the first stride; 1 keeps four times as many positions, for small images, at about four times the cost.

    Errors:
        ValueError: a width that is not a positive multiple of 8.

    >>> import torch
    >>> from metacal import nets
    >>> encoder = nets.ConvEncoder(in_channels=1, width=8, dim=16)
    >>> encoder(torch.zeros(4, 2, 1, 28, 28)).shape  # 4 samples, 2 views
    torch.Size([4, 2, 16])
    """

    def __init__(self, in_channels: int = 1, width: int = 32, dim: int = 64, *, stem_stride: int = 2) -> None:
        super().__init__()
        if width < 1 or width % _CHANNELS_PER_GROUP:
            raise ValueError(f"`width` should be a positive multiple of {_CHANNELS_PER_GROUP} (GroupNorm's groups), got {width}.")
        self.dim = dim
        self.body = nn.Sequential(
            *_block(in_channels, width, stem_stride),
            *_block(width, 2 * width, 2),
            *_block(2 * width, 2 * width, 2),
        )
        self.head = nn.Linear(2 * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x.reshape(-1, *x.shape[-3:]))  # [b, 2 width, h, w]
        return self.head(maps.mean((-2, -1))).reshape(*x.shape[:-3], self.dim)


def _block(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.GroupNorm(out_channels // _CHANNELS_PER_GROUP, out_channels),
        nn.ReLU(),
    )


class MLP(nn.Module):
    """Linear layers with ReLU between them, for projectors and predictors: [..., sizes[0]] -> [..., sizes[-1]].

    Each hidden layer is linear, norm, ReLU; the last one is linear. Every leading axis is a batch axis.

    Args:
        sizes: entries of the input, of each hidden layer and of the output; two sizes are one linear layer.
        norm: after each hidden linear layer: nothing, LayerNorm, or BatchNorm with batch statistics only, in ``eval()`` too
            (there are no running ones, so nothing is written and ``vmap`` works). ``"batch"`` takes them over all leading
            axes together, views included; under ``vmap`` over tasks each task has its own.

    Errors:
        ValueError: fewer than two sizes, or one below 1; another word for norm.

    >>> import torch
    >>> from metacal import nets
    >>> projector = nets.MLP([64, 128, 32], norm="batch")
    >>> projector(torch.zeros(4, 2, 64)).shape
    torch.Size([4, 2, 32])
    """

    def __init__(self, sizes: Sequence[int], norm: Literal["layer", "batch"] | None = None) -> None:
        super().__init__()
        sizes = tuple(sizes)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"`sizes` should hold at least an input and an output size, all >= 1, got {sizes}.")
        if norm not in (None, "layer", "batch"):
            raise ValueError(f'`norm` should be None, "layer" or "batch", got {norm!r}.')
        self.dim = sizes[-1]
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes[:-1]):
            layers.append(nn.Linear(size, next_size, bias=norm != "batch"))  # BatchNorm would subtract the bias
            if norm == "layer":
                layers.append(nn.LayerNorm(next_size))
            elif norm == "batch":
                layers.append(nn.BatchNorm1d(next_size, track_running_stats=False))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.dim)
