"""What holds around a run, autocast and the modules' modes: to hold again where a backward pass takes its steps again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available as has_autocast

from metacal import tree
from metacal._typing import Tree

_modules: WeakSet[nn.Module] = WeakSet()


def watch(module: nn.Module) -> None:
    """A module that is called during runs: its mode (train, eval), and that of all its parts, belongs to what holds around one."""
    _modules.add(module)


class Ambient(NamedTuple):
    """For each type of device whether autocast is on, and its precision; each watched module's mode."""

    autocast: dict[str, tuple[bool, torch.dtype]]
    modes: list[tuple[nn.Module, bool]]


def present(*trees: Tree) -> Ambient:
    """What holds now; of devices, on the host and where the trees live."""
    kinds = {"cpu"} | {leaf.device.type for leaf in tree.leaves(trees) if isinstance(leaf, Tensor)}
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if has_autocast(kind)}
    return Ambient(autocast, _modes())


@contextmanager
def again(ambient: Ambient) -> Iterator[None]:
    """Inside, what held then holds again."""
    now = _modes()
    with ExitStack() as stack:
        for kind, (enabled, dtype) in ambient.autocast.items():
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        stack.callback(_set, now)
        _set(ambient.modes)
        yield


def _modes() -> list[tuple[nn.Module, bool]]:
    return [(part, part.training) for module in _modules for part in module.modules()]


def _set(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        if part.training != training:
            part.training = training
