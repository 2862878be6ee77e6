"""Runs a study in several processes, each a `metacal pretrain` or, for seeds together, a `metacal together`; what is finished is never
run again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from metacal import _lifeline
from metacal.study.plan import Cell, Study, cells
from metacal.study.together import refuse
from metacal.train.results import read_results
from metacal.train.settings import load_config

_POLL_SECONDS = 0.5


def run(study: Study, out: str | Path, *, processes: int = 1, progress: bool = True) -> list[Cell]:
    """Runs what is not finished yet; returns the cells that failed, whose ``log.txt`` says why.

    Every cell's settings are checked before anything runs. A run that was interrupted goes on from its newest checkpoint: runs end with
    the study, however that ends, and leave a checkpoint. On a CPU
    a process has one thread: ``processes`` is how many cores are used. With ``study.together`` a process trains all unfinished seeds of
    one place of the grid.

    Errors: settings that are not settings; a folder that holds a finished run of other settings; seeds that cannot be trained together.
    An unfinished run of other settings fails its cell.
    """
    if processes < 1:
        raise ValueError(f"`processes` should be at least 1, got {processes}.")
    out = Path(out)
    plan = cells(study)
    for cell in plan:
        _write_settings(out, cell)
    waiting = [cell for cell in plan if not finished(out, cell)]
    done, failed = len(plan) - len(waiting), []
    jobs = _together(out, waiting) if study.together else [[cell] for cell in waiting]
    running: list[tuple[list[Cell], subprocess.Popen[bytes]]] = []
    bar = _bar(len(plan), done, progress)
    with _terminable(), bar:
        try:
            while jobs or running:
                while jobs and len(running) < processes:
                    job = jobs.pop(0)
                    running.append((job, _start(out, job)))
                time.sleep(_POLL_SECONDS)
                for job, process in [(j, p) for j, p in running if p.poll() is not None]:
                    running.remove((job, process))
                    _lifeline.release(process)
                    for cell in job:
                        if not finished(out, cell):
                            failed.append(cell)
                            if cell is not job[0]:  # they wrote into one log
                                shutil.copyfile(_log(out, job[0]), _log(out, cell))
                    bar.update(len(job))
        finally:
            _stop([process for _, process in running])
    return failed


def finished(out: str | Path, cell: Cell) -> bool:
    """Whether a cell has its results."""
    return bool(read_results(Path(out) / cell.path))


def settings_file(out: Path, cell: Cell) -> Path:
    """Where a cell's settings stand before it runs."""
    return out / "settings" / cell.path.with_suffix(".yaml")


def _write_settings(out: Path, cell: Cell) -> None:
    import yaml

    path, text = settings_file(out, cell), yaml.safe_dump(dict(cell.settings), sort_keys=False)
    if finished(out, cell):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"`out` {out} holds a finished run of other settings in {cell.path}: its results are not this study's. Name another "
                "folder, or delete that run to have it done again."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path)  # complains now, and not after hours
    except (SystemExit, ValueError) as error:
        said = "as said above" if isinstance(error, SystemExit) else str(error)
        place = ", ".join(f"{axis} '{name}'" for axis, name in cell.names.items())
        raise ValueError(
            f"the settings of {place}, seed {cell.seed}, cannot be used: {said}. They are the study's `base`, `settings` and `grid` put "
            f"together, in {path}."
        ) from error


def _together(out: Path, waiting: Sequence[Cell]) -> list[list[Cell]]:
    """The seeds of every place of the grid, in the order of their first ones."""
    jobs: dict[Path, list[Cell]] = {}
    for cell in waiting:
        jobs.setdefault(cell.path.parent, []).append(cell)
    for place, job in jobs.items():
        try:
            refuse(load_config(settings_file(out, job[0])))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return list(jobs.values())


def _start(out: Path, job: Sequence[Cell]) -> subprocess.Popen[bytes]:
    for cell in job:
        (out / cell.path).mkdir(parents=True, exist_ok=True)
    settings, folder = str(settings_file(out, job[0])), out / job[0].path
    if len(job) == 1:
        arguments = ["pretrain", settings, "--out", str(folder), "--resume"]
    else:
        arguments = ["together", settings, "--seeds", *(str(cell.seed) for cell in job), "--out", str(folder.parent)]
    command = [sys.executable, "-m", "metacal", *arguments, "--progress", "false"]
    with _log(out, job[0]).open("ab") as log:
        # More than one thread per process makes processes wait for each other.
        return _lifeline.start(command, log, {"OMP_NUM_THREADS": "1"})


def _log(out: Path, cell: Cell) -> Path:
    return out / cell.path / "log.txt"


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
        _lifeline.release(process)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves by SystemExit(143), so that what has to be done at the end is done. (In the main thread: others receive none.)"""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old or signal.SIG_DFL)


def _bar(total: int, done: int, progress: bool):  # type: ignore[no-untyped-def]  # tqdm has no types
    from tqdm import tqdm

    return tqdm(total=total, initial=done, disable=not progress, unit="run")
