"""Implicit differentiation: the derivative of a solution, whatever path led to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from metacal import _checks, _random, derivatives, linear, tree
from metacal._safe import wide
from metacal._typing import Tree
from metacal.adjoints.base import Adjoint, Cotangents, Pullback, Select, chosen
from metacal.adjoints.equation import Equation, Theta, root, solve_linear
from metacal.inner import FirstBad, InnerSolver, InnerState, advance, rest, run
from metacal.linear.base import magnitude, relative
from metacal.optim.foreign import moves_at_rest


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative of the solution w*(h) of ``residual(w, h) = 0`` by the implicit function theorem.

    ``d_hparams = -F_h^T v`` with ``(F_w^T + damping I) v = ct`` solved by ``solver``. For a gradient-based inner solver F is the
    gradient of the objective and F_w its Hessian; for any other the transposed Jacobian of ``residual`` is used.

    Cost: the run, a recorded gradient, ``solver``'s products (backward passes through it, one to two gradients each) and one more
    for the hparams; memory: the graph of one gradient, independent of the number of steps. With several batches, compiled, and where
    somebody differentiates, each product records its own, and F is another gradient. Not estimated: the cotangent of the initial
    params (``()``), and whatever depends on the path (learning rates). The bias is of the order of the distance to the solution.
    ``stats``:

    - ``residual_norm``: ``|F| |v| / (|ct| |w|)``, the distance to the solution relative to ``|w|``, judged by the curvature
      that the linear solve met along ``v``;
    - ``linear_residual``: relative, of the linear system (NaN for ``Identity``, which solves none); ``num_products``;
    - ``curvature_min``, ``curvature_max``: the lowest and highest Rayleigh quotient ``<p, A p> / <p, p>`` that the linear solver met
      (NaN where it met none).

    Args:
        solver: how the linear system is solved; ``linear.Identity()`` is T1-T2.
        operator: ``linear.Hessian()``, ``linear.GaussNewton(model, loss)`` or ``linear.Jacobian()``.
        damping: added to the diagonal of the system; biased, and the only place where damping lives.
        select: which batches define the system, as a sequence; the last one by default.
        stochastic: each product reads the next of the selected batches, in a circle, instead of their mean, at the price of one
            batch. For ``linear.Neumann``, whose terms stay unbiased; the mixed product is that of the mean.

    Reads the host twice per estimate: does the optimizer come to rest, and what is there to warn of. Warns, where nobody differentiates
    or transforms the estimate: ``linear.UnreliableHypergradient``, if the linear solver met what more steps do not cure (an indefinite
    matrix, a series that diverges, a singular system; a matrix that is not symmetric under a solver that needs it, looked at by two more
    products where ``linear_residual`` > 1e-3), or if the params or the cotangent are so large that their squares overflow.

    Errors: an optimizer whose fixed points are not the zeros of the residual (weight decay inside it, also one that is learned and
    starts at 0) is refused; so are a solver whose step was replaced and whose residual was not; ``stochastic`` for a solver that needs
    one matrix throughout, and with ``linear.last``, which selects a single batch; complex params; and a second level of forward mode
    (``jacfwd`` of ``jacfwd``), which torch does not let a derivative like this one see.

    Source: Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (arXiv 1911.02590); Blondel et al. 2022 (arXiv 2105.15183).
    """

    solver: linear.LinearSolver
    operator: linear.Operator = linear.Hessian()
    damping: float | Tensor = 0.0
    select: Select = linear.last
    stochastic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, linear.LinearSolver):
            raise TypeError(f"`solver` should be a linear solver such as linear.CG(20), got {type(self.solver).__name__}.")
        if not isinstance(self.operator, linear.Operator):
            raise TypeError(f"`operator` should be a linear.Operator such as linear.Hessian(), got {type(self.operator).__name__}.")
        _checks.number("damping", self.damping, "it is added to the diagonal of the system")
        if not callable(self.select):
            raise TypeError(f"`select` should be a function of the batches such as linear.every, got {self.select!r}.")
        if self.stochastic and not self.solver.stochastic:
            raise ValueError(
                f"`stochastic` gives each product another batch, but linear.{type(self.solver).__name__} needs the same matrix in all of "
                "them. Use linear.Neumann, or stochastic=False for the mean over the batches."
            )
        if self.stochastic and self.select is linear.last:
            raise ValueError("`stochastic` needs several batches to choose from, and `select` takes the last only: pass linear.every.")

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        keep_graph = derivatives.attached(hparams)
        bad = FirstBad()
        final = advance(solver, state, hparams, batches, 0, len(batches), bad)
        equation, theta = self._equation(solver, final, hparams, batches)
        if keep_graph:
            final = final._replace(params=root(self.solver, equation, theta))
            theta = theta._replace(params=final.params)

        def pullback(ct: Tree) -> Cotangents:
            x0 = memory if self.solver.warm_start and memory is not None and tree.leaves(memory) else None
            with _random.preserved(theta.params):
                system = equation if derivatives.attached(theta, ct) else equation.at(theta)
                v, linear_residual, num_products, curvature = solve_linear(self.solver, system, theta, ct, x0)
                assert curvature is not None  # solve_linear fills it in
                d_hparams = tree.scale(-1.0, system.pull_hparams(theta, v))
                distance = relative(system.residual(theta), ct) * relative(v, theta.params)
            stats = {
                "first_bad_step": bad.step(),
                "residual_norm": distance,
                "linear_residual": linear_residual,
                "num_products": num_products,
                "curvature_min": curvature[0],
                "curvature_max": curvature[1],
            }
            differentiated = keep_graph or derivatives.attached(ct)
            d_hparams, v, stats = derivatives.released((d_hparams, v, stats), differentiated)
            if not differentiated:
                self._warn(stats, ct, system, theta)
            return Cotangents((), d_hparams, stats, v if self.solver.warm_start else ())

        return final, pullback

    def init_memory(self, params: Tree) -> Tree:
        return tree.zeros_like(params) if self.solver.warm_start else ()

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        equation, theta = self._equation(solver, run(solver, state, hparams, batches), hparams, batches)
        solution = lambda h: root(self.solver, equation, theta._replace(hparams=h))  # noqa: E731
        with _random.preserved(theta.params):
            return derivatives.func_jvp(solution, (hparams,), (d_hparams,))

    def _equation(self, solver: InnerSolver, final: InnerState, hparams: Tree, batches: Sequence[Tree]) -> tuple[Equation, Theta]:
        if solver.stationarity is not None and solver.taken_apart is None and solver.step is not rest:
            raise ValueError(
                "`solver` has another step than its objective's (a projection, say), but the residual is still the gradient, which need "
                "not be zero where such steps end. Make it with metacal.fixed_point(step), or give the equation of its solutions: "
                "solver._replace(step=..., residual=lambda params, hparams, batch: ...)."
            )
        refuse_moving_fixed_points(solver, final.params, hparams)
        if not len(batches):
            raise ValueError("`batches` should hold at least one batch: it defines the linear system. Pass [batch].")
        refuse_complex(final.params)
        equation = Equation(solver, self.operator, _random.noise(final.params), self.stochastic)
        selected = chosen(self.select, batches)
        if not selected:
            raise ValueError("`select` should leave at least one batch, which defines the linear system; it left none. See linear.every.")
        return equation, Theta(final.params, hparams, final.carry, selected, self.damping)

    def _warn(self, stats: dict[str, Tensor], ct: Tree, system: Equation, theta: Theta) -> None:
        names = ("linear_residual", "num_products", "curvature_min", "curvature_max", "first_bad_step")
        of_params = magnitude(theta.params)
        looked_at = [*(stats[name] for name in names), magnitude(ct), of_params]
        *numbers, first_bad_step, of_ct, largest = torch.stack([x.to(of_params) for x in looked_at]).tolist()
        # Where the run or the outer gradient went bad before, there is no system to speak of, and its own stat says so.
        if first_bad_step >= 0 or not isfinite(of_ct):
            return
        trouble = self._asymmetry(system, theta, numbers[0]) or self.solver.trouble(*numbers)
        largest = max(of_ct, largest)
        if trouble is None and largest > torch.finfo(wide(of_params).dtype).max ** 0.5:
            trouble = (
                f"the params or the outer gradient reach {largest:.0e}, whose square overflows: the inner run has diverged, and its end is "
                "near no solution that could be differentiated. Take smaller inner steps."
            )
        if trouble:
            warnings.warn(f"The hypergradient is unreliable: {trouble}", linear.UnreliableHypergradient, stacklevel=2)

    def _asymmetry(self, system: Equation, theta: Theta, linear_residual: float) -> str | None:
        """What an unsolved system's matrix says against a solver for symmetric ones. It is looked at, by two products, only then."""
        if system.is_symmetric or not self.solver.needs_symmetry or not linear_residual > 1e-3:
            return None
        with _random.preserved(theta.params):
            asymmetry = system.asymmetry(theta)
        if not asymmetry > torch.finfo(asymmetry.dtype).eps ** 0.5:
            return None
        return (
            f"linear.{type(self.solver).__name__} is for symmetric matrices and this one, the Jacobian of the residual, is not (A and its "
            f"transpose differ by {float(asymmetry):.1g} of A), so that more steps need not reduce stats['linear_residual']. Use "
            "linear.GMRES, linear.NormalCG, linear.BiCGSTAB or linear.Dense, which take any matrix."
        )


def refuse_moving_fixed_points(solver: InnerSolver, params: Tree, hparams: Tree) -> None:
    """Raises ValueError if the solver's optimizer does not come to rest at the zeros of the gradient."""
    if (descent := solver.taken_apart) is None:
        return
    beside = tree.map(lambda h: h.detach() + 1e-3, hparams)  # a learned decay may be 0, and its derivative is not
    if moves_at_rest(lambda w: solver.init(w, beside).opt_state, lambda g, w, s: descent.update(g, w, s, beside), params):
        raise ValueError(
            "`solver`'s optimizer moves the params even where the gradient is zero (weight decay inside the optimizer), so it does not "
            "stop where implicit differentiation assumes and the hypergradient would be wrong by tens of percent. Put the L2 term in "
            "the objective (+ weight_decay / 2 * |w|^2), or use Unrolled."
        )


def refuse_complex(params: Tree) -> None:
    """Raises TypeError if a leaf is complex: the solvers compare and order what they compute."""
    for path, leaf in zip(tree.paths(params), tree.leaves(params), strict=True):
        if leaf.is_complex():
            where = f" at '{path}'" if path else ""
            raise TypeError(
                f"`params`{where} should be real for Implicit, whose linear systems are, got {leaf.dtype}. Keep the real "
                "and the imaginary part as real params (torch.view_as_real), and make the complex number inside the objective."
            )
