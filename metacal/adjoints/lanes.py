"""Many runs side by side: the directions of forward mode and the particles of evolution strategies are *lanes*.

A tree of lanes has the same first axis in every leaf. All lanes see one realisation of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metacal import _checks, _random, tree
from metacal._safe import nonzero
from metacal._typing import Tree

Distribution = Literal["rademacher", "gaussian"]


def real(who: str, hparams: Tree) -> None:
    """Raises TypeError where the hparams are complex: directions are real, and would leave out what is imaginary."""
    for path, leaf in zip(tree.paths(hparams), tree.leaves(hparams), strict=True):
        if leaf.is_complex():
            where = f" at '{path}'" if path else ""
            raise TypeError(
                f"`hparams`{where} should be real for {who}, got {leaf.dtype}. Pass real and imaginary parts, or use Unrolled()."
            )


def directions(like: Tree, num: int, distribution: Distribution) -> Tree:
    """``num`` lanes of random directions with mean 0 and covariance I, drawn from torch's default generator."""

    def draw(x: Tensor) -> Tensor:
        if distribution == "gaussian":
            return torch.randn(num, *x.shape, dtype=x.dtype, device=x.device)
        return 2 * torch.randint(2, (num, *x.shape), device=x.device).to(x.dtype) - 1

    return tree.map(draw, like)


def basis(like: Tree) -> Tree:
    """One lane per scalar of a tree, in the order of :func:`metacal.tree.ravel`: the unit vectors."""
    num, begin, lanes = tree.num_elements(like), 0, []
    flat, treedef = tree.flatten(like)
    for x in flat:
        unit = torch.zeros(num, x.numel(), dtype=x.dtype, device=x.device)
        unit[begin : begin + x.numel()] = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        lanes.append(unit.reshape(num, *x.shape))
        begin += x.numel()
    return tree.unflatten(treedef, lanes)


def zeros(num: int, like: Tree) -> Tree:
    """``num`` lanes of zeros."""
    return tree.map(lambda x: torch.zeros(num, *x.shape, dtype=x.dtype, device=x.device), like)


def count(lanes: Tree) -> int:
    """How many there are."""
    return len(tree.leaves(lanes)[0])


def over(fn: Callable[[Tree], tuple[Tree, Tree]], lanes: Tree, chunk_size: int | None, *devices: Tree) -> tuple[Tree, Tree]:
    """``fn(lane) -> (own, shared)`` for every lane: the lanes of ``own``, and ``shared``, which must not depend on the lane.

    ``chunk_size`` lanes run together under vmap (None: all of them); one at a time runs without vmap, which any operation
    supports. The generators of ``devices`` advance as by one call.
    """
    flat, treedef = tree.flatten(lanes)
    num = count(lanes)
    size = num if chunk_size is None else min(chunk_size, num)
    noise = _random.noise(devices)
    structures: Any = None

    def on_leaves(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        nonlocal structures
        own, shared = fn(tree.unflatten(treedef, leaves))
        structures = tree.structure(own), tree.structure(shared)
        return tree.leaves(own), tree.leaves(shared)

    together = torch.func.vmap(on_leaves, randomness="same")
    pieces: list[list[Tensor]] = []
    shared: list[Tensor] = []
    for begin in range(0, num, size):
        _random.restore(noise)
        if size == 1:
            own, shared = on_leaves([x[begin] for x in flat])
            own = [x.unsqueeze(0) for x in own]
        else:
            own, shared = together([x[begin : begin + size] for x in flat])
            shared = [x[0] for x in shared]  # vmap expands what does not depend on the lane, without a copy
        pieces.append(own)
    joined = pieces[0] if len(pieces) == 1 else [torch.cat(xs) for xs in zip(*pieces, strict=True)]
    return tree.unflatten(structures[0], joined), tree.unflatten(structures[1], shared)


def vdot(lanes: Tree, x: Tree) -> Tensor:
    """The inner product of every lane with one tree."""
    products = [z.reshape(len(z), -1) @ c.reshape(-1) for z, c in zip(tree.leaves(lanes), tree.leaves(x), strict=True)]
    return torch.stack(products).sum(0)


def average(slopes: Tensor, lanes: Tree) -> tuple[Tree, dict[str, Tensor]]:
    """The mean of ``slope_i u_i`` over k lanes, an estimate of g from slopes ``<g, u_i>``.

    With its statistic ``standard_error``: that of the mean, ``sqrt(sum_j Var_j / k)``, relative to the mean's own norm (NaN for k = 1).
    """
    num = len(slopes)
    mean = tree.map(lambda u: torch.tensordot(slopes.to(u.dtype), u, 1) / num, lanes)
    squares = slopes**2 * sum((u.reshape(num, -1) ** 2).sum(1) for u in tree.leaves(lanes))
    size = tree.vdot(mean, mean)
    variance = (squares.mean() - size).clamp(min=0) / (num - 1 if num > 1 else math.nan)
    return mean, {"standard_error": (variance / nonzero(size)).sqrt().detach()}


def check_radius(value: Any) -> None:
    """Raises ValueError unless ``value`` is a positive number (a tensor is not looked at)."""
    if not isinstance(value, Tensor) and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"`radius` should be a positive number, got {value!r}.")


def check_distribution(value: Any) -> None:
    """Raises ValueError unless ``value`` names a distribution."""
    if value not in get_args(Distribution):
        raise ValueError(f"`distribution` should be one of {', '.join(get_args(Distribution))}, got {value!r}.")


def check_chunk_size(value: Any) -> None:
    """Raises ValueError unless ``value`` is a positive integer or None."""
    if value is not None:
        _checks.whole("chunk_size", value)
