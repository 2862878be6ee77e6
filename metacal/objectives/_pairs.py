"""Means over pairs of views, and the diagonals that they leave out."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_diagonal(c: Tensor, value: float) -> Tensor:
    """``c`` [..., r, r] with ``value`` on its diagonals, whose derivative is zero."""
    # A mask of fixed shape: picking the off-diagonal entries by a boolean index does not work under vmap.
    return c.masked_fill(torch.eye(c.shape[-1], dtype=torch.bool, device=c.device), value)


def mean_over_pairs(c: Tensor) -> Tensor:
    """The mean of c[a, b] over all ordered pairs of different views: c is [m, m], the result 0-dim."""
    m = c.shape[0]
    return fill_diagonal(c, 0.0).sum() / (m * (m - 1))
