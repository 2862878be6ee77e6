"""Files that are either there whole or not at all, and folders that one process writes into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes' blocks of the same folder out; the lock goes with its process, however that ends. (POSIX only.)

    Errors:
        RuntimeError: another process is in there.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"`folder` {folder} belongs to a run that is going on in another process. Wait for it, stop it, or name another folder."
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` in one stroke when the block ends without an exception.

    A process killed at any moment leaves the old file or the new one, never a part (and perhaps a hidden ``.tmp`` file).
    """
    temporary = path.with_name(f".{path.name}.tmp")  # in the same folder: only there is a rename atomic
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on the disk only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
