"""SOBA: one step on each of three variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metacal import tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver
from metacal.linear.base import count, relative
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import objectives


def soba(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter) -> BilevelOptimizer:
    """Moves the params, the linear variable v and the hparams together, each by one step from the same point.

    ``w`` follows ``g_w``, ``v`` follows ``g_ww v - f_w`` with ``step_size``, ``h`` follows ``f_h - g_hw v``, all at the old
    ``(w, v, h)``. v starts at zero and is kept in ``state.adjoint``.

    Batches: one inner batch serves g_w and both products (one realisation of noise), the outer batch f_w and f_h.
    Cost of a step: one inner gradient, one product, one outer gradient. Memory: one copy of the params beside the inner state,
    one step's activations. Not estimated: what depends on the path (learned rates of the inner optimizer).
    Bias: none at ``w = w*(h)``, ``v = g_ww^-1 f_w``; away from it of the order of both distances.
    Stats: ``first_bad_step``, ``gradient_norm`` (of g_w), ``linear_residual`` (``|g_ww v - f_w| / |f_w|``), ``direct_share``,
    ``num_products``, all at the old point; so is ``value``.

    Args:
        outer: the outer objective.
        solver: a :func:`metacal.descent`; its optimizer moves the params.
        optimizer: moves the hparams.
        step_size: of v: a number below 2 / (largest eigenvalue of g_ww), a 0-dim tensor, or a schedule of the outer step.

    Errors: a solver without ``descent`` or with weight decay inside its optimizer, a step size that is not positive, another
    number of batches.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409).

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.soba(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1), step_size=0.4)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [([None], None)] * 60): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        ((batch,),) = layout(batches, ("for all three directions", 1))
        inner, h, v = state.inner, state.hparams, state.adjoint
        (rho,) = now(state, step_size)
        g = both.linear(inner, h, batch, v)
        f = both.outer(inner, h, outer_batch)
        residual = tree.sub(g.Hv, f.params)
        stats = {
            "gradient_norm": tree.norm(g.gradient),
            "linear_residual": relative(residual, f.params),
            "direct_share": share(f.hparams, g.Jv),
            "num_products": count(1, v),
        }
        inner = both.follow(inner, h, g.gradient, g.carry)
        return Move(inner, tree.axpy(-rho, residual, v), tree.sub(f.hparams, g.Jv), f, stats)

    return algorithm(solver, optimizer, lambda inner, h: tree.zeros_like(inner.params), move)
