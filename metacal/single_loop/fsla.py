"""FSLA: SOBA's three variables one after the other, and a recursive momentum for the hparams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metacal import _random, tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count, relative
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, fraction, layout, now, positive
from metacal.single_loop._objectives import objectives
from metacal.single_loop.momentum import recursive


def fsla(
    outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter, *, outer_weight: Hyperparameter = 0.5
) -> BilevelOptimizer:
    """One step on the params, one on v at the new params, then one on the hparams along a variance-reduced momentum.

    ``v <- v - step_size (g_ww v - f_w)``; with ``F = f_h - g_hw v`` and eta = ``outer_weight`` the hparams follow
    ``d <- F(new) + (1 - eta) (d - F(old))``, both F on the same batches: new is ``(w_{t+1}, v_{t+1}, h_t)``, old
    ``(w_t, v_t, h_{t-1})``. The first d is F. v (from zero), the last hparams and d are kept in ``state.adjoint``.

    Batches: ``inner_batches`` holds three: for the inner step, for the product of v, for both ``g_hw v``. The outer batch serves f_w
    and both f_h (the paper draws another one for the latter).
    Cost of a step: one inner gradient, three products, two outer gradients. Memory: one copy of the params and two of the hparams
    beside the inner state. Not estimated: what depends on the path.
    Bias: that of the distances of w and v to their solutions, and d's lag, which a small eta makes longer and less noisy.
    Stats: ``first_bad_step``, ``gradient_norm`` (before the inner step), ``linear_residual`` (before the step on v), ``direct_share`` (of
    the new F), ``num_products``. ``hparams`` of the hypergradient is d.

    Args:
        outer, solver, optimizer, step_size: as for :func:`soba`.
        outer_weight: eta in (0, 1], the weight of the new estimate; 1 is no momentum. A schedule is welcome (the paper's: 1 / sqrt(t)).

    Errors: those of :func:`soba`; an ``outer_weight`` outside (0, 1].

    Source: Li, Gu & Huang 2022 (arXiv 2112.04660), algorithm 1.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.fsla(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1), 0.4)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 3), None)] * 60): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    fraction("outer_weight", outer_weight)
    both = objectives(outer, solver)

    def start(inner: InnerState, h: Tree) -> Tree:
        return {"v": tree.zeros_like(inner.params), "hparams": h, "direction": tree.zeros_like(h)}

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, (linear,), (cross,) = layout(batches, ("for the inner step", 1), ("for the product of v", 1), ("for the mixed products", 1))
        h, old, v = state.hparams, state.inner, state.adjoint["v"]
        rho, eta = now(state, step_size, outer_weight)

        inner, g_w = both.descend(old, h, steps, bad)
        noise = _random.noise(inner.params)
        f = both.outer(inner, h, outer_batch)
        residual = tree.sub(both.hessian(inner, h, linear, v), f.params)
        v_new = tree.axpy(-rho, residual, v)

        between = _random.noise(inner.params)
        Jv = both.products(inner, h, cross, v_new)[1]
        after = _random.noise(inner.params)
        _random.restore(between)
        Jv_old = both.products(old, state.adjoint["hparams"], cross, v)[1]
        _random.restore(noise)
        f_old = both.outer(old, state.adjoint["hparams"], outer_batch)
        _random.restore(after)

        estimate, estimate_old = tree.sub(f.hparams, Jv), tree.sub(f_old.hparams, Jv_old)
        direction = recursive(state, eta, estimate, state.adjoint["direction"], estimate_old)
        stats = {
            "gradient_norm": tree.norm(g_w),
            "linear_residual": relative(residual, f.params),
            "direct_share": share(f.hparams, Jv),
            "num_products": count(3, v),
        }
        return Move(inner, {"v": v_new, "hparams": h, "direction": direction}, direction, f, stats)

    return algorithm(solver, optimizer, start, move)
