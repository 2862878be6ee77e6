"""Where a run happens: its device, its random numbers, and a record of both."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metacal.train._files import replacing

ENVIRONMENT = "environment.json"
PACKAGES = ("metacal", "torch", "torchvision", "torchopt", "optree", "numpy", "kornia", "scikit-learn")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``; ``"auto"`` is the current CUDA device where there is one, else the CPU.

    Errors:
        ValueError: ``name`` is no device's name, or asks for CUDA where there is none.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` should be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`device` is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here. "
            "Use 'auto' or 'cpu', or install a driver and a CUDA build of torch."
        )
    return device


def seed_everything(seed: int) -> None:
    """Seeds the default generators of torch (CPU and CUDA), numpy and Python.

    A run on the CPU then repeats bit for bit with the same number of threads; some CUDA kernels do not unless
    ``torch.use_deterministic_algorithms`` is on.

    Errors:
        ValueError: ``seed`` is outside 0 ... 2^32 - 1, all that numpy takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` should be from 0 to 2**32 - 1, got {seed}.")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the default generator is what libraries draw from
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every generator that :func:`seed_everything` seeds, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        # A generator that no one has woken has not drawn; asking for its state would wake every GPU.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned; states of CUDA devices that are not here are left out.

    >>> before = random_state()
    >>> first = torch.rand(3)
    >>> set_random_state(before)
    >>> bool((torch.rand(3) == first).all())
    True
    """
    torch.set_rng_state(state["torch"])
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Draws from ``seed`` inside, and leaves torch's generators, the device's too (manual_seed reseeds it), as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def describe(*, seed: int | None = None, device: str | torch.device = "auto") -> dict[str, Any]:
    """What one needs to know to repeat a run: versions, hardware, the code's git commit, the command and the seed."""
    device = resolve_device(device)
    described: dict[str, Any] = {
        "seed": seed,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": _git_commit(Path(__file__).resolve()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["cuda"] = torch.version.cuda
        described["cudnn"] = torch.backends.cudnn.version()
    return described


def write_environment(folder: str | Path, *, seed: int | None = None, device: str | torch.device = "auto") -> dict[str, Any]:
    """Writes :func:`describe` to ``folder/environment.json`` and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = describe(seed=seed, device=device)
    with replacing(folder / ENVIRONMENT) as file:
        file.write(json.dumps(described, indent=2).encode())
    return described


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout that was never installed


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git_commit(source: Path) -> str | None:
    """The commit of the repository that tracks ``source``, with ``-dirty`` after it if something was changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # an installed package may lie in somebody else's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
