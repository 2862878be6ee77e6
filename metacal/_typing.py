"""Names shared by every floor: what a tree is, and what an objective is."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import Tensor

Tree: TypeAlias = Any
"""A nested dict / list / tuple / NamedTuple whose leaves are tensors; ``None`` and ``()`` hold nothing."""


class Objective(Protocol):
    """A scalar loss of the inner parameters, the hyperparameters and a batch.

    Equal inputs and an equal state of torch's random number generators give an equal value.
    """

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, /) -> Tensor: ...
