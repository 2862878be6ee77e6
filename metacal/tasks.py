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
    task_size(N, num_tasks)
    if permutation is None:
        # Drawn on the generator's own device, so that one seed gives one split whatever device x is on.
        permutation = torch.randperm(N, generator=generator, device=generator.device if generator is not None else "cpu")
    elif generator is not None:
        raise ValueError("`generator` draws the permutation that `permutation` already gives: pass one of the two.")
    else:
        _check_permutation(permutation, N)
    order = permutation
    return blocks(tree.map(lambda leaf: leaf[order.to(leaf.device)], x), num_tasks)


def blocks(x: Tree, num_tasks: int) -> Tree:
    """Cuts N samples, in the order they have, into K tasks of n = N / K: [N, ...] -> [K, n, ...], sharing memory with x.

    For batches whose order says what a task is: n samples of every class group or data set, or n under every family of
    augmentations. Their permutation baseline is :func:`split` of the same batch, which shuffles who belongs to which task.

    Errors:
        ValueError: K does not divide N; leaves of different lengths.

    >>> import torch
    >>> from metacal import tasks
    >>> tasks.blocks(torch.arange(6), 2)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    n = task_size(_length("x", x), num_tasks)
    return tree.map(lambda leaf: leaf.unflatten(0, (num_tasks, n)), x)


def task_size(N: int, num_tasks: int) -> int:
    """n = N / K, the samples in each of K equal tasks.

    Errors:
        ValueError: K < 1, or it does not divide N; the message names the nearest batch size that does.

    >>> task_size(256, 4)
    64
    """
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
    return N // num_tasks


def clusters(features: Tensor, num_tasks: int, *, num_steps: int = 5) -> Tensor:
    """K balanced clusters of N feature vectors, as the permutation [N] that :func:`split` takes: task k is cluster k.

    k-means in which every cluster takes exactly n = N / K samples: centres c_k and assignments that minimise
    sum_i ||x_i - c_k(i)||^2 in turn, the assignment as a whole (a linear assignment problem), so that the sum never grows.
    Ends when the assignment repeats, or after ``num_steps``. Nothing is drawn: the first centre is the sample farthest from the
    mean, each other one the sample farthest from those before it, which finds clusters that are well apart. Within a task samples
    keep their order.

    Shapes: features [N, d], of any floating point type. Not estimated: the permutation is detached from the features, and no
    gradient flows through who belongs to which task. Runs on the host, in float64; not under vmap.

    Cost: O(N K d) and one assignment of N samples (256: 10 - 30 ms on one core) per step.

    Errors:
        ValueError: features of another shape or not finite; K does not divide N; num_steps < 1.

    Source: Malinen and Fränti, "Balanced K-Means for Clustering", S+SSPR 2014; the start is Gonzalez' (1985).

    >>> import torch
    >>> from metacal import tasks
    >>> x = torch.tensor([[0.0], [10.0], [1.0], [8.0], [0.5], [9.0]])
    >>> tasks.clusters(x, 2)
    tensor([1, 3, 5, 0, 2, 4])
    """
    from scipy.optimize import linear_sum_assignment

    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"`features` should be floating point of shape [N, d], got {tuple(features.shape)} of {features.dtype}.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` should be at least 1, got {num_steps}.")
    n = task_size(len(features), num_tasks)
    x = features.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError("`features` should be finite to be clustered, got NaN or infinite entries: the encoder has diverged.")

    def assign(centres: Tensor) -> Tensor:
        distances = (x[:, None] - centres).square().sum(-1)  # [N, K]
        _, place = linear_sum_assignment(distances.repeat_interleave(n, dim=1).numpy())  # every cluster has n places
        return torch.from_numpy(place) // n

    assigned = assign(_far_apart(x, num_tasks))
    for _ in range(num_steps - 1):
        before, assigned = assigned, assign(torch.stack([x[assigned == k].mean(0) for k in range(num_tasks)]))
        if torch.equal(before, assigned):
            break
    return assigned.argsort(stable=True).to(features.device)


def _far_apart(x: Tensor, K: int) -> Tensor:
    """K samples [K, d], each the farthest from those before it, the first from the mean."""
    chosen = [int((x - x.mean(0)).square().sum(1).argmax())]
    nearest = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < K:
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum((x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


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
    one_of_each = permutation.dtype == torch.int64 and tuple(permutation.shape) == (N,)  # uint8 and bool would be masks
    if not (one_of_each and torch.equal(permutation.sort().values, torch.arange(N, device=permutation.device))):
        raise ValueError(
            f"`permutation` should hold each of 0 ... {N - 1} once, as int64, got shape {tuple(permutation.shape)} of "
            f"{permutation.dtype}. Draw one: torch.randperm({N})."
        )
