"""What an adjoint is: a substitute, exact or approximate, for ``torch.func.vjp`` of the inner run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from metacal import _random
from metacal._typing import Tree
from metacal.batches import listed
from metacal.inner import InnerSolver, InnerState


class Cotangents(NamedTuple):
    """What a pullback returns.

    Attributes:
        params: cotangent of the initial params; ``()`` where the method does not estimate it.
        hparams: cotangent of the hparams (the indirect part of a hypergradient).
        stats: 0-dim tensors that say how far the number can be trusted.
        memory: what a warm-started linear solve wants back next time; ``()`` where there is none.
    """

    params: Tree
    hparams: Tree
    stats: dict[str, Tensor]
    memory: Tree = ()


Pullback = Callable[[Tree], Cotangents]
Select = Callable[[Sequence[Any]], Sequence[Any]]
"""Which batches define the last step's objective, or a linear system: ``linear.last``, ``linear.every``."""


def chosen(select: Select, batches: Sequence[Tree]) -> list[Tree]:
    """The selected batches, read once and checked. Where reading may draw, it does so apart from the run's own draws."""
    with nullcontext() if isinstance(batches, (list, tuple)) else _random.apart():
        return listed(select(batches))


class Adjoint(ABC):
    """Differentiates the run of an inner solver."""

    derives_steps = False
    """Whether it is zero where there are no steps (:func:`metacal.stationary`)."""

    @property
    def is_of_the_run(self) -> bool:
        """Whether its derivative is that of the run itself, which a transform that sees the run has too."""
        return False

    @abstractmethod
    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        """Runs the solver; returns its final state and the pullback of ``(params, hparams) -> final params``."""

    def init_memory(self, params: Tree) -> Tree:
        """Zeros like the ``memory`` of this adjoint's pullbacks, for a state that can be saved and loaded: ``()`` where there is none."""
        return ()

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        """The tangent of the final params: needed only when a ``solve`` is differentiated in forward mode."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward-mode rule, which a `solve` inside an inner objective needs where a level above "
            "goes forward (Forward, a torch.func transform, compiled steps). "
            "Use Unrolled(mode='reverse') at the level above, or give the adjoint a `jvp`."
        )
