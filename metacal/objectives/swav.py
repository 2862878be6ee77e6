"""SwAV: predict, from one view, the balanced cluster assignment of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from metacal import _checks
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import views, weight
from metacal.objectives._pairs import mean_over_pairs


def sinkhorn(scores: Tensor, epsilon: float | Tensor = 0.05, num_steps: int = 3) -> Tensor:
    """Soft assignments of samples to prototypes in which every prototype gets its share: [..., n, k] -> [..., n, k].

    Alternately scales ``exp(scores / epsilon)`` to equal column sums (each prototype takes n / k samples) and to unit row sums (each
    sample is assigned once); ends on the rows, which so are exact. Done on logarithms: no overflow for small epsilon.

    Cost: num_steps passes over the n k entries.

    Source: Cuturi 2013, arXiv 1306.0895; Caron et al. 2020, arXiv 2006.09882, eq. 3 - 5.

    >>> import torch
    >>> from metacal.objectives import sinkhorn
    >>> codes = sinkhorn(torch.tensor([[1.0, 0.9], [1.0, 0.2]]), epsilon=0.1, num_steps=50)  # both prefer the first
    >>> codes.argmax(-1)
    tensor([1, 0])
    """
    log_q = scores / epsilon
    for _ in range(num_steps):
        log_q = log_q - log_q.logsumexp(-2, keepdim=True)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    return log_q.exp()


@final
@dataclass(frozen=True)
class SwAV(SSLObjective):
    """The cross entropy between one view's share of every prototype and another view's balanced assignment.

    With p_a [n, k] the cosines between the representations of view a and k prototypes, and q_b = sinkhorn(p_b / epsilon) ::

        l(a, b, i) = - sum_c q_ibc log softmax(p_ia / temperature)_c

    averaged over samples and ordered pairs a != b: for m = 2 the mean of the two terms of the paper's eq. 1, which sums them.
    Agrees with ``lightly.loss.SwaVLoss`` on m high-resolution crops. Assignments are constants in derivatives of every order (see
    :class:`metacal.objectives.SimSiam` for what that means to a hypergradient). Prototypes are params: the weights of the head
    :class:`metacal.nets.Prototypes` behind the projector, at unit length. The paper's queue and its freezing of the prototypes in
    the first epoch are not here.

    Shapes: reads ``p`` [n >= 2, m >= 2, k]. Cost: n m k (m + num_steps) operations, n m k in memory. Balance needs samples: with
    n below k some prototypes stay empty, so take k of the order of the task size or less.

    Args:
        temperature: > 0, a number or a 0-dim tensor.
        epsilon: > 0, of the assignment; smaller is harder.
        num_steps: Sinkhorn steps >= 1.
        num_prototypes: k, of the head that is built for the objective; the paper has 3000 on ImageNet.

    Errors:
        ValueError: a temperature or epsilon that is not positive; p is missing, has fewer than two samples or views.

    Source: Caron et al. 2020, arXiv 2006.09882.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.full((4, 2, 10), 0.3)  # collapsed onto a point as far from each prototype: log k
    >>> round(objectives.SwAV()(objectives.Outputs(same, p=same)).item(), 4)
    2.3026
    """

    heads: ClassVar[tuple[str, ...]] = ("projector", "prototypes")

    temperature: float | Tensor = 0.1
    epsilon: float | Tensor = 0.05
    num_steps: int = 3
    num_prototypes: int = 64

    def __post_init__(self) -> None:
        weight("temperature", self.temperature, positive=True)
        weight("epsilon", self.epsilon, positive=True)
        _checks.whole("num_steps", self.num_steps)
        _checks.whole("num_prototypes", self.num_prototypes)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        p = views("p", outputs.p, min_samples=2)
        codes = sinkhorn(p.detach().transpose(0, 1), self.epsilon, self.num_steps).detach()  # [m, n, k]
        log_share = (p / self.temperature).log_softmax(-1)
        return mean_over_pairs(-torch.einsum("iak,bik->ab", log_share, codes) / p.shape[0])
