"""Implicit differentiation: the derivative of a solution, whatever path led to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metacal import _random, linear, operators, tree
from metacal._typing import Tree
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.adjoints.equation import Equation, Theta, root, solve_linear
from metacal.inner import FirstBad, InnerSolver, InnerState, advance, constant, run


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative of the solution w*(h) of ``residual(w, h) = 0`` by the implicit function theorem.

    ``d_hparams = -F_h^T v`` with ``(F_w^T + damping I) v = ct`` solved by ``solver``. For a gradient-based inner solver F is the
    gradient of the objective and F_w its Hessian; for any other the transposed Jacobian of ``residual`` is used.

    Cost: the run, ``solver``'s products (three gradients each), one mixed product and one gradient; memory: one step's
    activations, independent of the number of steps. Not estimated: the cotangent of the initial params (``()``), and whatever
    depends on the path (learning rates). The bias is of the order of the distance to the solution. ``stats``:

    - ``residual_norm``: ``|F| |v| / (|ct| |w|)``, the distance to the solution relative to ``|w|``, judged by the curvature
      that the linear solve met along ``v``;
    - ``linear_residual``: relative, of the linear system (NaN for ``Identity``, which solves none); ``num_products``.

    Args:
        solver: how the linear system is solved; ``linear.Identity()`` is T1-T2.
        operator: ``linear.Hessian()`` or ``linear.Jacobian()``.
        damping: added to the diagonal of the system; biased, and the only place where damping lives.
        select: which batches define the system, as a sequence; the last one by default.

    Errors: an optimizer whose fixed points are not the zeros of the residual (weight decay inside it) is refused.

    Source: Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (arXiv 1911.02590); Blondel et al. 2022 (arXiv 2105.15183).
    """

    solver: linear.LinearSolver
    operator: linear.Operator = linear.Hessian()
    damping: float | Tensor = 0.0
    select: Callable[[Sequence[Any]], Sequence[Any]] = linear.last

    def __post_init__(self) -> None:
        if not isinstance(self.solver, linear.LinearSolver):
            raise TypeError(f"`solver` should be a linear solver such as linear.CG(20), got {type(self.solver).__name__}.")

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        keep_graph = operators.attached(hparams)
        bad = FirstBad()
        final = advance(solver, state, hparams, batches, 0, len(batches), bad)
        equation, theta = self._equation(solver, final, hparams, batches)
        if keep_graph:
            final = final._replace(params=root(self.solver, equation, theta))
            theta = theta._replace(params=final.params)

        def pullback(ct: Tree) -> Cotangents:
            x0 = memory if self.solver.warm_start and memory is not None and tree.leaves(memory) else None
            with _random.preserved(theta.params):
                v, linear_residual, num_products = solve_linear(self.solver, equation, theta, ct, x0)
                d_hparams = tree.scale(-1.0, equation.pull_hparams(theta, v))
                distance = tree.norm(equation.residual(theta)) * tree.norm(v)
                scale = tree.norm(ct) * tree.norm(theta.params)
            stats = {
                "first_bad_step": bad.step(),
                "residual_norm": distance / torch.where(scale == 0, torch.ones_like(scale), scale),
                "linear_residual": linear_residual,
                "num_products": num_products,
            }
            d_hparams, v, stats = operators.released((d_hparams, v, stats), keep_graph or operators.attached(ct))
            return Cotangents((), d_hparams, stats, v if self.solver.warm_start else ())

        return final, pullback

    def jvp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree
    ) -> Tree:
        equation, theta = self._equation(solver, run(solver, state, hparams, batches), hparams, batches)
        solution = lambda h: root(self.solver, equation, theta._replace(hparams=h))  # noqa: E731
        with _random.preserved(theta.params):
            return operators.func_jvp(solution, (hparams,), (d_hparams,))

    def _equation(self, solver: InnerSolver, final: InnerState, hparams: Tree, batches: Sequence[Tree]) -> tuple[Equation, Theta]:
        _refuse_moving_fixed_points(solver, final.params, hparams)
        if not len(batches):
            raise ValueError("`batches` should hold at least one batch: it defines the linear system. Pass [batch].")
        selected = self.select(batches)
        chosen = [selected[i] for i in range(len(selected))]
        if not operators.transforming():
            constant("batches", chosen)
        operator = self.operator if solver.descent is not None else linear.Jacobian()
        return Equation(solver, operator, self.damping, _random.noise(final.params)), Theta(final.params, hparams, final.carry, chosen)


def _refuse_moving_fixed_points(solver: InnerSolver, params: Tree, hparams: Tree) -> None:
    if solver.descent is None:
        return
    ones = tree.map(torch.ones_like, tree.detach(params))
    moved, _ = solver.descent.update(tree.zeros_like(ones), ones, solver.init(ones, hparams).opt_state, hparams)
    if any(bool((torch.func.debug_unwrap(w) != 1).any()) for w in tree.leaves(moved)):
        raise ValueError(
            "`solver`'s optimizer moves the params even where the gradient is zero (weight decay inside the optimizer), so it does not "
            "stop where Implicit assumes and the hypergradient would be wrong by tens of percent. Put the L2 term in the objective "
            "(+ weight_decay / 2 * |w|^2), or use Unrolled."
        )
