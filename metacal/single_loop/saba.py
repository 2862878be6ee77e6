"""SABA: SOBA with the SAGA correction of each of its five estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metacal import _checks, tree
from metacal._typing import Tree
from metacal.adjoints import lanes
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count, relative
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import objectives


def saba(
    outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter, *, num_inner: int, num_outer: int
) -> BilevelOptimizer:
    """SOBA over a fixed set of batches, remembering for each the last of every estimate: the noise goes to zero at the solution.

    Each of g_w, g_ww v, g_hw v (a table of ``num_inner`` rows) and f_w, f_h (``num_outer`` rows) is replaced by
    ``new - table[i] + mean(table)``, then the row is overwritten. Tables start at zero. With one batch of each it is SOBA.

    Batches: ``inner_batches`` is ``[(i, batch)]`` and ``outer_batch`` is ``(j, batch)``; the indices are integers or 0-dim integer
    tensors and always name the same batch. i and j should be drawn uniformly and independently.
    Cost of a step: SOBA's (one inner gradient, one product, one outer gradient) and one pass over the tables. Memory:
    ``num_inner (2 |w| + |h|) + num_outer (|w| + |h|)`` numbers beside v. Not estimated: what depends on the path.
    Bias: SOBA's; none from the tables, whatever they hold. A constant step size converges.
    Stats: those of :func:`soba`, of the corrected estimates.

    Args:
        outer, solver, optimizer, step_size: as for :func:`soba`.
        num_inner: how many inner batches there are.
        num_outer: how many outer batches there are.

    Errors: those of :func:`soba`; batches without an index, or with one out of range (of an integer: before the step).

    Source: Dagréou, Ablin, Vaiter & Moreau 2022 (arXiv 2201.13409); SAGA: Defazio et al. 2014 (arXiv 1407.0202).

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h - b) ** 2).sum(), optim.sgd(0.2))
    >>> opt = single_loop.saba(lambda w, h, b: ((w - b) ** 2).sum(), solver, optim.sgd(0.15), 0.3, num_inner=2, num_outer=1)
    >>> state, inner = opt.init(torch.zeros(1), torch.zeros(1)), [(0, torch.tensor(1.0)), (1, torch.tensor(-1.0))]
    >>> data = [([inner[t % 2]], (0, torch.tensor(3.0))) for t in range(120)]
    >>> for state, hg in metacal.iterate(opt, state, data): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    _checks.whole("num_inner", num_inner)
    _checks.whole("num_outer", num_outer)
    both = objectives(outer, solver)

    def start(inner: InnerState, h: Tree) -> Tree:
        w = inner.params
        return {"v": tree.zeros_like(w), "inner": lanes.zeros(num_inner, (w, w, h)), "outer": lanes.zeros(num_outer, (w, h))}

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        ((pair,),) = layout(batches, ("(index, batch)", 1))
        i, batch = _indexed("inner_batches[0]", pair, num_inner)
        j, outer_batch = _indexed("outer_batch", outer_batch, num_outer)
        inner, h, v = state.inner, state.hparams, state.adjoint["v"]
        (rho,) = now(state, step_size)
        g = both.linear(inner, h, batch, v)
        f = both.outer(inner, h, outer_batch)
        (g_w, Hv, Jv), inner_table = _saga(state.adjoint["inner"], i, (g.gradient, g.Hv, g.Jv))
        (f_w, f_h), outer_table = _saga(state.adjoint["outer"], j, (f.params, f.hparams))
        residual = tree.sub(Hv, f_w)
        stats = {
            "gradient_norm": tree.norm(g_w),
            "linear_residual": relative(residual, f_w),
            "direct_share": share(f_h, Jv),
            "num_products": count(1, v),
        }
        adjoint = {"v": tree.axpy(-rho, residual, v), "inner": inner_table, "outer": outer_table}
        return Move(both.follow(inner, h, g_w, g.carry), adjoint, tree.sub(f_h, Jv), f, stats)

    return algorithm(solver, optimizer, start, move)


def _saga(table: Tree, i: Tensor, new: Tree) -> tuple[Tree, Tree]:
    """``new - table[i] + mean(table)``, and the table with row i replaced."""
    # By index_select and index_copy: x[i] with a 0-dim tensor would ask the host, and a write in place would not be a function.
    corrected = tree.map(lambda x, rows: x - rows.index_select(0, i.to(rows.device)).squeeze(0) + rows.mean(0), new, table)
    return corrected, tree.map(lambda x, rows: rows.index_copy(0, i.to(rows.device), x[None]), new, table)


def _indexed(name: str, pair: Any, length: int) -> tuple[Tensor, Tree]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"`{name}` should be a pair (index, batch): the table has one row per batch. Got {type(pair).__name__}.")
    index, batch = pair
    if isinstance(index, int) and not isinstance(index, bool):
        if not 0 <= index < length:
            raise ValueError(f"`{name}` should have an index in 0 ... {length - 1}, got {index}. Check `num_inner` and `num_outer`.")
        return torch.tensor([index]), batch
    if not isinstance(index, Tensor) or index.ndim or tree.is_floating(index):
        got = f"a tensor of shape {tuple(index.shape)}, {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"`{name}` should start with an index, an integer or a 0-dim integer tensor; got {got}.")
    return index.reshape(1).long(), batch
