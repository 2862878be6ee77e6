"""The two doors to a hypergradient: :func:`hypergradient` for a whole estimate, :func:`solve` for ``.backward()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metacal import _ambient, _checks, _random, derivatives, tree
from metacal._objective import value_and_aux
from metacal._safe import nonzero
from metacal._typing import Tree
from metacal.adjoints import Adjoint, Unrolled
from metacal.adjoints.base import Pullback
from metacal.batches import constant, listed
from metacal.inner import InnerSolver, InnerState, rest, run


class HyperGradient(NamedTuple):
    """What an estimate returns.

    Attributes:
        value: the outer objective at the final inner params.
        hparams: its gradient with respect to the hparams, direct and indirect part.
        params: its gradient with respect to the initial inner params; ``()`` where the method does not estimate it.
        state: the inner state after the steps.
        stats: 0-dim tensors: ``direct_share``, the direct part's share of the hparams' gradient, ``|direct| / (|direct| +
            |indirect|)``; and what the adjoint reports: ``first_bad_step`` (-1 if none), ``residual_norm``,
            ``linear_residual``, ``num_products``, ``curvature_min``, ``curvature_max`` ...
        aux: what the outer objective logs (:func:`metacal.with_aux`).
    """

    value: Tensor
    hparams: Tree
    params: Tree
    state: InnerState
    stats: dict[str, Tensor]
    aux: dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """``estimate(state, hparams, inner_batches, outer_batch) -> HyperGradient``, a pure function: see :func:`hypergradient`.

    Its parts are there for diagnostics, which run the same problem in another way.
    """

    outer: Any
    solver: InnerSolver
    adjoint: Adjoint

    def __post_init__(self) -> None:
        check_parts(self.solver, self.adjoint)

    def __call__(self, state: InnerState, hparams: Tree, inner_batches: Sequence[Tree], outer_batch: Tree) -> HyperGradient:
        return differentiate(self.outer, self.solver, self.adjoint, state, hparams, inner_batches, outer_batch, ())[0]


def hypergradient(outer: Any, solver: InnerSolver, adjoint: Adjoint) -> Estimate:
    """``estimate(state, hparams, inner_batches, outer_batch) -> HyperGradient``, a pure function.

    The estimate runs one inner step per batch and differentiates ``outer(final_params, hparams, outer_batch)`` through them as
    ``adjoint`` says. It can itself be transformed by ``torch.func`` (``vmap`` over tasks, ``grad``, ``jacrev`` ...); outside of any
    transform its results are detached, so that memory does not grow over outer steps.

    >>> import torch, metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> estimate = metacal.hypergradient(lambda w, h, b: (w ** 2).sum() / 2, solver, metacal.adjoints.Unrolled())
    >>> h = torch.tensor([1.0])
    >>> estimate(solver.init(torch.zeros(1), h), h, metacal.repeat(None, 2), None).hparams  # w = h (1 - 1/4)
    tensor([0.5625])
    """
    return Estimate(outer, solver, adjoint)


def differentiate(
    outer: Any,
    solver: InnerSolver,
    adjoint: Adjoint,
    state: InnerState,
    hparams: Tree,
    inner_batches: Sequence[Tree],
    outer_batch: Tree,
    memory: Tree,
) -> tuple[HyperGradient, Tree]:
    """One hypergradient and the adjoint's memory for the next."""
    if not isinstance(state, InnerState):
        raise TypeError(f"`state` should be an InnerState, got {type(state).__name__}. Make one with solver.init(params, hparams).")
    _check(state.params, hparams, inner_batches)
    given = state.params, hparams
    if not derivatives.transforming():
        constant("outer_batch", outer_batch)
        state, hparams = tree.detach((state, hparams))
    _refuse_learned_constants(solver, state, hparams)
    if derivatives.transforming() and not adjoint.derives_steps:
        _refuse_traced_closures(solver, state, hparams, inner_batches)
    ambient = _ambient.present(state.params)
    final, pullback = adjoint.vjp(solver, state, hparams, inner_batches, memory=memory)
    carry = tree.detach(final.carry)
    value, aux, (d_params, direct) = derivatives.value_and_grad(
        lambda w, h: value_and_aux(outer, w, h, outer_batch, carry), final.params, hparams, name="outer"
    )
    _refuse_partial_gradients(solver, *given)
    with _ambient.again(ambient):  # the outer objective may have put a module into another mode
        cotangents = pullback(d_params)
    stats = cotangents.stats | {"direct_share": share(direct, cotangents.hparams)}
    result = HyperGradient(value, tree.add(direct, cotangents.hparams), cotangents.params, final, stats, aux)
    result, memory = derivatives.released((result, cotangents.memory), derivatives.transforming())
    return result, memory


def share(part: Tree, rest: Tree) -> Tensor:
    """``|part| / (|part| + |rest|)``, 0 where there is nothing."""
    size = tree.norm(part)
    return size / nonzero(size + tree.norm(rest))


def check_parts(solver: Any, adjoint: Any) -> None:
    """Raises TypeError unless these are what a hypergradient is made of."""
    if not isinstance(solver, InnerSolver):
        raise TypeError(
            f"`solver` should be an InnerSolver, got {type(solver).__name__}. Make one, as by metacal.descent(objective, optimizer)."
        )
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"`adjoint` should be one of metacal.adjoints with its settings, such as Unrolled(), got {adjoint!r}.")
    if adjoint.derives_steps and solver.step is rest:
        raise ValueError(
            f"`adjoint` should derive a solution where there are no steps (metacal.stationary): the derivative of {type(adjoint).__name__} "
            "would be zero. Use adjoints.Implicit(linear.CG(20))."
        )


def _check(params: Tree, hparams: Tree, batches: Any) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Nothing can be differentiated under torch.inference_mode(), and a hypergradient differentiates the inner run. Call it "
            "outside, or under torch.no_grad()."
        )
    _checks.differentiable_tree("params", params)
    _checks.differentiable_tree("hparams", hparams)
    _checks.one_device(params=params, hparams=hparams)
    _checks.batches(batches)


def _refuse_learned_constants(solver: InnerSolver, state: InnerState, hparams: Tree) -> None:
    """Raises ValueError if the optimizer was given a setting that requires grad, past the hparams. Looked at once."""
    if (parts := solver.taken_apart) is None or parts.objective.seen.has_constant_settings or derivatives.transforming():
        return
    w, s, h = tree.detach((state.params, state.opt_state, hparams))
    with torch.enable_grad():
        after = parts.update(tree.zeros_like(w), w, s, h)
    if any(leaf.requires_grad for leaf in tree.leaves(after) if isinstance(leaf, Tensor)):
        raise ValueError(
            "`optimizer` was given a tensor that requires grad, but what a solver closes over is a constant and no gradient would reach "
            "it. What is learned comes through `hparams`: descent(objective, lambda hparams: optim.sgd(hparams['lr'])). To keep it fixed, "
            "detach it."
        )
    parts.objective.seen.has_constant_settings = True


def _refuse_partial_gradients(solver: InnerSolver, params: Tree, hparams: Tree) -> None:
    """Raises ValueError if the objective closes over something computed from what its params or hparams are computed from."""
    closed_over = [] if solver.descent is None else solver.descent.objective.seen.closed_over
    if not closed_over:
        return
    origins = {id(x) for x in derivatives.leaves_of((params, hparams))}
    if any(id(x) in origins for x in closed_over):
        raise ValueError(
            "`objective` reads a tensor that was computed from the same one as its params or hparams, but did not come in through them: "
            "it is a constant of the run, and the gradient would be a part of itself. Compute it inside the objective or pass it through "
            "`hparams`; to keep it fixed, detach it."
        )


def _refuse_traced_closures(solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree]) -> None:
    """Raises ValueError if a step depends on what a ``torch.func`` level differentiates by, past its arguments. Looked at once.

    An autograd Function runs below that level, where what is closed over has become a constant.
    """
    seen = None if solver.descent is None else solver.descent.objective.seen
    if torch.compiler.is_compiling() or (seen and seen.has_constant_closures) or not len(batches):
        return
    plain, h = tree.map(tree.stand_in, (state, hparams))
    try:
        with _random.preserved(state.params):
            batch = tree.map(tree.stand_in, batches[0])
            after = solver.step(plain, h, batch)
            of_residual = solver.residual(plain.params, h, batch) if solver.taken_apart is None else ()
    except Exception:  # what fails here fails in the run too, in words of its own
        return
    if any(derivatives.is_tracked(leaf) for leaf in tree.leaves((after, of_residual))):
        raise ValueError(
            "`solver` closes over a tensor that a torch.func transform differentiates by (in its objective, or as an optimizer's setting), "
            "and no derivative would reach it. Pass it through `hparams`; to keep it fixed, detach it."
        )
    if seen:
        seen.has_constant_closures = True


@dataclass
class _Problem:
    """What the autograd Function of :func:`solve` carries beside its tensors."""

    solver: InnerSolver
    adjoint: Adjoint
    combine: Callable[[Sequence[Tensor]], Any]  # the flat tensors -> (params, hparams, batches)
    num_params: int
    num_hparams: int
    stats: dict[str, Tensor] | None
    noise: _random.Noise | None = None
    ambient: _ambient.Ambient | None = None
    pullback: Pullback | None = field(default=None, repr=False)

    def vjp(self, flat: Sequence[Tensor]) -> tuple[InnerState, Pullback]:
        params, hparams, batches = self.combine(flat)
        state = self.solver.init(params, hparams)
        _refuse_learned_constants(self.solver, state, hparams)
        return self.adjoint.vjp(self.solver, state, hparams, batches)


def solve(
    solver: InnerSolver,
    params: Tree,
    hparams: Tree,
    batches: Sequence[Tree],
    adjoint: Adjoint | None = None,
    *,
    stats: dict[str, Tensor] | None = None,
) -> Tree:
    """The inner params after one step per batch, differentiable by plain autograd and by ``torch.func``.

    ``outer(solve(...)).backward()`` fills the ``.grad`` of the params and hparams, which may be ``nn.Parameter`` s. A ``solve``
    inside an inner objective makes a third level; first and second derivatives are right for every adjoint (with
    ``mode="graph"``: in plain autograd). What the objective closes over is a constant: pass everything that is learned through
    ``hparams``. The backward pass takes steps again as they were taken: with the same noise, under the same autocast, and with modules
    (those of :func:`metacal.functional`) in the mode, train or eval, that they had.

    Args:
        params, hparams: trees of tensors.
        batches: a sequence, one per step; a leaf that requires grad is an error.
        adjoint: how the run is differentiated; ``Unrolled()`` by default.
        stats: a dict that the backward pass fills with the adjoint's statistics.

    >>> import torch, metacal
    >>> h = torch.nn.Parameter(torch.tensor(2.0))
    >>> solver = metacal.descent(lambda w, h, b: (w - h) ** 2, metacal.optim.sgd(0.25))
    >>> w = metacal.solve(solver, torch.tensor(0.0), h, metacal.repeat(None, 2))
    >>> w.backward()
    >>> h.grad
    tensor(0.7500)
    """
    adjoint = Unrolled() if adjoint is None else adjoint
    check_parts(solver, adjoint)
    _check(params, hparams, batches)
    if isinstance(adjoint, Unrolled) and adjoint.mode == "graph" and adjoint.segment is None:
        final, bad = adjoint.in_one_graph(solver, params, hparams, batches)
        if stats is not None:
            stats["first_bad_step"] = bad.step()
        return final.params
    if derivatives.forward_levels() > 1:
        if not adjoint.is_of_the_run:
            raise RuntimeError(
                f"`adjoint` should be one that derives the run itself where two levels go forward (jvp of jvp, jacfwd of jacfwd, jvp of "
                f"hessian): {type(adjoint).__name__} has no rule for it. Use Unrolled(), or let one of the levels go backward: "
                "jacfwd(jacrev(f)), jacrev(jacfwd(f)), hessian(f)."
            )
        return run(solver, solver.init(params, hparams), hparams, batches).params
    batches = listed(batches)
    if derivatives.transforming():
        _refuse_traced_closures(solver, solver.init(params, hparams), hparams, batches)
    flat, combine = tree.partition((params, hparams, batches), tree.is_tensor)
    problem = _Problem(solver, adjoint, combine, len(tree.leaves(params)), len(tree.leaves(hparams)), stats)
    found = tree.unflatten(tree.structure(params), list(_Solve.apply(problem, *flat)))
    _refuse_partial_gradients(solver, params, hparams)
    return found


class _Solve(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, *flat: Tensor) -> tuple[Tensor, ...]:
        params, hparams, batches = problem.combine(flat)
        problem.noise, problem.ambient = _random.noise(params), _ambient.present(params)
        if derivatives.transforming() or not any(x.requires_grad for x in flat):
            final = run(problem.solver, problem.solver.init(params, hparams), hparams, batches)
        else:  # the backward pass will want the saved states
            final, problem.pullback = problem.vjp(tree.detach(list(flat)))
        leaves = tree.leaves(final.params)
        if derivatives.transforming():
            return tuple(derivatives.in_every_lane(leaves, flat))
        # A run of no steps returns its input, which autograd wants apart from the output.
        return tuple(leaf.clone() if any(leaf is x for x in flat) else leaf for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.problem, *flat = inputs
        ctx.save_for_backward(*flat)
        ctx.save_for_forward(*flat)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        problem: _Problem = ctx.problem
        learned = problem.num_params + problem.num_hparams
        if any(ctx.needs_input_grad[1 + learned :]):
            raise ValueError(_BATCH_GRAD)
        flat = derivatives.alive(ctx.saved_tensors)
        params = problem.combine(flat)[0]
        ct = tree.unflatten(tree.structure(params), derivatives.alive(cotangents))
        pullback, problem.pullback = problem.pullback, None  # once: it holds the states, and uses them up
        assert problem.noise is not None
        assert problem.ambient is not None
        with _ambient.again(problem.ambient):
            if pullback is not None and not derivatives.attached(list(flat), ct):
                found = pullback(ct)
            else:  # somebody differentiates this backward pass: run it where they can see it
                with _random.preserved(params):
                    _random.restore(problem.noise)
                    found = problem.vjp(flat)[1](ct)
        if problem.stats is not None:
            problem.stats.update(found.stats)
        d_params = tree.leaves(found.params) or [None] * problem.num_params  # None: not estimated, nothing flows
        return None, *d_params, *tree.leaves(found.hparams), *[None] * (len(flat) - learned)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        problem: _Problem = ctx.problem
        flat = ctx.saved_tensors
        learned = problem.num_params + problem.num_hparams
        if any(d is not None and bool(torch.func.debug_unwrap(d).any()) for d in tangents[learned:]):
            raise ValueError(_BATCH_GRAD)
        filled = [torch.zeros_like(x) if d is None else d for x, d in zip(flat, tangents, strict=True)]
        params, hparams, batches = problem.combine(flat)
        d_params, d_hparams, _batches = problem.combine(filled)
        assert problem.noise is not None
        with _random.preserved(params):
            _random.restore(problem.noise)
            state = problem.solver.init(params, hparams)
            moved = problem.adjoint.jvp(problem.solver, state, hparams, batches, d_params, d_hparams)
        return tuple(tree.leaves(moved))


_BATCH_GRAD = (
    "A leaf of `batches` is being differentiated, but a batch is a constant of the inner problem and no gradient reaches it. "
    "Put what is learned (images, labels, weights) into `hparams`."
)
