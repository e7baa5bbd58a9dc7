"""The page cache of the artifact's files: drop it for a cold load, and see how much is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

COLD_SHARE = 0.01
"""A load counts as cold if no more of the files than this was in memory."""


def prepare(path: Path, *, cold: bool) -> dict[str, Any]:
    """Drop the pages if `cold`; say what kind of load follows.

    Returns `load_kind` (cold, warm), `page_cache_share` (0 to 1, None where the system does not
    tell) and `why_not_cold`.
    """
    why = _drop(path) if cold else None
    share = resident_share(path)
    if cold and why is None and share is not None and share > COLD_SHARE:
        why = f"the system kept {100 * share:.0f} % of the files in memory"
    return {
        "load_kind": "cold" if cold and why is None else "warm",
        "page_cache_share": share,
        "why_not_cold": why,
    }


def resident_share(path: Path) -> float | None:
    """Share of the files' pages that are in memory, by mincore(2); None elsewhere than Linux."""
    if sys.platform != "linux":
        return None
    pages = [_pages(file) for file in files(path) if file.stat().st_size]
    total = sum(count for _, count in pages)
    return round(sum(resident for resident, _ in pages) / total, 4) if total else None


def files(path: Path) -> list[Path]:
    """The file, or every file of the folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _drop(path: Path) -> str | None:
    """Ask the kernel to forget the pages; the reason where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return f"{sys.platform} has no posix_fadvise"
    for file in files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay, whatever the advice
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return f"{error.strerror}"
        finally:
            os.close(descriptor)
    return None


def _pages(file: Path) -> tuple[int, int]:
    """(pages in memory, pages) of a file that is not empty."""
    import numpy as np

    libc = ctypes.CDLL(None, use_errno=True)
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        count = -(-len(mapped) // mmap.PAGESIZE)
        seen = np.zeros(count, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        code = libc.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(len(mapped)),
            ctypes.c_void_p(seen.ctypes.data),
        )
        del view  # the map cannot be closed while it is looked at
    return (int((seen & 1).sum()) if code == 0 else 0), count
