"""BOME, PBGD and ScaleBiO: descent on the outer objective and a penalty on the inner value gap ``q = g(w, h) - min_u g(u, h)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal import _random, tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import Inner, Objectives, Outer, objectives


def bome(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, *, eta: Hyperparameter = 0.5) -> BilevelOptimizer:
    """Descends on f jointly in (params, hparams), with just as much of the value gap's gradient as makes the gap fall.

    A copy takes T inner steps from the params to ``w^T``; with ``q = g(w, h) - g(w^T, h)`` (w^T a constant) both variables follow
    ``f' + lambda q'``, ``lambda = max(eta |q'|^2 - <f', q'>, 0) / |q'|^2``, primes over (w, h): the nearest vector to f' along which q
    decreases by ``eta |q'|^2``. Where q' = 0, lambda is 0.

    ``optimizer`` moves the pair (params, hparams); the solver's optimizer only makes the T steps, each time from its initial state.
    Batches: ``inner_batches`` holds T >= 1, one per inner step of the copy, then one for q at both points. The outer batch serves f.
    (The paper uses full batches: lambda is a ratio, so noise biases it.)
    Cost of a step: T + 2 inner gradients, one outer gradient, no products. Memory: two inner states during the step, none kept.
    Not estimated: what depends on the path. ``hparams`` of the hypergradient is the hparams' part of the direction.
    Bias: the direction is no estimate of the hypergradient at one point; its limit points are stationary where the copy's distance to
    the solution vanishes. lambda grows without bound on the way, so the convergence is sublinear.
    Stats: ``first_bad_step``, ``gradient_norm`` (of g_w), ``value_gap`` (q), ``penalty`` (lambda), ``direct_share``, ``num_products`` (0).

    Args:
        outer: the outer objective.
        solver: a :func:`metacal.descent`, for the copy's steps.
        optimizer: moves (params, hparams) together: for adaptive ones both have the same rates.
        eta: how fast the gap should fall: a positive number, a 0-dim tensor, or a schedule of the outer step.

    Errors: a solver without ``descent`` or with weight decay inside its optimizer, an ``eta`` that is not positive, fewer than two batches.

    Source: Liu, Ye, Wright, Stone & Liu 2022 (arXiv 2209.08709), algorithm 1 with phi = eta |q'|^2.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.bome(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1))
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 10 + 1), None)] * 80): pass
    >>> bool((state.hparams - 3).abs() < 0.05)
    True
    """
    positive("eta", eta)

    def weight(state: BilevelState, f: Outer, q: _Gap) -> Tensor:
        (fall,) = now(state, eta)
        qq = tree.vdot(q.gradient, q.gradient)
        needed = fall * qq - tree.vdot((f.params, f.hparams), q.gradient)
        return torch.where(qq == 0, 0.0, needed.clamp(min=0) / nonzero(qq))

    return _gap_descent(outer, solver, optimizer, weight)


def pbgd(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, penalty: Hyperparameter) -> BilevelOptimizer:
    """Gradient descent on ``f + penalty q`` jointly in (params, hparams), q the value gap to a copy after T inner steps.

    The copy starts at the params and ends at ``w^T``; then ``w`` follows ``f_w + penalty g_w(w)`` and ``h`` follows
    ``f_h + penalty (g_h(w) - g_h(w^T))``. :func:`bome` with a fixed lambda.

    ``optimizer`` moves the pair (params, hparams): its rate should be below 2 / (penalty times the largest eigenvalue of g_ww).
    The solver's optimizer only makes the T steps, each time from its initial state.
    Batches: ``inner_batches`` holds T >= 1, one per inner step of the copy, then one for q at both points. The outer batch serves f.
    Cost of a step: T + 2 inner gradients, one outer gradient, no products. Memory: two inner states during the step, none kept.
    Not estimated: what depends on the path. ``hparams`` of the hypergradient is the hparams' part of the direction.
    Bias: O(1 / penalty), :func:`f2sa`'s of order 1, where w minimises ``f + penalty g`` and the copy g.
    Stats: those of :func:`bome`.

    Args:
        outer, solver, optimizer: as for :func:`bome`.
        penalty: a positive number, a 0-dim tensor, or a schedule of the outer step.

    Errors: those of :func:`bome`, of ``penalty``.

    Source: Shen & Chen 2023 (arXiv 2302.05185), the algorithm with the value-gap penalty (V-PBGD), without constraints.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.pbgd(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1), penalty=2.0)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 5 + 1), None)] * 100): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("penalty", penalty)

    def weight(state: BilevelState, f: Outer, q: _Gap) -> Tensor:
        return count(0, state.hparams) + now(state, penalty)[0]

    return _gap_descent(outer, solver, optimizer, weight)


def scalebio(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, penalty: Hyperparameter) -> BilevelOptimizer:
    """The minimax form ``min_{h, w} max_u f(w, h) + penalty (g(w, h) - g(u, h))``: one step on each of three variables.

    From the same point: ``u`` follows ``g_w(u)``, ``w`` follows ``g_w(w) + f_w / penalty``, ``h`` follows
    ``f_h + penalty (g_h(w) - g_h(u))``. :func:`f2sa` of order 1 with all three steps at once, which costs half: every
    backward pass serves two gradients. w is ``state.inner``, u an inner state in ``state.adjoint``; each has its own optimizer state.

    Batches: one inner batch for all four gradients of g (one realisation of noise), the outer batch for f.
    Cost of a step: two inner gradients and one outer gradient, no products. Memory: one inner state beside the inner one, one step's
    activations, first order. Not estimated: what depends on the path.
    Bias: at the solutions in w and u O(1 / penalty), :func:`f2sa`'s of order 1; away from them ``penalty`` times both distances.
    Stats: ``first_bad_step``, ``gradient_norm`` (of g_w(u)), ``value_gap`` (g(w) - g(u)), ``penalty``, ``direct_share``,
    ``num_products`` (0), at the old point.

    Args:
        outer, optimizer: as for :func:`f2sa`.
        solver: a :func:`metacal.descent`; its optimizer moves u and w. The paper's gradients of both are ``penalty`` times these.
        penalty: alpha: a positive number, a 0-dim tensor, or a schedule of the outer step.

    Errors: those of :func:`f2sa`.

    Source: Pan et al. 2024 (arXiv 2406.19976), without its block-wise updates, which are a matter of the inner optimizer.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.3))
    >>> opt = single_loop.scalebio(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.05), penalty=5.0)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [([None], None)] * 150): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("penalty", penalty)
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        ((batch,),) = layout(batches, ("for all gradients", 1))
        w, u, h = state.inner, state.adjoint, state.hparams
        lam = count(0, h) + now(state, penalty)[0]
        q = _gap(both, w, u, h, batch)
        f = both.outer(w, h, outer_batch)
        w = both.follow(w, h, tree.axpy(1 / lam, f.params, q.gradient[0]), q.here.carry)
        u = both.follow(u, h, q.there.params, q.there.carry)
        return Move(w, u, tree.axpy(lam, q.gradient[1], f.hparams), f, _stats(q.there.params, q, lam, f))

    return algorithm(solver, optimizer, lambda inner, h: inner, move)


class _Gap(NamedTuple):
    """``g(w, h) - g(u, h)`` with u a constant: ``gradient`` is by (w, h)."""

    value: Tensor
    gradient: tuple[Tree, Tree]
    here: Inner
    there: Inner


def _gap(both: Objectives, w: InnerState, u: InnerState, h: Tree, batch: Tree) -> _Gap:
    noise = _random.noise(h, w.params)
    there = both.inner(u, h, batch)
    _random.restore(noise)
    here = both.inner(w, h, batch)
    return _Gap(here.value - there.value, (here.params, tree.sub(here.hparams, there.hparams)), here, there)


def _stats(g_w: Tree, q: _Gap, lam: Tensor, f: Outer) -> dict[str, Tensor]:
    return {
        "gradient_norm": tree.norm(g_w),
        "value_gap": q.value,
        "penalty": lam,
        "direct_share": share(f.hparams, tree.scale(lam, q.gradient[1])),
        "num_products": count(0, g_w),
    }


def _gap_descent(
    outer: Any, solver: InnerSolver, optimizer: OptimizerLike, weight: Callable[[BilevelState, Outer, _Gap], Tensor]
) -> BilevelOptimizer:
    """Joint descent on ``f + lambda q`` with ``lambda = weight(state, f, q)``."""
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, (last,) = layout(batches, ("per inner step", None), ("for the value gap", 1))
        inner, h = state.inner, state.hparams
        end, _ = both.descend(inner, h, steps, bad)
        q = _gap(both, inner, end, h, last)
        f = both.outer(inner, h, outer_batch)
        lam = weight(state, f, q)
        direction = tree.axpy(lam, q.gradient, (f.params, f.hparams))
        # The optimizer state stays the initial one, from which every copy starts.
        return Move(inner._replace(carry=q.here.carry), (), direction, f, _stats(q.here.params, q, lam, f))

    return algorithm(solver, optimizer, lambda inner, h: (), move, joint=True)
