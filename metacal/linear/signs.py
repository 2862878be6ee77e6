"""Random signs of fixed seeds: nobody else's random numbers change, and every lane of a vmap sees the same."""

from __future__ import annotations

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree


def signs(like: Tree, n: int, seed: int = 0) -> list[Tree]:
    """``n`` trees of -1 and 1 in the shapes of ``like``, drawn by a generator of their own."""
    flat, treedef = tree.flatten(like)
    with torch._C._DisableFuncTorch():  # constants: drawn by no transform
        generator = torch.Generator().manual_seed(seed)
        drawn: list[list[Tensor]] = [
            [(2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x.device, x.dtype) for x in flat] for _ in range(n)
        ]
    return [tree.unflatten(treedef, zs) for zs in drawn]
