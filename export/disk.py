"""Disks fill up: say so in one line, before the work where it can be foreseen."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from shortstack.errors import ShortstackError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def disk_full(path: Path) -> ShortstackError:
    return ShortstackError(
        f"disk full while writing {path.name} in {path.parent}. "
        "Free some space or choose an output on another disk."
    )


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise ShortstackError if the disk that holds `folder` has less than `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ShortstackError(
            f"disk full: the export needs {n_bytes / 1e6:.0f} MB at once, {folder} has "
            f"{free / 1e6:.0f} MB free. Free some space or choose an output on another disk."
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that finds no room into one clear error."""
    try:
        yield
    except OSError as error:
        # numpy's tofile says only "N requested and M written", without a number
        if error.errno in FULL or (error.errno is None and "written" in str(error)):
            raise disk_full(path) from None
        raise
