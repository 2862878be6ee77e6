"""Bi-level training loops as (init, step) pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metacal import _checks, _random, derivatives, optim, tree
from metacal._device import device_of
from metacal._fastest import fastest
from metacal._typing import Tree
from metacal.adjoints import Adjoint
from metacal.batches import listed
from metacal.estimate import HyperGradient, check_parts, differentiate
from metacal.inner import InnerSolver, InnerState
from metacal.linear.base import extremes
from metacal.optim import GradientTransformation, OptimizerLike


class BilevelState(NamedTuple):
    """What an outer step changes.

    Attributes:
        inner: the inner state that the next step starts from.
        hparams: the hyperparameters.
        opt_state: of the outer optimizer.
        adjoint: the adjoint's memory (a warm-started linear solve), or ``()``.
        step: outer steps taken, an int64 tensor.
    """

    inner: InnerState
    hparams: Tree
    opt_state: Tree
    adjoint: Tree
    step: Tensor


Tasks = Literal["one", "loop", "vmap", "auto"]
_Estimate = Callable[[InnerState, Tree, Sequence[Tree], Tree], HyperGradient]


_Init = Callable[[Tree, Tree], BilevelState]
_Step = Callable[[BilevelState, Sequence[Tree], Tree], tuple[BilevelState, HyperGradient]]


class BilevelOptimizer(NamedTuple):
    """``init(params, hparams) -> BilevelState`` and ``step(state, inner_batches, outer_batch) -> (BilevelState, HyperGradient)``."""

    init: _Init
    step: _Step


def nested(outer: Any, solver: InnerSolver, adjoint: Adjoint, optimizer: OptimizerLike, *, warm_start: bool = True) -> BilevelOptimizer:
    """Inner steps, then one outer step of ``optimizer`` on the hparams along the hypergradient.

    With ``warm_start`` the inner state carries over to the next outer step; without, every step starts from the initial one.

    >>> import torch, metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> opt = metacal.nested(lambda w, h, b: ((w - 3) ** 2).sum(), solver, metacal.adjoints.Unrolled(), metacal.optim.sgd(0.5))
    >>> state = opt.init(torch.zeros(1), torch.zeros(1))
    >>> for state, hg in metacal.iterate(opt, state, [(metacal.repeat(None, 5), None)] * 20): pass
    >>> state.hparams.round(decimals=3)
    tensor([3.])
    """
    check_parts(solver, adjoint)
    transformation = optim.resolve(optimizer, ())

    def init(params: Tree, hparams: Tree) -> BilevelState:
        inner = solver.init(params, hparams)
        return BilevelState(inner, hparams, transformation.init(hparams), adjoint.init_memory(inner.params), torch.tensor(0))

    def step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        memory = state.adjoint
        if tree.leaves(memory) and not derivatives.transforming() and state.step == 0:
            memory = ()  # zeros, from where a linear solve would take one product more than from nothing
        hg, memory = differentiate(outer, solver, adjoint, state.inner, state.hparams, inner_batches, outer_batch, memory)
        hparams, opt_state = _moved("hparams", transformation, hg.hparams, state.opt_state, state.hparams)
        return BilevelState(hg.state if warm_start else state.inner, hparams, opt_state, memory, state.step + 1), hg

    return framed(init, step)


def meta_initialisation(
    outer: Any,
    solver: InnerSolver,
    adjoint: Adjoint,
    optimizer: OptimizerLike,
    *,
    hparams_optimizer: OptimizerLike | None = None,
    tasks: Tasks = "one",
) -> BilevelOptimizer:
    """Inner steps from the initial params, then one outer step on those *initial params*: MAML and its kin.

    The state's ``inner.params`` are the initial params. hparams (``{}`` is welcome) stay as they are, or move along their own
    hypergradient by ``hparams_optimizer`` (learned rates: Meta-SGD; a shared body: ANIL).

    Args:
        adjoint: one that estimates the derivative with respect to the initial params (``Unrolled()`` without a window,
            ``FirstOrder()``); an implicit one only with a :func:`metacal.proximal` solver (iMAML). Such a solver's anchor is
            the initialisation: solver and outer objective see the initial params as their hparams, so hparams must be empty.
        tasks: with "loop" or "vmap" every leaf of the batches has a leading task axis; the outer objective, its gradient and
            aux (as floating numbers) are means over the tasks, stats the largest (of ``curvature_min`` the lowest), and the
            returned state has the task axis. "vmap" runs the tasks together, which pays on a GPU and for small networks. "auto" runs
            both ways twice at the first step and stays with the faster one: the last digits then depend on the machine.

    Errors: at the first step, an adjoint that does not estimate that derivative is refused (one with a window, if the run is longer);
    so are leaves of the batches whose task axes differ.

    Source: Finn et al. 2017 (arXiv 1703.03400); Rajeswaran et al. 2019 (arXiv 1909.04630).
    """
    if tasks not in get_args(Tasks):
        raise ValueError(f"`tasks` should be 'one', 'loop', 'vmap' or 'auto', got {tasks!r}.")
    check_parts(solver, adjoint)
    transformation = optim.resolve(optimizer, ())
    of_hparams = None if hparams_optimizer is None else optim.resolve(hparams_optimizer, ())
    found: list[str] = []  # which way was the faster one

    def init(params: Tree, hparams: Tree) -> BilevelState:
        if solver.anchor is not None and tree.leaves(hparams):
            raise ValueError("`hparams` should be empty with a proximal solver: the initial params take their place, for the anchor.")
        inner = solver.init(params, params if solver.anchor is not None else hparams)
        opt_state = transformation.init(params)
        if of_hparams is not None:
            opt_state = (opt_state, of_hparams.init(hparams))
        return BilevelState(inner, hparams, opt_state, (), torch.tensor(0))

    def estimate(inner: InnerState, hparams: Tree, inner_batches: Sequence[Tree], outer_batch: Tree) -> HyperGradient:
        return differentiate(outer, solver, adjoint, inner, hparams, inner_batches, outer_batch, ())[0]

    def step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        start = state.inner.params
        hparams = start if solver.anchor is not None else state.hparams
        given = (state.inner, hparams, inner_batches, outer_batch)
        if tasks != "one":
            _checks.batches(inner_batches)
            given = (state.inner, hparams, listed(inner_batches), outer_batch)
            _check_tasks(inner_batches=given[2], outer_batch=outer_batch)
        if tasks == "auto" and not found:
            with _random.preserved(start):
                ways = {name: partial(way, estimate, *given) for name, way in _WAYS.items() if name != "one"}
                found.append(fastest(ways, device_of(start)))
        hg = _WAYS[found[0] if found else tasks](estimate, *given)
        meta_gradient = _of_initial_params(hg, solver.anchor is not None)
        if of_hparams is None:
            params, opt_state = _moved("inner.params", transformation, meta_gradient, state.opt_state, start)
            learned = state.hparams
        else:
            params, params_state = _moved("inner.params", transformation, meta_gradient, state.opt_state[0], start)
            learned, hparams_state = _moved("hparams", of_hparams, hg.hparams, state.opt_state[1], state.hparams)
            opt_state = (params_state, hparams_state)
        return BilevelState(state.inner._replace(params=params), learned, opt_state, state.adjoint, state.step + 1), hg

    return framed(init, step)


def framed(init: _Init, step: _Step) -> BilevelOptimizer:
    """The pair. Outside of transforms it follows no graph and leaves none, so that memory does not grow over outer steps."""

    def cut(value: Any) -> Any:
        return derivatives.released(value, derivatives.transforming())

    def framed_init(params: Tree, hparams: Tree) -> BilevelState:
        state: BilevelState = cut(init(*cut((params, hparams))))
        return state

    def framed_step(state: BilevelState, inner_batches: Sequence[Tree], outer_batch: Tree) -> tuple[BilevelState, HyperGradient]:
        if not isinstance(state, BilevelState):
            raise TypeError(f"`state` should be a BilevelState, got {type(state).__name__}. Make one with init(params, hparams).")
        after: tuple[BilevelState, HyperGradient] = cut(step(cut(state), inner_batches, outer_batch))
        return after

    return BilevelOptimizer(framed_init, framed_step)


def _moved(which: str, transformation: GradientTransformation, gradient: Tree, opt_state: Tree, values: Tree) -> tuple[Tree, Tree]:
    """The outer optimizer's step on the part of the state that ``which`` names."""
    try:
        moved, after = optim.moved(transformation, gradient, opt_state, values)
    except Exception:
        _check_made_for(which, transformation, opt_state, values)
        raise
    if _shapes((moved, after)) != _shapes((values, opt_state)):  # one of another shape may broadcast
        _check_made_for(which, transformation, opt_state, values)
    return moved, after


def _shapes(value: Tree) -> list[torch.Size]:
    return [x.shape for x in tree.leaves(value) if isinstance(x, Tensor)]


def _check_made_for(which: str, transformation: GradientTransformation, opt_state: Tree, values: Tree) -> None:
    shaped = lambda state: tree.map(lambda x: x if tree.is_tensor(x) else torch.empty(()), state)  # noqa: E731
    try:
        _checks.same_structure("opt_state", shaped(opt_state), f"optimizer.init({which})", shaped(transformation.init(values)))
    except ValueError as difference:
        raise ValueError(
            f"`state` should have an `opt_state` made for its `{which}`. {difference} Make the state with init(params, hparams), or load "
            "what the same problem saved."
        ) from None


def _check_tasks(**batches: Tree) -> None:
    """Raises unless every leaf has a first axis of one length, that of the tasks."""
    found: dict[int, str] = {}
    for name, batch in batches.items():
        for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True):
            where = f"`{name}`" + (f" at '{path}'" if path else "")
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                got = "a 0-dim tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"{where} should be a tensor with a leading task axis, got {got}. Repeat what all tasks share: "
                    "torch.full((num_tasks,), value)."
                )
            found.setdefault(len(leaf), where)
    if not any(found):
        raise ValueError("`inner_batches` and `outer_batch` should hold the data of at least one task, got none. Or pass tasks='one'.")
    if len(found) > 1:
        lengths = " and ".join(f"{n} at {where}" for n, where in found.items())
        raise ValueError(f"`inner_batches` and `outer_batch` should have one task axis, the first of every leaf; its length is {lengths}.")


def _together(estimate: _Estimate, inner: InnerState, hparams: Tree, inner_batches: Sequence[Tree], outer_batch: Tree) -> HyperGradient:
    leaves, treedef = tree.flatten((inner_batches, outer_batch))  # vmap refuses a None
    one = lambda leaves: estimate(inner, hparams, *tree.unflatten(treedef, leaves))  # noqa: E731
    return _over_tasks(torch.func.vmap(one, randomness="different")(leaves))


def _in_a_loop(estimate: _Estimate, inner: InnerState, hparams: Tree, inner_batches: Sequence[Tree], outer_batch: Tree) -> HyperGradient:
    batches = (inner_batches, outer_batch)
    num_tasks = len(tree.leaves(batches)[0])
    return _over_tasks(tree.stack([estimate(inner, hparams, *tree.index(batches, k)) for k in range(num_tasks)]))


_WAYS: dict[str, Callable[..., HyperGradient]] = {
    "one": lambda estimate, *given: estimate(*given),
    "loop": _in_a_loop,
    "vmap": _together,
}


# A task whose linear solver met no curvature, NaN, does not hide that of another.
_WORST: dict[str, Callable[[Tensor], Tensor]] = {
    "curvature_min": lambda x: extremes(x)[0],
    "curvature_max": lambda x: extremes(x)[1],
}


def _over_tasks(hg: HyperGradient) -> HyperGradient:
    floating = lambda x: None if tree.is_floating(x) else torch.get_default_dtype()  # noqa: E731
    mean = lambda value: tree.map(lambda x: x.mean(0, dtype=floating(x)), value)  # noqa: E731
    worst = {name: _WORST.get(name, lambda x: x.amax(0))(x) for name, x in hg.stats.items()}
    return HyperGradient(hg.value.mean(0), mean(hg.hparams), mean(hg.params), hg.state, worst, mean(hg.aux))


def _of_initial_params(hg: HyperGradient, anchored: bool) -> Tree:
    if anchored:
        return hg.hparams if not tree.leaves(hg.params) else tree.add(hg.hparams, hg.params)
    if not tree.leaves(hg.params) and tree.leaves(hg.state.params):
        raise ValueError(
            "`adjoint` should estimate the derivative with respect to the initial params, which an implicit or truncated one does not: a "
            "solution does not depend on where the steps began. Use Unrolled() without `window` or FirstOrder(), or tie the solution "
            "to the initial params: proximal(objective, optimizer, strength, anchor=lambda initial: initial)."
        )
    return hg.params


def iterate(
    optimizer: BilevelOptimizer, state: BilevelState, data: Iterable[tuple[Sequence[Tree], Tree]]
) -> Iterator[tuple[BilevelState, HyperGradient]]:
    """One outer step for every ``(inner_batches, outer_batch)`` of ``data``, yielding the state and the hypergradient."""
    for inner_batches, outer_batch in data:
        state, hg = optimizer.step(state, inner_batches, outer_batch)
        yield state, hg
