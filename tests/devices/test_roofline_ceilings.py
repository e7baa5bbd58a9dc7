"""Ceilings: every byte is read, time is bounded, what cannot be measured is said in one line."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shortstack import child
from shortstack.devices.roofline import ceilings, cpu, cuda, products
from shortstack.devices.roofline.ceilings import measure
from shortstack.devices.roofline.timing import Products, fastest_products, repeat
from shortstack.errors import MissingExtraError, ShortstackError

MIB = 2**20


class Clock:
    """Time that passes only when somebody works."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float) -> float:
        self.now_s += seconds
        return seconds


def test_repeats_until_the_time_is_used_but_never_less_than_asked_for() -> None:
    clock = Clock()
    assert repeat(lambda: clock.work(0.1), 1.05, clock=clock) == [0.1] * 11
    assert repeat(lambda: clock.work(9), 1.0, least=3, clock=clock) == [9] * 3
    assert len(repeat(lambda: 0.0, 1.0, most=7, clock=clock)) == 7


def test_the_fastest_size_of_products_is_kept_and_repeated() -> None:
    clock = Clock()
    flops_per_s = {64: 1e9, 128: 4e9, 256: 2e9}

    def prepare(n: int) -> Callable[[], float]:
        return lambda: clock.work(2 * n**3 / flops_per_s[n])

    found = fastest_products(prepare, tuple(flops_per_s), 10.0, clock=clock)
    assert found.n == 128
    assert found.flops_per_s == pytest.approx(4e9)
    assert len(found.seconds) > 10


def test_a_slow_processor_is_not_given_products_that_outlast_its_time() -> None:
    clock = Clock()
    asked = []

    def prepare(n: int) -> Callable[[], float]:
        asked.append(n)
        return lambda: clock.work(2 * n**3 / 1e6)

    found = fastest_products(prepare, (64, 128, 4096), 5.0, clock=clock)
    assert asked == [64]
    assert found.n == 64
    assert clock.now_s < 10


def test_of_products_the_best_sample_counts() -> None:
    assert Products(10, (2.0, 1.0, 4.0)).flops_per_s == 2000


def test_a_sweep_takes_what_its_blocks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known answer: 8 blocks of 20 ms on two threads are 80 ms a sweep."""
    monkeypatch.setattr(cpu, "_largest", lambda block: time.sleep(0.02))
    seconds, passes = cpu.read_seconds(8 * 4096, 2, budget_s=0.1, block_bytes=4096)
    assert passes == 1
    assert len(seconds) >= 3
    assert 0.079 < min(seconds) < 0.12


def test_every_block_is_read_as_often_as_passes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    monkeypatch.setattr(cpu, "_largest", lambda block: reads.append(id(block)))
    seconds, passes = cpu.read_seconds(10 * 4096, 3, budget_s=0.0, block_bytes=4096)
    assert len(set(reads)) == 10
    # Two sweeps come first: one to warm up, one to choose the passes.
    assert len(reads) == 10 * (2 + passes * len(seconds))


def test_what_a_slow_thread_leaves_is_read_by_another() -> None:
    block = np.ones(4, dtype=np.int32)
    queues = [deque([block]), deque([block, block])]
    cpu._read(queues)
    assert not any(queues)


def test_no_page_of_the_buffer_is_a_page_of_zeros_or_another_ones_copy() -> None:
    first, second = cpu._filled(2, 0, 2**18)
    other = cpu._filled(1, 1, 2**18)[0]
    pages = np.concatenate([first, second, other]).reshape(-1, 1024)
    assert len(np.unique(pages, axis=0)) == len(pages)
    assert (pages.min(axis=1) < -(2**30)).all()
    assert (pages.max(axis=1) > 2**30).all()


def test_the_last_cache_is_summed_over_its_instances(tmp_path: Path) -> None:
    def instance(core: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (
            ("level", str(level)),
            ("type", kind),
            ("size", size),
            ("shared_cpu_list", shared),
        ):
            (folder / name).write_text(f"{text}\n")

    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        instance(core, 0, 1, "Data", "32K", str(core))
        instance(core, 1, 4, "Instruction", "64K", str(core))
        instance(core, 3, 3, "Unified", "16384K", shared)
    (tmp_path / "cpu3" / "cache" / "index3").mkdir(parents=True)  # says nothing
    assert cpu.cache_bytes(tmp_path) == 32 * MIB
    assert cpu.cache_bytes(tmp_path / "none") is None


def test_the_buffer_is_far_larger_than_the_cache_and_leaves_most_memory_free() -> None:
    assert cpu.buffer_bytes(None, 64 * 2**30, 2) == 512 * MIB
    assert cpu.buffer_bytes(256 * MIB, 64 * 2**30, 2) == 2048 * MIB
    assert cpu.buffer_bytes(256 * MIB, 4 * 2**30, 2) == 1024 * MIB
    with pytest.raises(ShortstackError, match=r"100 MiB of memory are free, .* needs 512 MiB"):
        cpu.buffer_bytes(None, 100 * MIB, 2)
    with pytest.raises(ShortstackError, match="cuda:0: 500 MiB are free, .* at least 1024 MiB"):
        cuda.buffer_bytes(500 * MIB, 0)


def test_the_cpu_is_measured_in_a_child_as_records_keep_it() -> None:
    found = measure("cpu", threads=1, budget_s=0.3)
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        *("read_bytes_per_s", "matmul_flops_per_s", "threads", "method", "samples"),
        "measured_in_s",
    }
    read = found["samples"]["read"]
    assert found["read_bytes_per_s"] == read["buffer_bytes"] / min(read["seconds"])
    # Any computer of these years, and none of them: a wrong count of bytes falls out of this.
    assert 5e8 < found["read_bytes_per_s"] < 5e12
    assert 1e8 < found["matmul_flops_per_s"]["float32"] < 1e14
    assert found["threads"] == 1
    assert 0 <= found["samples"]["foreign_cpu_share"] <= 1
    assert "in 1 thread," in found["method"]


def test_products_of_all_threads_together_take_what_they_take() -> None:
    """Known answer: 20 ms a product on two threads are 10 ms a product together."""
    with ThreadPoolExecutor(2) as pool:
        sample = products._together(pool, 2, lambda n: lambda: time.sleep(0.02), 64)
        assert 0.0099 < min(sample() for _ in range(3)) < 0.015


def test_products_leave_most_of_the_memory_free() -> None:
    assert products.product_sizes(2, 16 * 2**30) == (512, 1024, 2048)
    assert products.product_sizes(128, 4 * 2**30) == (512, 1024)
    assert products.product_sizes(128, 2**20) == (512,)


def test_without_torch_numpy_measures_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    rates, omitted, library = products.product_rates(2, 0.05, (128,))
    assert set(rates) == {"float32"}
    assert omitted == dict.fromkeys(("bfloat16", "int8"), "torch is not installed")
    assert library == f"numpy {np.__version__}"
    with pytest.raises(MissingExtraError, match="ceilings of cuda:0 needs the package 'torch'"):
        measure("cuda:0")


def test_a_type_without_a_kernel_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")

    def refuse(*_: object) -> None:
        raise RuntimeError("no int8 here\nlong story")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    threads = torch.get_num_threads()
    try:
        rates, omitted, _ = products.product_rates(1, 0.05, (64,))
    finally:
        torch.set_num_threads(threads)
    assert set(rates) == {"float32", "bfloat16"}
    assert omitted == {"int8": "no int8 here"}


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cuda", {}, "Known: cpu, cuda:0"),
        ("tpu:0", {}, "'tpu:0' cannot be measured"),
        ("cpu", {"threads": 0}, "0 threads"),
        ("cpu", {"threads": 100_000}, "100000 threads are asked for"),
        ("cpu", {"budget_s": 0}, "budget_s is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    device: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ShortstackError, match=message):
        measure(device, **options)  # type: ignore[arg-type]  # wrong on purpose


def wall_seconds(work: cuda.Work, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


def test_the_measurement_of_a_card_works_on_any_device_of_torch() -> None:
    """Its logic on the CPU, with a wall clock in place of events."""
    torch = pytest.importorskip("torch")
    found = cuda.measured(
        torch.device("cpu"),
        wall_seconds,
        4 * MIB,
        0.4,
        sizes=(32,),
        warm_up_s=0.0,
        begun=time.perf_counter(),
    )
    assert json.loads(json.dumps(found)) == found
    rates = {n: 4 * MIB / min(s) for n, s in found["samples"]["read"]["seconds"].items()}
    assert set(rates) == {"sum", "copy", "matrix times vector"}
    assert found["read_bytes_per_s"] == max(rates.values())
    assert set(found["matmul_flops_per_s"]) >= {"float32", "bfloat16"}
    assert found["threads"] is None


def test_no_card_is_an_error_of_one_line() -> None:
    torch = pytest.importorskip("torch")
    index = torch.cuda.device_count()
    with pytest.raises(ShortstackError, match=rf"cuda:{index}: torch .* finds {index} CUDA cards"):
        measure(f"cuda:{index}")


def test_a_real_card_is_measured() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here: its ceilings are not tested")
    found = measure("cuda:0", budget_s=1.0)
    assert 5e10 < found["read_bytes_per_s"] < 2e13
    assert 1e12 < found["matmul_flops_per_s"]["float16"] < 1e16


def test_ceilings_are_of_the_card_that_the_list_of_devices_numbers_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr(ceilings, "require", lambda *_: None)
    monkeypatch.setattr(child, "call", lambda *_, **kept: told.update(kept) or {})
    measure("cuda:1")
    assert told["env"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
