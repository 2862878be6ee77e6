"""stocBiO and TTSA: no linear variable is kept; a stochastic Neumann series is summed, or sampled, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metacal import _checks, linear, tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import Objectives, objectives


def stocbio(
    outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter, *, num_products: int = 10
) -> BilevelOptimizer:
    """Inner steps from the last params, then a hypergradient by a Neumann series with a new batch in every factor.

    ``v = a sum_{k=0..K} (I - a g_ww(b_k)) ... (I - a g_ww(b_1)) f_w`` with a = ``step_size`` and K = ``num_products``; ``h`` follows
    ``f_h - g_hw v``. Nothing is kept beside the inner state.

    Batches: ``inner_batches`` holds one per inner step (at least one), then ``num_products`` for the factors, then one for ``g_hw v``; the
    outer batch serves f_w and f_h.
    Cost of a step with T inner steps: T inner gradients, K + 1 products, one outer gradient. Memory: two copies of the params
    while the series is summed. Not estimated: what depends on the path.
    Bias: at ``w = w*(h)`` exactly that of K terms, ``g_hw (I - a H)^{K+1} H^-1 f_w`` with H the mean Hessian (independent batches),
    and the order of the distance to w* elsewhere.
    Stats: ``first_bad_step``, ``gradient_norm`` (before the last inner step), ``linear_residual`` (the last term's size over ``|f_w|``: on
    one and the same batch the residual of the sum one term short), ``direct_share``, ``num_products``.

    Args:
        outer, solver, optimizer: as for :func:`soba`.
        step_size: a of the series: below 2 / (largest eigenvalue of g_ww).
        num_products: K of the series.

    Errors: those of :func:`soba`; too few batches.

    Source: Ji, Yang & Liang 2021 (arXiv 2010.07962), algorithm 2 and algorithm 3.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.stocbio(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.2), 0.4, num_products=5)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 2 + 5 + 1), None)] * 40): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    _checks.whole("num_products", num_products, at_least=0)
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, factors, (cross,) = layout(
            batches, ("per inner step", None), ("for the factors of the series", num_products), ("for the mixed product", 1)
        )
        h = state.hparams
        (a,) = now(state, step_size)
        inner, g_w = both.descend(state.inner, h, steps, bad)
        f = both.outer(inner, h, outer_batch)
        v, last_term = series(both, inner, h, factors, f.params, a)
        Jv = both.products(inner, h, cross, v)[1]
        stats = {
            "gradient_norm": tree.norm(g_w),
            "linear_residual": last_term,
            "direct_share": share(f.hparams, Jv),
            "num_products": count(num_products + 1, v),
        }
        return Move(inner, (), tree.sub(f.hparams, Jv), f, stats)

    return algorithm(solver, optimizer, lambda inner, h: (), move)


def ttsa(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, step_size: Hyperparameter, *, num_terms: int = 10) -> BilevelOptimizer:
    """One inner step, then one outer step on a slower time scale, with a randomly truncated Neumann product.

    ``v = K a (I - a g_ww(b_p)) ... (I - a g_ww(b_1)) f_w`` with a = ``step_size``, K = ``num_terms`` and p uniform on 0 ... K - 1: the
    mean over p is the Neumann sum of K terms, at the price of (K - 1) / 2 products on average. ``h`` follows ``f_h - g_hw v`` at the new
    params. The two time scales are those of the optimizers: the paper's are ``solver = descent(inner, optim.sgd(lambda t: b / (1 +
    t) ** 0.4))`` and ``optim.sgd(lambda t: c / (1 + t) ** 0.6)``. Nothing is kept beside the inner state.

    Batches: ``inner_batches`` holds one for the inner step, then ``num_terms - 1`` for the factors (the first p are used), then one for
    ``g_hw v``; the outer batch serves f_w and f_h. p is drawn from torch's default generator on the host: under
    ``torch.func.vmap`` with ``randomness="same"``, one p for all.
    Cost of a step: one inner gradient, p + 1 products, one outer gradient. Memory: one copy of the params during the step. Not
    estimated: what depends on the path.
    Bias: in the mean over p that of :func:`stocbio` with ``num_products = num_terms - 1``. The variance grows with K.
    Stats: ``first_bad_step``, ``gradient_norm`` (before the inner step), ``direct_share``, ``num_products`` (p + 1).

    Args:
        outer, solver, optimizer: as for :func:`soba`.
        step_size: a of the series: below 2 / (largest eigenvalue of g_ww).
        num_terms: K, the number of terms of the series whose mean is estimated.

    Errors: those of :func:`soba`.

    Source: Hong, Wai, Wang & Yang 2023 (arXiv 2007.05170), algorithm 1; Ghadimi & Wang 2018 (arXiv 1802.02246).

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.ttsa(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.05), 0.4, num_terms=3)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 1 + 2 + 1), None)] * 80): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    positive("step_size", step_size)
    _checks.whole("num_terms", num_terms)
    both = objectives(outer, solver)

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, factors, (cross,) = layout(
            batches, ("for the inner step", 1), ("for the factors of the series", num_terms - 1), ("for the mixed product", 1)
        )
        h = state.hparams
        (a,) = now(state, step_size)
        p = truncation(num_terms)
        inner, g_w = both.descend(state.inner, h, steps, bad)
        f = both.outer(inner, h, outer_batch)
        v = sampled(both, inner, h, factors[:p], f.params, a, num_terms)
        Jv = both.products(inner, h, cross, v)[1]
        stats = {
            "gradient_norm": tree.norm(g_w),
            "direct_share": share(f.hparams, Jv),
            "num_products": count(p + 1, v),
        }
        return Move(inner, (), tree.sub(f.hparams, Jv), f, stats)

    return algorithm(solver, optimizer, lambda inner, h: (), move)


def series(both: Objectives, inner: InnerState, h: Tree, batches: Sequence[Tree], b: Tree, a: float | Tensor) -> tuple[Tree, Tensor]:
    """``a sum_{k=0..K} prod_{i<=k} (I - a g_ww(b_i)) b`` over K batches, and the last term's size over ``|b|``."""
    coming = iter(batches)
    found = linear.Neumann(len(batches), a).solve(lambda v: both.hessian(inner, h, next(coming), v), b)
    return found.value, found.residual_norm


def sampled(both: Objectives, inner: InnerState, h: Tree, batches: Sequence[Tree], b: Tree, a: float | Tensor, num_terms: int) -> Tree:
    """``K a prod_i (I - a g_ww(b_i)) b``: one of the K terms of the series, K times."""
    term = b
    for batch in batches:
        term = tree.axpy(-a, both.hessian(inner, h, batch, term), term)
    return tree.scale(num_terms * a, term)


def truncation(num_terms: int) -> int:
    """p, uniform on 0 ... ``num_terms`` - 1, from torch's default CPU generator."""
    return int(torch.randint(num_terms, ()))
