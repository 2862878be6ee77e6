"""Plain autograd, as well as it can be written: what a user has without any library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.methods import Method
from benchmarks.peers.shared import PRODUCTS, Tensors, fresh, gradient
from benchmarks.problem import Problem, Rule
from metacal._typing import Tree

Vector = Sequence[Tensor]
Inverse = Callable[[Callable[[Vector], Vector], Vector, float], Vector]


class _Optimizer:
    """``torch.optim``'s formulas without in-place operations, with one kernel where one is enough."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.steps = rule, 0
        self.first: Vector = ()  # the moments
        self.second: Vector = ()

    def step(self, ws: Vector, gs: Vector) -> list[Tensor]:
        lr, self.steps = self.rule.lr, self.steps + 1
        if self.rule.kind == "adam":
            return self._adam(ws, gs)
        if self.rule.momentum:
            momentum = self.rule.momentum
            gs = self.first = [torch.add(g, m, alpha=momentum) for g, m in zip(gs, self.first, strict=True)] if self.first else gs
        return [torch.add(w, g, alpha=-lr) for w, g in zip(ws, gs, strict=True)]

    def _adam(self, ws: Vector, gs: Vector, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> list[Tensor]:
        if self.steps == 1:
            self.first = self.second = [torch.zeros_like(w) for w in ws]
        self.first = [torch.lerp(m, g, 1 - b1) for m, g in zip(self.first, gs, strict=True)]
        self.second = [torch.addcmul(v * b2, g, g, value=1 - b2) for v, g in zip(self.second, gs, strict=True)]
        step_size, root = self.rule.lr / (1 - b1**self.steps), (1 - b2**self.steps) ** 0.5
        # The root has no derivative at 0, where a coordinate never had a gradient: clamped, it passes none.
        roots = [v.clamp_min(torch.finfo(v.dtype).tiny).sqrt() for v in self.second]
        return [torch.addcdiv(w, m, r / root + eps, value=-step_size) for w, m, r in zip(ws, self.first, roots, strict=True)]


def _run(problem: Problem, hparams: Tensors, *, create_graph: bool) -> Tensors:
    """The T steps; with a graph of themselves, or each from leaves of its own."""
    names, optimizer = list(problem.params), _Optimizer(problem.rule)
    ws = list(fresh(problem.params).values())
    for batch in problem.batches:
        value = problem.inner(dict(zip(names, ws, strict=True)), hparams, batch)
        gs = torch.autograd.grad(value, ws, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        ws = optimizer.step(ws, gs)
        if not create_graph:
            ws = [w.requires_grad_() for w in ws]
    return dict(zip(names, ws, strict=True))


def _unrolled(problem: Problem) -> Callable[[], Tree]:
    def call() -> Tree:
        hparams = fresh(problem.hparams)
        params = _run(problem, hparams, create_graph=True)
        return gradient(problem.outer(params, hparams, problem.outer_batch), hparams)

    return call


def _implicit(inverse: Inverse) -> Callable[[Problem], Callable[[], Tree]]:
    """``f_h - g_hw inverse(g_ww) f_w`` at the last batch: one graph of the inner gradient, pulled back once per product."""

    def prepare(problem: Problem) -> Callable[[], Tree]:
        def call() -> Tree:
            params = _run(problem, problem.hparams, create_graph=False)
            hparams = fresh(problem.hparams)
            ws, hs = list(params.values()), list(hparams.values())
            f = torch.autograd.grad(problem.outer(params, hparams, problem.outer_batch), ws + hs, allow_unused=True, materialize_grads=True)
            f_w, f_h = f[: len(ws)], f[len(ws) :]
            value = problem.inner(params, hparams, problem.batches[-1])
            g_w = torch.autograd.grad(value, ws, create_graph=True, allow_unused=True, materialize_grads=True)
            v = inverse(lambda v: _pull(g_w, ws, v, retain_graph=True), f_w, problem.step_size)
            return dict(zip(hparams, [d - m for d, m in zip(f_h, _pull(g_w, hs, v), strict=True)], strict=True))

        return call

    return prepare


def _pull(gs: Vector, wrt: Vector, v: Vector, *, retain_graph: bool = False) -> Vector:
    live = [(g, x) for g, x in zip(gs, v, strict=True) if g.requires_grad]  # the others are constant
    if not live:
        return [torch.zeros_like(x) for x in wrt]
    ys, cts = zip(*live, strict=True)
    return torch.autograd.grad(ys, wrt, cts, retain_graph=retain_graph, allow_unused=True, materialize_grads=True)


def _neumann(product: Callable[[Vector], Vector], b: Vector, step_size: float) -> Vector:
    """``a sum_{k <= K} (I - a H)^k b``."""
    term = total = b
    for _ in range(PRODUCTS):
        term = [torch.add(t, p, alpha=-step_size) for t, p in zip(term, product(term), strict=True)]
        total = [t + s for t, s in zip(term, total, strict=True)]
    return [step_size * t for t in total]


def _cg(product: Callable[[Vector], Vector], b: Vector, step_size: float) -> Vector:
    """Hestenes and Stiefel's conjugate gradients from 0."""
    x, r, p = [torch.zeros_like(t) for t in b], b, b
    rr = _vdot(r, r)
    for _ in range(PRODUCTS):
        Ap = product(p)
        alpha = _ratio(rr, _vdot(p, Ap))
        x = [torch.addcmul(t, alpha, s) for t, s in zip(x, p, strict=True)]
        r = [torch.addcmul(t, alpha, s, value=-1) for t, s in zip(r, Ap, strict=True)]
        previous, rr = rr, _vdot(r, r)
        beta = _ratio(rr, previous)
        p = [torch.addcmul(t, beta, s) for t, s in zip(r, p, strict=True)]
    return x


def _vdot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([torch.dot(s.flatten(), t.flatten()) for s, t in zip(a, b, strict=True)]).sum()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """0 / 0 = 0: a residual of 0 stays one, without asking the host."""
    return a / torch.where(b == 0, torch.ones_like(b), b)


METHODS = (
    Method("autograd", "autograd", "exact", _unrolled),
    Method("autograd Neumann 20", "autograd", "implicit", _implicit(_neumann)),
    Method("autograd CG 20", "autograd", "implicit", _implicit(_cg)),
)
