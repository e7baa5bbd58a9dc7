"""The merged report: what nothing else beats, with the quality that an evaluation found."""

from __future__ import annotations

import pytest

from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.report.merged.front import dominates, fronts
from shortstack.devices.report.merged.pictures import figures
from shortstack.devices.report.merged.write import to_html, to_markdown
from shortstack.errors import ShortstackError

from .bench_sample import (
    SERVER,
    Json,
    bench,
    evaluation,
    laptop_run,
    measurement,
)
from .merged_sample import Load


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
