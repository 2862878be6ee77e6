"""H-score: how much of the features' variation, whitened, lies between the classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metacal.evaluate._inputs import scored


def h_score(features: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, shrinkage: bool = False) -> float:
    """``tr(cov(f)^-1 cov(E[f | y]))``: the sum of squared canonical correlations between features and classes, at most C - 1.

    With ``shrinkage`` the first covariance is Ledoit and Wolf's ``(1 - a) cov + a tr(cov) / d I`` and the second is scaled by 1 - a,
    as Ibrahim et al. propose for few rows of wide features. Directions without variation are left out. Invariant (without
    shrinkage) under invertible linear maps of the features. Cost: one eigendecomposition of ``[d, d]``.

    Errors:
        ValueError: without ``shrinkage``, no more rows than d: every labelling then has the full score; and as
            :func:`metacal.evaluate.linear_probe` for features and labels.

    Source: Bao et al. 2019 (ICIP), definition 2; with shrinkage Ibrahim et al. 2022 (arXiv 2110.06893).

    >>> y = torch.arange(60) % 3
    >>> round(h_score(torch.eye(3)[y] + 0.01 * torch.randn(60, 3), y), 1)
    2.0
    """
    F, labels = scored(features, labels)
    N, d = F.shape
    if not shrinkage and d >= N:
        raise ValueError(
            f"`features` should have more rows than their {d} dimensions, got {N}: with fewer, any labels get the full score. Pass more "
            "rows, or shrinkage=True."
        )
    F = F - F.mean(0)
    counts = labels.bincount().to(F)
    means = torch.zeros(len(counts), d, dtype=F.dtype, device=F.device).index_add_(0, labels, F) / counts[:, None]  # E[f | y], [C, d]
    between = (means * (counts / N)[:, None]).T @ means
    if not shrinkage:
        return _trace(F.T @ F / N, between)
    from sklearn.covariance import ledoit_wolf

    covariance, a = ledoit_wolf(F.numpy(force=True), assume_centered=True)
    return _trace(torch.from_numpy(covariance).to(F), (1 - a) * between)


def _trace(covariance: Tensor, between: Tensor) -> float:
    return (torch.linalg.pinv(covariance, hermitian=True, rtol=1e-12) @ between).trace().item()
