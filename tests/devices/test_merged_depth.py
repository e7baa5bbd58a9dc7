"""The merged report: what a layer costs, and what fewer of them gain."""

from __future__ import annotations

import pytest

from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.report.merged import tables as shown
from shortstack.devices.report.merged.depth import depth_lines, straight_line
from shortstack.devices.report.merged.gain import gains
from shortstack.devices.report.merged.pictures import figures

from .bench_sample import (
    PER_LAYER,
    REST,
    bench,
    laptop_run,
    measurement,
)
from .merged_sample import Load


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
