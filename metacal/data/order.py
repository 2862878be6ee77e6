"""The order in which training reads its batches, as a pure function of the step: a resumed run needs no saved position."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def batch_indices(step: int, batch_size: int, num_samples: int, seed: int) -> Tensor:
    """Indices ``[batch_size]`` of the batch at global step ``step``, counted from 0.

    Every epoch is a new permutation of the samples, cut into ``num_samples // batch_size`` batches; the samples that do not fill a
    last batch are left out of that epoch. Pure: nothing is drawn from, or written to, torch's default generator.

    Cost: one permutation per epoch (the last few are cached).

    Errors:
        ValueError: ``batch_size`` exceeds ``num_samples``, or a negative ``step`` or ``seed``.

    >>> epoch = torch.cat([batch_indices(step, batch_size=2, num_samples=6, seed=0) for step in range(3)])
    >>> sorted(epoch.tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if not 1 <= batch_size <= num_samples:
        raise ValueError(
            f"`batch_size` should be between 1 and `num_samples` = {num_samples}, got {batch_size}. Take a smaller batch or more samples."
        )
    if step < 0 or seed < 0:
        raise ValueError(f"`step` and `seed` should not be negative, got step = {step} and seed = {seed}.")
    epoch, position = divmod(step, num_samples // batch_size)
    start = position * batch_size
    return _permutation(num_samples, seed, epoch)[start : start + batch_size].clone()  # a copy: the cache is nobody's to write into


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    # torch's CPU generator keeps 32 bits of a seed: hash the pair, where seed + epoch would make neighbouring runs share epochs.
    (mixed,) = np.random.SeedSequence((seed, epoch)).generate_state(1)
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(int(mixed)))
