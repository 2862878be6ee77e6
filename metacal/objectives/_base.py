"""What a self-supervised objective is: a scalar function of the representations of m views of n samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from metacal._typing import Tree


class Outputs(NamedTuple):
    """What the networks make of m views of n samples; a field that the method does not have is None.

    Shapes: z and target are [n, m, d]; p is [n, m, d], or [n, m, k] from k prototypes. Of a masked autoencoder z is the tokens,
    [n, m, visible, d], p and target are pixels, [n, m, masked, P].
    """

    z: Tensor
    """Representations: the projector's output, calibrated where calibration is on."""
    p: Tensor | None = None
    """What the head after the projector makes of ``z``: predictions (SimSiam, BYOL), cosines with the prototypes (SwAV)."""
    target: Tensor | None = None
    """The projections of an exponential moving average of the networks, never differentiated (BYOL, MoCo, DINO)."""


class SSLObjective(ABC):
    """A self-supervised loss: a pure function of :class:`Outputs`, the same alone as under ``torch.func`` transforms.

    Concrete objectives are frozen dataclasses, checked where they are made. They read state from ``carry`` and never
    move it: several inner steps may read one carry, and :meth:`update` moves it once per outer iteration. The carry is a
    constant in derivatives of every order.

    Under ``torch.func.vmap`` hand over the tensors and build ``Outputs`` inside, as vmap refuses None:
    ``vmap(lambda z: objective(Outputs(z)))``.
    """

    heads: ClassVar[tuple[str, ...]] = ("projector",)
    """The networks that follow the encoder, in order."""
    ema_target: ClassVar[bool] = False
    """Whether ``outputs.target`` is read: a moving average of encoder and projector, see :func:`metacal.objectives.ema`."""
    num_prototypes: int
    """How many prototypes the head "prototypes" has; only where ``heads`` names it."""
    visible: float
    """The share of patches that the encoder sees; only where ``heads`` names a "decoder"."""

    @abstractmethod
    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        """The loss, a 0-dim tensor."""

    def init_carry(self, d: int) -> Tree:
        """The state before the first iteration, for representations of d entries; ``()`` where there is none."""
        return ()

    def update(self, outputs: Outputs, carry: Tree) -> Tree:
        """The state after an outer iteration that saw ``outputs``, detached; the argument is left as it was.

        Where ``ema_target`` is set only ``outputs.target`` may be read: nobody computes the rest a second time for this.
        """
        return carry
