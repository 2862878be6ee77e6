"""Cosines that can be differentiated twice, at zero vectors too."""

from __future__ import annotations

import torch
from torch import Tensor

from metacal._safe import unit
from metacal.objectives._pairs import mean_over_pairs


def cross_view_cosine(x: Tensor, y: Tensor) -> Tensor:
    """The mean over samples and ordered pairs of views a != b of cos(x[:, a], y[:, b]); x and y are [n, m, d]."""
    return mean_over_pairs(torch.einsum("iad,ibd->ab", unit(x), unit(y)) / x.shape[0])
