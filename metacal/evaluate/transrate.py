"""TransRate: how many more bits the features take than the features of one class do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metacal.evaluate._inputs import scored


def transrate(features: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, eps: float = 1e-4) -> float:
    """Coding rate of the centred features less the mean over classes of their own: an estimate of the mutual information, in nats.

    ``R(Z) = 1/2 log det(I + Z^T Z / (n eps))``, n the rows of Z. Classes weigh equally, as in the paper's listing, whatever their
    sizes. It grows with the features' scale: compare encoders on features brought to one. Cost: C + 1 sets of singular values.

    Errors:
        ValueError: ``eps`` is not positive; and as :func:`metacal.evaluate.linear_probe` for features and labels.

    Source: Huang et al. 2022 (arXiv 2106.09362), section 4 and its listing.

    >>> y = torch.arange(100) % 4
    >>> x = torch.eye(4)[y] + 0.1 * torch.randn(100, 4)
    >>> transrate(x, y) > transrate(x, y.roll(1) // 2) > transrate(x, torch.arange(100) // 25)
    True
    """
    if not eps > 0:
        raise ValueError(f"`eps` should be positive, got {eps}. The paper's is 1e-4.")
    Z, y = scored(features, labels)
    Z = Z - Z.mean(0)
    per_class = torch.stack([_rate(Z[y == label], eps) for label in range(int(y.max()) + 1)])
    return (_rate(Z, eps) - per_class.mean()).item()


def _rate(Z: Tensor, eps: float) -> Tensor:
    return (torch.linalg.svdvals(Z).square() / (len(Z) * eps)).log1p().sum() / 2
