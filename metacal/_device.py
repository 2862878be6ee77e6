"""Where a tree's tensors are, and when the work there is done."""

from __future__ import annotations

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree


def device_of(value: Tree) -> torch.device:
    """The device of the first tensor of a tree; the CPU where there is none."""
    return next((leaf.device for leaf in tree.leaves(value) if isinstance(leaf, Tensor)), torch.device("cpu"))


def wait(device: torch.device | str) -> None:
    """Returns when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
