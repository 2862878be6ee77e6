"""Evolution strategies over truncated unrolls: particles that train with perturbed hyperparameters, and no derivative at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, derivatives, optim, tree
from metacal._objective import value_and_aux
from metacal._typing import Tree
from metacal.adjoints import lanes
from metacal.batches import constant
from metacal.bilevel import BilevelOptimizer, BilevelState, framed
from metacal.estimate import HyperGradient
from metacal.inner import FirstBad, InnerSolver, InnerState, advance
from metacal.optim import OptimizerLike


class Particles(NamedTuple):
    """What the particles have beside their inner states.

    Attributes:
        start: the inner state from which every particle begins, and begins again.
        perturbation: for every pair the sum of its directions since, in units of the radius.
    """

    start: InnerState
    perturbation: Tree


def pes(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    num_particles: int,
    radius: float | Tensor,
    *,
    unrolls: int | None = None,
    distribution: lanes.Distribution = "gaussian",
    chunk_size: int | None = 1,
) -> BilevelOptimizer:
    """Persistent evolution strategies: an unbiased hypergradient of every truncated unroll, with the whole past in it.

    Particles come in N pairs. In an outer step each pair draws a direction u, its halves go on training from where they are with
    ``h + radius u`` and ``h - radius u`` on the inner batches, and the outer objective judges both: L+ and L-. With ``xi`` the sum
    of the pair's directions since its start, of this and of all unrolls before, the hypergradient is the mean over pairs of
    ``xi (L+ - L-) / (2 radius)``: the directions of the past carry what the hyperparameters did then.

    Work: ``num_particles`` plain steps per inner step and as many outer objectives. Memory: ``num_particles`` inner states, and N
    perturbations; independent of the number of steps. Bias: none for the Gaussian-smoothed objective of hyperparameters at rest,
    ``O(radius^2)`` from the smoothing; hyperparameters that move leave a trace of their former values. The variance grows with the
    number of unrolls since the start. Nothing is differentiated: inner steps and outer objective may be any functions (the
    outer one receives the perturbed hyperparameters, so that its direct part is in the estimate).

    ``inner_batches`` of a step are one unroll, shared by all particles, as is the noise drawn inside; directions are drawn from
    torch's default generator first. In ``BilevelState``, ``inner`` holds the particles' states along a first axis (the first half of
    it with +u, the second with -u) and ``adjoint`` a :class:`Particles`. ``HyperGradient``: ``value`` and ``aux`` are means over
    particles, ``state`` is theirs at the end of the unroll, ``params`` is ``()``; ``stats``: ``first_bad_step`` of the earliest
    particle, ``standard_error`` of the estimate, relative to its norm (NaN for one pair).

    Args:
        outer: ``(params, hparams, batch) -> scalar``, differentiable or not.
        optimizer: moves the hyperparameters.
        num_particles: 2N, even.
        radius: standard deviation of the perturbation of every hyperparameter.
        unrolls: how many outer steps an inner problem lasts; then all particles begin again. None: it never ends.
        distribution: "gaussian", or "rademacher" (signs).
        chunk_size: particles run together under vmap; None: all. One at a time (the default) needs no vmap.

    Source: Vicol, Metz & Sohl-Dickstein 2021 (arXiv 2112.13835).

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> wrong = lambda w, h, b: torch.round((w - 3).abs() * 10).sum()  # its derivative is zero
    >>> opt = pes(wrong, solver, metacal.optim.sgd(0.01), num_particles=8, radius=0.1, unrolls=2)
    >>> _ = torch.manual_seed(0)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 5), None)] * 100): pass
    >>> bool((state.hparams - 3).abs() < 0.3)
    True
    """
    return _evolution(outer, solver, optimizer, num_particles, radius, unrolls, distribution, chunk_size, persistent=True)


def es(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    num_particles: int,
    radius: float | Tensor,
    *,
    unrolls: int | None = None,
    distribution: lanes.Distribution = "gaussian",
    chunk_size: int | None = 1,
) -> BilevelOptimizer:
    """Evolution strategies on truncated unrolls: :func:`pes` without its memory, hence with a smaller variance and a bias.

    The hypergradient is the mean over pairs of ``u (L+ - L-) / (2 radius)`` with the directions of this unroll alone: in expectation
    the derivative by what the hyperparameters do in *this* unroll, the states at its beginning taken for constants. That is the
    bias of truncated unrolling; with ``unrolls=1`` there is none. Everything else is as in :func:`pes`.

    Source: Salimans et al. 2017 (arXiv 1703.03864); Vicol et al. 2021 (arXiv 2112.13835).
    """
    return _evolution(outer, solver, optimizer, num_particles, radius, unrolls, distribution, chunk_size, persistent=False)


def _evolution(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    num_particles: int,
    radius: float | Tensor,
    unrolls: int | None,
    distribution: lanes.Distribution,
    chunk_size: int | None,
    *,
    persistent: bool,
) -> BilevelOptimizer:
    _checks.whole("num_particles", num_particles)
    if num_particles % 2:
        raise ValueError(f"`num_particles` should be even, for particles come in antithetic pairs; got {num_particles}.")
    if unrolls is not None:
        _checks.whole("unrolls", unrolls)
    lanes.check_radius(radius)
    lanes.check_distribution(distribution)
    lanes.check_chunk_size(chunk_size)
    transformation = optim.resolve(optimizer, ())
    pairs = num_particles // 2

    def init(params: Tree, hparams: Tree) -> BilevelState:
        _checks.differentiable_tree("params", params)
        _checks.differentiable_tree("hparams", hparams)
        _checks.one_device(params=params, hparams=hparams)
        if not tree.num_elements(hparams):
            raise ValueError("`hparams` should hold at least one tensor: evolution strategies perturb them, and get to know nothing else.")
        start = solver.init(params, hparams)
        particles = Particles(start, lanes.zeros(pairs, hparams))
        opt_state = transformation.init(hparams)
        return BilevelState(tree.stack([start] * num_particles), hparams, opt_state, particles, torch.tensor(0))

    def step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        _checks.batches(inner_batches)
        if not derivatives.transforming():
            constant("outer_batch", outer_batch)
        inner, hparams, opt_state, (start, xi), t = state

        def train(lane: tuple[InnerState, Tree]) -> tuple[Tree, Tree]:
            inner, u = lane
            h, bad = tree.axpy(radius, u, hparams), FirstBad()
            inner = advance(solver, inner, h, inner_batches, 0, len(inner_batches), bad)
            value, aux = value_and_aux(outer, inner.params, h, outer_batch, inner.carry)
            value, aux = tree.map(lambda x: 1.0 * x, (_checks.scalar("outer", value), aux))  # they may be counts
            return (inner, value, aux, bad.step()), ()

        u = lanes.directions(hparams, pairs, distribution)
        xi = tree.add(xi, u) if persistent else u
        both = tree.map(lambda u: torch.cat([u, -u]), u)
        (inner, L, aux, bad), _ = lanes.over(train, (inner, both), chunk_size, hparams)

        slopes = (L[:pairs] - L[pairs:]) / (2 * radius)
        gradient, stats = lanes.average(slopes, xi)
        stats = {"first_bad_step": _earliest(bad, len(inner_batches)), **stats}
        value, aux = tree.map(lambda x: x.mean(0), (L, aux))
        hg = HyperGradient(value, gradient, (), inner, stats, aux)

        hparams, opt_state = optim.moved(transformation, gradient, opt_state, hparams)
        t = t + 1
        if unrolls is not None:
            ended = t % unrolls == 0
            inner = tree.map(lambda begin, now: torch.where(ended, begin, now), start, inner)
            xi = tree.map(lambda x: torch.where(ended, 0, x), xi)
        return BilevelState(inner, hparams, opt_state, Particles(start, xi), t), hg

    return framed(init, step)


def _earliest(bad: Tensor, num_steps: int) -> Tensor:
    """The smallest of the particles' first bad steps, -1 where none has one."""
    first = torch.where(bad < 0, num_steps, bad).amin(0)
    return torch.where(first == num_steps, -1, first)
