"""Records of other machines: the schema holds, what cannot be read is refused in one line."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shortstack.devices.measurement import Measurement
from shortstack.devices.record_fields import BenchRecord
from shortstack.devices.records import load_records
from shortstack.devices.report import to_json
from shortstack.errors import ShortstackError

from .bench_sample import Json, bench, laptop_run, measurement, server_run, written
from .json_schema import errors
from .sample import sample

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "schema" / "bench-2.schema.json"
SCHEMA: Json = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def refused(*paths: Path) -> str:
    """The one line of the refusal."""
    with pytest.raises(ShortstackError) as caught:
        load_records(paths)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("record", [laptop_run(), server_run(), bench([])])
def test_a_record_follows_the_schema(record: Json) -> None:
    assert errors(record, SCHEMA, SCHEMA) == []


def test_a_measurement_of_this_version_follows_the_schema() -> None:
    for entry in sample().entries:
        if entry.measurement is not None:
            data = json.loads(json.dumps(entry.measurement.to_dict()))
            assert errors(data, SCHEMA["$defs"]["measurement"], SCHEMA) == []


def test_the_schema_is_a_schema_and_says_the_same_as_jsonschema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(SCHEMA)
    validator(SCHEMA).validate(server_run())
    for damage in DAMAGES.values():
        record = laptop_run()
        damage(record)
        assert list(validator(SCHEMA).iter_errors(record))


def fields(model: Any) -> tuple[dict[str, Any], set[str]]:
    """(nested models or None by name, names that must be there)."""
    found = {(f.alias or name): f for name, f in model.model_fields.items()}
    return (
        {name: nested(f.annotation) for name, f in found.items()},
        {name for name, f in found.items() if f.is_required()},
    )


def nested(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, types.UnionType):
        return next(filter(None, map(nested, typing.get_args(annotation))), None)
    return None


def resolved(schema: Json) -> Json:
    schema = schema.get("items", schema)
    if "properties" not in schema:
        schema = schema.get("additionalProperties", schema)
    for option in (*schema.get("anyOf", ()), schema):
        if "$ref" in option:
            found: Json = SCHEMA["$defs"][option["$ref"].removeprefix("#/$defs/")]
            return found
    return schema


def same_fields(model: Any, schema: Json, at: str) -> None:
    names, required = fields(model)
    assert set(names) == set(schema["properties"]), at
    assert required == set(schema.get("required", ())), at
    for name, inner in names.items():
        if inner is not None:
            same_fields(inner, resolved(schema["properties"][name]), f"{at}.{name}")


def test_the_reader_and_the_schema_know_the_same_fields() -> None:
    same_fields(BenchRecord, SCHEMA, "$")


def first(record: Json) -> Json:
    found: Json = record["measurements"][0]
    return found


def a_trial(record: Json) -> Json:
    found: Json = first(record)["trials"][0]
    return found


DAMAGES: dict[str, Callable[[Json], Any]] = {
    "measurements[0].trials[0].prefill_s": lambda r: a_trial(r).update(prefill_s=0.0),
    "measurements[0].trials[0].decode_step_s": lambda r: a_trial(r).update(decode_step_s=[]),
    "measurements[0].trials[0].ttft_s": lambda r: a_trial(r).pop("ttft_s"),
    "measurements[0].artifact.n_layers": lambda r: first(r)["artifact"].update(n_layers="30"),
    "measurements[1].artifact.n_layers": lambda r: r["measurements"][1]["artifact"].update(
        n_layers=0
    ),
    "measurements[0].artifact.size_bytes": lambda r: first(r)["artifact"].update(size_bytes=0),
    "measurements[0].artifact.weight_bytes_per_token": lambda r: first(r)["artifact"].update(
        weight_bytes_per_token=0
    ),
    "measurements[0].workload.batch": lambda r: first(r)["workload"].update(batch=0),
    "measurements[0].memory": lambda r: first(r).update(memory=None),
    "measurements[0].failure": lambda r: first(r).pop("failure"),
    "run_id": lambda r: r.update(run_id="mine"),
    "ceilings.cuda:0.read_bytes_per_s": lambda r: r["ceilings"].update({"cuda:0": {}}),
    "ceilings.cpu.read_bytes_per_s": lambda r: r["ceilings"]["cpu"].update(read_bytes_per_s=0),
    "ceilings.cpu.matmul_flops_per_s": lambda r: r["ceilings"]["cpu"].pop("matmul_flops_per_s"),
    "ceilings.cpu.matmul_flops_per_s.float32": lambda r: r["ceilings"]["cpu"][
        "matmul_flops_per_s"
    ].update(float32=0.0),
    "ceilings.cpu.threads": lambda r: r["ceilings"]["cpu"].update(threads="8"),
    "ceilings.cpu.samples": lambda r: r["ceilings"]["cpu"].update(samples=None),
    "ceilings.cpu.samples.read": lambda r: r["ceilings"]["cpu"].update(samples={"read": None}),
    "ceilings.cpu.samples.foreign_cpu_share": lambda r: r["ceilings"]["cpu"].update(
        samples={"foreign_cpu_share": "much"}
    ),
    "host": lambda r: r.update(host=[]),
}


@pytest.mark.parametrize("place", DAMAGES)
def test_damage_is_told_with_its_place(place: str, tmp_path: Path) -> None:
    record = laptop_run()
    DAMAGES[place](record)
    assert errors(record, SCHEMA, SCHEMA)
    message = refused(written(tmp_path / "laptop", record))
    assert str(tmp_path / "laptop" / "bench.json") in message
    assert f"is damaged: {place}" in message


def test_numbers_that_are_none_are_damage(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), 1e-320, 10**400):
        record = laptop_run()
        a_trial(record)["ttft_s"] = value
        assert "ttft_s" in refused(written(tmp_path, record))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    message = refused(written(tmp_path, {**laptop_run(), "schema": 3}))
    assert "bench.json has schema 3, this shortstack reads 2. Update shortstack." in message


def test_an_older_or_odd_schema_is_refused(tmp_path: Path) -> None:
    for odd in (1, None, "2", True):
        assert "Measure again" in refused(written(tmp_path, {**laptop_run(), "schema": odd}))


def test_a_newer_run_report_is_refused(tmp_path: Path) -> None:
    data = {**json.loads(to_json(sample())), "schema": 9}
    assert "schema 9" in refused(written(tmp_path, data, "report.json"))


def test_truncated_json_is_refused(tmp_path: Path) -> None:
    text = json.dumps(laptop_run())
    for length in (0, 1, len(text) // 2, len(text) - 1):
        (tmp_path / "bench.json").write_text(text[:length], encoding="utf-8")
        message = refused(tmp_path)
        assert str(tmp_path / "bench.json") in message
        assert "cut short" in message


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[1, 2]",
        b'"words"',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
    ],
)
def test_what_is_no_record_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes(raw)
    assert str(tmp_path / "bench.json") in refused(tmp_path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    message = refused(written(tmp_path, {"schema": 2, "kind": "<script>"}))
    assert "is no record of shortstack bench or run (kind '<script>')" in message
    assert "kind None" in refused(written(tmp_path, {"schema": 1, "results": []}))


def test_a_folder_without_records_says_what_to_run(tmp_path: Path) -> None:
    assert "shortstack bench MODEL -o DIR" in refused(tmp_path)
    assert "there is no" in refused(tmp_path / "nowhere")


def test_records_that_lie_too_deep_are_named(tmp_path: Path) -> None:
    written(tmp_path / "card" / "b" / "deeper", laptop_run())
    written(tmp_path / "disk" / "one", laptop_run())
    written(tmp_path / ".hidden" / "one", laptop_run())
    message = refused(tmp_path)
    assert "the folders in it hold no bench.json and no report.json" in message
    assert "deeper folders are not searched" in message
    near = tmp_path / "disk"
    assert message.endswith(f"The nearest is {near / 'one'}: name it, or all of {near}")
    assert load_records([near])


def test_a_folder_three_levels_down_is_named_too(tmp_path: Path) -> None:
    written(tmp_path / "a" / "b" / "c", laptop_run())
    assert f"The nearest is {tmp_path / 'a' / 'b' / 'c'}" in refused(tmp_path)


def test_the_refusal_of_a_record_sends_nothing_to_a_terminal(tmp_path: Path) -> None:
    record = laptop_run()
    record["ceilings"] = {"\x1b[2J\u202e": {}}
    message = refused(written(tmp_path, record))
    assert r"ceilings.\x1b[2J\u202e.read_bytes_per_s" in message
    assert message.isprintable()


def test_one_run_in_two_places_is_told_once(tmp_path: Path) -> None:
    one = written(tmp_path / "a", laptop_run())
    two = written(tmp_path / "b", laptop_run())
    records = load_records([one, two, one / "bench.json"])
    assert len(records) == 1
    assert records[0].told_again == (two / "bench.json", one / "bench.json")


def test_one_run_id_with_two_contents_is_refused(tmp_path: Path) -> None:
    one = written(tmp_path / "a", laptop_run())
    edited = {**laptop_run(), "command": "another"}
    two = written(tmp_path / "b", edited)
    message = refused(one, two)
    assert str(one / "bench.json") in message
    assert str(two / "bench.json") in message


def test_folders_are_searched_one_level_deep(tmp_path: Path) -> None:
    written(tmp_path / "laptop", laptop_run())
    written(tmp_path / "server", server_run())
    written(tmp_path / ".hidden", laptop_run("other"))
    assert len(load_records([tmp_path])) == 2


def test_a_run_report_is_read_with_its_verifications(tmp_path: Path) -> None:
    data = json.loads(to_json(sample()))
    record = load_records([written(tmp_path, data, "report.json")])[0]
    assert record.kind == "run"
    assert len(record.measurements) == 6
    assert {proof.text for proof in record.proofs.values()} == {"spdx"}
    again = load_records([tmp_path])[0]
    assert again.run_id == record.run_id


def test_a_measurement_of_this_version_can_be_read(tmp_path: Path) -> None:
    measured = [e.measurement for e in sample().entries if e.measurement]
    assert all(isinstance(m, Measurement) for m in measured)
    record = bench([m.to_dict() for m in measured])
    assert len(load_records([written(tmp_path, record)])[0].measurements) == 6


def test_fields_that_nobody_knows_are_left_alone(tmp_path: Path) -> None:
    record = bench([{**measurement("original", 30), "colour": "green"}], weather={"rain": True})
    assert load_records([written(tmp_path, record)])
