"""Running the inner problem: solvers are three pure functions, and a run is one step per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metacal import _checks, _compile, derivatives, operators, optim, tree
from metacal._typing import Objective, Tree
from metacal.batches import read
from metacal.optim import OptimizerLike


class InnerState(NamedTuple):
    """What an inner step changes.

    ``carry`` holds what changes along the way and is never differentiated (BatchNorm statistics, EMA targets, queues).
    """

    params: Tree
    opt_state: Tree
    carry: Tree = ()


StateCotangent: TypeAlias = "tuple[Tree, list[Tensor]]"
"""A cotangent of the params, and of the floating leaves of the optimizer state."""


class _Parts(NamedTuple):
    objective: operators.Loss
    gradient: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    products: Callable[[Tree, Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    update: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    linearised: Callable[[Tree, Tree, Tree, Tree], operators.Linearised]
    step: Callable[[InnerState, Tree, Tree], tuple[InnerState, Tree]]
    pullback: Callable[[InnerState, Tree, Tree, Tree, StateCotangent], tuple[StateCotangent, Tree]]


class Descent(_Parts):
    """The parts of a gradient-based step, for the adjoints that take it apart: four that say what it is, and three that follow.

    ``gradient(params, hparams, batch, carry) -> (grads, carry)``;
    ``products(params, hparams, batch, carry, d) -> (H_ww d, H_hw d)``, and ``linearised(params, hparams, batch, carry)``, which has
    the gradient and each product by itself, from one recorded gradient where there can be one;
    ``update(grads, params, opt_state, hparams) -> (params, opt_state)``, cheap and usually elementwise;
    ``step(state, hparams, batch) -> (state, grads)``, and with what it returns ``pullback(state, grads, hparams, batch, ct) ->
    (ct, d_hparams)``: the transposed Jacobian of the step that began at ``state``, on a :data:`StateCotangent`.
    """

    __slots__ = ()

    def __new__(
        cls, objective: Any, gradient: Any, products: Any, update: Any, linearised: Any = None, step: Any = None, pullback: Any = None
    ) -> Descent:
        objective = objective if isinstance(objective, operators.Loss) else _loss(objective, with_carry=False)
        linearised = _linearised(gradient, products) if linearised is None else linearised
        step = _step(gradient, update) if step is None else step
        pullback = _pullback(products, update) if pullback is None else pullback
        return super().__new__(cls, objective, gradient, products, update, linearised, step, pullback)

    def _replace(self, **parts: Any) -> Descent:
        """With other parts; those that follow from the four, and are not given, follow from the new ones."""
        four = {name: getattr(self, name) for name in ("objective", "gradient", "products", "update")}
        return Descent(**(self._asdict() if parts.keys().isdisjoint(four) else four) | parts)


# What follows are functions and no partials: what is compiled is a copy of their code.
def _linearised(gradient: Any, products: Any, product: Any = None) -> Callable[[Tree, Tree, Tree, Tree], operators.Linearised]:
    """Each part afresh; ``product`` is that of the Hessian alone, where that is cheaper than both."""

    def linearised(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> operators.Linearised:
        at = params, hparams, batch, carry
        return operators.Linearised(
            lambda: gradient(*at)[0],
            (lambda direction: products(*at, direction)[0]) if product is None else lambda direction: product(*at, direction),
            lambda direction: products(*at, direction)[1],
        )

    return linearised


def _step(gradient: Any, update: Any) -> Callable[[InnerState, Tree, Tree], tuple[InnerState, Tree]]:
    def step(state: InnerState, hparams: Tree, batch: Tree) -> tuple[InnerState, Tree]:
        grads, moved = gradient(state.params, hparams, batch, state.carry)
        params, opt_state = update(grads, state.params, state.opt_state, hparams)
        return InnerState(params, opt_state, moved), grads

    return step


def _pullback(products: Any, update: Any) -> Callable[[InnerState, Tree, Tree, Tree, StateCotangent], tuple[StateCotangent, Tree]]:
    def pullback(state: InnerState, grads: Tree, hparams: Tree, batch: Tree, ct: StateCotangent) -> tuple[StateCotangent, Tree]:
        # w', s' = U(g(w, h), w, s, h): (g_bar, w_bar, s_bar, h_bar) = U^T ct, and g is symmetric in w.
        floating, combine = tree.partition(state.opt_state)

        def updated(g: Tree, w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
            w, s = update(g, w, combine(s), h)
            return w, tree.partition(s)[0]

        # The update's graph is gone before the products need room.
        g_bar, w_bar, s_bar, h_bar = derivatives.vjp(updated, grads, state.params, floating, hparams)[1](ct)
        H_ww, H_hw = products(state.params, hparams, batch, state.carry, g_bar)
        return (tree.add(w_bar, H_ww), s_bar), tree.add(h_bar, H_hw)

    return pullback


class InnerSolver(NamedTuple):
    """A way to run an inner problem: ``init(params, hparams)``, ``step(state, hparams, batch)``, and
    ``residual(params, hparams, batch)``, a tree like the params that is zero at a solution.

    ``descent`` is there when the step is one of a gradient (by hand: ``step=DescentStep(descent)``); ``anchor(hparams)`` when the
    solution is tied to a point (:func:`proximal`).
    """

    init: Callable[[Tree, Tree], InnerState]
    step: Callable[[InnerState, Tree, Tree], InnerState]
    residual: Callable[[Tree, Tree, Tree], Tree]
    descent: Descent | None = None
    anchor: Callable[[Tree], Tree] | None = None

    @property
    def taken_apart(self) -> Descent | None:
        """The parts that the step is made of: None where it is another, as one that somebody wrapped."""
        return self.descent if isinstance(self.step, DescentStep) and self.step.descent is self.descent else None

    @property
    def stationarity(self) -> Descent | None:
        """The parts whose gradient the residual is: None where the equation of a solution is another."""
        return self.descent if isinstance(self.residual, Gradient) and self.residual.descent is self.descent else None


@dataclass(frozen=True)
class DescentStep:
    """The step that a :class:`Descent` makes; a solver that has another, say a projection after it, is not taken apart."""

    descent: Descent

    def __call__(self, state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
        after: InnerState = self.descent.step(state, hparams, batch)[0]
        return after


@dataclass(frozen=True)
class Rest:
    """No step: the params are where they belong."""

    def __call__(self, state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
        return state


@dataclass(frozen=True, eq=False)
class Gradient:
    """The residual of a :class:`Descent`, at the first value of the carry."""

    descent: Descent
    carry: Tree

    def __call__(self, params: Tree, hparams: Tree, batch: Tree) -> Tree:
        return self.descent.gradient(params, hparams, batch, self.carry)[0]


@dataclass(frozen=True)
class WithAux:
    """An objective that returns ``(loss, dict of named tensors)``: see :func:`with_aux`."""

    objective: Callable[[Tree, Tree, Tree], tuple[Tensor, dict[str, Tensor]]]

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, /) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(params, hparams, batch)


def with_aux(objective: Callable[[Tree, Tree, Tree], tuple[Tensor, dict[str, Tensor]]]) -> WithAux:
    """Marks an objective that returns ``(loss, dict of named tensors to log)``; ``HyperGradient.aux`` carries the outer one's."""
    return WithAux(objective)


@dataclass(frozen=True)
class Microbatched:
    """An objective evaluated piece by piece: see :func:`microbatched`."""

    objective: Objective
    num_chunks: int

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, /) -> Tensor:
        return torch.stack([self.objective(params, hparams, b) for b in operators.chunks(batch, self.num_chunks)]).mean()


def microbatched(objective: Any, n: int) -> Microbatched:
    """The mean of the objective over ``n`` equal pieces of the batch: gradient accumulation.

    :func:`descent` differentiates it piece by piece, so that only one piece's activations are alive at a time. Right for
    objectives that are means over samples; a contrastive loss or BatchNorm sees smaller batches.
    """
    _checks.whole("n", n)
    if isinstance(objective, WithAux):
        raise TypeError("`objective` should return a scalar, not logs beside it: pieces are averaged. Log from the outer objective.")
    return Microbatched(objective, n)


def _loss(objective: Any, with_carry: bool) -> operators.Loss:
    if isinstance(objective, Microbatched):
        return replace(_loss(objective.objective, with_carry), num_chunks=objective.num_chunks)
    if with_carry:
        if isinstance(objective, WithAux):
            raise ValueError("`objective` with `carry` should return (loss, carry), not logs: log from the outer objective.")
        return operators.Loss(_with_carry(objective))
    if isinstance(objective, WithAux):
        return operators.Loss(lambda w, h, b, c: (objective(w, h, b)[0], c))
    return operators.Loss(lambda w, h, b, c: (objective(w, h, b), c))


def _with_carry(objective: Callable[[Tree, Tree, Tree, Tree], Any]) -> Callable[[Tree, Tree, Tree, Tree], tuple[Tensor, Tree]]:
    """The objective, whose ``carry`` is a value: steps are taken again from what was saved of it."""

    def pure(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        if torch.compiler.is_compiling():
            return objective(params, hparams, batch, carry)
        with _checks.left_alone(carry=carry):
            value, moved = _checks.pair("objective", objective(params, hparams, batch, carry), "(loss, carry), as it is given a `carry`")
        return value, moved

    return pure


def descent(objective: Any, optimizer: OptimizerLike, *, carry: Tree | None = None, compile: bool | str = False) -> InnerSolver:
    """Gradient descent on ``objective(params, hparams, batch)`` with a differentiable optimizer.

    Args:
        objective: a scalar loss. With ``carry`` it is ``(params, hparams, batch, carry) -> (loss, carry)``.
        optimizer: a GradientTransformation, or ``hparams -> GradientTransformation`` to learn its settings.
        carry: the first value of what changes along the way and is never differentiated.
        compile: compile the step, its pullback and the second-order products, each as one graph, by ``torch.compile``: ``True``
            by inductor, ``"cuda-graphs"`` by inductor and replayed as CUDA graphs (what is kept is copied out of their buffers),
            another string by the backend of that name. Noise is drawn as in eager mode. Eager code runs at the first call, where
            somebody differentiates it (inside ``torch.func`` transforms, in ``mode="graph"``, the pullback of ``mode="reverse"``), and
            for the second-order parts of an objective that has no forward-mode derivative.

    Work of a step: one gradient. Params in less than float32 are rounded at each step, as with torch.optim; sums over micro-batches
    and steps are in float32 at least. Errors: an optimizer of another library that cannot be differentiated is refused with the
    name of its ``metacal.optim`` equivalent; an objective that ``torch.compile`` cannot take in one piece raises RuntimeError.

    >>> import torch, metacal
    >>> solver = metacal.descent(lambda w, h, x: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> state = solver.init(torch.zeros(2), torch.ones(2))
    >>> metacal.run(solver, state, torch.ones(2), metacal.repeat(None, 2)).params
    tensor([0.7500, 0.7500])
    """
    if not callable(objective):
        raise TypeError(f"`objective` should be a function (params, hparams, batch) -> scalar, got {type(objective).__name__}.")
    if not callable(optimizer):  # a function of the hparams is looked at where there are some
        optim.resolve(optimizer, ())
    _compile.refuse_without_cuda(compile)
    loss = replace(_loss(objective, with_carry=carry is not None), compiled=bool(compile))

    def gradient(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tree, Tree]:
        return operators.gradient(loss, params, hparams, batch, carry)

    def products(params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> tuple[Tree, Tree]:
        return operators.mixed_products(loss, params, hparams, batch, carry, direction)

    def product(params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> Tree:
        return operators.hessian_product(loss, params, hparams, batch, carry, direction)

    def linearised(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> operators.Linearised:
        recorded = operators.linearised(loss, params, hparams, batch, carry)
        return _linearised(gradient, products, product)(params, hparams, batch, carry) if recorded is None else recorded

    def update(grads: Tree, params: Tree, opt_state: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        return optim.moved(optim.resolve(optimizer, hparams), grads, opt_state, params)

    step, pullback = _step(gradient, update), _pullback(products, update)

    def init(params: Tree, hparams: Tree) -> InnerState:
        _checks.differentiable_tree("params", params)
        _checks.differentiable_tree("hparams", hparams)
        _compile.refuse_without_cuda(compile, params)
        return InnerState(params, optim.resolve(optimizer, hparams).init(params), () if carry is None else tree.clone(carry))

    if compile:
        gradient, step = (_compile.compiled(fn, compile) for fn in (gradient, step))
        products, product, pullback = (_compile.compiled(fn, compile, second_order_of=loss) for fn in (products, product, pullback))

    parts = Descent(loss, gradient, products, update, linearised, step, pullback)
    return InnerSolver(init, DescentStep(parts), Gradient(parts, () if carry is None else carry), parts)


def proximal(
    objective: Objective, optimizer: OptimizerLike, strength: float | Tensor | Callable[[Tree], Tensor], *, anchor: Callable[[Tree], Tree]
) -> InnerSolver:
    """Descent on ``objective + strength/2 |w - anchor(hparams)|^2``: iMAML's inner problem.

    The pull towards the anchor makes the solution depend on it, so that implicit adjoints can differentiate it. A strength that is
    learned is a function of the hparams.

    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), equation 3.
    """

    if isinstance(strength, Tensor):
        if strength.requires_grad:
            raise ValueError("`strength` requires grad, and no gradient would reach it. Give it as lambda hparams: hparams['strength'].")
    elif not callable(strength) and not strength >= 0:
        raise ValueError(f"`strength` should not be negative, which would push the params away from the anchor; got {strength}.")

    def tied(params: Tree, hparams: Tree, batch: Tree, /) -> Tensor:
        distance = tree.sub(params, anchor(hparams))
        pull = strength(hparams) if callable(strength) else strength
        return objective(params, hparams, batch) + 0.5 * pull * tree.vdot(distance, distance)

    return descent(tied, optimizer)._replace(anchor=anchor)


def fixed_point(fn: Callable[[Tree, Tree, Tree], Tree]) -> InnerSolver:
    """Iterates ``w <- fn(w, hparams, batch)``: any update rule, for instance a deep equilibrium layer.

    Gradients inside of ``fn`` are taken by ``torch.func.grad``, which every adjoint can look into.
    """

    def following(params: Tree, hparams: Tree, batch: Tree) -> Tree:
        try:
            return fn(params, hparams, batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"`fn` takes a gradient of what does not require one here ({str(error).rstrip('.')}): steps are also taken where nothing "
                "is recorded. Use torch.func.grad in it, and not torch.autograd.grad."
            ) from error

    def step(state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
        params = following(state.params, hparams, batch)
        _checks.same_structure("fn", params, "params", state.params)
        return state._replace(params=params)

    def residual(params: Tree, hparams: Tree, batch: Tree) -> Tree:
        after = following(params, hparams, batch)
        _checks.same_structure("fn", after, "params", params)
        return tree.sub(params, after)

    return InnerSolver(lambda params, hparams: InnerState(params, ()), step, residual)


def stationary(objective: Objective) -> InnerSolver:
    """No steps: the params are a minimiser found elsewhere, and the batches only define the objective that they minimise.

    For ``adjoints.Implicit``: there are no steps that others could derive, and they are refused.

    >>> import torch, metacal
    >>> from metacal import linear
    >>> solver = metacal.stationary(lambda w, h, b: ((w - b) ** 2).sum() / 2 + h * (w**2).sum() / 2)
    >>> h, b = torch.tensor(1.0, requires_grad=True), torch.tensor([2.0])
    >>> w = metacal.solve(solver, b / 2, h, [b], metacal.adjoints.Implicit(linear.CG(1)))  # b / (1 + h) is the minimiser
    >>> torch.autograd.grad(w.sum(), h)  # - b / (1 + h)^2
    (tensor(-0.5000),)
    """
    return descent(objective, optim.sgd(0.0))._replace(step=Rest())


def run(solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree]) -> InnerState:
    """Runs one inner step per batch.

    ``batches`` is a sequence. It may be lazy: replay reads it again, and finds torch's generators as they were, so that augmentation
    where a batch is read is drawn again as it was. (A linear system's batches are read at another time, and drawn anew.) Work: one
    step per batch; memory: one state.
    """
    _checks.batches(batches)
    return advance(solver, state, hparams, batches, 0, len(batches))


_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""Where the sum of finite params overflows."""


class FirstBad:
    """Finds the step after which the params first hold a NaN or an infinity, without asking the host."""

    def __init__(self) -> None:
        self._looked: list[tuple[int, Tensor]] = []

    def look(self, t: int, params: Tree) -> None:
        """Looks at the params after step ``t``."""
        if leaves := tree.leaves(params):
            self._looked.append((t, reduce(torch.add, [leaf.detach().sum(dtype=_WIDER.get(leaf.dtype)) for leaf in leaves])))

    def step(self) -> Tensor:
        """The first bad step, or -1."""
        if not self._looked:
            return torch.tensor(-1)
        steps, sums = zip(*self._looked, strict=True)
        found = torch.stack(sums)
        after = torch.where(found.isfinite(), max(steps) + 1, torch.tensor(steps, device=found.device)).amin()
        return torch.where(after > max(steps), -1, after)


def advance(
    solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], begin: int, end: int, bad: FirstBad | None = None
) -> InnerState:
    """Steps ``begin`` to ``end`` of a run, watched by ``bad``."""
    for t, batch in enumerate(read(batches, begin, end), begin):
        state = solver.step(state, hparams, batch)
        if bad is not None:
            bad.look(t, state.params)
    return state
