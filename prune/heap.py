"""Keep freed memory while layers are scored: page faults cost a quarter of the time.

Each layer frees and asks again for the same few megabytes. glibc by default hands them back to the
kernel in between, which clears every page anew: 20 ms a layer instead of 15 on SmolLM2-135M with
1,024 tokens and two threads.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BYTES = 2**30
DEFAULT_TRIM_BYTES, DEFAULT_MMAP_BYTES = 2**26, 2**25
"""Where glibc's own adaptive thresholds end up; they cannot be made adaptive again."""


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Let malloc keep what is freed until the block ends; does nothing without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # macOS, Windows, musl
        yield
        return
    mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, DEFAULT_MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        malloc_trim(0)
