"""LogME: how probable a Bayesian linear model on the features finds the labels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metacal.evaluate._inputs import scored

_GRID, _REFINEMENTS = torch.linspace(-14, 14, 57, dtype=torch.float64) * math.log(10), 60
_GOLDEN = (math.sqrt(5) - 1) / 2


def logme(features: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Log maximum evidence per row, averaged over the classes' indicators; larger promises better transfer.

    For the indicator y of a class the model is ``w ~ N(0, I / alpha)``, ``y ~ N(F w, I / beta)``. Its evidence, maximised over both
    precisions, depends on F = U S V^T through ``t = alpha / beta`` alone: with ``z = U^T y`` and ``q(t) = sum_i t z_i^2 / (t + s_i^2)
    + |y - U z|^2``, the best beta is ``N / q(t)``, and what is left is a function of one number,

        ``log p(y) = -N/2 [log(2 pi q(t) / N) + 1] - 1/2 sum_i log(1 + s_i^2 / t)``,

    searched on a grid over 28 decades and then by golden section. (The papers iterate MacKay's update, which has the same
    stationary points; it may stop at a local one, and is slow where the features say little.) Neither centred nor scaled; no intercept.

    Cost: one SVD of ``[N, d]`` and 120 sums of ``[min(N, d), C]``; no training. +inf where all labels are linear in the features:
    the evidence then has no maximum.

    Errors:
        ValueError: as :func:`metacal.evaluate.linear_probe` for features and labels.

    Source: You et al. 2021 (arXiv 2102.11005), equations 2 to 4.

    >>> x = torch.randn(100, 4)
    >>> logme(x, (x[:, 0] > 0).long()) > logme(x, torch.arange(100) % 2)
    True
    """
    F, labels = scored(features, labels)
    y = one_hot(labels).to(F)  # [N, C]
    N = len(F)
    U, s, _ = torch.linalg.svd(F, full_matrices=False)
    keep = s > s.max() * max(F.shape) * torch.finfo(F.dtype).eps
    U, s2 = U[:, keep], s[keep].square()[:, None]
    z2 = (U.T @ y).square()  # [rank, C]
    outside = (y - U @ (U.T @ y)).square().sum(0)  # [C]
    if len(s2) < N and (outside <= 1e-20 * N).all():
        return math.inf

    def evidence(log_t: Tensor) -> Tensor:
        """[C] -> [C], of N rows."""
        t = log_t.exp()
        q = (t * z2 / (t + s2)).sum(0) + outside
        return -N / 2 * ((2 * math.pi * q / N).log() + 1) - (s2 / t).log1p().sum(0) / 2

    scale = s2.max().log() if len(s2) else F.new_zeros(())
    log_t = (_GRID.to(F) + scale)[:, None].expand(-1, y.shape[1])
    best = torch.stack([evidence(row) for row in log_t]).argmax(0, keepdim=True)
    low, high = (log_t.gather(0, (best + step).clamp(0, len(log_t) - 1))[0] for step in (-1, 1))
    for _ in range(_REFINEMENTS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        rising = evidence(left) < evidence(right)
        low, high = torch.where(rising, left, low), torch.where(rising, high, right)
    return (evidence((low + high) / 2) / N).mean().item()
