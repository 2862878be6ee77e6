"""Zeroth order: the run is a black box that is run again at shifted hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metacal import _checks, _random, tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.adjoints import lanes
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.inner import FirstBad, InnerSolver, InnerState, advance


@dataclass(frozen=True)
class ZerothOrder(Adjoint):
    """Antithetic evolution strategies on the run: it is repeated at ``h + radius u`` and ``h - radius u``, never differentiated.

    ``d_hparams = mean_i <ct, w_T(h + radius u_i) - w_T(h - radius u_i)> / (2 radius) u_i`` over k random directions. All runs take
    the same batches and draw the same noise, so that a difference is that of the hyperparameters alone. The outer objective is
    still differentiated, by ``ct``; see :func:`metacal.single_loop.pes` for one that cannot be.

    Work: T (1 + 2k) plain steps; memory: one run's state more, independent of T, k and m. Bias: ``O(radius^2)``, of the third
    derivative of the run, none if the run is quadratic in h. Variance: that of :class:`metacal.adjoints.ForwardSketch`. Not
    estimated: the cotangent of the initial params (``()``). ``stats``: ``standard_error`` of the estimate, relative to its norm
    (NaN for one direction).

    The directions are drawn from torch's default generator after the run, which therefore draws what it would have. Under a
    transform that maps (``vmap``, ``jacfwd``) pass its ``randomness``.

    Args:
        num_directions: k, averaged over; each takes two runs.
        radius: how far the hyperparameters are shifted, in each of their coordinates.
        distribution: "rademacher" (signs, the smaller variance) or "gaussian".
        chunk_size: directions run together under vmap; None: all. One at a time (the default) needs no vmap.

    Source: Nesterov & Spokoiny 2017 (DOI 10.1007/s10208-015-9296-2), the central form; Salimans et al. 2017 (arXiv 1703.03864).

    >>> import torch, metacal
    >>> solver = metacal.fixed_point(lambda w, h, b: torch.floor(w / 2 + h))  # no derivative but zero
    >>> h = torch.tensor([8.0])
    >>> estimate = metacal.hypergradient(lambda w, h, b: w.sum(), solver, ZerothOrder(num_directions=1, radius=4.0))
    >>> estimate(solver.init(torch.zeros(1), h), h, metacal.repeat(None, 9), None).hparams  # w = 7 at h = 4, 23 at h = 12
    tensor([2.])
    """

    num_directions: int
    radius: float | Tensor = 0.01
    distribution: lanes.Distribution = "rademacher"
    chunk_size: int | None = 1
    derives_steps = True

    def __post_init__(self) -> None:
        _checks.whole("num_directions", self.num_directions)
        lanes.check_radius(self.radius)
        lanes.check_distribution(self.distribution)
        lanes.check_chunk_size(self.chunk_size)

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        noise, bad = _random.noise(state.params), FirstBad()
        final = advance(solver, state, hparams, batches, 0, len(batches), bad)
        if not tree.num_elements(hparams):
            return final, lambda ct: Cotangents((), hparams, {"first_bad_step": bad.step()})
        lanes.real("ZerothOrder", hparams)
        u = lanes.directions(hparams, self.num_directions, self.distribution)

        def end(hparams: Tree) -> Tree:
            _random.restore(noise)
            return advance(solver, state, hparams, batches, 0, len(batches)).params

        def pullback(ct: Tree) -> Cotangents:
            def slope(u: Tree) -> tuple[Tensor, Tree]:
                ahead, behind = end(tree.axpy(self.radius, u, hparams)), end(tree.axpy(-self.radius, u, hparams))
                return tree.vdot(ct, tree.sub(ahead, behind)) / (2 * self.radius), ()

            with _random.preserved(state.params):
                slopes, _ = lanes.over(slope, u, self.chunk_size, state.params)
            d_hparams, stats = lanes.average(slopes, u)
            return Cotangents((), d_hparams, {"first_bad_step": bad.step(), **stats})

        return final, pullback

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        """One central difference along the tangent, ``radius`` long in the norm of params and hparams together."""
        noise, eps = _random.noise(state.params), self.radius / nonzero(tree.norm((d_params, d_hparams)))

        def end(shift: Tensor) -> Tree:
            _random.restore(noise)
            params, h = tree.axpy(shift, (d_params, d_hparams), (state.params, hparams))
            return advance(solver, state._replace(params=params), h, batches, 0, len(batches)).params

        return tree.scale(1 / (2 * eps), tree.sub(end(eps), end(-eps)))
