"""torch's default random generators as values: remembered before a step, put back when the step is replayed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree


class Noise(NamedTuple):
    """The states of the default generators that a computation on ``devices`` can draw from."""

    cpu: Tensor
    cuda: dict[int, Tensor]


def noise(*trees: Tree) -> Noise:
    """The present state of the CPU generator and of those of the CUDA devices on which the trees live."""
    with _unseen():
        devices = {leaf.device for leaf in tree.leaves(trees) if isinstance(leaf, Tensor) and leaf.is_cuda}
        indices = {torch.cuda.current_device() if d.index is None else d.index for d in devices}
        return Noise(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in sorted(indices)})


def same_or(previous: Noise | None, now: Noise) -> Noise:
    """``previous`` if nothing was drawn since (so that steps without noise share one copy), else ``now``."""
    if previous is None or previous.cuda.keys() != now.cuda.keys():
        return now
    unchanged = _equal(previous.cpu, now.cpu) and all(_equal(previous.cuda[i], now.cuda[i]) for i in now.cuda)
    return previous if unchanged else now


def _equal(a: Tensor, b: Tensor) -> bool:
    with _unseen():
        return bool((a.numpy() == b.numpy()).all())


def _unseen() -> Any:
    # Generator states are host bytes: a torch.func transform that wrapped them could not hand them back to a generator.
    return torch._C._DisableFuncTorch()


def restore(state: Noise) -> None:
    """Puts the generators back into ``state``."""
    with _unseen():
        torch.set_rng_state(state.cpu)
        for i, cuda in state.cuda.items():
            torch.cuda.set_rng_state(cuda, i)


@contextmanager
def preserved(*trees: Tree) -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were before."""
    before = noise(*trees)
    try:
        yield
    finally:
        restore(before)


@contextmanager
def apart(*trees: Tree) -> Iterator[None]:
    """Inside, draws come from a stream of their own, seeded by the present state; afterwards the generators are as before.

    What is drawn inside is independent of what is drawn after it, and another time only after something was drawn in between.
    """
    with preserved(*trees):
        here = noise(*trees)
        with _unseen():
            torch.default_generator.manual_seed(zlib.crc32(here.cpu.numpy().tobytes()))
            for i, cuda in here.cuda.items():
                torch.cuda.default_generators[i].manual_seed(zlib.crc32(cuda.numpy().tobytes()))
        yield
