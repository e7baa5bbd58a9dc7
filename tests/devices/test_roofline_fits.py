"""Which machine holds which model: counted in bytes, with the rule for what stays free."""

from __future__ import annotations

import json

import pytest

from shortstack.devices.roofline.fits import (
    GIB,
    Target,
    fits,
    machine,
    need,
    overhead_bytes,
    target,
)
from shortstack.devices.roofline.places import ELSEWHERE, MEASURED, places
from shortstack.errors import ShortstackError

from .roofline_sample import GB, a_record


@pytest.mark.parametrize(
    ("kind", "have", "usable"),
    [("gpu", 8, 7), ("gpu", 80, 74), ("cpu", 8, 6), ("cpu", 32, 25.6), ("unified", 24, 16)],
)
def test_the_headroom_is_the_rule_that_is_stated(kind: str, have: float, usable: float) -> None:
    limit = int(usable * GIB)
    exact = fits(limit, int(have * GIB), kind)
    assert exact.fits
    assert abs(exact.spare_bytes) <= 1
    over = fits(limit + 2, int(have * GIB), kind)
    assert not over.fits
    assert over.spare_bytes < 0
    assert kind in over.rule
    assert "stays free" in over.rule


def test_less_memory_than_the_headroom_holds_nothing() -> None:
    assert fits(1, GIB // 2, "gpu").usable_bytes == 0


def test_the_cache_of_all_rows_at_the_full_context_is_needed() -> None:
    goal = Target("m", "llama.cpp", "x", 4 * GB, 4 * GB, 131_072, 8192, batch=2)
    taken = need(goal, 0.25 * GB)
    assert taken is not None
    assert taken.cache_bytes == 131_072 * 8192 * 2
    assert taken.total_bytes == 4 * GB + 131_072 * 8192 * 2 + GB // 4
    negative = need(goal, -1.0)
    assert negative is not None
    assert negative.overhead_bytes == 0


def test_an_unknown_cache_gives_no_need_rather_than_one_without_it() -> None:
    assert need(Target("m", "r", "x", 1, 1, None, 8), 0.0) is None


def test_a_context_of_none_is_refused() -> None:
    with pytest.raises(ShortstackError, match="m: context_tokens is 0"):
        Target("m", "r", "x", 1, 1, None, 0)


def test_the_overhead_is_what_a_run_held_beyond_weights_and_cache() -> None:
    card = a_record(step_s=1, weights=2 * GB, kv=1000, overhead=3 * GB, depth_tokens=50)
    assert overhead_bytes(card) == 3 * GB
    assert target(card).context_tokens == 50 + 512 + 128 + 1
    assert overhead_bytes(a_record(step_s=1, weights=2 * GB, device="cpu", overhead=GB)) == GB
    assert overhead_bytes(a_record(step_s=1, kv=None)) is None
    assert overhead_bytes({**card, "memory": [{"device_memory": None}]}) is None
    assert overhead_bytes({**card, "memory": []}) is None


def test_a_container_s_limit_is_what_the_machine_has() -> None:
    record = a_record(step_s=1, device="cpu")
    assert machine(record) == ("A CPU", 16 * GIB, "cpu")
    record["host"]["cgroup"] = {"cpu_cores": None, "memory_bytes": 4 * GIB}
    assert machine(record) == ("A CPU", 4 * GIB, "cpu")
    card = a_record(step_s=1)
    assert machine(card) == ("NVIDIA H200", 140 * GIB, "gpu")
    assert machine({**card, "device_info": {}}) is None


def test_every_model_is_placed_on_every_machine_with_where_its_overhead_is_from() -> None:
    big = a_record(step_s=1, weights=100 * GB, label="big")
    small = a_record(step_s=1, weights=2 * GB, label="small", name="NVIDIA L4")
    small["device_info"]["vram_bytes"] = 24 * GIB
    laptop = a_record(step_s=1, weights=2 * GB, label="small", device="cpu")
    rows = {(p.target.label, p.machine): p for p in places([big, small, laptop])}
    assert len(rows) == 6
    held = {key: row.fit.fits for key, row in rows.items() if row.fit}
    assert held == {
        ("big", "NVIDIA H200"): True,
        ("big", "NVIDIA L4"): False,
        ("big", "A CPU"): False,
        ("small", "NVIDIA H200"): True,
        ("small", "NVIDIA L4"): True,
        ("small", "A CPU"): True,
    }
    assert rows["big", "NVIDIA H200"].overhead_from == MEASURED
    assert rows["big", "NVIDIA L4"].overhead_from == ELSEWHERE
    assert all(json.loads(json.dumps(row.to_dict())) for row in rows.values())


def test_a_longer_context_can_be_what_does_not_fit() -> None:
    record = a_record(step_s=1, weights=2 * GB, kv=500_000, device="cpu")
    (short,), (long,) = places([record], 1000), places([record], 100_000)
    assert short.fit is not None
    assert long.fit is not None
    assert (short.fit.fits, long.fit.fits) == (True, False)


def test_what_cannot_be_told_gives_the_reason() -> None:
    watched = a_record(step_s=1, device="cpu")
    unwatched = {**a_record(step_s=1, runtime="onnxruntime", device="cpu"), "memory": []}
    reasons = [p.reason for p in places([watched, unwatched])]
    assert reasons == [None, "onnxruntime was never watched for memory on a device of this kind"]
    unknown = places([a_record(step_s=1, kv=None)])[0]
    assert unknown.reason == "the cache's bytes a token are unknown"


def test_a_checkpoint_takes_what_it_is_loaded_as() -> None:
    record = a_record(step_s=0.01, weights=13.4 * GB, runtime="pytorch", precision="float32")
    assert target(record).size_bytes == round(13.4 * GB)
    record["artifact"]["spec"]["format"] = "checkpoint"
    assert target(record).size_bytes == 4 * 6_700_000_000
    record["artifact"]["spec"]["precision"] = "bfloat16"
    assert target(record).size_bytes == 2 * 6_700_000_000
