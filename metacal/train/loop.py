"""The long-running loop: it may be killed at any moment and goes on where it was."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from metacal import tree
from metacal._typing import Tree
from metacal.train import checkpoint
from metacal.train._files import alone
from metacal.train.environment import set_random_state
from metacal.train.logs import Logs, read_metrics

Metrics: TypeAlias = Mapping[str, "float | Tensor"]
StepFn: TypeAlias = Callable[[Tree, int], "tuple[Tree, Metrics]"]

CHECKPOINTS = "checkpoints"


class NonFiniteError(ArithmeticError):
    """A run met a NaN or an infinity: in ``term`` (a metric's name, or a path in the state) at ``step``."""

    def __init__(self, step: int, term: str, message: str) -> None:
        super().__init__(message)
        self.step = step
        self.term = term


def fit(
    step_fn: StepFn,
    state: Tree,
    num_steps: int,
    folder: str | Path,
    *,
    checkpoint_every: int = 100,
    resume: bool = False,
    progress: bool = True,
    log_every: int = 10,
    tensorboard: bool = True,
    keep: int = 2,
) -> Tree:
    """Runs ``state, metrics = step_fn(state, step)`` for step 0 ... ``num_steps`` - 1 and returns the last state.

    ``state`` is a tree of tensors, all that a step needs to know of the past besides the random generators; ``metrics``
    maps names to floats or 0-dim tensors. Every step's metrics go to ``folder/metrics.jsonl``; on the device they are
    read every ``log_every`` steps only, so that no step waits for the host. A checkpoint is written to
    ``folder/checkpoints`` every ``checkpoint_every`` steps and after the last one; the ``keep`` newest stay.

    With ``resume`` the run goes on from the newest checkpoint (from the start if there is none), and ends with the same
    bits as an undisturbed run where the device is deterministic, as a CPU is. The step itself has to be a function of
    (state, step, default random generators): draw the data of a step from these. A resumed state holds plain tensors on
    the devices of ``state``.

    SIGINT (Ctrl-C) and SIGTERM let the step end, save a checkpoint and leave by KeyboardInterrupt or SystemExit(143); a
    second one leaves at once. (In the main thread: others receive no signals.)

    Errors:
        FileExistsError: ``folder`` holds a run and ``resume`` is off.
        RuntimeError: another process is running in ``folder``.
        NonFiniteError: a metric, or at a checkpoint the state, is NaN or infinite; checkpoints written before it stay.
        CheckpointError: there are checkpoints and none can be read.
        ValueError: the checkpoint does not fit ``state``, or is beyond ``num_steps``.

    >>> import tempfile
    >>> def step_fn(state, step):
    ...     w = state["w"] - 0.1 * state["w"]
    ...     return {"w": w}, {"loss": w.square().sum() / 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state = fit(step_fn, {"w": torch.ones(2)}, 20, folder, progress=False, tensorboard=False)
    >>> state["w"]
    tensor([0.1216, 0.1216])
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"`{name}` should be at least 1, got {value}.")
    folder = Path(folder)
    tree.state_dict(state)  # a state that cannot be saved should be refused now, not at the first checkpoint
    state, start = _restored(state, num_steps, folder) if resume else _started(state, folder)

    unread: list[tuple[int, Metrics]] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (
        alone(folder),
        Logs(folder, first_step=start, tensorboard=tensorboard) as logs,
        tqdm(total=num_steps, initial=start, disable=not progress, unit="step", dynamic_ncols=True) as bar,
        _signals() as received,
    ):
        for step in range(start, num_steps):
            state, metrics = step_fn(state, step)
            unread.append((step, _detached(metrics)))
            del metrics  # or this step's graph would live on through the next
            bar.update()
            done = step + 1
            stopping = received()
            saving = done % checkpoint_every == 0 or done == num_steps or stopping is not None
            if saving or done % log_every == 0:
                for earlier, values in _read(unread):
                    _require_finite_metrics(earlier, values, folder)
                    logs.write(earlier, values)
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                unread.clear()
            if saving:
                _require_finite_state(step, state, folder)
                logs.flush()  # before the checkpoint: what it skips on resuming has to be in the log
                checkpoint.save(folder / CHECKPOINTS, done, {"state": tree.state_dict(state)}, keep=keep)
            if stopping is not None:
                raise _farewell(stopping, done, folder)
    return state


def _started(state: Tree, folder: Path) -> tuple[Tree, int]:
    refuse_existing(folder)
    return state, 0


def refuse_existing(folder: Path) -> None:
    """Raises FileExistsError where a run has left metrics or checkpoints; one that failed in its first step has not."""
    if read_metrics(folder) or any((folder / CHECKPOINTS).glob("*.pt")):
        raise FileExistsError(
            f"`folder` {folder} already holds a run. Pass resume=True (on the command line --resume) to go on, or name another folder."
        )


def _restored(state: Tree, num_steps: int, folder: Path) -> tuple[Tree, int]:
    found = checkpoint.latest(folder / CHECKPOINTS)
    if found is None:
        return state, 0
    if found.step > num_steps:
        raise ValueError(
            f"`num_steps` is {num_steps}, but the checkpoint {found.path} was written after {found.step} steps. Raise `num_steps`, or "
            "name another folder."
        )
    state = tree.load_state_dict(state, found.tensors["state"])
    set_random_state(found.random_state)
    return state, found.step


def _detached(metrics: Metrics) -> Metrics:
    """Without their graphs, which would stay alive until the metrics are read."""
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"The metric '{name}' should be a float or a 0-dim tensor, got a tensor of shape {tuple(value.shape)}. Reduce it: .mean()."
            )
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}


def _read(rows: list[tuple[int, Metrics]]) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows as floats, with one wait for each device rather than one for each number."""
    tensors = [value for _, metrics in rows for value in metrics.values() if isinstance(value, Tensor)]
    numbers: dict[int, float] = {}
    for device in {value.device for value in tensors}:
        here = [value for value in tensors if value.device == device]
        numbers.update(zip(map(id, here), torch.stack([value.double() for value in here]).tolist(), strict=True))
    for step, metrics in rows:
        yield step, {name: numbers[id(value)] if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}


def _require_finite_metrics(step: int, metrics: Mapping[str, float], folder: Path) -> None:
    for term, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(step, term, f"The metric '{term}' is {value} at step {step}. {_remedy(folder)}")


def _require_finite_state(step: int, state: Tree, folder: Path) -> None:
    for path, leaf in tree.state_dict(state).items():
        if tree.is_floating(leaf) and not leaf.isfinite().all():
            bad = leaf.detach()[~leaf.isfinite()][0].item()
            raise NonFiniteError(step, path, f"The state's '{path}' holds {bad} after step {step}. {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    left = any((folder / CHECKPOINTS).glob("*.pt"))
    kept = f"the checkpoints in {folder / CHECKPOINTS} are from before that step" if left else "there was no checkpoint yet"
    return (
        f"The run stopped; {kept}. Lower the learning rates, clip the gradients or change the loss, then start in another folder or resume."
    )


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Catches SIGINT and SIGTERM and yields a function that tells which one came; after the first, the old handlers are back."""
    came: list[int] = []
    old: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that was not set from Python

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else None
    finally:
        put_back()


def _farewell(number: int, done: int, folder: Path) -> BaseException:
    if number == signal.SIGINT:
        return KeyboardInterrupt(f"Stopped after {done} steps; a checkpoint is in {folder / CHECKPOINTS}. Go on with resume=True.")
    return SystemExit(128 + number)
