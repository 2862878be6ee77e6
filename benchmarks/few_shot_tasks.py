"""MAML over many tasks: tasks per second, one after the other or together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn import functional as F

from benchmarks.measure import Row, failed, interleaved, noting, one_step, peaked, spread
from benchmarks.methods import METHODS, Method, Unsupported
from benchmarks.problem import Size, to
from benchmarks.problems.few_shot import WAYS, WIDTHS, episodes, task
from benchmarks.problems.nets import conv
from metacal import optim, tree
from metacal._typing import Tree
from metacal.adjoints import Unrolled
from metacal.algorithms import few_shot
from metacal.diagnostics import work
from metacal.diagnostics.check import relative_error

STEPS, RATE = 5, 0.4


def throughput(
    num_tasks: int, methods: Iterable[Method], size: Size, device: torch.device | str = "cpu", *, rounds: int = 5, budget: float = 30.0
) -> Iterator[Row]:
    """Seconds of the mean meta-gradient of the tasks: this library's loop and vmap, and a loop over each peer's exact method."""
    title, drawn = episodes(num_tasks, size)
    problems = [to(task(k, drawn, size, num_steps=STEPS), device) for k in range(num_tasks)]

    def looped(method: Method) -> Callable[[], Tree]:
        calls = [method.prepare(problem) for problem in problems]
        return lambda: tree.mean([call() for call in calls])

    def ours(how: few_shot.Tasks, adjoint: Unrolled) -> Callable[[], Tree]:
        support, query = tree.to((drawn.support, drawn.query), device)
        apply, start = conv(WIDTHS[size], WAYS, 4, batch_norm=True, size=support[0].shape[-1])
        # With this outer step the params move by minus the meta-gradient.
        learner = few_shot.maml(
            lambda w, batch: F.cross_entropy(apply(w, batch[0]), batch[1]),
            RATE,
            optim.sgd(1.0),
            num_steps=STEPS,
            adjoint=adjoint,
            tasks=how,
        )
        state = learner.init(tree.to(start, device))
        return lambda: tree.sub(state.inner.params, learner.step(state, support, query)[0].inner.params)

    candidates: list[tuple[str, str, Callable[[], Callable[[], Tree]]]] = [
        ("loop, graph", "metacal", lambda: ours("loop", Unrolled(mode="graph"))),
        ("vmap, mixed", "metacal", lambda: ours("vmap", Unrolled(segment=1))),
        ("auto", "metacal", lambda: ours("auto", Unrolled(mode="auto", segment=1))),
    ]
    candidates += [(m.name, m.library, lambda m=m: looped(m)) for m in methods if m.kind == "exact" and m.library != "metacal"]  # type: ignore[misc]
    truth, unit = looped(METHODS["reverse"])(), num_tasks * STEPS * work(one_step(problems[0]))
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Tree]] = {}
    for name, library, build in candidates:
        row = rows[name] = {"problem": f"MAML, {title}", "method": name, "library": library, "num_tasks": num_tasks}
        try:
            calls[name] = build()
            done = work(calls[name])
            found, largest = peaked(calls[name], device)
            row |= {"relative_error": relative_error(found, truth), "work": done / unit or None, "peak_bytes": largest or None}
            del found
        except Unsupported as reason:
            row["unsupported"] = str(reason)
        except Exception as failure:
            row["failed"] = failed(failure)
        if "peak_bytes" not in row:
            calls.pop(name, None)
    for name, seconds in interleaved(calls, rounds=rounds, device=device, budget=budget, on_failure=noting(rows)).items():
        rows[name] |= spread(seconds)
        rows[name]["tasks_per_second"] = num_tasks / rows[name]["seconds"]
    yield from rows.values()
