"""F2SA and its higher orders: the hypergradient as a finite difference of a value function, from gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import factorial
from typing import Any

from metacal import _random, tree
from metacal._typing import Tree
from metacal.bilevel import BilevelOptimizer, BilevelState
from metacal.estimate import share
from metacal.inner import FirstBad, InnerSolver, InnerState
from metacal.linear.base import count
from metacal.optim import OptimizerLike
from metacal.optim.transformation import Hyperparameter
from metacal.single_loop._frame import Move, algorithm, layout, now, positive
from metacal.single_loop._objectives import objectives


def f2sa(outer: Any, solver: InnerSolver, optimizer: OptimizerLike, penalty: Hyperparameter, *, order: int = 1) -> BilevelOptimizer:
    """First-order bi-level descent: copies of the params follow ``g + j nu f``, nu = 1 / ``penalty``, and the hparams their difference.

    With ``y_j = argmin g + j nu f`` the value ``l(nu) = min (g + nu f)`` has ``dl/dnu = f``, so that the hypergradient is the derivative at
    0 of ``nu -> (g_h + nu f_h)(y_nu)``, and a stencil of it is ``sum_j c_j (g_h(y_j) / nu + j f_h(y_j))``. ``order=1`` is F2SA: j = 0, 1,
    that is ``f_h(y) + penalty (g_h(y) - g_h(z))``; ``order=2`` the central difference, j = -1, 1; any even p takes p copies.
    ``state.inner`` is y_1, at which ``value`` and the outer gradient are taken; the other copies (for order 1: z) are inner states in
    ``state.adjoint``. Every copy has its own optimizer state.

    Batches: ``inner_batches`` holds T >= 1, one per inner step and for all copies (the paper draws one for each; the same one takes
    noise out of the difference), then one for all ``g_h``. The outer batch serves every f_w and f_h. All copies see one realisation
    of noise.
    Cost of a step with n copies, m of them with j != 0: (T + 1) n inner and (T + 1) m outer gradients; no products. F2SA: n = 2, m = 1;
    order p: n = m = p. Memory: n - 1 inner states beside the inner one; one step's activations, first order. Not estimated: what
    depends on the path.
    Bias: with exact copies O(nu^order). Copies that are delta away from their solutions add O(delta / nu), and rounding
    O(eps / nu): a large penalty wants many inner steps.
    Stats: ``first_bad_step``, ``gradient_norm`` (of ``g_w + nu f_w`` before y_1's last step), ``penalty``, ``direct_share`` (of the
    terms in f_h), ``num_products`` (0).

    Args:
        outer: the outer objective.
        solver: a :func:`metacal.descent`; its optimizer moves every copy along ``g_w + j nu f_w``: the paper's step
            ``alpha (f_w + penalty g_w)`` is its ``alpha penalty`` times this gradient.
        optimizer: moves the hparams.
        penalty: lambda = 1 / nu: a number, a 0-dim tensor, or a schedule of the outer step (the paper's grows:
            ``lambda t: first + rate * t``). ``g + j nu f`` should keep a minimiser for every j of the stencil.
        order: 1, or an even number.

    Errors: a solver without ``descent`` or with weight decay inside its optimizer, a penalty that is not positive, an odd order
    above 1, too few batches.

    Source: Kwon, Kwon, Wright & Nowak 2023 (arXiv 2301.10945), algorithm 1; Chen, Li, Chayti & Zhang 2026 (arXiv 2509.02937).

    >>> import torch, metacal
    >>> from metacal import optim, single_loop
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.4))
    >>> opt = single_loop.f2sa(lambda w, h, b: ((w - 3) ** 2).sum(), solver, optim.sgd(0.1), penalty=100.0, order=2)
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 5 + 1), None)] * 60): pass
    >>> state.hparams.round(decimals=2)
    tensor([3.])
    """
    positive("penalty", penalty)
    weights = stencil(order)
    both = objectives(outer, solver)

    def start(inner: InnerState, h: Tree) -> Tree:
        return {_name(j): inner for j in weights if j != 1}

    def move(state: BilevelState, batches: Sequence[Tree], outer_batch: Tree, bad: FirstBad) -> Move:
        steps, (last,) = layout(batches, ("per inner step", None), ("for the hypergradient", 1))
        h = state.hparams
        (lam,) = now(state, penalty)
        copies = {j: state.inner if j == 1 else state.adjoint[_name(j)] for j in weights}

        for t, batch in enumerate(steps):
            noise = _random.noise(h, copies)
            for j, y in copies.items():
                _random.restore(noise)
                gradient, carry = both.descent.gradient(y.params, h, batch, y.carry)
                if j:
                    gradient = tree.axpy(j / lam, both.outer_params(y, h, outer_batch), gradient)
                copies[j] = both.follow(y, h, gradient, carry)
                if j == 1:
                    size = tree.norm(gradient)
            bad.look(t, [y.params for y in copies.values()])

        noise = _random.noise(h, copies)
        direct, indirect = [], []
        for j, y in copies.items():
            _random.restore(noise)
            indirect.append(tree.scale(weights[j] * lam, both.inner(y, h, last).hparams))
            if j:
                f_j = both.outer(y, h, outer_batch)
                direct.append(tree.scale(weights[j] * j, f_j.hparams))
            if j == 1:
                f = f_j
        f_part, g_part = tree.map(lambda *xs: sum(xs), *direct), tree.map(lambda *xs: sum(xs), *indirect)
        stats = {
            "gradient_norm": size,
            "penalty": count(0, h) + lam,
            "direct_share": share(f_part, g_part),
            "num_products": count(0, h),
        }
        adjoint = {_name(j): y for j, y in copies.items() if j != 1}
        return Move(copies[1], adjoint, tree.add(f_part, g_part), f, stats)

    return algorithm(solver, optimizer, start, move)


def stencil(order: int) -> dict[int, float]:
    """The weights c_j of ``sum_j c_j l(j nu) / nu``, the derivative of l at 0 up to O(nu^order); j = 1 comes last.

    >>> stencil(1), stencil(2)
    ({0: -1.0, 1: 1.0}, {-1: -0.5, 1: 0.5})
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1 or (order > 1 and order % 2):
        raise ValueError(f"`order` should be 1 (F2SA) or an even number (2 is the central difference), got {order!r}.")
    if order == 1:
        return {0: -1.0, 1: 1.0}
    half = order // 2
    weights: dict[int, float] = {}
    for j in range(half, 0, -1):
        c = float(Fraction((-1) ** (j + 1) * factorial(half) ** 2, j * factorial(half + j) * factorial(half - j)))
        weights |= {-j: -c, j: c}
    return weights


def _name(j: int) -> str:
    return f"y{j}"
