"""From the numbers of a check to its verdict in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metacal.adjoints import Adjoint, Implicit
from metacal.diagnostics.differences import Difference
from metacal.diagnostics.promise import Promise

Verdict = Literal["right", "biased", "random", "wrong", "unreliable", "undecided", "no effect", "not finite", "not repeatable"]
Which = Literal["hparams", "params"]


class Direction(NamedTuple):
    """The derivative along one direction of the hparams or of the initial params, in four ways.

    Attributes:
        which: "hparams" or "params" (the initial ones).
        path: of the leaf, where the direction moves one leaf only; "" where it moves all.
        estimate: by the hypergradient under test (the mean over the draws of a random one).
        promised: by central differences of the function whose derivative the method claims.
        exact: by central differences of the outer value after the run.
        direct: the part of ``exact`` that does not pass through the inner params.
        unrolled: by the exact unroll; NaN where it cannot be had.
        standard_error: of a random ``estimate``; 0 of a deterministic one.
    """

    which: Which
    path: str
    estimate: float
    promised: Difference
    exact: Difference
    direct: Difference
    unrolled: float = math.nan
    standard_error: float = 0.0

    def __str__(self) -> str:
        if self.path:
            return f"`{self.which}` at '{self.path}'"
        return f"a random direction of the {'initial params' if self.which == 'params' else 'hparams'}"

    @property
    def size(self) -> float:
        """Of the numbers that are compared: where two parts cancel, rounding is relative to the parts."""
        return max(abs(self.promised.value), abs(self.direct.value), abs(self.estimate))


@dataclass(frozen=True)
class CheckResult:
    """What :func:`metacal.check` found; ``str(result)`` is the verdict in words.

    Attributes:
        verdict: "right": the derivative of the steps that were taken. "biased": right by its own definition, which differs from
            that. "random": right in the mean. "wrong": not what the method defines. "unreliable": as defined, but of a problem on
            which the definition means little. "undecided": rounding hides the answer. "no effect": the derivative by the hparams
            is zero. "not finite" and "not repeatable" speak for themselves.
        ok: "right", "random", or "biased" by no more than was allowed.
        headline: the verdict's first sentence.
        reasons: why, and what to do.
        directions: the numbers behind it.
        relative_error: distance to the exact unroll over its norm, all estimated entries together; NaN if it cannot be had.
        cosine: of the angle to the exact unroll.
        linear_residual: relative, of the linear system of an implicit method, measured by a product of its own; else NaN.
        stats: the estimate's, as numbers.
    """

    verdict: Verdict
    ok: bool
    headline: str
    reasons: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = ()
    relative_error: float = math.nan
    cosine: float = math.nan
    linear_residual: float = math.nan
    stats: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n  - ".join([f"{self.verdict}: {self.headline}", *self.reasons])


@dataclass(frozen=True)
class Evidence:
    """The numbers of a check: those of a :class:`CheckResult`, and what is known of the method and of the run.

    Attributes:
        promise: what the method computes by definition.
        scale: what rounding is relative to.
        num_draws: of a random method, else 1.
        steps_move: the steps change the params.
        steps_draw: the steps draw random numbers.
        warned: what the method says itself against its number (:class:`metacal.linear.UnreliableHypergradient`).
        dtype, rtol, allowed_bias: of the comparison.
        contested: the directions along which larger steps spoke against the estimate, as they were and as they are now; the
            differences are then those of :func:`close_difference`.
    """

    adjoint: Adjoint
    promise: Promise
    scale: float
    directions: tuple[Direction, ...]
    relative_error: float
    cosine: float
    stats: dict[str, float]
    num_draws: int
    steps_move: bool
    steps_draw: bool
    warned: tuple[str, ...]
    dtype: torch.dtype
    rtol: float
    allowed_bias: float | None
    contested: tuple[tuple[Direction, Direction], ...] = ()

    @property
    def name(self) -> str:
        """The method as one would write it."""
        return describe(self.adjoint)

    def relative(self, d: Direction, error: float) -> float:
        """An error relative to the largest of the derivatives along directions like ``d``."""
        size = max(max(other.size, abs(other.exact.value), other.promised.error) for other in self.directions if other.which == d.which)
        return error / size if size else math.inf if error else 0.0

    def precision(self, d: Direction) -> float:
        """The error of the differences along ``d``, relative to the derivatives along it; 1 where it hides them."""
        return d.promised.error / max(d.size, abs(d.exact.value), d.promised.error) if d.promised.error else 0.0

    @property
    def telling(self) -> list[Direction]:
        """The directions along which something can be told."""
        return [d for d in self.directions if self.precision(d) <= 0.1]

    def agrees(self, d: Direction) -> bool:
        """Whether the estimate is what the method promises, as far as rounding, differences and draws can tell."""
        rounding = 10 * torch.finfo(self.dtype).eps * self.scale
        tolerance = (self.rtol + self.promise.slack) * d.size + 3 * d.promised.error + 5 * d.standard_error + rounding
        return abs(d.estimate - d.promised.value) <= tolerance

    def doubtful(self, d: Direction) -> bool:
        """Whether the exact unroll is another number than the estimate, and differences cannot tell which of the two is right."""
        apart = not self.agrees(d._replace(promised=Difference(d.unrolled, 0.0)))
        return not self.promise.bias and apart and self.agrees(d._replace(estimate=d.unrolled))


def judge(e: Evidence) -> CheckResult:
    """The verdict: what speaks against the numbers comes first, then the method's own errors, then what is left out."""
    numbers: dict[str, Any] = {name: getattr(e, name) for name in ("directions", "relative_error", "cosine", "stats")}
    return dataclasses.replace(_judged(e), **numbers, linear_residual=e.promise.linear_residual)


def _judged(e: Evidence) -> CheckResult:
    if not e.directions:
        return CheckResult("no effect", False, "there is nothing to check: hparams are empty, and the initial params not estimated.")
    if any(math.isnan(d.promised.value) for d in e.directions):
        edge = "Lower the inner step size, or move the hparams away from the edge of what is allowed."
        return CheckResult("undecided", False, "central differences are not finite: the run diverges close to these hparams.", (edge,))
    wrong = [d for d in e.directions if not e.agrees(d)]
    if wrong:
        d = max(wrong, key=lambda d: e.relative(d, abs(d.estimate - d.promised.value)))
        what = "what it defines" if e.promise.defined else "the derivative of the steps that were taken"
        headline = f"{e.name} is not {what}: along {d} it gives {d.estimate:.6g}, central differences {d.promised}."
        return CheckResult("wrong", False, headline, (*_suspicions(e), *_notes(e)))
    # The initial params' own part says nothing for the hparams; it is judged where there are none.
    asked = [d for d in e.directions if d.which == "hparams"] or e.directions
    if not e.contested and all(d.estimate == 0 and _vanishes(d.promised) and _vanishes(d.exact) for d in asked):
        of = "hparams" if asked[0].which == "hparams" else "initial params"
        closure = "Does an objective close over a copy of them (a constant to every method), or not use them? Use the ones passed in."
        flat = "Or is the derivative zero here: at a stationary point of the outer value, or behind steps that take signs (optim.lion)?"
        return CheckResult("no effect", False, f"neither {e.name} nor central differences see the {of}.", (closure, flat))
    trouble = tuple(_trouble(e))
    if trouble:
        headline = f"{e.name} is what it defines, on a problem where that means little."
        return CheckResult("unreliable", False, headline, (*trouble, *_notes(e)))
    precision = min(e.precision(d) for d in asked if not d.path)
    if headline := next(_undecided(e, asked, precision), ""):
        return CheckResult("undecided", False, headline, (_rounding(e), *_notes(e)))
    coarse = (f"Central differences are good to {percent(precision)} only here. {_rounding(e)}",) if precision > e.rtol else ()
    if e.contested:
        coarse = (f"{_KINKS} Smaller ones tell along {len(e.telling)} of {len(e.directions)} directions.",)
    if isinstance(e.adjoint, Implicit) and e.promise.slack > 100 * e.rtol:
        ill = "Rounding moves the linear solver's answer by {}: the system is ill-conditioned, and the check no finer than that."
        coarse = (*coarse, ill.format(percent(e.promise.slack / 10)))
    if e.num_draws > 1:
        spread = max(e.relative(d, d.standard_error) for d in e.directions) * math.sqrt(e.num_draws)
        headline = (
            f"{e.name} is right in the mean of {e.num_draws} draws, within their standard error; one draw is off by {percent(spread)}."
        )
        return CheckResult("random", True, headline, (*_because(e.promise.bias), *coarse, *_notes(e)))
    if not e.promise.bias or e.relative_error <= e.rtol:
        found = max(e.relative_error if e.promise.bias else 0.0, *(e.relative(d, abs(d.estimate - d.promised.value)) for d in e.telling))
        headline = f"{e.name} equals the derivative of the steps that were taken, to {found:.0e}."
        return CheckResult("right", True, headline, (*coarse, *_notes(e)))
    allowed = e.allowed_bias is None or e.relative_error <= e.allowed_bias
    over = () if allowed else (f"That is not within the {percent(e.allowed_bias or 0.0)} that `bias` allows.",)
    angle = "" if math.isnan(e.cosine) else f" (cosine {e.cosine:.3f})"
    distance = "" if math.isnan(e.relative_error) else f", and differs from the exact unroll by {percent(e.relative_error)}{angle}"
    headline = f"{e.name} is {_right_for(e)}{distance or '; there is no exact unroll to compare with'}."
    return CheckResult("biased", allowed, headline, (*over, *_because(e.promise.bias), *_parts_of_the_bias(e), *coarse, *_notes(e)))


def _undecided(e: Evidence, asked: Sequence[Direction], precision: float) -> Iterator[str]:
    """What keeps one from saying anything."""
    if precision > 0.1:
        yield f"central differences are good to {percent(precision)} only, so little can be said of {e.name}."
    against = [(d, f"differences over larger steps {before.promised}") for before, d in e.contested if d in asked and e.precision(d) > 0.1]
    for d, other in (*against, *((d, f"the exact unroll {d.unrolled:.6g}") for d in e.directions if e.doubtful(d))):
        yield f"{e.name} gives {d.estimate:.6g} along {d}, {other}; central differences, {d.promised}, cannot tell which is right."


def _right_for(e: Evidence) -> str:
    if isinstance(e.adjoint, Implicit) and e.promise.linear_residual <= e.rtol and not _damped(e.adjoint):
        return "right for the solution"
    return "what it defines"


def _because(bias: str) -> tuple[str, ...]:
    return (f"By definition {bias}.",) if bias else ()


def _parts_of_the_bias(e: Evidence) -> Iterator[str]:
    """Of an implicit method, as far as its statistics show them."""
    if not isinstance(e.adjoint, Implicit):
        return
    if not e.steps_move:
        yield "The steps do not move the params: what is unrolled does not show how the solution depends on the hparams."
        return
    distance = e.stats.get("residual_norm", math.nan)
    if distance > e.rtol:
        yield f"The inner solve is not converged (residual_norm {distance:.2g}): take more inner steps."
    if e.promise.linear_residual > e.rtol:
        yield f"The linear system is not solved (residual {e.promise.linear_residual:.2g}): {describe(e.adjoint.solver)} needs more steps."
    if _damped(e.adjoint):
        yield f"Damping {describe(e.adjoint.damping)} is added to the diagonal of the system."
    if not (distance > e.rtol or e.promise.linear_residual > e.rtol or _damped(e.adjoint)):
        yield "The equation that `select` defines is not the one that the steps solve: other batches, or other noise."


def _trouble(e: Evidence) -> Iterator[str]:
    """Why an implicit hypergradient, computed as it is defined, means little."""
    yield from e.warned
    reported = e.stats.get("linear_residual", math.nan)
    if e.promise.linear_residual > max(10 * reported, 100 * e.rtol):
        yield f"The linear solver reports a residual of {reported:.2g}; measured by one more product it is {e.promise.linear_residual:.2g}."


def _suspicions(e: Evidence) -> Iterator[str]:
    """What would explain wrong numbers."""
    dead = dict.fromkeys(str(d) for d in e.directions if d.estimate == 0 and not _vanishes(d.promised))
    for where in dead:
        yield (
            f"Along {where} the hypergradient is exactly zero and the value changes: something is detached, under no_grad, or turned into "
            "a Python number (.item(), float()) on the way."
        )
    yield from _scaled(e)
    if e.steps_draw:
        yield "The steps draw random numbers: a method that computes one again has to put torch's generators back first."


def _scaled(e: Evidence) -> Iterator[str]:
    """A factor on the whole derivative or on one part of it, if one explains every direction."""
    through = [d for d in e.telling if d.which == "hparams"]
    whole: Callable[[Direction], float] = lambda d: d.promised.value  # noqa: E731
    direct: Callable[[Direction], float] = lambda d: d.direct.value  # noqa: E731
    indirect: Callable[[Direction], float] = lambda d: d.promised.value - d.direct.value  # noqa: E731
    fits = (
        ("the hypergradient", _factor(e.telling, lambda d: 0.0, whole, e.rtol)),
        ("the direct part, d outer / d hparams,", _factor(through, indirect, direct, e.rtol)),
        ("the indirect part, through the inner params,", _factor(through, direct, indirect, e.rtol)),
    )
    found = [(part, c) for part, c in fits if c is not None]
    # The simplest explanation first: a part is missing, has the wrong sign, or is counted twice.
    named = [(part, how) for part, c in found for n, how in _FACTORS.items() if abs(c - n) <= 100 * e.rtol]
    explained = [f"{part} {how}" for part, how in named] or [f"{part} were scaled by {c:.4g}" for part, c in found]
    yield from (f"It is as if {words}." for words in explained[:1])


_FACTORS = {-1: "had the wrong sign", 0: "were missing", 2: "were counted twice"}


def _factor(
    directions: Sequence[Direction], fixed: Callable[[Direction], float], scaled: Callable[[Direction], float], rtol: float
) -> float | None:
    """The c with ``estimate = fixed + c scaled`` along every direction, if there is one and it is not 1."""
    size = sum(scaled(d) ** 2 for d in directions)
    if not size:
        return None
    c = sum((d.estimate - fixed(d)) * scaled(d) for d in directions) / size
    off = norm(d.estimate - fixed(d) - c * scaled(d) for d in directions)
    return c if off <= 100 * rtol * math.sqrt(size) and abs(c - 1) > 100 * rtol else None


def _notes(e: Evidence) -> Iterator[str]:
    """Of leaves whose gradient is zero, and of those of which nothing can be said."""
    leaves = [d for d in e.directions if d.path]
    for d in (d for d in leaves if d.which == "hparams" and d.estimate == 0 and e.relative(d, d.exact.error) <= 0.1):
        if _vanishes(d.exact):
            yield f"Along {d} nothing changes: is a copy of it closed over, or is it not used?"
        elif _vanishes(d.promised):
            yield (
                f"Along {d} the value after the steps changes (by {d.exact.value:.2g} per unit), but the method estimates nothing: what "
                "only shapes the path (a learning rate) needs an exact method."
            )
    told = {d.which for d in e.telling if not d.path}
    if hidden := [str(d) for d in leaves if d.which in told and d.estimate and d not in e.telling]:
        yield f"Undecided along {', '.join(hidden)}: what it changes is lost in the rounding, or the roughness, of the outer value."


_KINKS = "Kinks or jumps are close (ReLU, L1, clipping): differences over large steps mislead."


def _rounding(e: Evidence) -> str:
    if e.dtype == torch.float64:
        return _KINKS if e.contested else "The value is rough at the scale of the differences: kinks, chaos, or something that rounds."
    limits = f"Rounding in {str(e.dtype).removeprefix('torch.')} limits what can be said: repeat with metacal.tree.to(..., torch.float64)."
    return f"{_KINKS} {limits}" if e.contested else limits


def _vanishes(d: Difference) -> bool:
    return abs(d.value) <= 3 * d.error


def _damped(adjoint: Implicit) -> bool:
    return isinstance(adjoint.damping, Tensor) or adjoint.damping != 0


def norm(values: Iterable[float]) -> float:
    """Of numbers."""
    return math.sqrt(sum(v * v for v in values))


def percent(x: float) -> str:
    """A relative error, for reading."""
    return f"{100 * x:.2g}%" if 1e-4 <= x < 1 else f"{100 * x:,.0f}%" if 1 <= x < 1e4 else f"{x:.1e}"


def describe(value: Any) -> str:
    """A dataclass as one would write it, defaults left out: ``Implicit(CG(num_steps=20), damping=0.1)``."""
    if isinstance(value, Tensor):
        return f"{float(value):.4g}" if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(getattr(value, "__name__", repr(value)))
    parts = []
    for f in dataclasses.fields(value):
        given = getattr(value, f.name)
        if isinstance(given, Tensor) or given != f.default:
            parts.append(describe(given) if dataclasses.is_dataclass(given) else f"{f.name}={describe(given)}")
    return f"{type(value).__name__}({', '.join(parts)})"
