"""The autocast of a forward pass, to be entered again where a backward pass takes its steps again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree

Autocast: TypeAlias = "dict[str, tuple[bool, torch.dtype]]"
"""For each type of device whether autocast is on, and its precision."""


def present(*trees: Tree) -> Autocast:
    """What holds now, on the host and on the devices on which the trees live."""
    kinds = {"cpu"} | {leaf.device.type for leaf in tree.leaves(trees) if isinstance(leaf, Tensor)}
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)}


@contextmanager
def again(autocast: Autocast) -> Iterator[None]:
    """Inside, what held then holds again."""
    with ExitStack() as stack:
        for kind, (enabled, dtype) in autocast.items():
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
