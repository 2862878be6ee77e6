"""AmIGO: warm-started steps on the params and on the linear variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metacal import _checks, tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver
from metacal.linear.base import count, relative
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import objectives


def amigo(
    outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter, *, num_linear_steps: int = 10
) -> BilevelOptimizer:
    """Inner steps from the last params, then gradient steps on ``v g_ww v / 2 - f_w v`` from the last v, then one on the hparams.

    ``v <- v - step_size (g_ww v - f_w)``, ``num_linear_steps`` times at the new params; ``h`` follows ``f_h - g_hw v``. v starts at
    zero and is kept in ``state.adjoint``: warm starts are what lets a fixed number of steps follow the moving solution.

    Batches: ``inner_batches`` holds one per inner step (at least one), then ``num_linear_steps`` for the products of v (a new one each),
    then one for ``g_hw v``; the outer batch serves f_w and f_h.
    Cost of a step, T inner steps and N = ``num_linear_steps``: T inner gradients, N + 1 products, one outer gradient. Memory: one
    copy of the params, one step's activations. Not estimated: what depends on the path.
    Bias: of the order of the distances of w and v to the solutions.
    Stats: ``first_bad_step``, ``gradient_norm`` (before the last inner step), ``linear_residual`` (before the last step on v),
    ``direct_share``, ``num_products``. ``value`` is that at the new params.

    Args:
        outer, solver, optimizer, step_size: as for :func:`soba`.
        num_linear_steps: steps on v per outer step.

    Errors: those of :func:`soba`; too few batches.

    Source: Arbel & Mairal 2022 (arXiv 2111.14580), algorithm 1.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.amigo(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.2), 0.4, num_linear_steps=2)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 2 + 2 + 1), None)] * 40): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    _checks.whole("num_linear_steps", num_linear_steps)
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, linear, (cross,) = layout(
            batches, ("per inner step", None), ("for the products of v", num_linear_steps), ("for the mixed product", 1)
        )
        h, v = state.hparams, state.adjoint
        (rho,) = now(state, step_size)
        inner, g_w = both.descend(state.inner, h, steps, bad)
        f = both.outer(inner, h, outer_batch)
        for batch in linear:
            residual = tree.sub(both.hessian(inner, h, batch, v), f.params)
            v = tree.axpy(-rho, residual, v)
        Jv = both.products(inner, h, cross, v)[1]
        stats = {
            "gradient_norm": tree.norm(g_w),
            "linear_residual": relative(residual, f.params),
            "direct_share": share(f.hparams, Jv),
            "num_products": count(num_linear_steps + 1, v),
        }
        return Move(inner, v, tree.sub(f.hparams, Jv), f, stats)

    return algorithm(solver, optimizer, lambda inner, h: tree.zeros_like(inner.params), move)
