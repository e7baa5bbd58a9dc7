"""Shares of the roofline: the bytes and operations are counted by hand here."""

from __future__ import annotations

from typing import Any

import pytest

from shortstack.devices.roofline.share import (
    compute_type,
    context_tokens,
    decode_share,
    device_kind,
    prefill_flops,
    prefill_share,
    step_bytes,
)

from .roofline_sample import GB, a_record, a_run


def test_the_mean_context_of_a_decode_counts_each_step_s_own_token() -> None:
    # Steps read 5, 6 and 7 tokens.
    record = a_record(step_s=1, prompt_tokens=4, decode_tokens=3)
    assert context_tokens(record) == 6
    assert (
        context_tokens(a_record(step_s=1, prompt_tokens=4, decode_tokens=3, depth_tokens=100))
        == 106
    )


def test_a_step_reads_the_weights_once_and_the_cache_of_every_row() -> None:
    record = a_record(
        step_s=1, weights=1000, kv=10, prompt_tokens=4, decode_tokens=3, batch=8, depth_tokens=0
    )
    assert step_bytes(record) == 1000 + 10 * 6 * 8


def test_the_share_of_decode_is_bytes_a_second_over_bandwidth() -> None:
    record = a_record(step_s=0.004, weights=12 * GB)
    share = decode_share(record, a_run(record, read=4000 * GB)["ceilings"])
    assert share.share is not None
    assert share.achieved_per_s is not None
    assert share.share.estimate == pytest.approx(0.75)
    assert share.achieved_per_s.estimate == pytest.approx(3000 * GB)
    assert (share.ceiling_per_s, share.unit, share.reason) == (4000 * GB, "bytes", None)
    assert share.notes == ()
    assert share.share.n == 3


def test_of_a_batch_a_step_counts_once_and_a_prompt_as_often_as_there_are_rows() -> None:
    tokens = {"depth_tokens": 7, "prompt_tokens": 4, "decode_tokens": 3}
    record = a_record(step_s=0.5, weights=1000, kv=10)
    record["workload"].update(tokens, batch=8)
    record["artifact"].update(matmul_params=60, head_params=20)
    # Steps read 12, 13 and 14 tokens of eight rows: 1000 + 13 x 10 x 8 bytes, twice a second.
    ceilings = a_run(record, read=8160)["ceilings"]
    decode = decode_share(record, ceilings)
    assert decode.achieved_per_s is not None
    assert decode.achieved_per_s.estimate == 2 * 2040
    assert decode.share is not None
    assert decode.share.estimate == 0.5
    # Eight prompts of four tokens through 60, their last ones through the head; the depth untimed.
    prefill = prefill_share(record, ceilings)
    assert prefill.achieved_per_s is not None
    assert prefill.achieved_per_s.estimate == pytest.approx(2 * (60 * 4 * 8 + 20 * 8) / 0.025)


def test_the_interval_of_the_trials_is_carried_to_the_share() -> None:
    record = a_record(step_s=0.004, weights=12 * GB, spread=0.25)
    share = decode_share(record, a_run(record, read=4000 * GB)["ceilings"]).share
    assert share is not None
    assert (share.low, share.estimate, share.high) == pytest.approx((0.6, 0.75, 0.9375))
    assert share.n == 3


def test_a_share_above_one_is_shown_with_what_it_may_mean() -> None:
    record = a_record(step_s=0.001, weights=30_000_000, device="cpu")
    cached = a_run(record, read=10 * GB, samples={"read": {"cache_bytes": 32_000_000}})
    share = decode_share(record, cached["ceilings"])
    assert share.share is not None
    assert share.share.estimate == pytest.approx(3)
    assert share.notes == (
        "above the ceiling: a step reads 30 MB and the last cache holds 32 MB of it",
    )
    large = decode_share(record, a_run(record, read=10 * GB)["ceilings"])
    assert "measured on a busy machine" in large.notes[0]


@pytest.mark.parametrize(
    ("change", "more", "note"),
    [
        ({"kv": None}, {}, "are unknown, so the true share is higher"),
        ({}, {"threads": 8}, "that of 8 threads, the run used 2"),
        ({}, {"samples": {"foreign_cpu_share": 0.5}}, "took 50 % of the CPU"),
    ],
)
def test_what_makes_a_share_less_sure_is_noted(
    change: dict[str, Any], more: dict[str, Any], note: str
) -> None:
    record = a_record(step_s=0.004, **change)
    share = decode_share(record, a_run(record, read=4000 * GB, **more)["ceilings"])
    assert len(share.notes) == 1
    assert note in share.notes[0]


def test_no_ceiling_or_no_trial_gives_the_reason() -> None:
    record = a_record(step_s=0.004)
    for share in (decode_share(record, {}), prefill_share(record, {})):
        assert (share.share, share.reason) == (
            None,
            "no ceilings of cuda:0 were measured in this run",
        )
    dead = {**record, "trials": []}
    assert decode_share(dead, a_run(record, read=GB)["ceilings"]).reason == "no timed trial ended"


def test_the_share_of_prefill_is_two_operations_a_token_and_parameter() -> None:
    rough_record = a_record(step_s=0.004, batch=2)
    counted = {"matmul_params": 6_600_000_000, "head_params": 0}
    record = {**rough_record, "artifact": {**rough_record["artifact"], **counted}}
    ceilings = a_run(record, read=GB)["ceilings"]
    share = prefill_share(record, ceilings)
    assert share.share is not None
    assert share.unit == "float16"
    assert share.share.estimate == pytest.approx(2 * 6.6e9 * 512 * 2 / 0.025 / 790e12)
    assert share.notes == ()
    rough = prefill_share(rough_record, ceilings)
    assert rough.share is not None
    assert rough.share.estimate == pytest.approx(2 * 6.7e9 * 512 * 2 / 0.025 / 790e12)
    assert "embedding table too, so the true share is lower" in rough.notes[0]


def test_a_type_that_was_not_measured_has_no_share() -> None:
    record = a_record(step_s=0.004, precision="Q4_0")
    share = prefill_share(record, a_run(record, read=GB)["ceilings"])
    assert (share.share, share.unit) == (None, "int8")
    assert share.reason == "the device's int8 throughput was not measured"
    given = prefill_share(record, a_run(record, read=GB)["ceilings"], computed_in="float32")
    assert given.share is not None
    assert given.share.estimate > 1
    assert "above the ceiling" in given.notes[-1]


@pytest.mark.parametrize(
    ("runtime", "flops"),
    [
        ("llama.cpp", 2 * (60 * 10 * 8 + 20 * 8)),
        ("pytorch", 2 * (60 * 10 * 8 + 20 * 8)),
        ("onnxruntime", 2 * (60 + 20) * 10 * 8),
        ("onnxruntime-genai", 2 * (60 + 20) * 10 * 8),
    ],
)
def test_the_head_is_computed_for_the_last_token_of_each_prompt_or_for_all(
    runtime: str, flops: int
) -> None:
    record = a_record(step_s=1, runtime=runtime, prompt_tokens=10, batch=8, depth_tokens=100)
    assert prefill_flops(record) is None
    record["artifact"].update(matmul_params=60, head_params=20)
    assert prefill_flops(record) == flops


@pytest.mark.parametrize(
    ("device", "runtime", "precision", "expected"),
    [
        ("cpu", "llama.cpp", "Q4_K_M", "int8"),
        ("cpu", "llama.cpp", "F16", "float32"),
        ("cuda:0", "llama.cpp", "BF16", "bfloat16"),
        ("cuda:1", "onnxruntime", "int4", "float16"),
        ("cpu", "onnxruntime", "fp32", "float32"),
        ("cpu", "something new", "int3", "float32"),
    ],
)
def test_the_type_of_the_products(device: str, runtime: str, precision: str, expected: str) -> None:
    record = a_record(step_s=1, device=device, runtime=runtime, precision=precision)
    assert compute_type(record) == expected


def test_kinds_of_devices() -> None:
    assert [device_kind(d) for d in ("cpu", "cuda:0", "vulkan:1", "metal")] == [
        "cpu",
        "gpu",
        "gpu",
        "unified",
    ]
