"""Cosines that can be differentiated twice, at zero vectors too."""

from __future__ import annotations

import torch
from torch import Tensor

from metacal.objectives._pairs import mean_over_pairs


def unit(z: Tensor) -> Tensor:
    """``z / |z|`` along the last axis, as ``z / sqrt(|z|^2 + 1e-12)``: zero, with finite derivatives, at zero."""
    return z * (z.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def cross_view_cosine(x: Tensor, y: Tensor) -> Tensor:
    """The mean over samples and ordered pairs of views a != b of cos(x[:, a], y[:, b]); x and y are [n, m, d]."""
    return mean_over_pairs(torch.einsum("iad,ibd->ab", unit(x), unit(y)) / x.shape[0])
