"""`shortstack report --project`: shares of the roofline and projections in the merged report."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.cli import main

from .bench_sample import CARD, SERVER, Json, bench, laptop_run, measurement, written

LAPTOP = "core-i7-1260p-lpddr5-5200"


def test_shares_and_projections_come_from_the_records(tmp_path: Path) -> None:
    record = str(written(tmp_path / "a", laptop_run()))
    out = tmp_path / "merged"
    assert main(["report", record, "--project", LAPTOP, "-o", str(out), "-q"]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Share of what the device allows" in text
    lines = text.partition("Projected, not measured")[2].partition("## Speed")[0]
    assert lines.count("| Core i7-1260P") == 5
    assert lines.count("one device was measured") == 5
    assert lines.count("83.2 GB/s (Intel, ") == 5
    for note in (
        "the projection is too high",
        "the error across devices is unknown",
        "the error of its memory is not known",
        "models left out in turn, on the same devices: off by at most",
    ):
        assert lines.count(note) == 5


def test_an_unknown_device_and_no_basis_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(written(tmp_path / "a", laptop_run()))
    bare = str(written(tmp_path / "b", bench([measurement("original", 30)], ceilings={})))
    out = str(tmp_path / "merged")
    assert main(["report", good, "--project", "rtx-409", "-o", out]) == 2
    assert "Did you mean 'rtx-4090'?" in capsys.readouterr().err
    assert main(["report", bare, "--project", LAPTOP, "-o", out]) == 2
    assert "nothing can be projected" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def a_card(name: str, label: str, **changes: object) -> Json:
    """A run of one model on a card of that name."""
    host = {**SERVER, "devices": [SERVER["devices"][0], {**CARD, "name": name}]}
    cases = [measurement(label, 30, host=host, device="cuda:0")]
    return bench(cases, run=name, host=host, **changes)


def test_cards_whose_speeds_are_known_in_two_ways_are_projected(tmp_path: Path) -> None:
    ceiling = {"read_bytes_per_s": 5e11, "matmul_flops_per_s": {}}
    known = written(tmp_path / "a", a_card("NVIDIA L4", "one", ceilings={}))
    odd = written(tmp_path / "b", a_card("A card", "other", ceilings={"cuda:0": ceiling}))
    asked = ["report", str(known), str(odd), "--project", "rtx-4090", "-q"]
    assert main([*asked, "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "RTX 4090" in text


def test_a_device_that_gets_no_row_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laptop = str(written(tmp_path / "a", laptop_run()))
    card = str(written(tmp_path / "b", a_card("NVIDIA L4", "one", ceilings={})))
    out = str(tmp_path / "out")
    assert main(["report", laptop, "--project", LAPTOP, "--project", "l4", "-o", out]) == 2
    told = "projected on l4: no record that can be its basis is of its kind (gpu). Leave"
    assert told in capsys.readouterr().err
    assert main(["report", card, "--project", "l4", "-o", out]) == 2
    assert "projected on l4: it was measured itself" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
