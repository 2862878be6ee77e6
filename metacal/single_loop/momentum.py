"""MRBO and SUSTAIN: a recursive momentum for the params and one for the hparams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metacal import _checks, _random, tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, fraction, layout, now, positive
from metacal.single_loop._objectives import Objectives, Outer, objectives
from metacal.single_loop.neumann import sampled, series, truncation


def mrbo(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    step_size: Hyperparameter,
    *,
    num_products: int = 10,
    inner_weight: Hyperparameter = 0.5,
    outer_weight: Hyperparameter = 0.5,
) -> BilevelOptimizer:
    """Moves the params and the hparams together, each along a momentum that subtracts the same batch's estimate at the last point.

    ``d_w <- g_w(new) + (1 - beta) (d_w - g_w(old))`` and ``d_h <- F(new) + (1 - eta) (d_h - F(old))``, with beta = ``inner_weight``, eta =
    ``outer_weight``, ``F = f_h - g_hw v`` and v :func:`stocbio`'s Neumann series; new is ``(w_t, h_t)``, old ``(w_{t-1}, h_{t-1})``,
    and both see the same batches and noise. The first d_w and d_h are the plain estimates. Old point and both momenta are kept in
    ``state.adjoint``.

    Batches: ``inner_batches`` holds one for both g_w, then ``num_products`` for the factors of the series, then one for both ``g_hw v``;
    the outer batch serves f_w and f_h at both points.
    Cost of a step with K = ``num_products``: two inner gradients, 2 (K + 1) products, two outer gradients. Memory: two copies of the
    params and two of the hparams beside the inner state. Not estimated: what depends on the path.
    Bias: :func:`stocbio`'s at the moving point, and the momenta's lag.
    Stats: ``first_bad_step``, ``gradient_norm`` (of the new g_w), ``linear_residual`` (as in :func:`stocbio`), ``direct_share``,
    ``num_products``, at the new point; ``hparams`` of the hypergradient is d_h.

    Args:
        outer, solver, optimizer, step_size, num_products: as for :func:`stocbio`.
        inner_weight, outer_weight: in (0, 1], the weight of the new estimate; 1 is no momentum. The paper's fall as t^(-2/3):
            ``lambda t: min(1, c) / (1 + t) ** (2 / 3)``.

    Errors: those of :func:`stocbio`; a weight outside (0, 1].

    Source: Yang, Ji & Liang 2021 (arXiv 2106.04692), algorithm 1.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.mrbo(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1), 0.4, num_products=3)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 1 + 3 + 1), None)] * 40): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    _checks.whole("num_products", num_products, at_least=0)

    def inverse(both: Objectives, a: float | Tensor) -> _Inverse:
        return lambda inner, h, batches, b: (*series(both, inner, h, batches, b, a), num_products)

    return _double_momentum(outer, solver, optimizer, step_size, num_products, inner_weight, outer_weight, inverse)


def sustain(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    step_size: Hyperparameter,
    *,
    num_terms: int = 10,
    inner_weight: Hyperparameter = 0.5,
    outer_weight: Hyperparameter = 0.5,
) -> BilevelOptimizer:
    """:func:`mrbo`'s two momenta with :func:`ttsa`'s randomly truncated series, the same p at both points.

    Batches: ``inner_batches`` holds one for both g_w, then ``num_terms - 1`` for the factors (the first p are used), then one for both
    ``g_hw v``; the outer batch serves f_w and f_h at both points. p is drawn as in :func:`ttsa`.
    Cost of a step: two inner gradients, 2 (p + 1) products, two outer gradients; p is (K - 1) / 2 on average, K = ``num_terms``.
    Memory: two copies of the params and two of the hparams. Not estimated: what depends on the path.
    Bias: :func:`ttsa`'s at the moving point, and the momenta's lag.
    Stats: those of :func:`mrbo` without ``linear_residual``.

    Args:
        outer, solver, optimizer, step_size, num_terms: as for :func:`ttsa`.
        inner_weight, outer_weight: as for :func:`mrbo`.

    Errors: those of :func:`mrbo`.

    Source: Khanduri et al. 2021 (arXiv 2102.07367), algorithm 1.

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.sustain(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.05), 0.4, num_terms=2)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 1 + 1 + 1), None)] * 100): pass
    >>> state.hparams.round(decimals=2)
    tensor([3.])
    """
    _checks.whole("num_terms", num_terms)

    def inverse(both: Objectives, a: float | Tensor) -> _Inverse:
        p = truncation(num_terms)
        return lambda inner, h, batches, b: (sampled(both, inner, h, batches[:p], b, a, num_terms), None, p)

    return _double_momentum(outer, solver, optimizer, step_size, num_terms - 1, inner_weight, outer_weight, inverse)


def recursive(state: BilevelState, weight: float | Tensor, new: Tree, momentum: Tree, old: Tree) -> Tree:
    """STORM: ``new + (1 - weight) (momentum - old)``, and ``new`` at the first step (Cutkosky & Orabona 2019, arXiv 1905.10018)."""
    keep = tree.map(lambda n: (1 - weight) * (state.step > 0).to(n.dtype), new)
    return tree.map(lambda n, k, m, o: (n + k * (m - o)).to(n.dtype), new, keep, momentum, old)


_Inverse = Callable[[InnerState, Tree, Sequence[Tree], Tree], tuple[Tree, "Tensor | None", int]]
"""``(inner, hparams, batches, b) -> (about g_ww^-1 b, its residual if known, products)``."""


class _Estimate(NamedTuple):
    gradient: Tree
    carry: Tree
    hypergradient: Tree
    outer: Outer
    stats: dict[str, Tensor]


def _double_momentum(
    outer: Any,
    solver: InnerSolver,
    optimizer: OptimizerLike,
    step_size: Hyperparameter,
    num_factors: int,
    inner_weight: Hyperparameter,
    outer_weight: Hyperparameter,
    inverse: Callable[[Objectives, float | Tensor], _Inverse],
) -> BilevelOptimizer:
    positive("step_size", step_size)
    fraction("inner_weight", inner_weight)
    fraction("outer_weight", outer_weight)
    both = objectives(outer, solver)

    def start(inner: InnerState, h: Tree) -> Tree:
        w = inner.params
        return {"params": w, "hparams": h, "params_direction": tree.zeros_like(w), "direction": tree.zeros_like(h)}

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        (first,), factors, (cross,) = layout(
            batches, ("for the inner step", 1), ("for the factors of the series", num_factors), ("for the mixed products", 1)
        )
        inner, h, memory = state.inner, state.hparams, state.adjoint
        a, beta, eta = now(state, step_size, inner_weight, outer_weight)
        solve = inverse(both, a)

        def estimate(inner: InnerState, h: Tree) -> _Estimate:
            g_w, carry = both.descent.gradient(inner.params, h, first, inner.carry)
            f = both.outer(inner, h, outer_batch)
            v, residual, products = solve(inner, h, factors, f.params)
            Jv = both.products(inner, h, cross, v)[1]
            stats = {"gradient_norm": tree.norm(g_w)} | ({} if residual is None else {"linear_residual": residual})
            stats |= {"direct_share": share(f.hparams, Jv), "num_products": count(2 * (products + 1), v)}
            return _Estimate(g_w, carry, tree.sub(f.hparams, Jv), f, stats)

        noise = _random.noise(inner.params)
        old = estimate(inner._replace(params=memory["params"]), memory["hparams"])
        _random.restore(noise)
        new = estimate(inner, h)

        d_w = recursive(state, beta, new.gradient, memory["params_direction"], old.gradient)
        d_h = recursive(state, eta, new.hypergradient, memory["direction"], old.hypergradient)
        adjoint = {"params": inner.params, "hparams": h, "params_direction": d_w, "direction": d_h}
        inner = both.follow(inner, h, d_w, new.carry)
        bad.look(0, inner.params)
        return Move(inner, adjoint, d_h, new.outer, new.stats)

    return algorithm(solver, optimizer, start, move)
