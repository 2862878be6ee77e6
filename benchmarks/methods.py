"""How to compute a hypergradient: this library's methods, one row each. Those of other libraries are in :mod:`benchmarks.peers`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import metacal
from benchmarks.problem import Problem
from metacal import registry, tree
from metacal._typing import Tree
from metacal.adjoints import Adjoint, Unrolled

Kind = Literal["exact", "implicit", "approximate", "first order"]


class Unsupported(Exception):
    """Why a method cannot do a problem: the reason becomes a row of the report."""


@dataclass(frozen=True)
class Method:
    """A way to a hypergradient.

    Attributes:
        library: whose it is: "metacal", "higher", "torchopt", "betty", "autograd", "jaxopt" ...
        kind: "exact" for the steps that were taken; "implicit", for their limit; "approximate": truncated, sketched, differenced;
            "first order": without second derivatives of the inner objective by its params.
        prepare: ``prepare(problem)()`` is the hypergradient, a dict like the problem's hparams. ``prepare`` does once what a user
            would do once (building modules, compiling); the call starts from ``problem.params``, takes the T inner steps, and
            keeps no graph alive when it returns. Raises :class:`Unsupported`.
        small: the small suite has it too.
    """

    name: str
    library: str
    kind: Kind
    prepare: Callable[[Problem], Callable[[], Tree]]
    small: bool = True


MAX_TANGENTS, MAX_DENSE = 64, 2000


def _prepared(problem: Problem, adjoint: Adjoint, compile: bool | str = False) -> Callable[[], Tree]:
    solver = metacal.descent(problem.inner, problem.rule.ours(), compile=compile)
    estimate = metacal.hypergradient(problem.outer, solver, adjoint)

    def call() -> Tree:
        state = solver.init(problem.params, problem.hparams)
        return estimate(state, problem.hparams, problem.batches, problem.outer_batch).hparams

    return call


def _ours(name: str, kind: Kind, code: str, *, number: Callable[[Problem], int] = lambda _: 20, small: bool = True) -> Method:
    """The row of :mod:`metacal.registry` with that code; ``number`` is its number for a problem."""
    row = registry.method(code)

    def prepare(problem: Problem) -> Callable[[], Tree]:
        num_params, num_hparams = tree.num_elements(problem.params), tree.num_elements(problem.hparams)
        if code == "Forward()" and num_hparams > MAX_TANGENTS:
            raise Unsupported(f"one tangent for each of {num_hparams} hparams")
        if "Dense" in code and num_params > MAX_DENSE:
            raise Unsupported(f"a matrix of {num_params} rows")
        if "offload" in code and problem.device.type == "cpu":
            raise Unsupported("the host's memory is the device's")
        if "KFAC" in code:
            raise Unsupported("reads an nn.Module and its loss; the problems are functions")
        if "GaussNewton" in code and problem.parts is None:
            raise Unsupported("the inner objective is no loss of a network's outputs")
        model, loss = problem.parts or (None, None)
        setting = registry.Setting(number(problem), problem.step_size, model=model, outputs_loss=loss)
        if "Nystroem" in code and num_params < setting.number:
            raise Unsupported(f"{setting.number} rows of a matrix of {num_params}")
        return _prepared(problem, row.make(setting))

    return Method(name, "metacal", kind, prepare, small)


def _compiled(name: str, adjoint: Adjoint, compile: bool | str = True, *, small: bool = True) -> Method:
    def prepare(problem: Problem) -> Callable[[], Tree]:
        if not problem.compile:
            raise Unsupported("compiling takes longer than all of the problem")
        if compile == "cuda-graphs" and problem.device.type != "cuda":
            raise Unsupported("CUDA graphs need a CUDA device")
        call = _prepared(problem, adjoint, compile)
        call()  # compiles
        return call

    return Method(name, "metacal", "exact", prepare, small)


_ROWS = (
    _ours("graph", "exact", 'Unrolled(mode="graph")'),
    _ours("graph, four segments", "exact", 'Unrolled(mode="graph", segment=k)', number=lambda problem: math.ceil(problem.num_steps / 4)),
    _ours("reverse", "exact", 'Unrolled(mode="reverse")'),
    _ours("mixed", "exact", "Unrolled()"),
    _ours("mixed, every state", "exact", "Unrolled(segment=1)"),
    _ours("auto", "exact", 'Unrolled(mode="auto")'),
    _ours("mixed, offloaded", "exact", "Unrolled(offload=True)"),
    _compiled("reverse, compiled", Unrolled(mode="reverse"), small=False),
    _compiled("mixed, compiled", Unrolled()),
    _compiled("mixed, CUDA graphs", Unrolled(), "cuda-graphs"),
    _ours("forward", "exact", "Forward()"),
    _ours("window 10", "approximate", "Unrolled(window=k)", number=lambda _: 10),
    _ours("forward sketch 2", "approximate", "ForwardSketch(k)", number=lambda _: 2),
    _ours("finite difference", "approximate", "FiniteDifference(radius, a)"),
    _ours("SAMA", "approximate", "SAMA(radius)"),
    _ours("zeroth order 20", "approximate", "ZerothOrder(k, radius)", small=False),
    _ours("Neumann 20", "implicit", "Implicit(linear.Neumann(K, a))"),
    _ours("Neumann 20, own step", "implicit", "Implicit(linear.Neumann(K))", small=False),
    _ours("Neumann 20, stochastic", "implicit", "Implicit(linear.Neumann(K, a), select=linear.every, stochastic=True)", small=False),
    _ours("CG 20", "implicit", "Implicit(linear.CG(n))"),
    _ours("CG 20, diagonal", "implicit", "Implicit(linear.CG(n, preconditioner=linear.Diagonal(k)))", small=False),
    _ours("CG 20, Gauss-Newton", "implicit", "Implicit(linear.CG(n), operator=linear.GaussNewton(model, loss))", small=False),
    _ours("normal CG 20", "implicit", "Implicit(linear.NormalCG(n))", small=False),
    _ours("BiCGSTAB 20", "implicit", "Implicit(linear.BiCGSTAB(n))", small=False),
    _ours("Lanczos 20", "implicit", "Implicit(linear.Lanczos(n))", small=False),
    _ours("GMRES 20", "implicit", "Implicit(linear.GMRES(n))"),
    _ours("MINRES 20", "implicit", "Implicit(linear.MINRES(n))"),
    _ours("Nystroem 20", "implicit", "Implicit(linear.Nystroem(k))"),
    _ours("K-FAC", "implicit", "Implicit(linear.KFAC(module, loss))", small=False),
    _ours("diagonal 20", "implicit", "Implicit(linear.Diagonal(k))", small=False),
    _ours("dense", "implicit", "Implicit(linear.Dense())"),
    _ours("T1-T2", "first order", "Implicit(linear.Identity())"),
    _ours("first order", "first order", "FirstOrder()"),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
