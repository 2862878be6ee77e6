"""Exact differentiation of the inner run, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metacal import _checks, _random, derivatives, tree
from metacal._device import device_of
from metacal._typing import Tree
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.adjoints.footprint import footprint
from metacal.batches import read
from metacal.inner import Descent, FirstBad, InnerSolver, InnerState, StateCotangent, advance

Mode = Literal["mixed", "reverse", "graph", "auto"]


class _Saved(NamedTuple):
    """What a step started from: enough to compute it again, noise included. ``grads`` is there where the step is taken apart."""

    state: InnerState
    noise: _random.Noise
    grads: Tree = None


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The derivative of the run itself: exact for the steps that were taken, converged or not.

    Modes, in units of T plain training steps (F + 2F each), for a state of params and optimizer state:

    - ``mixed`` (default): states are stored, and each step is pulled back by a double backward of it. Inside a ``torch.func``
      transform, compiled and with micro-batches, it goes back through the update and then by one product with the full Hessian,
      forward over reverse, and the gradients are stored too. Work 4.3 - 5.2 (3.3 - 4.2
      with ``segment=1``); memory sqrt(2 T) states plus one step's activations.
    - ``reverse``: a double backward of one segment of steps at a time, which every solver has. Work 3.3 - 4.2; memory sqrt(T)
      states and sqrt(T) steps' graphs.
    - ``graph``: one plain autograd graph of the whole run. Work 2.3 - 3.2, the fastest; memory grows with T. With ``segment`` it is
      ``reverse`` in plain autograd: memory T / segment states and segment steps' graphs. Cannot run inside a ``torch.func``
      transform.
    - ``auto``: ``graph`` or ``mixed``, whichever has the smaller peak of memory. The first step is taken once more beforehand, as
      ``graph`` does it, and what its graph keeps, times T, is compared with what ``mixed`` would keep. Where somebody differentiates
      the result, and inside a transform, it is ``mixed``. ``stats["kept_graph"]`` says which: 1 or 0.

    Args:
        mode: see above; all give the same number.
        window: differentiate only the last ``window`` steps (truncation); biased, and the initial params' cotangent is ``()``.
        segment: keep every ``segment``-th state and take the steps between again; 1 keeps all. Default: ceil(sqrt(T)) in ``reverse``,
            all of them in ``graph``. In ``mixed`` the segments grow by a step each from the last to the first: whenever one is done
            with, its first state makes room for one more of the next.
        offload: keep the stored states in host memory.

    The reverse sweep and the step of ``mixed``: ``ct <- J_t^T ct`` with ``w' = U(g(w, h), w, s, h)``, ``g = grad_w L``.
    With ``(g_bar, w_bar, s_bar, h_bar) = U^T ct`` and the symmetry of the full Hessian,
    ``J^T ct = (w_bar + H_ww g_bar, s_bar)`` and ``d_hparams += h_bar + H_hw g_bar``.
    """

    mode: Mode = "mixed"
    window: int | None = None
    segment: int | None = None
    offload: bool = False
    derives_steps = True

    def __post_init__(self) -> None:
        _checks.one_of("mode", self.mode, Mode)
        for name in ("window", "segment"):
            value = getattr(self, name)
            if value is not None:
                _checks.whole(name, value)

    @property
    def is_of_the_run(self) -> bool:
        return self.window is None

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        self._refuse_transforms()
        first, bad = self._first(batches), FirstBad()
        state = advance(solver, state, hparams, batches, 0, first, bad)
        if self.mode == "auto":
            return self._auto(solver, state, hparams, batches, first, bad)
        return self._sweep(solver, state, hparams, batches, first, bad)

    def in_one_graph(self, solver: InnerSolver, params: Tree, hparams: Tree, batches: Sequence[Tree]) -> tuple[InnerState, FirstBad]:
        """The run from the params in the caller's own graph, which plain autograd then goes back through: ``graph`` without segments."""
        self._refuse_transforms()
        first, bad = self._first(batches), FirstBad()
        # Steps record a graph of themselves only if their inputs are in one.
        params = tree.map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), params)
        state = solver.init(params, hparams)
        if first:
            state = tree.detach(advance(solver, tree.detach(state), tree.detach(hparams), batches, 0, first, bad))
            state = state._replace(params=tree.map(lambda x: x.requires_grad_(), state.params))
        return advance(solver, state, hparams, batches, first, len(batches), bad), bad

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        first = self._first(batches)
        start = advance(solver, state, hparams, batches, 0, first)

        def final(params: Tree, hparams: Tree) -> Tree:
            return advance(solver, start._replace(params=params), hparams, batches, first, len(batches)).params

        d_start = tree.zeros_like(d_params) if first else d_params
        return derivatives.func_jvp(final, (start.params, hparams), (d_start, d_hparams))

    def _refuse_transforms(self) -> None:
        if self.mode == "graph" and derivatives.transforming():
            raise RuntimeError(
                "Unrolled(mode='graph') uses plain autograd, which a torch.func transform (vmap, grad, jvp ...) cannot see. "
                "Use Unrolled(mode='mixed')."
            )

    def _first(self, batches: Sequence[Tree]) -> int:
        return 0 if self.window is None else max(0, len(batches) - self.window)

    def _segments(self, first: int, last: int) -> list[tuple[int, int]]:
        """Begin and end of each. The last one is not run again: it is a whole one, or the shortest."""
        segments, end, lengths = [], last, self._lengths(last - first)
        while end > first:
            segments.append((max(first, end - next(lengths)), end))
            end = segments[-1][0]
        return segments[::-1]

    def _lengths(self, steps: int) -> Iterator[int]:
        """The segments' lengths, from the last to the first."""
        by_segment = self.mode in ("reverse", "graph")
        if self.segment == 1 and not by_segment:  # every state is kept: that is one segment, and nothing is run again
            return itertools.repeat(steps)
        if self.segment is None and not by_segment:
            return itertools.count(1)
        return itertools.repeat(self.segment or (steps if self.mode == "graph" else math.ceil(math.sqrt(steps))))

    def _auto(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
    ) -> tuple[InnerState, Pullback]:
        kept_graph = self._graph_is_smaller(solver, state, hparams, batches, first)
        chosen = replace(self, mode="graph", segment=None) if kept_graph else self
        final, pull = chosen._sweep(solver, state, hparams, batches, first, bad)

        def pullback(ct: Tree) -> Cotangents:
            found = pull(ct)
            return found._replace(stats=found.stats | {"kept_graph": torch.tensor(int(kept_graph))})

        return final, pullback

    def _graph_is_smaller(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int) -> bool:
        """T graphs against stored states (and gradients), their cotangents, and the activations of one step with their tangents."""
        steps, segments = len(batches) - first, self._segments(first, len(batches))
        if not steps or derivatives.attached(state, hparams):
            return False
        if steps == 1:  # no state to store, and the step would have to be taken again
            return True
        with _random.preserved(state.params):  # reading may draw
            (batch,) = read(batches, first, first + 1)
        step = footprint(solver, state, hparams, batch)
        gradients = max(end - begin for begin, end in segments) * step.params if self._taken_apart(solver, state, hparams) else 0
        # Beside the first states of the segments before, all of a segment's; the very first is the caller's.
        states = max(i + end - begin for i, (begin, end) in enumerate(segments)) - 1
        stored = 0 if self.offload else states * step.state + gradients
        return steps * step.graph <= stored + 2 * (step.state + step.params + step.activations)

    def _sweep(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
    ) -> tuple[InnerState, Pullback]:
        device, apart = device_of(state), self._taken_apart(solver, state, hparams)
        segments = self._segments(first, len(batches))
        starts: list[_Saved] = []  # one state per segment, kept
        tape: list[_StatePullback] = []  # of the segment at hand, consumed by the backward sweep

        def save(state: InnerState, noise: _random.Noise, grads: Tree = None) -> _Saved:
            if self.offload:  # the generators' states are on the host already
                state, grads = tree.to((state, grads), "cpu")
            return _Saved(state, noise, grads)

        def load(saved: _Saved) -> _Saved:
            return saved._replace(state=tree.to(saved.state, device), grads=tree.to(saved.grads, device)) if self.offload else saved

        def step_pullback(saved: _Saved, t: int) -> _StatePullback:
            def pull(ct: StateCotangent) -> tuple[StateCotangent, Tree]:
                state, noise, grads = load(saved)
                _random.restore(noise)
                if apart:
                    return apart.pullback(state, grads, hparams, batches[t], ct)
                return _recorded(solver, state, hparams, batches, t, t + 1)[1](ct)

            return pull

        def record(state: InnerState, begin: int, end: int, bad: FirstBad | None = None) -> InnerState:
            """Runs a segment and puts its pullbacks on the tape; ``bad`` watches the first time, when its final state is wanted."""
            if self.mode in ("reverse", "graph"):
                state, pull = _recorded(solver, state, hparams, batches, begin, end, bad)
                tape.append(pull)
                return state
            noise = None
            for t in range(begin, end):
                noise = _random.same_or(noise, _random.noise(state.params))  # before the batch is read, which may draw too
                (batch,) = read(batches, t, t + 1)
                before, grads = state, None
                if apart:
                    state, grads = apart.step(state, hparams, batch)
                elif bad is not None or t < end - 1:
                    state = solver.step(state, hparams, batch)
                tape.append(step_pullback(save(before, noise, grads), t))
                if bad is not None:
                    bad.look(t, state.params)
            return state

        beginning = _Saved(state, _random.noise(state.params))
        for begin, end in segments:
            starts.append(save(state, _random.same_or(starts[-1].noise if starts else None, _random.noise(state.params))))
            if end == len(batches):
                state = record(state, begin, end, bad)
            else:
                state = advance(solver, state, hparams, batches, begin, end, bad)

        if parts := solver.taken_apart:
            seen = parts.objective.seen
            if seen.draws_nothing and _random.same_or(beginning.noise, _random.noise(state.params)) is not beginning.noise:
                # It did not when it was looked at (a module was in another mode), and attention was fused for that.
                seen.draws_nothing = False
                _random.restore(beginning.noise)
                return self._sweep(solver, beginning.state, hparams, batches, first, bad)

        stats = {"first_bad_step": bad.step()}

        def pullback(ct: Tree) -> Cotangents:
            if len(starts) < len(segments):  # called before: what it used up is run again
                with _random.preserved(state.params):
                    _random.restore(beginning.noise)
                    _, pull = self._sweep(solver, beginning.state, hparams, batches, first, FirstBad())
                return pull(ct)
            keep_graph = derivatives.attached(beginning.state, hparams, ct)
            d_state = (ct, [_zero(x, compact=apart is None) for x in tree.partition(state.opt_state)[0]])
            d_hparams = derivatives.accumulator(hparams)
            with _random.preserved(state.params):
                for begin, end in reversed(segments):
                    start = starts.pop()
                    if not tape:
                        _random.restore(start.noise)
                        record(load(start).state, begin, end)
                    while tape:
                        d_state, d_h = derivatives.released(tape.pop()(d_state), keep_graph)
                        d_hparams = tree.add(d_hparams, d_h)
            return Cotangents(() if first else d_state[0], tree.map(lambda d, h: d.to(h.dtype), d_hparams, hparams), stats)

        return state, pullback

    def _taken_apart(self, solver: InnerSolver, state: InnerState, hparams: Tree) -> Descent | None:
        """The parts of a step, where its pullback is more than a double backward of the whole of it."""
        if self.mode not in ("mixed", "auto") or (parts := solver.taken_apart) is None:
            return None
        loss = parts.objective
        return parts if derivatives.transforming() or loss.compiled or loss.num_chunks > 1 else None


def _zero(x: Tensor, compact: bool) -> Tensor:
    """Zeros like x, in the memory of one of them; compiled code would be compiled anew for the other layout."""
    return x.new_zeros(()).expand_as(x) if compact else torch.zeros_like(x)


_StatePullback = Callable[[StateCotangent], tuple[StateCotangent, Tree]]


def _recorded(
    solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], begin: int, end: int, bad: FirstBad | None = None
) -> tuple[InnerState, _StatePullback]:
    """The state after steps ``begin`` to ``end``, and the pullback through a graph of all of them."""
    floating, combine = tree.partition(state.opt_state)
    rest: tuple[Callable[[list[Tensor]], Tree], Tree]

    def steps(w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
        nonlocal rest
        after = advance(solver, InnerState(w, combine(s), state.carry), h, batches, begin, end, bad)
        floating, restore = tree.partition(after.opt_state)
        rest = restore, tree.detach(after.carry)
        return after.params, floating

    (w, s), pull = derivatives.vjp(steps, state.params, floating, hparams)

    def pullback(ct: StateCotangent) -> tuple[StateCotangent, Tree]:
        w_bar, s_bar, h_bar = pull(ct)
        return (w_bar, s_bar), h_bar

    return InnerState(w, rest[0](s), rest[1]), pullback
