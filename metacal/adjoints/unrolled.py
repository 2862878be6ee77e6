"""Exact differentiation of the inner run, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metacal import _random, operators, tree
from metacal._typing import Tree
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.inner import FirstBad, InnerSolver, InnerState, advance, read

Mode = Literal["mixed", "reverse", "graph"]


class _Saved(NamedTuple):
    """What a step started from: enough to compute it again, noise included. ``grads`` is there in mixed mode."""

    state: InnerState
    noise: _random.Noise
    grads: Tree = None


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The derivative of the run itself: exact for the steps that were taken, converged or not.

    Modes, in units of T plain training steps (F + 2F each), for a state of params and optimizer state:

    - ``mixed`` (default): states are stored and each step is pulled back by one forward-over-reverse pass. Work 4 (5 with
      ``segment``); memory 2 sqrt(T) states and gradients plus one step's activations.
    - ``reverse``: the same sweep with a double backward per step, for what has no forward AD. Work 3.3 - 4.2.
    - ``graph``: one plain autograd graph of the whole run. Work 2.3 - 3.2, the fastest; memory grows with T. Cannot run inside a
      ``torch.func`` transform.

    Args:
        mode: see above; all give the same number.
        window: differentiate only the last ``window`` steps (truncation); biased, and the initial params' cotangent is ``()``.
        segment: keep every ``segment``-th state and re-run the steps between; 1 keeps all. Default: ceil(sqrt(steps)).
        offload: keep the stored states in host memory.

    The reverse sweep and its mixed-mode step: ``ct <- J_t^T ct`` with ``w' = U(g(w, h), w, s, h)``, ``g = grad_w L``.
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
        return self._sweep(solver, state, hparams, batches, first, bad)

    def jvp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree
    ) -> Tree:
        first = self._first(batches)
        start = advance(solver, state, hparams, batches, 0, first)

        def final(params: Tree, hparams: Tree) -> Tree:
            return advance(solver, start._replace(params=params), hparams, batches, first, len(batches)).params

        d_start = tree.zeros_like(d_params) if first else d_params
        return operators.func_jvp(final, (start.params, hparams), (d_start, d_hparams))

    def _first(self, batches: Sequence[Tree]) -> int:
        return 0 if self.window is None else max(0, len(batches) - self.window)

    def _sweep(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], first: int, bad: FirstBad
    ) -> tuple[InnerState, Pullback]:
        last, device = len(batches), _device(state)
        steps = max(1, last - first)
        # Keeping every state is one segment of all the steps: nothing is run again.
        segment = steps if self.segment == 1 else self.segment or math.ceil(math.sqrt(steps))
        begins = range(first, last, segment)
        starts: list[_Saved] = []  # one state per segment, kept
        tape: list[_Saved] = []  # one entry per step of the segment at hand, consumed by the backward sweep
        mixed = self.mode == "mixed" and solver.descent is not None

        def save(state: InnerState, noise: _random.Noise, grads: Tree = None) -> _Saved:
            return _Saved(*((tree.to((state, noise, grads), "cpu")) if self.offload else (state, noise, grads)))

        def load(saved: _Saved) -> _Saved:
            return saved._replace(state=tree.to(saved.state, device), grads=tree.to(saved.grads, device)) if self.offload else saved

        def record(state: InnerState, begin: int, bad: FirstBad | None = None) -> InnerState:
            noise = None
            for t, batch in enumerate(read(batches, begin, min(begin + segment, last)), begin):
                noise = _random.same_or(noise, _random.noise(state.params))
                if mixed:
                    assert solver.descent is not None
                    grads, carry = solver.descent.gradient(state.params, hparams, batch, state.carry)
                    tape.append(save(state, noise, grads))
                    state = InnerState(*solver.descent.update(grads, state.params, state.opt_state, hparams), carry)
                else:
                    tape.append(save(state, noise))
                    state = solver.step(state, hparams, batch)
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
            d_hparams = tree.zeros_like(hparams)
            with _random.preserved(state.params):
                for begin, start in zip(reversed(begins), reversed(starts), strict=True):
                    if not tape:
                        _random.restore(start.noise)
                        record(load(start).state, begin)
                    for t in reversed(range(begin, min(begin + segment, last))):
                        saved = load(tape.pop())
                        _random.restore(saved.noise)
                        pull = _pull_mixed if mixed else _pull_reverse
                        d_state, d_h = operators.released(pull(solver, saved, hparams, batches[t], d_state), keep_graph)
                        d_hparams = tree.add(d_hparams, d_h)
            return Cotangents(() if first else d_state[0], d_hparams, stats)

        return state, pullback


StateCotangent = tuple[Tree, list[Tensor]]  # of the params, and of the floating leaves of the optimizer state


def _pull_mixed(solver: InnerSolver, saved: _Saved, hparams: Tree, batch: Tree, ct: StateCotangent) -> tuple[StateCotangent, Tree]:
    descent, state = solver.descent, saved.state
    assert descent is not None
    floating, combine = tree.partition(state.opt_state)

    def update(g: Tree, w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
        w, s = descent.update(g, w, combine(s), h)
        return w, tree.partition(s)[0]

    _, pull = operators.vjp(update, saved.grads, state.params, floating, hparams)
    g_bar, w_bar, s_bar, h_bar = pull(ct)
    H_ww, H_hw = descent.products(state.params, hparams, batch, state.carry, g_bar)
    return (tree.add(w_bar, H_ww), s_bar), tree.add(h_bar, H_hw)


def _pull_reverse(solver: InnerSolver, saved: _Saved, hparams: Tree, batch: Tree, ct: StateCotangent) -> tuple[StateCotangent, Tree]:
    floating, combine = tree.partition(saved.state.opt_state)

    def step(w: Tree, s: list[Tensor], h: Tree) -> StateCotangent:
        after = solver.step(InnerState(w, combine(s), saved.state.carry), h, batch)
        return after.params, tree.partition(after.opt_state)[0]

    _, pull = operators.vjp(step, saved.state.params, floating, hparams)
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
    with torch.enable_grad():
        start, h = tree.map(lambda x: x.detach().requires_grad_(), (state.params, hparams))
        final = advance(solver, state._replace(params=start), h, batches, first, len(batches), bad)
    stats = {"first_bad_step": bad.step()}

    def pullback(ct: Tree) -> Cotangents:
        flat, treedef = tree.flatten((start, h))
        pairs = [(y, c) for y, c in zip(tree.leaves(final.params), tree.leaves(ct), strict=True) if y.requires_grad]
        ys, cts = zip(*pairs, strict=True) if pairs else ((), ())
        found = torch.autograd.grad(ys, flat, cts, allow_unused=True)
        d_start, d_hparams = tree.unflatten(treedef, [torch.zeros_like(x) if g is None else g for g, x in zip(found, flat, strict=True)])
        return Cotangents(() if first else d_start, d_hparams, stats)

    return tree.detach(final), pullback


def _device(value: Tree) -> torch.device:
    return next((leaf.device for leaf in tree.leaves(value) if isinstance(leaf, Tensor)), torch.device("cpu"))
