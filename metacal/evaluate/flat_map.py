"""A representation on a plane, to look at."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metacal.evaluate._inputs import matrix, warn_if_collapsed


def flat_map(features: Tensor | np.ndarray, method: Literal["pca", "tsne"] = "pca", *, seed: int = 0) -> Tensor:
    """Features ``[N, d]`` as points ``[N, 2]`` in float64.

    ``"pca"`` projects on the two directions of most variance (a straight picture: distances shrink, none grows). ``"tsne"`` is
    scikit-learn's, started at PCA, perplexity 30 or N / 4 where that is less: it keeps neighbours and nothing else; sizes of and gaps
    between its clusters mean little. Features that are all equal make one point at 0, with a RuntimeWarning. Cost: one SVD, or about 10 s
    for 2,000 points.

    Errors:
        ValueError: fewer than 4 rows or 2 dimensions, NaN features, an unknown ``method``.

    >>> flat_map(torch.randn(10, 5)).shape
    torch.Size([10, 2])
    """
    x = matrix("features", features)
    if method not in ("pca", "tsne"):
        raise ValueError(f"`method` should be 'pca' or 'tsne', got {method!r}.")
    if len(x) < 4 or x.shape[1] < 2:
        raise ValueError(f"`features` should have at least 4 rows and 2 dimensions to be drawn, got {tuple(x.shape)}.")
    if warn_if_collapsed(x, "features", "so the map is one point"):
        return torch.zeros(len(x), 2, dtype=torch.float64)
    x = x.double()
    if method == "tsne":
        from sklearn.manifold import TSNE

        # It computes in float32, and a NaN ends the process: keep squares of distances within its range.
        x = x / x.abs().max()
        drawn = TSNE(perplexity=min(30, len(x) / 4), init="pca", random_state=seed).fit_transform((x - x.mean(0)).numpy(force=True))
        return torch.from_numpy(drawn).double()
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False)[2][:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (x @ (directions * largest.sign()).T).cpu()  # a direction and its opposite are one: the largest entry is positive
