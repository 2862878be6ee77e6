"""Pairings: which tasks' query losses judge the encoder that was adapted to task k.

A pairing is a row-stochastic matrix P [K, K], and the outer objective is mean_k sum_j P[k, j] l_j^q(theta'_k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def own(K: int) -> Tensor:
    """Each task judges itself: MAML's convention, and the default [O].

    >>> own(2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    return torch.eye(_num_tasks(K))


def cross(K: int) -> Tensor:
    """All other tasks judge, with weight 1/(K - 1): the abstract's definition of transferability taken literally [A].

    Errors:
        ValueError: K = 1 has no other task.

    >>> cross(3)
    tensor([[0.0000, 0.5000, 0.5000],
            [0.5000, 0.0000, 0.5000],
            [0.5000, 0.5000, 0.0000]])
    """
    if _num_tasks(K) == 1:
        raise ValueError("`K` should be at least 2 for the pairing `cross`: a single task has no others to judge it. Use `own`.")
    return (torch.ones(K, K) - torch.eye(K)) / (K - 1)


def all_tasks(K: int) -> Tensor:
    """All tasks judge, itself included, with weight 1/K.

    >>> all_tasks(2)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return torch.full((_num_tasks(K), K), 1 / K)


def cyclic(K: int, shift: int = 1) -> Tensor:
    """Task k + shift (modulo K) judges task k, another one unless K divides the shift, for K query passes and not ``cross``'s K (K - 1).

    >>> cyclic(3)
    tensor([[0., 1., 0.],
            [0., 0., 1.],
            [1., 0., 0.]])
    """
    return torch.eye(_num_tasks(K)).roll(shift, dims=1)


_NAMED = {"own": own, "cross": cross, "all": all_tasks, "cyclic": cyclic}


def pairing_matrix(which: str | Tensor, K: int) -> Tensor:
    """A pairing by its name ('own', 'cross', 'all', 'cyclic'), or one's own matrix after a check.

    Errors:
        ValueError: an unknown name; a matrix that is not [K, K], finite, non-negative and of row sums 1.

    >>> pairing_matrix("own", 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if isinstance(which, str):
        if which not in _NAMED:
            raise ValueError(f"`pairing` should be one of {sorted(_NAMED)} or a [K, K] matrix, got {which!r}.")
        return _NAMED[which](K)
    if not isinstance(which, Tensor):
        raise TypeError(f"`pairing` should be a name or a [K, K] tensor, got {type(which).__name__}. Convert it with torch.tensor.")
    if which.shape != (K, K):
        raise ValueError(f"`pairing` should be a [K, K] matrix with K = {K} tasks, got shape {tuple(which.shape)}.")
    if not which.is_floating_point():
        raise ValueError(f"`pairing` should be floating point, got {which.dtype}. Convert it with .float().")
    if not bool((which.isfinite() & (which >= 0)).all()):
        raise ValueError("`pairing` should be finite and non-negative: its rows are averages over tasks.")
    sums = which.sum(1)
    if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=K * torch.finfo(which.dtype).eps + 1e-6):
        raise ValueError(f"`pairing` should have rows that sum to 1, got the sums {sums.tolist()}. Divide it by its row sums.")
    return which


def judged(P: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse form of a pairing: indices [K, J] of the tasks that judge task k, and their weights [K, J].

    J is the largest number of non-zeros in a row, so ``own`` and ``cyclic`` cost K query passes and not K^2. Rows with fewer
    are filled with task k itself at weight 0.

    >>> indices, weights = judged(cyclic(3))
    >>> indices.tolist(), weights.tolist()
    ([[1], [2], [0]], [[1.0], [1.0], [1.0]])
    """
    nonzero = P != 0
    J = int(nonzero.sum(1).max())
    columns = nonzero.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :J]  # non-zeros first, in order
    weights = P.gather(1, columns)
    itself = torch.arange(len(P), device=P.device)[:, None]
    return torch.where(weights != 0, columns, itself), weights


def _num_tasks(K: int) -> int:
    if K < 1:
        raise ValueError(f"`K` should be at least 1, the number of tasks, got {K}.")
    return K
