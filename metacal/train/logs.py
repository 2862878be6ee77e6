"""Metrics by step: JSON lines to compute with, TensorBoard to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from metacal.train._files import replacing

FILE = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows ``{"step": 0, "loss": ...}`` of ``folder/metrics.jsonl``, oldest first; [] without such a file.

    A last line that a killed process left half-written is passed over.

    Errors:
        ValueError: another line is not JSON.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a whole line ends in a newline: the rest is empty or half a line
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {line[:80]!r}. Remove the line, or put a good copy there.") from error
    return rows


class Logs:
    """Appends metrics to ``folder/metrics.jsonl`` and, if asked, TensorBoard scalars to ``folder/tensorboard``.

    Rows of ``first_step`` and later are dropped on opening, so that a resumed run has each step once.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Logs(folder) as logs:
    ...         logs.write(0, {"loss": 2.0})
    ...         logs.write(1, {"loss": 1.0})
    ...     with Logs(folder, first_step=1) as logs:
    ...         logs.write(1, {"loss": 1.5})
    ...     read_metrics(folder)
    [{'step': 0, 'loss': 2.0}, {'step': 1, 'loss': 1.5}]
    """

    def __init__(self, folder: str | Path, *, first_step: int = 0, tensorboard: bool = False) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(folder) if row["step"] < first_step]
        with replacing(folder / FILE) as file:
            file.writelines(_line(row) for row in kept)
        self._file = open(folder / FILE, "ab")  # noqa: SIM115 - closed by close()
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only here needed

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row."""
        self._file.write(_line({"step": step, **metrics}))
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Returns once every row is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
