"""A process that ends with the one that started it, however that ends: it holds the other end of a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO

_VARIABLE = "METACAL_LIFELINE"


def start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a command that calls :func:`hold`; its output goes to ``log``."""
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment, _VARIABLE: "stdin"}
    )


def release(process: subprocess.Popen[bytes]) -> None:
    """Closes this end of the pipe of a process that has ended."""
    assert process.stdin is not None
    process.stdin.close()


def hold() -> None:
    """In a process that :func:`start` started: sends it SIGTERM once the one that started it is gone."""
    if os.environ.pop(_VARIABLE, None) != "stdin":
        return

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written: it returns at the end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
