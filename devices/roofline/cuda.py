"""The ceilings of an NVIDIA card, measured in a process of its own, with torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shortstack.devices.roofline.timing import Products, fastest_products, repeat
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 4 * 2**30
"""Forty times the largest cache of the catalogue's cards (RTX 5090: 96 MiB): of a sweep at most
that part can hit it."""
MEMORY_PART = 4
LEAST_BYTES = 256 * 2**20
COLUMNS = 8192
SAMPLE_S = 0.02
"""One sample repeats its work for so long: starting a kernel (5 microseconds) does not count."""
WARM_UP_S = 0.3
"""Cards raise their clocks under load within this time."""
READ_PART = 0.35
SIZES = (2048, 4096, 8192)

Work = Callable[[], object]
Clock = Callable[[Work, int], float]
"""Seconds that the work takes, repeated so many times, from its first to its last instruction."""


def ceilings(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure card `index` in about `budget_s` seconds; returns the dict that records keep."""
    import torch

    begun = time.perf_counter()
    index, budget_s = int(request["index"]), float(request["budget_s"])
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ShortstackError(
            f"cuda:{index}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA "
            "cards. Look at 'shortstack doctor'."
        )
    torch.cuda.set_device(index)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("highest")  # TF32 is another type than float32
    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(index)
    try:
        return measured(device, _event_seconds, buffer_bytes(free, index), budget_s, begun=begun)
    except torch.cuda.OutOfMemoryError:
        raise ShortstackError(
            f"cuda:{index}: its {free / 2**20:.0f} MiB of free memory were taken while it was "
            "measured. End the other programs on it."
        ) from None


def measured(
    device: torch.device,
    clock: Clock,
    n_bytes: int,
    budget_s: float,
    *,
    sizes: tuple[int, ...] = SIZES,
    warm_up_s: float = WARM_UP_S,
    begun: float,
) -> dict[str, Any]:
    """The measurement itself, on any device that torch has, timed by `clock`."""
    import torch

    reads = read_seconds(device, clock, n_bytes, READ_PART * budget_s, warm_up_s)
    best = {name: n_bytes / min(seconds) for name, seconds in reads.items()}
    fastest = max(best, key=lambda name: best[name])
    products, omitted = _products(device, clock, sizes, (1 - READ_PART) * budget_s)
    return {
        "read_bytes_per_s": best[fastest],
        "matmul_flops_per_s": {name: p.flops_per_s for name, p in products.items()},
        "threads": None,
        "method": (
            f"read: the fastest of {', '.join(best)} (here {fastest}) over "
            f"{n_bytes / 2**20:.0f} MiB of random data; copy counts what it reads and what it "
            f"writes; products: square random matrices, 2 n^3 over time; torch "
            f"{torch.__version__}, timed by events on the device; the best sample of each"
        ),
        "samples": {
            "read": {"buffer_bytes": n_bytes, "seconds": reads},
            "matmul": {name: p.to_dict() for name, p in products.items()},
            "omitted": omitted,
        },
        "measured_in_s": time.perf_counter() - begun,
    }


def buffer_bytes(free: int, index: int) -> int:
    """How much to read: at most a quarter of what is free, in an even number of rows of
    half-precision numbers."""
    n_bytes = min(BUFFER_BYTES, free // MEMORY_PART) // (8 * COLUMNS) * (8 * COLUMNS)
    if n_bytes < LEAST_BYTES:
        raise ShortstackError(
            f"cuda:{index}: {free / 2**20:.0f} MiB are free, its speed is measured with a quarter "
            f"of at least {MEMORY_PART * LEAST_BYTES / 2**20:.0f} MiB. End other programs on it."
        )
    return n_bytes


def read_seconds(
    device: torch.device, clock: Clock, n_bytes: int, budget_s: float, warm_up_s: float
) -> dict[str, list[float]]:
    """Seconds that moving `n_bytes` takes, sample by sample, for each way of doing it.

    Sum: all are read. Copy: half are read and half written. Matrix times vector: all are read, as
    decoding does.
    """
    import torch

    buffer = torch.randn(n_bytes // 4, device=device)
    source, target = buffer.chunk(2)
    # The bits of random numbers of 32 are numbers of 16 as well: what they are does not matter.
    # In two halves: each has fewer numbers than 32 bits count.
    upper, lower = buffer.view(torch.float16).view(-1, COLUMNS).chunk(2)
    vector = torch.ones(COLUMNS, dtype=torch.float16, device=device)
    ways: dict[str, Work] = {
        "sum": buffer.sum,
        "copy": lambda: target.copy_(source),
        "matrix times vector": lambda: (torch.mv(upper, vector), torch.mv(lower, vector)),
    }
    _warm_up(ways["sum"], clock, warm_up_s)
    return {
        name: repeat(_sampler(work, clock), budget_s / len(ways)) for name, work in ways.items()
    }


def _products(
    device: torch.device, clock: Clock, sizes: tuple[int, ...], budget_s: float
) -> tuple[dict[str, Products], dict[str, str]]:
    """By type; why a type is left out."""
    done: dict[str, Products] = {}
    omitted: dict[str, str] = {}
    kinds = list(_kinds(device, clock))
    for name, prepare in kinds:
        try:
            done[name] = fastest_products(prepare, sizes, budget_s / len(kinds))
        except (RuntimeError, AttributeError) as error:  # no kernel of this type here
            omitted[name] = str(error).partition("\n")[0][:200]
    return done, omitted


def _kinds(
    device: torch.device, clock: Clock
) -> Iterator[tuple[str, Callable[[int], Callable[[], float]]]]:
    import torch

    def floats(dtype: torch.dtype) -> Callable[[int], Callable[[], float]]:
        def prepare(n: int) -> Callable[[], float]:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty(n, n, dtype=dtype, device=device)
            return _sampler(lambda: torch.mm(a, b, out=out), clock)

        return prepare

    def integers(n: int) -> Callable[[], float]:
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        # cuBLASLt takes the second one by columns only.
        return _sampler(lambda: torch._int_mm(a, b.t()), clock)

    yield "float32", floats(torch.float32)
    yield "bfloat16", floats(torch.bfloat16)
    yield "float16", floats(torch.float16)
    yield "int8", integers


def _sampler(work: Work, clock: Clock) -> Callable[[], float]:
    """One sample: seconds of one run of the work, of as many as fill the sample's time."""
    times = 0

    def sample() -> float:
        nonlocal times
        if not times:
            clock(work, 1)
            times = max(1, math.ceil(SAMPLE_S / clock(work, 1)))
        return clock(work, times) / times

    return sample


def _warm_up(work: Work, clock: Clock, seconds: float) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        clock(work, 10)


def _event_seconds(work: Work, times: int) -> float:
    """Between two events on the device: what the host does meanwhile does not count."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
