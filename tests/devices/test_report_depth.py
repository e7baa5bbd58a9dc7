"""Depth as a choice in the report: what exits cost and gain, what leaving early saves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shortstack.devices.report import ReportData, speedups, to_html, to_markdown
from shortstack.devices.report.headline import headline

from .sample import an_artifact, an_entry, sample

SPEC = "gguf:Q8_0"


def depth(at: int, layers: int, unseen: float | None, kl: float | None = 0.5) -> dict[str, Any]:
    figures = {"kl": kl, "perplexity": 30.0, "same_token": 0.5}
    return {"depth": at, "layers": layers, **figures, "unseen_perplexity": unseen}


def exits(*rows: dict[str, Any]) -> dict[str, Any]:
    whole = depth(30, 30, 20.0, 0.0)
    told = {"init": "last", "tokens": 12_000_000, "steps": 9, "best_step": 9}
    return {**told, "depths": [*rows, whole]}


def interval(estimate: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01}


def left(name: str = "finance/test") -> dict[str, Any]:
    rule = {
        **{"rule": "early exit", "accuracy": interval(0.70), "difference": interval(-0.05)},
        **{"saved": interval(0.10), "time_saved": interval(0.08), "same_answer": 0.9},
    }
    whole = {"rule": "whole model", "accuracy": interval(0.75)}
    how = {"n": 100, "chance": 0.5, "majority": 0.6, "device": "cpu", "dtype": "float32"}
    return {"set": name, **how, "rules": [whole, rule]}


@pytest.fixture
def data() -> ReportData:
    """An original and two exits, with nothing pruned."""
    sizes = {"original": (150, 120, 50), "exit-8": (60, 40, 150), "exit-15": (90, 60, 100)}
    entries = tuple(
        an_entry(label, "llama.cpp", an_artifact(label, SPEC, size, read), speed, (9, 9))
        for label, (size, read, speed) in sizes.items()
    )
    return dataclasses.replace(
        sample(),
        entries=entries,
        plan=None,
        pruned=None,
        quality=None,
        exits=exits(depth(8, 9, 80.0), depth(15, 16, None)),
    )


def test_the_original_is_compared_with_every_exit(data: ReportData) -> None:
    found = {c.label: c for c in speedups(data.entries)}
    assert found.keys() == {"exit-8", "exit-15"}
    assert found["exit-8"].bytes_ratio == pytest.approx(3.0)
    assert found["exit-15"].decode_speedup is not None
    assert found["exit-15"].decode_speedup.estimate == pytest.approx(2.0, rel=0.01)
    said = to_markdown(data)
    assert "Original over exit" in said
    assert "GGUF Q8\\_0, exit-15 in llama.cpp" in said
    assert "Original over pruned" not in said
    assert to_html(data).count('<p class="card-name">') == 2


def test_the_first_line_has_what_depth_costs_and_no_more_than_is_known(data: ReportData) -> None:
    words = headline(data)
    assert "all 30 layers (20.0), 4.00 times at 9." in words
    assert "times at 16" not in words
    unknown = dataclasses.replace(data, exits=exits(depth(8, 9, None, None)))
    assert "was not measured on unseen text" in headline(unknown)
    assert "| exit at 8 | 9 | – | – | 30.0 | – | 50.0 % |" in to_markdown(unknown)


def test_a_cut_is_said_before_the_exits_beside_it() -> None:
    both = dataclasses.replace(sample(), exits=exits(depth(8, 9, 80.0)), early_exit=[left()])
    words = headline(both)
    assert words.index("is worse") < words.index("with exits") < words.index("leaving early")


def test_an_early_exit_alone_claims_what_it_saves_and_costs(data: ReportData) -> None:
    alone = dataclasses.replace(
        data, entries=(), exits=None, early_exit=[left(), left("legal/test")]
    )
    said = to_markdown(alone)
    first = said.splitlines()[0]
    assert "accuracy 0.700 on finance/test" in first
    assert "the whole model’s is 0.750 (difference -0.050, -0.060 to -0.040)" in first
    assert "saves 10.0 % (9.0 % to 11.0 %) of the layers and 8.0 % (7.0 % to 9.0 %)" in said
    assert "In exchange" not in said
    assert "Nothing was measured" not in said + to_html(alone)
    assert said.count("| early exit |") == 2
    assert "PyTorch float32 on cpu" in said


def test_files_of_one_size_are_not_less_than_nothing_smaller(data: ReportData) -> None:
    sizes = [150.0, 150.0, 90.0]
    entries = tuple(
        dataclasses.replace(entry, artifact={**(entry.artifact or {}), "size_bytes": size})
        for entry, size in zip(data.entries, sizes, strict=True)
    )
    said = to_markdown(dataclasses.replace(data, entries=entries))
    assert "files 0 to 40 % smaller" in said
