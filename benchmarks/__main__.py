"""``python -m benchmarks [tiny|small|full]``: measures, and writes ``results.jsonl`` and ``report.html``.

``python -m benchmarks report --out DIR`` writes the report of results that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch

from benchmarks import few_shot_tasks, report, scaling
from benchmarks.conclusions import conclusion, course_conclusion, ends
from benchmarks.courses import courses
from benchmarks.measure import Row, interleaved, matmul_rate, measure, spread
from benchmarks.methods import METHODS, Method
from benchmarks.peers import peers
from benchmarks.problem import Problem, Size, to
from benchmarks.problems import PROBLEMS, tc2
from metacal.diagnostics import peak_bytes, work
from metacal.train.environment import describe, resolve_device

PARTS = ("hypergradients", "scaling", "tasks", "tc2", "courses")
PEERS = ("higher", "betty-ml", "jax", "jaxopt", "optax")
ROUNDS: dict[Size, int] = {"tiny": 1, "small": 7, "full": 15}
BUDGETS: dict[Size, float] = {"tiny": 0.0, "small": 20.0, "full": math.inf}
"""Seconds of timed rounds per problem, after which three are enough."""
NUM_TASKS: dict[Size, int] = {"tiny": 2, "small": 32, "full": 32}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tiny", "small", "full", "report"), default="small")
    parser.add_argument("--out", type=Path, help="folder of the results; by default a new one under runs/")
    names = f"problems ({', '.join(PROBLEMS)}) or parts ({', '.join(PARTS)})"
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=names)
    parser.add_argument("--every", action="store_true", help="in the small suite also the problems and methods that it leaves out")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.only if name not in PROBLEMS and name not in PARTS]
    if unknown:
        parser.error(f"`--only` should name problems or parts; {unknown[0]} is none of {', '.join((*PROBLEMS, *PARTS))}.")
    if args.what == "report":
        if args.out is None:
            parser.error("`report` wants --out, the folder with the results.")
        print(report.write(args.out, report.read(args.out)))
        return
    folder = args.out or Path("runs") / f"benchmarks-{datetime.now():%Y%m%d-%H%M%S}"
    if (folder / report.RESULTS).exists():
        parser.error(f"{folder} has results already. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Row] = []
    began = time.perf_counter()
    with (folder / report.RESULTS).open("w", encoding="utf-8") as file:
        for row in run(args.what, args.only, resolve_device(args.device), every=args.every):
            row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
            results.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print("\n" + report.printed_targets(results))
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes. {report.write(folder, results)}")


def run(size: Size, only: list[str], device: torch.device, *, every: bool = False) -> Iterator[Row]:
    """All rows of a run, the environment first; prints as it goes."""
    yield {"table": "environment", "size": size, **_environment(device)}
    if device.type == "cuda":
        yield {"table": "roofline", "flops_per_second": matmul_rate(device)}
    every = every or size != "small"
    suite = [key for key, problem in PROBLEMS.items() if problem.small or every]
    methods = [m for m in (*METHODS.values(), *peers().values()) if m.small or every]
    for key in PROBLEMS:
        if key in only or (key in suite and (not only or "hypergradients" in only)):
            yield from _shown(key, ({"table": "hypergradients", "key": key, **row} for row in _measured(key, methods, size, device)))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "scaling": lambda: scaling.scaling(methods, size, device),
        "tasks": lambda: few_shot_tasks.throughput(NUM_TASKS[size], methods, size, device, rounds=ROUNDS[size]),
        "tc2": lambda: _tc2_steps(size, device),
    }
    for part, rows in parts.items():
        if not only or part in only:
            yield from _shown(part, ({"table": part, **row} for row in rows()))
    if not only or "courses" in only:
        for key in suite:
            problem = _made(key, size, device)
            if problem.goal is not None:
                yield from _shown(f"{key}, from start to end", ({"table": "courses", **row} for row in courses(problem, methods, size)))


def _measured(key: str, methods: list[Method], size: Size, device: torch.device) -> Iterator[Row]:
    wanted = filter(PROBLEMS[key].asks, methods)
    return measure(_made(key, size, device), wanted, rounds=ROUNDS[size], budget=BUDGETS[size])


def _made(key: str, size: Size, device: torch.device) -> Problem:
    return to(PROBLEMS[key].make(size), device)


def _tc2_steps(size: Size, device: torch.device) -> Iterator[Row]:
    steps = tc2.steps(size, device)
    for step in steps.values():
        step()
    unit = work(steps["base"])
    for name, seconds in interleaved(steps, rounds=2 * ROUNDS[size], device=device).items():
        peak = peak_bytes(steps[name], device)
        spent = work(steps[name]) / unit
        yield {"problem": "SimCLR", "method": name, "library": "metacal", "peak_bytes": peak, "work": spent, **spread(seconds)}


def _shown(title: str, rows: Iterator[Row]) -> Iterator[Row]:
    began, kept = time.perf_counter(), []
    for row in rows:
        kept.append(row)
        yield row
    print(f"\n{title} ({time.perf_counter() - began:.0f} s)\n")
    what = kept[0]["table"] if kept else None
    print(report.printed(ends(kept) if what == "courses" else kept), flush=True)
    if what in _CONCLUSIONS:
        print("\n" + _CONCLUSIONS[what](kept), flush=True)


_CONCLUSIONS = {"hypergradients": conclusion, "courses": course_conclusion}


def _environment(device: torch.device) -> Row:
    described = describe(device=device)
    for name in PEERS:
        try:
            described["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            described["packages"][name] = None
    return described


if __name__ == "__main__":
    main()
