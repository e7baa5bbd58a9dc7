"""How many operations a second the CPU's matrix products reach, by the type of their numbers."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shortstack.devices.roofline.timing import Products, fastest_products

SAMPLE_S = 0.05
"""One sample multiplies for so long that starting the threads (0.1 ms) does not count."""
SIZES = (512, 1024, 2048)

Work = Callable[[], object]
Kinds = list[tuple[str, Callable[[int], Work]]]


def product_rates(
    threads: int, budget_s: float, sizes: Sequence[int]
) -> tuple[dict[str, Products], dict[str, str], str]:
    """By type; why a type is left out; the library that computed.

    Every thread multiplies matrices of its own. One product shared by all threads waits for the
    slowest of them each time: on a busy machine that measures the waiting.
    """
    try:
        import torch
    except ImportError:
        kinds: Kinds = [("float32", _numpy_product)]
        omitted = dict.fromkeys(("bfloat16", "int8"), "torch is not installed")
        library, start = f"numpy {np.__version__}", _nothing
    else:
        kinds, omitted = _torch_kinds(), {}
        library, start = f"torch {torch.__version__}", _single_threaded
    done: dict[str, Products] = {}
    with ThreadPoolExecutor(threads, initializer=start) as pool:
        for name, prepare in kinds:
            try:
                done[name] = fastest_products(
                    functools.partial(_together, pool, threads, prepare),
                    sizes,
                    budget_s / len(kinds),
                    together=threads,
                )
            except (RuntimeError, AttributeError) as error:  # no kernel of this type here
                omitted[name] = str(error).partition("\n")[0][:200]
    return done, omitted, library


def product_sizes(threads: int, room_bytes: int) -> tuple[int, ...]:
    """Those whose matrices, three a thread of four bytes a number, fit into the room."""
    room = room_bytes // threads // 12
    return tuple(n for n in SIZES if n * n <= room) or SIZES[:1]


def _together(
    pool: ThreadPoolExecutor, threads: int, prepare: Callable[[int], Work], n: int
) -> Callable[[], float]:
    """One sample: wall seconds a product, while all threads take products until none is left."""
    works = list(pool.map(prepare, [n] * threads))
    times = 0

    def run(count: int) -> float:
        tickets = deque(range(count))
        start = time.perf_counter()
        list(pool.map(_work_off, works, [tickets] * threads))
        return time.perf_counter() - start

    def sample() -> float:
        nonlocal times
        if not times:
            run(threads)
            times = threads * max(1, math.ceil(SAMPLE_S / run(threads)))
        return run(times) / times

    return sample


def _work_off(work: Work, tickets: deque[int]) -> None:
    while True:
        try:
            tickets.pop()
        except IndexError:
            return
        work()


def _numpy_product(n: int) -> Work:
    rng = np.random.default_rng(0)
    a, b = rng.random((n, n), dtype=np.float32), rng.random((n, n), dtype=np.float32)
    out = np.empty((n, n), dtype=np.float32)
    return lambda: np.matmul(a, b, out=out)


def _torch_kinds() -> Kinds:
    import torch

    def floats(dtype: torch.dtype) -> Callable[[int], Work]:
        def prepare(n: int) -> Work:
            a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
            out = torch.empty(n, n, dtype=dtype)
            return lambda: torch.mm(a, b, out=out)

        return prepare

    def integers(n: int) -> Work:
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b)

    return [
        ("float32", floats(torch.float32)),
        ("bfloat16", floats(torch.bfloat16)),
        ("int8", integers),
    ]


def _single_threaded() -> None:
    """For the calling thread: its products do not start threads of their own."""
    import torch

    torch.set_num_threads(1)


def _nothing() -> None:
    """numpy's libraries read the number of threads from the environment, when they start."""


SINGLE_THREADED = dict.fromkeys(
    (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
        "VECLIB_MAXIMUM_THREADS",
    ),
    "1",
)
"""What matrix libraries read at their start: our own threads call them."""
