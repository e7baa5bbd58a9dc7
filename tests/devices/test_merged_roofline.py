"""`shortstack report --project`: shares of the roofline and projections in the merged report."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.cli import main

from .bench_sample import bench, laptop_run, measurement, written

LAPTOP = "core-i7-1260p-lpddr5-5200"


def test_shares_and_projections_come_from_the_records(tmp_path: Path) -> None:
    record = str(written(tmp_path / "a", laptop_run()))
    out = tmp_path / "merged"
    assert main(["report", record, "--project", LAPTOP, "-o", str(out), "-q"]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Share of what the device allows" in text
    lines = text.partition("Projected, not measured")[2].partition("## Speed")[0]
    assert lines.count("Core i7-1260P") == 5
    assert lines.count("one device was measured") == 5


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
