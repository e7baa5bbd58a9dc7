"""Disks fill up: say so in one line, before the work where it can be foreseen."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from shortstack.errors import ShortstackError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, over quota, over the limit of a file's size."""

HIDDEN = ("No space left", "requested and")
"""How tokenizers and safetensors, and numpy's tofile, say it without an errno."""


def disk_full(place: Path) -> ShortstackError:
    return ShortstackError(
        f"disk full while writing {place.name} in {place.parent}. "
        "Free some space or choose an output on another disk."
    )


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a write that finds no room into one clear error; all else passes unchanged."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in FULL
        if not known and not any(words in str(error) for words in HIDDEN):
            raise
        raise disk_full(place) from None


def require_space(place: Path, n_bytes: int, reserve_bytes: int = 0) -> None:
    """Raise ShortstackError if the disk that `place` is or will be on has not `n_bytes` free."""
    existing = place.absolute()
    while not existing.exists():
        existing = existing.parent
    free, wanted = shutil.disk_usage(existing).free, n_bytes + reserve_bytes
    if free < wanted:
        raise ShortstackError(
            f"disk full: {wanted / 1e6:,.0f} MB are needed, {existing} has {free / 1e6:,.0f} MB "
            "free. Free some space or choose an output on another disk."
        )
