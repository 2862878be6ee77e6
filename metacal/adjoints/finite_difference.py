"""One-step hypergradients without second derivatives: the mixed product by a central difference of two gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metacal import _random, derivatives, linear, tree
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.adjoints import lanes
from metacal.adjoints.base import Adjoint, Cotangents, Pullback, Select, chosen
from metacal.batches import read
from metacal.inner import Descent, FirstBad, InnerSolver, InnerState, advance
from metacal.linear.base import magnitude, relative


@dataclass(frozen=True)
class FiniteDifference(Adjoint):
    """DARTS: the last step alone, its second-order product by a central difference of gradients by the hyperparameters.

    With ``v = step_size ct`` and ``eps = radius / |v|``, at the final params w:
    ``d_hparams = -(grad_h L(w + eps v, h) - grad_h L(w - eps v, h)) / (2 eps)``, which is ``-H_hw v`` up to ``O(radius^2)``.

    Work: the run and two gradients by the hyperparameters; memory: one step's activations, for nothing is differentiated twice.
    Bias: that of T1-T2 (``Implicit(linear.Identity())``, whose number times ``step_size`` this is as the radius goes to 0), and
    ``O(radius^2)``. Not estimated: the cotangent of the initial params (``()``), and what does not act through L (learning
    rates). Both sides see one realisation of noise. In float32 keep ``radius`` well above 1e-7 times the size of the params:
    the difference loses ``1e-7 |w| / radius`` of its digits. ``stats``: ``eps``.

    Args:
        radius: how far apart from w, in the norm of the params, the two gradients are taken; it does not scale the result.
        step_size: the inner step size, which does. DARTS takes that of its inner SGD.
        select: which batches define L, as a sequence; the last one by default.

    Errors: ValueError: the solver has no objective (``fixed_point``), or there is no batch.

    Source: Liu et al. 2019 (arXiv 1806.09055), equations 7 and 8. DARTS takes the two gradients at the params before its only
    inner step; here they are taken at those after the last, as Choe et al. 2023 do.

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> adjoint = FiniteDifference(step_size=0.25)
    >>> h = torch.tensor([1.0], dtype=torch.float64)
    >>> estimate = metacal.hypergradient(lambda w, h, b: (w ** 2).sum() / 2, solver, adjoint)
    >>> hg = estimate(solver.init(torch.zeros_like(h), h), h, metacal.repeat(None, 2), None)
    >>> print(f"{hg.hparams.item():.4f}")  # -0.25 H_hw w with H_hw = -2 and w = 0.75
    0.3750
    """

    radius: float | Tensor = 0.01
    step_size: float | Tensor = 1.0
    select: Select = linear.last

    def __post_init__(self) -> None:
        lanes.check_radius(self.radius)
        if not isinstance(self.step_size, Tensor) and not self.step_size > 0:
            raise ValueError(f"`step_size` should be positive, got {self.step_size!r}: it scales the estimate.")

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        descent = _descent(self, solver, batches)
        bad = FirstBad()
        final = advance(solver, state, hparams, batches, 0, len(batches), bad)
        mixed = _MixedProduct(descent, final, hparams, chosen(self.select, batches), self.radius, _random.noise(final.params))

        def pullback(ct: Tree) -> Cotangents:
            d_hparams, eps = mixed(tree.scale(self.step_size, ct))
            return Cotangents((), tree.scale(-1.0, d_hparams), {"first_bad_step": bad.step(), "eps": eps})

        return final, pullback


@dataclass(frozen=True)
class SAMA(Adjoint):
    """The last step alone, seen through its optimizer: ``v = D ct`` with ``D = -d update / d gradient``, then a central difference.

    ``d_hparams = -(grad_h L(w + eps v, h) - grad_h L(w - eps v, h)) / (2 eps)``, ``eps = radius / |v|``, w the final params. D
    comes from differentiating the solver's own update by its gradient, transposed: the diagonal for elementwise updates, and
    whatever else an optimizer does (clipping by a norm, a chain) is in it as well. For SGD ``D = lr I``, and this is
    :class:`FiniteDifference` with ``step_size = lr``.

    Work: the run, one backward pass of the update, two gradients by the hyperparameters; memory: one step's activations. Bias: that
    of taking one step for all of them, ``O(radius^2)``, and that D belongs to the last step (its gradient, its optimizer state)
    while the two gradients are taken after it, where the paper takes both at the last params. Not estimated: the
    cotangent of the initial params (``()``), and what acts through the update itself (learning rates). ``stats``: ``eps``, and
    ``adaptation = |D ct| / |ct|``, 0 where the update does not respond to the gradient (a sign).

    Args:
        radius: how far apart from w, in the norm of the params, the two gradients are taken; it does not scale the result.
        select: which batches define L, as a sequence; the last one by default.

    Errors: ValueError: the solver has no objective (``fixed_point``) or a step of its own, or there is no batch.

    Source: Choe et al. 2023 (arXiv 2310.05674).

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> h = torch.tensor([1.0], dtype=torch.float64)
    >>> estimate = metacal.hypergradient(lambda w, h, b: (w ** 2).sum() / 2, solver, SAMA())
    >>> hg = estimate(solver.init(torch.zeros_like(h), h), h, metacal.repeat(None, 2), None)
    >>> print(f"{hg.hparams.item():.4f} {hg.stats['adaptation'].item()}")
    0.3750 0.25
    """

    radius: float | Tensor = 0.01
    select: Select = linear.last

    def __post_init__(self) -> None:
        lanes.check_radius(self.radius)

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        descent = _descent(self, solver, batches)
        if solver.taken_apart is None:
            raise ValueError(
                "`solver` should take the step that its descent makes: SAMA differentiates that step's update, and this solver's is "
                "another (one that was wrapped). Use FiniteDifference or Unrolled(), or put what wraps it into the optimizer."
            )
        T, bad = len(batches), FirstBad()
        before = advance(solver, state, hparams, batches, 0, T - 1, bad)
        (batch,) = read(batches, T - 1, T)
        g, carry = descent.gradient(before.params, hparams, batch, before.carry)
        final = InnerState(*descent.update(g, before.params, before.opt_state, hparams), carry)
        bad.look(T - 1, final.params)
        mixed = _MixedProduct(descent, final, hparams, chosen(self.select, batches), self.radius, _random.noise(final.params))

        def pullback(ct: Tree) -> Cotangents:
            pull = derivatives.func_vjp(lambda g: descent.update(g, before.params, before.opt_state, hparams)[0], g)[1]
            v = tree.scale(-1.0, pull(ct)[0])  # D ct
            d_hparams, eps = mixed(v)
            stats = {"first_bad_step": bad.step(), "eps": eps, "adaptation": relative(v, ct)}
            d_hparams, stats = derivatives.released((d_hparams, stats), derivatives.attached(g, hparams, ct))
            return Cotangents((), tree.scale(-1.0, d_hparams), stats)

        return final, pullback


@dataclass(frozen=True)
class _MixedProduct:
    """``v -> (H_hw v, eps)`` by a central difference along v, at a state and with the noise that comes after it."""

    descent: Descent
    state: InnerState
    hparams: Tree
    batches: Sequence[Tree]
    radius: float | Tensor
    noise: _random.Noise

    def __call__(self, v: Tree) -> tuple[Tree, Tensor]:
        size = magnitude(v)  # of which no square overflows or vanishes
        v = tree.map(lambda leaf: leaf / size, v)
        eps = self.radius / nonzero(tree.norm(v))
        with _random.preserved(self.state.params):
            ahead = self._gradient(tree.axpy(eps, v, self.state.params))
            behind = self._gradient(tree.axpy(-eps, v, self.state.params))
        difference = tree.scale(size / (2 * eps), tree.sub(ahead, behind))
        return tree.map(lambda d, h: d.to(h.dtype), difference, self.hparams), eps / size

    def _gradient(self, w: Tree) -> Tree:
        """grad_h L(w, h), the mean over batches and their pieces: no gradient by the params is taken."""
        loss, found = self.descent.objective, []
        _random.restore(self.noise)
        # Plain autograd's vjp looks only at its primals: where w is in a graph, func_vjp keeps it there.
        vjp = derivatives.func_vjp if derivatives.attached(w) else derivatives.vjp
        for batch in self.batches:
            for piece in loss.pieces(batch):
                value, pull = vjp(lambda h, b=piece: loss.fn(w, h, b, self.state.carry)[0], self.hparams)
                found.append(pull(torch.ones_like(value))[0])
        return tree.mean(found)


def _descent(adjoint: Adjoint, solver: InnerSolver, batches: Sequence[Tree]) -> Descent:
    name = type(adjoint).__name__
    if solver.descent is None:
        raise ValueError(
            f"`solver` should have an inner objective, whose gradient by the hparams {name} takes at two points; this one iterates a map "
            "without one (fixed_point). Use Implicit(linear.Identity()) or Unrolled(), or make the solver with metacal.descent."
        )
    if not len(batches):
        raise ValueError(f"`batches` should hold at least one batch: {name} differentiates the last step. Pass [batch].")
    return solver.descent
