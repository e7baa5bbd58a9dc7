"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from shortstack.errors import ShortstackError


@contextlib.contextmanager
def alone_in(path: Path, shown: Path | None = None) -> Iterator[None]:
    """Hold a lock on a folder, which the kernel lets go of however the process ends.

    Raises ShortstackError while another process, or another thread, holds it; `shown`: the folder
    to name then.
    """
    descriptor = _locked(path)
    if descriptor is None:
        raise ShortstackError(
            f"another shortstack is at work in {shown or path}. Wait for it or choose another "
            "output."
        )
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """What is to be closed to let go; None where another one holds it, -1 where nothing locks."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one folder are the user's to avoid
        return -1
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # the other one has just moved it away
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # network file systems that lock no folders: as on Windows
        os.close(descriptor)
        return -1
    if _moved(path, descriptor):
        os.close(descriptor)
        return None
    return descriptor


def _moved(path: Path, descriptor: int) -> bool:
    """Whether the folder that is locked has another name by now, or none."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return True
