"""The batches of a run: sequences that can be read again, and constants of the inner problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from metacal import _checks, derivatives, tree
from metacal._typing import Tree


def read(batches: Sequence[Tree], begin: int, end: int) -> Iterator[Tree]:
    """``batches[begin:end]`` one at a time, each checked: a batch is a constant."""
    for i in range(begin, end):
        batch = batches[i]
        if not derivatives.transforming():
            constant("batches", batch)
        yield batch


def listed(batches: Sequence[Tree]) -> list[Tree]:
    """All of them, read once and checked."""
    return list(read(batches, 0, len(batches)))


def constant(name: str, batch: Tree) -> None:
    """Raises ValueError if a batch leaf requires grad: nothing would flow into it."""
    leaves = tree.leaves(batch)
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return
    for path, leaf in zip(tree.paths(batch), leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                f"`{name}`" + (f" at '{path}'" if path else "") + " requires grad, but a batch is a constant of the inner problem and "
                "no gradient reaches it. Put what is learned (images, labels, weights) into `hparams`, or detach it."
            )


def repeat(batch: Tree, n: int) -> Sequence[Tree]:
    """The same batch for ``n`` steps, held once."""
    _checks.whole("n", n, 0)
    return [batch] * n


def take(loader: Iterable[Tree], n: int) -> Sequence[Tree]:
    """The first ``n`` batches of a DataLoader (or any iterable), starting over when it ends."""
    _checks.whole("n", n, 0)
    taken: list[Tree] = []
    while len(taken) < n:
        before = len(taken)
        for batch in loader:
            taken.append(batch)
            if len(taken) == n:
                break
        if len(taken) == before:
            raise ValueError(f"`loader` should yield at least one batch; it ended after {before} of the {n} that were asked for.")
    return taken
