"""Is a hypergradient right? The bi-level analogue of ``torch.autograd.gradcheck``."""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from metacal import _random, tree
from metacal._typing import Tree
from metacal.adjoints import Unrolled
from metacal.diagnostics.differences import Difference, central_difference, close_difference
from metacal.diagnostics.double import doubled
from metacal.diagnostics.promise import RANDOM, Promise, Replay, Value, promise
from metacal.diagnostics.verdict import CheckResult, Direction, Evidence, Which, describe, judge, norm
from metacal.estimate import Estimate, HyperGradient, hypergradient
from metacal.inner import FirstBad, InnerState, advance
from metacal.linear import UnreliableHypergradient


def check(
    estimate: Estimate,
    state: InnerState,
    hparams: Tree,
    inner_batches: Sequence[Tree],
    outer_batch: Tree,
    *,
    num_directions: int = 3,
    rtol: float | None = None,
    bias: float | None = None,
    num_draws: int = 32,
    seed: int = 0,
) -> CheckResult:
    """Compares a hypergradient with central differences along random directions and with the exact unroll.

    Every method is held to *its own definition*: exact ones to the derivative of the run; truncated ones to that of the last
    steps; implicit ones to ``outer_h - F_h^T v`` with their own solver's v, whose residual is measured besides; random ones to
    their mean. What is differenced is made of plain steps with one realisation of noise, never of an adjoint. What a method
    leaves out by definition is its bias, reported and not called wrong. One that is not known here is held to the derivative of
    the run.

    Args:
        estimate: made by :func:`metacal.hypergradient`.
        num_directions: random directions in the hparams, and as many in the initial params where the method estimates them.
            Where there are several leaves, each gets one more of its own and is judged relative to itself: 16 of them at most,
            those whose gradient is exactly zero first, the rest drawn. Each leaf moves in proportion to its size.
        rtol: the relative error that counts as agreement; by default eps^(3/8), 1e-6 in float64 and 3e-3 in float32. Of a method
            without a bias, what the differences cannot tell from the exact unroll has to agree with that, or is undecided.
        bias: the largest relative distance to the exact unroll at which a biased method is still ``ok``; by default any.
        num_draws: of a method that draws directions of its own.
        seed: of the directions.

    Cost: some twenty runs per direction, twice as many before a method is called wrong (again over smaller steps, in float64 if the
    problem runs in it: large steps mislead where there are kinks); five hypergradients (``num_draws`` more of a random method), four
    linear solves of an implicit one. Memory: that of the estimate or of ``Unrolled()``. The state of torch's random generators is
    afterwards as it was before.
    Not for use inside ``torch.func`` transforms.

    Numerical trouble is in the result. Errors: TypeError for an estimate that does not show its parts; whatever the estimate
    itself raises on bad input.

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> outer = lambda w, h, b: (w ** 2).sum() / 2
    >>> h = torch.ones(2, dtype=torch.float64)
    >>> problem = solver.init(torch.zeros_like(h), h), h, metacal.repeat(None, 5), None
    >>> result = check(metacal.hypergradient(outer, solver, metacal.adjoints.Unrolled()), *problem)
    >>> result.ok, result.verdict
    (True, 'right')
    >>> print(check(metacal.hypergradient(outer, solver, metacal.adjoints.Implicit(metacal.linear.CG(3))), *problem))
    biased: Implicit(CG(num_steps=3)) is right for the solution, and differs from the exact unroll by 3.2% (cosine 1.000).
      - By definition it is the derivative of a solution, not of the steps.
      - The inner solve is not converged (residual_norm 0.032): take more inner steps.
    """
    if not isinstance(estimate, Estimate):
        raise TypeError(
            f"`estimate` should be made by metacal.hypergradient, which shows its parts; got {type(estimate).__name__}. To check a "
            "method of your own, make it an Adjoint and pass metacal.hypergradient(outer, solver, adjoint)."
        )
    if num_directions < 1 or num_draws < 2:
        raise ValueError(f"`num_directions` should be at least 1 and `num_draws` at least 2, got {num_directions} and {num_draws}.")
    state, hparams = tree.detach((state, hparams))
    with _random.preserved(state.params, hparams), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise = _random.noise(state.params, hparams)
        replay = Replay(estimate.outer, estimate.solver, state, hparams, inner_batches, outer_batch, noise)
        result = _Check(estimate, replay, num_directions, rtol, bias, num_draws, seed, caught).result()
    said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    return dataclasses.replace(result, reasons=tuple(dict.fromkeys((*result.reasons, *said))))


_LEAVES = 16  # with a direction of their own


@dataclass(frozen=True)
class _Check:
    estimate: Estimate
    problem: Replay
    num_directions: int
    given_rtol: float | None
    allowed_bias: float | None
    num_draws: int
    seed: int
    caught: list[warnings.WarningMessage]

    def result(self) -> CheckResult:
        try:
            hg, again = self._sample(), self._sample()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            return CheckResult("not finite", False, f"{describe(self.estimate.adjoint)} meets a singular system ({error}).", (_SINGULAR,))
        found = self._not_repeatable(hg, again) or self._not_finite(hg) or self._two_sources(hg)
        stats = {name: float(value) for name, value in hg.stats.items()}
        if found:
            return dataclasses.replace(found, stats=stats)
        evidence = self._evidence(hg, stats)
        result = judge(evidence)
        return judge(self._closer(evidence, hg)) if result.verdict == "wrong" else result

    @property
    def _dtype(self) -> torch.dtype:
        return _coarsest(self.problem)

    def _sample(self, estimate: Estimate | None = None) -> HyperGradient:
        _random.restore(self.problem.noise)
        return self._draw(estimate or self.estimate)

    def _draw(self, estimate: Estimate) -> HyperGradient:
        """With whatever noise comes next."""
        p = self.problem
        return estimate(p.state, p.hparams, p.batches, p.outer_batch)

    # What speaks against any comparison.

    def _not_repeatable(self, hg: HyperGradient, again: HyperGradient) -> CheckResult | None:
        if not self._differ((hg.value, hg.hparams, hg.params), (again.value, again.hparams, again.params)):
            return None
        first, second = self._value(), self._value()
        if self._differ(first, second):
            return CheckResult(
                "not repeatable",
                False,
                f"two runs from one state of torch's generators give the outer values {first:.6g} and {second:.6g}.",
                (
                    "An objective or its data draws from a generator of its own, from numpy or from random, or changes something that it "
                    "closes over. Recomputed steps then see other noise, and the hypergradient is that of no one function. Draw from "
                    "torch's default generators, or put what is drawn into the batches.",
                ),
            )
        return CheckResult(
            "not repeatable",
            False,
            f"the runs are equal, but two hypergradients of {describe(self.estimate.adjoint)} from one state of torch's generators differ.",
            ("The adjoint draws from a generator of its own, or keeps something between calls.",),
        )

    def _not_finite(self, hg: HyperGradient) -> CheckResult | None:
        step, value_is_finite = self._first_bad_step(), math.isfinite(float(hg.value))
        gradient_is_finite = all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves((hg.hparams, hg.params)))
        if step < 0 and value_is_finite and gradient_is_finite:
            return None
        if step >= 0:
            reasons = [f"The inner params hold a NaN or an infinity after step {step}: lower the inner step size, or clip."]
        elif not value_is_finite:
            reasons = ["The inner params stay finite, the outer objective does not."]
        else:
            reasons = [
                "The outer value is finite, its derivative is not: an operation has an infinite derivative here (sqrt or a norm at 0), "
                "or a linear system is singular."
            ]
        if gradient_is_finite and not value_is_finite:
            reasons.append("The hypergradient is made of finite numbers all the same: it hides the trouble.")
        return CheckResult("not finite", False, f"{describe(self.estimate.adjoint)} meets a NaN or an infinity.", tuple(reasons))

    def _two_sources(self, hg: HyperGradient) -> CheckResult | None:
        """Directions and noise cannot be told apart where both are drawn from one generator."""
        torch.manual_seed(self.seed + 1)
        seen_apart = not self._differ(hg.value, self._draw(self.estimate).value) or not isinstance(self.estimate.adjoint, RANDOM)
        if seen_apart and not self._differ(hg.value, self._value()):
            return None
        return CheckResult(
            "undecided",
            False,
            f"{describe(self.estimate.adjoint)} draws numbers of its own, and so do the objectives: a check cannot hold one of them still.",
            ("Switch dropout and the like off for the check.",),
        )

    # The comparison.

    def _evidence(self, hg: HyperGradient, stats: dict[str, float]) -> Evidence:
        p, promised = self.problem, promise(self.estimate.adjoint, self.problem)
        draws, exact = self._draws(hg), self._unrolled()
        # Rounding is relative to the outer value, and to what that owes to its arguments: they are rounded too.
        owed = tree.map(torch.mul, (p.hparams, hg.state.params), (hg.hparams, p.cotangent()))
        scale = math.hypot(float(hg.value), float(tree.norm(owed)), promised.scale)

        def along(which: Which, path: str, u: Tree) -> Direction:
            found = [_dot(getattr(hg, which), u) for hg in draws]
            unrolled = math.nan if exact is None else _dot(getattr(exact, which), u)
            standard_error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
            return Direction(which, path, statistics.fmean(found), *_differences(p, which, u, promised, scale), unrolled, standard_error)

        directions = tuple(along(*direction) for direction in self._directions(hg))
        error, angle = (math.nan, math.nan) if exact is None else _apart(draws, exact)
        if math.isnan(error):  # nothing can differentiate this run: what differences say of the distance
            error = norm(d.estimate - d.exact.value for d in directions) / (norm(d.exact.value for d in directions) or math.nan)
        return Evidence(
            adjoint=self.estimate.adjoint,
            promise=promised,
            scale=scale,
            directions=directions,
            relative_error=error,
            cosine=angle,
            stats=stats,
            num_draws=len(draws),
            steps_move=self._differ(hg.state.params, p.state.params),
            steps_draw=self._steps_draw(),
            warned=tuple(dict.fromkeys(str(w.message) for w in self.caught if issubclass(w.category, UnreliableHypergradient))),
            dtype=self._dtype,
            rtol=torch.finfo(self._dtype).eps ** (3 / 8) if self.given_rtol is None else self.given_rtol,
            allowed_bias=self.allowed_bias,
        )

    def _draws(self, hg: HyperGradient) -> list[HyperGradient]:
        """The hypergradient; many of them if the method is random: known to be, or another seed changes it but not the value."""
        torch.manual_seed(self.seed + 1)
        other = self._draw(self.estimate)
        changes = not self._differ(hg.value, other.value) and self._differ((hg.hparams, hg.params), (other.hparams, other.params))
        if not changes and not isinstance(self.estimate.adjoint, RANDOM):
            return [hg]
        draws = [other, *(self._draw(self.estimate) for _ in range(self.num_draws - 1))]
        return draws if any(self._differ((hg.hparams, hg.params), (d.hparams, d.params)) for d in draws) else [hg]

    def _directions(self, hg: HyperGradient) -> Iterator[tuple[Which, str, Tree]]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(like: Tree) -> Tree:
            wide = tree.to(like, torch.float64)
            return tree.map(lambda x, w: _size(x) * torch.randn(x.shape, generator=generator, dtype=w.dtype).to(x), like, wide)

        for which, at in zip(get_args(Which), (self.problem.hparams, self.problem.state.params), strict=True):
            if tree.num_elements(getattr(hg, which)):
                yield from ((which, "", random(at)) for _ in range(self.num_directions))
                (u, treedef), g, paths = tree.flatten(random(at)), tree.leaves(getattr(hg, which)), tree.paths(at)
                drawn = torch.randperm(len(u), generator=generator).tolist()
                for i in sorted(sorted(drawn, key=lambda i: bool(g[i].any()))[:_LEAVES]) if len(u) > 1 else ():  # zeros first
                    yield which, paths[i], tree.unflatten(treedef, [x if j == i else torch.zeros_like(x) for j, x in enumerate(u)])

    def _closer(self, e: Evidence, hg: HyperGradient) -> Evidence:
        """Differences once more, over steps too small for most kinks: in float64, if the problem runs in it."""
        given = self.problem, promise(self.estimate.adjoint, self.problem)
        p, promised = given if self._dtype == torch.float64 else self._in_double(*given)
        directions = list[Direction]()
        for d, (which, _, u) in zip(e.directions, self._directions(hg), strict=True):
            claimed, exact, direct = _differences(p, which, tree.to(u, _coarsest(p)), promised, e.scale, close_difference)
            if _coarsest(p) != torch.float64:  # no step is small enough to be believed alone
                claimed = Difference(claimed.value, claimed.error + abs(claimed.value - d.promised.value))
            directions.append(d._replace(promised=claimed, exact=exact, direct=direct))
        contested = tuple(pair for pair in zip(e.directions, directions, strict=True) if not e.agrees(pair[0]))
        return dataclasses.replace(e, directions=tuple(directions), contested=contested)

    def _in_double(self, p: Replay, promised: Promise) -> tuple[Replay, Promise]:
        """The problem in float64; as it is, where it does not run there or to another value: noise in another dtype is other noise."""
        state, hparams, batches, outer_batch = doubled(p.state, p.hparams, p.batches, p.outer_batch)
        double = dataclasses.replace(p, state=state, hparams=hparams, batches=batches, outer_batch=outer_batch)
        try:
            found = promise(self.estimate.adjoint, double)
            at = (torch.tensor(to.value(q.state.params, q.hparams), dtype=torch.float64) for q, to in ((double, found), (p, promised)))
            same = not self._differ(*at)
        except Exception:  # an objective that closes over float32 tensors
            return p, promised
        return (double, found) if same else (p, promised)

    def _unrolled(self) -> HyperGradient | None:
        """The exact hypergradient; None where it cannot be had."""
        try:
            return self._sample(hypergradient(self.estimate.outer, self.estimate.solver, Unrolled()))
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # a run that nothing can differentiate
            return None

    # About the run.

    def _value(self) -> Tensor:
        p = self.problem
        return torch.tensor(p.run(p.state.params, p.hparams), dtype=torch.float64)

    def _first_bad_step(self) -> int:
        p, bad = self.problem, FirstBad()
        _random.restore(p.noise)
        advance(p.solver, p.state, p.hparams, p.batches, 0, len(p.batches), bad)
        return int(bad.step())

    def _steps_draw(self) -> bool:
        self._first_bad_step()
        return _random.same_or(self.problem.noise, _random.noise(self.problem.state.params)) is not self.problem.noise

    def _differ(self, a: Tree, b: Tree) -> bool:
        """By more than what the order of a summation may do."""
        rtol = 1e3 * torch.finfo(self._dtype).eps
        pairs = zip(tree.leaves(tree.to(a, torch.float64)), tree.leaves(tree.to(b, torch.float64)), strict=True)
        return any(not torch.allclose(x, y, rtol=rtol, atol=0.0, equal_nan=True) for x, y in pairs)


def _coarsest(p: Replay) -> torch.dtype:
    """Of what moves."""
    leaves = tree.partition((p.state.params, p.hparams))[0]
    return max((leaf.dtype.to_real() for leaf in leaves), key=lambda d: torch.finfo(d).eps, default=torch.get_default_dtype())


def _differences(
    p: Replay, which: Which, u: Tree, promised: Promise, scale: float, by: Callable[..., Difference] = central_difference
) -> tuple[Difference, Difference, Difference]:
    """Along ``u``: of what is promised, of the outer value after the run, and of its direct part."""

    def difference(value: Value) -> Difference:
        if which == "params":
            return by(lambda s: value(tree.axpy(s, u, p.state.params), p.hparams), _coarsest(p), scale)
        return by(lambda s: value(p.state.params, tree.axpy(s, u, p.hparams)), _coarsest(p), scale)

    exact = difference(p.run)
    claimed = difference(promised.value) if promised.bias else exact
    return claimed, exact, difference(p.identity()) if which == "hparams" else Difference(0.0, 0.0)


_SINGULAR = (
    "The Hessian of the inner objective is singular: the solution is not unique, and its derivative not defined. Regularise the inner "
    "objective, add `damping`, or use Unrolled."
)


def relative_error(got: Tree, truth: Tree) -> float:
    """``|got - truth| / |truth|`` over all leaves, in float64; NaN where the truth is zero and the other not."""
    off = tree.sub(tree.to(got, torch.float64), tree.to(truth, torch.float64))
    distance, size = math.sqrt(_dot(off, off)), math.sqrt(_dot(truth, truth))
    return distance / size if size else 0.0 if distance == 0 else math.nan


def cosine(got: Tree, truth: Tree) -> float:
    """Of the angle between two trees, in float64; NaN where one is zero."""
    size = math.sqrt(_dot(got, got) * _dot(truth, truth))
    return _dot(got, truth) / size if size else math.nan


def _apart(draws: list[HyperGradient], exact: HyperGradient) -> tuple[float, float]:
    """Relative error and cosine to the exact unroll over all that is estimated."""
    got, truth = ((_mean(hgs, "hparams"), _mean(hgs, "params") if tree.leaves(draws[0].params) else ()) for hgs in (draws, [exact]))
    return relative_error(got, truth), cosine(got, truth)


def _dot(a: Tree, b: Tree) -> float:
    return float(tree.vdot(tree.to(a, torch.float64), tree.to(b, torch.float64)))


def _mean(draws: list[HyperGradient], which: Which) -> Tree:
    return tree.mean([tree.to(getattr(hg, which), torch.float64) for hg in draws])


def _size(x: Tensor) -> Tensor:
    rms = x.detach().abs().square().mean().sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))
