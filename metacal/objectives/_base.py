"""What a self-supervised objective is: a scalar function of the representations of m views of n samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from metacal._typing import Tree


class Outputs(NamedTuple):
    """What the networks make of m views of n samples; a field that the method does not have is None.

    Shapes: every field is [n, m, d].
    """

    z: Tensor
    """Representations: the projector's output, calibrated where calibration is on."""
    p: Tensor | None = None
    """The predictor's output for ``z`` (SimSiam, BYOL)."""
    target: Tensor | None = None
    """The projections of an exponential moving average of the networks, never differentiated (BYOL)."""


class SSLObjective(ABC):
    """A self-supervised loss: a pure function of :class:`Outputs`, the same alone as under ``torch.func`` transforms.

    Concrete objectives are frozen dataclasses, checked where they are made. They read state from ``carry`` and never
    move it: several inner steps may read one carry, and :meth:`update` moves it once per outer iteration.

    Under ``torch.func.vmap`` hand over the tensors and build ``Outputs`` inside, as vmap refuses None:
    ``vmap(lambda z: objective(Outputs(z)))``.
    """

    heads: ClassVar[tuple[str, ...]] = ("projector",)
    """The networks that follow the encoder, in order."""
    ema_target: ClassVar[bool] = False
    """Whether ``outputs.target`` is read: a moving average of encoder and projector, see :func:`metacal.objectives.ema`."""

    @abstractmethod
    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        """The loss, a 0-dim tensor."""

    def init_carry(self, d: int) -> Tree:
        """The state before the first iteration, for representations of d entries; ``()`` where there is none."""
        return ()

    def update(self, outputs: Outputs, carry: Tree) -> Tree:
        """The state after an outer iteration that saw ``outputs``."""
        return carry
