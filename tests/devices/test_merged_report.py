"""The merged report: like beside like, unlike marked with its reason, nothing unescaped."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shortstack.devices.records import Record, load_records
from shortstack.devices.report.merged import Merged, Projected, merge, write_merged
from shortstack.devices.report.merged import tables as shown
from shortstack.devices.report.merged.depth import depth_lines, straight_line
from shortstack.devices.report.merged.front import dominates, fronts
from shortstack.devices.report.merged.gain import gains
from shortstack.devices.report.merged.held import would_hold
from shortstack.devices.report.merged.llama_bench import llama_bench_rows
from shortstack.devices.report.merged.machine_table import machine_table
from shortstack.devices.report.merged.matrix import rows
from shortstack.devices.report.merged.pictures import figures
from shortstack.devices.report.merged.table_csv import to_csv
from shortstack.devices.report.merged.unlike import why_unlike
from shortstack.devices.report.merged.words import energy_words, lead, warnings
from shortstack.devices.report.merged.write import to_html, to_markdown
from shortstack.devices.stats import Interval
from shortstack.errors import ShortstackError
from shortstack.roofline_report import shares

from .bench_sample import (
    CARD,
    LAPTOP,
    PER_LAYER,
    REST,
    SERVER,
    Json,
    bench,
    evaluation,
    laptop_run,
    measurement,
    server_run,
    sha,
    workload,
    written,
)
from .test_report import Page

LLAMA_BENCH = (
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("cpu_mask", "cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe"),
    *("split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split"),
    *("tensor_buft_overrides", "load_mode", "embeddings", "no_op_offload", "no_host"),
    *("fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns"),
    *("stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
)
"""What `llama-bench -o json` prints of a test."""
Load = Callable[..., list[Record]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write records and read them back."""

    def loaded(*records: Json) -> list[Record]:
        folders = [written(tmp_path / f"r{i}", record) for i, record in enumerate(records)]
        return load_records(folders)

    return loaded


@pytest.fixture
def both(load: Load) -> Merged:
    return merge(load(laptop_run(), server_run()))


def cells(merged: Merged, title: str) -> list[str | None]:
    """The cells of one row of the side-by-side table."""
    places = list(dict.fromkeys(case.place for case in merged.cases))
    row = next(row for row in rows(merged.cases) if row.title.startswith(title))
    return [row.cell(place) for place in places]


def two_machines(load: Load, change: Callable[[Json], Any]) -> Merged:
    """A laptop's run, and that of a server whose only measurement is changed."""
    there = measurement("original", 30, host=SERVER, device="cuda:0", speed=9)
    mine = [measurement("original", 30), measurement("cut24", 24)]
    change(there := copy.deepcopy(there))
    return merge(load(bench(mine, run="1"), bench([there], run="2", host=SERVER)))


def test_a_file_on_two_machines_stands_in_one_row(both: Merged) -> None:
    laptop, server = cells(both, "original, GGUF")
    assert laptop
    assert server
    assert float(server.split()[0]) == pytest.approx(9 * float(laptop.split()[0]), rel=0.02)


def test_one_file_under_two_labels_stands_in_one_row(load: Load) -> None:
    merged = two_machines(load, lambda m: m.update(label="whole"))
    assert all(cells(merged, "original"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(prompt_sha256="a" * 64), "other prompt (aaaaaaaa against dddddddd)"),
        (
            lambda m: m["artifact"].update(sha256="b" * 64),
            f"other artifact (bbbbbbbb against {sha('original', 30, 'gguf:Q8_0')[:8]})",
        ),
        (
            lambda m: m["workload"].update(warmup_decode_tokens=0),
            "other workload (warmup_decode_tokens 0 against 8)",
        ),
        (
            lambda m: (m["workload"].update(warmup_prompt_tokens=16), m.update(device="cpu")),
            "other workload (warm-up prompt 16 tokens against 128)",
        ),
        (lambda m: m["protocol"].update(decoding="sampled"), "other protocol (decoding)"),
        (lambda m: m["protocol"].update(steady=True), "other protocol (steady)"),
        (
            lambda m: m["runtime_info"].update(version="2.0"),
            "other runtime major (2 against 1)",
        ),
        (
            lambda m: m["runtime_info"].update(kv_cache="Q4_0"),
            "other KV cache (Q4_0 against F16)",
        ),
    ],
)
def test_an_unlike_cell_says_why(load: Load, change: Callable[[Json], Any], words: str) -> None:
    laptop, server = cells(two_machines(load, change), "original")
    assert "not comparable" not in (laptop or "")
    assert server == f"not comparable: {words}"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["protocol"].update(seed=7, timeout_s=1.0),
        lambda m: m["workload"].update(repeats=12, threads=48),
        lambda m: m["runtime_info"].update(version="1.99"),
        lambda m: m.update(prompt_source="called otherwise"),
        lambda m: m["workload"].update(warmup_prompt_tokens=4096),
        lambda m: m["workload"].update(warmup_prompt_tokens=16),  # of a card, against a CPU
    ],
)
def test_what_moves_no_median_is_no_difference(load: Load, change: Callable[[Json], Any]) -> None:
    assert "not comparable" not in str(cells(two_machines(load, change), "original"))


def test_below_one_the_minor_version_counts(load: Load) -> None:
    def older(record: Json, version: str) -> Json:
        for m in record["measurements"]:
            m["runtime_info"]["version"] = version
        return record

    mixed = merge(load(older(laptop_run(), "0.3.36"), older(server_run(), "0.4.1")))
    assert "other runtime major (0.4 against 0.3)" in str(cells(mixed, "original, GGUF"))
    near = merge(load(older(laptop_run("x"), "0.3.36"), older(server_run("y"), "0.3.2")))
    assert "not comparable" not in str(cells(near, "original, GGUF"))


def test_the_majority_is_the_measure(load: Load) -> None:
    odd = laptop_run("odd")
    for m in odd["measurements"]:
        m["prompt_sha256"] = "a" * 64
        m["host"] = odd["host"] = {**LAPTOP, "ram_bytes": 8_000_000_000}
    third = bench([measurement("original", 30, host=SERVER)], run="3", host=SERVER)
    merged = merge(load(odd, laptop_run(), third))
    told = cells(merged, "original, GGUF")
    assert [bool(cell and "other prompt" in cell) for cell in told] == [True, False, False]


def test_two_files_of_one_name_on_one_machine_are_two_rows(load: Load) -> None:
    one, two = measurement("m", 30), measurement("m", 30)
    two["artifact"]["sha256"] = "b" * 64
    merged = merge(load(bench([one, two])))
    assert len(rows(merged.cases)) == 2


def test_other_work_is_another_row(load: Load) -> None:
    deep = measurement("original", 30, work=workload(depth_tokens=4096))
    merged = merge(load(bench([measurement("original", 30), deep])))
    assert [row.shape.words for row in rows(merged.cases)] == [
        "prompt 128, decode 16",
        "prompt 128, decode 16, depth 4096",
    ]


def test_other_options_are_other_work(load: Load) -> None:
    cases = [measurement("original", 30), measurement("cut24", 24)]
    cases[1]["options"] = {"kv_type": "q4_0"}
    merged = merge(load(bench(cases)))
    assert [row.shape.words for row in rows(merged.cases)] == [
        "prompt 128, decode 16",
        "prompt 128, decode 16, kv_type q4_0",
    ]
    assert why_unlike(merged.cases[1], merged.cases[0], artifact=False) == [
        "other option (kv_type q4_0 against not set)"
    ]
    assert gains(merged.measured) == []
    assert fronts(merged) == []
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert [line["options"] for line in lines] == ["", "kv_type q4_0"]


def test_machines_are_named_by_their_parts(both: Merged) -> None:
    assert [m.name for m in both.machines] == [
        "Example Core 7 CPU, 8 cores, 32.0 GB",
        "Example Server 99, 48 cores, 512 GB, Example H9",
    ]
    assert [c.place.name for c in both.cases if c.run == 2][0] == "Example H9"
    text = str(machine_table(both.machines))
    for words in ("driver 999.1", "141 GB", "700 W", "docker container", "reads 40.0 GB/s"):
        assert words in text


def test_machines_of_one_name_get_letters(load: Load) -> None:
    other_card = {**SERVER, "devices": [SERVER["devices"][0], {**CARD, "uuid_sha256": "6" * 64}]}
    other = bench(
        [measurement("original", 30, host=other_card, device="cuda:0")], run="b", host=other_card
    )
    merged = merge(load(server_run("a"), other))
    assert [m.name[-2:] for m in merged.machines] == [" A", " B"]
    assert {c.place.name for c in merged.cases} == {"Example H9 A", "Example H9 B"}


def test_equal_cards_in_unlike_machines_get_letters(load: Load) -> None:
    small = {**SERVER, "ram_bytes": 64_000_000_000}
    other = bench([measurement("original", 30, host=small, device="cuda:0")], run="b", host=small)
    merged = merge(load(server_run("a"), other, laptop_run()))
    names = list(dict.fromkeys(c.place.name for c in merged.cases))
    assert names == ["Example H9 A", "Example H9 B", "Example Core 7 CPU"]


def test_a_machine_after_an_update_is_the_same_machine(load: Load) -> None:
    later = {**LAPTOP, "kernel": "Linux 6.9", "ram_bytes": LAPTOP["ram_bytes"] - 4096}
    later["libraries"] = {"numpy": "9"}
    again = bench([measurement("original", 30, host=later, seed=1)], run="again", host=later)
    merged = merge(load(laptop_run(), again))
    assert len(merged.machines) == 1
    assert merged.machines[0].runs == (1, 2)
    assert str(cells(merged, "original, GGUF")[0]).count(";") == 1


def test_a_laptop_measured_through_vulkan_is_the_same_machine(load: Load) -> None:
    shown_by_llama = measurement("original", 30, device="vulkan:0")
    shown_by_llama["device_info"] = {"id": "vulkan:0", "name": "Example graphics"}
    merged = merge(load(laptop_run(), bench([shown_by_llama], run="vulkan")))
    (machine,) = merged.machines
    assert [id_ for id_, _ in machine.gpus] == ["vulkan:0"]
    assert {c.place.name for c in merged.cases} == {"Example Core 7 CPU CPU", "Example graphics"}


def test_other_threads_on_one_machine_are_other_work(load: Load) -> None:
    slow = measurement("original", 30, work=workload(threads=2))
    cases = [measurement("original", 30), measurement("original", 30, seed=2)]
    merged = merge(load(bench(cases), bench([slow], run="2")))
    assert "other workload (threads 2 against 8)" in str(cells(merged, "original"))


def test_two_cards_of_one_machine_are_told_apart(load: Load) -> None:
    host = {**SERVER, "devices": [*SERVER["devices"], {**CARD, "id": "cuda:1"}]}
    cases = [measurement("original", 30, host=host, device=f"cuda:{n}") for n in (0, 1)]
    merged = merge(load(bench(cases, host=host)))
    assert [c.place.name for c in merged.cases] == ["Example H9 (cuda:0)", "Example H9 (cuda:1)"]
    assert "2 x Example H9" in merged.machines[0].name


def test_no_record_without_a_measurement_makes_a_report(load: Load) -> None:
    with pytest.raises(ShortstackError, match="no measurement"):
        merge(load(bench([])))


def test_the_cost_of_depth_finds_the_line_that_the_sample_was_made_by(both: Merged) -> None:
    lines = {line.name: line for line in depth_lines(both.measured)}
    assert len(lines) == 3
    gguf = lines["Example Core 7 CPU, llama.cpp, GGUF Q8_0"]
    assert gguf.layers == (18, 24, 30)
    assert gguf.ms_per_layer == pytest.approx(0.5, rel=0.05)
    assert gguf.ms_fixed == pytest.approx(2.0, rel=0.2)
    card = lines["Example H9, llama.cpp, GGUF Q8_0"]
    assert card.ms_per_layer == pytest.approx(0.5 / 9, rel=0.05)


def test_lines_of_unlike_size_get_charts_of_their_own(load: Load) -> None:
    slow = [measurement(f"cut{n}", n, "onnx:int8", speed=0.05) for n in (30, 24)]
    fast = [measurement(f"cut{n}", n) for n in (30, 24)]
    drawn = figures(depth_lines(merge(load(bench(slow + fast))).measured), [], None)
    assert [len(figure.legend) for figure in drawn] == [1, 1]
    assert [figure.title.split(", up to ")[1] for figure in drawn] == ["340 ms", "17.0 ms"]


def test_a_depth_that_was_measured_otherwise_is_left_out(load: Load) -> None:
    record = laptop_run()
    record["measurements"][1]["prompt_sha256"] = "a" * 64
    line = next(li for li in depth_lines(merge(load(record)).measured) if "GGUF" in li.name)
    assert line.layers == (18, 30)
    assert line.left_out == 1


def test_two_models_are_not_joined_by_a_line(load: Load) -> None:
    large = measurement("large", 32)
    large["artifact"]["n_params"] = 7_000_000_000
    merged = merge(load(bench([measurement("small", 30), large])))
    assert depth_lines(merged.measured) == []
    assert gains(merged.measured) == []


def test_a_straight_line_is_met_exactly() -> None:
    assert straight_line([(1, 5), (2, 7), (4, 11)]) == pytest.approx((2, 3))


def test_fewer_layers_are_compared_in_turn_within_a_run(both: Merged) -> None:
    found = gains(both.measured)
    assert len(found) == 5
    cut = next(g for g in found if g.case.n_layers == 18 and g.case.run == 1)
    assert cut.paired
    assert cut.decode is not None
    assert cut.decode.estimate == pytest.approx(17 / 11, rel=0.02)
    assert cut.bytes_ratio == pytest.approx((30 * PER_LAYER + REST) / (18 * PER_LAYER + REST))


def test_a_case_tried_again_in_a_later_sitting_is_not_paired(load: Load) -> None:
    record = bench([measurement("original", 30), measurement("cut24", 24)])
    for trial in record["measurements"][1]["trials"]:
        trial["conditions"]["sitting"] = 1
    (found,) = gains(merge(load(record)).measured)
    assert found.decode is not None
    assert not found.paired


def test_fewer_layers_under_another_prompt_are_refused(load: Load) -> None:
    record = bench([measurement("original", 30), measurement("cut24", 24)])
    record["measurements"][1]["prompt_sha256"] = "a" * 64
    merged = merge(load(record))
    assert gains(merged.measured)[0].decode is None
    assert "not comparable: other prompt" in str(shown.gain(gains(merged.measured)))


def test_dominance_is_nowhere_worse_and_once_better() -> None:
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))


def test_without_quality_the_front_is_of_speed_and_memory_and_says_so(both: Merged) -> None:
    assert both.quality is None
    for front in fronts(both):
        assert front.judged_by == ("decode speed", "peak memory")
        assert [p.case.n_layers for p in front.best] == [18]
    text = to_markdown(both)
    assert "No record and no evaluation tells the quality" in text
    assert "quality is not judged" in to_html(both)


def test_an_evaluation_puts_quality_on_the_front(load: Load) -> None:
    record = laptop_run()
    judged = evaluation(record["measurements"], [8.0, 9.0, 12.0, 8.0, 9.5])
    merged = merge(load(record), [("eval.json", judged)])
    front = fronts(merged)[0]
    assert front.judged_by == ("decode speed", "perplexity", "peak memory")
    assert [p.case.n_layers for p in front.best] == [30, 24, 18]
    assert all("ONNX" in p.case.export for p in front.points if p.beaten_by)
    assert "8.00 (7.90 to 8.10)" in to_markdown(merged)


def test_an_artifact_without_quality_is_not_judged(load: Load) -> None:
    record = laptop_run()
    judged = evaluation(record["measurements"][:3], [8.0, 9.0, 12.0])
    front = fronts(merge(load(record), [("eval.json", judged)]))[0]
    left = [p for p in front.points if p.left_out]
    assert {p.left_out for p in left} == {"no quality figure"}
    assert len(left) == 2


def test_an_evaluated_folder_is_found_by_the_hash_of_its_artifact(load: Load) -> None:
    """Of an ONNX folder an evaluation hashes the tokenizer too: hash and size are others."""
    record = laptop_run()
    judged = evaluation(record["measurements"], [8.0, 9.0, 12.0, 8.0, 9.5])
    for model in judged["models"]:
        model |= {"artifact_sha256": model["sha256"], "sha256": "0" * 64, "size_bytes": 1}
    front = fronts(merge(load(record), [("eval.json", judged)]))[0]
    assert not [p for p in front.points if p.left_out]


def test_a_peak_of_nothing_is_a_figure(load: Load) -> None:
    cases = [measurement(n, 30, host=SERVER, device="cuda:0") for n in ("one", "two")]
    cases[0]["memory"] = []
    cases[1]["memory"][0]["device_memory"]["peak_device_bytes"] = 0
    front = fronts(merge(load(bench(cases, host=SERVER))))[0]
    assert front.judged_by == ("decode speed", "peak memory")
    assert [p.left_out for p in front.points] == ["no memory figure", None]


def test_what_is_not_judged_is_not_drawn(load: Load) -> None:
    record = bench([measurement(f"cut{n}", n) for n in (30, 24, 18)])
    record["measurements"][1]["prompt_sha256"] = "a" * 64
    (drawn,) = figures([], fronts(merge(load(record))), None)
    assert len(drawn.legend) == 2
    assert "1 not judged: see the table." in drawn.note


def test_more_accuracy_is_better(load: Load) -> None:
    record = bench([measurement("original", 30), measurement("cut24", 24, speed=0.5)])
    judged = evaluation(record["measurements"], [0.4, 0.6])
    judged["sets"] = [{"name": "news", "kind": "choice", "metric": "accuracy"}]
    for result in judged["results"]:
        result["summary"] = {"accuracy": result["summary"]["perplexity"]}
    front = fronts(merge(load(record), [("eval.json", judged)]))[0]
    assert [p.case.label for p in front.best] == ["original", "cut24"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"schema": 2}, "is no evaluation"),
        ({"models": [{}]}, "is damaged"),
        ({"results": [{"set": "news", "model": "x"}]}, "is damaged"),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_refused(load: Load, damage: Json, words: str) -> None:
    record = laptop_run()
    judged = {**evaluation(record["measurements"], [1.0] * 5), **damage}
    with pytest.raises(ShortstackError, match=f"here/eval.json {words}"):
        merge(load(record), [("here/eval.json", judged)])


def test_which_machine_runs_what_tells_the_share_of_memory(both: Merged) -> None:
    table = shown.runs_this(both)
    line = next(r for r in table.rows if r[0].startswith("original, GGUF") and "H9" in r[2])
    assert line[4] == "yes, in under 1 % of its memory"
    assert line[-1].replace("\N{NARROW NO-BREAK SPACE}", "") == "141000"


def test_what_was_not_run_on_a_machine_is_computed_for_it_and_marked(load: Load) -> None:
    small = {**SERVER, "ram_bytes": 4_000_000_000, "devices": SERVER["devices"][:1]}
    large = measurement("large", 3000)
    other = bench([measurement("small", 30, host=small)], run="2", host=small)
    merged = merge(load(bench([large]), other))
    table = would_hold(merged.cases)
    told = {(row[0].partition(",")[0], row[2]): row[4] for row in table.rows}
    assert told == {("large", "Example Server 99"): "no", ("small", "Example Core 7 CPU"): "yes"}
    assert table.caption.startswith("Projected, not measured")
    assert table.caption in to_html(merged)
    assert would_hold(merge(load(bench([large]))).cases).rows == ()


def test_a_model_that_failed_says_so(load: Load) -> None:
    record = laptop_run()
    record["measurements"][0] |= {
        "trials": [],
        "memory": [],
        "failure": {"kind": "error", "message": "needs 40 GB, there are 32 GB", "phase": "load"},
    }
    merged = merge(load(record))
    assert "no: needs 40 GB, there are 32 GB (during load)" in str(shown.runs_this(merged))
    assert cells(merged, "original, GGUF") == ["failed"]
    text = " ".join(Page(to_html(merged)).words)
    assert "1 did not work" in text


def test_a_model_that_failed_elsewhere_failed_and_is_not_called_unlike(load: Load) -> None:
    def fail(m: Json) -> None:
        why = {"kind": "error", "message": "it does not fit", "phase": "load"}
        m |= {"trials": [], "memory": [], "runtime_info": {}, "failure": why}

    merged = two_machines(load, fail)
    assert cells(merged, "original")[1] == "failed"
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert {line["not_comparable"] for line in lines} == {""}
    assert "not comparable" not in lead(merged, rows(merged.cases))


def guess(words: str, low: float | None, fits: tuple[tuple[float, bool], ...]) -> Projected:
    high = None if low is None else 2 * low
    error = "not known: one device was measured" if low is None else "at most 12 % on 3 devices"
    return Projected(words, words, words, words, 61.0, low, high, error, 1e9, fits, words)


def test_what_is_projected_is_marked_and_apart(load: Load) -> None:
    sizes = ((8e9, False), (24e9, True))
    guesses = (guess("Card X", 55.0, sizes), guess("Card Y", None, ()))
    merged = merge(load(laptop_run()), projected=guesses)
    assert not any("Card" in cell for row in shown.runs_this(merged).rows for cell in row)
    table = shown.projected(merged.projected)
    assert table.caption.startswith("Projected, not measured")
    said = str(table)
    for words in (
        "61.0 (55.0 to 110)",
        "'61.0'",
        "not known",
        "at most 12 %",
        "8.00 GB: no; 24.0 GB: yes",
    ):
        assert words in said
    assert to_html(merged).count('class="is-projected"') == 2
    assert "Projected, not measured" in to_markdown(merged)
    assert 'class="is-projected"' not in to_html(merge(load(server_run())))


@dataclass(frozen=True)
class HalfTheRoof:
    share: Interval | None = Interval(0.5, 0.4, 0.6, 6)
    unit: str = "bytes"
    reason: str | None = None
    notes: tuple[str, ...] = ("busy machine",)


def test_shares_of_the_roofline_are_taken_from_who_computes_them(load: Load) -> None:
    def share_of(record: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Any:
        assert record["schema"] == 2
        assert record["artifact"]["weight_bytes_per_token"] > 0
        assert ceilings["cpu"]["read_bytes_per_s"] > 0
        return HalfTheRoof(), HalfTheRoof(None, "float32", "no ceiling for int4", ())

    records = load(bench([measurement("original", 30)]))
    text = to_markdown(merge(records, share_of=share_of))
    for words in ("50 % (40 to 60)", "no ceiling for int4", "busy machine"):
        assert words in text
    assert "Share of the roofline" not in to_markdown(merge(records))


def test_flags_of_all_are_said_once(load: Load) -> None:
    record = laptop_run()
    for m in record["measurements"]:
        m["flags"] = ["few repeats"]
    record["measurements"][0]["flags"] += ["noisy", "busy"]
    told = warnings(merge(load(record)).cases)
    assert told[0] == ("All 5 measurements", "few repeats")
    assert [flags for _, flags in told[1:]] == ["noisy; busy"]


def test_memory_and_energy_name_their_method(both: Merged) -> None:
    assert "device total over idle" in str(shown.memory(both))
    table = shown.energy(both)
    assert len(table.rows) == 3
    assert table.rows[0][6:9] == ("40.0", "30.0", "70.0")
    assert "no counter can be read" in to_markdown(both)


def test_why_a_part_of_the_energy_is_missing_is_told(load: Load) -> None:
    record = server_run()
    record["measurements"][0]["energy_reason"] = "prefill: the counter stood still"
    assert energy_words(merge(load(record))) == [("Example H9", "prefill: the counter stood still")]


def test_cold_and_warm_loads_are_apart(load: Load) -> None:
    record = bench([measurement("original", 30)])
    record["measurements"][0]["trials"][0]["load_s"] = 9.0
    row = shown.speed(merge(load(record))).rows[0]
    assert row[-3:] == ("0.300", "9.00", "6")


def test_a_batch_counts_all_its_sequences(load: Load) -> None:
    one = measurement("original", 30)
    eight = measurement("original", 30, work=workload(batch=8))
    a, b = merge(load(bench([one, eight]))).cases
    assert sum(b.decode_tokens_per_s) == pytest.approx(8 * sum(a.decode_tokens_per_s), rel=0.02)
    assert sum(b.decode_ms) == pytest.approx(sum(a.decode_ms), rel=0.02)


def test_llama_bench_rows_have_its_fields_in_its_order(both: Merged) -> None:
    made = llama_bench_rows(both.cases)
    assert len(made) == 2 * len(both.cases)
    assert [name for name in made[0] if name != "use_mmap"] == list(LLAMA_BENCH)
    assert None not in [value for row in made for value in row.values()]
    prompt, decode = made[:2]
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (128, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 16, 128)
    assert decode["avg_ts"] == pytest.approx(1e9 * 16 / decode["avg_ns"], rel=0.01)
    assert len(decode["samples_ns"]) == len(decode["samples_ts"]) == 6
    assert {row["backends"] for row in made} == {"CPU", "CUDA"}
    assert made[-1]["gpu_info"] == "Example H9"


def test_llama_bench_rows_tell_what_the_runtime_said(load: Load) -> None:
    record = bench([measurement("original", 30)])
    told = {"n_gpu_layers": 31, "n_batch": 512, "n_ubatch": 256, "mmap": True, "backend": "Vulkan"}
    record["measurements"][0]["runtime_info"] |= {**told, "kv_cache": "Q8_0"}
    row = llama_bench_rows(merge(load(record)).cases)[0]
    assert row.items() >= {"n_gpu_layers": 31, "n_batch": 512, "n_ubatch": 256}.items()
    assert row.items() >= {"use_mmap": True, "backends": "Vulkan"}.items()
    assert (row["type_k"], row["type_v"]) == ("q8_0", "q8_0")


def test_llama_bench_rows_say_no_only_where_that_is_known(both: Merged) -> None:
    laptop, *_, server = llama_bench_rows(both.cases)
    assert (laptop["n_gpu_layers"], server["n_gpu_layers"]) == (0, -1)
    assert laptop["use_mmap"] == ""
    assert laptop["flash_attn"] == -1
    assert laptop["type_k"] == "f16"


def test_a_batch_has_no_place_in_llama_bench(load: Load) -> None:
    cases = [measurement("original", 30, work=workload(batch=8)), measurement("cut24", 24)]
    merged = merge(load(bench(cases)))
    assert len(llama_bench_rows(merged.cases)) == 2
    assert "1 measurement of a batch above 1" in to_markdown(merged)


def test_csv_has_one_line_a_measurement_and_computes_nothing(load: Load) -> None:
    record = laptop_run()
    record["measurements"][0]["label"] = '=HYPERLINK("http://x","y")'
    merged = merge(load(record, server_run()))
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert len(lines) == 8
    assert lines[0]["label"].startswith("'=HYPERLINK")
    assert float(lines[1]["decode_step_ms"]) == pytest.approx(14.0, rel=0.02)
    assert lines[-1]["decode_net_j_per_token"] == "30.0"
    assert not any(value.startswith(("=", "@", "+")) for line in lines for value in line.values())


def hostile(words: str) -> Json:
    """Every text of a record replaced, but those that are read by rule."""
    record = laptop_run()
    m = record["measurements"][0]
    record |= {"command": words, "tool_version": words, "started_at": words}
    record["host"] |= {"os": words, "kernel": words, "container": words, "machine": words}
    record["host"]["cpu"] |= {"model": words, "isa": [words]}
    record["ceilings"] = {
        words: {
            "read_bytes_per_s": 1.0,
            "matmul_flops_per_s": {words: 1.0},
            "method": words,
            "samples": {words: words},
        }
    }
    m |= {"label": words, "runtime": words, "prompt_source": words, "flags": [words]}
    m |= {"device": words, "energy_reason": words, "prompt_sha256": words}
    m["device_info"] = {"name": words, "driver": words, "vram_bytes": 10**10}
    m["runtime_info"] |= {"version": words, "threads": words, "kv_cache": words}
    m["options"] = {words: words}
    m["artifact"] |= {"path": words, "notes": [words], "sha256": words}
    m["artifact"]["spec"] = {"format": words, "precision": words, "options": {words: words}}
    m["memory"][0]["method"] = words
    m["failure"] = {"kind": "error", "message": words, "phase": words}
    return record


EVIL = (
    '<script>alert("1")</script>|`*x*`\n# heading',
    "</style></title><img src=x onerror=alert(1)>",
    "'\"><a href=javascript:alert(1)>{{ 7 * 7 }}{% raw %}",
    "\x00\x1b[31m",
)


@pytest.mark.parametrize("words", EVIL)
def test_hostile_words_are_escaped_everywhere(load: Load, words: str) -> None:
    merged = merge(
        load(hostile(words), server_run()),
        projected=[guess(words, 1.0, ())],
        share_of=shares,
    )
    page = Page(to_html(merged))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "49" not in [w.strip() for w in page.words]
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        target = attributes.get("href") or "#"
        assert target.startswith("#")
    lines = to_markdown(merged).splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert not any(re.search(r"(?<!\\)<|\x1b|\x00", line) for line in lines)
    assert json.loads(json.dumps(llama_bench_rows(merged.cases)))
    assert to_csv(merged, rows(merged.cases))


def test_a_path_in_a_command_is_not_shown(load: Load) -> None:
    record = bench([measurement("original", 30)])
    record["command"] = "shortstack bench /home/jane/models/a.gguf C:\\Users\\jane\\b.gguf -o out/x"
    record["measurements"][0]["artifact"]["path"] = "/home/jane/a.gguf"
    merged = merge(load(record))
    text = to_html(merged) + to_markdown(merged) + str(llama_bench_rows(merged.cases))
    assert "jane" not in text
    assert "shortstack bench a.gguf b.gguf -o x" in text


def test_the_page_is_whole_and_asks_for_nothing(both: Merged) -> None:
    text = to_html(both)
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "img"}
        assert "src" not in attributes
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes.get("href") or "")[1:] in ids
    assert not re.search(r"https?://", text)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_tables_have_captions_and_headers_of_both_kinds(both: Merged) -> None:
    page = Page(to_html(both))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") >= 8
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    scrolls = [a for t, a in page.tags if t == "div" and a.get("class") == "scroll"]
    assert len(scrolls) == tags.count("table")
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolls)


def test_markdown_tables_have_as_many_cells_as_columns(both: Merged) -> None:
    blocks = [b for b in to_markdown(both).split("\n\n") if b.startswith("| ")]
    assert len(blocks) >= 9
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_equal_records_give_equal_files(both: Merged) -> None:
    assert to_html(both) == to_html(both)


def test_four_files_are_written(both: Merged, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    paths = write_merged(both, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths)
    assert json.loads((out / "llama-bench.json").read_text(encoding="utf-8"))
