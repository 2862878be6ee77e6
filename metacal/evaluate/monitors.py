"""Collapse monitors: how much of the space a batch of representations fills.

Cheap enough for every few hundred steps. NaN or inf in the features gives NaN, so that a log shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from metacal.evaluate._inputs import scaled


def rank_me(z: Tensor) -> Tensor:
    """RankMe: the exponential of the entropy of the normalised singular values, from 1 (one direction) to min(N, d); 0-dim.

    Not centred, as in the paper; its epsilon of 1e-7 is left out, since 0 log 0 = 0. Take N well above d. Cost: one SVD of ``[N, d]``.

    Source: Garrido et al. 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised representations by
    their rank", equation 1.

    >>> rank_me(torch.eye(4))
    tensor(4.)
    """
    z = _matrix(z)
    if not torch.isfinite(z).all():  # LAPACK would raise
        return z.new_full((), torch.nan)
    singular = torch.linalg.svdvals(z)
    share = singular / singular.sum().clamp_min(torch.finfo(z.dtype).tiny)
    return torch.special.entr(share).sum().exp()


def dimension_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of the normalised rows, times sqrt(d): 1 where spread evenly, 0 collapsed; 0-dim.

    Source: Chen & He 2021, "Exploring simple siamese representation learning", section 4.1; the factor sqrt(d), which makes
    widths comparable, is ours.

    >>> dimension_std(torch.ones(8, 3))
    tensor(0.)
    """
    z = normalize(_matrix(z), dim=1)
    return z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


def uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 ||z_i - z_j||^2) over all pairs of normalised rows: 0 collapsed, about -4 spread evenly; 0-dim.

    Source: Wang & Isola 2020, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", L_uniform with t = 2. Cost: N^2 / 2 distances.

    >>> uniformity(torch.ones(8, 3))
    tensor(0.)
    """
    return torch.nn.functional.pdist(normalize(_matrix(z), dim=1)).square().mul(-2).exp().mean().log()


def is_collapsed(z: Tensor, *, min_std: float = 0.03, min_rank: float = 1.5) -> bool:
    """Whether all rows point the same way (``dimension_std`` < min_std), or vary along one direction only (``rank_me`` < min_rank).

    The rank is that of the centred rows, so that a large common mean does not count. 0.03 is reached where the mean cosine similarity
    of two rows is about 0.999. Thresholds are our choice: encoders with a large common mean that work well were seen at 0.1.
    NaN counts as collapsed.

    >>> is_collapsed(torch.randn(100, 8)), is_collapsed(torch.ones(100, 8))
    (False, True)
    """
    z = _matrix(z)
    spread, rank = dimension_std(z), rank_me(z - z.mean(dim=0))
    return not (bool(spread >= min_std) and bool(rank >= min(min_rank, z.shape[1])))


def _matrix(z: Tensor) -> Tensor:
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"`z` should be [N, d] with N >= 2, got {tuple(z.shape)}. Flatten tasks and views first: z.flatten(0, -2).")
    return scaled(z.detach())
