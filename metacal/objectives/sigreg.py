"""LeJEPA: views agree, and representations look like an isotropic Gaussian from every direction (SIGReg)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from metacal import _checks
from metacal._safe import wide
from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import carried, share, views, weight


@final
@dataclass(frozen=True)
class SIGReg(SSLObjective):
    """LeJEPA: invariance, and sketched isotropic Gaussian regularisation in place of every heuristic against collapse.

    Each view's representations are projected on random unit directions a, and each set of n projections s is tested for being standard
    normal by the statistic of Epps and Pulley, the distance between its characteristic function and the Gaussian one ::

        EP(s) = n int |1/n sum_i exp(i t s_i) - exp(-t^2/2)|^2 exp(-t^2/2) dt
        loss  = (1 - lambd) mean (z_a - mean_b z_b)^2 + lambd mean_{views, a} EP(z a)

    The integral is the trapezoid rule with ``knots`` points on [0, t_max], doubled: the integrand is even. For truly normal samples
    EP has the mean sqrt(2 pi) - sqrt(2 pi / 3) = 1.06 for every n; at collapse onto zero it is 0.41 n. Agrees with
    ``lightly.loss.LeJEPALoss`` on the same directions, all views being global ones.

    The carry is ``{"directions": [num_directions, d]}``. :meth:`update` draws new ones from torch's default generator, as the paper does
    in every step: they are state, and not drawn inside the loss, so that inner steps, products and replays see one and the same
    function. Without a carry the directions are :meth:`init_carry`'s, and stay.

    Shapes: reads ``z`` [n >= 2, m >= 2, d]. Cost: n m num_directions (d + 2 knots) operations and n m num_directions knots numbers in
    memory: linear in n and in d.

    Args:
        lambd: in [0, 1], the weight of the regularisation; a number or a 0-dim tensor. Published code takes 0.02 - 0.05.
        num_directions: of the sketch.
        knots: points of the trapezoid rule, >= 2.
        t_max: > 0, where the integral is cut. (The paper's listing integrates over [-5, 5], the authors' later code up to 3.)

    Errors:
        ValueError: an argument outside its range; z of another shape, fewer than two views or samples; directions of another d.

    Source: Balestriero and LeCun 2025, arXiv 2511.08544; Epps and Pulley 1983.

    >>> import torch
    >>> from metacal import objectives
    >>> same = torch.zeros(100, 2, 8)  # collapsed: sqrt(2 pi) - 2 sqrt(pi) + sqrt(2 pi / 3) per sample
    >>> round(objectives.SIGReg(lambd=1.0, t_max=8.0)(objectives.Outputs(same)).item(), 2)
    40.89
    """

    lambd: float | Tensor = 0.05
    num_directions: int = 256
    knots: int = 17
    t_max: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.lambd, Tensor):
            share("lambd", self.lambd)
        _checks.whole("num_directions", self.num_directions)
        _checks.whole("knots", self.knots, at_least=2)
        weight("t_max", self.t_max, positive=True)

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        z = views("z", outputs.z, min_samples=2)
        directions = carried("directions", carry or self.init_carry(z.shape[-1]), z)
        disagreement = z.var(dim=1, correction=0).mean()
        statistic = _epps_pulley(z @ directions.T, self.t_max, self.knots)  # [m, num_directions]
        return (1 - self.lambd) * disagreement + self.lambd * statistic.mean()

    def init_carry(self, d: int) -> Tree:
        """The first directions, the same in every call: no generator is asked."""
        return {"directions": torch.tensor(_first_directions(self.num_directions, d), dtype=torch.get_default_dtype())}

    def update(self, outputs: Outputs, carry: Tree) -> Tree:
        """New directions, drawn on the CPU from torch's default generator."""
        drawn = torch.randn(self.num_directions, outputs.z.shape[-1])
        return {"directions": (drawn / drawn.norm(dim=1, keepdim=True)).to(wide(outputs.z))}


def _epps_pulley(s: Tensor, t_max: float, knots: int) -> Tensor:
    """The statistic over the first axis: [n, ...] -> [...]."""
    n = s.shape[0]
    t = torch.linspace(0, t_max, knots, dtype=s.dtype, device=s.device)
    gaussian = (-t.square() / 2).exp()
    real = (s[..., None] * t).cos().mean(0) - gaussian
    imaginary = (s[..., None] * t).sin().mean(0)
    integrand = (real.square() + imaginary.square()) * gaussian
    return 2 * n * torch.trapezoid(integrand, t)


@lru_cache(maxsize=8)
def _first_directions(num_directions: int, d: int) -> Any:
    # numpy's generator, because torch's refuses to draw under vmap.
    drawn = np.random.default_rng(0).standard_normal((num_directions, d))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
