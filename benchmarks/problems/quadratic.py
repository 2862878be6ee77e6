"""A random quadratic, whose solution's derivative is a formula: ``inner = 1/2 w^T A w - w^T B h``, ``outer = 1/2 |w - w0|^2``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Problem, Rule, Size
from metacal._typing import Tree

DIMENSIONS: dict[Size, tuple[int, int, int]] = {"tiny": (6, 3, 12), "small": (100, 40, 40), "full": (1000, 400, 200)}  # P, m, T
CONDITION = 20.0


class Terms(NamedTuple):
    A: Tensor  # [P, P], eigenvalues from 1 / CONDITION to 1
    B: Tensor  # [P, m]


def whole(w: Tree) -> Tensor:
    """The vector of two leaves, [P, 1]: a method that sees only the blocks on the diagonal of A is found out."""
    return torch.cat([w["head"], w["tail"]])


def inner(w: Tree, h: Tree, batch: Terms) -> Tensor:
    v = whole(w)
    return (v.T @ (0.5 * batch.A @ v - batch.B @ h["h"])).sum()


def outer(w: Tree, h: Tree, target: Tensor) -> Tensor:
    return 0.5 * ((whole(w) - target) ** 2).sum()


def quadratic(size: Size) -> Problem:
    """In float64; exact: ``B^T A^-1 (w* - w0)`` with ``w* = A^-1 B h``."""
    P, m, T = DIMENSIONS[size]
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(P, P, generator=g, dtype=torch.float64))[0]
    A = (Q * torch.logspace(0, 1, P, base=1 / CONDITION, dtype=torch.float64)) @ Q.T
    B = torch.randn(P, m, generator=g, dtype=torch.float64) / m**0.5
    h, target = (torch.randn(n, 1, generator=g, dtype=torch.float64) for n in (m, P))
    start = torch.zeros(P, 1, dtype=torch.float64)

    def exact() -> Tree:
        solution = torch.linalg.solve(A, B @ h)
        return {"h": B.T @ torch.linalg.solve(A, solution - target)}

    return Problem(
        "quadratic", inner, outer, {"head": start[: P // 2], "tail": start[P // 2 :]}, {"h": h}, [Terms(A, B)] * T, target,
        Rule("sgd", 1.0), exact=exact, step_size=1.0,
    )  # fmt: skip
