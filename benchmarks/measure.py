"""What a call costs and how far its result is from the truth: one row per method and problem."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import metacal
from benchmarks.methods import Method, Unsupported
from benchmarks.problem import Problem, astype
from metacal import tree
from metacal._device import wait
from metacal._typing import Tree
from metacal.adjoints import Unrolled
from metacal.diagnostics import peak_bytes, work
from metacal.diagnostics.check import cosine, relative_error

Row = dict[str, Any]
"""A line of results: strings and numbers, None where something was not measured."""


def oracle(problem: Problem) -> Tree:
    """The exact hypergradient of the T steps, in float64, by a double backward of each step."""
    precise = astype(problem, torch.float64)
    solver = metacal.descent(precise.inner, precise.rule.ours())
    exact = metacal.hypergradient(precise.outer, solver, Unrolled(mode="reverse"))
    return exact(solver.init(precise.params, precise.hparams), precise.hparams, precise.batches, precise.outer_batch).hparams


def error(found: Tree, truth: Tree) -> tuple[float, float]:
    """The distance to the truth over its norm, and the cosine of the angle between them."""
    truth = tree.map(lambda t, f: t.to(f.device), truth, found)
    return relative_error(found, truth), cosine(found, truth)


def plain_steps(problem: Problem) -> Callable[[], None]:
    """The T inner steps alone, as one trains without a hypergradient: torch.optim, all tensors at once where it can (foreach)."""

    def call() -> None:
        params = {name: w.clone().requires_grad_() for name, w in problem.params.items()}
        optimizer = problem.rule.of_torch(params.values(), foreach=True)
        for batch in problem.batches:
            optimizer.zero_grad()
            problem.inner(params, problem.hparams, batch).backward()
            optimizer.step()

    return call


def one_step(problem: Problem) -> Callable[[], None]:
    """One plain gradient on the first batch: the unit of work."""

    def call() -> None:
        params = {name: w.clone().requires_grad_() for name, w in problem.params.items()}
        problem.inner(params, problem.hparams, problem.batches[0]).backward()

    return call


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    budget: float = math.inf,
    on_failure: Callable[[str, Exception], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds, so that a machine that slows down does so for all.

    Each round has an order of its own: a shared machine's speed comes and goes, and where a round takes as long as that, a fixed order
    favours a place in it. The calls should have run before. After three rounds there are no more once ``budget`` seconds are spent.
    Garbage is collected between calls and not during them. A call that raises is left out from then on, and ``on_failure`` is told;
    without it, it raises.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    with _frozen():
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - began > budget:
                break
            for name in random.Random(done).sample(list(seconds), len(seconds)):
                try:
                    seconds[name].append(_timed(calls[name], device))
                except Exception as error:
                    if on_failure is None:
                        raise
                    on_failure(name, error)
                    del seconds[name]
    return seconds


def _timed(call: Callable[[], Any], device: torch.device | str) -> float:
    with _no_collection():
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start


def spread(seconds: list[float]) -> Row:
    """Median, quartiles and the number of runs."""
    if not seconds:
        return {"seconds": None, "seconds_q25": None, "seconds_q75": None, "rounds": 0}
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"seconds": middle, "seconds_q25": low, "seconds_q75": high, "rounds": len(seconds)}


def measure(
    problem: Problem, methods: Iterable[Method], *, rounds: int = 5, budget: float = math.inf, judged: bool = True
) -> Iterator[Row]:
    """A row for every method, and one for the plain steps alone; what a method cannot do is a row that says why.

    With ``judged=False`` there is nothing about errors and work, and nothing is computed for them.
    """
    truth, device = oracle(problem) if judged else None, problem.device
    solution = problem.exact() if judged and problem.exact is not None else None
    unit = work(one_step(problem))
    sizes = {"problem": problem.name, "num_steps": problem.num_steps, "step_flops": unit, **_sizes(problem)}
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    plain = plain_steps(problem)
    candidates = [(m.name, m.library, m.kind, m.prepare) for m in methods] + [("plain steps", "torch", "limit", lambda _: plain)]
    for name, library, kind, prepare in candidates:
        row = rows[name] = {"method": name, "library": library, "kind": kind}
        try:
            with _quiet(row):
                call = prepare(problem)
                done = work(call) if judged else 0
                found, largest = peaked(call, device)
                if kind != "limit" and judged:
                    row["relative_error"], row["cosine"] = error(found, truth)
                    if not math.isfinite(row["relative_error"]):
                        row["failed"] = "the hypergradient is not finite"
                    if solution is not None:
                        row["solution_error"], _ = error(found, solution)
                del found
                # None for a library whose memory and products torch does not see.
                row |= {"peak_bytes": largest or None, "work": done / unit if unit and done else None}
                calls[name] = call
        except Unsupported as reason:
            row["unsupported"] = str(reason)
        except Exception as failure:
            row["failed"] = failed(failure)
    with _quiet({}):
        timed = interleaved(calls, rounds=rounds, device=device, budget=budget, on_failure=noting(rows))
    for name, seconds in timed.items():
        rows[name] |= spread(seconds)
    limit = rows["plain steps"].get("seconds")
    for row in rows.values():
        if limit and row.get("seconds"):
            row["over_plain_steps"] = row["seconds"] / limit
        yield sizes | row


def _sizes(problem: Problem) -> Row:
    state = problem.rule.ours().init(problem.params)
    floating = tree.partition(state)[0]
    return {
        "num_params": tree.num_elements(problem.params),
        "num_hparams": tree.num_elements(problem.hparams),
        "params_bytes": tree.num_bytes(problem.params),
        "state_bytes": tree.num_bytes((problem.params, floating)),
    }


def noting(rows: dict[str, Row]) -> Callable[[str, Exception], None]:
    """Writes what a call raised into its row."""
    return lambda name, error: rows[name].update(failed=failed(error))


def failed(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def matmul_rate(device: torch.device | str, size: int = 4096) -> float:
    """Floating-point operations per second of a large product in float32: what the roofline is drawn from."""
    a = torch.ones(size, size, device=device)
    seconds = interleaved({"product": lambda: a @ a}, rounds=10, device=device)["product"]
    return 2 * size**3 / min(seconds)


def peaked(call: Callable[[], Any], device: torch.device | str) -> tuple[Any, int]:
    """What a call returns, and the peak of bytes that it allocates beside what was there."""
    results: list[Any] = []
    gc.collect()
    largest = peak_bytes(lambda: results.append(call()), device)
    return results[0], largest


@contextmanager
def _frozen() -> Iterator[None]:
    """Collections look only through what is made from here on, not through what imports and compilers left."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _quiet(row: Row) -> Iterator[None]:
    """Keeps the first thing that a method says against its own number."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if said:
        row["warning"] = said[0]
