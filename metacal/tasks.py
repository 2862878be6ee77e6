"""Splitting a batch into tasks, and each task into what it learns from and what judges it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree


def split(x: Tree, num_tasks: int, *, generator: torch.Generator | None = None, permutation: Tensor | None = None) -> Tree:
    """Deals N samples at random into K tasks of n = N / K: [N, ...] -> [K, n, ...].

    A uniformly random permutation, cut into K equal parts [S]. The tasks are i.i.d., so conflict between them is largely
    sampling noise that grows as n shrinks: splitting the same batch again, ``split(unsplit(tasks), K)``, is the baseline
    for every conflict figure.

    Args:
        x: a tensor or a tree of tensors (images and labels, say) that share the first axis; all are permuted alike.
        num_tasks: K >= 1, a divisor of N.
        generator: where the permutation is drawn from; torch's default one if None.
        permutation: integers [N], instead of drawing: task k gets the samples ``permutation[k n : (k + 1) n]``.

    Errors:
        ValueError: K does not divide N; leaves of different lengths; both generator and permutation; not a permutation.

    >>> import torch
    >>> from metacal import tasks
    >>> tasks.split(torch.arange(6), 2, permutation=torch.tensor([4, 2, 0, 5, 3, 1]))
    tensor([[4, 2, 0],
            [5, 3, 1]])
    """
    N = _length("x", x)
    if num_tasks < 1:
        raise ValueError(f"`num_tasks` should be at least 1, got {num_tasks}.")
    if N == 0 or N % num_tasks:
        below = N - N % num_tasks
        nearest = below if below and 2 * (N - below) <= num_tasks else below + num_tasks
        raise ValueError(
            f"`num_tasks` should divide the batch: N = {N} samples do not make K = {num_tasks} equal tasks. The nearest batch "
            f"size that does is {nearest}" + (f" (x[:{below}])" if nearest == below else "") + "; for a DataLoader pass that "
            "batch_size, and drop_last=True."
        )
    if permutation is None:
        # Drawn on the generator's own device, so that one seed gives one split whatever device x is on.
        permutation = torch.randperm(N, generator=generator, device=generator.device if generator is not None else "cpu")
    elif generator is not None:
        raise ValueError("`generator` draws the permutation that `permutation` already gives: pass one of the two.")
    else:
        _check_permutation(permutation, N)
    order = permutation

    def deal(leaf: Tensor) -> Tensor:
        return leaf[order.to(leaf.device)].unflatten(0, (num_tasks, N // num_tasks))

    return tree.map(deal, x)


def unsplit(x: Tree, *, permutation: Tensor | None = None) -> Tree:
    """Puts the tasks back into one batch: [K, n, ...] -> [K n, ...].

    Args:
        x: a tensor or a tree of tensors.
        permutation: the one that :func:`split` was given; the samples then come back in their first order.

    Errors:
        ValueError: leaves with fewer than two axes or of different lengths; not a permutation.

    >>> import torch
    >>> from metacal import tasks
    >>> order = torch.tensor([4, 2, 0, 5, 3, 1])
    >>> tasks.unsplit(tasks.split(torch.arange(6), 2, permutation=order), permutation=order)
    tensor([0, 1, 2, 3, 4, 5])
    """
    _check_axes(x, 2, "[K, n, ...]")
    flat = tree.map(lambda leaf: leaf.flatten(0, 1), x)
    if permutation is None:
        return flat
    _check_permutation(permutation, _length("x", flat))
    inverse = permutation.argsort()
    return tree.map(lambda leaf: leaf[inverse.to(leaf.device)], flat)


def support_query(x: Tree, by: Literal["views", "samples"] = "views", *, num_support: int | None = None) -> tuple[Tree, Tree]:
    """Cuts every task into support (learned from) and query (judged on): [K, n, m, ...] -> two of the kind.

    ``by="views"`` [O]: the first views of every sample against its other views, [K, n, m_s, ...] and [K, n, m - m_s, ...];
    it tests invariance to augmentation. ``by="samples"``: some samples with all their views against the other samples,
    [K, n_s, m, ...] and [K, n - n_s, m, ...]; m = 2 is then enough. Both are slices that share memory with x.

    Args:
        x: a tensor or a tree of tensors.
        by: the axis that is cut.
        num_support: m_s or n_s; half of the axis, rounded down, if None.

    Errors:
        ValueError: another word for `by`; too few axes; a cut that leaves support or query empty.

    >>> import torch
    >>> from metacal import tasks
    >>> support, query = tasks.support_query(torch.zeros(4, 16, 5, 1, 8, 8), by="views", num_support=2)
    >>> support.shape[:3], query.shape[:3]
    (torch.Size([4, 16, 2]), torch.Size([4, 16, 3]))
    """
    axes = {"samples": 1, "views": 2}
    if by not in axes:
        raise ValueError(f'`by` should be "views" or "samples", got {by!r}.')
    axis = axes[by]
    _check_axes(x, axis + 1, "[K, n, m, ...]" if by == "views" else "[K, n, ...]")

    def cut(leaf: Tensor) -> int:
        size = leaf.shape[axis]
        first = size // 2 if num_support is None else num_support
        if not 1 <= first < size:
            raise ValueError(
                f"`num_support` should leave support and query at least one of the {size} {by} each, got {first}. "
                + (f"Use between 1 and {size - 1}." if size > 1 else f"Use at least two {by}.")
            )
        return first

    support = tree.map(lambda leaf: leaf.narrow(axis, 0, cut(leaf)), x)
    query = tree.map(lambda leaf: leaf.narrow(axis, cut(leaf), leaf.shape[axis] - cut(leaf)), x)
    return support, query


def _length(name: str, x: Tree) -> int:
    """The length of the first axis, which all leaves must share."""
    lengths = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True)}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"`{name}` should hold tensors that share the length of their first axis, got {lengths}.")
    (length,) = {leaf.shape[0] for leaf in tree.leaves(x)}
    return length


def _check_axes(x: Tree, wanted: int, shape: str) -> None:
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        if leaf.ndim < wanted:
            where = "`x`" + (f" at '{path}'" if path else "")
            raise ValueError(f"{where} should have shape {shape}, got {tuple(leaf.shape)}. Split it into tasks first: tasks.split.")


def _check_permutation(permutation: Tensor, N: int) -> None:
    if tuple(permutation.shape) != (N,) or not torch.equal(permutation.sort().values, torch.arange(N, device=permutation.device)):
        raise ValueError(
            f"`permutation` should hold each of 0 ... {N - 1} once, got shape {tuple(permutation.shape)} of "
            f"{permutation.dtype}. Draw one: torch.randperm({N})."
        )
