"""Checkpoints that a kill at any moment cannot spoil."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacal.train._files import replacing
from metacal.train.environment import random_state


class CheckpointError(RuntimeError):
    """No checkpoint of a folder can be read."""


class Checkpoint(NamedTuple):
    """What :func:`save` wrote."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    random_state: dict[str, Any]


def save(
    folder: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any] | None = None, *, keep: int = 2
) -> Path:
    """Writes ``folder/step_<step>.pt`` in one stroke: flat dicts of tensors by name, JSON, and the random generators' states.

    Keeps the ``keep`` newest checkpoints. Those of later steps go too: the run was resumed before them because they could
    not be read.

    Errors:
        TypeError: ``meta`` is not JSON.
        ValueError: ``keep`` < 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 10, {"model": {"w": torch.ones(2)}}, {"note": "half way"})
    ...     found = latest(folder)
    >>> path.name, found.step, found.tensors["model"]["w"].tolist(), found.meta
    ('step_00000010.pt', 10, [1.0, 1.0], {'note': 'half way'})
    """
    if keep < 1:
        raise ValueError(f"`keep` should be at least 1, or nothing is left to resume from; got {keep}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "step": step,
        # Cloned, because a view would bring all of its storage along.
        "tensors": {group: {name: t.detach().cpu().clone() for name, t in named.items()} for group, named in tensors.items()},
        "meta": json.dumps(dict(meta or {})),
        "random_state": random_state(),
    }
    path = folder / f"step_{step:08d}.pt"
    with replacing(path) as file:
        torch.save(content, file)
    paths = _newest_first(folder)
    at = paths.index(path)
    for other in (*paths[:at], *paths[at + keep :], *folder.glob(".step_*.pt.tmp")):
        other.unlink()
    return path


def latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, on the CPU; None if the folder holds none.

    A newer one that cannot be read (truncated, damaged, or holding more than plain tensors) is passed over with a
    RuntimeWarning that names it and the reason.

    Errors:
        CheckpointError: there are checkpoints and none can be read.
    """
    unreadable: dict[Path, str] = {}
    for path in _newest_first(Path(folder)):
        try:
            found = _read(path)
        # What torch.load raises on damaged files, by the place of the damage.
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
            lines = str(error).splitlines()
            unreadable[path] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            continue
        for bad, reason in unreadable.items():
            warnings.warn(f"The checkpoint {bad} cannot be read ({reason}). Going back to {path.name}.", RuntimeWarning, stacklevel=2)
        return found
    if unreadable:
        reasons = "; ".join(f"{path.name} ({reason})" for path, reason in unreadable.items())
        raise CheckpointError(
            f"No checkpoint in {folder} can be read: {reasons}. Put a good copy there, or move the folder away to start anew."
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _read(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return Checkpoint(path, content["step"], content["tensors"], json.loads(content["meta"]), content["random_state"])
