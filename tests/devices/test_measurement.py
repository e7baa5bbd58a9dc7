"""The record survives JSON whole, refuses what it cannot read, and warns of what it saw."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from shortstack.devices.harness import measure
from shortstack.devices.measurement import Measurement, Trial
from shortstack.devices.protocol import Protocol
from shortstack.devices.workload import Prompt, Workload
from shortstack.errors import ShortstackError

from .conftest import MakeCase


def a_trial(step_s: float = 0.02, round_: int = 0, foreign: float | None = 0.0) -> Trial:
    return Trial(
        round=round_,
        position=round_,
        started_s=float(round_),
        load_s=0.1,
        prefill_s=0.2,
        ttft_s=0.21,
        decode_step_s=(step_s,) * 4,
        output_sha256="c" * 64,
        conditions={"foreign_cpu_share": foreign},
    )


@pytest.fixture
def measured(make_case: MakeCase, workload: Workload, prompt: Prompt) -> Measurement:
    case = make_case("instant")
    return Measurement(
        label=case.label,
        runtime=case.runtime,
        artifact=case.artifact,
        workload=workload,
        prompt_sha256=prompt.sha256,
        prompt_source=prompt.source,
        host={"cpu": {"model": "one"}},
        protocol={"seed": 0},
        trials=(a_trial(), a_trial(0.0201, 1)),
    )


def through_json(measurement: Measurement) -> Measurement:
    data: dict[str, Any] = json.loads(json.dumps(measurement.to_dict()))
    return Measurement.from_dict(data, measurement.artifact.path.parent)


def test_a_real_measurement_survives_json(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    workload = dataclasses.replace(workload, memory_repeats=1)
    cases = [make_case("instant"), make_case("crasher", "pruned")]
    for measurement in measure(cases, workload, prompt, protocol=Protocol(opener=opener)):
        assert through_json(measurement) == measurement


def test_rates_come_from_each_trial_not_from_means(measured: Measurement) -> None:
    assert measured.decode_tokens_per_s == pytest.approx((50, 1 / 0.0201))
    assert measured.prefill_tokens_per_s == pytest.approx((20, 20))
    assert [flag.split(":")[0] for flag in measured.flags] == ["few repeats"]


def test_a_newer_schema_is_refused(measured: Measurement) -> None:
    with pytest.raises(ShortstackError, match="schema 3"):
        Measurement.from_dict({**measured.to_dict(), "schema": 3})


def test_a_record_of_schema_1_is_still_read(measured: Measurement) -> None:
    data = measured.to_dict()
    new = ("device_info", "options", "kv_bytes_per_token", "energy", "energy_reason")
    old = {k: v for k, v in data.items() if k not in new} | {"schema": 1}
    counts = ("depth_tokens", "batch", "cooldown_s", "time_budget_s")
    old["workload"] = {k: v for k, v in data["workload"].items() if k not in counts}
    fields = ("load_kind", "warmup", "device_before", "device_after")
    old["trials"] = [{k: v for k, v in t.items() if k not in fields} for t in data["trials"]]
    assert Measurement.from_dict(old, measured.artifact.path.parent) == measured


@pytest.mark.parametrize("missing", ["trials", "artifact", "workload", "label"])
def test_a_damaged_record_is_refused_in_one_line(measured: Measurement, missing: str) -> None:
    data = measured.to_dict()
    del data[missing]
    with pytest.raises(ShortstackError, match="damaged") as caught:
        Measurement.from_dict(data)
    assert "\n" not in str(caught.value)


def test_further_fields_are_left_alone(measured: Measurement) -> None:
    data = measured.to_dict() | {"colour": "red"}
    for name in ("artifact", "workload"):
        data[name] = data[name] | {"colour": "red"}
    data["trials"] = [trial | {"colour": "red"} for trial in data["trials"]]
    assert Measurement.from_dict(data, measured.artifact.path.parent) == measured
