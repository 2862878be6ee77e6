"""Functions that can be differentiated twice at zero, where the textbook's have no derivative. A NaN stays a NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def root(x: Tensor) -> Tensor:
    """The square root, with every derivative 0 at 0 instead of infinity (which a following 0 turns into NaN)."""
    return torch.where(x == 0, 0.0, nonzero(x).sqrt())


def nonzero(x: Tensor) -> Tensor:
    """A number to divide by: 1 in place of 0."""
    return torch.where(x == 0, 1.0, x)


def unit(z: Tensor) -> Tensor:
    """``z / |z|`` along the last axis, as ``z / sqrt(|z|^2 + 1e-12)``: zero, with finite derivatives, at zero."""
    x = wide(z)  # half precision squares neither 320 nor 1e-4, and rounds 1e-12 to 0
    return (x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()).to(z.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least: factorisations and statistics want more than half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
