"""What `benchmarks.double` says of files: lines, and reading between their points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from benchmarks.double import File, arguments, between, lines, recorded, tables

FILES = [
    File(30, "float32", "float32", math.inf, 20.0),
    File(30, "packed", "packed 5", 100.0, 20.0),
    File(30, "packed", "packed 4", 50.0, 40.0),
    File(30, "packed", "packed odd", 60.0, 50.0),  # larger and worse than the one before
    File(15, "4-bit", "gguf:Q4_0", 40.0, 30.0),
    File(15, "4-bit", "gguf:Q6_K", 80.0, 25.0),
]


def test_between_is_straight_in_logarithms() -> None:
    line = [(100.0, 20.0), (25.0, 80.0)]
    assert between(line, 50.0) == pytest.approx(40.0)
    assert between(line, 100.0) == pytest.approx(20.0)
    assert between(line, 24.9) is None


def test_a_file_that_another_of_its_line_beats_is_left_out() -> None:
    found = lines(FILES)
    assert [file.name for file in found[30, "packed"]] == ["packed 5", "packed 4"]
    assert len(found[15, "4-bit"]) == 2


def test_the_best_of_a_size_is_bold() -> None:
    words = ["a", "b", "--out", "o", "--text", "t", "--megabytes", "50", "--ratios", "1.5"]
    told = tables(FILES, arguments(words))
    (size,) = [row for row in told if row.startswith("| 50 MB")]
    assert size.split("|")[2].strip() == "2.000"
    assert size.split("|")[3].strip().startswith("**1.4")  # between 25 and 30, over 20
    (ratio,) = [row for row in told if row.startswith("| 1.5 x")]
    assert "**40.0**" in ratio


def test_files_are_read_from_a_record(tmp_path: Path) -> None:
    rows = [
        vars(one) | {"megabytes": None if math.isinf(one.megabytes) else one.megabytes}
        for one in FILES
    ]
    (tmp_path / "set.json").write_text(json.dumps(rows), encoding="utf-8")
    assert recorded(tmp_path / "set.json") == FILES


def test_without_models_or_records_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        arguments(["a", "--out", "o"])
    assert "or --records" in capsys.readouterr().err
