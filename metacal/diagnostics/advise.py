"""Which method fits: the registry's rows, without those that cannot serve, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metacal import _random, tree
from metacal._device import device_of
from metacal._typing import Tree
from metacal.diagnostics.cost import peak_bytes
from metacal.inner import InnerSolver, InnerState
from metacal.registry import METHODS, Method, Sizes


class Recommendation(NamedTuple):
    """A method with its estimated work, in plain training steps, and its estimated peak memory in bytes."""

    method: Method
    work: float
    bytes: float
    why: str


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` found: ``str(advice)`` says it in words.

    Attributes:
        ranking: those that can serve, the best first.
        refused: codes of the others, each with the reason.
        sizes: what the estimates were made for.
    """

    ranking: tuple[Recommendation, ...]
    refused: dict[str, str]
    sizes: Sizes

    @property
    def best(self) -> Recommendation:
        """The first of the ranking.

        Errors: ValueError if nothing can serve.
        """
        if not self.ranking:
            raise ValueError(f"No method can serve: {'; '.join(f'{code}: {why}' for code, why in self.refused.items())}.")
        return self.ranking[0]

    def __str__(self) -> str:
        if not self.ranking:
            return "Nothing fits. " + " ".join(f"{code}: {why}." for code, why in self.refused.items())
        lines = [f"Take {self.best.method.code}: {self.best.why}."]
        lines += [f"  {r.method.code}: about {r.work:.3g} steps of work, {_size(r.bytes)}; {r.why}" for r in self.ranking]
        reasons = dict.fromkeys(self.refused.values())
        lines += [f"Not {', '.join(code for code, w in self.refused.items() if w == why)}: {why}." for why in reasons]
        return "\n".join(lines)


def measure(solver: InnerSolver, state: InnerState, hparams: Tree, inner_batches: Sequence[Tree], *, number: int = 10) -> Sizes:
    """The sizes of a problem, the activations of a step measured: two plain steps are run.

    ``number`` is that of terms, products, directions or steps of the methods that have one. Torch's random generators are
    afterwards as they were before.

    >>> import torch, metacal
    >>> solver = metacal.descent(lambda w, h, x: ((x @ w - h) ** 2).mean(), metacal.optim.sgd(0.1, momentum=0.9))
    >>> w, h = torch.zeros(100), torch.zeros(1)
    >>> sizes = measure(solver, solver.init(w, h), h, [torch.ones(50, 100)] * 30)
    >>> sizes.num_steps, sizes.num_params, sizes.num_hparams, sizes.params_bytes, sizes.state_bytes
    (30, 100, 1, 400, 800)
    """
    if not len(inner_batches):
        raise ValueError("`inner_batches` should hold at least one batch: a step is measured on it.")
    with _random.preserved(state.params, hparams):
        solver.step(state, hparams, inner_batches[0])  # the first call allocates what stays
        peak = peak_bytes(lambda: solver.step(state, hparams, inner_batches[0]), device_of(state.params))
    return Sizes(
        num_steps=len(inner_batches),
        num_params=tree.num_elements(state.params),
        num_hparams=tree.num_elements(hparams),
        params_bytes=tree.num_bytes(state.params),
        state_bytes=tree.num_bytes((state.params, tree.partition(state.opt_state)[0])),
        activation_bytes=peak,
        number=number,
    )


def advise(
    sizes: Sizes,
    *,
    memory: float | None = None,
    initial_params: bool = False,
    path: bool = False,
    converged: bool = False,
    differentiable: bool = True,
    symmetric: bool = True,
    loops: bool = False,
) -> Advice:
    """Ranks the methods of :mod:`metacal.registry` for a problem of these sizes, with reasons.

    A method that cannot give what is asked for, or needs more memory than there is, is refused. The rest are ordered by whose
    derivative they give (that of the run; that of the solution, which is the same one if the inner problem is solved, and then
    counts as such; right in the mean; biased), and within that by estimated work, then by memory. The estimates are the formulas
    of the table: right to a factor, made to tell orders of magnitude apart. :func:`metacal.compare` measures.

    Args:
        sizes: from :func:`measure`, or written down.
        memory: bytes at hand, beyond what is there already; None: any.
        initial_params: the derivative by the initial params is wanted (MAML).
        path: the hparams shape only the path to the solution (learning rates): implicit methods see nothing of them.
        converged: the steps reach a solution.
        differentiable: the inner objective can be differentiated, twice where a method does; not so a simulator. (Where it can once,
            take one that needs first derivatives only, as the table says: ``FiniteDifference``, ``f2sa``.)
        symmetric: the matrix of the linear system is symmetric positive definite: a Hessian near a minimum, not a fixed point's Jacobian.
        loops: rank the loops of :mod:`metacal.single_loop` too, which are BilevelOptimizers and no adjoints. Their work per outer
            step buys a step and not a solution: they are cheap and need many.

    >>> small = Sizes(num_steps=20, num_params=1000, num_hparams=3, params_bytes=4000, state_bytes=8000, activation_bytes=100_000)
    >>> advise(small).best.method.code
    'Unrolled(mode="graph")'
    >>> advise(small, memory=2_000_000).best.method.code
    'Unrolled(segment=1)'
    >>> advise(small._replace(num_steps=2000), converged=True).best.method.code
    'Implicit(linear.CG(n))'
    """
    for name, value in sizes._asdict().items():
        if value < 0:
            raise ValueError(f"`sizes.{name}` should not be negative, got {value}.")
        if name in ("num_steps", "number") and not value:
            raise ValueError(f"`sizes.{name}` should be at least 1, got 0: there would be nothing to advise on.")
    refused: dict[str, str] = {}
    fitting = []
    for row in METHODS:
        if row.family == "initialisation" or (row.family == "single loop" and not loops):
            continue
        work, peak = row.work(sizes), row.bytes(sizes)
        why = _refusal(row, sizes, initial_params, path, differentiable, symmetric)
        if why is None and memory is not None and peak > memory:
            why = f"more memory than the {_size(memory)} at hand"
        if why is not None:
            refused[row.code] = why
        else:
            fitting.append(Recommendation(row, work, peak, _reason(row, converged)))
    order = {"exact": 0, "solution": 0 if converged else 1, "unbiased": 2, "biased": 3}
    # A stable sort: rows that tie stay in the order of the table.
    ranking = sorted(fitting, key=lambda r: (order[r.method.kind], r.work, r.bytes))
    return Advice(tuple(ranking), refused, sizes)


def _refusal(row: Method, sizes: Sizes, initial_params: bool, path: bool, differentiable: bool, symmetric: bool) -> str | None:
    if initial_params and not row.initial_params:
        return "it does not estimate the derivative by the initial params"
    if path and not row.path:
        return "hparams that only shape the path to the solution have no derivative there"
    if not differentiable and row.differentiates:
        return "it differentiates the inner objective"
    if row.symmetric and not symmetric:
        return "it needs a symmetric matrix"
    if row.by_hand:
        return "it wants the network and its loss apart: a choice to make by hand"
    return row.limit(sizes)


def _reason(row: Method, converged: bool) -> str:
    if row.kind == "exact":
        return "exact for the steps that are taken"
    if row.kind == "solution":
        return "right for the solution, which the steps reach" if converged else "right for the solution, which the steps may not reach"
    return f"right in the mean: {row.bias}" if row.kind == "unbiased" else f"biased: {row.bias}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
