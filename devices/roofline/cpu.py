"""The CPU's ceilings, measured in a process of its own: `ceilings.measure` calls this."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.devices.busy import CpuClock
from shortstack.devices.roofline.products import product_rates, product_sizes
from shortstack.devices.roofline.timing import repeat
from shortstack.devices.vram import free_bytes
from shortstack.errors import ShortstackError

CPU = Path("/sys/devices/system/cpu")
BUFFER_BYTES = 512 * 2**20
CACHE_TIMES = 8
"""The buffer holds the last cache so many times over: of a sweep at most this part can hit it."""
BLOCK_BYTES = 16 * 2**20
BLOCKS_PER_THREAD = 4
MEMORY_PART = 4
"""The buffer takes at most this part of the memory that is free."""
SAMPLE_S = 0.05
"""One sample sweeps for so long that starting the threads (0.1 ms) does not count."""
READ_PART = 0.35
"""Part of the time for reading; the rest is for matrix products."""

Words = NDArray[np.int32]


def ceilings(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure with `threads` threads; returns the dict that records keep.

    Measuring takes about `budget_s` seconds; filling the buffer and importing torch come on top.
    """
    begun = time.perf_counter()
    threads, budget_s = int(request["threads"]), float(request["budget_s"])
    cache = cache_bytes()
    free = free_bytes("cpu") or 0
    n_bytes = buffer_bytes(cache, free, threads)
    busy = CpuClock()
    seconds, passes = read_seconds(n_bytes, threads, READ_PART * budget_s)
    products, omitted, library = product_rates(
        threads, (1 - READ_PART) * budget_s, product_sizes(threads, free // MEMORY_PART)
    )
    return {
        "read_bytes_per_s": n_bytes / min(seconds),
        "matmul_flops_per_s": {name: p.flops_per_s for name, p in products.items()},
        "threads": threads,
        "method": (
            f"read: the largest 32-bit integers of {n_bytes / 2**20:.0f} MiB of random data, found "
            f"by numpy in {_counted(threads)}, bytes over wall time; products: each thread "
            f"multiplies square random matrices of its own ({library}), 2 n^3 operations a "
            "product over wall time; the best sample of each"
        ),
        "samples": {
            "read": {
                "buffer_bytes": n_bytes,
                "cache_bytes": cache,
                "passes": passes,
                "seconds": seconds,
            },
            "matmul": {name: p.to_dict() for name, p in products.items()},
            "omitted": omitted,
            "foreign_cpu_share": busy.foreign_share(),
        },
        "measured_in_s": time.perf_counter() - begun,
    }


def read_seconds(
    n_bytes: int, threads: int, budget_s: float, block_bytes: int = BLOCK_BYTES
) -> tuple[list[float], int]:
    """Seconds that one sweep over `n_bytes` takes, sample by sample, and sweeps in a sample.

    Every thread fills its blocks itself, with random numbers: pages lie in the memory next to it
    and none is the shared page of zeros. It reads its own blocks first, then what slower threads
    have left: one that the system stops for a while does not hold up the sweep. The largest of
    32-bit integers is the fastest read that numpy has; in the cache it goes several times faster
    than memory delivers.
    """
    n_blocks = n_bytes // block_bytes
    shares = [len(range(i, n_blocks, threads)) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        own = list(pool.map(_filled, shares, range(threads), [block_bytes // 4] * threads))

        def sweep(passes: int) -> float:
            waiting = [deque(blocks * passes) for blocks in own]
            start = time.perf_counter()
            list(pool.map(_read, (waiting[i:] + waiting[:i] for i in range(threads))))
            return (time.perf_counter() - start) / passes

        sweep(1)
        passes = max(1, math.ceil(SAMPLE_S / sweep(1)))
        return repeat(lambda: sweep(passes), budget_s), passes


def cache_bytes(root: Path = CPU) -> int | None:
    """The last cache, all its instances together, as Linux lists them; None elsewhere."""
    found: dict[tuple[int, str], int] = {}
    for index in root.glob("cpu[0-9]*/cache/index*"):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            found[level, shared] = _size((index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def buffer_bytes(cache: int | None, free: int, threads: int) -> int:
    """How much to read: far more than the last cache holds, some blocks for each thread, at most
    a part of what is free. Raises ShortstackError where that leaves a thread without a block."""
    wanted = max(BUFFER_BYTES, CACHE_TIMES * (cache or 0), threads * _least_bytes(1))
    n_bytes = min(wanted, free // MEMORY_PART) // BLOCK_BYTES * BLOCK_BYTES
    if n_bytes < _least_bytes(threads):
        raise ShortstackError(
            f"cpu: {free / 2**20:.0f} MiB of memory are free, measuring its speed with {threads} "
            f"threads needs {MEMORY_PART * _least_bytes(threads) / 2**20:.0f} MiB. Close other "
            "programs, or ask for fewer threads."
        )
    return n_bytes


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _least_bytes(threads: int) -> int:
    return threads * BLOCKS_PER_THREAD * BLOCK_BYTES


def _size(text: str) -> int:
    """`32768K` as Linux writes it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def _filled(n_blocks: int, seed: int, words: int) -> list[Words]:
    rng = np.random.Generator(np.random.SFC64(seed))
    return [rng.integers(-(2**31), 2**31, words, dtype=np.int32) for _ in range(n_blocks)]


def _read(queues: Sequence[deque[Words]]) -> None:
    """Read what is left in each queue in turn. Taking from a deque is one step for all threads."""
    for queue in queues:
        while True:
            try:
                block = queue.popleft()
            except IndexError:
                break
            _largest(block)


def _largest(block: Words) -> int:
    return int(np.maximum.reduce(block))


def threads_or_all(threads: int | None) -> int:
    """As asked for, or one a usable core. Raises ShortstackError for fewer than one."""
    from shortstack.devices.host import check_threads, usable_cores

    if threads is None:
        return usable_cores()
    if threads < 1:
        raise ShortstackError(f"{threads} threads cannot measure anything. Give at least 1.")
    check_threads(threads)
    return min(threads, os.cpu_count() or 1)
