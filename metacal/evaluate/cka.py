"""CKA: how alike two encoders see the same images."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from metacal.evaluate._inputs import matrix, scaled, warn_if_collapsed


def cka(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Linear centred kernel alignment ``|A^T B|_F^2 / (|A^T A|_F |B^T B|_F)`` of two encoders' features of the same images, in [0, 1].

    Columns are centred first. Invariant under rotations and under one scale for all features, not under other linear maps. With no
    more rows than dimensions it is biased upwards: take many more. Cost: N d_a d_b; the N x N kernels are never formed.

    Args:
        a: ``[N, d_a]``.
        b: ``[N, d_b]``, of the same images in the same order.

    Returns NaN, with a warning, where one of them is the same for all images.

    Errors:
        ValueError: numbers of rows that differ, or NaN features.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 5 and section 3.

    >>> import torch
    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> round(cka(x, 2 * x[:, [2, 0, 1]] + 1), 6)
    1.0
    """
    A, B = matrix("a", a), matrix("b", b)
    if len(A) != len(B):
        raise ValueError(f"`a` and `b` should have one row per image, the same images; got {len(A)} and {len(B)} rows. Encode one set.")
    undefined = "so CKA is not defined"
    if warn_if_collapsed(A, "a", undefined) or warn_if_collapsed(B, "b", undefined):
        return math.nan
    A, B = scaled(A.double()), scaled(B.to(A.device).double())
    A, B = A - A.mean(0), B - B.mean(0)
    return ((A.T @ B).square().sum() / ((A.T @ A).norm() * (B.T @ B).norm())).item()
