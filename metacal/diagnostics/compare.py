"""Many methods on one problem: what each gets wrong, and what it costs."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from metacal import _random, tree
from metacal._device import device_of, wait
from metacal._typing import Tree
from metacal.adjoints import Unrolled
from metacal.diagnostics.check import cosine, relative_error
from metacal.diagnostics.cost import peak_bytes, work
from metacal.diagnostics.double import doubled
from metacal.estimate import Estimate, HyperGradient, hypergradient
from metacal.inner import InnerState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Callable[[InnerState, Tree, Sequence[Tree], Tree], HyperGradient]


class Row(NamedTuple):
    """One method. NaN: not estimated, not counted, or undefined (the cosine of a zero).

    Attributes:
        cosine, relative_error: to the exact hypergradient by the hparams.
        params_cosine, params_relative_error: to the exact one by the initial params.
        seconds: median of the repeats; ``fastest`` and ``slowest`` are their range.
        peak_bytes: largest number of bytes allocated at a time, above those before the call.
        products: Hessian-vector products that the method reports.
        work: floating-point operations, in plain training steps on the first inner batch.
        stats: the hypergradient's, as numbers.
        finite: whether all of the hypergradient is; errors and cosines of one that is not are NaN as well.
        error: why there is nothing else: what the method raised.
    """

    name: str
    cosine: float = math.nan
    relative_error: float = math.nan
    params_cosine: float = math.nan
    params_relative_error: float = math.nan
    seconds: float = math.nan
    fastest: float = math.nan
    slowest: float = math.nan
    peak_bytes: float = math.nan
    products: float = math.nan
    work: float = math.nan
    stats: Mapping[str, float] = MappingProxyType({})
    finite: bool = True
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured: ``print`` it, or take ``rows``, :meth:`to_dataframe`, :meth:`plot`.

    ``exact`` says what the errors are relative to.
    """

    rows: tuple[Row, ...]
    exact: str

    def __str__(self) -> str:
        shown = [c for c in _COLUMNS if c.header in ("method", "cosine", "error") or any(c.text(row) for row in self.rows)]
        cells = [[c.header for c in shown], *([c.text(row) for c in shown] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = [
            [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in cells
        ]
        failed = [f"{row.name}: {said}" for row in self.rows if (said := row.error or _not_finite(row))]
        return "\n".join([*("  ".join(line).rstrip() for line in aligned), *failed, f"Errors are relative to {self.exact}."])

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with one line per method; the stats are columns ``stats.<name>``.

        Errors: ImportError if pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("`to_dataframe` needs pandas: pip install pandas. The same numbers are in `rows`.") from error
        fields = [row._asdict() | {f"stats.{name}": value for name, value in row.stats.items()} for row in self.rows]
        return pandas.DataFrame([{k: v for k, v in f.items() if k != "stats"} for f in fields])

    def plot(self, target: str | os.PathLike[str] | Sequence[Axes]) -> None:
        """Error against work and against peak memory, both logarithmic.

        Args:
            target: a path to write the picture to (the suffix says how), or two axes of matplotlib to draw on.

        An error below 1e-16 is drawn there. Where no work could be counted, seconds take its place.
        """
        from matplotlib.figure import Figure  # slow to import, and only here needed

        if isinstance(target, (str, os.PathLike)):
            figure = Figure(figsize=(10, 4), layout="constrained")
            self.plot(figure.subplots(1, 2))
            figure.savefig(target)
            return
        if len(target) != 2:
            raise ValueError(f"`target` should be a path or two axes, one for work and one for memory; got {len(target)}.")
        counted = any(not math.isnan(row.work) for row in self.rows)
        costs: tuple[tuple[str, Callable[[Row], float]], ...] = (
            ("work, in plain training steps", lambda row: row.work) if counted else ("seconds", lambda row: row.seconds),
            ("peak memory, bytes", lambda row: row.peak_bytes),
        )
        for ax, (label, cost) in zip(target, costs, strict=True):
            for row in self.rows:
                if not math.isnan(_error(row)) and cost(row) > 0:
                    ax.scatter([cost(row)], [max(_error(row), 1e-16)], label=row.name)
                    ax.annotate(row.name, (cost(row), max(_error(row), 1e-16)), fontsize="small")
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="relative error of the hypergradient")


def compare(
    estimates: Mapping[str, Method],
    state: InnerState,
    hparams: Tree,
    inner_batches: Sequence[Tree],
    outer_batch: Tree,
    *,
    exact: Method | None = None,
    repeats: int = 5,
) -> Comparison:
    """Runs many methods on one problem, your own: a row per method with its errors and its costs.

    Args:
        estimates: made by :func:`metacal.hypergradient`, by name.
        exact: what the errors are relative to; by default ``Unrolled()`` of each estimate's own solver, in float64 if the
            objectives can be run in it and draw no noise. Implicit methods differ from that by how far the inner solve is from
            converged: pass ``hypergradient(outer, solver, Implicit(linear.Dense()))`` to compare them with the solution's derivative.
        repeats: timed runs of every method, after one that warms up and is not timed; methods take turns, so that a machine
            that slows down does so for all.

    Every run starts from the same state of torch's random generators, which are afterwards as they were before. A method that
    raises is a row that says why; ``exact`` may not raise. Work is what torch's flop registry knows (matrix products,
    convolutions, attention): NaN where a step has none of it. Cost: ``repeats`` + 3 runs of every method.

    >>> import metacal
    >>> from metacal import adjoints, linear
    >>> w, h = torch.zeros(2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    >>> inner = lambda w, h, x: ((x @ w - h) ** 2).mean() + (w ** 2).sum()
    >>> solver = metacal.descent(inner, metacal.optim.sgd(0.1))
    >>> methods = {"exact": adjoints.Unrolled(segment=1), "CG": adjoints.Implicit(linear.CG(2))}
    >>> estimates = {name: metacal.hypergradient(lambda w, h, b: (w ** 2).sum(), solver, a) for name, a in methods.items()}
    >>> table = compare(estimates, solver.init(w, h), h, [torch.eye(2, dtype=torch.float64)] * 3, None, repeats=1)
    >>> [(row.name, round(row.cosine, 3), round(row.relative_error, 2), row.products) for row in table.rows]
    [('exact', 1.0, 0.0, nan), ('CG', 1.0, 0.52, 1.0)]
    """
    if not estimates:
        raise ValueError("`estimates` should map names to estimates made by metacal.hypergradient; it is empty.")
    if repeats < 1:
        raise ValueError(f"`repeats` should be at least 1, got {repeats}.")
    if exact is None:
        for name, estimate in estimates.items():
            if not isinstance(estimate, Estimate):
                raise TypeError(
                    f"`estimates[{name!r}]` should be made by metacal.hypergradient, to be unrolled exactly; got "
                    f"{type(estimate).__name__}. Pass `exact`, an estimate to compare with."
                )
    with _random.preserved(state.params, hparams):
        return _Bench(state, hparams, inner_batches, outer_batch, _random.noise(state.params, hparams)).table(estimates, exact, repeats)


@dataclass(frozen=True)
class _Bench:
    state: InnerState
    hparams: Tree
    batches: Sequence[Tree]
    outer_batch: Tree
    noise: _random.Noise

    def run(self, method: Method) -> HyperGradient:
        _random.restore(self.noise)
        hg = method(self.state, self.hparams, self.batches, self.outer_batch)
        wait(self._device)
        return hg

    @property
    def has_drawn(self) -> bool:
        """Whether the last run moved torch's generators."""
        return _random.same_or(self.noise, _random.noise(self.state.params, self.hparams)) is not self.noise

    def table(self, estimates: Mapping[str, Method], exact: Method | None, repeats: int) -> Comparison:
        rows, truths = {}, _Truths(self, exact)
        for name, method in estimates.items():
            try:
                hg = self.run(method)  # warms up
            except Exception as error:
                rows[name] = Row(name, error=f"{type(error).__name__}: {error}")
            else:
                rows[name] = self._row(name, method, hg, truths.of(method))
        running = {name: method for name, method in estimates.items() if not rows[name].error}
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(repeats):
            for name, method in running.items():
                begin = time.perf_counter()
                self.run(method)
                seconds[name].append(time.perf_counter() - begin)
        for name, taken in seconds.items():
            rows[name] = rows[name]._replace(seconds=statistics.median(taken), fastest=min(taken), slowest=max(taken))
        return Comparison(tuple(rows.values()), truths.words)

    def _row(self, name: str, method: Method, hg: HyperGradient, truth: HyperGradient) -> Row:
        unit = work(lambda: self._plain_step(method))
        row = Row(
            name,
            peak_bytes=peak_bytes(lambda: self.run(method), self._device),
            work=work(lambda: self.run(method)) / unit if unit else math.nan,
            products=float(hg.stats.get("num_products", math.nan)),
            stats={key: float(value) for key, value in hg.stats.items()},
            finite=all(bool(leaf.isfinite().all()) for leaf in tree.leaves((hg.hparams, hg.params))),
        )
        if tree.num_elements(hg.hparams):
            row = row._replace(cosine=cosine(hg.hparams, truth.hparams), relative_error=relative_error(hg.hparams, truth.hparams))
        if tree.num_elements(hg.params) and tree.num_elements(truth.params):
            row = row._replace(params_cosine=cosine(hg.params, truth.params), params_relative_error=relative_error(hg.params, truth.params))
        return row

    def _plain_step(self, method: Method) -> None:
        if isinstance(method, Estimate) and len(self.batches):
            _random.restore(self.noise)
            method.solver.step(self.state, self.hparams, self.batches[0])

    @property
    def _device(self) -> torch.device:
        return device_of((self.state.params, self.hparams))


class _Truths:
    """The exact hypergradient that belongs to a method: one for all if it was given, else that of the method's own run."""

    def __init__(self, bench: _Bench, exact: Method | None) -> None:
        self._bench, self._given = bench, None if exact is None else bench.run(exact)
        self._found: dict[tuple[int, int], HyperGradient] = {}
        self._in_float64: list[bool] = []

    @property
    def words(self) -> str:
        """What the errors are relative to."""
        if self._given is not None:
            return "`exact`"
        some = " in float64" if all(self._in_float64) else ", in float64 for some" if any(self._in_float64) else ""
        return f"Unrolled() of the same run{some}"

    def of(self, method: Method) -> HyperGradient:
        """Of the same outer objective and solver."""
        if self._given is not None:
            return self._given
        assert isinstance(method, Estimate)
        key = id(method.outer), id(method.solver)
        if key not in self._found:
            self._found[key] = self._unrolled(hypergradient(method.outer, method.solver, Unrolled()))
        return self._found[key]

    def _unrolled(self, exact: Estimate) -> HyperGradient:
        found = self._bench.run(exact)
        precise = None if self._bench.has_drawn else self._in_double(exact)  # noise in another dtype is another noise, and another run
        self._in_float64.append(precise is not None)
        return found if precise is None else precise

    def _in_double(self, exact: Estimate) -> HyperGradient | None:
        b = self._bench
        try:
            return _Bench(*doubled(b.state, b.hparams, b.batches, b.outer_batch), b.noise).run(exact)
        except Exception:  # an objective that closes over float32 tensors
            return None


def _not_finite(row: Row) -> str:
    """What to say of a hypergradient that is not finite; nothing of one that is."""
    if row.finite:
        return ""
    bad = row.stats.get("first_bad_step", -1)
    return "not finite" + (f", as the params are from step {bad:.0f} on" if bad >= 0 else ", though the params are")


def _error(row: Row) -> float:
    """By what it estimates: the hparams if it does, else the initial params."""
    return row.params_relative_error if math.isnan(row.relative_error) else row.relative_error


class _Column(NamedTuple):
    header: str
    text: Callable[[Row], str]


def _number(value: Callable[[Row], float], form: str) -> Callable[[Row], str]:
    return lambda row: "" if math.isnan(value(row)) else format(value(row), form)


def _seconds(row: Row) -> str:
    if math.isnan(row.seconds):
        return ""
    return f"{row.seconds:.2g}" if row.slowest == row.fastest else f"{row.seconds:.2g} ({row.fastest:.2g} - {row.slowest:.2g})"


def _stat(name: str) -> Callable[[Row], float]:
    return lambda row: row.stats.get(name, math.nan)


_COLUMNS = (
    _Column("method", lambda row: row.name),
    _Column("cosine", _number(lambda row: row.cosine, ".4f")),
    _Column("error", _number(lambda row: row.relative_error, ".1e")),
    _Column("params cosine", _number(lambda row: row.params_cosine, ".4f")),
    _Column("params error", _number(lambda row: row.params_relative_error, ".1e")),
    _Column("work", _number(lambda row: row.work, ".1f")),
    _Column("seconds", _seconds),
    _Column("peak MB", _number(lambda row: row.peak_bytes / 1e6, ".3g")),
    _Column("products", _number(lambda row: row.products, ".0f")),
    _Column("linear residual", _number(_stat("linear_residual"), ".1e")),
    _Column("residual norm", _number(_stat("residual_norm"), ".1e")),
    _Column("direct share", _number(_stat("direct_share"), ".2f")),
)
