"""What is measured while TC² trains: conflict between tasks' gradients, transfer between tasks, and the calibration itself.

Conflict and its surgery need only the Gram matrix G[i, j] = <g_i, g_j> of the tasks' gradients, so gradients stay in their
trees: a *stacked* tree whose leaves have a leading task axis (what vmap returns; a matrix [K, P] is one), or a list of K trees.

The cosine is a first-order reading of transfer: T(i -> j) = a <g_i, g_j> + O(a^2) after one step of size a. With a V far
from orthonormal it was seen off by more than 10x at a = 0.01: report the transfer matrix beside it.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from metacal import tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.tc2.losses import gram_error


class Conflict(NamedTuple):
    """``rate``: share of task pairs with cos < 0; ``severity``: mean of min(cos, 0) over the pairs, in [-1, 0]. 0-dim."""

    rate: Tensor
    severity: Tensor


def cosines(gradients: Tree | list[Tree]) -> Tensor:
    """The cosines [K, K] between tasks' gradients; a gradient of zero has no direction, and cosine 0 with all.

    >>> cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
    tensor([[ 1.,  0., -1.],
            [ 0.,  1.,  0.],
            [-1.,  0.,  1.]])
    """
    G = gram(gradients)
    norms = G.diagonal().sqrt()
    inverse = torch.where(norms == 0, norms, 1 / norms)
    return inverse[:, None] * G * inverse


def measure_conflict(cosines: Tensor) -> Conflict:
    """How much tasks conflict (angle > 90 degrees [A]), over the pairs of different tasks; no conflict where K = 1.

    >>> measure_conflict(cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])))
    Conflict(rate=tensor(0.3333), severity=tensor(-0.3333))
    """
    K = len(cosines)
    if K == 1:
        return Conflict(cosines.new_zeros(()), cosines.new_zeros(()))
    rows, columns = torch.triu_indices(K, K, offset=1)
    pairs = cosines[rows, columns]
    negative = torch.where(pairs.isnan(), pairs, (pairs < 0).to(pairs.dtype))  # a NaN must not read as agreement
    return Conflict(negative.mean(), pairs.clamp(max=0).mean())


def pcgrad(gradients: Tree | list[Tree], generator: torch.Generator | None = None, *, order: Tensor | None = None) -> Tree:
    """Gradient surgery: the *mean* of the tasks' gradients after each is projected off those it conflicts with.

        for every task i:  g_i^PC = g_i;  for j in a random order, j != i:  g_i^PC -= min(<g_i^PC, g_j>, 0) / ||g_j||^2 g_j

    The paper sums the g_i^PC; with the mean K does not change the step size [O]: multiply by K for theirs.

    Args:
        gradients: leaves [K, ...], or a list of K trees; the result has one task's structure and shapes.
        generator: of the random order; None takes torch's default one.
        order: [K, K], row i the order of task i's projections, a permutation of the tasks; instead of ``generator``.

    Cost: the Gram matrix and one weighted sum of the gradients, O(K^2 P); the projections are done on [K, K] coefficients.

    Errors:
        ValueError: a row of ``order`` is not a permutation of the tasks.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.

    >>> pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.2500, 0.7500])
    """
    gradients = _stacked(gradients)
    G = gram(gradients)
    return _combined(gradients, _pcgrad_coefficients(G, _projection_order(len(G), generator, order).to(G.device)).mean(0))


def upgrad(gradients: Tree | list[Tree]) -> Tree:
    """Gradient surgery: the mean of the tasks' gradients after each is projected onto the cone that conflicts with none.

        g_i^UP = argmin_g ||g - g_i||  over  { g : <g, g_j> >= 0 for all j }

    A small step against the result raises no task's loss, to first order; :func:`pcgrad` promises that for two tasks only.

    Args:
        gradients: leaves [K, ...], or a list of K trees; the result has one task's structure and shapes.

    Cost: the Gram matrix and one weighted sum of the gradients, O(K^2 P), and K quadratic programs in K unknowns, solved on the host
    by torchjd with a relative ridge of 1e-4. Not under vmap, not differentiable.

    Errors:
        ImportError: torchjd with its quadratic solver, an optional dependency, is not installed.
        ArithmeticError: gradients that are not finite have no projection.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, section 4; torchjd is theirs.

    >>> upgrad(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # no conflict: the mean  # doctest: +SKIP
    tensor([0.5000, 1.0000])
    """
    try:
        weighting = importlib.import_module("torchjd.aggregation").UPGradWeighting()
    except ImportError as error:
        raise ImportError('UPGrad needs torchjd with its quadratic solver: pip install "torchjd[quadprog-projector]"') from error
    gradients = _stacked(gradients)
    G = gram(gradients).detach()
    if not G.isfinite().all():
        raise ArithmeticError("`gradients` should be finite to be projected; a task's gradient holds NaN or an infinity.")
    # torchjd takes Gram matrices of a trace below 1e-4 for zero: the weights do not depend on the scale.
    scale = G.diagonal().max()
    return _combined(gradients, weighting(G / nonzero(scale)))


def transfer_matrix(losses_before: Tensor, losses_after: Tensor) -> Tensor:
    """T[i, j] = l_j^q(theta) - l_j^q(theta'_i): how much adapting to task i lowers task j's query loss.

    This is the definition of transferability [A] made measurable; positive is good.

    Args:
        losses_before: [K], ``losses_before[j]`` = l_j^q(theta).
        losses_after: [K, K], ``losses_after[i, j]`` = l_j^q(theta'_i).

    >>> transfer_matrix(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 2.0], [1.0, 3.0]]))
    tensor([[ 0.5000,  0.0000],
            [ 0.0000, -1.0000]])
    """
    K = len(losses_before)
    if losses_before.shape != (K,) or losses_after.shape != (K, K):
        raise ValueError(
            "`losses_before` should have shape [K] and `losses_after` [K, K], the losses of all tasks after adapting to each; got "
            f"{tuple(losses_before.shape)} and {tuple(losses_after.shape)}."
        )
    return losses_before[None, :] - losses_after


def monitors(Z: Tensor, V: Tensor, w: Tensor) -> dict[str, Tensor]:
    """How good factors V [d, n_f] and weights w [..., n_f] are on Z [..., d]: 0-dim tensors to log, detached.

    - ``orthogonality_error``: ||V^T V - I||_F;
    - ``reconstruction_error``: ||Z - Z V V^T||_F / ||Z||_F, what the factors cannot express, 0 for a batch of zeros;
    - ``calibration_error``: ||Z - w V^T||_F / ||Z||_F, what calibration drops, likewise;
    - ``hoyer_sparsity`` and ``near_zero_share`` of w.

    >>> monitors(torch.ones(2, 4), torch.eye(4), torch.ones(2, 4))["hoyer_sparsity"]
    tensor(0.)
    """
    Z, V, w = Z.detach(), V.detach(), w.detach()
    size = nonzero(Z.norm())
    return {
        "orthogonality_error": gram_error(V).norm(),
        "reconstruction_error": (Z - Z @ V @ V.mT).norm() / size,
        "calibration_error": (Z - w @ V.mT).norm() / size,
        "hoyer_sparsity": hoyer_sparsity(w),
        "near_zero_share": near_zero_share(w),
    }


def hoyer_sparsity(w: Tensor) -> Tensor:
    """The mean over samples of (sqrt(n) - ||w||_1 / ||w||_2) / (sqrt(n) - 1): 0 for equal magnitudes, 1 for one non-zero.

    Samples without any non-zero count as 1, and so do all at n = 1.

    Source: Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 2004.

    >>> hoyer_sparsity(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]]))
    tensor(0.5000)
    """
    n = w.shape[-1]
    l1, l2 = w.abs().sum(-1), w.norm(dim=-1)
    ratio = torch.where(l2 == 0, 1.0, l1 / l2)
    return ((math.sqrt(n) - ratio) / (math.sqrt(n) - 1)).mean() if n > 1 else ratio.mean()


def near_zero_share(w: Tensor, relative: float = 0.01) -> Tensor:
    """The share of entries of w with magnitude at most ``relative`` times the largest one.

    >>> near_zero_share(torch.tensor([[1.0, 0.001, 0.0, -0.5]]))
    tensor(0.5000)
    """
    largest = w.abs().max()
    return torch.where(largest.isnan(), largest, (w.abs() <= relative * largest).to(w.dtype).mean())


def gram(gradients: Tree | list[Tree]) -> Tensor:
    """G[i, j] = <g_i, g_j> [K, K], over all leaves together."""
    rows = [leaf.reshape(len(leaf), -1) for leaf in tree.leaves(_stacked(gradients))]  # each [K, elements of the leaf]
    return torch.stack([g @ g.mT for g in rows]).sum(0)


def _combined(gradients: Tree, weights: Tensor) -> Tree:
    """sum_k weights[k] g_k of stacked gradients."""
    return tree.map(lambda leaf: torch.tensordot(weights.to(leaf.dtype), leaf, dims=1), gradients)


def _stacked(gradients: Tree | list[Tree]) -> Tree:
    return tree.stack(gradients) if isinstance(gradients, list) else gradients


def _projection_order(K: int, generator: torch.Generator | None, order: Tensor | None) -> Tensor:
    if order is None:
        where = "cpu" if generator is None else generator.device
        return torch.rand(K, K, generator=generator, device=where).argsort(1)
    if order.shape != (K, K) or not torch.equal(order.sort(1).values, torch.arange(K, device=order.device).expand(K, K)):
        raise ValueError(f"`order` should be [{K}, {K}] with a permutation of 0 ... {K - 1} in every row, got {order.tolist()}.")
    return order


def _pcgrad_coefficients(G: Tensor, order: Tensor) -> Tensor:
    """C [K, K] with g_i^PC = sum_j C[i, j] g_j, all tasks i projected side by side: <g_i^PC, g_j> = (C G)[i, j]."""
    itself = torch.arange(len(G), device=G.device)[:, None]
    C = torch.eye(len(G), dtype=G.dtype, device=G.device)
    for j in order.mT[:, :, None]:  # [K, 1]: the task that each task i is now projected off
        inner, square = (C @ G).gather(1, j), G.diagonal()[j]
        conflicts = (j != itself) & (inner < 0)  # never with a zero gradient: then inner is 0
        C = C.scatter_add(1, j, torch.where(conflicts, -inner / square, torch.zeros_like(inner)))
    return C
