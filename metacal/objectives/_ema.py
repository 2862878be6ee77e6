"""The exponential moving average that target networks follow."""

from __future__ import annotations

from torch import Tensor

from metacal import _checks, tree
from metacal._typing import Tree


def ema(target_params: Tree, params: Tree, tau: float) -> Tree:
    """The next target, ``tau * target + (1 - tau) * params`` leaf by leaf, as new detached tensors.

    Integer leaves (BatchNorm's step count) are those of ``params``. Move the target once per outer iteration.

    Args:
        target_params, params: trees of equal structure and shapes.
        tau: in [0, 1]; 1 keeps the target, 0 copies the params. BYOL goes from 0.99 to 1.

    Errors:
        ValueError: tau outside [0, 1]; trees that differ (the first path is named).

    Source: Grill et al. 2020, arXiv 2006.07733, eq. 1.

    >>> import torch
    >>> from metacal import objectives
    >>> objectives.ema({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, tau=0.75)
    {'w': tensor(1.5000)}
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"`tau` should be in [0, 1], the share of the old target that is kept, got {tau!r}.")
    _checks.same_structure("target_params", target_params, "params", params)

    def follow(target: Tensor, param: Tensor) -> Tensor:
        return tau * target.detach() + (1 - tau) * param.detach() if tree.is_floating(target) else param.detach().clone()

    return tree.map(follow, target_params, params)
