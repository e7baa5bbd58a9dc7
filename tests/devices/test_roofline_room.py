"""Which machine holds which model: counted in bytes, with the rule for what stays free."""

from __future__ import annotations

import pytest

from shortstack.devices.roofline.places import Seat, places
from shortstack.devices.roofline.room import (
    GIB,
    Target,
    fits,
    need,
    overhead_bytes,
    target,
)
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


H200 = Seat("NVIDIA H200", "gpu", 140 * GIB)
L4 = Seat("NVIDIA L4", "gpu", 24 * GIB)
LAPTOP = Seat("A CPU", "cpu", 16 * GIB)


def test_every_model_is_placed_where_it_was_not_run() -> None:
    big = a_record(step_s=1, weights=100 * GB, label="big")
    small = a_record(step_s=1, weights=2 * GB, label="small")
    on_cpu = a_record(step_s=1, weights=2 * GB, label="small", device="cpu")
    found = places([(big, H200), (small, L4), (on_cpu, LAPTOP)])
    assert {(p.target.label, p.seat.name): p.fit and p.fit.fits for p in found} == {
        ("big", "NVIDIA L4"): False,
        ("big", "A CPU"): False,
        ("small", "NVIDIA H200"): True,
    }


def test_the_longest_context_is_what_must_fit() -> None:
    short = a_record(step_s=1, weights=2 * GB, kv=500_000)
    long = a_record(step_s=1, weights=2 * GB, kv=500_000, depth_tokens=100_000)
    other = a_record(step_s=1, label="other")
    fit = {
        n: next(p.fit for p in places([*own, (other, L4)]) if p.target.label == "original")
        for n, own in enumerate(([(short, H200)], [(short, H200), (long, H200)]))
    }
    assert [made and made.fits for made in fit.values()] == [True, False]


def test_what_cannot_be_told_gives_the_reason() -> None:
    card = a_record(step_s=1)
    unwatched = {**a_record(step_s=1, runtime="onnxruntime", device="cpu"), "memory": []}
    assert [p.reason for p in places([(card, H200), (unwatched, LAPTOP)])] == [
        "llama.cpp was never watched for memory on a device of this kind",
        "onnxruntime was never watched for memory on a device of this kind",
    ]
    other = (a_record(step_s=1, label="other"), Seat("A card", "gpu", None))
    reasons = {p.seat.name: p.reason for p in places([(card, H200), other])}
    assert reasons == {"A card": "the device's memory is unknown", "NVIDIA H200": None}
    unknown = a_record(step_s=1, kv=None, label="unknown")
    (found,) = [p for p in places([(card, H200), (unknown, L4)]) if p.target.label == "unknown"]
    assert found.reason == "the cache's bytes a token are unknown"


def test_options_that_nobody_else_ran_with_are_no_basis() -> None:
    asked = {**a_record(step_s=1, label="asked", device="cpu"), "options": {"kv_type": "q4_0"}}
    card = a_record(step_s=1, label="card")
    (found,) = [p for p in places([(asked, LAPTOP), (card, H200)]) if p.target.label == "asked"]
    assert found.fit is None


def test_a_checkpoint_takes_what_it_is_loaded_as() -> None:
    record = a_record(step_s=0.01, weights=13.4 * GB, runtime="pytorch", precision="float32")
    assert target(record).size_bytes == round(13.4 * GB)
    record["artifact"]["spec"]["format"] = "checkpoint"
    assert target(record).size_bytes == 4 * 6_700_000_000
    record["artifact"]["spec"]["precision"] = "bfloat16"
    assert target(record).size_bytes == 2 * 6_700_000_000
