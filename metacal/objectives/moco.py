"""MoCo: tell the momentum network's key of the same sample from a queue of earlier keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from metacal import _checks
from metacal._safe import unit
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import carried, like, views, weight
from metacal.objectives._pairs import mean_over_pairs


@final
@dataclass(frozen=True)
class MoCo(SSLObjective):
    """Each view should be nearer to the target's key of another view of its sample than to the keys in a queue.

    With s the cosine divided by the temperature, k_b the target network's key of view b and q_1 ... q_Q the queue ::

        l(a, b, i) = log( exp s(z_ia, k_ib) + sum_j exp s(z_ia, q_j) ) - s(z_ia, k_ib)

    averaged over samples and ordered pairs a != b: for one ordered pair the paper's eq. 1, for m = 2 its symmetrised form. One
    pair equals ``lightly.loss.NTXentLoss`` with a memory bank. Keys and queue are constants in derivatives of every order.

    The carry is ``{"queue": [queue_size, d]}``. It starts as zeros, and an empty slot counts as a negative with cosine 0;
    :meth:`update` puts the iteration's n m keys in front and drops the oldest. So a queue is never seen in the iteration that
    filled it.

    Shapes: reads ``z`` and ``target`` [n, m >= 2, d]. Cost: n m (m + queue_size) d multiplications; the queue and n m queue_size
    similarities in memory.

    Args:
        temperature: > 0; a 0-dim tensor makes it a hyperparameter that can be learned. Published CIFAR code uses 0.2.
        queue_size: Q >= 1; a few times the n m keys of an iteration, up to 65,536 in the paper.

    Errors:
        ValueError: a temperature or queue size that is not positive; target is missing or differs from z in shape; no queue in the
            carry, or one of another d.

    Source: He et al. 2020, arXiv 1911.05722; the symmetrised form is that of Chen et al. 2021, arXiv 2104.02057.

    >>> import torch
    >>> from metacal import objectives
    >>> moco, z = objectives.MoCo(temperature=0.2, queue_size=16), torch.ones(4, 2, 8)
    >>> outputs = objectives.Outputs(z, target=z)
    >>> carry = moco.update(outputs, moco.init_carry(8))  # 8 keys, 8 empty slots
    >>> carry = moco.update(outputs, carry)
    >>> round(moco(outputs, carry).item(), 4)  # collapsed: all keys alike, so log(1 + Q)
    2.8332
    """

    heads: ClassVar[tuple[str, ...]] = ("projector",)
    ema_target: ClassVar[bool] = True

    temperature: float | Tensor = 0.2
    queue_size: int = 4096

    def __post_init__(self) -> None:
        weight("temperature", self.temperature, positive=True)
        _checks.whole("queue_size", self.queue_size)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z)
        keys = unit(like("target", views("target", outputs.target), "z", z).detach())
        queue = carried("queue", carry, z)
        positive = torch.einsum("iad,ibd->iab", unit(z), keys) / self.temperature
        negatives = (unit(z) @ queue.T / self.temperature).logsumexp(-1, keepdim=True)  # [n, m, 1]
        # logsumexp of two, as logaddexp's second derivative overflows where one term exceeds the other by 89 in float32.
        log_total = torch.stack([positive, negatives.expand_as(positive)]).logsumexp(0)
        return mean_over_pairs((log_total - positive).mean(0))

    def init_carry(self, d: int) -> Tree:
        """An empty queue of zeros."""
        return {"queue": torch.zeros(self.queue_size, d)}

    def update(self, outputs: Outputs, carry: Tree) -> Tree:
        """The queue with the keys of ``outputs.target`` [n, m, d] in front."""
        keys = unit(views("target", outputs.target).detach()).flatten(0, 1)
        return {"queue": torch.cat([keys, carried("queue", carry, keys)])[: self.queue_size]}
