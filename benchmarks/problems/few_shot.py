"""MAML and iMAML on Omniglot. The params are the displacement from the initialisation, which is the hparams.

From zero, descent on ``loss(theta + w)`` by w takes the steps of descent from theta, and the derivative by theta is MAML's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import conv
from metacal import tree
from metacal._typing import Tree
from metacal.data.episodes import Episode, Episodes

WAYS, STRENGTH = 5, 2.0
WIDTHS: dict[Size, int] = {"tiny": 2, "small": 16, "full": 64}


def episodes(num_tasks: int, size: Size, *, shots: int = 1, queries: int = 5) -> tuple[str, Episode]:
    """Tasks with a leading axis, and the name of the set."""
    images = data.images("digits" if size == "tiny" else "omniglot", "train")
    if images.name == "digits":
        queries = min(queries, 5)
    drawn = Episodes(images, WAYS, shots, queries, rotations=images.name == "omniglot").sample(0, num_tasks, 0)
    return data.TITLES[images.name], drawn


def task(k: int, drawn: Episode, size: Size, *, num_steps: int, strength: float = 0.0) -> Problem:
    """Task k as a problem; with a ``strength`` the solution is tied to the initialisation (iMAML)."""
    support, query = tree.index(drawn.support, k), tree.index(drawn.query, k)
    apply, start = conv(WIDTHS[size], WAYS, 4, batch_norm=True, size=support[0].shape[-1])

    def loss(w: Tree, theta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(apply({name: theta[name] + w[name] for name in theta}, batch[0]), batch[1])

    def inner(w: Tree, theta: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        tied = 0.5 * strength * sum((v**2).sum() for v in w.values()) if strength else 0.0
        return loss(w, theta, batch) + tied

    name = "iMAML" if strength else "MAML"
    rule = Rule("sgd", 0.1 if strength else 0.4)
    zero = {name: torch.zeros_like(v) for name, v in start.items()}
    return Problem(name, inner, loss, zero, start, [support] * num_steps, query, rule, step_size=0.1)


def maml(size: Size) -> Problem:
    """One task, 5 steps."""
    return _named(size, num_steps=2 if size == "tiny" else 5)


def imaml(size: Size) -> Problem:
    """One task, 8 or 16 steps towards a solution that is tied to the initialisation."""
    return _named(size, num_steps={"tiny": 4, "small": 8, "full": 16}[size], strength=STRENGTH)


def _named(size: Size, num_steps: int, strength: float = 0.0) -> Problem:
    title, drawn = episodes(1, size)
    problem = task(0, drawn, size, num_steps=num_steps, strength=strength)
    return replace(problem, name=f"{problem.name}, {title}")
