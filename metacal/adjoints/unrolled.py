"""Exact differentiation of the inner run, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from metacal import _random, operators, tree
from metacal._typing import Tree
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.inner import FirstBad, InnerSolver, InnerState, StateCotangent, advance, read

Mode = Literal["mixed", "reverse", "graph", "auto"]


class _Saved(NamedTuple):
    """What a step started from: enough to compute it again, noise included. ``grads`` is there in mixed mode."""

    state: InnerState
    noise: _random.Noise
    grads: Tree = None


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The derivative of the run itself: exact for the steps that were taken, converged or not.

    Modes, in units of T plain training steps (F + 2F each), for a state of params and optimizer state:

    - ``mixed`` (default): states are stored, and each step is pulled back through its update and then by one product with the full
      Hessian: a double backward, or inside a ``torch.func`` transform forward over reverse. Work 3.3 - 4.2 (4.3 - 5.2 with
      ``segment``); memory 2 sqrt(T) states and gradients plus one step's activations.
    - ``reverse``: the same sweep with a double backward of the whole step, for solvers that are no :func:`metacal.descent`, and
      without the gradients in memory. Work the same.
    - ``graph``: one plain autograd graph of the whole run. Work 2.3 - 3.2, the fastest; memory grows with T. Cannot run inside a
      ``torch.func`` transform.
    - ``auto``: ``graph`` or ``mixed``, whichever has the smaller peak of memory. The first step is taken as ``graph`` does it, and
      what its graph keeps, times T, is compared with what ``mixed`` would keep; then it is gone on from, or taken again. Where
      somebody differentiates the result, and inside a transform, it is ``mixed``. ``stats["kept_graph"]`` says which: 1 or 0.

    Args:
        mode: see above; all give the same number.
        window: differentiate only the last ``window`` steps (truncation); biased, and the initial params' cotangent is ``()``.
        segment: keep every ``segment``-th state and re-run the steps between; 1 keeps all. Default: ceil(sqrt(steps)).
        offload: keep the stored states in host memory.

    The reverse sweep and the step of ``mixed``: ``ct <- J_t^T ct`` with ``w' = U(g(w, h), w, s, h)``, ``g = grad_w L``.
    With ``(g_bar, w_bar, s_bar, h_bar) = U^T ct`` and the symmetry of the full Hessian,
    ``J^T ct = (w_bar + H_ww g_bar, s_bar)`` and ``d_hparams += h_bar + H_hw g_bar``.
    """

    mode: Mode = "mixed"
    window: int | None = None
    segment: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"`mode` should be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")
        for name in ("window", "segment"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` should be a positive integer or None, got {value!r}.")

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        first, bad = self._first(batches), FirstBad()
        state = advance(solver, state, hparams, batches, 0, first, bad)
        if self.mode == "graph":
            return _graph(solver, state, hparams, batches, first, bad)
        if self.mode == "auto":
            return self._auto(solver, state, hparams, batches, first, bad)
        return self._sweep(solver, state, hparams, batches, first, bad)

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        first = self._first(batches)
        start = advance(solver, state, hparams, batches, 0, first)

        def final(params: Tree, hparams: Tree) -> Tree:
            return advance(solver, start._replace(params=params), hparams, batches, first, len(batches)).params

        d_start = tree.zeros_like(d_params) if first else d_params
        return operators.func_jvp(final, (start.params, hparams), (d_start, d_hparams))

    def _first(self, batches: Sequence[Tree]) -> int:
        return 0 if self.window is None else max(0, len(batches) - self.window)

    def _segment(self, steps: int) -> int:
        # Keeping every state is one segment of all the steps: nothing is run again.
        return steps if self.segment == 1 else self.segment or math.ceil(math.sqrt(steps))

    def _auto(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
    ) -> tuple[InnerState, Pullback]:
        steps, noise = len(batches) - first, _random.noise(state.params)
        if not steps or operators.attached(state, hparams):
            return _reporting(0, *self._sweep(solver, state, hparams, batches, first, bad))
        begin, h = _leaves(state, hparams)
        (batch,) = read(batches, first, first + 1)
        with torch.enable_grad():
            final, grads = solver.descent.step(begin, h, batch) if solver.descent else (solver.step(begin, h, batch), None)
        bad.look(first, final.params)
        footprint = _Footprint.measured(begin, (h, batch), final, grads)
        del grads
        if self._graph_is_smaller(steps, footprint):
            with torch.enable_grad():
                for t in range(first + 1, len(batches)):  # one by one, so that nothing here holds the first step's state
                    final = advance(solver, final, h, batches, t, t + 1, bad)
            return _reporting(1, *_ends(begin.params, h, final, bad, first > 0))
        del final
        _random.restore(noise)
        # What outlives the graph was none of its cost: constants that the objective closes over.
        if self._graph_is_smaller(steps, footprint.without_survivors()):
            return _reporting(1, *_graph(solver, state, hparams, batches, first, bad))
        return _reporting(0, *self._sweep(solver, state, hparams, batches, first, bad))

    def _graph_is_smaller(self, steps: int, step: _Footprint) -> bool:
        """T graphs against stored states and gradients, their cotangents, and the activations of one step with their tangents."""
        graph, activations, state = (sum(storages.values()) for storages in (step.graph, step.activations, step.start))
        segment = self._segment(steps)
        stored = (math.ceil(steps / segment) + segment - 2) * state + segment * step.num_params
        return steps * graph <= (0 if self.offload else stored) + 2 * (state + step.num_params + activations)

    def _sweep(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
    ) -> tuple[InnerState, Pullback]:
        last, device = len(batches), _device(state)
        segment = self._segment(max(1, last - first))
        begins = range(first, last, segment)
        starts: list[_Saved] = []  # one state per segment, kept
        tape: list[_Saved] = []  # one entry per step of the segment at hand, consumed by the backward sweep
        descent = None if self.mode == "reverse" else solver.descent

        def save(state: InnerState, noise: _random.Noise, grads: Tree = None) -> _Saved:
            return _Saved(*((tree.to((state, noise, grads), "cpu")) if self.offload else (state, noise, grads)))

        def load(saved: _Saved) -> _Saved:
            return saved._replace(state=tree.to(saved.state, device), grads=tree.to(saved.grads, device)) if self.offload else saved

        def record(state: InnerState, begin: int, bad: FirstBad | None = None) -> InnerState:
            noise = None
            for t, batch in enumerate(read(batches, begin, min(begin + segment, last)), begin):
                noise = _random.same_or(noise, _random.noise(state.params))
                after, grads = descent.step(state, hparams, batch) if descent else (solver.step(state, hparams, batch), None)
                tape.append(save(state, noise, grads))
                state = after
                if bad is not None:
                    bad.look(t, state.params)
            return state

        for begin in begins:
            starts.append(save(state, _random.same_or(starts[-1].noise if starts else None, _random.noise(state.params))))
            if begin == begins[-1]:
                state = record(state, begin, bad)
            else:
                state = advance(solver, state, hparams, batches, begin, begin + segment, bad)

        stats = {"first_bad_step": bad.step()}

        def pullback(ct: Tree) -> Cotangents:
            keep_graph = operators.attached(starts[0].state if starts else (), hparams, ct)
            d_state = (ct, [torch.zeros_like(x) for x in tree.partition(state.opt_state)[0]])
            d_hparams = operators.accumulator(hparams)
            with _random.preserved(state.params):
                for begin, start in zip(reversed(begins), reversed(starts), strict=True):
                    if not tape:
                        _random.restore(start.noise)
                        record(load(start).state, begin)
                    for t in reversed(range(begin, min(begin + segment, last))):
                        saved = load(tape.pop())
                        _random.restore(saved.noise)
                        if descent:
                            pulled = descent.pullback(saved.state, saved.grads, hparams, batches[t], d_state)
                        else:
                            pulled = _pull_reverse(solver, saved.state, hparams, batches[t], d_state)
                        d_state, d_h = operators.released(pulled, keep_graph)
                        d_hparams = tree.add(d_hparams, d_h)
            return Cotangents(() if first else d_state[0], tree.map(lambda d, h: d.to(h.dtype), d_hparams, hparams), stats)

        return state, pullback


def _pull_reverse(solver: InnerSolver, state: InnerState, hparams: Tree, batch: Tree, ct: StateCotangent) -> tuple[StateCotangent, Tree]:
    floating, combine = tree.partition(state.opt_state)

    def step(w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
        after = solver.step(InnerState(w, combine(s), state.carry), h, batch)
        return after.params, tree.partition(after.opt_state)[0]

    _, pull = operators.vjp(step, state.params, floating, hparams)
    w_bar, s_bar, h_bar = pull(ct)
    return (w_bar, s_bar), h_bar


def _graph(
    solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
) -> tuple[InnerState, Pullback]:
    if operators.transforming():
        raise RuntimeError(
            "Unrolled(mode='graph') uses plain autograd, which a torch.func transform (vmap, grad, jvp ...) cannot see. "
            "Use Unrolled(mode='mixed')."
        )
    begin, h = _leaves(state, hparams)
    with torch.enable_grad():
        final = advance(solver, begin, h, batches, first, len(batches), bad)
    return _ends(begin.params, h, final, bad, first > 0)


def _leaves(state: InnerState, hparams: Tree) -> tuple[InnerState, Tree]:
    params, hparams = tree.map(lambda x: x.detach().requires_grad_(), (state.params, hparams))
    return state._replace(params=params), hparams


def _ends(start: Tree, h: Tree, final: InnerState, bad: FirstBad, truncated: bool) -> tuple[InnerState, Pullback]:
    """The final state, cut from the graph that leads to it from the leaves ``start`` and ``h``, and the pullback along it."""
    stats = {"first_bad_step": bad.step()}

    def pullback(ct: Tree) -> Cotangents:
        flat, treedef = tree.flatten((start, h))
        pairs = [(y, c) for y, c in zip(tree.leaves(final.params), tree.leaves(ct), strict=True) if y.requires_grad]
        ys, cts = zip(*pairs, strict=True) if pairs else ((), ())
        found = torch.autograd.grad(ys, flat, cts, allow_unused=True)
        d_start, d_hparams = tree.unflatten(treedef, [torch.zeros_like(x) if g is None else g for g, x in zip(found, flat, strict=True)])
        return Cotangents(() if truncated else d_start, d_hparams, stats)

    return tree.detach(final), pullback


def _reporting(kept_graph: int, final: InnerState, pull: Pullback) -> tuple[InnerState, Pullback]:
    def pullback(ct: Tree) -> Cotangents:
        found = pull(ct)
        return found._replace(stats=found.stats | {"kept_graph": torch.tensor(kept_graph)})

    return final, pullback


Storages = dict[StorageWeakRef, int]  # and their bytes


class _Footprint(NamedTuple):
    """What one step costs that is attached to a graph.

    Attributes:
        start: the storages of the params and the optimizer state that it began with.
        num_params: the bytes of the params.
        graph: what the step's graph has saved, beside the hparams and the batch.
        activations: what the gradient's part of it has saved, beside the params as well.
    """

    start: Storages
    num_params: int
    graph: Storages
    activations: Storages

    @classmethod
    def measured(cls, begin: InnerState, constants: Tree, after: InnerState, grads: Tree) -> _Footprint:
        start, outside = _storages((begin.params, begin.opt_state)), _storages(constants).keys()
        graph = _saved_by_graph(after)
        gradient = graph if grads is None else _saved_by_graph(grads)
        return cls(start, tree.num_bytes(begin.params), _less(graph, outside), _less(gradient, outside | start.keys()))

    def without_survivors(self) -> _Footprint:
        """Called when the graph is gone: what is still there belongs to somebody else (of later steps, the start does not)."""
        alive = {storage for storage in self.graph if not storage.expired()} - self.start.keys()
        return self._replace(graph=_less(self.graph, alive), activations=_less(self.activations, alive))


def _less(storages: Storages, others: Set[StorageWeakRef]) -> Storages:
    return {storage: size for storage, size in storages.items() if storage not in others}


def _storages(value: Tree) -> Storages:
    """The storages of a tree's tensors, and their bytes."""
    storages = [x.untyped_storage() for x in tree.leaves(value) if isinstance(x, Tensor) and x.layout == torch.strided]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def _saved_by_graph(value: Tree) -> Storages:
    """The storages that the autograd graph of a tree keeps for its backward pass, and their bytes."""
    nodes = {leaf.grad_fn for leaf in tree.leaves(value) if isinstance(leaf, Tensor)}
    waiting, saved = list(nodes), Storages()
    while waiting:
        node = waiting.pop()
        if node is not None:
            saved |= _storages([getattr(node, name) for name in _names_of_saved(type(node))])
            found = {following for following, _ in node.next_functions} - nodes
            nodes |= found
            waiting.extend(found)
    return saved


@cache
def _names_of_saved(node: type) -> list[str]:
    # What torch exposes of a node's saved tensors: `_saved_self` and the like, and `saved_tensors` of Python's Functions.
    return [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]


def _device(value: Tree) -> torch.device:
    return next((leaf.device for leaf in tree.leaves(value) if isinstance(leaf, Tensor)), torch.device("cpu"))
